//! Files that appear whole or not at all, and locks.
//!
//! New files are written without a name (`O_TMPFILE`), brought to disk, and then linked: whoever is killed on the way
//! leaves nothing behind, as the kernel frees a nameless file with its last descriptor.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// A file in the making, without a name.
pub(super) struct NewFile {
    file: File,
    directory: PathBuf,
}

impl NewFile {
    /// Starts a file that is to appear in `directory`.
    pub(super) fn create(directory: &Path) -> io::Result<NewFile> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(directory, flags, Mode::from_raw_mode(0o444))?;
        Ok(NewFile { file: file.into(), directory: directory.to_owned() })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file appear under `name`, durably. Another one of that name and length is kept: names are content
    /// digests. One of another length is damaged, and is replaced.
    pub(super) fn publish(self, name: &str) -> io::Result<()> {
        self.file.sync_all()?;
        let from = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let path = self.directory.join(name);
        match rustix::fs::linkat(CWD, from, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => sync_directory(&self.directory),
            Err(Errno::EXIST) if fs::metadata(&path)?.len() == self.file.metadata()?.len() => {
                sync_directory(&self.directory)
            }
            Err(Errno::EXIST) => {
                fs::remove_file(&path)?;
                self.publish(name)
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl NewFile {
    /// Makes the file appear under `name`, in the place of another one. Not brought to disk, and for a moment there may
    /// be neither.
    pub(super) fn put(self, name: &str) -> io::Result<()> {
        let from = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let path = self.directory.join(name);
        loop {
            match rustix::fs::linkat(CWD, &from, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
                Err(Errno::EXIST) => match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                },
                result => return Ok(result?),
            }
        }
    }
}

/// Replaces a file's content in one step. Only one process may do this at a time; the half-written successor of
/// one that was killed is overwritten by the next.
pub(super) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let successor = path.with_extension("new");
    let mut file = File::create(&successor)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&successor, path)?;
    path.parent().map_or(Ok(()), sync_directory)
}

/// Brings a directory's entries to disk.
pub(super) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// A lock on a file, held until dropped or until the process ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
}

impl Drop for Lock {
    /// Closing the file would do, but for children that were just forked and hold it open until they call `exec`.
    fn drop(&mut self) {
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

impl Lock {
    /// Waits for a lock that others may share.
    pub(super) fn shared(path: &Path) -> io::Result<Lock> {
        Lock::take(path, FlockOperation::LockShared)
    }

    /// Waits for a lock of one's own.
    pub(super) fn exclusive(path: &Path) -> io::Result<Lock> {
        Lock::take(path, FlockOperation::LockExclusive)
    }

    /// Takes a lock of one's own if nobody has any.
    pub(super) fn try_exclusive(path: &Path) -> io::Result<Option<Lock>> {
        match Lock::take(path, FlockOperation::NonBlockingLockExclusive) {
            Ok(lock) => Ok(Some(lock)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn take(path: &Path, operation: FlockOperation) -> io::Result<Lock> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        loop {
            match rustix::fs::flock(&file, operation) {
                Ok(()) => return Ok(Lock { file }),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_file_dropped_before_publishing_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let new = NewFile::create(directory.path()).unwrap();
        new.file().write_all(b"half").unwrap();
        drop(new);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn new_file_published_twice_is_kept_once() {
        let directory = tempfile::tempdir().unwrap();
        for content in [b"one", b"two"] {
            let new = NewFile::create(directory.path()).unwrap();
            new.file().write_all(content).unwrap();
            new.publish("name").unwrap();
        }
        assert_eq!(fs::read(directory.path().join("name")).unwrap(), b"one");
    }

    #[test]
    fn new_file_put_twice_is_the_later_one() {
        let directory = tempfile::tempdir().unwrap();
        for content in [b"one", b"two"] {
            let new = NewFile::create(directory.path()).unwrap();
            new.file().write_all(content).unwrap();
            new.put("name").unwrap();
        }
        assert_eq!(fs::read(directory.path().join("name")).unwrap(), b"two");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn lock_held_by_one_is_refused_to_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let shared = Lock::shared(&path).unwrap();
        assert!(Lock::try_exclusive(&path).unwrap().is_none());
        drop((shared, Lock::shared(&path).unwrap()));
        assert!(Lock::try_exclusive(&path).unwrap().is_some());
    }
}
