//! Named volumes: directories that outlive the sandboxes that mount them.
//!
//! ```text
//! ROOT/volumes/NAME/volume.json   what is known about it
//!                   data          its files; this is what is mounted
//!                   lock          held (flock): shared by each sandbox that uses it, exclusively by who removes it
//!                   filling       there while the first one that uses it fills it with its image's files
//! ROOT/volumes/.NAME-PID          a volume being made or removed
//! ```
//!
//! A monitor holds the locks of its sandbox's volumes as long as it lives, so that the kernel frees them whatever ends
//! it. A volume appears and disappears by a rename, and whoever gets a lock looks whether it is still that of the
//! volume of this name. The directory itself is held exclusively by who looks whether it is to be filled, and until it is,
//! so that nobody starts on a part of it. What a filler that was killed has left is emptied by the next.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{
    mounts::volume_name,
    record::{ProcessId, unix_time},
    rootless,
    sandboxes::is_taken,
};

/// Why a volume cannot be had or removed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// Not a name.
    #[error("{0}")]
    Name(String),
    /// There is no such volume.
    #[error("there is no volume `{0}`; `cloche volume ls` lists all")]
    Unknown(String),
    /// A sandbox runs on it.
    #[error("volume `{0}` is in use by a running sandbox; stop it first")]
    InUse(String),
    /// The disk or its permissions are in the way.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::Io { action, path, source }
}

/// What is known about a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Where its files are.
    pub mountpoint: PathBuf,
    /// Unix time in seconds.
    pub created: u64,
    /// Whether a running sandbox uses it.
    pub in_use: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Facts {
    created: u64,
}

/// A volume that is not removed as long as this lives.
#[derive(Debug)]
pub struct Held {
    /// Its files.
    pub data: PathBuf,
    /// Whether there are none, and this one is to fill it.
    pub fill: bool,
    _lock: File,
    filling: Option<Filling>,
}

/// Held while a volume is filled.
#[derive(Debug)]
struct Filling {
    mark: PathBuf,
    turn: File,
}

impl Held {
    /// It is filled, and everybody else may use it.
    ///
    /// # Errors
    ///
    /// The mark that it is being filled may still be there, or be there again after a crash of the machine: then the next
    /// one who has the volume alone empties it.
    pub fn filled(&mut self) -> Result<(), VolumeError> {
        let Some(Filling { mark, turn }) = self.filling.take() else { return Ok(()) };
        let removed = match fs::remove_file(&mark) {
            // Nobody makes it where the volume is in use already.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            // On the disk, before anybody writes what must not be taken for a part: `turn` is the mark's directory.
            result => result.and_then(|()| turn.sync_all()),
        };
        // For all who may have inherited it.
        let _ = flock(&turn, FlockOperation::Unlock);
        removed.map_err(io_error("remove", &mark))
    }
}

/// All volumes of one root directory.
#[derive(Debug)]
pub struct Volumes {
    dir: PathBuf,
}

impl Volumes {
    /// The volumes below this directory, which is made when the first volume is.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Makes a volume, unless there is one of this name.
    pub fn create(&self, name: &str) -> Result<(), VolumeError> {
        volume_name(name).map_err(VolumeError::Name)?;
        let final_dir = self.dir.join(name);
        if final_dir.exists() {
            return Ok(());
        }
        let private = |path: &Path| fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        private(&self.dir).map_err(io_error("make", &self.dir))?;
        let staging = self.dir.join(format!(".{name}-{}", std::process::id()));
        // What a process of the same number has left.
        let _ = fs::remove_dir_all(&staging);
        let make = || -> io::Result<()> {
            private(&staging)?;
            make_data(&staging.join("data"))?;
            File::create(staging.join("lock"))?;
            let facts = serde_json::to_vec(&Facts { created: unix_time() })?;
            fs::write(staging.join("volume.json"), facts)?;
            match fs::rename(&staging, &final_dir) {
                // Somebody was faster.
                Err(error) if is_taken(&error) => fs::remove_dir_all(&staging),
                result => result,
            }
        };
        make().map_err(io_error("make the volume", &final_dir))
    }

