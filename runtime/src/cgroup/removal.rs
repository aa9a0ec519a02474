//! Ending and removing cgroups, whatever the container has made of them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{CgroupError, files};

/// How long killed processes may take to disappear. One that hangs in the kernel may never do.
const PATIENCE: Duration = Duration::from_secs(10);
/// A container can nest cgroups; nobody nests them deeper than this by accident.
const MAX_DEPTH: usize = 256;

/// Kills all processes of a directory and below, for kernels without `cgroup.kill` (before Linux 5.14, and v1).
/// A process may fork meanwhile, so this repeats until none is left or the killed take too long to disappear.
pub(super) fn kill_listed(directory: &Path) -> Result<(), CgroupError> {
    let deadline = Instant::now() + PATIENCE;
    while signal_listed(directory, MAX_DEPTH) && Instant::now() < deadline {
        // Frozen by the v1 freezer, a process does not even die.
        let _ = files::write_if_present(directory, "freezer.state", "THAWED");
        sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Whether there was any process to kill.
fn signal_listed(directory: &Path, depth: usize) -> bool {
    let listed = files::read(directory, "cgroup.procs").unwrap_or_default();
    let mut found = false;
    // Processes of PID namespaces that this process cannot see are listed as 0.
    for pid in listed.lines().filter_map(|line| line.parse().ok()).filter_map(Pid::from_raw) {
        found = true;
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::KILL);
    }
    if depth > 0 {
        for child in children(directory) {
            found |= signal_listed(&child, depth - 1);
        }
    }
    found
}

/// The processes of a directory and below.
pub(super) fn listed(directory: &Path) -> Vec<i32> {
    fn collect(directory: &Path, depth: usize, found: &mut Vec<i32>) {
        let listed = files::read(directory, "cgroup.procs").unwrap_or_default();
        // Processes of PID namespaces that this process cannot see are listed as 0.
        found.extend(listed.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
        if depth > 0 {
            children(directory).for_each(|child| collect(&child, depth - 1, found));
        }
    }
    let mut found = Vec::new();
    collect(directory, MAX_DEPTH, &mut found);
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

/// Removes the directories and what is below them; those that are gone already are no error.
pub(super) fn remove<'a>(directories: impl Iterator<Item = &'a Path>) -> Result<(), CgroupError> {
    let deadline = Instant::now() + PATIENCE;
    let mut result = Ok(());
    for directory in directories {
        // One that cannot be removed does not keep the others.
        result = result.and(remove_tree(directory, deadline));
    }
    result
}

/// Removes a directory if nothing is in it. Whoever is being killed there has a moment to go.
pub(super) fn remove_unused(directory: &Path) {
    let deadline = Instant::now() + Duration::from_millis(500);
    while fs::remove_dir(directory).is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
        && children(directory).next().is_none()
        && Instant::now() < deadline
    {
        sleep(Duration::from_millis(5));
    }
}

fn remove_tree(directory: &Path, deadline: Instant) -> Result<(), CgroupError> {
    let mut pause = Duration::from_micros(100);
    loop {
        match remove_once(directory, MAX_DEPTH) {
            Ok(()) => return Ok(()),
            // Until the killed are gone, their cgroup is busy.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            Err(source) => {
                return Err(CgroupError::Io { action: "remove".into(), path: directory.to_owned(), source });
            }
        }
    }
}

fn remove_once(directory: &Path, depth: usize) -> io::Result<()> {
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) && depth > 0 => {}
        other => return other,
    }
    for child in children(directory) {
        remove_once(&child, depth - 1)?;
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn children(directory: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}
