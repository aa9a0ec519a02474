//! The root file system of an image: its layers merged, made when it is first needed and kept.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use crate::digest::Digest;
use crate::erofs::Reader;
use crate::image::Image;
use crate::merge::{MergeError, MergeLayer, layer_of, merge};
use crate::store::{ImageRecord, NewMerged, Store, StoreError, merged_key};

/// An EROFS file system in several files. Mounted from files or loop devices, the layers are its devices, in order;
/// one behind the other, all are one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootFs {
    /// Superblock, names and attributes.
    pub metadata: PathBuf,
    /// The layers in which its files' data lie. There may be none, and they need not be all of the image's.
    pub layers: Vec<PathBuf>,
}

impl Store {
    /// The root file system of an image. Whoever wants to open its files does all that under [`Store::hold`].
    pub fn root_fs(&self, image: &Image) -> Result<RootFs, MergeError> {
        let layers: Vec<Digest> = image.layers.iter().map(|layer| layer.diff_id).collect();
        self.root_fs_of(&layers)
    }

    /// The root file system of these layers, bottom first, which are all in the store.
    pub fn root_fs_of(&self, layers: &[Digest]) -> Result<RootFs, MergeError> {
        if let Some(there) = self.merged_before(layers) {
            return Ok(there);
        }
        let new = self.merge_into_new(layers)?;
        let metadata = self.merged_path(layers);
        if metadata.exists() && self.merged_before(layers).is_none() {
            // Damaged, and not just made by another process. It would be kept if it had the right length.
            let _ = std::fs::remove_file(&metadata);
        }
        new.publish(&metadata)?;
        self.merged_before(layers).ok_or_else(|| {
            let source = io::Error::other("what was just written is not to be read");
            StoreError::Io { action: "read", path: metadata, source }.into()
        })
    }

    /// Merges what is about to become an image, so that no start has to, and that layers which do not go together are
    /// refused.
    pub(crate) fn merge_records(&self, records: &[ImageRecord]) -> Result<(), MergeError> {
        records.iter().try_for_each(|record| {
            let layers: Vec<Digest> = record.layers.iter().map(|layer| layer.diff_id).collect();
            self.root_fs_of(&layers).map(drop)
        })
    }

    /// Merges layers into a nameless file.
    pub(crate) fn merge_into_new(&self, layers: &[Digest]) -> Result<NewMerged, MergeError> {
        let opened = layers.iter().map(|&diff_id| {
            let path = self.layer_path(diff_id);
            let open = |source| StoreError::Io { action: "open", path: path.clone(), source };
            Ok(MergeLayer { diff_id, blob: File::open(&path).map_err(open)? })
        });
        let opened: Vec<MergeLayer> = opened.collect::<Result<_, StoreError>>()?;
        let new = self.new_merged()?;
        merge(&opened, new.file(), merged_key(layers.iter().copied()).uuid())?;
        Ok(new)
    }

    /// What was merged before, if it is whole.
    fn merged_before(&self, layers: &[Digest]) -> Option<RootFs> {
        let metadata = self.merged_path(layers);
        let file = File::open(&metadata).ok()?;
        let devices = Reader::open(&file).and_then(|reader| reader.devices()).ok()?;
        let devices = devices.iter().map(|tag| layer_of(tag).filter(|layer| layers.contains(layer)));
        let layers = devices.map(|layer| Some(self.layer_path(layer?))).collect::<Option<_>>()?;
        Some(RootFs { metadata, layers })
    }
}