    /// All volumes, by name.
    pub fn list(&self) -> Result<Vec<Volume>, VolumeError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("read", &self.dir)(error)),
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
        names.sort();
        // One that is removed meanwhile is no longer there.
        Ok(names.iter().filter_map(|name| self.inspect(name).ok()).collect())
    }

    /// The volume of this name.
    pub fn inspect(&self, name: &str) -> Result<Volume, VolumeError> {
        let unknown = || VolumeError::Unknown(name.into());
        volume_name(name).map_err(|_| unknown())?;
        let dir = self.dir.join(name);
        let facts = fs::read(dir.join("volume.json")).map_err(|_| unknown())?;
        let facts: Facts = serde_json::from_slice(&facts)
            .map_err(|error| io_error("read", &dir.join("volume.json"))(error.into()))?;
        Ok(Volume {
            name: name.into(),
            mountpoint: dir.join("data"),
            created: facts.created,
            in_use: self.lock(name, "lock", FlockOperation::NonBlockingLockExclusive)?.is_none(),
        })
    }

    /// Removes a volume with its files, unless a sandbox uses it.
    pub fn remove(&self, name: &str) -> Result<(), VolumeError> {
        self.inspect(name)?;
        let Some(_lock) = self.lock_alone(name)? else { return Err(VolumeError::InUse(name.into())) };
        let (dir, gone) = (self.dir.join(name), self.dir.join(format!(".{name}-{}", std::process::id())));
        fs::rename(&dir, &gone)
            .and_then(|()| rootless::remove_all(&gone))
            .map_err(io_error("remove the volume", &dir))
    }

    /// The lock that every sandbox with the volume shares; `None` if there is one. Whoever looks whether there is (see
    /// [`Self::inspect`]) has it for a moment.
    fn lock_alone(&self, name: &str) -> Result<Option<File>, VolumeError> {
        const TRIES: u32 = 10;
        const PAUSE: Duration = Duration::from_millis(5);
        for _ in 0..TRIES {
            if let Some(lock) = self.lock(name, "lock", FlockOperation::NonBlockingLockExclusive)? {
                return Ok(Some(lock));
            }
            thread::sleep(PAUSE);
        }
        Ok(None)
    }

    /// Removes every volume that no sandbox uses, and says which.
    pub fn prune(&self) -> Result<Vec<String>, VolumeError> {
        let mut removed = Vec::new();
        for volume in self.list()? {
            match self.remove(&volume.name) {
                Ok(()) => removed.push(volume.name),
                Err(VolumeError::InUse(_) | VolumeError::Unknown(_)) => {}
                Err(error) => return Err(error),
            }
        }
        self.remove_dead_staging();
        Ok(removed)
    }

    /// Keeps a volume, which is made if there is none, from being removed. If it is empty and `fills`, nobody else gets it
    /// until it is filled.
    pub fn hold(&self, name: &str, fills: bool) -> Result<Held, VolumeError> {
        const ATTEMPTS: u32 = 100;
        for _ in 0..ATTEMPTS {
            self.create(name)?;
            let (dir, data) = (self.dir.join(name), self.data(name));
            let mark = dir.join("filling");
            // It may be removed at this very moment.
            let Some(turn) = self.lock(name, "", FlockOperation::LockExclusive)? else { continue };
            let alone = self.lock(name, "lock", FlockOperation::NonBlockingLockExclusive)?;
            let is_alone = alone.is_some();
            if mark.exists() {
                // Whoever made it was killed. If somebody has come to use the volume since, it stays as it is.
                if is_alone {
                    rootless::remove_all(&data)
                        .and_then(|()| make_data(&data))
                        .map_err(io_error("empty", &data))?;
                }
                fs::remove_file(&mark).map_err(io_error("remove", &mark))?;
            }
            let shared = FlockOperation::LockShared;
            let lock = match alone {
                // The kernel changes it without letting go of it (Linux 3.18 and later, fs/locks.c).
                Some(lock) => flock(&lock, shared).map(|()| Some(lock)).map_err(|errno| errno.into()),
                None => Ok(self.lock(name, "lock", shared)?),
            };
            let Some(lock) = lock.map_err(io_error("lock", &dir))? else { continue };
            let fill = fills && fs::read_dir(&data).map_err(io_error("read", &data))?.next().is_none();
            let filling = fill.then(|| Filling { mark, turn });
            if let Some(Filling { mark, .. }) = filling.as_ref().filter(|_| is_alone) {
                File::create(mark).map_err(io_error("make", mark))?;
            }
            return Ok(Held { data, fill, _lock: lock, filling });
        }
        Err(VolumeError::Unknown(name.into()))
    }

    /// Where the files of a volume of this name are.
    pub(crate) fn data(&self, name: &str) -> PathBuf {
        self.dir.join(name).join("data")
    }

    /// The lock on `file` of the volume that has this name, or on its directory; `None` if it is taken, or the volume gone.
    fn lock(&self, name: &str, file: &str, operation: FlockOperation) -> Result<Option<File>, VolumeError> {
        let path = self.dir.join(name).join(file);
        let file = match OpenOptions::new().read(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("open", &path)(error)),
        };
        match rustix::io::retry_on_intr(|| flock(&file, operation)) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(io_error("lock", &path)(errno.into())),
        }
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let (held, named) = (file.metadata().map(identity), fs::metadata(&path).map(identity));
        Ok(matches!((held, named), (Ok(held), Ok(named)) if held == named).then_some(file))
    }

    /// Removes what killed processes were making or removing.
    fn remove_dead_staging(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let maker = name.strip_prefix('.').and_then(|rest| rest.rsplit_once('-')?.1.parse().ok());
            if maker.is_some_and(|pid| ProcessId::of(pid).is_none()) {
                let _ = rootless::remove_all(&entry.path());
            }
        }
    }
}

