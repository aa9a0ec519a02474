//! The start of a sandbox as marks on one host clock, CLOCK_MONOTONIC.
//!
//! Marks of the guest are I/O-port writes that the VMM stamps, not guest time, so every figure here can be
//! subtracted from every other.

use cloche_vmm::event::Mark as VmmMark;
use serde::{Deserialize, Serialize};

/// A moment in the life of a sandbox, in the order in which a VM reaches them. A container skips those of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    /// `main` of the command line.
    CliExec,
    /// The image's name is resolved to layers on disk.
    ImageReady,
    /// The OCI spec is made and the root file system's parts are known.
    RootfsReady,
    /// The network is set up.
    NetworkReady,
    /// The VMM's process is started.
    VmmSpawned,
    /// The VMM's own first instruction in `main`.
    VmmEntry,
    /// KVM has created the VM and its vCPUs.
    KvmReady,
    /// Kernel and initramfs are in guest memory.
    KernelLoaded,
    /// Just before the first KVM_RUN.
    FirstGuestInstruction,
    /// The guest's kernel has handed over to the agent.
    KernelToInit,
    /// The agent has its configuration and a connection to the host.
    AgentReady,
    /// The container's process is about to be started.
    ProcessStart,
    /// The host knows that the container's `execve` succeeded.
    ProcessStarted,
    /// The first byte of the container's output reached the monitor.
    FirstOutput,
    /// The container's process ended.
    ProcessExit,
    /// The monitor knows how the process ended and has all of its output.
    Exit,
    /// Nothing of the sandbox is left on the host.
    TeardownDone,
}

impl Mark {
    /// The mark's name as printed and as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::CliExec => "cli-exec",
            Self::ImageReady => "image-ready",
            Self::RootfsReady => "rootfs-ready",
            Self::NetworkReady => "network-ready",
            Self::VmmSpawned => "vmm-spawned",
            Self::VmmEntry => "vmm-entry",
            Self::KvmReady => "kvm-ready",
            Self::KernelLoaded => "kernel-loaded",
            Self::FirstGuestInstruction => "first-guest-instruction",
            Self::KernelToInit => "kernel-to-init",
            Self::AgentReady => "agent-ready",
            Self::ProcessStart => "process-start",
            Self::ProcessStarted => "process-started",
            Self::FirstOutput => "first-output",
            Self::ProcessExit => "process-exit",
            Self::Exit => "exit",
            Self::TeardownDone => "teardown-done",
        }
    }
}

impl From<VmmMark> for Mark {
    fn from(mark: VmmMark) -> Self {
        match mark {
            VmmMark::VmmEntry => Self::VmmEntry,
            VmmMark::KvmReady => Self::KvmReady,
            VmmMark::KernelLoaded => Self::KernelLoaded,
            VmmMark::FirstInstruction => Self::FirstGuestInstruction,
            VmmMark::Init => Self::KernelToInit,
            VmmMark::AgentReady => Self::AgentReady,
            VmmMark::ProcessStart => Self::ProcessStart,
            VmmMark::ProcessExit => Self::ProcessExit,
        }
    }
}

/// One mark and its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// What happened.
    pub name: Mark,
    /// When, on CLOCK_MONOTONIC, in nanoseconds.
    pub ns: u64,
}

/// The marks of one run, each at most once, sorted by time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    marks: Vec<Stamp>,
}

impl Trace {
    /// Stamps `mark` with the time now, unless it is stamped already.
    pub fn mark(&mut self, mark: Mark) {
        self.mark_at(mark, now_ns());
    }

    /// Records a mark stamped elsewhere (CLOCK_MONOTONIC, nanoseconds), unless it is stamped already.
    pub fn mark_at(&mut self, mark: Mark, ns: u64) {
        if self.get(mark).is_none() {
            let at = self.marks.partition_point(|stamp| stamp.ns <= ns);
            self.marks.insert(at, Stamp { name: mark, ns });
        }
    }

    /// When `mark` happened, if it did.
    pub fn get(&self, mark: Mark) -> Option<u64> {
        self.marks.iter().find(|stamp| stamp.name == mark).map(|stamp| stamp.ns)
    }

    /// All marks, sorted by time.
    pub fn stamps(&self) -> &[Stamp] {
        &self.marks
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_stamped_out_of_order_come_out_sorted_and_once() {
        let mut trace = Trace::default();
        trace.mark_at(Mark::Exit, 30);
        trace.mark_at(Mark::CliExec, 10);
        trace.mark_at(Mark::CliExec, 20);
        let order: Vec<_> = trace.stamps().iter().map(|stamp| (stamp.name.name(), stamp.ns)).collect();
        assert_eq!(order, [("cli-exec", 10), ("exit", 30)]);
    }
}
