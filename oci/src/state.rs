//! What is on disk about containers: for each a directory with the record and the configuration it was created with.

use std::{
    collections::HashMap,
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use cloche_runtime::cgroup::{Cgroup, CgroupError};
use oci_spec::runtime::Spec;
use rustix::fs::{FlockOperation, fcntl_lock, flock};
use serde::{Deserialize, Serialize};

use crate::{
    bundle,
    error::{Error, of_file},
    gate,
    isolation::Isolation,
    process::ProcessId,
};

/// The directory of all containers of an isolation.
#[derive(Debug, Clone, Copy)]
pub struct Home<'a> {
    path: &'a Path,
    pub(crate) isolation: &'a dyn Isolation,
}

/// What is recorded of a container. Its status is not: that is seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: String,
    pub(crate) oci_version: String,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: PathBuf,
    pub(crate) created: String,
    pub(crate) owner: String,
    pub(crate) annotations: HashMap<String, String>,
    pub(crate) cgroup: PathBuf,
    /// Which directories of that path are the container's own; none until its process is made.
    #[serde(default)]
    pub(crate) cgroup_identity: Vec<(u64, u64)>,
    /// Whether that is in a cgroup of somebody else, the one that was asked for.
    #[serde(default)]
    pub(crate) is_tenant: bool,
    /// The first process; `None` until it is made.
    pub(crate) process: Option<ProcessId>,
}

/// Where a container is in its life (runtime.md#state).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    /// As the specification names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// The state as it is printed, and given to hooks (runtime.md#state; what other runtimes add stands behind it).
#[derive(Debug, Serialize)]
#[allow(missing_docs)]
pub struct State<'a> {
    #[serde(rename = "ociVersion")]
    pub oci_version: &'a str,
    pub id: &'a str,
    pub pid: i32,
    pub status: &'a str,
    pub bundle: &'a Path,
    pub rootfs: &'a Path,
    pub created: &'a str,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    pub annotations: &'a HashMap<String, String>,
    pub owner: &'a str,
}

/// A container that there is a directory of.
#[derive(Debug)]
pub struct Known {
    pub(crate) directory: PathBuf,
    pub(crate) record: Record,
}

/// Held by the process that creates a container, as long as it does. The kernel lets go of it whatever happens to that
/// process, and does not hand it on to the container's.
const LOCK: &str = "lock";
const RECORD: &str = "state.json";
const CONFIG: &str = "config.json";

impl<'a> Home<'a> {
    /// The directory of this path, which need not be there yet.
    pub fn new(path: &'a Path, isolation: &'a dyn Isolation) -> Self {
        Self { path, isolation }
    }

    /// Whether its isolation knows more of a container's processes than their ids, which mean nothing here.
    pub fn shows_processes(&self) -> bool {
        !self.isolation.enters_containers()
    }

    pub(crate) fn directory(&self, id: &str) -> Result<PathBuf, Error> {
        // A name such as `.x` cannot be one of ours either, but it can do no harm.
        let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
        if id.is_empty() || id.len() > 1024 || id == "." || id == ".." || !id.bytes().all(is_valid) {
            return Err(Error::Id(id.to_owned()));
        }
        Ok(self.path.join(id))
    }

