//! Downloads that may be broken off: files that grow under their names, so that the next try goes on where this one
//! ended, in whichever process.
//!
//! Whoever writes to one holds its lock. A lock is held for the time of one download only and no other is waited for
//! meanwhile, so processes that want the same blobs in any order do not wait for each other in a circle.
//!
//! One that grows is called `HEX-BYTES`: who names another length for the same digest writes elsewhere. Once its length
//! and digest are right it becomes `HEX.whole`. That one nobody writes to; it goes only once the blob or its recipe is
//! there, or when nobody uses the store.

use std::fs::{self, File};
use std::io::{self, Seek, Write};
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
    /// Where it goes once it is whole.
    whole: PathBuf,
    /// Where the next byte goes.
    position: u64,
    next_space_check: u64,
}

impl Store {
    /// The download of a blob, after waiting for whoever else is at it. `None` if the blob is there meanwhile, be it
    /// as a recipe or as one that waits for the rest of its image.
    pub(crate) fn partial(&self, digest: Digest, bytes: u64) -> Result<Option<Partial>, StoreError> {
        let path = self.growing(digest, bytes);
        let whole = self.waiting(digest);
        let failed = || io_error("open", &path);
        loop {
            if has_length(&whole, bytes) || self.has_archive(digest, &BlobRecord { digest, bytes }) {
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
                        whole,
                        position,
                        next_space_check: position + SPACE_CHECK,
                    }));
                }
                Ok(false) => {}
                Err(error) => return Err(failed()(error)),
            }
        }
    }

    /// Where a download grows.
    fn growing(&self, digest: Digest, bytes: u64) -> PathBuf {
        self.partials().join(format!("{}-{bytes}", digest.hex()))
    }

    /// Where a finished download waits for the rest of its image.
    fn waiting(&self, digest: Digest) -> PathBuf {
        self.partials().join(format!("{}.whole", digest.hex()))
    }

    /// Opens a blob, be it one that waits for the rest of its image.
    pub(crate) fn open_blob(&self, digest: Digest, bytes: u64) -> Result<File, StoreError> {
        for path in [&self.blob_path(digest), &self.waiting(digest), &self.blob_path(digest)] {
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

    /// Makes a finished download a blob, or deletes it if the blob, or a recipe for what is in it, is there.
    pub(crate) fn settle(&self, layer: &LayerRecord) -> Result<(), StoreError> {
        let Some(blob) = layer.blob else { return Ok(()) };
        let BlobRecord { digest, bytes } = blob;
        let from = self.waiting(digest);
        if !self.has_archive(layer.diff_id, &blob) {
            let to = self.blob_path(digest);
            return match fs::rename(&from, &to) {
                Ok(()) => sync_directory(&self.blobs()).map_err(io_error("write", &to)),
                // Another process was faster.
                Err(_) if self.has_blob(digest, bytes) => Ok(()),
                Err(error) => Err(io_error("keep", &to)(error)),
            };
        }
        match fs::remove_file(&from) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("delete", &from)(error)),
            // What was broken off before the blob came by another way, such as `load`.
            _ => delete_idle(&self.growing(digest, bytes)),
        }
    }

    /// Deletes downloads that nobody is at: all, or those that have not grown for a time. The caller has the store to
    /// itself, as nobody has a lock on what waits for the rest of its image.
    pub(super) fn sweep_partials(&self, kept_for: Option<Duration>) -> Result<(), StoreError> {
        let directory = self.partials();
        for entry in fs::read_dir(&directory).map_err(io_error("list", &directory))? {
            let path = entry.map_err(io_error("list", &directory))?.path();
            let Ok(metadata) = fs::metadata(&path) else { continue };
            let age = metadata.modified().ok().and_then(|time| SystemTime::now().duration_since(time).ok());
            if kept_for.is_none_or(|kept| age.is_some_and(|age| age >= kept)) {
                delete_idle(&path)?;
            }
        }
        Ok(())
    }
}

/// Deletes a download if it is there and nobody is at it.
fn delete_idle(path: &Path) -> Result<(), StoreError> {
    let Ok(file) = File::open(path) else { return Ok(()) };
    let is_idle = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
    if is_idle && is_at(&file, path).unwrap_or(false) {
        fs::remove_file(path).map_err(io_error("delete", path))?;
    }
    Ok(())
}

