//! Namespaces of the VMM's own, and a root directory with nothing in it.

use std::os::fd::AsFd;

use rustix::{
    fs::CWD,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
        fsconfig_create, fsmount, fsopen, mount_change, move_mount, unmount,
    },
    process::{fchdir, pivot_root},
};

use super::{JailError, MOUNTS_HINT, NAMESPACES_HINT, failed, syscalls};

/// Moves this thread.
pub fn leave() -> Result<(), JailError> {
    let apart = libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    syscalls::unshare(apart).map_err(failed("make namespaces", NAMESPACES_HINT))?;
    empty_root().map_err(failed("make its root directory empty", MOUNTS_HINT))
}

/// An empty, read-only file system takes the place of all that is mounted.
fn empty_root() -> rustix::io::Result<()> {
    // What is mounted elsewhere must not appear here, nor the other way round.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(tmpfs.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let empty = fsmount(tmpfs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(empty.as_fd(), "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    // pivot_root(2): the old root is stacked on the new one, and unmounted from there with all that is below it.
    fchdir(&empty)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}