fn make_data(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o755).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volumes() -> (tempfile::TempDir, Volumes) {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(dir.path().join("volumes"));
        (dir, volumes)
    }

    #[test]
    fn volume_is_made_once_listed_and_removed() {
        let (_dir, volumes) = volumes();
        assert!(volumes.list().unwrap().is_empty());
        volumes.create("web.data").unwrap();
        let held = volumes.hold("web.data", false).unwrap();
        fs::write(held.data.join("file"), "kept").unwrap();
        drop(held);
        volumes.create("web.data").unwrap();
        let listed = volumes.list().unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!(fs::read(listed[0].mountpoint.join("file")).unwrap(), b"kept");
        assert!(!volumes.hold("web.data", true).unwrap().fill);
        volumes.remove("web.data").unwrap();
        assert!(matches!(volumes.inspect("web.data"), Err(VolumeError::Unknown(_))));
        assert!(fs::read_dir(&volumes.dir).unwrap().next().is_none());
    }

    #[test]
    fn volume_in_use_is_neither_removed_nor_pruned() {
        let (_dir, volumes) = volumes();
        let held = volumes.hold("used", false).unwrap();
        let shared = volumes.hold("used", false).unwrap();
        volumes.create("idle").unwrap();
        assert!(matches!(volumes.remove("used"), Err(VolumeError::InUse(_))));
        assert_eq!(
            volumes.list().unwrap().iter().map(|volume| volume.in_use).collect::<Vec<_>>(),
            [false, true]
        );
        assert_eq!(volumes.prune().unwrap(), ["idle"]);
        drop((held, shared));
        volumes.remove("used").unwrap();
    }

    #[test]
    fn volume_is_given_to_others_once_it_is_filled() {
        let (_dir, volumes) = volumes();
        let mut first = volumes.hold("new", true).unwrap();
        assert!(first.fill);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| volumes.hold("new", true).unwrap());
            std::thread::sleep(std::time::Duration::from_millis(100));
            assert!(!second.is_finished());
            fs::write(first.data.join("file"), "whole").unwrap();
            first.filled().unwrap();
            assert!(!second.join().unwrap().fill);
        });
        drop(first);
        assert!(volumes.hold("new", true).unwrap().data.join("file").exists());
    }

    #[test]
    fn part_that_a_killed_filler_has_left_is_filled_anew() {
        let (_dir, volumes) = volumes();
        let killed = volumes.hold("new", true).unwrap();
        fs::create_dir(killed.data.join("part")).unwrap();
        fs::write(killed.data.join("part/file"), "half").unwrap();
        drop(killed);
        let mut next = volumes.hold("new", true).unwrap();
        assert!(next.fill && !next.data.join("part").exists());
        next.filled().unwrap();
    }

    #[test]
    fn mark_that_cannot_be_removed_is_told_and_the_volume_given_to_others() {
        let (_dir, volumes) = volumes();
        let mut first = volumes.hold("new", true).unwrap();
        let mark = volumes.dir.join("new/filling");
        fs::remove_file(&mark).unwrap();
        fs::create_dir(&mark).unwrap();
        assert!(matches!(first.filled(), Err(VolumeError::Io { path, .. }) if path == mark));
        let turn = volumes.lock("new", "", FlockOperation::NonBlockingLockExclusive).unwrap();
        assert!(turn.is_some());
    }

    #[test]
    fn files_of_a_user_are_not_taken_for_a_part() {
        let (_dir, volumes) = volumes();
        let user = volumes.hold("new", false).unwrap();
        // Somebody uses it already, so that what a filler leaves cannot be told from that one's files.
        let killed = volumes.hold("new", true).unwrap();
        fs::write(user.data.join("file"), "written").unwrap();
        drop((killed, user));
        let next = volumes.hold("new", true).unwrap();
        assert!(!next.fill && next.data.join("file").exists());
    }

    #[test]
    fn names_that_are_paths_name_no_volume() {
        let (_dir, volumes) = volumes();
        for name in ["..", ".hidden", "a/b", "/etc", ""] {
            assert!(matches!(volumes.create(name), Err(VolumeError::Name(_))), "{name}");
            assert!(matches!(volumes.remove(name), Err(VolumeError::Unknown(_))), "{name}");
        }
    }
}
