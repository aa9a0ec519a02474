//! An image as it travels, to a registry or into an archive: a manifest, and blobs that it names.
//!
//! What came with a manifest leaves with it, byte for byte. For what came without (`docker save`'s archives) one is
//! made, once: each layer that is not compressed is compressed with gzip, which every tool reads, and manifest and
//! blobs are kept, so that the image has the same digest each time.

use std::io::{self, Read, Write};

use flate2::{Compression, GzBuilder};
use serde::{Deserialize, Serialize};

use crate::digest::{Digest, Hasher};
use crate::layer::{Encoding, detect};
use crate::store::{BlobRecord, ImageRecord, LayerRecord, Store, StoreError};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const PIECE: usize = 256 << 10;

/// An image that is ready to travel.
#[derive(Debug)]
pub(crate) struct Traveller {
    /// With blobs for all layers.
    pub(crate) record: ImageRecord,
    pub(crate) manifest: Vec<u8>,
    pub(crate) manifest_digest: Digest,
    pub(crate) media_type: String,
    /// The configuration's size.
    pub(crate) config_bytes: u64,
}

/// Why an image cannot travel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TravelError {
    /// What came is not here any more.
    #[error("layer {0} is not kept as it came; get the image again with `cloche pull` or `cloche load`")]
    NotKept(Digest),
    /// A layer's archive cannot be read or compressed.
    #[error("cannot read layer {diff_id} of the store")]
    Layer {
        /// The layer.
        diff_id: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer is not what it should be.
    #[error(
        "layer {expected} of the store has changed: its digest is {actual}; remove the image and get it again"
    )]
    Changed {
        /// As it should be.
        expected: Digest,
        /// As it is.
        actual: Digest,
    },
    /// The store cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// OCI image-spec: descriptor.md#properties
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) annotations: Option<std::collections::BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<Platform>,
}

/// OCI image-spec: image-index.md#image-index-property-descriptions
#[derive(Serialize)]
pub(crate) struct Platform {
    pub(crate) architecture: String,
    pub(crate) os: String,
}

/// OCI image-spec: manifest.md#image-manifest-property-descriptions
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    schema_version: u32,
    media_type: &'static str,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

impl Store {
    /// Makes an image ready to travel. The caller holds a [`crate::Hold`].
    pub(crate) fn traveller(
        &self,
        id: Digest,
        compressing: &dyn Fn(Digest, u64),
    ) -> Result<Traveller, TravelError> {
        let mut record = self.record(id)?;
        let config = self.read_blob(id)?;
        if let Some(digest) = record.manifest {
            let manifest = self.read_blob(digest)?;
            if let Some(layer) = record.layers.iter().find(|layer| !self.is_kept(layer)) {
                return Err(TravelError::NotKept(layer.diff_id));
            }
            let media_type = media_type_of(&manifest);
            let config_bytes = config.len() as u64;
            return Ok(Traveller { record, manifest, manifest_digest: digest, media_type, config_bytes });
        }
        let mut layers = Vec::new();
        for layer in &mut record.layers {
            let (blob, encoding) = self.compressed(layer, compressing)?;
            layer.blob = Some(blob);
            let suffix = match encoding {
                Encoding::Gzip => "+gzip",
                Encoding::Zstd => "+zstd",
                // What is kept is a layer.
                Encoding::Plain | Encoding::Bzip2 | Encoding::Xz => "",
            };
            layers.push(Descriptor::new(format!("{OCI_LAYER}{suffix}"), blob.digest, blob.bytes));
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: OCI_MANIFEST,
            config: Descriptor::new(OCI_CONFIG, id, config.len() as u64),
            layers,
        };
        let manifest = serde_json::to_vec(&manifest)
            .map_err(|error| TravelError::Layer { diff_id: id, source: error.into() })?;
        let digest = self.put_blob(&manifest)?;
        record.manifest = Some(digest);
        // Nothing is new about its names, which may have changed meanwhile.
        let names = Vec::new();
        self.update(ImageRecord { names, ..record.clone() })?;
        let (media_type, config_bytes) = (OCI_MANIFEST.to_owned(), config.len() as u64);
        Ok(Traveller { record, manifest, manifest_digest: digest, media_type, config_bytes })
    }

    fn is_kept(&self, layer: &LayerRecord) -> bool {
        layer.blob.is_some_and(|blob| self.has_archive(layer.diff_id, &blob))
    }

    /// A layer's compressed blob, which is made and kept if there is none.
    fn compressed(
        &self,
        layer: &LayerRecord,
        compressing: &dyn Fn(Digest, u64),
    ) -> Result<(BlobRecord, Encoding), TravelError> {
        let diff_id = layer.diff_id;
        let failed = |source| TravelError::Layer { diff_id, source };
        let blob = layer.blob.filter(|blob| self.has_archive(diff_id, blob));
        let blob = blob.ok_or(TravelError::NotKept(diff_id))?;
        let archive = self.open_archive(diff_id, &blob)?;
        if blob.digest != diff_id {
            let (encoding, _) = detect(archive).map_err(|error| failed(io::Error::other(error)))?;
            return Ok((blob, encoding));
        }
        let new = self.new_blob()?;
        let (compressed, actual) =
            compress(archive, new.file(), &|bytes| compressing(diff_id, bytes)).map_err(failed)?;
        if actual != diff_id {
            return Err(TravelError::Changed { expected: diff_id, actual });
        }
        new.publish(compressed.digest)?;
        Ok((compressed, Encoding::Gzip))
    }
}

impl Descriptor {
    pub(crate) fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Descriptor {
        Descriptor { media_type: media_type.into(), digest, size, annotations: None, platform: None }
    }
}

/// As what a manifest is to be sent. Docker's say so themselves; OCI's may leave it out.
fn media_type_of(manifest: &[u8]) -> String {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Outline {
        media_type: Option<String>,
    }
    let outline: Option<Outline> = serde_json::from_slice(manifest).ok();
    match outline.and_then(|outline| outline.media_type) {
        Some(media_type) if media_type == DOCKER_MANIFEST => media_type,
        _ => OCI_MANIFEST.to_owned(),
    }
}

/// Compresses so that the same archive always gives the same blob: no time, no name, a level that is set. Returns the
/// blob, and the archive's digest.
fn compress(
    mut archive: impl Read,
    output: &std::fs::File,
    seen: &dyn Fn(u64),
) -> io::Result<(BlobRecord, Digest)> {
    let sink = Hashed { output, hasher: Hasher::default() };
    let mut encoder = GzBuilder::new().mtime(0).operating_system(255).write(sink, Compression::new(6));
    let mut plain = Hasher::default();
    let mut piece = vec![0; PIECE];
    let mut position = 0;
    loop {
        let count = archive.read(&mut piece)?;
        if count == 0 {
            break;
        }
        let read = piece.get(..count).unwrap_or_default();
        plain.update(read);
        encoder.write_all(read)?;
        position += count as u64;
        seen(position);
    }
    let (digest, bytes) = encoder.finish()?.hasher.finish();
    Ok((BlobRecord { digest, bytes }, plain.finish().0))
}

struct Hashed<'a> {
    output: &'a std::fs::File,
    hasher: Hasher,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.output.write(bytes)?;
        self.hasher.update(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}
