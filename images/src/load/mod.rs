//! Loading images from archives: what is in the archive is planned first (`docker_archive`, `oci_layout`), then each
//! layer is converted and checked, and when everything is there the images get their names, all in one step.
//!
//! An archive that is bad in any part is refused as a whole, and nothing of it stays in the store.

mod docker_archive;
pub(crate) mod manifest;
mod oci_layout;
mod source;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use oci_spec::image::{Arch, ImageConfiguration, Os};

use crate::digest::Digest;
use crate::layer::{self, DecodeError, Encoding, ExpectedLayer, LayerError};
use crate::limits::{MAX_LAYERS, MAX_METADATA_BYTES};
use crate::merge::MergeError;
use crate::reference::Reference;
use crate::store::{BlobRecord, ImageRecord, LayerRecord, Store, StoreError};
use crate::tar::TarError;

use source::Source;
pub(crate) use source::unpack_file;

/// The platform whose images run here (OCI image-spec: image-index.md#platform-variants).
const PLATFORM: &str = "linux/amd64";

/// How to load.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// The name for the image, instead of those in the archive, which then must hold exactly one image.
    pub name: Option<Reference>,
}

/// An image that was loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The image's ID.
    pub id: Digest,
    /// The names it was given now; none if the archive has none for it.
    pub names: Vec<Reference>,
}

/// Told how a load goes on, from more than one thread. The methods do nothing unless they are overridden.
pub trait Progress: Sync {
    /// A layer is begun.
    fn layer_started(&self, layer: &LayerStart) {
        let _ = layer;
    }

    /// `bytes` more of the layer's blob were read. Layers come one after the other.
    fn layer_advanced(&self, bytes: u64) {
        let _ = bytes;
    }

    /// The layer is done.
    fn layer_finished(&self) {}
}

/// Which layer is begun.
#[derive(Debug, Clone)]
pub struct LayerStart {
    /// From 0, over all images of the archive.
    pub index: usize,
    /// How many there are.
    pub count: usize,
    /// Which one.
    pub diff_id: Digest,
    /// Length of its blob, compressed as it may be.
    pub bytes: u64,
    /// It is in the store already, and is only checked.
    pub present: bool,
}

/// No progress is shown.
pub struct NoProgress;

impl Progress for NoProgress {}

/// Why nothing was loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The file or directory cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// The file cannot be decompressed.
    #[error("cannot read {path}")]
    Decode {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: DecodeError,
    },
    /// The outer archive is torn or malformed.
    #[error("cannot read {path} as a tar archive")]
    Archive {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        #[source]
        source: TarError,
    },
    /// It has too many members to be an image.
    #[error("{path} has more than {limit} members; it is not an image archive")]
    TooManyMembers {
        /// The file.
        path: PathBuf,
        /// The bound.
        limit: usize,
    },
    /// It holds no image in a form we know.
    #[error(
        "{0} holds no image: there is neither a manifest.json (docker save) nor an index.json with oci-layout (OCI layout)"
    )]
    NotAnImage(PathBuf),
    /// A file that another one names is not there.
    #[error("{path} has no {member}, which {named_by} names; the archive is incomplete")]
    Missing {
        /// The archive.
        path: PathBuf,
        /// The missing file.
        member: String,
        /// Who names it.
        named_by: String,
    },
    /// A metadata file is larger than any real one.
    #[error("{member} has {bytes} bytes, where at most {limit} are accepted")]
    TooLarge {
        /// The file.
        member: String,
        /// Its size.
        bytes: u64,
        /// The bound.
        limit: u64,
    },
    /// A metadata file is not what it should be.
    #[error("{member} is malformed")]
    Json {
        /// The file.
        member: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A metadata file says something that cannot be.
    #[error("{member}: {problem}")]
    Invalid {
        /// The file.
        member: String,
        /// What is wrong.
        problem: String,
    },
    /// A blob is not the one that was asked for.
    #[error("blob {member} has the digest {actual}, expected was {expected}; get the image again")]
    Digest {
        /// The blob.
        member: String,
        /// As named.
        expected: Digest,
        /// As computed.
        actual: Digest,
    },
    /// A blob has the wrong length.
    #[error("blob {member} has {actual} bytes, expected were {expected}; get the image again")]
    Size {
        /// The blob.
        member: String,
        /// As named.
        expected: u64,
        /// As it is.
        actual: u64,
    },
    /// There is no image for this machine.
    #[error("there is no image for {PLATFORM} in {member}, only for {}", .available.join(", "))]
    Platform {
        /// The index or configuration.
        member: String,
        /// What there is instead.
        available: Vec<String>,
    },
    /// A name was given for an archive of several images.
    #[error(
        "the archive holds {0} images, so they cannot all have the name that was given; load it without a name"
    )]
    SeveralImages(usize),
    /// The layers do not go together.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// A layer is bad.
    #[error("layer {number} of {count} ({member} in {path})")]
    Layer {
        /// From 1, within the image.
        number: usize,
        /// How many the image has.
        count: usize,
        /// The blob.
        member: String,
        /// The archive.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<LayerError>,
    },
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// An image in the archive, checked in all but its layers.
pub(crate) struct PlannedImage {
    pub(crate) names: Vec<Reference>,
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Option<Vec<u8>>,
    pub(crate) layers: Vec<PlannedLayer>,
}

