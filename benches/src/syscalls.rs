//! The one system call for which no crate here has a safe wrapper.
#![allow(unsafe_code)]

use std::io;
use std::process::ExitStatus;

/// Waits for a child's end; how it ended, and its largest resident set in KiB (wait4(2)).
pub fn wait_with_peak(pid: u32) -> io::Result<(ExitStatus, u64)> {
    use std::os::unix::process::ExitStatusExt as _;
    let mut status = 0;
    // SAFETY: a rusage is plain numbers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers are to live variables of the types that wait4 fills in.
        if unsafe { libc::wait4(pid as i32, &raw mut status, 0, &raw mut usage) } >= 0 {
            return Ok((ExitStatus::from_raw(status), usage.ru_maxrss as u64));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
