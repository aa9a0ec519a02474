//! The sandboxes on disk: one directory each, one lock each, and what to do about those whose monitor is gone.
//!
//! ```text
//! STATE/sandboxes/ID/record.json   replaced by rename, never written in place
//!                    lock          held (flock) by the monitor as long as it lives
//!                    changes.tar   what an ended sandbox has written, if it was not to be removed: `changes`
//!                    …             what the isolation keeps here: vsock sockets, the boot archive
//! STATE/sandboxes/.ID-PID          a directory being made; becomes ID when its lock is held
//! ```
//!
//! A monitor can be killed at any moment, and the kernel then drops its lock. Only a child that was on its way to
//! `execve` can hold it a moment longer, so a lock whose owner is dead is waited for. [`Sandboxes::reconcile`] ends
//! what such a monitor left and says so; every command calls it first.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use cloche_runtime::cgroup::{Cgroup, own_base};
use rustix::{
    fs::{FlockOperation, flock},
    process::Signal,
};

use crate::changes;
use crate::record::{Ended, ProcessId, Record, State, unix_time};

/// Why the sandboxes on disk could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
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
    /// The name is taken.
    #[error("the name `{name}` belongs to sandbox {id}; choose another or run `cloche rm {name}`")]
    NameTaken {
        /// The name.
        name: String,
        /// Its owner.
        id: String,
    },
    /// No sandbox has this id or name.
    #[error("there is no sandbox `{0}`; `cloche ps -a` lists all")]
    Unknown(String),
    /// Several ids start with these digits.
    #[error("`{0}` is the beginning of several sandboxes' ids; give more digits")]
    Ambiguous(String),
    /// It runs, and removal was not forced.
    #[error("sandbox {0} is running; stop it first or remove it with -f")]
    Running(String),
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SandboxError {
    let path = path.to_owned();
    move |source| SandboxError::Io { action, path, source }
}

/// All sandboxes of one state directory.
#[derive(Debug)]
pub struct Sandboxes {
    dir: PathBuf,
}

/// A sandbox owned by this process, its monitor.
#[derive(Debug)]
pub struct Owned {
    /// What is on disk about it, as of the last [`Owned::set_state`].
    pub record: Record,
    dir: PathBuf,
    // Held for its lock only.
    _lock: File,
}

/// A sandbox as another process sees it.
#[derive(Debug)]
pub struct Entry {
    /// What is on disk about it.
    pub record: Record,
    /// Whether its monitor lives.
    pub has_monitor: bool,
}

/// What [`Sandboxes::reconcile`] did about one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The sandbox.
    pub id: String,
    /// Ready to print.
    pub message: String,
}

impl Sandboxes {
    /// The sandboxes below this directory, which is made when the first sandbox is.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Writes down a new sandbox, owned by this process.
    pub fn create(&self, mut record: Record) -> Result<Owned, SandboxError> {
        make_private_dir(&self.dir)?;
        // Two sandboxes that want one name take turns at looking whether it is free.
        let _turn = record.name.as_ref().map(|_| self.lock_names()).transpose()?;
        if let Some(name) = &record.name
            && let Some(other) =
                self.entries()?.into_iter().find(|entry| entry.record.name.as_ref() == Some(name))
        {
            return Err(SandboxError::NameTaken { name: name.clone(), id: other.record.id });
        }
        loop {
            record.id = new_id();
            record.cgroup = cgroup_path(&record.id);
            let staging = self.dir.join(format!(".{}-{}", record.id, std::process::id()));
            make_private_dir(&staging)?;
            let lock_path = staging.join("lock");
            let lock = File::create(&lock_path).map_err(io_error("create", &lock_path))?;
            flock(&lock, FlockOperation::NonBlockingLockExclusive)
                .map_err(|errno| io_error("lock", &lock_path)(errno.into()))?;
            write_record(&staging, &record)?;
            let dir = self.dir.join(&record.id);
            // Fails on a directory that is not empty, so an id is never taken twice.
            match fs::rename(&staging, &dir) {
                Ok(()) => return Ok(Owned { record, dir, _lock: lock }),
                Err(error) if is_taken(&error) => {
                    let _ = fs::remove_dir_all(&staging);
                }
                Err(error) => return Err(io_error("create", &dir)(error)),
            }
        }
    }

