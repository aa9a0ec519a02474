//! User namespaces: who the users of the container are outside of it.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    process::Command,
};

use oci_spec::runtime::LinuxIdMapping;
use rustix::{
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
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

/// Maps users and groups of the new user namespace that a process is in.
pub(crate) fn map_ids(
    pid: i32,
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
) -> Result<(), UserNamespaceError> {
    write_map("uid", pid, uids)?;
    write_map("gid", pid, gids)
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

/// Becomes root of the user namespace that this process is in.
pub(crate) fn become_root() -> Result<(), UserNamespaceError> {
    match set_thread_groups(&[]) {
        // A plain user's namespace may not drop groups.
        Ok(()) | Err(Errno::PERM) => {}
        Err(errno) => return Err(step("drop the additional groups")(errno)),
    }
    let (gid, uid) = (rustix::process::Gid::ROOT, rustix::process::Uid::ROOT);
    set_thread_res_gid(gid, gid, gid).map_err(step("become group 0, which the map lacks,"))?;
    set_thread_res_uid(uid, uid, uid).map_err(step("become user 0, which the map lacks,"))
}

/// A user namespace of these maps that nobody is in, for a mount whose files belong to other users than they say.
pub(crate) fn of_maps(
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
) -> Result<OwnedFd, UserNamespaceError> {
    const NEW_USER: u64 = 0x1000_0000;
    let (waits, held) = pipe_with(PipeFlags::CLOEXEC).map_err(step("make a pipe"))?;
    match syscalls::clone3(NEW_USER, None).map_err(step("make a process"))? {
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
