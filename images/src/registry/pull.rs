//! Pulling: a name becomes an image in the store.
//!
//! ```text
//!  tag ─▶ index? ─▶ manifest ─▶ config ─▶ layers that are missing ─┬─ download ─▶ convert ─┐
//!                                                                  ├─ download ─▶ convert ─┼─▶ names, all at once
//!                                                                  └─ download ─▶ convert ─┘
//! ```
//!
//! Three blobs are downloaded at a time, as Docker does; each is converted once it is whole and its digest is right.
//! A pull that fails or is killed leaves what it has under `partial/`, and the next one goes on from there.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use super::client::{RegistryError, Repository};
use super::download::{Wanted, download};
use crate::digest::Digest;
use crate::layer::{self, LayerError};
use crate::load::LoadError;
use crate::load::manifest::{self, Blobs, Form, Kind};
use crate::load::{PlannedImage, PlannedLayer};
use crate::merge::MergeError;
use crate::reference::Reference;
use crate::store::{BlobRecord, ImageRecord, LayerRecord, Store, StoreError};

/// Downloads at a time.
const WORKERS: usize = 3;

/// What happens to a layer on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It comes from the registry.
    Download,
    /// It becomes a file system.
    Convert,
    /// It goes to the registry.
    Upload,
}

/// Told how a pull or push goes on, from more than one thread. The methods do nothing unless they are overridden.
pub trait Transfer: Sync {
    /// A layer, known by its blob's digest, starts a step that covers so many bytes.
    fn started(&self, layer: Digest, step: Step, bytes: u64) {
        let _ = (layer, step, bytes);
    }

    /// So many bytes of the step are done in all.
    fn moved(&self, layer: Digest, position: u64) {
        let _ = (layer, position);
    }

    /// The layer is where it should be; or was, as `present` says.
    fn finished(&self, layer: Digest, present: bool) {
        let _ = (layer, present);
    }
}

impl Transfer for crate::load::NoProgress {}

/// An image that was pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// The image's ID.
    pub id: Digest,
    /// What the registry has under the name: the digest of a manifest or an index.
    pub digest: Digest,
    /// The name stood for this image already.
    pub up_to_date: bool,
}