impl Partial {
    /// Bytes that are there.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// What is there, to be read from its start.
    pub(crate) fn reader(&self) -> io::Result<File> {
        let mut file = self.file.try_clone()?;
        // (Appending takes no notice of where reading is.)
        file.rewind()?;
        Ok(file)
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

    /// Brings it to disk, and out of reach of all who write; its length and its digest have been looked at.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, &self.whole)?;
        self.whole.parent().map_or(Ok(()), sync_directory)
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

fn has_length(path: &Path, bytes: u64) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.len() == bytes)
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

    fn layer_of(content: &[u8]) -> LayerRecord {
        let blob = Some(BlobRecord { digest: Digest::of(content), bytes: content.len() as u64 });
        LayerRecord { diff_id: Digest::of(b""), erofs_bytes: 0, blob }
    }

    fn partials_of(store: &Store) -> usize {
        fs::read_dir(store.partials()).unwrap().count()
    }

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
        let mut there = String::new();
        io::Read::read_to_string(&mut partial.reader().unwrap(), &mut there).unwrap();
        assert_eq!(there, "one");
        partial.append(b" two").unwrap();
        store.sweep_partials(None).unwrap();
        assert_eq!(partials_of(&store), 1, "one that is written to is not deleted");
        partial.finish().unwrap();
        assert!(store.partial(digest, 7).unwrap().is_none(), "it waits for its image");
        let layer = layer_of(b"one two");
        store.settle(&layer).unwrap();
        assert!(store.partial(digest, 7).unwrap().is_none());
        assert_eq!(fs::read(store.blob_path(digest)).unwrap(), b"one two");
        store.settle(&layer).unwrap();
        assert_eq!(partials_of(&store), 0);
    }

    #[test]
    fn download_that_was_broken_off_never_replaces_a_blob() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let digest = Digest::of(b"one two");
        let mut partial = store.partial(digest, 7).unwrap().unwrap();
        partial.append(b"one").unwrap();
        drop(partial);
        // As `load` does.
        store.put_blob(b"one two").unwrap();
        store.settle(&layer_of(b"one two")).unwrap();
        assert_eq!(fs::read(store.blob_path(digest)).unwrap(), b"one two");
        assert_eq!(partials_of(&store), 0, "nobody will go on with it");
    }

    #[test]
    fn whole_download_is_out_of_reach_of_who_names_another_length() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let digest = Digest::of(b"one two");
        let mut partial = store.partial(digest, 7).unwrap().unwrap();
        partial.append(b"one two").unwrap();
        partial.finish().unwrap();
        for lie in [3, 9] {
            let mut other = store.partial(digest, lie).unwrap().unwrap();
            assert_eq!(other.position(), 0);
            other.append(b"?").unwrap();
            other.restart().unwrap();
            other.discard().unwrap();
        }
        store.settle(&layer_of(b"one two")).unwrap();
        assert_eq!(fs::read(store.blob_path(digest)).unwrap(), b"one two");
    }

    #[test]
    fn download_that_is_left_is_deleted_when_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let mut partial = store.partial(Digest::of(b"x"), 9).unwrap().unwrap();
        partial.append(b"half").unwrap();
        drop(partial);
        store.sweep_partials(Some(KEPT_FOR)).unwrap();
        assert_eq!(partials_of(&store), 1);
        store.sweep_partials(None).unwrap();
        assert_eq!(partials_of(&store), 0);
    }

    #[test]
    fn prune_leaves_alone_what_a_running_pull_has_finished() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let hold = store.hold().unwrap();
        let digest = Digest::of(b"one two");
        let mut partial = store.partial(digest, 7).unwrap().unwrap();
        partial.append(b"one two").unwrap();
        partial.finish().unwrap();
        store.prune(true, |_| false).unwrap();
        assert!(store.open_blob(digest, 7).is_ok());
        drop(hold);
        store.prune(true, |_| false).unwrap();
        assert_eq!(partials_of(&store), 0);
    }
}
