//! System calls that no safe wrapper offers.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, c_char},
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    ptr,
};

/// Queues a signal with a number for a process (pidfd_send_signal(2), sigqueue(3)).
pub fn queue_signal(pidfd: &OwnedFd, signo: i32, value: i32) -> io::Result<()> {
    /// The beginning of the kernel's `siginfo_t` of a queued signal on x86-64, in its full size.
    #[repr(C)]
    struct Queued {
        signo: i32,
        errno: i32,
        code: i32,
        padding: i32,
        pid: i32,
        uid: u32,
        value: i32,
        rest: [i32; 25],
    }
    // SAFETY: getuid(2) takes nothing and cannot fail.
    let uid = unsafe { libc::getuid() };
    let pid = std::process::id() as i32;
    let info = Queued { signo, errno: 0, code: libc::SI_QUEUE, padding: 0, pid, uid, value, rest: [0; 25] };
    const { assert!(size_of::<Queued>() == size_of::<libc::siginfo_t>()) };
    // SAFETY: `info` has the size and layout of a siginfo_t and outlives the call; no flags.
    let result =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signo, &raw const info, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes descriptor `target` the same as `fd`, kept at `execve`.
pub(crate) fn dup_to(fd: OwnedFd, target: RawFd) -> io::Result<()> {
    // SAFETY: `target` is replaced in a process that is about to become another program, where nothing owns it.
    let result = unsafe { libc::dup2(fd.as_raw_fd(), target) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Replaces the process by the program at `path`, with an empty environment. Returns only on failure.
pub(crate) fn execute(path: &CStr, words: &[&CStr]) -> io::Error {
    let words: Vec<*const c_char> = words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect();
    let environment = [ptr::null::<c_char>()];
    // SAFETY: `path` and all words are NUL-terminated and live, and both arrays end in a null pointer.
    unsafe { libc::execve(path.as_ptr(), words.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Ends the process at once: no destructors, no flushing of buffers copied from the parent.
pub(crate) fn exit_now(code: u8) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(code.into()) }
}

/// Largest resident set of any child waited for, in KiB (getrusage(2), `ru_maxrss`).
pub fn children_max_rss_kib() -> Option<u64> {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is writable memory of the right type.
    let result = unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()) };
    // SAFETY: all-zero bytes are a valid rusage, and the kernel has overwritten them on success.
    let usage = unsafe { usage.assume_init() };
    (result == 0).then_some(usage.ru_maxrss as u64)
}