/// Why an image was not pulled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PullError {
    /// The registry did not do its part.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// What it has is no image for us.
    #[error(transparent)]
    Image(#[from] LoadError),
    /// The layers do not go together.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// A download broke off again and again.
    #[error("layer {digest} broke off {have} bytes into {bytes}; the next pull goes on from there")]
    Broken {
        /// The blob.
        digest: Digest,
        /// Bytes that came.
        have: u64,
        /// Bytes there should be.
        bytes: u64,
        /// What happened last.
        #[source]
        source: Box<RegistryError>,
    },
    /// The download cannot be written.
    #[error("cannot keep layer {digest}")]
    Disk {
        /// The blob.
        digest: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer is bad.
    #[error("layer {number} of {count} ({digest})")]
    Layer {
        /// From 1.
        number: usize,
        /// How many there are.
        count: usize,
        /// The blob.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: Box<LayerError>,
    },
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The system has no thread to spare.
    #[error("cannot start a thread for a download")]
    Thread(#[source] io::Error),
    /// Another layer failed.
    #[error("broken off, as another layer failed")]
    Stopped,
}

impl Blobs for Repository {
    type Error = PullError;

    fn fetch(
        &self,
        _named_by: &str,
        form: Form,
        digest: Digest,
        bytes: u64,
        limit: u64,
    ) -> Result<(String, Vec<u8>), PullError> {
        let content = match form {
            Form::Manifest => self.manifest(&digest.to_string())?.content,
            Form::Blob => self.small_blob(digest, bytes, limit)?,
        };
        Ok((digest.to_string(), content))
    }
}

impl Store {
    /// Gets an image from its registry, what is missing of it. Either it is there whole afterwards, or it has no name.
    pub fn pull(
        &self,
        reference: &Reference,
        repository: &Repository,
        progress: &dyn Transfer,
    ) -> Result<Pulled, PullError> {
        let result = self.pull_held(reference, repository, progress);
        // What a failed pull has converted; its downloads stay.
        let swept = self.sweep();
        let pulled = result?;
        swept?;
        Ok(pulled)
    }

    fn pull_held(
        &self,
        reference: &Reference,
        repository: &Repository,
        progress: &dyn Transfer,
    ) -> Result<Pulled, PullError> {
        let _hold = self.hold()?;
        let before = self.resolve(&reference.to_string()).ok().map(|image| image.id);
        let (digest, image) = plan(reference, repository)?;
        let layers = self.fetch_layers(&image.layers, repository, progress)?;
        for layer in &layers {
            self.settle(layer)?;
        }
        let manifest = image.manifest.as_ref().map(|manifest| self.put_blob(manifest)).transpose()?;
        let id = self.put_blob(&image.config)?;
        let names = image.names.iter().map(Reference::to_string).collect();
        let digests = vec![format!("{}@{digest}", reference.repository())];
        let records = vec![ImageRecord { id, manifest, digests, names, layers }];
        self.merge_records(&records)?;
        self.commit(records)?;
        Ok(Pulled { id, digest, up_to_date: before == Some(id) })
    }

    /// Downloads and converts; gives the layers in their order.
    fn fetch_layers(
        &self,
        layers: &[PlannedLayer],
        repository: &Repository,
        progress: &dyn Transfer,
    ) -> Result<Vec<LayerRecord>, PullError> {
        // An image may have a layer twice.
        let mut wanted: Vec<Wanted> = Vec::new();
        for layer in layers {
            let this = blob_of(layer)?;
            match wanted.iter().find(|other| other.digest == this.digest) {
                None => wanted.push(this),
                Some(other) if *other == this => {}
                Some(_) => return Err(two_sizes(this.digest).into()),
            }
        }
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let (done, ready) = mpsc::channel();
        thread::scope(|scope| {
            for worker in 0..WORKERS.min(wanted.len()) {
                let (done, wanted, next, stop) = (done.clone(), &wanted, &next, &stop);
                let work = move || {
                    while let Some(&wanted) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let result = self.fetch_blob(wanted, repository, progress, stop);
                        if done.send((wanted, result)).is_err() {
                            return;
                        }
                    }
                };
                let spawned =
                    thread::Builder::new().name(format!("download-{worker}")).spawn_scoped(scope, work);
                spawned.map_err(PullError::Thread)?;
            }
            drop(done);
            let mut records: Vec<Option<LayerRecord>> = vec![None; layers.len()];
            let mut failure = None;
            for (blob, result) in ready {
                let result =
                    result.and_then(|came| self.convert_all(blob, came, layers, &mut records, progress));
                if let Err(error) = result {
                    stop.store(true, Ordering::Relaxed);
                    next.store(wanted.len(), Ordering::Relaxed);
                    // The others are only told to stop; this one is why.
                    failure.get_or_insert(error);
                }
            }
            match failure {
                Some(error) => Err(error),
                None => records.into_iter().map(|record| record.ok_or(PullError::Stopped)).collect(),
            }
        })
    }

    /// Brings a blob here; tells whether anything had to be.
    fn fetch_blob(
        &self,
        wanted: Wanted,
        repository: &Repository,
        progress: &dyn Transfer,
        stop: &AtomicBool,
    ) -> Result<bool, PullError> {
        let Wanted { digest, bytes } = wanted;
        let Some(partial) = self.partial(digest, bytes)? else { return Ok(false) };
        let moved = |position| progress.moved(digest, position);
        progress.started(digest, Step::Download, bytes);
        download(repository, wanted, partial, &moved, stop)?;
        Ok(true)
    }

    /// Converts a blob for all layers that it is.
    fn convert_all(
        &self,
        blob: Wanted,
        came: bool,
        layers: &[PlannedLayer],
        records: &mut [Option<LayerRecord>],
        progress: &dyn Transfer,
    ) -> Result<(), PullError> {
        let mut present = !came;
        for (index, (layer, record)) in layers.iter().zip(records).enumerate() {
            if blob_of(layer)?.digest != blob.digest {
                continue;
            }
            let bad = |source| PullError::Layer {
                number: index + 1,
                count: layers.len(),
                digest: blob.digest,
                source: Box::new(source),
            };
            let diff_id = layer.expected.diff_id;
            let known = self.whole_layer(diff_id);
            let erofs_bytes = match known {
                // That this blob is that layer was seen before.
                Some(bytes) if self.knows_pair(diff_id, blob.digest)? => bytes,
                _ => {
                    present = false;
                    progress.started(blob.digest, Step::Convert, blob.bytes);
                    self.convert_blob(blob, layer, known, progress).map_err(|error| match error {
                        Convert::Layer(error) => bad(error),
                        Convert::Store(error) => error.into(),
                    })?
                }
            };
            let kept = BlobRecord { digest: blob.digest, bytes: blob.bytes };
            *record = Some(LayerRecord { diff_id, erofs_bytes, blob: Some(kept) });
        }
        progress.finished(blob.digest, present);
        Ok(())
    }

    fn convert_blob(
        &self,
        blob: Wanted,
        layer: &PlannedLayer,
        known: Option<u64>,
        progress: &dyn Transfer,
    ) -> Result<u64, Convert> {
        let file = self.open_archive(blob.digest, &BlobRecord { digest: blob.digest, bytes: blob.bytes })?;
        let mut position = 0;
        let seen = |count| {
            position += count;
            progress.moved(blob.digest, position);
        };
        if let Some(bytes) = known {
            layer::check(file, &layer.expected, seen)?;
            return Ok(bytes);
        }
        let new = self.new_layer()?;
        let (bytes, digests) = layer::convert(file, &layer.expected, new.blob(), new.recipe(), seen)?;
        new.publish(layer.expected.diff_id, digests.blob == digests.diff_id)?;
        Ok(bytes)
    }
}

enum Convert {
    Layer(LayerError),
    Store(StoreError),
}

impl From<LayerError> for Convert {
    fn from(error: LayerError) -> Convert {
        Convert::Layer(error)
    }
}

impl From<StoreError> for Convert {
    fn from(error: StoreError) -> Convert {
        Convert::Store(error)
    }
}

/// What the registry has under a name, and what the image in it is made of.
fn plan(reference: &Reference, repository: &Repository) -> Result<(Digest, PlannedImage), PullError> {
    let name = match (reference.digest(), reference.tag()) {
        (Some(digest), _) => digest.to_string(),
        (None, Some(tag)) => tag.to_owned(),
        (None, None) => "latest".to_owned(),
    };
    let found = repository.manifest(&name)?;
    let digest = found.digest;
    let member = reference.to_string();
    let manifest = match manifest::kind_of(&member, &found.content, found.media_type.as_deref())? {
        Kind::Manifest => found.content,
        Kind::Index => {
            let chosen = manifest::select_in(repository, &member, &found.content)?;
            manifest::read(repository, &member, &chosen)?
        }
    };
    // As in Docker: what is asked for by its digest gets no tag.
    let names = if reference.digest().is_some() { Vec::new() } else { vec![reference.clone()] };
    Ok((digest, manifest::plan_manifest(repository, &member, manifest, names)?))
}

fn blob_of(layer: &PlannedLayer) -> Result<Wanted, PullError> {
    match layer.expected.blob {
        Some((digest, bytes)) => Ok(Wanted { digest, bytes }),
        None => Err(PullError::Stopped),
    }
}

fn two_sizes(digest: Digest) -> LoadError {
    LoadError::Invalid { member: digest.to_string(), problem: "the manifest gives it two sizes".to_owned() }
}
