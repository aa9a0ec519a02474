//! The container's root file system: made inside the container's mount namespace, so that it vanishes with the
//! last process of the container whatever happens to everybody else, and entered by `pivot_root`.
//!
//! ```text
//!  caller's / in the new mount namespace ◀── covered by the new root: a clone of the directory's mounts,
//!                                            or an overlay of layers
//!  pivot_root ▸ the new root is /, covered by the old one ▸ the old one is detached
//! ```

mod layers;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    mount::{
        MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount,
        open_tree, unmount,
    },
    process::{chdir, chroot, fchdir, pivot_root},
};

use crate::{launch::Rootfs, syscalls};

/// Why the root file system could not be made or entered.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// The mounts could not be cut off from the caller's.
    #[error("cannot make the mounts of the new namespace independent of the caller's")]
    Isolate(#[source] io::Error),
    /// The directory cannot serve as root.
    #[error("cannot use the directory {path} as root file system")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// There is no layer at all.
    #[error("cannot make a root file system of no layers")]
    NoLayers,
    /// A layer could not be mounted.
    #[error("cannot mount the layer {path}{how}")]
    Layer {
        /// Its block device or image file.
        path: PathBuf,
        /// By which way, starting with a blank, or nothing.
        how: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel is too old for what a plain user needs.
    #[error(
        "this kernel's tmpfs keeps no user attributes, which a plain user's root file system needs; use Linux 6.6 or \
         later, run as root, or use --isolation vm"
    )]
    NoUserAttributes,
    /// The overlay could not be mounted.
    #[error("cannot {action} for the overlay of {layers} layers")]
    Overlay {
        /// What was attempted.
        action: &'static str,
        /// How many layers there are.
        layers: usize,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The caller's root could not be left.
    #[error("cannot {action} to leave the caller's root file system")]
    Pivot {
        /// What was attempted.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Cuts the new mount namespace off from the caller's: what happens here stays here, while what the caller mounts
/// later below a shared mount may still arrive in bind mounts that ask for it (`rslave`).
pub(crate) fn isolate_mounts() -> Result<(), RootfsError> {
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", slave).map_err(|errno| RootfsError::Isolate(errno.into()))
}

/// Mounts the root file system. The returned descriptor refers to its root, which is attached but not yet entered.
/// `base` is what [`base`] has made of the same one, if the caller did.
pub(crate) fn mount(rootfs: &Rootfs, base: Option<BorrowedFd<'_>>) -> Result<OwnedFd, RootfsError> {
    match rootfs {
        Rootfs::Directory(path) => mount_directory(path),
        Rootfs::Layers { lowers, upper_bytes } => match base {
            Some(base) => layers::mount(lowers, base),
            None => layers::mount(lowers, layers::base(lowers, *upper_bytes)?.as_fd()),
        },
    }
}

/// What is under the writable layer of layers, for a caller that wants to keep it: it outlives the container's mounts as
/// long as the descriptor is open. [`changes`] reads it.
pub(crate) fn base(rootfs: &Rootfs) -> Result<Option<OwnedFd>, RootfsError> {
    match rootfs {
        Rootfs::Directory(_) => Ok(None),
        Rootfs::Layers { lowers, upper_bytes } => layers::base(lowers, *upper_bytes).map(Some),
    }
}

/// The writable layer on a base.
pub(crate) fn upper(base: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(base, layers::UPPER, flags, Mode::empty())
}

/// Clones the mounts of a directory, for a process that could not. What the caller mounts there later does not arrive.
pub(crate) fn clone_directory(path: &Path) -> Result<OwnedFd, RootfsError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::from_bits_retain(libc::AT_RECURSIVE as u32);
    let failed = |source| RootfsError::Directory { path: path.to_owned(), source };
    let tree = open_tree(CWD, path, flags).map_err(|errno| failed(errno.into()))?;
    let private = syscalls::MountAttr::propagating(libc::MS_PRIVATE);
    syscalls::mount_setattr(tree.as_fd(), true, private).map_err(failed)?;
    Ok(tree)
}

/// Attaches what [`clone_directory`] has returned.
pub(crate) fn attach_clone(tree: BorrowedFd<'_>, path: &Path) -> Result<(), RootfsError> {
    cover_root(tree).map_err(|errno| RootfsError::Directory { path: path.to_owned(), source: errno.into() })
}

fn mount_directory(path: &Path) -> Result<OwnedFd, RootfsError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::from_bits_retain(libc::AT_RECURSIVE as u32);
    open_tree(CWD, path, flags)
        .and_then(|tree| cover_root(tree.as_fd()).map(|()| tree))
        .map_err(|errno| RootfsError::Directory { path: path.to_owned(), source: errno.into() })
}

/// Attaches a mount on top of the root directory. This process's root stays what is below, so its paths are not
/// affected, and no directory of the caller's is needed as a mount point.
fn cover_root(mount: BorrowedFd<'_>) -> Result<(), Errno> {
    move_mount(mount, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Makes `root`, which [`mount`] returned, this process's root and working directory, and detaches all else.
pub(crate) fn enter(root: BorrowedFd<'_>) -> Result<(), RootfsError> {
    let failed = |action| move |errno: Errno| RootfsError::Pivot { action, source: errno.into() };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = openat(CWD, "/", flags, Mode::empty()).map_err(failed("open /"))?;
    fchdir(root).map_err(failed("change to the new root"))?;
    // With both names the same, the old root ends up on top of the new one (pivot_root(2)).
    match pivot_root(".", ".") {
        Err(Errno::INVAL) if is_initial_ramfs(old.as_fd()) => return enter_from_initial_ramfs(),
        result => result.map_err(failed("call pivot_root"))?,
    }
    fchdir(&old).map_err(failed("change to the old root"))?;
    // The name stands for the topmost of the mounts there. Only when all of them are gone, the old root included, is
    // it no mount of this namespace any more.
    loop {
        match unmount(".", UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(failed("detach the old root")(errno)),
        }
    }
    chdir("/").map_err(failed("change to the new root"))
}

/// The initial ramfs is the bottom of all mounts and cannot be pivoted away (pivot_root(2)). There, the new root
/// just goes on covering it: no path leads below a mount that covers the root of the mount namespace.
fn enter_from_initial_ramfs() -> Result<(), RootfsError> {
    let failed = |action| move |errno: Errno| RootfsError::Pivot { action, source: errno.into() };
    chroot(".").map_err(failed("chroot"))?;
    chdir("/").map_err(failed("change to the new root"))
}

fn is_initial_ramfs(root: BorrowedFd<'_>) -> bool {
    const RAMFS_MAGIC: u64 = 0x8584_58f6;
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    rustix::fs::fstatfs(root).is_ok_and(|stat| [RAMFS_MAGIC, TMPFS_MAGIC].contains(&(stat.f_type as u64)))
}
