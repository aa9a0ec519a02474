//! Saving images: an OCI layout, in a tar archive or a directory, that has the `manifest.json` of `docker save` beside
//! its own `index.json`, as newer Dockers write it. So it loads with Docker, Podman, skopeo, containerd and `cloche
//! load`, and the manifests in it are those that the images came with.

mod docker;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::digest::{Digest, Hasher};
use crate::layer::LayerError;
use crate::reference::Reference;
use crate::store::{BlobRecord, ResolveError, Store, StoreError};
use crate::travel::{Descriptor, Platform, TravelError, Traveller};

/// The whole name of an image, on its descriptor.
const IMAGE_NAME: &str = "io.containerd.image.name";
/// Its tag (OCI image-spec: annotations.md).
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const BLOCK: usize = 512;
const PIECE: usize = 256 << 10;

/// Why images were not saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// There is no such image.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// It cannot leave.
    #[error(transparent)]
    Travel(#[from] TravelError),
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The archive cannot be written.
    #[error("cannot write {0}")]
    Write(String, #[source] io::Error),
    /// The directory has something in it.
    #[error("{0} is not empty; save to a new directory")]
    NotEmpty(PathBuf),
    /// A layer is not kept as it came.
    #[error("layer {diff_id} of the store cannot be read")]
    Layer {
        /// The layer.
        diff_id: Digest,
        /// Why.
        #[source]
        source: Box<LayerError>,
    },
    /// A blob is not what it should be.
    #[error(
        "a blob of the store has changed: {expected} has the digest {actual}; remove the image and get it again"
    )]
    Changed {
        /// As it should be.
        expected: Digest,
        /// As it is.
        actual: Digest,
    },
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    media_type: &'static str,
    manifests: Vec<Descriptor>,
}

/// Docker image-spec v1.2, *Combined Image JSON + Filesystem Changeset Format*
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

impl Store {
    /// Writes images, given by names or IDs, to a tar archive. One that is given by a name is saved with that name
    /// only, and one that is given by its ID with none, as in Docker.
    pub fn save(&self, images: &[String], output: &mut dyn Write) -> Result<(), SaveError> {
        self.save_to(images, &mut TarSink { output })
    }

    /// Writes images to an archive in the form of Docker before version 25: layers that are not compressed, and no
    /// manifests but its own. The names are chosen as in [`Store::save`].
    pub fn save_for_docker(&self, images: &[String], output: &mut dyn Write) -> Result<(), SaveError> {
        self.save_docker_to(images, &mut TarSink { output })
    }

    /// The same as [`Store::save`], to a directory that is empty or not there.
    pub fn save_to_directory(&self, images: &[String], directory: &Path) -> Result<(), SaveError> {
        let failed = |error| SaveError::Write(directory.display().to_string(), error);
        fs::create_dir_all(directory).map_err(failed)?;
        if fs::read_dir(directory).map_err(failed)?.next().is_some() {
            return Err(SaveError::NotEmpty(directory.to_owned()));
        }
        self.save_to(images, &mut DirectorySink { directory })
    }

