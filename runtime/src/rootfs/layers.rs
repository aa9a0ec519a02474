//! A root file system of EROFS layers, or of layers unpacked as directories, under a writable overlay, whose upper layer
//! is a tmpfs.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags, XattrFlags, mkdirat, openat, setxattr},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount as mount_classic,
        move_mount, open_tree, unmount,
    },
    process::fchdir,
};

use super::{RootfsError, cover_root};
use crate::{launch::Lower, syscalls};

/// The writable layer's directory in the base.
pub(super) const UPPER: &str = "upper";

/// Mounts the layers, bottom first, and the overlay over them:
///
/// ```text
///  base: tmpfs, attached only while the overlay is made; reached later by its descriptor alone
///   ├─ 0, 1, …     EROFS, or a clone of the directory's mount, read-only
///   ├─ upper, work
///   └─ root        overlay, which keeps the others alive by itself
/// ```
pub(super) fn mount(lowers: &[Lower], base: BorrowedFd<'_>) -> Result<OwnedFd, RootfsError> {
    if lowers.is_empty() {
        return Err(RootfsError::NoLayers);
    }
    let failed = |action| failed(action, lowers);
    // Layers are found through the caller's root, which the base is about to cover, but not to replace.
    let layers = lowers.iter().map(mount_layer).collect::<Result<Vec<_>, _>>()?;
    cover_root(base).map_err(failed("attach the tmpfs"))?;
    // What overlayfs looks up by name is relative, so that hundreds of layers fit the page that mount(2) takes.
    fchdir(base).map_err(failed("change to the tmpfs"))?;
    let directory = |name: &str| {
        mkdirat(base, name, Mode::from_raw_mode(0o755)).map_err(failed("make directories in the tmpfs"))
    };
    for (number, layer) in layers.iter().enumerate() {
        let name = number.to_string();
        directory(&name)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(layer, "", base, name.as_str(), flags).map_err(failed("attach a layer"))?;
    }
    [UPPER, "work", "root"].into_iter().try_for_each(directory)?;
    // In a user namespace there are no `trusted.*` attributes for overlayfs to note things in.
    let user_attributes = lowers.iter().any(|lower| lower.path.is_dir());
    if user_attributes {
        check_user_attributes()?;
    }
    let options = overlay_options(layers.len(), user_attributes)
        .map_err(|_| failed("name the layers")(Errno::INVAL))?;
    mount_classic("overlay", "root", "overlay", MountFlags::empty(), options.as_c_str())
        .map_err(failed("mount an overlay"))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = open_tree(CWD, "root", flags).map_err(failed("clone the mount"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("detach the tmpfs"))?;
    cover_root(root.as_fd()).map_err(failed("attach the mount"))?;
    Ok(root)
}

/// overlayfs wants the top layer first.
fn overlay_options(layers: usize, user_attributes: bool) -> Result<CString, std::ffi::NulError> {
    let lowers: Vec<_> = (0..layers).rev().map(|number| number.to_string()).collect();
    // With user attributes, it neither redirects nor leaves data below, and wants no word about it.
    let whole = if user_attributes { "userxattr" } else { "redirect_dir=off,metacopy=off" };
    // What is moved or changed must be in the upper layer as a whole: layers of images know no references to lower ones.
    CString::new(format!("lowerdir={},upperdir={UPPER},workdir=work,{whole}", lowers.join(":")))
}

/// Makes the base, unattached.
pub(super) fn base(lowers: &[Lower], upper_bytes: Option<u64>) -> Result<OwnedFd, RootfsError> {
    tmpfs(upper_bytes).map_err(failed("make a tmpfs", lowers))
}

fn failed(action: &'static str, lowers: &[Lower]) -> impl FnOnce(Errno) -> RootfsError {
    let layers = lowers.len();
    move |errno| RootfsError::Overlay { action, layers, source: errno.into() }
}

/// In the tmpfs, where this process is. Without attributes in the upper layer, overlayfs could not hide what a directory
/// made anew had in lower ones.
fn check_user_attributes() -> Result<(), RootfsError> {
    match setxattr(".", "user.overlay.cloche", b"y", XattrFlags::empty()) {
        Err(Errno::OPNOTSUPP) => Err(RootfsError::NoUserAttributes),
        result => result.map_err(|errno| RootfsError::Overlay {
            action: "set an attribute in the tmpfs",
            layers: 0,
            source: errno.into(),
        }),
    }
}

fn tmpfs(size_bytes: Option<u64>) -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "mode", "755")?;
    if let Some(size) = size_bytes {
        fsconfig_set_string(&context, "size", size.to_string())?;
    }
    fsconfig_create(&context)?;
    // For those who read the upper directory beside the container, which can make device nodes. The overlay has flags of
    // its own.
    let flags = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)
}