pub(crate) struct PlannedLayer {
    member: String,
    pub(crate) expected: ExpectedLayer,
}

/// Reads an archive's metadata, and tells how many images it describes; nothing is stored.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn plan_archive(path: &Path, store: &Store) -> Result<usize, LoadError> {
    Ok(plan(&Source::open(path, store)?)?.len())
}

impl Store {
    /// Loads all images of an archive: docker-archive or OCI layout, as a tar file (plain, gzip or zstd; a pipe too)
    /// or a directory. Either all of it is loaded, or nothing.
    pub fn load(
        &self,
        path: &Path,
        options: &LoadOptions,
        progress: &dyn Progress,
    ) -> Result<Vec<Loaded>, LoadError> {
        let result = self.load_held(path, options, progress);
        // What a failed load has converted, or one that was killed earlier.
        let swept = self.sweep();
        let loaded = result?;
        swept?;
        Ok(loaded)
    }

    fn load_held(
        &self,
        path: &Path,
        options: &LoadOptions,
        progress: &dyn Progress,
    ) -> Result<Vec<Loaded>, LoadError> {
        let _hold = self.hold()?;
        let source = Source::open(path, self)?;
        let mut images = plan(&source)?;
        if let Some(name) = &options.name {
            match images.as_mut_slice() {
                [image] => image.names = vec![name.clone()],
                more => return Err(LoadError::SeveralImages(more.len())),
            }
        }
        let count = images.iter().map(|image| image.layers.len()).sum();
        let (mut index, mut records, mut loaded) = (0, Vec::new(), Vec::new());
        // Images of one archive share layers, and a hostile one repeats a single layer as often as it can.
        let mut done: HashMap<(&str, Digest), LayerRecord> = HashMap::new();
        for image in &images {
            let mut layers = Vec::new();
            for (position, layer) in image.layers.iter().enumerate() {
                let place = (position + 1, image.layers.len());
                let key = (layer.member.as_str(), layer.expected.diff_id);
                let record = match done.get(&key) {
                    Some(record) => record.clone(),
                    None => self.load_layer(&source, layer, place, (index, count), progress)?,
                };
                done.insert(key, record.clone());
                layers.push(record);
                index += 1;
            }
            let manifest = image.manifest.as_ref().map(|manifest| self.put_blob(manifest)).transpose()?;
            let id = self.put_blob(&image.config)?;
            let names = image.names.iter().map(Reference::to_string).collect();
            records.push(ImageRecord { id, manifest, digests: Vec::new(), names, layers });
            loaded.push(Loaded { id, names: image.names.clone() });
        }
        self.merge_records(&records)?;
        self.commit(records)?;
        Ok(loaded)
    }

