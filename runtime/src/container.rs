//! A running container as its parent sees it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    process::{WaitId, WaitIdOptions, waitid},
};

use crate::{
    cgroup::{Cgroup, CgroupError},
    changes::Changes,
    syscalls,
};

/// A started container. Dropping it leaves the process running; [`Container::delete`] ends it.
#[derive(Debug)]
pub struct Container {
    pid: i32,
    pidfd: OwnedFd,
    oom_event: Option<OwnedFd>,
    base: Option<OwnedFd>,
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
    action: String,
    pid: i32,
    source: io::Error,
}

impl Container {
    pub(crate) fn new(
        pid: i32,
        pidfd: OwnedFd,
        oom_event: Option<OwnedFd>,
        base: Option<OwnedFd>,
        cgroup: Cgroup,
    ) -> Self {
        Self { pid, pidfd, oom_event, base, cgroup }
    }

    /// Process id in the caller's PID namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Readable (`POLLIN`) once the first process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// On cgroup v1 with a memory limit: readable once the limit was hit. A caller that polls [`Container::pidfd`]
    /// itself polls this, too, and then calls [`Container::kill`], since only cgroup v2 kills the whole sandbox by
    /// itself. [`Container::wait`] does so.
    pub fn oom_event(&self) -> Option<BorrowedFd<'_>> {
        self.oom_event.as_ref().map(AsFd::as_fd)
    }

    /// Sends a signal (1 to 64) to the first process. No error if it has ended already.
    pub fn signal(&self, signo: i32) -> Result<(), WaitError> {
        match syscalls::pidfd_send_signal(self.pidfd.as_fd(), signo) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result.map_err(|source| self.failed(&format!("send signal {signo} to"), source)),
        }
    }

    /// Kills every process of the container.
    pub fn kill(&self) -> Result<(), CgroupError> {
        // A plain user's container may have no cgroup.
        let _ = syscalls::pidfd_send_signal(self.pidfd(), libc::SIGKILL);
        self.cgroup.kill_all()
    }

    /// Waits until the first process has ended, and reaps it.
    pub fn wait(&mut self) -> Result<Exit, WaitError> {
        let out_of_memory = match &self.oom_event {
            Some(oom_event) => {
                let events = [&self.pidfd, oom_event].map(|fd| PollFd::new(fd, PollFlags::IN));
                self.kill_when_out_of_memory(events).map_err(|source| self.failed("wait for", source))?
            }
            None => false,
        };
        let status = wait_for(self.pidfd.as_fd(), self.pid)?;
        Ok(Exit {
            status,
            // What was killed because of the event was perhaps not there any more for the kernel to kill.
            oom_killed: out_of_memory || self.cgroup.oom_kills() > 0,
            memory_peak_bytes: self.cgroup.memory_peak_bytes(),
        })
    }

    /// Waits for the process to end, and kills the container when the memory limit is hit. Whether it was.
    fn kill_when_out_of_memory(&self, mut events: [PollFd<'_>; 2]) -> io::Result<bool> {
        loop {
            match poll(&mut events, None) {
                Err(Errno::INTR) => continue,
                result => result?,
            };
            let [ended, out_of_memory] = &events;
            if !out_of_memory.revents().is_empty() {
                return self.kill().map(|()| true).map_err(io::Error::other);
            }
            if !ended.revents().is_empty() {
                return Ok(false);
            }
        }
    }

    fn failed(&self, action: &str, source: io::Error) -> WaitError {
        WaitError { action: action.to_owned(), pid: self.pid, source }
    }

    /// A directory that holds the writable layer, as `upper`: other processes can open it by this one's descriptor. `None`
    /// if the container has none, or made it in a user namespace.
    pub fn writable(&self) -> Option<BorrowedFd<'_>> {
        self.base.as_ref().map(AsFd::as_fd)
    }

    /// What the container has written, as a layer; also after its end. `None` as for [`Container::writable`].
    pub fn changes(&self) -> Option<io::Result<Changes>> {
        self.writable().map(Changes::of_base)
    }

    /// The container's cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Kills what is left of the container and removes its cgroup.
    pub fn delete(self) -> Result<(), CgroupError> {
        let killed = self.kill();
        killed.and(self.cgroup.delete())
    }
}

/// Waits until a child has ended, and reaps it.
pub fn wait_for(pidfd: BorrowedFd<'_>, pid: i32) -> Result<ExitStatus, WaitError> {
    let failed = |source| WaitError { action: "wait for".into(), pid, source };
    let status = loop {
        match waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED) {
            Err(Errno::INTR) => {}
            Ok(Some(status)) => break status,
            Ok(None) => return Err(failed(io::ErrorKind::NotFound.into())),
            Err(errno) => return Err(failed(errno.into())),
        }
    };
    Ok(match (status.exit_status(), status.terminating_signal()) {
        // The kernel passes on the lower eight bits only.
        (Some(code), _) => ExitStatus::Code(code as u8),
        (None, signo) => ExitStatus::Signal(signo.unwrap_or(libc::SIGKILL)),
    })
}
