//! Freezing: by v2 where there is a v2 hierarchy, alone or beside v1 ones, else by the v1 freezer.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Cgroup, CgroupError, files, removal, v1};

/// How long processes may take to stand still. One that hangs in the kernel may never do.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// What freezes a cgroup.
enum Freezer<'a> {
    V2(&'a Path),
    V1(&'a Path),
}

fn of(cgroup: &Cgroup) -> Option<Freezer<'_>> {
    let unified = cgroup.unified.as_deref().filter(|unified| unified.join("cgroup.freeze").exists());
    unified.map(Freezer::V2).or_else(|| v1::of(&cgroup.v1, "freezer").map(Freezer::V1))
}

pub(super) fn is_frozen(cgroup: &Cgroup) -> bool {
    match of(cgroup) {
        Some(Freezer::V2(unified)) => files::read_field(unified, "cgroup.events", "frozen") == Some(1),
        // While it is FREEZING, something still moves.
        Some(Freezer::V1(freezer)) => {
            files::read(freezer, "freezer.state").is_ok_and(|state| state.trim() == "FROZEN")
        }
        None => false,
    }
}

/// Whether processes in this directory of a hierarchy stand still, by its own state or that of one above it.
pub(super) fn stands_still(directory: &Path) -> bool {
    files::read_field(directory, "cgroup.events", "frozen") == Some(1)
        || files::read(directory, "freezer.state").is_ok_and(|state| state.trim() != "THAWED")
}

/// Thaws the v1 freezer cgroup that a process is in, wherever that is: frozen there, it does not even die.
pub fn thaw_process(pid: i32) {
    let listed = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let path = listed.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        rest.strip_prefix("freezer:/")
    });
    if let Some(path) = path.filter(|path| !path.is_empty()) {
        // Where there is no such file, nothing is frozen.
        let _ = files::write(&Path::new(super::ROOT).join("freezer").join(path), "freezer.state", "THAWED");
    }
}

/// Freezes or thaws, and waits until that is so. What cannot be frozen is thawed again.
pub(super) fn set(cgroup: &Cgroup, frozen: bool) -> Result<(), CgroupError> {
    if cgroup.is_nowhere() {
        return Err(CgroupError::Nowhere("stop it for a while"));
    }
    let path = cgroup.paths().next().unwrap_or(Path::new(super::ROOT)).to_owned();
    if frozen && let Some(tenant) = cgroup.paths().find_map(removal::tenant_in) {
        return Err(CgroupError::Shared { path, tenant });
    }
    let result = match of(cgroup) {
        Some(Freezer::V2(unified)) => {
            files::write(unified, "cgroup.freeze", if frozen { "1" } else { "0" })?;
            wait_v2(unified, frozen)
        }
        Some(Freezer::V1(freezer)) => {
            files::write(freezer, "freezer.state", if frozen { "FROZEN" } else { "THAWED" })?;
            wait_v1(cgroup, frozen)
        }
        None => return Err(CgroupError::NoFreezer(path)),
    };
    if result {
        return Ok(());
    }
    match of(cgroup) {
        Some(Freezer::V2(unified)) => files::write(unified, "cgroup.freeze", "0")?,
        Some(Freezer::V1(freezer)) => files::write(freezer, "freezer.state", "THAWED")?,
        None => {}
    }
    Err(CgroupError::Stubborn { action: if frozen { "stop" } else { "go on" }, path })
}

/// Waits for `cgroup.events`, which poll(2) reports changes of (kernel: `cgroup-v2.rst`, "cgroup.events").
fn wait_v2(unified: &Path, frozen: bool) -> bool {
    let wanted = if frozen { "frozen 1" } else { "frozen 0" };
    let deadline = Instant::now() + PATIENCE;
    let Ok(events) = fs::File::open(unified.join("cgroup.events")) else { return false };
    loop {
        let mut text = [0; 256];
        let count = events.read_at(&mut text, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(text.get(..count).unwrap_or_default());
        if text.lines().any(|line| line == wanted) {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let _ = poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&left));
    }
}

/// v1 does not tell when it is done.
fn wait_v1(cgroup: &Cgroup, frozen: bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while is_frozen(cgroup) != frozen {
        if Instant::now() >= deadline {
            return false;
        }
        sleep(Duration::from_millis(1));
    }
    true
}
