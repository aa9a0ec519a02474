//! `index.json`: which images there are, and their names. Always read whole and replaced whole.

use std::path::Path;
use std::{fs, io};

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::reference::Reference;

/// Changes whenever older code would misread the store.
const VERSION: u32 = 1;

/// The file's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Index {
    version: u32,
    pub(super) images: Vec<ImageRecord>,
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    /// Of the configuration.
    pub(crate) id: Digest,
    /// Of the manifest, if the image came with one.
    pub(crate) manifest: Option<Digest>,
    /// Repositories with the digest under which a registry has the image, `docker.io/library/busybox@sha256:…`: of its
    /// manifest, or of the index that it was chosen from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) digests: Vec<String>,
    /// Full names. An image that has lost its last name stays, as in Docker, until it is removed by its ID.
    pub(crate) names: Vec<String>,
    /// Bottom first.
    pub(crate) layers: Vec<LayerRecord>,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) diff_id: Digest,
    pub(crate) erofs_bytes: u64,
    /// The layer as it travels, if it is kept in that form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) blob: Option<BlobRecord>,
}

/// A layer's blob under `blobs/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BlobRecord {
    pub(crate) digest: Digest,
    pub(crate) bytes: u64,
}

/// What became of an image by [`Index::remove`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RemovedRecord {
    pub(super) untagged: Vec<String>,
    pub(super) deleted: bool,
}

impl Default for Index {
    fn default() -> Self {
        Index { version: VERSION, images: Vec::new() }
    }
}

impl Index {
    /// Reads the file; one that is missing is empty.
    pub(super) fn read(path: &Path) -> io::Result<Index> {
        let content = match fs::read(path) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Index::default()),
            Err(error) => return Err(error),
        };
        let index: Index = serde_json::from_slice(&content)?;
        if index.version != VERSION {
            return Err(io::Error::other(format!(
                "it has version {}, this program knows version {VERSION}",
                index.version
            )));
        }
        Ok(index)
    }

    pub(super) fn encode(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec_pretty(self)?)
    }

    /// Adds an image, or what is new about one that is there. Its names are taken from whichever images had them.
    pub(super) fn add(&mut self, record: ImageRecord) {
        for image in &mut self.images {
            image.names.retain(|name| !record.names.contains(name));
        }
        match self.images.iter_mut().find(|image| image.id == record.id) {
            Some(image) => {
                image.names.extend(record.names);
                let of = |name: &str| name.split_once('@').map(|(repository, _)| repository.to_owned());
                image.digests.retain(|old| !record.digests.iter().any(|new| of(new) == of(old)));
                image.digests.extend(record.digests);
                // Manifest and blobs go together: one names the others.
                if record.manifest.is_some() || image.manifest.is_none() {
                    image.manifest = record.manifest;
                    image.layers = record.layers;
                } else {
                    for (old, new) in image.layers.iter_mut().zip(record.layers) {
                        old.erofs_bytes = new.erofs_bytes;
                    }
                }
            }
            None => self.images.push(record),
        }
    }

    /// Takes a name from the image `id`, or all (at most one) if none is given; without names left, the image goes.
    pub(super) fn remove(&mut self, id: Digest, name: Option<&Reference>) -> Option<RemovedRecord> {
        let position = self.images.iter().position(|image| image.id == id)?;
        let image = self.images.get_mut(position)?;
        let untagged = match name {
            Some(name) => {
                let name = name.to_string();
                image.names.retain(|other| *other != name);
                vec![name]
            }
            None => std::mem::take(&mut image.names),
        };
        let deleted = image.names.is_empty();
        if deleted {
            self.images.remove(position);
        }
        Some(RemovedRecord { untagged, deleted })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(content: &str, names: &[&str]) -> ImageRecord {
        ImageRecord {
            id: Digest::of(content.as_bytes()),
            manifest: None,
            digests: Vec::new(),
            names: names.iter().map(|&name| name.to_owned()).collect(),
            layers: Vec::new(),
        }
    }

    #[test]
    fn name_given_to_a_second_image_leaves_the_first() {
        let mut index = Index::default();
        index.add(record("a", &["docker.io/library/x:latest"]));
        index.add(record("b", &["docker.io/library/x:latest"]));
        assert_eq!(index.images, [record("a", &[]), record("b", &["docker.io/library/x:latest"])]);
    }

    #[test]
    fn image_that_loses_its_last_name_by_removal_goes() {
        let mut index = Index::default();
        let (x, y) = ("docker.io/library/x:latest", "docker.io/library/y:latest");
        index.add(record("a", &[x]));
        index.add(record("a", &[y]));
        let remove = |index: &mut Index, name: &str| {
            index.remove(Digest::of(b"a"), Some(&name.parse().unwrap())).unwrap()
        };
        assert_eq!(remove(&mut index, x), RemovedRecord { untagged: vec![x.to_owned()], deleted: false });
        assert_eq!(remove(&mut index, y), RemovedRecord { untagged: vec![y.to_owned()], deleted: true });
        assert!(index.images.is_empty());
    }

    #[test]
    fn index_of_another_version_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("index.json");
        assert_eq!(Index::read(&path).unwrap(), Index::default());
        fs::write(&path, r#"{"version":2,"images":[]}"#).unwrap();
        assert!(Index::read(&path).is_err());
    }
}