    /// Claims an id by making its directory, and holds the turn at it until there is a record.
    pub(crate) fn claim(&self, id: &str) -> Result<Claim, Error> {
        let directory = self.directory(id)?;
        let make =
            // The environment of a process is nobody else's to read.
            |recursive, path: &Path| fs::DirBuilder::new().recursive(recursive).mode(0o700).create(path);
        make(true, self.path).map_err(of_file("create", self.path))?;
        loop {
            match make(false, &directory) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(Error::Exists(id.to_owned()));
                }
                result => result.map_err(of_file("create", &directory))?,
            }
            match take_turn(&directory).map_err(of_file("lock", &directory))? {
                Some(turn) if !directory.join(RECORD).exists() => return Ok(Claim { directory, turn }),
                // It was taken for what a killed creator left, and then made again, by somebody who was faster.
                Some(_) => return Err(Error::Exists(id.to_owned())),
                None => {}
            }
        }
    }

    /// Finds a container.
    pub fn find(&self, id: &str) -> Result<Known, Error> {
        let directory = self.directory(id)?;
        match read_record(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NoContainer(id.to_owned())),
            result => {
                let record = result.map_err(of_file("read", directory.join(RECORD)))?;
                Ok(Known { directory, record })
            }
        }
    }

    /// Removes what a command that was killed has left of an id without a record, if anything. `false` if there is a record
    /// by now: whoever claimed it was not killed.
    pub(crate) fn remove_claim(&self, id: &str) -> Result<bool, Error> {
        let directory = self.directory(id)?;
        let Some(_turn) = take_turn(&directory).map_err(of_file("lock", &directory))? else {
            return Ok(true);
        };
        match self.find(id) {
            Err(Error::NoContainer(_)) => remove_directory(&directory).map(|()| true),
            found => found.map(|_| false),
        }
    }

    /// All containers, by id.
    pub(crate) fn all(&self) -> Result<Vec<Known>, Error> {
        let entries = match fs::read_dir(self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            result => result.map_err(of_file("read", self.path))?,
        };
        let mut all: Vec<_> = entries
            .flatten()
            // What vanishes meanwhile, or has no record yet, is no container.
            .filter_map(|entry| self.find(entry.file_name().to_str()?).ok())
            .collect();
        all.sort_by(|one, other| one.record.id.cmp(&other.record.id));
        Ok(all)
    }
}

/// An id that is taken and has no record yet.
#[derive(Debug)]
pub(crate) struct Claim {
    directory: PathBuf,
    /// Held as long as this is.
    turn: fs::File,
}

impl Claim {
    /// Writes record and configuration of a container that is being created: until the file is closed. After an error
    /// nothing is left.
    pub(crate) fn begin(self, record: Record, config: &[u8]) -> Result<(Known, fs::File), Error> {
        let Self { directory, turn } = self;
        let known = Known { directory, record };
        let begin = || {
            let path = known.directory.join(LOCK);
            let lock = private().truncate(false).open(&path).map_err(of_file("make", &path))?;
            fcntl_lock(&lock, FlockOperation::LockExclusive).map_err(of_file("lock", path))?;
            // Nobody reads it before there is a record.
            write(&known.directory.join(CONFIG), config)?;
            known.save()?;
            Ok(lock)
        };
        match begin() {
            Ok(lock) => {
                // Before there is a process that would have it, too.
                drop(turn);
                Ok((known, lock))
            }
            Err(error) => {
                // The first failure is what the caller has to know.
                let _ = remove_directory(&known.directory);
                Err(error)
            }
        }
    }
}

/// Waits for the turn at a container's directory; until the file is closed. `None` if the directory is gone, or another one
/// by then.
fn take_turn(directory: &Path) -> io::Result<Option<fs::File>> {
    let identity = |found: &fs::Metadata| (found.dev(), found.ino());
    let take = || {
        let turn = fs::File::open(directory)?;
        flock(&turn, FlockOperation::LockExclusive)?;
        let is_there = identity(&turn.metadata()?) == identity(&fs::metadata(directory)?);
        Ok::<_, io::Error>(is_there.then_some(turn))
    };
    match take() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result,
    }
}

/// Removes a container's directory: the record last, since without it nobody would know that anything is left.
fn remove_directory(directory: &Path) -> Result<(), Error> {
    let ignore_missing = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    };
    let remove = || {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                ignore_missing(fs::remove_dir_all(entry.path()))?;
            } else if entry.file_name() != RECORD {
                ignore_missing(fs::remove_file(entry.path()))?;
            }
        }
        fs::remove_dir_all(directory)
    };
    ignore_missing(remove()).map_err(of_file("remove", directory))
}

