//! A vCPU's thread: run guest code until it needs this process, serve it, repeat.
//!
//! ```text
//!   KVM_RUN ──▶ exit: I/O ──▶ Bus ──▶ KVM_RUN …
//!      │          └ exit port, reset, error ──▶ Endings, thread ends
//!      └ kicked and told to stop ──▶ thread ends
//! ```

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use cloche_protocol::machine::GuestMark;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;

use super::{
    bus::{Bus, Request},
    kvm::{self, Kickable},
    report::Reporter,
};
use crate::{
    devices::control,
    event::{Mark, Stats},
};

/// Why the machine stops running.
#[derive(Debug)]
pub enum Ending {
    /// The guest wrote to the exit port.
    GuestExit(u32),
    /// The guest reset the machine.
    Reset,
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

/// What all vCPU threads and the main thread share.
pub struct Shared {
    /// Devices.
    pub bus: Bus,
    /// Reasons to end.
    pub endings: Endings,
    /// Where marks go.
    pub reporter: Arc<Reporter>,
    /// Set before vCPU threads are kicked.
    pub stopping: AtomicBool,
    /// Whether the guest's agent has reported.
    pub agent_ready: AtomicBool,
    stats: Mutex<Stats>,
}

impl Shared {
    /// For a machine that does not run yet.
    pub fn new(bus: Bus, endings: Endings, reporter: Arc<Reporter>) -> Self {
        Self {
            bus,
            endings,
            reporter,
            stopping: AtomicBool::new(false),
            agent_ready: AtomicBool::new(false),
            stats: Mutex::default(),
        }
    }

    /// What was counted by the vCPU threads that have ended.
    pub fn stats(&self) -> Stats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_stats(&self, counts: Stats) {
        let mut sum = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        sum.io_exits += counts.io_exits;
        sum.mmio_exits += counts.mmio_exits;
        if let Some(exits) = counts.kvm_exits {
            sum.kvm_exits = Some(sum.kvm_exits.unwrap_or(0) + exits);
        }
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

/// Runs vCPU `index` on this thread until the machine ends.
pub fn run(index: u8, mut vcpu: VcpuFd, shared: &Shared) {
    let kickable = Kickable::new(&mut vcpu);
    let mut counts = Stats::default();
    if index == 0 {
        shared.reporter.mark(Mark::FirstInstruction);
    }
    let ending = loop {
        if shared.stopping.load(Ordering::Acquire) {
            break None;
        }
        if let Some(ending) = step(index, kickable.vcpu, shared, &mut counts) {
            break Some(ending);
        }
    };
    // Before the main thread is told: it goes on at once.
    counts.kvm_exits = kvm::exit_count(kickable.vcpu);
    shared.add_stats(counts);
    if let Some(ending) = ending {
        shared.endings.end(ending);
    }
}

/// One stay in the guest and what it asks for.
fn step(index: u8, vcpu: &mut VcpuFd, shared: &Shared, counts: &mut Stats) -> Option<Ending> {
    let failed = |error| Some(Ending::Failed(error));
    match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            counts.io_exits += 1;
            let request = shared.bus.port_write(port, data)?;
            shared.serve(request)
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            counts.io_exits += 1;
            shared.bus.port_read(port, data);
            None
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            counts.mmio_exits += 1;
            shared.bus.memory_write(address, data);
            None
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            counts.mmio_exits += 1;
            shared.bus.memory_read(address, data);
            None
        }
        // A triple fault: what `reboot=t` does, and a kernel that is lost too.
        Ok(VcpuExit::Shutdown) => Some(Ending::Reset),
        Ok(VcpuExit::Intr) => None,
        Ok(VcpuExit::InternalError) => {
            let suberror = kvm::internal_suberror(vcpu);
            let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
            failed(RunError::Internal { vcpu: index, suberror, rip })
        }
        Ok(VcpuExit::FailEntry(reason, _)) => failed(RunError::FailEntry { vcpu: index, reason }),
        Ok(other) => failed(RunError::UnknownExit { vcpu: index, exit: format!("{other:?}") }),
        Err(error) if error.errno() == libc::EINTR => {
            vcpu.set_kvm_immediate_exit(0);
            None
        }
        Err(error) if error.errno() == libc::EAGAIN => None,
        Err(source) => failed(RunError::Ioctl { vcpu: index, source }),
    }
}
