//! The attendant of a container's first process: it is the parent of the VM.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Instant,
};

use cloche_oci::Signals;
use cloche_protocol::{
    VERSION, frame,
    message::{FromGuest, ToGuest},
};
use cloche_runtime::cgroup::Cgroup;
use cloche_vmm::VmConfig;
use oci_spec::runtime::Process;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    super::{LAST_WORDS, Load, Machine, Pod, START_PATIENCE, Streams, VmError, boot, cgroup::VmCgroup},
    attendant::{self, Carried, Gate, GuestStreams, Peer, Refusal, Report, open_terminal},
    network::{self, Network},
    spec::{ROOT_SHARE, Split},
};
use crate::{isolation::Running, trace::Trace};

/// What to start.
pub(super) struct Plan<'a> {
    pub(super) id: &'a str,
    /// The VM's own.
    pub(super) directory: &'a Path,
    pub(super) split: &'a Split,
    /// Whether others may join.
    pub(super) is_sandbox: bool,
    pub(super) machine: VmConfig,
    /// The path of the container's cgroup on the host.
    pub(super) cgroup: &'a Path,
    pub(super) gate: Option<BorrowedFd<'a>>,
    pub(super) console_socket: Option<BorrowedFd<'a>>,
}

/// Starts a VM with the container, and attends it to its end; how its first process ended.
pub(super) fn attend(plan: Plan<'_>, report: Report) -> Result<u8, Refusal> {
    if let Some(path) = &plan.split.network {
        network::join(path)?;
    }
    report.hold()?;
    // Hooks have set it up by now.
    let network = Network::take_over(plan.split.network.as_deref(), plan.directory)?;
    let process = plan.split.guest.process().clone().unwrap_or_default();
    let terminal = terminal(&process, plan.console_socket)?;
    let gate = match plan.gate {
        Some(gate) => Some(gate.try_clone_to_owned().map_err(Refusal::step("keep the gate"))?),
        None => None,
    };
    let mut machine = boot_plan(plan, &network)?;
    // Not before: what the VMM inherits as blocked, it would not get.
    let signals = Signals::collect().map_err(Refusal::step("collect signals"))?;
    await_news(&mut machine, &FromGuest::Created)?;
    if gate.is_none() {
        machine.tell(&ToGuest::Start);
        await_news(&mut machine, &FromGuest::Started)?;
    }
    let streams = machine.take_streams().ok_or_else(|| Refusal::new("its streams are taken"))?;
    let carried = carried(streams, terminal).map_err(Refusal::step("carry stdio"))?;
    report.ready()?;
    let result = attendant::attend(&mut machine, carried, &signals, gate.map(Gate::new));
    // Whoever waits for this process finds nothing of the VM.
    machine.vmm.end();
    result.map_err(Refusal::step("attend the container"))
}

/// The terminal that a process asks for.
pub(super) fn terminal(
    process: &Process,
    socket: Option<BorrowedFd<'_>>,
) -> Result<Option<OwnedFd>, Refusal> {
    let socket = socket.filter(|_| process.terminal() == Some(true));
    socket.map(|socket| open_terminal(process, socket)).transpose().map_err(Refusal::step("make a terminal"))
}

fn carried(streams: Streams, terminal: Option<OwnedFd>) -> std::io::Result<Carried> {
    let stdin = match streams.stdin {
        Some(stdin) => stdin,
        None => File::open("/dev/null")?.into(),
    };
    let stderr = terminal.is_none().then_some(streams.stderr);
    Carried::new(GuestStreams { stdin, stdout: streams.stdout, stderr }, terminal)
}

fn boot_plan(plan: Plan<'_>, network: &Network) -> Result<Machine, Refusal> {
    let load = Load {
        id: plan.id,
        spec: &plan.split.guest,
        filter: plan.split.filter.as_ref(),
        user: None,
        shares: &plan.split.shares,
        root_share: Some(ROOT_SHARE),
        waits: true,
        stdin: true,
        network: Some(network),
        pod: plan.is_sandbox.then_some(Pod { shared_memory_bytes: plan.split.shared_memory_bytes }),
    };
    let cgroup =
        |config: &VmConfig| Ok(VmCgroup::around(Cgroup::open(plan.cgroup)?, config, &plan.split.shares));
    boot(plan.directory, &load, plan.machine, &mut Trace::default(), cgroup)
        .map_err(|error| Refusal::of(&error))
}

/// Waits for one piece of news, behind which others may stand that say less.
fn await_news(machine: &mut Machine, expected: &FromGuest) -> Result<(), Refusal> {
    let started = Instant::now();
    let mut is_ready = false;
    loop {
        while let Some(news) = machine.news().map_err(Refusal::new)? {
            match news {
                // Once: a guest that says it for ever would keep this from its patience.
                FromGuest::Ready { version } if version == VERSION && !is_ready => is_ready = true,
                FromGuest::Failed { exit_code, message } => {
                    return Err(Refusal::of_guest(exit_code, &message));
                }
                news if news == *expected => return Ok(()),
                other => return Err(Refusal::new(format!("its agent says {other:?}, not {expected:?}"))),
            }
        }
        if started.elapsed() > START_PATIENCE {
            let waited = START_PATIENCE.as_secs();
            return Err(Refusal::new(format!("the guest has not made the container within {waited} s")));
        }
        let timeout = Timespec { tv_sec: 1, tv_nsec: 0 };
        match poll(&mut Peer::poll_fds(machine), Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Refusal::step("wait for the VM")(errno)),
        }
    }
}

impl Peer for Machine {
    fn poll_fds(&self) -> Vec<PollFd<'_>> {
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.vmm.pidfd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.vmm.events(), PollFlags::IN),
        ];
        fds.extend(
            self.control.as_ref().map(|control| PollFd::from_borrowed_fd(control.as_fd(), PollFlags::IN)),
        );
        fds
    }

    fn news(&mut self) -> Result<Option<FromGuest>, String> {
        match self.receive() {
            Ok(Some(news)) => return Ok(Some(news)),
            Ok(None) => {}
            Err(error) => return Err(cloche_runtime::chain(&error)),
        }
        if self.silent_since.is_some() {
            self.await_last_words();
        }
        self.read_events(&mut Trace::default()).map_err(|error| match error {
            VmError::Vmm(reason) => reason,
            other => other.to_string(),
        })?;
        match self.silent_since {
            Some(since) if since.elapsed() >= LAST_WORDS => {
                Err("the guest agent closed its control stream".into())
            }
            _ => Ok(None),
        }
    }

    fn is_the_machine(&self) -> bool {
        true
    }

    fn tell(&mut self, command: &ToGuest) {
        if let Some(control) = &self.control {
            let _ = frame::write(control, command);
        }
    }
}
