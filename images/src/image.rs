//! An image as the store gives it out.

use std::path::PathBuf;

use oci_spec::image::ImageConfiguration;

use crate::digest::Digest;
use crate::inspect::{self, Inspect};
use crate::reference::Reference;
use crate::store::{ImageRecord, merged_key};

/// One image. A snapshot: what is removed from the store later still stands here.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of the configuration, by which Docker too identifies an image.
    pub id: Digest,
    /// The digest of the manifest, if the image came with one; docker-archives have none.
    pub manifest: Option<Digest>,
    /// All names; an image may have none.
    pub names: Vec<Reference>,
    /// When it was built, as its configuration says (RFC 3339).
    pub created: Option<String>,
    /// Bytes of all its layers as they are stored.
    pub size: u64,
    /// The configuration (OCI image-spec: config.md).
    pub config: ImageConfiguration,
    /// The layers, bottom first.
    pub layers: Vec<Layer>,
    /// Repositories with the digest under which a registry has the image: of its manifest, or of the index that it
    /// was chosen from.
    pub repo_digests: Vec<Reference>,
    raw_config: Vec<u8>,
}

/// One layer of an image, as an EROFS file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The digest of the layer's uncompressed tar archive.
    pub diff_id: Digest,
    /// The file that holds the file system.
    pub erofs: PathBuf,
    /// The file's length in bytes, a multiple of 4096.
    pub erofs_bytes: u64,
}

impl Image {
    pub(crate) fn new(
        record: &ImageRecord,
        names: Vec<Reference>,
        layers: Vec<Layer>,
        raw_config: Vec<u8>,
    ) -> Result<Image, serde_json::Error> {
        let config: ImageConfiguration = serde_json::from_slice(&raw_config)?;
        Ok(Image {
            id: record.id,
            manifest: record.manifest,
            repo_digests: record.digests.iter().filter_map(|name| name.parse().ok()).collect(),
            names,
            created: config.created().clone(),
            size: layers.iter().map(|layer| layer.erofs_bytes).sum(),
            config,
            layers,
            raw_config,
        })
    }

    /// The configuration byte for byte, as its digest was computed.
    pub fn raw_config(&self) -> &[u8] {
        &self.raw_config
    }

    /// By what its root file system is known: images of the same layers have the same.
    pub fn root_fs_key(&self) -> Digest {
        merged_key(self.layers.iter().map(|layer| layer.diff_id))
    }

    /// What `docker image inspect` would say.
    pub fn inspect(&self) -> Inspect {
        inspect::of(self)
    }
}
