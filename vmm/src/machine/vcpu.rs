//! A vCPU's thread: run guest code until it needs this process, serve it, repeat.
//!
//! The thread is there before its vCPU, since the jail lets no thread be made later.
//!
//! ```text
//!   KVM_RUN ──▶ exit: I/O ──▶ Bus ──▶ KVM_RUN …
//!      │          └ exit port, reset, error ──▶ Endings, thread ends
//!      └ kicked ──▶ Gate: sleep while paused, thread ends when told to stop
//! ```

use std::{
    io,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use cloche_protocol::machine::GuestMark;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;

use super::{
    bus::{Bus, Request},
    kvm::{self, Kickable},
    kvm_statistics::KvmStatistics,
    lifecycle::Gate,
    report::Reporter,
};
use crate::{
    control::api::VcpuStats,
    devices::control,
    event::{Mark, Stats},
    jail::{Jail, ThreadKind},
    mailbox::{Sender, mailbox},
    syscalls::ThreadClock,
};

/// Why the machine stops running.
#[derive(Debug)]
pub enum Ending {
    /// The guest wrote to the exit port.
    GuestExit(u32),
    /// The guest reset the machine by its keyboard controller.
    Reset,
    /// A vCPU triple-faulted.
    TripleFault,
    /// The guest's agent was not ready in time.
    StartTimeout,
    /// This process was asked to stop.
    Stopped,
    /// The host cannot go on.
    Failed(RunError),
}

/// Why a vCPU cannot run any further. What the guest does wrong is not among it, with one exception: a host whose KVM
/// cannot execute some instruction shows the same way as a guest that jumps into the void.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// KVM_EXIT_INTERNAL_ERROR.
    #[error(
        "KVM gave up on vCPU {vcpu} at instruction {rip:#x} (internal error, suberror {suberror}); this host's KVM \
         may be unable to run a Linux guest: run `cloche doctor`"
    )]
    Internal {
        /// Index of the vCPU.
        vcpu: u8,
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
        /// Instruction pointer.
        rip: u64,
    },
    /// KVM_EXIT_FAIL_ENTRY.
    #[error(
        "the processor refused to enter vCPU {vcpu} (hardware reason {reason:#x}); this host's KVM may be unable to \
         run a Linux guest: run `cloche doctor`"
    )]
    FailEntry {
        /// Index of the vCPU.
        vcpu: u8,
        /// From the hardware.
        reason: u64,
    },
    /// KVM_RUN itself failed.
    #[error("running vCPU {vcpu} failed")]
    Ioctl {
        /// Index of the vCPU.
        vcpu: u8,
        /// Its error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// An exit that this machine never asks for.
    #[error("vCPU {vcpu} left the guest for a reason that this machine does not know: {exit}")]
    UnknownExit {
        /// Index of the vCPU.
        vcpu: u8,
        /// As kvm-ioctls names it.
        exit: String,
    },
    /// The event loop failed.
    #[error("waiting for events failed")]
    EventLoop(#[source] event_manager::Error),
    /// The control socket's part of it failed.
    #[error("waiting for control events failed")]
    Control(#[source] std::io::Error),
}

/// The first reason to end, and the eventfd that tells the main thread of it.
#[derive(Debug)]
pub struct Endings {
    first: Mutex<Option<Ending>>,
    wake: EventFd,
}

impl Endings {
    /// Nothing has ended yet.
    pub fn new(wake: EventFd) -> Self {
        Self { first: Mutex::default(), wake }
    }

    /// Ends the machine, unless it is ending already.
    pub fn end(&self, ending: Ending) {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(ending);
        let _ = self.wake.write(1);
    }

    /// The first reason to end.
    pub fn take(&self) -> Option<Ending> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What a vCPU's thread counts, for others to read while it runs.
#[derive(Debug, Default)]
pub struct VcpuCounters {
    io_exits: AtomicU64,
    mmio_exits: AtomicU64,
    interrupted_exits: AtomicU64,
    /// From the thread's start.
    clock: OnceLock<ThreadClock>,
    /// KVM's own, if it tells.
    kvm: OnceLock<KvmStatistics>,
}

impl VcpuCounters {
    /// What was counted so far.
    pub fn snapshot(&self) -> VcpuStats {
        VcpuStats {
            cpu_ns: self.clock.get().map_or(0, ThreadClock::cpu_ns),
            io_exits: self.io_exits.load(Ordering::Relaxed),
            mmio_exits: self.mmio_exits.load(Ordering::Relaxed),
            interrupted_exits: self.interrupted_exits.load(Ordering::Relaxed),
        }
    }

    /// KVM's statistics of this vCPU, once its thread has started.
    pub fn kvm(&self) -> Option<&KvmStatistics> {
        self.kvm.get()
    }
}

/// Only one thread counts, so that this needs no locked instruction.
fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

/// What all vCPU threads and the main thread share.
pub struct Shared {
    /// Devices.
    pub bus: Bus,
    /// Reasons to end.
    pub endings: Endings,
    /// Where marks go.
    pub reporter: Arc<Reporter>,
    /// Where vCPU threads stop for a pause and for the end.
    pub gate: Gate,
    /// Whether the guest's agent has reported.
    pub agent_ready: AtomicBool,
    /// By index of the vCPU.
    pub vcpus: Vec<VcpuCounters>,
}

impl Shared {
    /// For a machine of so many vCPUs that does not run yet.
    pub fn new(bus: Bus, endings: Endings, reporter: Arc<Reporter>, gate: Gate, vcpus: u8) -> Self {
        let vcpus = (0..vcpus).map(|_| VcpuCounters::default()).collect();
        Self { bus, endings, reporter, gate, agent_ready: AtomicBool::new(false), vcpus }
    }

    /// What was counted by the vCPU threads.
    pub fn stats(&self) -> Stats {
        let mut sum = Stats::default();
        for vcpu in &self.vcpus {
            let counts = vcpu.snapshot();
            sum.io_exits += counts.io_exits;
            sum.mmio_exits += counts.mmio_exits;
            if let Some(exits) = vcpu.kvm().and_then(|kvm| kvm.value("exits")) {
                sum.kvm_exits = Some(sum.kvm_exits.unwrap_or(0) + exits);
            }
        }
        sum
    }

    fn serve(&self, request: Request) -> Option<Ending> {
        match request {
            Request::Control(control::Request::Mark(mark)) => {
                self.reporter.mark(mark.into());
                if mark == GuestMark::AgentReady {
                    self.agent_ready.store(true, Ordering::Release);
                }
                None
            }
            Request::Control(control::Request::Exit(code)) => Some(Ending::GuestExit(code)),
            Request::Reset => Some(Ending::Reset),
        }
    }
}

/// A thread that waits for its vCPU.
pub struct VcpuThread {
    thread: JoinHandle<()>,
    vcpu: Sender<VcpuFd>,
}

/// Starts the thread of vCPU `index`.
pub fn spawn(index: u8, jail: &mut Jail, shared: &Arc<Shared>) -> io::Result<VcpuThread> {
    let (vcpu, given) = mailbox();
    let shared = shared.clone();
    let work = jail.confined(ThreadKind::Vcpu, move || {
        // Without a vCPU, the machine was given up.
        if let Some(vcpu) = given.recv() {
            run(index, vcpu, &shared);
        }
    });
    let thread = thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
        work();
    })?;
    Ok(VcpuThread { thread, vcpu })
}

impl VcpuThread {
    /// Lets the vCPU run.
    pub fn start(self, vcpu: VcpuFd) -> JoinHandle<()> {
        // It is waiting; nothing else has been sent to it.
        let _ = self.vcpu.send(vcpu);
        self.thread
    }
}

/// Runs vCPU `index` on this thread until the machine ends.
fn run(index: u8, mut vcpu: VcpuFd, shared: &Shared) {
    let Some(counters) = shared.vcpus.get(usize::from(index)) else { return };
    let _ = counters.clock.set(ThreadClock::own());
    if let Some(statistics) = kvm::vcpu_statistics(&vcpu) {
        let _ = counters.kvm.set(statistics);
    }
    let kickable = Kickable::new(&mut vcpu);
    if index == 0 {
        shared.reporter.mark(Mark::FirstInstruction);
    }
    while shared.gate.pass(|| tell_of_pause(kickable.vcpu)) {
        if let Some(ending) = step(index, kickable.vcpu, shared, counters) {
            shared.endings.end(ending);
            return;
        }
    }
}

/// Lets the guest's watchdogs know that time passes without it. A guest without kvmclock cannot be told (EINVAL).
fn tell_of_pause(vcpu: &VcpuFd) {
    let _ = vcpu.kvmclock_ctrl();
}

/// One stay in the guest and what it asks for.
fn step(index: u8, vcpu: &mut VcpuFd, shared: &Shared, counters: &VcpuCounters) -> Option<Ending> {
    let failed = |error| Some(Ending::Failed(error));
    match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            count(&counters.io_exits);
            let request = shared.bus.port_write(port, data)?;
            shared.serve(request)
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            count(&counters.io_exits);
            shared.bus.port_read(port, data);
            None
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            count(&counters.mmio_exits);
            shared.bus.memory_write(address, data);
            None
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            count(&counters.mmio_exits);
            shared.bus.memory_read(address, data);
            None
        }
        // A triple fault: what `reboot=t` does, and a kernel that is lost too.
        Ok(VcpuExit::Shutdown) => Some(Ending::TripleFault),
        Ok(VcpuExit::Intr) => {
            count(&counters.interrupted_exits);
            None
        }
        Ok(VcpuExit::InternalError) => {
            let suberror = kvm::internal_suberror(vcpu);
            let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
            failed(RunError::Internal { vcpu: index, suberror, rip })
        }
        Ok(VcpuExit::FailEntry(reason, _)) => failed(RunError::FailEntry { vcpu: index, reason }),
        Ok(other) => failed(RunError::UnknownExit { vcpu: index, exit: format!("{other:?}") }),
        Err(error) if error.errno() == libc::EINTR => {
            count(&counters.interrupted_exits);
            vcpu.set_kvm_immediate_exit(0);
            None
        }
        Err(error) if error.errno() == libc::EAGAIN => None,
        Err(source) => failed(RunError::Ioctl { vcpu: index, source }),
    }
}
