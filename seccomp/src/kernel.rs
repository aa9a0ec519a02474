//! The one system call. The only module of this crate with `unsafe` code.
#![allow(unsafe_code)]

use std::io;

/// Puts a filter into force for this thread and all that it becomes or starts. Needs no_new_privs or CAP_SYS_ADMIN.
/// `flags` are `SECCOMP_FILTER_FLAG_…`, without those that make the call return something else than 0.
pub fn install(program: &[libc::sock_filter], flags: u32) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: `program` describes a live array of `len` instructions, which the kernel only reads.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
