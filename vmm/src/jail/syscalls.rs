//! System calls that no safe wrapper offers. The only modules of the jail with `unsafe` code are this one and
//! [`super::violation`].
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

/// Moves this thread into new namespaces, `CLONE_NEW…`.
pub fn unshare(namespaces: i32) -> io::Result<()> {
    // SAFETY: none of these flags affects memory or descriptors.
    check(unsafe { libc::unshare(namespaces) })
}

/// Takes every capability from this thread's bounding set.
pub fn empty_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        // SAFETY: this prctl takes a number and no pointer.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            let error = io::Error::last_os_error();
            // The first number that this kernel does not know.
            return if error.raw_os_error() == Some(libc::EINVAL) && capability > 0 {
                Ok(())
            } else {
                Err(error)
            };
        }
    }
    Ok(())
}

/// Closes every descriptor from 3 up that is not among `kept`.
pub fn close_all_but(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = first.max(fd.saturating_add(1));
    }
    close_range(first, u32::MAX)
}

/// Has threads that are started from now on share the first one's heap. By itself the C library gives each a heap of
/// its own, 64 MiB of address space apart, which takes four system calls to make and one whenever it grows.
pub fn share_one_heap() -> io::Result<()> {
    // SAFETY: mallopt(3) takes numbers, and this process has one thread.
    let done = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    if done == 1 { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: this is called before this process has opened anything, so nothing in it owns these descriptors.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A number above all open descriptors, if they are numbered without gaps.
pub fn open_files() -> io::Result<u32> {
    // SAFETY: duplicating a descriptor touches no memory.
    let lowest = unsafe { libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 0) };
    check(lowest)?;
    // SAFETY: fcntl has just made it, so it is nobody else's.
    drop(unsafe { OwnedFd::from_raw_fd(lowest) });
    Ok(lowest as u32)
}

/// Whether nobody can read any more what is written to this pipe.
pub fn has_no_reader(pipe: RawFd) -> bool {
    let mut fd = libc::pollfd { fd: pipe, events: 0, revents: 0 };
    // SAFETY: `fd` is one live pollfd.
    let ready = unsafe { libc::poll(&raw mut fd, 1, 0) };
    ready > 0 && fd.revents & (libc::POLLERR | libc::POLLHUP) != 0
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn pipe_without_reader_is_noticed() {
        let (reader, writer) = io::pipe().unwrap();
        assert!(!has_no_reader(writer.as_raw_fd()));
        drop(reader);
        assert!(has_no_reader(writer.as_raw_fd()));
        assert!(!has_no_reader(-1));
    }
}