    fn save_to(&self, images: &[String], sink: &mut dyn Sink) -> Result<(), SaveError> {
        let _hold = self.hold()?;
        let chosen = self.choose(images)?;
        put(sink, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let mut written = BTreeSet::new();
        let (mut manifests, mut entries) = (Vec::new(), Vec::new());
        for (id, names) in &chosen {
            let traveller = &self.traveller(*id, &|_, _| {})?;
            let record = &traveller.record;
            let mut layers = Vec::new();
            for layer in &record.layers {
                let blob = layer.blob.ok_or(TravelError::NotKept(layer.diff_id))?;
                if written.insert(blob.digest) {
                    let mut archive = self.open_archive(layer.diff_id, &blob)?;
                    copy(sink, &blob_name(blob.digest), blob, &mut archive)?;
                }
                layers.push(blob_name(blob.digest));
            }
            for content in [&self.read_blob(record.id)?, &traveller.manifest] {
                let blob = BlobRecord { digest: Digest::of(content), bytes: content.len() as u64 };
                if written.insert(blob.digest) {
                    copy(sink, &blob_name(blob.digest), blob, &mut content.as_slice())?;
                }
            }
            manifests.extend(descriptors(traveller, names));
            let repo_tags = names.iter().map(Reference::short).collect();
            entries.push(DockerEntry { config: blob_name(record.id), repo_tags, layers });
        }
        put(sink, "manifest.json", &json(&entries)?)?;
        let index = Index { schema_version: 2, media_type: INDEX, manifests };
        put(sink, "index.json", &json(&index)?)?;
        end(sink)
    }

    /// The images meant, each once, and the names that they were given by.
    fn choose(&self, images: &[String]) -> Result<Vec<(Digest, Vec<Reference>)>, SaveError> {
        let mut chosen: Vec<(Digest, Vec<Reference>)> = Vec::new();
        for given in images {
            let image = self.resolve(given)?;
            let name = given.parse::<Reference>().ok().filter(|name| image.names.contains(name));
            match chosen.iter_mut().find(|(id, _)| *id == image.id) {
                Some((_, names)) => names.extend(name.filter(|name| !names.contains(name))),
                None => chosen.push((image.id, name.into_iter().collect())),
            }
        }
        Ok(chosen)
    }
}

/// An image's entries in the index: one for each name, or one without.
fn descriptors(traveller: &Traveller, names: &[Reference]) -> Vec<Descriptor> {
    let of = |name: Option<&Reference>| {
        let digest = traveller.manifest_digest;
        let mut descriptor = Descriptor::new(&traveller.media_type, digest, traveller.manifest.len() as u64);
        let platform = Platform { architecture: "amd64".to_owned(), os: "linux".to_owned() };
        descriptor.platform = Some(platform);
        descriptor.annotations = name.map(|name| {
            let whole = (IMAGE_NAME.to_owned(), name.to_string());
            let tag = name.tag().map(|tag| (REF_NAME.to_owned(), tag.to_owned()));
            BTreeMap::from_iter([whole].into_iter().chain(tag))
        });
        descriptor
    };
    match names {
        [] => vec![of(None)],
        names => names.iter().map(|name| of(Some(name))).collect(),
    }
}

fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Where files of known length go, one after the other.
trait Sink {
    /// Begins a file.
    fn begin(&mut self, name: &str, bytes: u64) -> io::Result<Box<dyn Write + '_>>;
    /// Ends the file that was begun; it had so many bytes.
    fn finish(&mut self, bytes: u64) -> io::Result<()>;
    /// Ends all.
    fn end(&mut self) -> io::Result<()>;
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, SaveError> {
    serde_json::to_vec(value)
        .map_err(|error| SaveError::Write("the archive's index".to_owned(), error.into()))
}

fn end(sink: &mut dyn Sink) -> Result<(), SaveError> {
    sink.end().map_err(|error| SaveError::Write("the archive's end".to_owned(), error))
}

fn put(sink: &mut dyn Sink, name: &str, content: &[u8]) -> Result<(), SaveError> {
    let bytes = content.len() as u64;
    let written = (|| {
        sink.begin(name, bytes)?.write_all(content)?;
        sink.finish(bytes)
    })();
    written.map_err(|error| SaveError::Write(name.to_owned(), error))
}

/// Copies a blob, and looks whether it is what it should be.
fn copy(sink: &mut dyn Sink, name: &str, blob: BlobRecord, source: &mut dyn Read) -> Result<(), SaveError> {
    let failed = |error| SaveError::Write(name.to_owned(), error);
    let mut output = sink.begin(name, blob.bytes).map_err(failed)?;
    let mut hasher = Hasher::default();
    let mut left = blob.bytes;
    let mut piece = vec![0; PIECE];
    while left > 0 {
        let most = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = source.read(piece.get_mut(..most).unwrap_or_default()).map_err(failed)?;
        if count == 0 {
            break;
        }
        let read = piece.get(..count).unwrap_or_default();
        hasher.update(read);
        output.write_all(read).map_err(failed)?;
        left -= count as u64;
    }
    drop(output);
    let (actual, _) = hasher.finish();
    if actual != blob.digest {
        return Err(SaveError::Changed { expected: blob.digest, actual });
    }
    sink.finish(blob.bytes).map_err(failed)
}

/// A tar archive (POSIX.1-1988 ustar; numbers that its fields have no room for as GNU tar writes them).
struct TarSink<'a> {
    output: &'a mut dyn Write,
}

impl Sink for TarSink<'_> {
    fn begin(&mut self, name: &str, bytes: u64) -> io::Result<Box<dyn Write + '_>> {
        let mut header = [0_u8; BLOCK];
        // The longest name here is a digest's, of 77 bytes.
        let mut field = |at: usize, text: &[u8]| {
            header.iter_mut().skip(at).zip(text).for_each(|(to, from)| *to = *from);
        };
        field(0, name.as_bytes());
        field(100, b"0000644\0");
        field(108, b"0000000\0");
        field(116, b"0000000\0");
        match bytes < 1 << 33 {
            true => field(124, format!("{bytes:011o}\0").as_bytes()),
            false => field(124, &[&[0x80, 0, 0, 0][..], &bytes.to_be_bytes()].concat()),
        }
        // The time is that of nothing, so that the same images give the same archive.
        field(136, b"00000000000\0");
        field(148, b"        ");
        field(156, b"0");
        field(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        let text = format!("{sum:06o}\0 ");
        header.iter_mut().skip(148).zip(text.as_bytes()).for_each(|(to, from)| *to = *from);
        self.output.write_all(&header)?;
        Ok(Box::new(&mut self.output))
    }

    fn finish(&mut self, bytes: u64) -> io::Result<()> {
        let padding = (BLOCK as u64 - bytes % BLOCK as u64) % BLOCK as u64;
        self.output.write_all([0; BLOCK].get(..padding as usize).unwrap_or_default())
    }

    fn end(&mut self) -> io::Result<()> {
        self.output.write_all(&[0; 2 * BLOCK])?;
        self.output.flush()
    }
}

struct DirectorySink<'a> {
    directory: &'a Path,
}

impl Sink for DirectorySink<'_> {
    fn begin(&mut self, name: &str, _bytes: u64) -> io::Result<Box<dyn Write + '_>> {
        let path = self.directory.join(name);
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        Ok(Box::new(File::create(path)?))
    }

    fn finish(&mut self, _bytes: u64) -> io::Result<()> {
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
}