/// Mounts one layer, unattached: a block device or, from Linux 6.12, an image file as it is, and what the kernel
/// cannot read that way (older kernels, files on tmpfs) through loop devices.
fn mount_layer(lower: &Lower) -> Result<OwnedFd, RootfsError> {
    let Lower { path, devices } = lower;
    let failed = |how, source| RootfsError::Layer { path: path.to_owned(), how, source };
    if path.is_dir() {
        return clone_directory(path).map_err(|source| failed("", source));
    }
    match erofs(path, devices) {
        Ok(mount) => Ok(mount),
        Err(Errno::NOTBLK | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) if path.is_file() => {
            let bind = |path: &PathBuf| {
                loop_device(path).map_err(|source| failed(" as EROFS through loop devices", source))
            };
            let (device, bound) = bind(path)?;
            let (devices, all_bound): (Vec<_>, Vec<_>) =
                devices.iter().map(bind).collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
            let mount = erofs(&device, &devices)
                .map_err(|errno| failed(" as EROFS through loop devices", errno.into()))?;
            // From here on the mount keeps them bound.
            drop((bound, all_bound));
            Ok(mount)
        }
        Err(errno) => Err(failed(" as EROFS", errno.into())),
    }
}

/// A directory as a mount of its own: nothing can be written through it.
fn clone_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags)?;
    syscalls::mount_setattr(
        tree.as_fd(),
        false,
        syscalls::MountAttr::setting(MountAttrFlags::MOUNT_ATTR_RDONLY.bits().into()),
    )?;
    Ok(tree)
}

fn erofs(source: &Path, devices: &[PathBuf]) -> Result<OwnedFd, Errno> {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", source)?;
    for device in devices {
        fsconfig_set_string(&context, "device", device)?;
    }
    fsconfig_set_flag(&context, "ro")?;
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Binds a file to a free loop device. It stays bound as long as the returned descriptor or a mount needs it.
fn loop_device(file: &Path) -> io::Result<(PathBuf, OwnedFd)> {
    /// Another process may take the free device first, again and again, but not for ever.
    const ATTEMPTS: u32 = 64;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = openat(CWD, file, flags, Mode::empty())?;
    let control = openat(CWD, "/dev/loop-control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    for _ in 0..ATTEMPTS {
        let path = PathBuf::from(format!("/dev/loop{}", syscalls::loop_get_free(control.as_fd())?));
        let device = openat(CWD, &path, flags, Mode::empty())?;
        match syscalls::loop_configure(device.as_fd(), file.as_fd()) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            result => return result.map(|()| (path, device)),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_options_of_three_layers_name_the_top_first() {
        let options = overlay_options(3, false).unwrap();
        let options = options.to_str().unwrap();
        assert!(options.starts_with("lowerdir=2:1:0,upperdir=upper,workdir=work,"), "{options}");
        assert!(overlay_options(1, true).unwrap().to_str().unwrap().ends_with("work,userxattr"));
    }

    #[test]
    fn overlay_options_of_the_kernels_most_layers_fit_a_page() {
        assert!(overlay_options(500, true).unwrap().as_bytes_with_nul().len() < 4096);
    }
}