    /// All sandboxes, oldest first. Unreadable ones are left to [`Sandboxes::reconcile`].
    pub fn entries(&self) -> Result<Vec<Entry>, SandboxError> {
        let mut entries = Vec::new();
        for id in self.ids()? {
            let dir = self.dir.join(&id);
            if let Some(record) = read_record(&dir) {
                let has_monitor = try_lock(&dir).is_none() && record.monitor.is_alive();
                entries.push(Entry { record, has_monitor });
            }
        }
        entries.sort_by(|a, b| (a.record.created, &a.record.id).cmp(&(b.record.created, &b.record.id)));
        Ok(entries)
    }

    /// The sandbox with this name, id, or unambiguous beginning of an id.
    pub fn find(&self, reference: &str) -> Result<Entry, SandboxError> {
        let mut entries = self.entries()?;
        let exact =
            |entry: &Entry| entry.record.id == reference || entry.record.name.as_deref() == Some(reference);
        if let Some(at) = entries.iter().position(exact) {
            return Ok(entries.swap_remove(at));
        }
        entries.retain(|entry| !reference.is_empty() && entry.record.id.starts_with(reference));
        match entries.len() {
            0 => Err(SandboxError::Unknown(reference.into())),
            1 => Ok(entries.swap_remove(0)),
            _ => Err(SandboxError::Ambiguous(reference.into())),
        }
    }

    /// Forgets a sandbox; a running one only if `force`, by killing it first.
    pub fn remove(&self, reference: &str, force: bool) -> Result<String, SandboxError> {
        let id = self.find(reference)?.record.id;
        let dir = self.dir.join(&id);
        // Its monitor may have forgotten it meanwhile, which is all that was asked for.
        let Some(_lock) = self.end(&id, &dir, force)? else { return Ok(id) };
        if let Some(record) = read_record(&dir)
            && !matches!(record.state, State::Exited(_))
        {
            clean_up(&record);
        }
        remove_dir(&dir)?;
        Ok(id)
    }

    /// Takes the lock of a sandbox from its monitor, if `force` by killing first the sandbox, then the monitor. Other
    /// commands hold the lock for a moment, too; they are waited for. `None` if the sandbox is gone.
    fn end(&self, id: &str, dir: &Path, force: bool) -> Result<Option<File>, SandboxError> {
        const PAUSE: Duration = Duration::from_millis(5);
        /// For the monitor to see the end, pass on the last output and clean up.
        const GRACE: Duration = Duration::from_secs(3);
        const PATIENCE: Duration = Duration::from_secs(20);
        let started = Instant::now();
        loop {
            if let Some(lock) = try_lock(dir) {
                return Ok(Some(lock));
            }
            let Some(record) = read_record(dir) else { return Ok(None) };
            let attended = !matches!(record.state, State::Exited(_)) && record.monitor.is_alive();
            if attended && !force || started.elapsed() > PATIENCE {
                return Err(SandboxError::Running(id.into()));
            }
            if let State::Running(processes) = record.state {
                thaw(&record);
                kill(processes.leader);
            }
            if attended && started.elapsed() > GRACE {
                kill(record.monitor);
            }
            thread::sleep(PAUSE);
        }
    }

    /// Ends a sandbox whatever it does, and writes down that it was killed.
    pub(crate) fn end_by_force(&self, id: &str) -> Result<(), SandboxError> {
        drop(self.end(id, &self.sandbox_dir(id), true)?);
        self.reconcile().map(drop)
    }

