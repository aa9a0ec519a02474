//! System calls that no safe wrapper offers.
#![allow(unsafe_code)]

use std::{
    ffi::{CString, c_char},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::ffi::OsStrExt,
    },
    ptr,
};

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
