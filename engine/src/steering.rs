//! A running sandbox as any other process steers it: seen, paused, resumed, signalled, stopped, measured. Its monitor
//! need not be asked; what it does is read from the record, the cgroup, and the VM's control socket.
//!
//! ```text
//!               container                        VM
//!   pause       cgroup freezer                   control socket: vCPUs and devices stand still
//!   signal      queued to the monitor, which passes it on to the process in the sandbox
//!   stats       cgroup                           control socket, cgroup
//! ```

use std::{
    io,
    path::PathBuf,
    time::{Duration, Instant},
};

use cloche_protocol::message::Status;
use cloche_runtime::cgroup::{Cgroup, CgroupError};
use cloche_vmm::control::{
    api::{Answer, Info, MachineStats, Request, RunState},
    client::{ClientError, ask},
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Serialize;

use crate::{
    isolation::vm::dial,
    record::{Record, State},
    request::Isolation,
    sandboxes::{Entry, SandboxError, Sandboxes},
    signals, syscalls,
};

/// The control socket's name in a VM's directory.
pub(crate) const CONTROL_SOCKET: &str = "control.sock";
/// How long a VMM may take to answer. It answers at once, unless its host is very busy.
const ANSWER: Duration = Duration::from_secs(10);
/// How long an ended sandbox's monitor may take to pass on the last output and clean up.
const AFTERMATH: Duration = Duration::from_secs(10);

/// Why a sandbox could not be steered.
#[derive(Debug, thiserror::Error)]
pub enum SteeringError {
    /// There is none of that name, or its record is in the way.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// It has ended, or not begun.
    #[error("sandbox {id} is {status}, not running")]
    NotRunning {
        /// The sandbox.
        id: String,
        /// What it is instead.
        status: &'static str,
    },
    /// The cgroup refused.
    #[error("cannot {action} sandbox {id}")]
    Cgroup {
        /// What was attempted.
        action: &'static str,
        /// The sandbox.
        id: String,
        /// Why not.
        #[source]
        source: CgroupError,
    },
    /// The VMM refused, or did not answer.
    #[error("cannot {action} sandbox {id}")]
    Vmm {
        /// What was attempted.
        action: &'static str,
        /// The sandbox.
        id: String,
        /// Why not.
        #[source]
        source: ClientError,
    },
    /// Its monitor cannot be signalled.
    #[error("cannot send signal {signo} to sandbox {id}")]
    Signal {
        /// The signal.
        signo: i32,
        /// The sandbox.
        id: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What a sandbox is seen to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activity {
    /// It runs.
    Running,
    /// It stands still.
    Paused,
    /// Its VMM does not answer.
    Unresponsive,
}

impl Activity {
    /// The word in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Unresponsive => "unresponsive",
        }
    }
}

/// A sandbox that runs, or is about to.
#[derive(Debug)]
pub struct Steered {
    /// What is on disk about it.
    pub record: Record,
    dir: PathBuf,
}

impl Sandboxes {
    /// The sandbox of this name, id or beginning of an id, if it has not ended.
    pub fn steer(&self, reference: &str) -> Result<Steered, SteeringError> {
        self.steered(self.find(reference)?)
    }

    /// All sandboxes that run, oldest first.
    pub fn steer_all(&self) -> Result<Vec<Steered>, SteeringError> {
        let running = self.entries()?.into_iter().filter(|entry| {
            let runs = matches!(entry.record.state, State::Running(_));
            runs && entry.has_monitor
        });
        running.map(|entry| self.steered(entry)).collect()
    }

    fn steered(&self, entry: Entry) -> Result<Steered, SteeringError> {
        let dir = self.sandbox_dir(&entry.record.id);
        match entry.record.state {
            State::Exited(_) => Err(SteeringError::NotRunning { id: entry.record.id, status: "exited" }),
            _ => Ok(Steered { record: entry.record, dir }),
        }
    }

    /// Asks the sandbox's process to end with `signo`, waits `patience` for that, and then kills it. A paused sandbox is
    /// resumed, so that it can.
    pub fn stop(
        &self,
        reference: &str,
        signo: Option<i32>,
        patience: Duration,
    ) -> Result<String, SteeringError> {
        let steered = self.steer(reference)?;
        let signo = signo.unwrap_or(steered.record.stop_signal);
        steered.signal_and_wake(signo)?;
        if !steered.wait_for_end(patience) {
            self.kill_for_certain(&steered)?;
        }
        Ok(steered.record.id)
    }

    /// Sends a signal to the sandbox's process. SIGKILL ends the sandbox for certain, whatever its guest does.
    pub fn signal(&self, reference: &str, signo: i32) -> Result<String, SteeringError> {
        let steered = self.steer(reference)?;
        if signo == libc::SIGKILL {
            self.kill_for_certain(&steered)?;
        } else {
            steered.signal(signo)?;
        }
        Ok(steered.record.id)
    }

    fn kill_for_certain(&self, steered: &Steered) -> Result<(), SteeringError> {
        // In order first: the last output is passed on, and the end is recorded as the process's own.
        let asked = steered.signal_and_wake(libc::SIGKILL);
        if asked.is_ok() && steered.wait_for_end(AFTERMATH) {
            return Ok(());
        }
        self.end_by_force(&steered.record.id)?;
        Ok(())
    }
}

impl Steered {
    fn id(&self) -> String {
        self.record.id.clone()
    }

    pub(crate) fn is_vm(&self) -> bool {
        self.record.isolation == Isolation::Vm
    }

    fn running(&self) -> Result<(), SteeringError> {
        match self.record.state {
            State::Running(_) => Ok(()),
            State::Starting => Err(SteeringError::NotRunning { id: self.id(), status: "starting" }),
            State::Exited(_) => Err(SteeringError::NotRunning { id: self.id(), status: "exited" }),
        }
    }

    fn cgroup(&self, action: &'static str) -> Result<Cgroup, SteeringError> {
        Cgroup::open(&self.record.cgroup).map_err(self.cgroup_error(action))
    }

    fn cgroup_error(&self, action: &'static str) -> impl FnOnce(CgroupError) -> SteeringError {
        let id = self.id();
        move |source| SteeringError::Cgroup { action, id, source }
    }

    fn ask(&self, action: &'static str, request: Request) -> Result<Answer, SteeringError> {
        ask(&self.dir.join(CONTROL_SOCKET), request, ANSWER).map_err(|source| SteeringError::Vmm {
            action,
            id: self.id(),
            source,
        })
    }

    /// What it is seen to do. A sandbox that ends this very moment counts as running: its record will say the rest.
    pub fn activity(&self) -> Activity {
        if !self.is_vm() {
            let frozen = self.cgroup("look at").is_ok_and(|cgroup| cgroup.is_frozen());
            return if frozen { Activity::Paused } else { Activity::Running };
        }
        match ask(&self.dir.join(CONTROL_SOCKET), Request::Info, ANSWER) {
            Ok(Answer::Info(info)) if matches!(info.state, RunState::Pausing | RunState::Paused) => {
                Activity::Paused
            }
            Err(ClientError::Silent(error)) if error.kind() == io::ErrorKind::TimedOut => {
                Activity::Unresponsive
            }
            _ => Activity::Running,
        }
    }

    /// Stops everything in it; nothing happens if that is so already.
    pub fn pause(&self) -> Result<(), SteeringError> {
        self.running()?;
        if self.is_vm() {
            self.ask("pause", Request::Pause).map(drop)
        } else {
            self.cgroup("pause")?.freeze().map_err(self.cgroup_error("pause"))
        }
    }

    /// Lets it go on; nothing happens if it does already.
    pub fn resume(&self) -> Result<(), SteeringError> {
        self.running()?;
        if self.is_vm() {
            self.ask("resume", Request::Resume).map(drop)
        } else {
            self.cgroup("resume")?.thaw().map_err(self.cgroup_error("resume"))
        }
    }

    /// Sends its process a signal, by way of its monitor.
    pub fn signal(&self, signo: i32) -> Result<(), SteeringError> {
        let failed = |source| SteeringError::Signal { signo, id: self.id(), source };
        let monitor =
            Pid::from_raw(self.record.monitor.pid).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let pidfd = pidfd_open(monitor, PidfdFlags::empty()).map_err(|errno| failed(errno.into()))?;
        // The pidfd pins the process; only then is it compared with the record.
        if !self.record.monitor.is_alive() {
            return Err(failed(io::ErrorKind::NotFound.into()));
        }
        syscalls::queue_signal(&pidfd, signals::RELAYED, signo).map_err(failed)
    }

    /// As [`Steered::signal`], and lets a paused sandbox go on, since nothing reaches it otherwise.
    fn signal_and_wake(&self, signo: i32) -> Result<(), SteeringError> {
        self.signal(signo)?;
        if self.running().is_ok() && self.activity() == Activity::Paused {
            self.resume()?;
        }
        Ok(())
    }

    /// Waits until its monitor has ended. False if that takes longer.
    fn wait_for_end(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let Some(pid) = Pid::from_raw(self.record.monitor.pid) else { return true };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
        loop {
            if !self.record.monitor.is_alive() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let left = rustix::event::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
            let _ = rustix::event::poll(&mut fds, Some(&left));
        }
    }

    /// What a VM's machine is.
    pub(crate) fn machine(&self) -> Result<Info, SteeringError> {
        match self.ask("look at", Request::Info)? {
            Answer::Info(info) => Ok(info),
            _ => Err(SteeringError::NotRunning { id: self.id(), status: "not answering as it should" }),
        }
    }

    /// The VM's own statistics.
    pub fn machine_stats(&self) -> Result<MachineStats, SteeringError> {
        match self.ask("measure", Request::Stats)? {
            Answer::Stats(stats) => Ok(*stats),
            _ => Err(SteeringError::NotRunning { id: self.id(), status: "not answering as it should" }),
        }
    }

    /// What the guest's agent says of the container in it, or why it says nothing.
    pub(crate) fn guest_status(&self) -> Result<Status, String> {
        dial::status(&self.dir).map_err(|error| format!("the guest's agent does not answer: {error}"))
    }

    /// The end of what the guest's console printed, at most `bytes` bytes.
    pub fn console(&self, bytes: u32) -> Result<String, SteeringError> {
        match self.ask("read the console of", Request::Console { bytes })? {
            Answer::Console(text) => Ok(text),
            _ => Err(SteeringError::NotRunning { id: self.id(), status: "not answering as it should" }),
        }
    }

    /// Its cgroup.
    pub(crate) fn measured_cgroup(&self) -> Result<Cgroup, SteeringError> {
        self.cgroup("measure")
    }
}
