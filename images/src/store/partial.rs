//! Downloads that may be broken off: files that grow under their names, so that the next try goes on where this one
//! ended, in whichever process.
//!
//! Whoever writes to one holds its lock. A lock is held for the time of one download only and no other is waited for
//! meanwhile, so processes that want the same blobs in any order do not wait for each other in a circle.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::files::sync_directory;
use super::{BlobRecord, LayerRecord, Store, StoreError, io_error};
use crate::digest::Digest;
use crate::limits::RESERVED_DISK_BYTES;

/// How long a download that nobody goes on with is kept.
pub(super) const KEPT_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
/// Bytes between two looks at the free space. Smaller downloads may fill the disk, and then fail by themselves.
const SPACE_CHECK: u64 = 64 << 20;

/// A download under way.
#[derive(Debug)]
pub(crate) struct Partial {
    file: File,
    path: PathBuf,
    /// Where the next byte goes.
    position: u64,
    next_space_check: u64,
}

impl Store {
    /// The download of a blob, after waiting for whoever else is at it. `None` if the blob is there meanwhile.
    pub(crate) fn partial(&self, digest: Digest, bytes: u64) -> Result<Option<Partial>, StoreError> {
        let path = self.partials().join(digest.hex());
        let failed = || io_error("open", &path);
        loop {
            if self.has_blob(digest, bytes) {
                return Ok(None);
            }
            let file = File::options().read(true).append(true).create(true).open(&path).map_err(failed())?;
            lock(&file).map_err(failed())?;
            // Another process may have finished it, and moved it away, before we got the lock.
            match is_at(&file, &path) {
                Ok(true) => {
                    let position = file.metadata().map_err(failed())?.len();
                    return Ok(Some(Partial {
                        file,
                        path,
                        position,
                        next_space_check: position + SPACE_CHECK,
                    }));
                }
                Ok(false) => {}
                Err(error) => return Err(failed()(error)),
            }
        }
    }

    /// Opens a blob, be it one that waits for the rest of its image.
    pub(crate) fn open_blob(&self, digest: Digest, bytes: u64) -> Result<File, StoreError> {
        let waiting = self.partials().join(digest.hex());
        for path in [&self.blob_path(digest), &waiting, &self.blob_path(digest)] {
            match File::open(path) {
                Ok(file) if file.metadata().is_ok_and(|metadata| metadata.len() == bytes) => return Ok(file),
                Ok(_) => {}
                // Another process may move it from one place to the other between two looks.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io_error("read", path)(error)),
            }
        }
        Err(io_error("read", &self.blob_path(digest))(io::ErrorKind::NotFound.into()))
    }

    /// Makes a finished download a blob, or deletes it if there is a recipe for what is in it.
    pub(crate) fn settle(&self, layer: &LayerRecord) -> Result<(), StoreError> {
        let Some(BlobRecord { digest, bytes }) = layer.blob else { return Ok(()) };
        let from = self.partials().join(digest.hex());
        let to = self.blob_path(digest);
        if digest == layer.diff_id && self.recipes().join(digest.hex()).exists() {
            return match fs::remove_file(&from) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(io_error("delete", &from)(error))
                }
                _ => Ok(()),
            };
        }
        match fs::rename(&from, &to) {
            Ok(()) => sync_directory(&self.blobs()).map_err(io_error("write", &to)),
            // It was there before, or another process was faster.
            Err(_) if self.has_blob(digest, bytes) => Ok(()),
            Err(error) => Err(io_error("keep", &to)(error)),
        }
    }

    /// Deletes downloads that nobody is at: all, or those that have not grown for a time. Gives the bytes freed.
    pub(crate) fn sweep_partials(&self, kept_for: Option<Duration>) -> Result<u64, StoreError> {
        let directory = self.partials();
        let mut freed = 0;
        for entry in fs::read_dir(&directory).map_err(io_error("list", &directory))? {
            let path = entry.map_err(io_error("list", &directory))?.path();
            let Ok(file) = File::open(&path) else { continue };
            let Ok(metadata) = file.metadata() else { continue };
            let age = metadata.modified().ok().and_then(|time| SystemTime::now().duration_since(time).ok());
            if kept_for.is_some_and(|kept| age.is_none_or(|age| age < kept)) {
                continue;
            }
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
                && is_at(&file, &path).unwrap_or(false)
            {
                fs::remove_file(&path).map_err(io_error("delete", &path))?;
                freed += metadata.len();
            }
        }
        Ok(freed)
    }
}

impl Partial {
    /// Bytes that are there.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// What is there, to be read from its start.
    pub(crate) fn reader(&self) -> io::Result<File> {
        File::open(&self.path)
    }

    /// Adds to the end.
    pub(crate) fn append(&mut self, piece: &[u8]) -> io::Result<()> {
        if self.position >= self.next_space_check {
            let stat = rustix::fs::fstatvfs(&self.file)?;
            if stat.f_bavail.saturating_mul(stat.f_frsize) < RESERVED_DISK_BYTES {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.next_space_check = self.position + SPACE_CHECK;
        }
        (&self.file).write_all(piece)?;
        self.position += piece.len() as u64;
        Ok(())
    }

    /// Starts all over.
    pub(crate) fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        (self.position, self.next_space_check) = (0, SPACE_CHECK);
        Ok(())
    }

    /// Brings it to disk; all of it has been written and looked at.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Gives it up.
    pub(crate) fn discard(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

fn lock(file: &File) -> io::Result<()> {
    loop {
        match rustix::fs::flock(file, FlockOperation::LockExclusive) {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Whether a file still has this path.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (open.dev(), open.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn download_goes_on_where_it_ended_and_becomes_a_blob() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let digest = Digest::of(b"one two");
        let mut partial = store.partial(digest, 7).unwrap().unwrap();
        partial.append(b"one").unwrap();
        drop(partial);
        store.sweep().unwrap();
        let mut partial = store.partial(digest, 7).unwrap().unwrap();
        assert_eq!(partial.position(), 3);
        partial.append(b" two").unwrap();
        assert_eq!(store.sweep_partials(None).unwrap(), 0, "one that is written to is not deleted");
        partial.finish().unwrap();
        let blob = Some(BlobRecord { digest, bytes: 7 });
        let layer = LayerRecord { diff_id: Digest::of(b""), erofs_bytes: 0, blob };
        store.settle(&layer).unwrap();
        assert!(store.partial(digest, 7).unwrap().is_none());
        assert_eq!(fs::read(store.blob_path(digest)).unwrap(), b"one two");
        store.settle(&layer).unwrap();
    }

    #[test]
    fn download_that_is_left_is_deleted_when_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let mut partial = store.partial(Digest::of(b"x"), 9).unwrap().unwrap();
        partial.append(b"half").unwrap();
        drop(partial);
        assert_eq!(store.sweep_partials(Some(KEPT_FOR)).unwrap(), 0);
        assert_eq!(store.sweep_partials(None).unwrap(), 4);
    }
}