    /// A sandbox's own directory.
    pub(crate) fn sandbox_dir(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    fn lock_names(&self) -> Result<File, SandboxError> {
        let path = self.dir.join(".names");
        let file = File::create(&path).map_err(io_error("create", &path))?;
        flock(&file, FlockOperation::LockExclusive).map_err(|errno| io_error("lock", &path)(errno.into()))?;
        Ok(file)
    }

    /// Ends what dead monitors left behind, writes down that they are gone, and says what it did.
    pub fn reconcile(&self) -> Result<Vec<Notice>, SandboxError> {
        let mut notices = Vec::new();
        for id in self.ids()? {
            let dir = self.dir.join(&id);
            // A held lock is a living monitor, or another command at this very work.
            let Some(_lock) = try_lock(&dir).or_else(|| inherited_lock(&dir)) else { continue };
            let Some(mut record) = read_record(&dir) else {
                remove_dir(&dir)?;
                notices.push(Notice { message: format!("sandbox {id} had no readable record; removed"), id });
                continue;
            };
            if matches!(record.state, State::Exited(_)) {
                continue;
            }
            let left = clean_up(&record);
            let mut message = format!("the monitor of sandbox {id} was killed; its processes are ended");
            if let Some(left) = left {
                message = format!("{message}, but {left}");
            }
            if record.remove {
                remove_dir(&dir)?;
            } else {
                record.state = State::Exited(Ended {
                    exit_code: 137,
                    oom_killed: false,
                    finished: unix_time(),
                    reason: Some("its monitor was killed".into()),
                });
                keep_record_only(&dir);
                write_record(&dir, &record)?;
            }
            notices.push(Notice { id, message });
        }
        self.remove_dead_staging();
        Ok(notices)
    }

    /// Directory names that are ids.
    fn ids(&self) -> Result<Vec<String>, SandboxError> {
        let listing = match fs::read_dir(&self.dir) {
            Ok(listing) => listing,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("read", &self.dir)(error)),
        };
        let names = listing.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.filter(|name| !name.starts_with('.')).collect())
    }

    /// Removes directories whose maker died before they got their final name.
    fn remove_dead_staging(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let maker = name.strip_prefix('.').and_then(|rest| rest.rsplit_once('-')?.1.parse().ok());
            if maker.is_some_and(|pid| ProcessId::of(pid).is_none()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

impl Owned {
    /// The sandbox's own directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes down a new state.
    pub fn set_state(&mut self, state: State) -> Result<(), SandboxError> {
        self.record.state = state;
        write_record(&self.dir, &self.record)
    }

    /// Writes down the end, or forgets the sandbox if its record asks for that.
    pub fn finish(mut self, ended: Ended) -> Result<(), SandboxError> {
        if self.record.remove {
            return self.forget();
        }
        keep_record_only(&self.dir);
        self.set_state(State::Exited(ended))
    }

    /// Removes the sandbox's directory.
    pub fn forget(self) -> Result<(), SandboxError> {
        remove_dir(&self.dir)
    }
}

/// A new sandbox's cgroup, below each hierarchy's mount point, or below a plain user's own. Its parent stays: removing it
/// would race with the next start, and making it costs one millisecond
/// (`docs/decisions/0027-where-a-start-spends-instructions.md`).
fn cgroup_path(id: &str) -> PathBuf {
    own_base().join("cloche").join(id)
}

/// Lets a paused container go on, so that it can die: the v1 freezer holds even what is killed.
fn thaw(record: &Record) {
    if let Ok(cgroup) = Cgroup::open(&record.cgroup)
        && cgroup.is_frozen()
    {
        // Whoever has to die is dead before it runs again, or is killed again after it.
        let _ = cgroup.kill_all().and_then(|()| cgroup.thaw());
    }
}

/// Kills and removes what may be left of a sandbox; says what could not be removed.
fn clean_up(record: &Record) -> Option<String> {
    if let State::Running(processes) = record.state {
        thaw(record);
        kill(processes.leader);
    }
    let cgroup = Cgroup::open(&record.cgroup);
    let result = cgroup.and_then(|cgroup| {
        cgroup.kill_all()?;
        cgroup.delete()
    });
    result.err().map(|error| format!("its cgroup is left: {error}"))
}

fn kill(process: ProcessId) {
    let Some(pid) = rustix::process::Pid::from_raw(process.pid) else { return };
    // The pidfd pins the process; only then is it compared with the record.
    let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else { return };
    if process.is_alive() && rustix::process::pidfd_send_signal(&pidfd, Signal::KILL).is_ok() {
        let mut ended = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        let _ = rustix::event::poll(&mut ended, Some(&timeout));
    }
}

/// The lock of a sandbox, if nobody holds it.
fn try_lock(dir: &Path) -> Option<File> {
    let file = File::open(dir.join("lock")).ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(file)
}

/// The lock of a sandbox whose monitor is dead, once the children that it was starting are dead too. They die with it,
/// but not in the same instant.
fn inherited_lock(dir: &Path) -> Option<File> {
    const ATTEMPTS: u32 = 1000;
    const PAUSE: Duration = Duration::from_millis(5);
    if read_record(dir)?.monitor.is_alive() {
        return None;
    }
    (0..ATTEMPTS).find_map(|_| {
        thread::sleep(PAUSE);
        try_lock(dir)
    })
}

/// Removes what the isolation kept beside the record: sockets, and the boot archive with the process's environment.
fn keep_record_only(dir: &Path) {
    for file in fs::read_dir(dir).into_iter().flatten().flatten() {
        if !["lock", "record.json", changes::SAVED].iter().any(|kept| file.file_name() == *kept) {
            let _ = fs::remove_file(file.path());
        }
    }
}

fn read_record(dir: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(dir.join("record.json")).ok()?).ok()
}

fn write_record(dir: &Path, record: &Record) -> Result<(), SandboxError> {
    let path = dir.join("record.json");
    let staging = dir.join(".record.json");
    let json = serde_json::to_vec(record).unwrap_or_default();
    fs::write(&staging, json).and_then(|()| fs::rename(&staging, &path)).map_err(io_error("write", &path))
}

fn remove_dir(dir: &Path) -> Result<(), SandboxError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// Whether a rename failed because something is where it leads: rename(2) has two words for that, and XFS says the other.
pub(crate) fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists)
}

