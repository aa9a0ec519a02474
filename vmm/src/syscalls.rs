//! The few system calls for which no crate that this one uses has a safe wrapper.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

/// Takes ownership of a file descriptor that this process inherited, and keeps it from being inherited further.
///
/// Fails with `EBADF` if it is not open. The caller must not use `fd` in any other way afterwards.
pub fn take_inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD takes an integer and touches no memory.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, as fcntl has just shown, and the configuration names it for this process to own.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Blocks SIGTERM for this thread and those that it starts, and returns a non-blocking file descriptor that becomes
/// readable when it comes.
pub fn sigterm_fd() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero sigset_t is plain data; sigemptyset below initialises it.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a live sigset_t.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: `set` is a live, initialised sigset_t, and SIGTERM a signal.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGTERM) };
    // SAFETY: `set` is initialised, and the old mask is not asked for.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd has just returned it, so it is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
