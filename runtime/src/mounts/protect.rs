//! Masked and read-only paths, and the root's own final properties.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{FileType, fstat, major, minor},
    io::Errno,
    mount::{MountPropagationFlags, mount_change},
};

use super::{
    ATTR_RDONLY, MountError, attach_at, clone_tree, make,
    options::{Bind, Datum, Options},
    paths::{self, Symlinks},
};
use crate::syscalls::{MountAttr, mount_setattr};

const READONLY: MountAttr = MountAttr::setting(ATTR_RDONLY);

/// Hides the paths: a directory behind an empty read-only one, any other file behind `/dev/null`. A path that is
/// not there needs no hiding (config-linux.md#masked-paths).
pub(crate) fn mask(root: BorrowedFd<'_>, masked: &[String]) -> Result<(), MountError> {
    let mut covers = Covers { root, directory: None, file: None };
    for path in masked.iter().map(Path::new) {
        let failed = |source| MountError::Protect { action: "mask", path: path.to_owned(), source };
        let target = match paths::open(root, path, Symlinks::Follow) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            result => result.map_err(|errno| failed(errno.into()))?,
        };
        covers.cover(target.as_fd()).map_err(failed)?;
    }
    Ok(())
}

/// What hides paths, from the first path of its kind on. Before Linux 6.15 only an attached mount can be cloned, so
/// the first directory is hidden by the mount itself, and the others by clones of it.
struct Covers<'a> {
    root: BorrowedFd<'a>,
    directory: Option<OwnedFd>,
    file: Option<OwnedFd>,
}

impl Covers<'_> {
    fn cover(&mut self, target: BorrowedFd<'_>) -> io::Result<()> {
        let cover = if paths::is_directory(target)? {
            let Some(cover) = &self.directory else {
                let cover = self.directory.insert(empty_directory()?);
                return Ok(attach_at(cover.as_fd(), target)?);
            };
            cover
        } else if let Some(cover) = &self.file {
            cover
        } else {
            self.file.insert(null_device(self.root)?)
        };
        let clone = clone_tree(cover.as_fd(), Path::new(""), Bind::Alone)?;
        Ok(attach_at(clone.as_fd(), target)?)
    }
}

/// One file system serves all masked directories.
fn empty_directory() -> io::Result<OwnedFd> {
    let datum = |key: &str, value: &str| Datum { key: key.into(), value: Some(value.into()) };
    // The directory itself takes one of the two inodes.
    let data = vec![datum("size", "4k"), datum("nr_inodes", "2"), datum("mode", "755")];
    let options = Options { attr: READONLY, data, ..Options::default() };
    make("tmpfs", "tmpfs", &options).map_err(|(_, error)| error)
}

/// The container's `/dev/null`, if it is what it says: behind anything else the file would not be hidden.
fn null_device(root: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let null = paths::open(root, Path::new("/dev/null"), Symlinks::Follow)?;
    let stat = fstat(&null)?;
    let is_null = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3);
    if is_null { Ok(null) } else { Err(io::Error::other("the container's /dev/null is not the null device")) }
}

/// Makes the paths read-only where they are there. As in runc, what the spec mounts below keeps its own mode.
pub(crate) fn make_readonly(root: BorrowedFd<'_>, readonly: &[String]) -> Result<(), MountError> {
    for path in readonly.iter().map(Path::new) {
        let failed = |source| MountError::Protect { action: "make read-only", path: path.to_owned(), source };
        let target = match paths::open(root, path, Symlinks::Follow) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            result => result.map_err(|errno| failed(errno.into()))?,
        };
        let protect = || -> io::Result<()> {
            let clone = clone_tree(target.as_fd(), Path::new(""), Bind::WithSubmounts)?;
            mount_setattr(clone.as_fd(), false, READONLY)?;
            Ok(attach_at(clone.as_fd(), target.as_fd())?)
        };
        protect().map_err(failed)?;
    }
    Ok(())
}

/// Makes the mount at the end of this path, e.g. the root, read-only as a whole.
pub(crate) fn remount_readonly(root: BorrowedFd<'_>, path: &Path) -> Result<(), MountError> {
    let failed = |source| MountError::Protect { action: "make read-only", path: path.to_owned(), source };
    let mount = paths::open(root, path, Symlinks::Follow).map_err(|errno| failed(errno.into()))?;
    mount_setattr(mount.as_fd(), false, READONLY).map_err(failed)
}

/// Sets the root's propagation, by its name in config-linux.md#rootfs-mount-propagation.
pub(crate) fn propagate_root(propagation: &str) -> Result<(), MountError> {
    let flags = match propagation {
        "private" => MountPropagationFlags::PRIVATE,
        "rprivate" => MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        "shared" => MountPropagationFlags::SHARED,
        "rshared" => MountPropagationFlags::SHARED | MountPropagationFlags::REC,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "rslave" => MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        "runbindable" => MountPropagationFlags::UNBINDABLE | MountPropagationFlags::REC,
        // `spec_check` lets nothing else pass.
        _ => return Ok(()),
    };
    mount_change("/", flags).map_err(|errno| MountError::Protect {
        action: "set the propagation of",
        path: "/".into(),
        source: errno.into(),
    })
}

/// Makes a mount read-only, whatever it is of.
pub fn make_mount_readonly(mount: BorrowedFd<'_>) -> io::Result<()> {
    mount_setattr(mount, false, READONLY)
}
