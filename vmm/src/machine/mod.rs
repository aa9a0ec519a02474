//! A machine from its configuration to its end.
//!
//! ```text
//!  validate ──▶ open ──▶ build (create-vm ∥ jail, load-kernel) ──▶ run ──▶ ended
//!      └──────────┴─────────────────┴──────────── VmError ◀────────┘
//! ```
//! Files are opened in `open` only; what a guest's maker wrote is read in the closed jail only (see [`crate::jail`]);
//! guest code runs in `run` only.

mod builder;
mod bus;
mod cpu;
mod cpu_template;
mod host;
mod interrupts;
mod kvm;
mod kvm_statistics;
mod lifecycle;
mod open;
mod plane;
mod report;
mod requests;
mod supervisor;
mod vcpu;

use std::{
    io::Write,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use kvm_ioctls::VmFd;
use tracing::warn;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::bus::Bus;
pub use self::{
    builder::{BuildError, CreateError, LoadError},
    open::OpenError,
    report::monotonic_ns,
    vcpu::RunError,
};
use self::{report::Reporter, supervisor::Ended, vcpu::Ending};
use crate::{
    config::{ConfigError, VmConfig},
    devices::console::Console,
    event::{CONSOLE_TAIL_BYTES, Event, ExitReason, Mark, Stats},
    jail::{Jail, JailError},
    syscalls,
};

/// Why there is no VM, or no longer. [`VmError::step`] names the step.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A field has a value that no VM can have.
    #[error("the VM's configuration is not valid")]
    Config(#[source] ConfigError),
    /// More memory than the host has.
    #[error(
        "memory_mib, with what can be added, is {memory_mib}; this host has {host_mib} MiB in all; \
         give the guest less memory"
    )]
    HostMemory {
        /// What was asked for, with what can be added.
        memory_mib: u64,
        /// What there is.
        host_mib: u64,
    },
    /// The parent's file descriptor for events is not open.
    #[error("the events_fd {fd} cannot be used")]
    EventsFd {
        /// Its number.
        fd: i32,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A file.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The process could not be locked in.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The machine.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Signals, timers and threads.
    #[error("setting up {what} failed")]
    Resources {
        /// What for.
        what: &'static str,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A vCPU.
    #[error(transparent)]
    Run(#[from] RunError),
}

impl VmError {
    /// The step that failed, as in [`Event::Failed`].
    pub fn step(&self) -> &'static str {
        match self {
            Self::Config(_) | Self::HostMemory { .. } => "validate",
            Self::EventsFd { .. } | Self::Open(_) => "open",
            Self::Jail(_) | Self::Build(BuildError::Jail(_)) => "jail",
            Self::Build(BuildError::Create(_)) => "create-vm",
            Self::Build(BuildError::Load(_)) => "load-kernel",
            Self::Build(_) | Self::Resources { .. } => "build",
            Self::Run(_) => "run",
        }
    }
}

/// Builds and runs a VM on the calling thread, which should be the process's main thread: the process is the VM's from
/// now on. SIGTERM is blocked and ends the VM; guest memory stays mapped until the process ends.
///
/// Marks and the end, whichever it is, are also written to the configuration's `events_fd`.
///
/// The process locks itself into `jail` on the way. If that is one, the process can do nothing useful afterwards but
/// exit, and every descriptor that `config` does not name is closed.
pub fn run(config: VmConfig, embedded_initramfs: &[u8], mut jail: Jail) -> Result<ExitReason, VmError> {
    let entered = Event::Mark { name: Mark::VmmEntry, ns: monotonic_ns() };
    let locked_in = jail.enter(&config.inherited_fds(), config.events_fd);
    let events = config.events_fd.map(take_events_fd).transpose()?;
    let reporter = Arc::new(Reporter::new(events));
    reporter.push(entered);
    let console = Arc::new(Mutex::new(Console::default()));
    let ran = locked_in
        .map_err(VmError::from)
        .and_then(|()| build_and_run(&config, embedded_initramfs, &mut jail, &console, &reporter));
    let console_tail = console.lock().unwrap_or_else(PoisonError::into_inner).tail(CONSOLE_TAIL_BYTES);
    let (result, event, vm) = match ran {
        Ok((reason, stats, vm)) => {
            let event = Event::Exited { reason: reason.clone(), console_tail, stats };
            (Ok(reason), event, Some(vm))
        }
        Err(error) => {
            let message = error_chain(&error);
            let event = Event::Failed { step: error.step().into(), message, console_tail };
            (Err(error), event, None)
        }
    };
    reporter.push(event);
    reporter.flush();
    drop(vm);
    result
}

fn take_events_fd(fd: i32) -> Result<OwnedFd, VmError> {
    syscalls::take_inherited_fd(fd).map_err(|source| VmError::EventsFd { fd, source })
}

fn build_and_run(
    config: &VmConfig,
    embedded_initramfs: &[u8],
    jail: &mut Jail,
    console: &Arc<Mutex<Console>>,
    reporter: &Arc<Reporter>,
) -> Result<(ExitReason, Stats, Arc<VmFd>), VmError> {
    validate(config)?;
    let mut opened = open::open(config, embedded_initramfs)?;
    let console_log = opened.console_log.take();
    jail.become_nobody(config.events_fd)?;
    let machine = builder::build(config, opened, jail, console.clone(), reporter.clone())?;
    let Ended { ending, stats, vm } = supervisor::run(machine, config.start_timeout_ms)?;
    let console = console.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(mut log) = console_log
        && let Err(error) = log.write_all(&console.contents())
    {
        warn!(%error, path = ?config.console_log, "the console log could not be written");
    }
    let reason = match ending {
        Ending::GuestExit(code) => ExitReason::GuestExit { code },
        Ending::Reset => or_panic(&console, ExitReason::GuestReset),
        Ending::TripleFault => or_panic(&console, ExitReason::TripleFault),
        // With `panic=0` a kernel that has panicked stands still until then.
        Ending::StartTimeout => or_panic(
            &console,
            ExitReason::StartTimeout { timeout_ms: config.start_timeout_ms.unwrap_or_default() },
        ),
        Ending::Stopped => ExitReason::Stopped,
        Ending::Failed(error) => return Err(error.into()),
    };
    Ok((reason, stats, vm))
}

/// A kernel that panics also resets, one way or the other.
fn or_panic(console: &Console, otherwise: ExitReason) -> ExitReason {
    let panic = console.panic().map(|(message, cause)| ExitReason::KernelPanic { message, cause });
    panic.unwrap_or(otherwise)
}

fn validate(config: &VmConfig) -> Result<(), VmError> {
    config.validate().map_err(VmError::Config)?;
    let host_bytes = host::memory_bytes();
    if config.most_memory_bytes() > host_bytes {
        let memory_mib = config.most_memory_bytes() >> 20;
        return Err(VmError::HostMemory { memory_mib, host_mib: host_bytes >> 20 });
    }
    Ok(())
}

/// An error and its causes in one line.
fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