fn read_record(directory: &Path) -> io::Result<Record> {
    Ok(serde_json::from_slice(&fs::read(directory.join(RECORD))?)?)
}

/// How to open a file that is for this user only.
fn private() -> fs::OpenOptions {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).mode(0o600);
    options
}

fn write(path: &Path, contents: &[u8]) -> Result<(), Error> {
    let file = private().truncate(true).open(path);
    file.and_then(|mut file| file.write_all(contents)).map_err(of_file("write", path))
}

/// Replaces a file by this as JSON, so that it is whole at any moment.
fn replace(path: &Path, contents: &impl Serialize) -> Result<(), Error> {
    let contents = serde_json::to_vec(contents).map_err(of_file("write", path))?;
    let new = path.with_extension("new");
    write(&new, &contents)?;
    fs::rename(&new, path).map_err(of_file("write", path))
}

impl Record {
    /// The state as of now, if its status is known.
    pub(crate) fn state<'a>(&'a self, pid: i32, status: &'a str) -> State<'a> {
        State {
            oci_version: &self.oci_version,
            id: &self.id,
            pid,
            status,
            bundle: &self.bundle,
            rootfs: &self.rootfs,
            created: &self.created,
            annotations: &self.annotations,
            owner: &self.owner,
        }
    }

    /// The state's JSON for a hook.
    pub(crate) fn state_json(&self, pid: i32, status: &str) -> String {
        serde_json::to_string(&self.state(pid, status)).unwrap_or_default()
    }
}

impl Known {
    pub(crate) fn save(&self) -> Result<(), Error> {
        replace(&self.directory.join(RECORD), &self.record)
    }

    /// The configuration that it was created with. Relative paths in it are relative to its bundle.
    pub fn spec(&self) -> Result<Spec, Error> {
        let path = self.directory.join(CONFIG);
        let text = fs::read(&path).map_err(of_file("read", &path))?;
        // What is ignored in it was told of when it was created.
        bundle::parse(&text, &|_| ()).map_err(|source| Error::Config { path, source: source.into() })
    }

    /// Its cgroup, as far as there is one. What others have made at its path since then is not.
    pub fn cgroup(&self) -> Result<Cgroup, Error> {
        Ok(Cgroup::open_known(&self.record.cgroup, &self.record.cgroup_identity)?)
    }

    /// Removes the cgroup that its own was in, if nobody is left there.
    pub(crate) fn leave_shared_cgroup(&self) {
        if let Some(shared) = self.record.cgroup.parent().filter(|_| self.record.is_tenant)
            && let Ok(shared) = Cgroup::open(shared)
        {
            shared.delete_empty();
        }
    }

    /// Its cgroup, if there can be one at all.
    pub(crate) fn possible_cgroup(&self) -> Result<Option<Cgroup>, Error> {
        match self.cgroup() {
            Err(Error::Cgroup(CgroupError::NotMounted | CgroupError::Path(_))) => Ok(None),
            result => result.map(Some),
        }
    }

    /// Its first process, if that still runs.
    pub(crate) fn alive(&self) -> Option<ProcessId> {
        self.record.process.filter(|process| process.is_alive())
    }

    /// Takes the creator's lock for a moment: shared, so that nobody who looks is like a creator to another. It is not made
    /// here, where somebody else may be removing it: without it there is no creator.
    fn lock_shared(&self) -> io::Result<()> {
        match fs::File::open(self.directory.join(LOCK)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => Ok(fcntl_lock(result?, FlockOperation::NonBlockingLockShared)?),
        }
    }