/// A directory that only its owner can enter: the sockets in it reach into sandboxes.
fn make_private_dir(dir: &Path) -> Result<(), SandboxError> {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(io_error("create", dir))
}

/// 48 random bits: few enough digits to type, enough that `create`'s retry is theory.
fn new_id() -> String {
    let mut bytes = [0; 6];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Isolation;

    fn record(name: Option<&str>) -> Record {
        Record {
            id: String::new(),
            name: name.map(Into::into),
            image: "busybox".into(),
            image_id: "sha256:0".into(),
            command: vec!["true".into()],
            settings: Default::default(),
            isolation: Isolation::Vm,
            created: 1,
            remove: false,
            stop_signal: libc::SIGTERM,
            cgroup: PathBuf::new(),
            monitor: ProcessId::own(),
            state: State::Starting,
        }
    }

    #[test]
    fn reconcile_of_sandbox_whose_monitor_is_gone_marks_it_killed() {
        let dir = tempfile::tempdir().unwrap();
        let sandboxes = Sandboxes::new(dir.path().join("sandboxes"));
        let owned = sandboxes.create(record(Some("web"))).unwrap();
        let id = owned.record.id.clone();
        assert_eq!(sandboxes.reconcile().unwrap(), []);
        assert!(sandboxes.find("web").unwrap().has_monitor);
        assert!(matches!(sandboxes.create(record(Some("web"))), Err(SandboxError::NameTaken { .. })));
        assert!(matches!(sandboxes.remove(&id, false), Err(SandboxError::Running(_))));

        drop(owned);
        let notices = sandboxes.reconcile().unwrap();
        assert_eq!(notices.len(), 1);
        let entry = sandboxes.find(&id[..4]).unwrap();
        assert!(matches!(entry.record.state, State::Exited(Ended { exit_code: 137, .. })));
        assert_eq!(sandboxes.reconcile().unwrap(), []);
        assert_eq!(sandboxes.remove("web", false).unwrap(), id);
        assert!(matches!(sandboxes.find(&id), Err(SandboxError::Unknown(_))));
    }

    #[test]
    fn reconcile_of_torn_record_removes_it() {
        let dir = tempfile::tempdir().unwrap();
        let sandboxes = Sandboxes::new(dir.path().into());
        let owned = sandboxes.create(record(None)).unwrap();
        fs::write(owned.dir().join("record.json"), "{").unwrap();
        let path = owned.dir().to_owned();
        drop(owned);
        assert_eq!(sandboxes.reconcile().unwrap().len(), 1);
        assert!(!path.exists());
    }
}
