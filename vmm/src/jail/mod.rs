//! The jail of a VMM process: what is left to whoever takes it over is guest memory, the descriptors that the VM needs,
//! and the few system calls of [`table`].
//!
//! ```text
//!  enter ──▶ (files are opened) ──▶ become_nobody ──▶ leave_host ──▶ close ──▶ (kernel is read, guest runs)
//!    │                                  │                 │             └ every thread has its filter; limits
//!    │                                  │                 └ mount, net, ipc, uts, cgroup namespaces; empty root; no
//!    │                                  │                   capabilities
//!    │                                  └ own user id, own user namespace, dies with its parent
//!    └ PID namespace is its own; no descriptors but the named
//! ```
//! Each step fails closed, and says what to do. The order is explained in `docs/decisions/0011-the-vmms-jail.md`.
//!
//! Threads are started between `leave_host` and `close`, each through [`Jail::confined`], and then never again: no
//! thread may make one. The one that sets KVM up starts before `leave_host`, since most of its time is waiting; it has
//! its filter and no capabilities from its first line on, and has ended before the guest runs.

mod privileges;
mod root;
mod syscalls;
pub mod table;
mod user;
mod violation;

use std::{io, os::fd::RawFd, sync::Arc};

use serde::{Deserialize, Serialize};

pub use privileges::Limits;
use table::Table;

use crate::mailbox::{Receiver, Sender, mailbox};

/// What a thread does; each kind has a filter of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum ThreadKind {
    /// Reads kernel and initramfs, then runs all devices.
    Main,
    /// Sets up the virtual machine, and ends before the guest runs.
    KvmSetup,
    /// Runs one vCPU.
    Vcpu,
    /// Does for one disk what may have to wait.
    Disk,
}

impl ThreadKind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Main, Self::KvmSetup, Self::Vcpu, Self::Disk];

    /// As it is told to a user.
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::KvmSetup => "kvm-setup",
            Self::Vcpu => "vcpu",
            Self::Disk => "disk",
        }
    }
}

/// Why the jail is not closed.
#[derive(Debug, thiserror::Error)]
#[error("the VMM's jail cannot be closed: cannot {step}{hint}")]
pub struct JailError {
    step: &'static str,
    /// What to do about it, starting with `; `, or nothing.
    hint: &'static str,
    #[source]
    source: io::Error,
}

const NAMESPACES_HINT: &str = "; this host, or the container that this runs in, forbids namespaces: allow them (sysctl \
     kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces \
     above 0), or run as root";
const MOUNTS_HINT: &str = "; if this runs in a container, that container must be allowed to mount";
const SECCOMP_HINT: &str = "; the host's kernel needs CONFIG_SECCOMP_FILTER";

/// For `map_err`: a step, what to do if it fails, and the system's answer.
fn failed<E: Into<io::Error>>(step: &'static str, hint: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError { step, hint, source: source.into() }
}

/// Whether a thread is in its filter.
type Report = Result<(), JailError>;

/// A jail that is being closed around this process.
#[derive(Debug)]
pub struct Jail {
    /// `None`: there is no jail.
    table: Option<Arc<Table>>,
    /// What each thread says when it has its filter, or not.
    reports: (Sender<Report>, Receiver<Report>),
    threads: usize,
}

impl Jail {
    /// The jail that every VM of a user is in.
    pub fn new() -> Self {
        Self::with_table(Table::default())
    }

    /// A jail that is stricter: for the tests that show that nothing in the table is there in vain.
    pub fn with_table(table: Table) -> Self {
        Self { table: Some(Arc::new(table)), reports: mailbox(), threads: 0 }
    }

    /// None at all, to debug a VMM that its user starts by hand.
    pub fn none() -> Self {
        Self { table: None, reports: mailbox(), threads: 0 }
    }

    /// Checks that this process is alone in its PID namespace, and closes every descriptor but the standard ones and
    /// `kept`. Call it first.
    pub fn enter(&self, kept: &[RawFd], events: Option<RawFd>) -> Result<(), JailError> {
        if self.table.is_none() {
            return Ok(());
        }
        if rustix::process::getpid() != rustix::process::Pid::INIT {
            return Err(failed("go on in a PID namespace of others", "; `cloche run` makes one for it")(
                io::Error::from(io::ErrorKind::PermissionDenied),
            ));
        }
        user::die_with_parent(events)?;
        syscalls::share_one_heap()
            .map_err(failed("have one heap for all threads", "; it needs the GNU C library"))?;
        syscalls::close_all_but(kept)
            .map_err(failed("close what it has inherited", "; it needs Linux 5.9"))?;
        violation::report_to(events).map_err(failed("prepare for SIGSYS", ""))
    }

    /// Gives up the caller's user for one of its own, in a user namespace of its own. Everything that needs the
    /// caller's rights must be open. The process must have one thread.
    pub fn become_nobody(&self, events: Option<RawFd>) -> Result<(), JailError> {
        if self.table.is_none() {
            return Ok(());
        }
        user::become_nobody()?;
        // A change of the user makes the kernel forget it.
        user::die_with_parent(events)
    }

    /// Takes this thread, and all that it starts from now on, out of the host's namespaces, file system and
    /// privileges.
    pub fn leave_host(&self) -> Result<(), JailError> {
        if self.table.is_none() {
            return Ok(());
        }
        root::leave()?;
        privileges::drop_all()
    }

    /// A thread's work, in its filter. It comes to `None` if there is no filter; then [`Jail::close`] says why.
    pub fn confined<T, W: FnOnce() -> T>(
        &mut self,
        kind: ThreadKind,
        work: W,
    ) -> impl FnOnce() -> Option<T> + use<T, W> {
        self.threads += 1;
        let table = self.table.clone();
        let report = self.reports.0.clone();
        move || {
            let confined = match table {
                Some(table) => privileges::drop_capabilities().and_then(|()| table.install(kind)),
                None => Ok(()),
            };
            let done = confined.is_ok();
            // Without a listener, the machine is given up.
            let _ = report.send(confined);
            done.then(work)
        }
    }

    /// Waits until every thread is in its filter, and puts this one into its own. Nothing can be opened, and no thread
    /// started, any more.
    pub fn close(&mut self, limits: Limits) -> Result<(), JailError> {
        let threads = std::mem::take(&mut self.threads);
        for _ in 0..threads {
            // Every thread reports before anything else, and `self` has a sender: it never fails.
            if let Some(report) = self.reports.1.recv() {
                report?;
            }
        }
        let Some(table) = &self.table else { return Ok(()) };
        limits.set(threads)?;
        table.install(ThreadKind::Main)
    }
}

/// Has a panic end the process with a message on stderr and the status of Rust programs that panic. Aborting, as panics
/// otherwise end, takes system calls that the jail does not have.
pub fn exit_on_panic(program: &'static str) {
    const PANICKED: i32 = 101;
    std::panic::set_hook(Box::new(move |panic| {
        eprintln!("{program}: {panic}");
        std::process::exit(PANICKED);
    }));
}

impl Default for Jail {
    fn default() -> Self {
        Self::new()
    }
}
