//! Looking after the store: names, what takes how much space, what nobody needs, and whether all is as it was.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::Serialize;

use crate::digest::Digest;
use crate::layer::{self, ExpectedLayer, LayerError};
use crate::merge::MergeError;
use crate::reference::Reference;
use crate::store::{ImageRecord, LayerRecord, ResolveError, Store, StoreError};

/// What the store takes on disk, in bytes of blocks that are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Layers as file systems, and what merges them.
    pub layers: u64,
    /// Layers as they came, configurations, manifests and recipes.
    pub blobs: u64,
    /// Downloads that were broken off.
    pub partial: u64,
}

/// What a prune did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pruned {
    /// Images that are gone.
    pub images: Vec<Digest>,
    /// Bytes that are free now.
    pub bytes: u64,
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// A file is missing, torn, or of another digest.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A layer as it came is not what it was.
    #[error("layer {diff_id} as it came")]
    Archive {
        /// The layer.
        diff_id: Digest,
        /// What is wrong.
        #[source]
        source: Box<LayerError>,
    },
    /// A layer's file system is not what comes of its archive.
    #[error(
        "the file system of layer {diff_id} differs from its archive at byte {at}; remove the image and get it again"
    )]
    Converted {
        /// The layer.
        diff_id: Digest,
        /// The first byte that differs.
        at: u64,
    },
    /// Its layers cannot be merged.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The merged file system is not what comes of the layers.
    #[error(
        "{path} differs at byte {at} from what comes of the image's layers; delete it, and the next start makes it again"
    )]
    Merged {
        /// The file.
        path: PathBuf,
        /// The first byte that differs.
        at: u64,
    },
    /// A layer's archive is not kept, so that nothing can be compared.
    #[error("layer {0} is not kept as it came, and cannot be checked")]
    NotKept(Digest),
    /// A file cannot be read.
    #[error("layer {diff_id} cannot be read")]
    Read {
        /// The layer.
        diff_id: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Store {
    /// Gives an image one more name. It is taken from the image that had it.
    pub fn tag(&self, image: &str, name: &Reference) -> Result<(), ResolveError> {
        let found = self.resolve(image)?;
        let _hold = self.hold()?;
        let record = self.record(found.id)?;
        match self.update(ImageRecord { names: vec![name.to_string()], ..record })? {
            true => Ok(()),
            false => Err(ResolveError::NotFound(image.to_owned())),
        }
    }

    /// What is on disk.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        let of = |name: &str| self.disk_usage(name);
        Ok(Usage {
            layers: of("layers/sha256")? + of("merged/sha256")?,
            blobs: of("blobs/sha256")? + of("recipes/sha256")?,
            partial: of("partial/sha256")?,
        })
    }

    /// Removes images that have no name and that `needed` does not want, or all that it does not want; and downloads
    /// that nobody goes on with. Files of a store that is in use stay until it is not.
    pub fn prune(&self, all: bool, needed: impl Fn(Digest) -> bool) -> Result<Pruned, StoreError> {
        let total = |usage: Usage| usage.layers + usage.blobs + usage.partial;
        let before = total(self.usage()?);
        let images = self.forget(|image| (all || image.names.is_empty()) && !needed(image.id))?;
        self.sweep_all()?;
        let after = total(self.usage()?);
        Ok(Pruned { images, bytes: before.saturating_sub(after) })
    }

    /// Looks at all that an image has: each blob must have its digest, and each file system must be what comes of its
    /// archive. Gives all that is wrong.
    pub fn verify(&self, image: &str) -> Result<Vec<Damage>, ResolveError> {
        let found = self.resolve(image)?;
        let _hold = self.hold()?;
        let record = self.record(found.id)?;
        let mut damage = Vec::new();
        if let Some(digest) = record.manifest {
            damage.extend(self.read_blob(digest).err().map(Damage::from));
        }
        let mut seen = HashSet::new();
        for layer in &record.layers {
            if seen.insert(layer.diff_id) {
                damage.extend(self.verify_layer(layer).err());
            }
        }
        damage.extend(self.verify_merged(&record).err());
        Ok(damage)
    }

    /// Compares what was merged with what comes of the layers now. Nothing may have been merged yet.
    fn verify_merged(&self, record: &ImageRecord) -> Result<(), Damage> {
        let layers: Vec<Digest> = record.layers.iter().map(|layer| layer.diff_id).collect();
        let path = self.merged_path(&layers);
        let failed = |source| Damage::Store(StoreError::Io { action: "read", path: path.clone(), source });
        let there = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            there => there.map_err(failed)?,
        };
        let again = self.merge_into_new(&layers)?;
        let again = again.file().try_clone().map_err(failed)?;
        match first_difference(there, again).map_err(failed)? {
            Some(at) => Err(Damage::Merged { path, at }),
            None => Ok(()),
        }
    }

    fn verify_layer(&self, layer: &LayerRecord) -> Result<(), Damage> {
        let diff_id = layer.diff_id;
        let blob =
            layer.blob.filter(|blob| self.has_archive(diff_id, blob)).ok_or(Damage::NotKept(diff_id))?;
        let archive = self.open_archive(diff_id, &blob)?;
        let expected = ExpectedLayer { blob: Some((blob.digest, blob.bytes)), diff_id };
        let again = self.new_layer()?;
        layer::convert(archive, &expected, again.blob(), again.recipe(), |_| {})
            .map_err(|source| Damage::Archive { diff_id, source: Box::new(source) })?;
        let read = |source| Damage::Read { diff_id, source };
        let there = File::open(self.layer_path(diff_id)).map_err(read)?;
        let again = again.blob().try_clone().map_err(read)?;
        match first_difference(there, again).map_err(read)? {
            Some(at) => Err(Damage::Converted { diff_id, at }),
            None => Ok(()),
        }
    }

    fn disk_usage(&self, name: &str) -> Result<u64, StoreError> {
        let directory = self.root().join(name);
        let failed = |source| StoreError::Io { action: "list", path: directory.clone(), source };
        let mut bytes = 0;
        let entries = match fs::read_dir(&directory) {
            // A store of an older version.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            // One that goes meanwhile takes no space.
            bytes += entry.map_err(failed)?.metadata().map_or(0, |metadata| metadata.blocks() * 512);
        }
        Ok(bytes)
    }
}

