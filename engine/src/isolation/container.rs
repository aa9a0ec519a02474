//! Container isolation: `cloche-runtime` on the host's own kernel. Also the baseline `process`, which is the same
//! without any confinement.

use std::{fs::File, io::Read, os::fd::AsRawFd};

use cloche_protocol::message::{Exit, ExitStatus};
use cloche_runtime::{
    Container, Launch, LaunchError, Lower, Oci, Rootfs, Stdio,
    pump::{pipe_read_side, pipe_write_side},
};
use rustix::event::{PollFd, PollFlags};

use super::{Lost, Running, Streams, observed};
use crate::{
    record::{ProcessId, Processes},
    request::{Isolation, RunRequest},
    spec::Workload,
    trace::{Mark, Trace},
};

/// Why a container did not start.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// The runtime could not start it.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// No pipes for its stdio.
    #[error("cannot make the pipes of its stdio")]
    Pipe(#[source] std::io::Error),
}

/// Starts `workload` on `layers` (bottom first); its `execve` has succeeded when this returns.
pub fn start(
    id: &str,
    workload: &Workload,
    layers: Vec<Lower>,
    request: &RunRequest,
    trace: &mut Trace,
) -> Result<Box<dyn Running>, ContainerError> {
    let (stdin, stdin_host) = if request.interactive {
        let (read, write) = pipe_write_side().map_err(ContainerError::Pipe)?;
        (read, Some(write))
    } else {
        (File::open("/dev/null").map_err(ContainerError::Pipe)?.into(), None)
    };
    let (stdout_host, stdout) = pipe_read_side().map_err(ContainerError::Pipe)?;
    let (stderr_host, stderr) = pipe_read_side().map_err(ContainerError::Pipe)?;
    let approve = |pid| request.require == observed::isolation(pid);
    trace.mark(Mark::ProcessStart);
    let container = cloche_runtime::launch(Launch {
        id,
        spec: &workload.spec,
        user: workload.user.as_deref(),
        filter: workload.filter.as_ref(),
        rootfs: Rootfs::Layers { lowers: layers, upper_bytes: None },
        stdio: Stdio { stdin, stdout, stderr },
        kill_on_parent_death: true,
        approve: request.require.is_some().then_some(&approve),
        oci: Oci::default(),
    })?;
    trace.mark(Mark::ProcessStarted);
    let streams = Streams { stdin: stdin_host, stdout: stdout_host, stderr: stderr_host };
    Ok(Box::new(RunningContainer {
        container,
        streams: Some(streams),
        is_bare: request.isolation == Isolation::Process,
        out_of_memory: false,
    }))
}

struct RunningContainer {
    container: Container,
    streams: Option<Streams>,
    /// Without a PID namespace, whose end would end its children.
    is_bare: bool,
    /// The limit was hit, and everything is killed.
    out_of_memory: bool,
}

impl Running for RunningContainer {
    fn take_streams(&mut self) -> Option<Streams> {
        self.streams.take()
    }

    fn processes(&self) -> Option<Processes> {
        let writable = self.container.writable().map(|fd| fd.as_raw_fd());
        Some(Processes { leader: ProcessId::of(self.container.pid())?, writable })
    }

    fn poll_fds(&self) -> Vec<PollFd<'_>> {
        let pidfd = PollFd::from_borrowed_fd(self.container.pidfd(), PollFlags::IN);
        let oom = self.container.oom_event().filter(|_| !self.out_of_memory);
        let oom = oom.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        [Some(pidfd), oom].into_iter().flatten().collect()
    }

    fn advance(&mut self, trace: &mut Trace) -> Result<Option<Exit>, Lost> {
        if let Some(oom) = self.container.oom_event()
            && !self.out_of_memory
            && is_readable(oom)
        {
            self.out_of_memory = true;
            self.container.kill().map_err(|error| Lost(error.to_string()))?;
        }
        if !is_readable(self.container.pidfd()) {
            return Ok(None);
        }
        trace.mark(Mark::ProcessExit);
        let exit = self.container.wait().map_err(|error| Lost(error.to_string()))?;
        if self.is_bare {
            self.container.kill().map_err(|error| Lost(error.to_string()))?;
        }
        Ok(Some(Exit {
            status: match exit.status {
                cloche_runtime::ExitStatus::Code(code) => ExitStatus::Code(code),
                cloche_runtime::ExitStatus::Signal(signo) => ExitStatus::Signal(signo),
            },
            oom_killed: exit.oom_killed,
            memory_peak_bytes: exit.memory_peak_bytes,
        }))
    }

    fn signal(&mut self, signo: i32) {
        // A process that ended meanwhile needs no signal.
        let _ = self.container.signal(signo);
    }

    fn changes(&mut self) -> Result<Box<dyn Read + Send>, Lost> {
        let changes = self.container.changes().ok_or_else(|| {
            Lost("a plain user cannot read the writable layer of its container from outside".into())
        })?;
        changes.map(|changes| Box::new(changes) as _).map_err(|error| Lost(error.to_string()))
    }

    fn teardown(self: Box<Self>) -> Result<(), Lost> {
        self.container.delete().map_err(|error| Lost(error.to_string()))
    }
}

fn is_readable(fd: std::os::fd::BorrowedFd<'_>) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(1..))
}