    /// Waits until nobody creates it any more, to do something then. Not for ever: whoever creates it may be waiting for a
    /// hook that waits here.
    pub(crate) fn await_creation(&self, action: &'static str) -> Result<(), Error> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let deadline = Instant::now() + PATIENCE;
        while self.is_being_created()? {
            if Instant::now() >= deadline {
                return Err(Error::Status {
                    action,
                    id: self.id().to_owned(),
                    status: Status::Creating.name(),
                    hint: "; its `create` has not ended yet",
                });
            }
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn is_being_created(&self) -> Result<bool, Error> {
        match self.lock_shared() {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(true),
            result => result.map(|()| false).map_err(of_file("lock", self.directory.join(LOCK))),
        }
    }

    /// Waits for the turn to change the record of a container that is created, or to remove it; until the file is closed.
    pub(crate) fn take_turn(&self) -> Result<fs::File, Error> {
        let turn = take_turn(&self.directory).map_err(of_file("lock", &self.directory))?;
        turn.ok_or_else(|| Error::NoContainer(self.id().into()))
    }

    /// Whether its processes stand still.
    pub(crate) fn is_paused(&self) -> bool {
        self.cgroup().is_ok_and(|cgroup| cgroup.is_frozen())
    }

    /// Its status.
    pub fn status(&self) -> Status {
        if self.is_being_created().unwrap_or(false) {
            return Status::Creating;
        }
        if self.alive().is_none() {
            return Status::Stopped;
        }
        if self.is_paused() {
            return Status::Paused;
        }
        if gate::is_waited_at(&self.directory) { Status::Created } else { Status::Running }
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The path of its cgroup in the hierarchies.
    pub fn cgroup_path(&self) -> &Path {
        &self.record.cgroup
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.record.id
    }

    /// The state to print.
    pub fn state(&self) -> State<'_> {
        let status = self.status();
        let pid = self.record.process.filter(|_| status != Status::Stopped).map_or(0, |process| process.pid);
        self.record.state(pid, status.name())
    }

    /// Removes its directory.
    pub(crate) fn forget(&self) -> Result<(), Error> {
        let _turn = match self.take_turn() {
            Err(Error::NoContainer(_)) => return Ok(()),
            result => result?,
        };
        remove_directory(&self.directory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_at_a_container_that_is_being_deleted_makes_no_file() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("a");
        fs::create_dir(&directory).unwrap();
        let known = Known { directory: directory.clone(), record: record() };
        known.await_creation("start").unwrap();
        assert_eq!(known.status(), Status::Stopped);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        // By two at once.
        known.forget().unwrap();
        known.forget().unwrap();
        assert!(matches!(known.take_turn(), Err(Error::NoContainer(_))));
    }

    fn record() -> Record {
        let record = serde_json::json!({
            "id": "a", "oci_version": "1.2.0", "bundle": "/b", "rootfs": "/b/r", "created": "", "owner": "root",
            "annotations": {}, "cgroup": "/a", "process": null,
        });
        serde_json::from_value(record).unwrap()
    }

    #[test]
    fn claim_is_not_removed_while_its_record_is_being_made() {
        let place = tempfile::tempdir().unwrap();
        let home = Home::new(place.path(), &crate::OnHost);
        let claim = home.claim("a").unwrap();
        std::thread::scope(|scope| {
            let removed = scope.spawn(|| Home::new(place.path(), &crate::OnHost).remove_claim("a").unwrap());
            sleep(Duration::from_millis(100));
            assert!(!removed.is_finished());
            let (known, _lock) = claim.begin(record(), b"{}").unwrap();
            assert!(!removed.join().unwrap());
            known.forget().unwrap();
        });
        // What nobody holds is removed, and what is not there is no error.
        fs::create_dir(place.path().join("a")).unwrap();
        assert!(matches!(home.claim("a"), Err(Error::Exists(_))));
        assert!(home.remove_claim("a").unwrap() && home.remove_claim("a").unwrap());
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    fn record_that_cannot_be_written_leaves_nothing() {
        use std::os::unix::ffi::OsStrExt;
        let place = tempfile::tempdir().unwrap();
        let home = Home::new(place.path(), &crate::OnHost);
        let bundle = std::ffi::OsStr::from_bytes(b"/\xff").into();
        let error = home.claim("a").unwrap().begin(Record { bundle, ..record() }, b"{}");
        assert!(matches!(error, Err(Error::File { .. })));
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }
}
