//! One blob's way into the store, in as many pieces as it takes.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::client::{RegistryError, Repository};
use super::http::HttpError;
use super::pull::PullError;
use crate::digest::{Digest, Hasher};
use crate::limits::MAX_LAYER_BYTES;
use crate::store::Partial;

/// Times a download is broken off in a row before it is given up.
const MAX_FAILURES: u32 = 4;
/// Bytes that must have come since the last time for it not to count as "in a row".
const PROGRESS: u64 = 1 << 20;
const MAX_PAUSE: Duration = Duration::from_secs(10);
const PIECE: usize = 128 << 10;

/// Which blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) digest: Digest,
    pub(super) bytes: u64,
}

/// How an attempt ended, if not well.
enum Broken {
    /// It may go on where it ended.
    Off(RegistryError),
    /// It will not.
    For(PullError),
}

/// Brings a partial file to its whole length, and checks it. `moved` is told how many bytes there are; `stop` breaks
/// it off.
pub(super) fn download(
    repository: &Repository,
    wanted: Wanted,
    mut partial: Partial,
    moved: &dyn Fn(u64),
    stop: &AtomicBool,
) -> Result<(), PullError> {
    let Wanted { digest, bytes } = wanted;
    if bytes > MAX_LAYER_BYTES {
        let problem = format!("a layer of {bytes} bytes, where at most {MAX_LAYER_BYTES} are accepted");
        return Err(RegistryError::Answer { url: repository.url("").to_string(), problem }.into());
    }
    let disk = |source| PullError::Disk { digest, source };
    if partial.position() > bytes {
        partial.restart().map_err(disk)?;
    }
    let resumed = partial.position() > 0;
    let mut hasher = hash_start(&partial).map_err(disk)?;
    moved(partial.position());
    let (mut failures, mut last) = (0, partial.position());
    let mut pause = repository.patience().retry;
    while partial.position() < bytes {
        if stop.load(Ordering::Relaxed) {
            return Err(PullError::Stopped);
        }
        match attempt(repository, wanted, &mut partial, &mut hasher, moved, stop) {
            Ok(()) => {}
            Err(Broken::For(error)) => return Err(error),
            Err(Broken::Off(error)) => {
                if partial.position() >= last + PROGRESS {
                    (failures, last) = (0, partial.position());
                }
                failures += 1;
                if failures == MAX_FAILURES {
                    return Err(PullError::Broken {
                        digest,
                        have: partial.position(),
                        bytes,
                        source: Box::new(error),
                    });
                }
                thread::sleep(error.pause(pause));
                pause = (pause * 2).min(MAX_PAUSE);
            }
        }
    }
    let (actual, _) = hasher.finish();
    if actual == digest {
        return partial.finish().map_err(disk);
    }
    if resumed {
        // What was there from another time may have been bad; what comes now is looked at by itself.
        partial.restart().map_err(disk)?;
        return download(repository, wanted, partial, moved, stop);
    }
    partial.discard().map_err(disk)?;
    let url = repository.url(&format!("blobs/{digest}")).to_string();
    Err(RegistryError::Digest { url, expected: digest, actual }.into())
}

fn hash_start(partial: &Partial) -> io::Result<Hasher> {
    let mut hasher = Hasher::default();
    let mut reader = partial.reader()?;
    let mut piece = vec![0; PIECE];
    loop {
        let count = reader.read(&mut piece)?;
        if count == 0 {
            return Ok(hasher);
        }
        hasher.update(piece.get(..count).unwrap_or_default());
    }
}

/// Asks for what is missing, and takes what comes.
fn attempt(
    repository: &Repository,
    Wanted { digest, bytes }: Wanted,
    partial: &mut Partial,
    hasher: &mut Hasher,
    moved: &dyn Fn(u64),
    stop: &AtomicBool,
) -> Result<(), Broken> {
    let disk = |source| Broken::For(PullError::Disk { digest, source });
    let url = repository.url(&format!("blobs/{digest}"));
    let mut fields = Vec::new();
    if partial.position() > 0 {
        fields.push(("Range", format!("bytes={}-", partial.position())));
    }
    let response = repository.ask("GET", &url, &fields).map_err(|error| match error {
        // Here, unlike elsewhere, even one that cannot be reached is tried again: it was there a moment ago.
        RegistryError::Http(HttpError::Connect { .. } | HttpError::Exchange { .. }) => Broken::Off(error),
        error if error.is_passing() => Broken::Off(error),
        error => Broken::For(error.into()),
    })?;
    let start_over = |partial: &mut Partial, hasher: &mut Hasher| {
        *hasher = Hasher::default();
        partial.restart().map_err(disk)
    };
    match response.status {
        206 if starts_at(response.field("content-range"), partial.position()) => {}
        // The whole again: this registry knows no ranges.
        200 => {
            if partial.position() > 0 {
                start_over(partial, hasher)?;
            }
        }
        206 | 416 if partial.position() > 0 => {
            start_over(partial, hasher)?;
            let problem = "another part than was asked for".to_owned();
            return Err(Broken::Off(RegistryError::Answer { url: url.to_string(), problem }));
        }
        _ => {
            let error = RegistryError::status(digest.to_string(), response);
            return Err(if error.is_passing() { Broken::Off(error) } else { Broken::For(error.into()) });
        }
    }
    let left = bytes - partial.position();
    let lied = |length: u64| {
        let problem = format!("{length} bytes for {digest}, of which {left} are missing");
        Broken::For(RegistryError::Answer { url: url.to_string(), problem }.into())
    };
    if let Some(length) = response.length().filter(|length| *length != left) {
        return Err(lied(length));
    }
    let mut body = response.body;
    let mut piece = vec![0; PIECE];
    while !stop.load(Ordering::Relaxed) {
        let count = body.read(&mut piece).map_err(|source| {
            Broken::Off(HttpError::Exchange { method: "GET", url: url.to_string(), source }.into())
        })?;
        let read = piece.get(..count).unwrap_or_default();
        if partial.position() + count as u64 > bytes {
            return Err(lied(left + 1));
        }
        if count == 0 {
            let whole = partial.position() == bytes;
            let problem = format!("only {} of {bytes} bytes of {digest}", partial.position());
            let error = RegistryError::Answer { url: url.to_string(), problem };
            return if whole { Ok(()) } else { Err(Broken::Off(error)) };
        }
        partial.append(read).map_err(disk)?;
        hasher.update(read);
        moved(partial.position());
    }
    Ok(())
}

/// Whether `bytes FIRST-LAST/TOTAL` starts at `position` (RFC 9110 §14.4).
pub(super) fn starts_at(range: Option<&str>, position: u64) -> bool {
    let first = range.and_then(|range| range.trim().strip_prefix("bytes ")?.split_once('-'));
    first.and_then(|(first, _)| first.trim().parse::<u64>().ok()) == Some(position)
}