/// Where two files differ first.
fn first_difference(one: File, mut other: File) -> io::Result<Option<u64>> {
    const PIECE: usize = 256 << 10;
    io::Seek::rewind(&mut other)?;
    let (mut one, mut other) = (BufReader::with_capacity(PIECE, one), BufReader::with_capacity(PIECE, other));
    let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
    let mut position = 0;
    loop {
        let (a, b) = (fill(&mut one, &mut left)?, fill(&mut other, &mut right)?);
        let (a, b) = (left.get(..a).unwrap_or_default(), right.get(..b).unwrap_or_default());
        if a != b {
            let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            return Ok(Some(position + same as u64));
        }
        if a.is_empty() {
            return Ok(None);
        }
        position += a.len() as u64;
    }
}

/// Reads until the buffer is full or there is no more.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while let Some(rest) = buffer.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest)? {
            0 => break,
            count => length += count,
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;

    #[test]
    fn damaged_image_does_not_hide_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let put = |config: &str| store.put_image(config.as_bytes(), &[], &[]).unwrap();
        let (damaged, whole) = (put(CONFIG), put(&format!("{CONFIG} ")));
        fs::remove_file(store.blob_path(damaged)).unwrap();
        assert!(store.images().is_err());
        let each = store.each_image().unwrap();
        assert!(matches!(&each[..], [Err(StoreError::Damaged { image, .. }), Ok(other)]
            if *image == damaged && other.id == whole));
        store.remove(&damaged.to_string()).unwrap();
        assert_eq!(store.images().unwrap().len(), 1);
    }

    #[test]
    fn what_is_new_about_a_removed_image_does_not_bring_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let names = ["a:1", "b:1"].map(|name| name.parse().unwrap());
        let id = store.put_image(CONFIG.as_bytes(), &[], &names[..1]).unwrap();
        store.tag("a:1", &names[1]).unwrap();
        let record = store.record(id).unwrap();
        assert_eq!(record.names.len(), 2);
        assert!(store.update(record.clone()).unwrap());
        for name in ["a:1", "b:1"] {
            store.remove(name).unwrap();
        }
        assert!(!store.update(record).unwrap());
        assert!(store.records().unwrap().is_empty());
    }
}
