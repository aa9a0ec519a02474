//! User namespaces: who the users of the container are outside of it.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    process::Command,
};

use oci_spec::runtime::LinuxIdMapping;
use rustix::{
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::{
        DumpableBehavior, Signal, WaitId, WaitIdOptions, dumpable_behavior, geteuid, pidfd_send_signal,
        set_dumpable_behavior, set_parent_process_death_signal, waitid,
    },
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

use crate::syscalls::{self, Cloned};

/// Why a user namespace could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum UserNamespaceError {
    /// A map was refused.
    #[error("cannot write the {kind} map `{map}` of the user namespace{hint}")]
    Map {
        /// `uid` or `gid`.
        kind: &'static str,
        /// Its lines, separated by semicolons.
        map: String,
        /// What could be done about it, or nothing.
        hint: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another step failed.
    #[error("cannot {action} for a user namespace")]
    Step {
        /// What was attempted.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn step<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> UserNamespaceError {
    move |source| UserNamespaceError::Step { action, source: source.into() }
}

/// Whether this process is root of the machine itself: only then can it make device nodes and cgroups wherever it likes.
pub fn is_machine_root() -> bool {
    if !cfg!(feature = "user-namespaces") {
        return true;
    }
    /// `PROC_USER_INIT_INO` of `linux/proc_ns.h`: which file the initial namespace is.
    const INITIAL: u64 = 0xefff_fffd;
    rustix::process::geteuid().is_root()
        && rustix::fs::stat("/proc/self/ns/user").is_ok_and(|namespace| namespace.st_ino == INITIAL)
}

/// Whether a process in a new user namespace can be hidden before its users are mapped. If root did not make it, it cannot:
/// the maps of an undumpable process are for root alone to write (proc(5)).
pub(crate) fn can_hide() -> bool {
    geteuid().is_root()
}

/// As [`syscalls::clone3`], for namespaces among which there is a new user namespace. Whoever has the user id of its maker
/// has all capabilities over it (user_namespaces(7)): of root's, every process of user 0 that sees its process, also one of
/// a container that has none. It is still among the machine's files by then. So it cannot be looked into from its first
/// moment on: a process that is made inherits that.
pub(crate) fn clone_hidden(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    if !can_hide() || dumpable_behavior()? != DumpableBehavior::Dumpable {
        return syscalls::clone3(flags, cgroup);
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let cloned = syscalls::clone3(flags, cgroup);
    if !matches!(cloned, Ok(Cloned::Child)) {
        // What it was before, it may be again.
        let _ = set_dumpable_behavior(DumpableBehavior::Dumpable);
    }
    cloned
}

/// Maps users and groups of the new user namespace that a process is in.
///
/// A plain user may write a map of itself alone, and the namespace then cannot change its groups (user_namespaces(7)).
/// For any other map there are newuidmap and newgidmap, which keep to /etc/subuid and /etc/subgid.
pub(crate) fn map_ids(
    pid: i32,
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
) -> Result<(), UserNamespaceError> {
    write_map("uid", pid, uids)?;
    if is_self_alone(gids, rustix::process::getegid().as_raw()) && !rustix::process::geteuid().is_root() {
        let file = format!("/proc/{pid}/setgroups");
        fs::write(file, "deny").map_err(step("give up changing groups"))?;
    }
    write_map("gid", pid, gids)
}

fn is_self_alone(maps: &[LinuxIdMapping], id: u32) -> bool {
    matches!(maps, [map] if map.host_id() == id && map.size() == 1)
}

fn write_map(kind: &'static str, pid: i32, mappings: &[LinuxIdMapping]) -> Result<(), UserNamespaceError> {
    let fields = mappings.iter().map(|mapping| [mapping.container_id(), mapping.host_id(), mapping.size()]);
    let fields: Vec<_> = fields.map(|fields| fields.map(|field| field.to_string())).collect();
    let lines: Vec<_> = fields.iter().map(|fields| fields.join(" ")).collect();
    let failed = |hint| {
        let map = lines.join("; ");
        move |source| UserNamespaceError::Map { kind, map, hint, source }
    };
    let file = format!("/proc/{pid}/{kind}_map");
    match fs::write(&file, lines.join("\n") + "\n") {
        Ok(()) => Ok(()),
        // A plain user may map more than itself only by the set-user-ID programs that /etc/subuid is for.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let program = format!("new{kind}map");
            let status = Command::new(&program).arg(pid.to_string()).args(fields.iter().flatten()).status();
            match status {
                Ok(status) if status.success() => Ok(()),
                Ok(_) => Err(failed("; see /etc/subuid and /etc/subgid")(error)),
                Err(_) => Err(failed("; install uidmap")(error)),
            }
        }
        Err(error) => Err(failed("")(error)),
    }
}

/// Becomes root of the user namespace that this process is in; with its additional groups, or none.
pub(crate) fn become_root(keep_groups: bool) -> Result<(), UserNamespaceError> {
    if !keep_groups {
        match set_thread_groups(&[]) {
            // A plain user's namespace may not drop groups.
            Ok(()) | Err(Errno::PERM) => {}
            Err(errno) => return Err(step("drop the additional groups")(errno)),
        }
    }
    let (gid, uid) = (rustix::process::Gid::ROOT, rustix::process::Uid::ROOT);
    set_thread_res_gid(gid, gid, gid).map_err(step("become group 0, which the map lacks,"))?;
    set_thread_res_uid(uid, uid, uid).map_err(step("become user 0, which the map lacks,"))
}

/// Why work in a user namespace was not done.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// There is no such namespace to be had.
    #[error(transparent)]
    Namespace(#[from] UserNamespaceError),
    /// The work itself failed, with its whole chain of causes.
    #[error("{0}")]
    Work(String),
}

/// Has `work` done by a process that is root of a user namespace of these maps, with this process's mounts and all else,
/// and waits for it; gives what `work` says, up to a page of it.
///
/// The caller must be single-threaded.
pub fn as_root_of(
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
    work: impl FnOnce() -> Result<String, Box<dyn std::error::Error>>,
) -> Result<String, WorkError> {
    let (gate, gate_writer) = pipe_with(PipeFlags::CLOEXEC).map_err(step("make a pipe"))?;
    let (news, news_writer) = pipe_with(PipeFlags::CLOEXEC).map_err(step("make a pipe"))?;
    match clone_hidden(NEW_USER, None).map_err(step("make a process"))? {
        Cloned::Child => {
            drop((gate_writer, news));
            let _ = set_parent_process_death_signal(Some(Signal::KILL));
            // Nothing comes if the map was refused, or its writer is gone.
            if rustix::io::retry_on_intr(|| rustix::io::read(&gate, &mut [0])) != Ok(1) {
                syscalls::exit_now(1);
            }
            let done = || -> Result<String, Box<dyn std::error::Error>> {
                become_root(false)?;
                work()
            };
            // A panic must not unwind into the caller's frames, which exist twice now.
            let (code, text) = match catch_unwind(AssertUnwindSafe(done)) {
                Ok(Ok(text)) => (0, text),
                Ok(Err(error)) => (1, crate::verdict::chain(error.as_ref())),
                Err(_) => (1, "it panicked; this is a defect in cloche".to_owned()),
            };
            // Shorter than a pipe's page, it is written whole.
            let text = text.as_bytes();
            let _ = rustix::io::write(&news_writer, text.get(..4096).unwrap_or(text));
            syscalls::exit_now(code)
        }
        Cloned::Parent { pid, pidfd } => {
            drop((gate, news_writer));
            let mapped = map_ids(pid, uids, gids);
            if mapped.is_ok() {
                // If it is gone already, its status tells.
                let _ = rustix::io::write(&gate_writer, &[1]);
            }
            drop(gate_writer);
            let mut text = Vec::new();
            let read = io::Read::read_to_end(&mut File::from(news), &mut text);
            let status =
                rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED));
            mapped?;
            read.map_err(step("hear from the process"))?;
            let text = String::from_utf8_lossy(&text).into_owned();
            match status.map_err(step("wait for the process"))?.and_then(|status| status.exit_status()) {
                Some(0) => Ok(text),
                Some(_) if !text.is_empty() => Err(WorkError::Work(text)),
                _ => Err(WorkError::Work("its process was killed".into())),
            }
        }
    }
}

/// `CLONE_NEWUSER`.
const NEW_USER: u64 = 0x1000_0000;

/// A user namespace of these maps that nobody is in, for a mount whose files belong to other users than they say.
pub(crate) fn of_maps(
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
) -> Result<OwnedFd, UserNamespaceError> {
    let (waits, held) = pipe_with(PipeFlags::CLOEXEC).map_err(step("make a pipe"))?;
    match clone_hidden(NEW_USER, None).map_err(step("make a process"))? {
        Cloned::Child => {
            drop(held);
            // It is there to hold the namespace, until its maker has it or is gone.
            let _ = rustix::io::read(waits.as_fd(), &mut [0]);
            syscalls::exit_now(0)
        }
        Cloned::Parent { pid, pidfd } => {
            let namespace = map_ids(pid, uids, gids).and_then(|()| {
                let file = File::open(format!("/proc/{pid}/ns/user"));
                file.map(OwnedFd::from).map_err(step("open it"))
            });
            drop(held);
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
            namespace
        }
    }
}
