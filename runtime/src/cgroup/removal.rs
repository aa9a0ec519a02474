//! Ending and removing cgroups, whatever the container has made of them.

use std::{
    ffi::{CStr, CString},
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::{
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, XattrFlags, fgetxattr, openat, setxattr, unlinkat},
    io::Errno,
    process::{Pid, Signal, kill_process},
};

use super::{CgroupError, files};

/// How long killed processes may take to disappear. One that hangs in the kernel may never do.
const PATIENCE: Duration = Duration::from_secs(10);
/// What marks the cgroup of a container that is in another's, as a tenant: it ends by itself. A container cannot set it
/// without CAP_SYS_ADMIN on the host (xattr(7), "Trusted extended attributes").
const TENANT: &CStr = c"trusted.cloche.tenant";

/// Marks a directory as a tenant's.
pub(super) fn mark_as_tenant(directory: &Path) -> Result<(), CgroupError> {
    setxattr(directory, TENANT, b"1", XattrFlags::empty()).map_err(|errno| CgroupError::Io {
        action: "mark as that of another container".into(),
        path: directory.to_owned(),
        source: errno.into(),
    })
}

fn is_tenant(directory: BorrowedFd<'_>) -> bool {
    fgetxattr(directory, TENANT, &mut [0; 8]).is_ok()
}

/// A tenant's directory below this one, by its name.
pub(super) fn tenant_in(directory: &Path) -> Option<String> {
    // Nearly always nothing is below.
    if !has_children(directory) {
        return None;
    }
    let mut found = None;
    let _ = walk_with(directory, |_| {}, |_, _| {}, |name| found = Some(name.to_string_lossy().into_owned()));
    found
}

/// Whether there is anything in a directory or below it.
pub(super) fn is_in_use(directory: &Path) -> bool {
    // Processes of a PID namespace that this process does not see are listed, too. What cannot be read, such as a cgroup of
    // threads, takes no container either, and that is told.
    has_children(directory) || files::read(directory, "cgroup.procs").is_ok_and(|listed| !listed.is_empty())
}

/// Kills all processes of a directory and below, for kernels without `cgroup.kill` (before Linux 5.14, and v1).
/// A process may fork meanwhile, so this repeats until none is left or the killed take too long to disappear.
pub(super) fn kill_listed(directory: &Path) -> Result<(), CgroupError> {
    let deadline = Instant::now() + PATIENCE;
    while signal_listed(directory) && Instant::now() < deadline {
        // Frozen by the v1 freezer, a process does not even die.
        let _ = files::write_if_present(directory, "freezer.state", "THAWED");
        sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Whether there was any process to kill.
fn signal_listed(directory: &Path) -> bool {
    let mut found = false;
    let kill = |here: BorrowedFd<'_>| {
        for pid in files::processes(here).filter_map(Pid::from_raw) {
            found = true;
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::KILL);
        }
    };
    // What cannot be looked into, the container has removed meanwhile.
    let _ = walk(directory, kill, |_, _| {});
    found
}

/// The processes of a directory and below.
pub(super) fn listed(directory: &Path) -> Vec<i32> {
    let mut found = Vec::new();
    let _ = walk(directory, |here| found.extend(files::processes(here)), |_, _| {});
    found
}

/// Sends a signal to processes; those that have ended meanwhile need none.
pub fn signal(processes: &[i32], signo: i32) -> Result<(), CgroupError> {
    for pid in processes.iter().filter_map(|pid| Pid::from_raw(*pid)) {
        let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
            continue;
        };
        match crate::syscalls::pidfd_send_signal(std::os::fd::AsFd::as_fd(&pidfd), signo) {
            Err(source) if source.raw_os_error() != Some(libc::ESRCH) => {
                let path = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
                return Err(CgroupError::Io { action: format!("send signal {signo} to"), path, source });
            }
            _ => {}
        }
    }
    Ok(())
}

/// What to do with processes that keep a directory busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Busy {
    /// They are being killed, or somebody else's.
    Wait,
    /// They may have come in after the others were killed.
    Kill,
}

/// Removes the directories and what is below them; those that are gone already are no error.
pub(super) fn remove<'a>(directories: impl Iterator<Item = &'a Path>, busy: Busy) -> Result<(), CgroupError> {
    let deadline = Instant::now() + PATIENCE;
    let mut result = Ok(());
    for directory in directories {
        // One that cannot be removed does not keep the others.
        result = result.and(remove_tree(directory, deadline, busy));
    }
    result
}

/// Removes a directory if nothing is in it. Whoever is being killed there has a moment to go.
pub(super) fn remove_unused(directory: &Path) {
    let deadline = Instant::now() + Duration::from_millis(500);
    while fs::remove_dir(directory).is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
        && !has_children(directory)
        && Instant::now() < deadline
    {
        sleep(Duration::from_millis(5));
    }
}

