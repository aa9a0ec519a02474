//! The one system call. The only module of this crate with `unsafe` code.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
};

/// Puts a filter into force for this thread and all that it becomes or starts. Needs no_new_privs or CAP_SYS_ADMIN.
/// `flags` are `SECCOMP_FILTER_FLAG_…`, without those that make the call return something else than 0.
pub fn install(program: &[libc::sock_filter], flags: u32) -> io::Result<()> {
    if set(program, flags)? == 0 { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// As [`install`], for a program that returns SECCOMP_RET_USER_NOTIF. Whoever has the descriptor (close-on-exec) decides
/// on such calls; without it they fail with ENOSYS (seccomp_unotify(2)).
pub fn install_with_listener(program: &[libc::sock_filter], flags: u32) -> io::Result<OwnedFd> {
    let listener = set(program, flags | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as u32)?;
    // SAFETY: with this flag the kernel returns a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(listener) })
}

fn set(program: &[libc::sock_filter], flags: u32) -> io::Result<i32> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: `program` describes a live array of `len` instructions, which the kernel only reads.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}