    fn load_layer(
        &self,
        source: &Source,
        layer: &PlannedLayer,
        (number, of_image): (usize, usize),
        (index, count): (usize, usize),
        progress: &dyn Progress,
    ) -> Result<LayerRecord, LoadError> {
        const MANIFEST: &str = "the image's manifest";
        let diff_id = layer.expected.diff_id;
        let member = source.require(&layer.member, MANIFEST)?;
        // What came compressed is kept as it came, and of what did not there is a recipe.
        let head = source.require(&layer.member, MANIFEST)?.reader;
        let is_plain = layer::detect(head).is_ok_and(|(encoding, _)| encoding == Encoding::Plain);
        let plain = BlobRecord { digest: diff_id, bytes: member.bytes };
        let present = self.whole_layer(diff_id).filter(|_| !is_plain || self.has_archive(diff_id, &plain));
        progress.layer_started(&LayerStart {
            index,
            count,
            diff_id,
            bytes: member.bytes,
            present: present.is_some(),
        });
        let seen = |bytes| progress.layer_advanced(bytes);
        let bad = |error| {
            let error = match source.require(&layer.member, MANIFEST) {
                Ok(again) => layer::blame(error, again.reader, &layer.expected),
                Err(_) => error,
            };
            LoadError::Layer {
                number,
                count: of_image,
                member: layer.member.clone(),
                path: source.path().to_owned(),
                source: Box::new(error),
            }
        };
        let is_kept = layer.expected.blob.is_some_and(|(digest, bytes)| self.has_blob(digest, bytes));
        let copy = if is_plain || is_kept { None } else { Some(self.new_blob()?) };
        let reader = Copying { inner: member.reader, copy: copy.as_ref().map(|copy| copy.file()) };
        let (erofs_bytes, digests) = match present {
            Some(bytes) => (bytes, layer::check(reader, &layer.expected, seen).map_err(bad)?),
            None => {
                let new = self.new_layer()?;
                let converted = layer::convert(reader, &layer.expected, new.blob(), new.recipe(), seen);
                let converted = converted.map_err(bad)?;
                new.publish(diff_id, is_plain)?;
                converted
            }
        };
        if let Some(copy) = copy {
            copy.publish(digests.blob)?;
        }
        let blob = Some(BlobRecord { digest: digests.blob, bytes: digests.blob_bytes });
        progress.layer_finished();
        Ok(LayerRecord { diff_id, erofs_bytes, blob })
    }
}

/// Copies to a file what is read through it.
struct Copying<'a, R> {
    inner: R,
    copy: Option<&'a File>,
}

impl<R: Read> Read for Copying<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if let Some(mut copy) = self.copy {
            copy.write_all(buffer.get(..count).unwrap_or_default())?;
        }
        Ok(count)
    }
}

/// Counts what planned images keep in memory.
#[derive(Default)]
struct Metadata {
    bytes: usize,
}

impl Metadata {
    /// Takes account of one more image, which `member` names.
    fn count(&mut self, member: &str, image: PlannedImage) -> Result<PlannedImage, LoadError> {
        self.bytes += image.config.len() + image.manifest.as_ref().map_or(0, Vec::len);
        if self.bytes > MAX_METADATA_BYTES {
            let problem = format!("configurations of more than {MAX_METADATA_BYTES} bytes in all");
            return Err(LoadError::Invalid { member: member.to_owned(), problem });
        }
        Ok(image)
    }
}

/// What the archive holds. Newer Dockers write both forms into one archive; the OCI layout says more.
fn plan(source: &Source) -> Result<Vec<PlannedImage>, LoadError> {
    let images = if source.has(oci_layout::MARKER)? && source.has(oci_layout::INDEX)? {
        oci_layout::plan(source)?
    } else if source.has(docker_archive::MANIFEST)? {
        docker_archive::plan(source)?
    } else {
        return Err(LoadError::NotAnImage(source.path().to_owned()));
    };
    if images.is_empty() { Err(LoadError::NotAnImage(source.path().to_owned())) } else { Ok(images) }
}

/// Reads an image's configuration: it must be for this platform, and gives the layers' diffIDs.
fn parse_config(member: &str, content: &[u8]) -> Result<Vec<Digest>, LoadError> {
    let config: ImageConfiguration = parse_json(member, content)?;
    if (config.os(), config.architecture()) != (&Os::Linux, &Arch::Amd64) {
        return Err(LoadError::Platform {
            member: member.to_owned(),
            available: vec![manifest::quoted(&format!("{}/{}", config.os(), config.architecture()))],
        });
    }
    let invalid = |problem: String| LoadError::Invalid { member: member.to_owned(), problem };
    let diff_ids = config.rootfs().diff_ids();
    // None at all is an image of no files: `FROM scratch` and a configuration.
    if diff_ids.len() > MAX_LAYERS {
        return Err(invalid(format!("{} layers, where at most {MAX_LAYERS} are accepted", diff_ids.len())));
    }
    diff_ids.iter().map(|id| id.parse::<Digest>().map_err(|error| invalid(error.to_string()))).collect()
}

fn parse_json<T: serde::de::DeserializeOwned>(member: &str, content: &[u8]) -> Result<T, LoadError> {
    serde_json::from_slice(content).map_err(|source| LoadError::Json { member: member.to_owned(), source })
}
