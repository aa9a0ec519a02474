//! What a VMM process tells its parent: one JSON object a line on the inherited `events_fd`.
//!
//! The parent reads lines until end of file; the last one is [`Event::Exited`], [`Event::Failed`] or [`Event::Seccomp`].
//! End of file without any of them means that the process was killed. Marks are stamped when they happen and written when the event
//! loop next has something to do, so that they cost the guest no wake-ups.

use cloche_protocol::machine::GuestMark;
use serde::{Deserialize, Serialize};

use crate::jail::ThreadKind;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Event {
    /// A moment of the start, on the host's clock.
    Mark {
        /// Which moment.
        name: Mark,
        /// CLOCK_MONOTONIC, nanoseconds.
        ns: u64,
    },
    /// The VM ran and has ended. No guest instruction is executed any more.
    Exited {
        /// Why it ended.
        reason: ExitReason,
        /// The end of what the guest printed on its console, at most [`CONSOLE_TAIL_BYTES`] bytes before they were
        /// made valid UTF-8.
        console_tail: String,
        /// What the run cost.
        stats: Stats,
    },
    /// The VM could not be built, or the host failed it.
    Failed {
        /// The step that failed, e.g. `validate`, `open`, `create-vm`, `load-kernel`, `run`.
        step: String,
        /// The whole chain of causes, ready to print.
        message: String,
        /// As in [`Event::Exited`]; empty if the guest never ran.
        console_tail: String,
    },
    /// A thread tried what its seccomp filter forbids, and the kernel has killed the process.
    Seccomp {
        /// Number of the system call.
        call: u32,
        /// What the thread was for.
        thread: ThreadKind,
    },
}

/// Bytes of console output that an event carries at most.
pub const CONSOLE_TAIL_BYTES: usize = 4096;

/// A moment in a VM's start, in order of occurrence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mark {
    /// [`crate::run`] was entered.
    VmmEntry,
    /// KVM has the VM, its interrupt controllers and its vCPUs.
    KvmReady,
    /// Kernel, initramfs and command line are in guest memory.
    KernelLoaded,
    /// The boot vCPU is about to execute the guest's first instruction.
    FirstInstruction,
    /// [`GuestMark::Init`].
    Init,
    /// [`GuestMark::AgentReady`].
    AgentReady,
    /// [`GuestMark::ProcessStart`].
    ProcessStart,
    /// [`GuestMark::ProcessExit`].
    ProcessExit,
}

impl From<GuestMark> for Mark {
    fn from(mark: GuestMark) -> Self {
        match mark {
            GuestMark::Init => Self::Init,
            GuestMark::AgentReady => Self::AgentReady,
            GuestMark::ProcessStart => Self::ProcessStart,
            GuestMark::ProcessExit => Self::ProcessExit,
        }
    }
}

/// Why a VM that ran has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest wrote this code to the exit port.
    GuestExit {
        /// The code.
        code: u32,
    },
    /// The guest reset its machine by the keyboard controller, without having panicked.
    GuestReset,
    /// A vCPU triple-faulted, without the kernel having panicked. It is how Linux resets the machine that it is told to
    /// reset so (`reboot=t`), and also how a guest ends that jumps into the void.
    TripleFault,
    /// The guest's kernel panicked.
    KernelPanic {
        /// What the kernel printed after `Kernel panic - not syncing: `.
        message: String,
        /// What it means, as far as this and the lines before tell.
        cause: PanicCause,
    },
    /// The guest did not write its `agent-ready` mark in time.
    StartTimeout {
        /// The `start_timeout_ms` that passed.
        timeout_ms: u64,
    },
    /// This process was told to end by SIGTERM.
    Stopped,
}

/// Why a Linux kernel panicked. From the guest's own words, which may be lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PanicCause {
    /// There is no program to start as the first process.
    NoInit,
    /// It cannot mount its root file system.
    NoRoot,
    /// Memory ran out, and the first process was killed or nothing was left to kill.
    OutOfMemory,
    /// The first process ended by itself or by another signal.
    InitDied,
    /// A fault of the kernel's own: an oops that it does not survive.
    Oops,
    /// Anything else.
    Other,
}

impl PanicCause {
    /// In a few words, and what to do.
    fn explanation(self) -> &'static str {
        match self {
            Self::NoInit => " (it found no program to start; its initramfs is missing or damaged)",
            Self::NoRoot => " (it lacks a driver for its initramfs or root file system)",
            Self::OutOfMemory => " (memory ran out; give the guest more)",
            Self::InitDied => " (its first process died)",
            Self::Oops => " (a fault of the kernel's own)",
            Self::Other => "",
        }
    }
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::GuestExit { code } => write!(f, "the guest ended the machine with code {code}"),
            Self::GuestReset => f.write_str("the guest reset the machine"),
            Self::TripleFault => f.write_str("the guest reset the machine by a triple fault, or crashed"),
            Self::KernelPanic { message, cause } => {
                write!(f, "the guest kernel panicked{}: {message}", cause.explanation())
            }
            Self::StartTimeout { timeout_ms } => {
                write!(f, "the guest agent was not ready within {timeout_ms} ms")
            }
            Self::Stopped => f.write_str("the machine was stopped from outside"),
        }
    }
}

/// What a VM's run cost, counted by this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// VM exits that this process handled for port I/O, over all vCPUs.
    pub io_exits: u64,
    /// VM exits that this process handled for memory-mapped I/O, over all vCPUs.
    pub mmio_exits: u64,
    /// All VM exits over all vCPUs, those that KVM handled by itself included. `None` where KVM does not tell.
    pub kvm_exits: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seccomp_event_is_spelt_as_the_signal_handler_does() {
        for thread in ThreadKind::ALL {
            let json = format!(r#"{{"type":"seccomp","call":59,"thread":"{}"}}"#, thread.name());
            assert_eq!(serde_json::to_string(&Event::Seccomp { call: 59, thread }).unwrap(), json);
        }
    }

    #[test]
    fn event_as_json_keeps_its_spelling() {
        let mark = Event::Mark { name: Mark::FirstInstruction, ns: 7 };
        assert_eq!(
            serde_json::to_string(&mark).unwrap(),
            r#"{"type":"mark","name":"first-instruction","ns":7}"#
        );
        let exited = Event::Exited {
            reason: ExitReason::GuestExit { code: 3 },
            console_tail: "x".into(),
            stats: Stats::default(),
        };
        let json = serde_json::to_string(&exited).unwrap();
        assert!(json.starts_with(r#"{"type":"exited","reason":{"kind":"guest-exit","code":3}"#), "{json}");
        assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), exited);
    }
}
