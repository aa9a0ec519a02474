//! Pushing: blobs that the registry lacks, then the manifest that names them.
//!
//! A blob is looked for in the repository, then taken over from another repository of the same registry that is known
//! to have it, and sent only if neither helps.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::client::{RegistryError, Repository};
use super::pull::{Step, Transfer};
use crate::digest::Digest;
use crate::reference::Reference;
use crate::store::{Archive, BlobRecord, ImageRecord, ResolveError, Store, StoreError};
use crate::travel::TravelError;

/// Uploads at a time.
const WORKERS: usize = 3;
/// Repositories that are tried for a blob.
const MAX_SOURCES: usize = 3;
/// What is sent between two signs of life.
const REPORT: u64 = 256 << 10;

/// An image that was pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The digest of its manifest, by which it can be pulled.
    pub digest: Digest,
    /// The manifest's length in bytes.
    pub bytes: u64,
}

/// Why an image was not pushed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// There is no such image here.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// It cannot travel.
    #[error(transparent)]
    Travel(#[from] TravelError),
    /// The registry did not do its part.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The store cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is named by a digest.
    #[error("{0} is named by its digest, under which nothing can be put; push a tag")]
    ByDigest(String),
    /// The system has no thread to spare.
    #[error("cannot start a thread for an upload")]
    Thread(#[source] io::Error),
}

impl Store {
    /// Puts an image into its registry, what is missing of it there, under its tag.
    pub fn push(
        &self,
        reference: &Reference,
        repository: &mut Repository,
        progress: &dyn Transfer,
    ) -> Result<Pushed, PushError> {
        let _hold = self.hold()?;
        let Some(tag) = reference.tag().filter(|_| reference.digest().is_none()) else {
            return Err(PushError::ByDigest(reference.to_string()));
        };
        let image = self.resolve(&reference.to_string())?;
        let traveller = self.traveller(image.id, &|_, _| {})?;
        let mut parcels: Vec<Parcel> = Vec::new();
        for layer in &traveller.record.layers {
            let Some(blob) = layer.blob else { return Err(TravelError::NotKept(layer.diff_id).into()) };
            if !parcels.iter().any(|parcel| parcel.blob == blob) {
                let sources = self.sources(reference, blob.digest)?;
                parcels.push(Parcel { diff_id: layer.diff_id, blob, sources });
            }
        }
        for source in parcels.iter().flat_map(|parcel| &parcel.sources) {
            repository.also_read(source);
        }
        let repository = &*repository;
        // First to learn who is asked for what: workers then all have the token that comes of it.
        let config = BlobRecord { digest: image.id, bytes: traveller.config_bytes };
        let there = repository.has_blob(config.digest)?;
        self.send_all(&parcels, repository, progress)?;
        if !there {
            let open =
                || Ok(Box::new(self.open_blob(config.digest, config.bytes).map_err(io::Error::other)?) as _);
            upload(repository, config, &[], open)?;
        }
        repository.put_manifest(tag, &traveller.media_type, &traveller.manifest)?;
        let digest = traveller.manifest_digest;
        let digests = vec![format!("{}@{digest}", reference.repository())];
        self.update(ImageRecord { digests, names: Vec::new(), ..traveller.record })?;
        Ok(Pushed { digest, bytes: traveller.manifest.len() as u64 })
    }

    /// Other repositories of the same registry that have a blob, as far as is known here.
    fn sources(&self, reference: &Reference, blob: Digest) -> Result<Vec<String>, StoreError> {
        let mut sources = BTreeSet::new();
        for record in self.records()? {
            if !record.layers.iter().any(|layer| layer.blob.is_some_and(|known| known.digest == blob)) {
                continue;
            }
            let known = record.digests.iter().filter_map(|name| name.parse::<Reference>().ok());
            let same = known
                .filter(|other| other.domain() == reference.domain() && other.path() != reference.path());
            sources.extend(same.map(|other| other.path().to_owned()));
        }
        Ok(sources.into_iter().take(MAX_SOURCES).collect())
    }

    fn send_all(
        &self,
        parcels: &[Parcel],
        repository: &Repository,
        progress: &dyn Transfer,
    ) -> Result<(), PushError> {
        let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
        thread::scope(|scope| {
            for worker in 0..WORKERS.min(parcels.len()) {
                let work = || {
                    while let Some(parcel) = parcels.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(error) = self.send(parcel, repository, progress) {
                            next.store(parcels.len(), Ordering::Relaxed);
                            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        }
                    }
                };
                let spawned =
                    thread::Builder::new().name(format!("upload-{worker}")).spawn_scoped(scope, work);
                spawned.map_err(PushError::Thread)?;
            }
            Ok::<_, PushError>(())
        })?;
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn send(
        &self,
        parcel: &Parcel,
        repository: &Repository,
        progress: &dyn Transfer,
    ) -> Result<(), PushError> {
        let Parcel { diff_id, blob, sources } = parcel;
        if repository.has_blob(blob.digest)? {
            progress.finished(blob.digest, true);
            return Ok(());
        }
        let open = || {
            progress.started(blob.digest, Step::Upload, blob.bytes);
            let archive = self.open_archive(*diff_id, blob).map_err(io::Error::other)?;
            Ok(Box::new(Reported { archive, progress, layer: blob.digest, position: 0, told: 0 })
                as Box<dyn Read + '_>)
        };
        let was_there = upload(repository, *blob, sources, open)?;
        progress.finished(blob.digest, was_there);
        Ok(())
    }
}

/// A layer that is to be sent.
struct Parcel {
    diff_id: Digest,
    blob: BlobRecord,
    /// Repositories that may have it.
    sources: Vec<String>,
}

/// Gets a blob into a repository; tells whether it came from another one.
fn upload<'a>(
    repository: &Repository,
    blob: BlobRecord,
    sources: &[String],
    open: impl Fn() -> io::Result<Box<dyn Read + 'a>>,
) -> Result<bool, RegistryError> {
    repository.patiently(|| {
        for source in sources {
            // Where this starts an upload instead, it is left to itself; registries forget those.
            if repository.start_upload(blob.digest, Some(source))?.is_none() {
                return Ok(true);
            }
        }
        match repository.start_upload(blob.digest, None)? {
            None => Ok(true),
            Some(to) => repository.finish_upload(&to, blob.digest, blob.bytes, &open).map(|()| false),
        }
    })
}

/// Tells how much of a layer was read.
struct Reported<'a> {
    archive: Archive,
    progress: &'a dyn Transfer,
    layer: Digest,
    position: u64,
    told: u64,
}

impl Read for Reported<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.archive.read(buffer)?;
        self.position += count as u64;
        if self.position - self.told >= REPORT || count == 0 {
            self.told = self.position;
            self.progress.moved(self.layer, self.position);
        }
        Ok(count)
    }
}
