//! System calls without a wrapper: the two requests of seccomp_unotify(2), and the end of a thread. The only module of
//! these tests with `unsafe` code.
#![allow(unsafe_code)]

use std::{
    io,
    mem::{size_of, zeroed},
    os::fd::{AsRawFd, OwnedFd},
};

// `linux/seccomp.h`: _IOWR('!', number, type).
const RECEIVE: u64 = 0xc000_2100 | (size_of::<libc::seccomp_notif>() as u64) << 16;
const SEND: u64 = 0xc000_2101 | (size_of::<libc::seccomp_notif_resp>() as u64) << 16;

/// Ends this thread, even if it is the process's first, and nothing else of the process.
pub fn exit_thread() -> ! {
    // SAFETY: the thread does not return to any code, and others rely on nothing of its stack.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("exit(2) does not return")
}

/// A call that waits: its id and number.
pub fn receive(listener: &OwnedFd) -> io::Result<(u64, i32)> {
    // SAFETY: plain data, which the kernel wants zeroed.
    let mut notification: libc::seccomp_notif = unsafe { zeroed() };
    // SAFETY: the request writes one `seccomp_notif`, which is live.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut notification) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok((notification.id, notification.data.nr)) }
}

/// Has it fail with an errno, or go on with 0.
pub fn answer(listener: &OwnedFd, id: u64, errno: i32) -> io::Result<()> {
    let flags = if errno == 0 { libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 } else { 0 };
    let response = libc::seccomp_notif_resp { id, val: 0, error: -errno, flags };
    // SAFETY: the request reads one `seccomp_notif_resp`, which is live.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw const response) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
