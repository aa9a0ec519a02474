//! The system calls that no safe wrapper offers.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// `struct mount_attr` of `linux/mount.h`.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Cuts a mount and all below it off from others, so that nothing that happens to those is held up by it; and makes them
/// read-only.
pub fn isolate(mount: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    const RDONLY: u64 = 1;
    let set = if read_only { RDONLY } else { 0 };
    let attr = MountAttr { set, clear: 0, propagation: libc::MS_PRIVATE, user_namespace: 0 };
    // SAFETY: the path is a NUL-terminated literal, `attr` a live `mount_attr` of the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives this process namespaces of its own; it must have one thread only.
pub fn unshare_namespaces() -> io::Result<()> {
    let flags = libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    // SAFETY: unshare takes no pointer.
    if unsafe { libc::unshare(flags) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Closes every descriptor from 3 up: what this process inherited is none of its business.
pub fn close_inherited() -> io::Result<()> {
    // SAFETY: this is called before this process has opened anything, so nothing in it owns these descriptors.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