fn remove_tree(directory: &Path, deadline: Instant, busy: Busy) -> Result<(), CgroupError> {
    // The killed are gone by then, as a rule.
    const PATIENCE: Duration = Duration::from_millis(1);
    let mut pause = Duration::from_micros(100);
    loop {
        match remove_once(directory) {
            Ok(()) => return Ok(()),
            // Until the killed are gone, their cgroup is busy.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                if tenant_in(directory).is_some() && listed(directory).is_empty() {
                    // The last of them removes it.
                    return Ok(());
                }
                if busy == Busy::Kill && pause > PATIENCE {
                    signal_listed(directory);
                }
                sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            Err(source) => {
                return Err(CgroupError::Io { action: "remove".into(), path: directory.to_owned(), source });
            }
        }
    }
}

fn remove_once(directory: &Path) -> io::Result<()> {
    let remove = || match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    match remove() {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOTEMPTY)) => {}
        other => return other,
    }
    // What stays because it is busy keeps its parents busy, too.
    let leave = |parent: BorrowedFd<'_>, name: &CStr| {
        let _ = unlinkat(parent, name, AtFlags::REMOVEDIR);
    };
    match walk(directory, |_| {}, leave) {
        // Somebody else removes it at the same time. What that one has not got to yet keeps this one busy.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => other?,
    }
    remove()
}

/// Goes through a cgroup and all below it but its tenants', however deep a container has nested them: no path leads there
/// any more, and one directory is open at a time. Calls `enter` for each, and `leave`, with its parent, for each but the
/// first once all below it have been left.
fn walk(
    directory: &Path,
    enter: impl FnMut(BorrowedFd<'_>),
    leave: impl FnMut(BorrowedFd<'_>, &CStr),
) -> io::Result<()> {
    walk_with(directory, enter, leave, |_| {})
}

/// As [`walk`]; calls `pass` with the name of each tenant's.
fn walk_with(
    directory: &Path,
    mut enter: impl FnMut(BorrowedFd<'_>),
    mut leave: impl FnMut(BorrowedFd<'_>, &CStr),
    mut pass: impl FnMut(&CStr),
) -> io::Result<()> {
    let open = |at: BorrowedFd<'_>, name: &CStr| {
        openat(
            at,
            name,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
    };
    let first = CString::new(directory.as_os_str().as_bytes())?;
    let mut here = open(CWD, &first)?;
    enter(here.as_fd());
    let mut names: Vec<CString> = Vec::new();
    let mut left = vec![children(&here)?];
    while let Some(siblings) = left.last_mut() {
        if let Some(name) = siblings.pop() {
            let child = match open(here.as_fd(), &name) {
                Err(Errno::NOENT) => continue,
                child => child?,
            };
            if is_tenant(child.as_fd()) {
                pass(&name);
                continue;
            }
            here = child;
            enter(here.as_fd());
            left.push(children(&here)?);
            names.push(name);
        } else {
            left.pop();
            let Some(name) = names.pop() else { break };
            let parent = open(here.as_fd(), c"..")?;
            leave(parent.as_fd(), &name);
            here = parent;
        }
    }
    Ok(())
}

/// The names of the directories in one.
fn children(directory: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type() == FileType::Directory && name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn has_children(directory: &Path) -> bool {
    // Each has a link to its parent (fs/kernfs/inode.c, `kernfs_refresh_inode`).
    fs::metadata(directory).is_ok_and(|found| found.nlink() > 2)
}

#[cfg(test)]
mod tests {
    use rustix::fs::mkdirat;

    use super::*;

    #[test]
    fn cgroups_nested_deeper_than_any_path_are_removed() {
        let place = tempfile::tempdir().unwrap();
        let top = place.path().join("top");
        fs::create_dir(&top).unwrap();
        fs::create_dir(top.join("beside")).unwrap();
        let mut here = OwnedFd::from(fs::File::open(&top).unwrap());
        for _ in 0..5000 {
            mkdirat(&here, "n", Mode::RWXU).unwrap();
            here = openat(&here, "n", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        }
        remove([top.as_path()].into_iter(), Busy::Wait).unwrap();
        assert!(!top.exists());
    }

    #[test]
    fn processes_listed_are_those_of_all_lines() {
        let place = tempfile::tempdir().unwrap();
        let below = place.path().join("below");
        fs::create_dir(&below).unwrap();
        // More than any buffer holds: a number that was cut would be another process's.
        let many: String = (1_000_000..1_200_000).map(|pid| format!("{pid}\n")).collect();
        fs::write(place.path().join("cgroup.procs"), many).unwrap();
        fs::write(below.join("cgroup.procs"), "0\n7\n").unwrap();
        let found = listed(place.path());
        assert_eq!(found.len(), 200_001);
        assert_eq!(found.iter().filter(|pid| **pid < 1_000_000).collect::<Vec<_>>(), [&7]);
    }
}
