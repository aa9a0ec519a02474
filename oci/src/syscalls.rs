//! System calls that no safe wrapper offers.
#![allow(unsafe_code)]

use std::{
    ffi::{CString, c_char},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    ptr,
};

/// Blocks these signals for the calling thread and returns a non-blocking descriptor that yields them (signalfd(2)).
pub(crate) fn signal_descriptor(signals: &[i32]) -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is writable memory of the right type; sigemptyset initialises it.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised by sigemptyset just above.
    let mut set = unsafe { set.assume_init() };
    for signo in signals {
        // SAFETY: `set` is an initialised signal set.
        unsafe { libc::sigaddset(&raw mut set, *signo) };
    }
    // SAFETY: `set` is initialised; the old mask is not asked for.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by signalfd(2) and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Replaces the process by the program that `file` is, with this process's environment. Returns only on failure.
pub(crate) fn execute(file: BorrowedFd<'_>, words: &[CString]) -> io::Error {
    let words: Vec<*const c_char> = words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect();
    let environment: Vec<CString> = std::env::vars_os()
        .filter_map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok())
        .collect();
    let environment: Vec<*const c_char> =
        environment.iter().map(|variable| variable.as_ptr()).chain([ptr::null()]).collect();
    // SAFETY: the path is an empty literal; all words and variables are NUL-terminated and live, and both arrays end in
    // a null pointer.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            file.as_raw_fd(),
            c"".as_ptr(),
            words.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}
