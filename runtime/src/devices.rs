//! Device nodes and links in the container's `/dev`.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, LinuxIdMapping};
use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, fstat, makedev, mknodat, openat,
        statat, symlinkat, unlinkat,
    },
    io::Errno,
    mount::{UnmountFlags, unmount},
};

use crate::mounts::{
    self,
    paths::{self, Make, Symlinks},
};

/// Why a device node or link could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The node cannot be made.
    #[error("cannot make the device node {path}")]
    Node {
        /// Path in the container.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Something else has the node's name.
    #[error("cannot make the device node {0}: the image has something else there")]
    Occupied(PathBuf),
    /// The numbers or the path are not possible.
    #[error("the device {path} of linux.devices is not usable: {reason}")]
    Invalid {
        /// Path in the container.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// The link cannot be made.
    #[error("cannot link {path} to {target}")]
    Link {
        /// Path in the container.
        path: PathBuf,
        /// Where it leads.
        target: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

#[derive(Debug)]
pub(crate) struct Node {
    path: PathBuf,
    kind: FileType,
    major: u32,
    minor: u32,
    mode: u32,
    owner: Option<(u32, u32)>,
}

/// config-linux.md#default-devices. `/dev/console` belongs to terminals.
const DEFAULT: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// runtime-linux.md#dev-symbolic-links, and `/dev/ptmx` of config-linux.md#default-devices.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes the default nodes and those of the spec, and the links. The caller's umask must be 0.
pub(crate) fn create(root: BorrowedFd<'_>, listed: &[LinuxDevice]) -> Result<(), DeviceError> {
    let dev = dev(root)?;
    for (path, major, minor) in DEFAULT {
        let path = PathBuf::from(path);
        // The spec's own entry for a default device says more: mode and owner.
        if !listed.iter().any(|device| *device.path() == path) {
            let kind = FileType::CharacterDevice;
            make_node_in(dev.as_fd(), &Node { path, kind, major, minor, mode: 0o666, owner: None })?;
        }
    }
    for device in listed {
        make_node(root, &node(device)?)?;
    }
    make_links(dev.as_fd())
}

/// The container's `/dev`, where everything that is not the spec's own is.
fn dev(root: BorrowedFd<'_>) -> Result<OwnedFd, DeviceError> {
    let path = Path::new("/dev");
    paths::open_or_make(root, path, Symlinks::Follow, Make::Directory)
        .map_err(|source| DeviceError::Node { path: path.to_owned(), source })
}

/// Makes the nodes of the spec for a process that cannot, in a file system that nobody sees, by their position. The maps
/// are those of the user namespace whose users own them.
pub(crate) fn make_for_other(
    listed: &[LinuxDevice],
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
) -> Result<Option<OwnedFd>, DeviceError> {
    let nodes: Vec<_> = listed.iter().map(node).collect::<Result<_, _>>()?;
    let Some(first) = nodes.iter().find(|node| node.kind != FileType::Fifo) else { return Ok(None) };
    let files =
        mounts::own_tmpfs().map_err(|source| DeviceError::Node { path: first.path.clone(), source })?;
    for (position, node) in nodes.iter().enumerate().filter(|(_, node)| node.kind != FileType::Fifo) {
        let make = || -> Result<(), Errno> {
            let (name, mode) = (position.to_string(), Mode::from_raw_mode(node.mode));
            mknodat(&files, &name, node.kind, mode, makedev(node.major, node.minor))?;
            // The caller's umask had a say.
            chmodat(&files, &name, mode, AtFlags::empty())?;
            let (uid, gid) = node.owner.unwrap_or((0, 0));
            let owner = (outside(uid, uids).ok_or(Errno::INVAL)?, outside(gid, gids).ok_or(Errno::INVAL)?);
            let owner = (Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)));
            chownat(&files, &name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
        };
        make().map_err(|errno| DeviceError::Node { path: node.path.clone(), source: errno.into() })?;
    }
    Ok(Some(files))
}

/// Who an id of a user namespace is outside of it.
fn outside(id: u32, maps: &[LinuxIdMapping]) -> Option<u32> {
    let map = maps.iter().find(|map| id >= map.container_id() && id - map.container_id() < map.size())?;
    (id - map.container_id()).checked_add(map.host_id()).filter(|id| *id != u32::MAX)
}

/// Opens the caller's nodes of the default devices, and those of the spec: in a user namespace, none can be made. Those of
/// the spec are in `made`, from [`make_for_other`], or else they are the caller's, too. FIFOs can be made, and are `None`.
pub(crate) fn open(
    listed: &[LinuxDevice],
    made: Option<BorrowedFd<'_>>,
) -> Result<Vec<(Node, Option<OwnedFd>)>, DeviceError> {
    if let (Some(made), Some(first)) = (made, listed.first()) {
        // Before Linux 6.15 only an attached mount can be cloned. Nothing of /proc is needed meanwhile.
        let failed = |errno: Errno| DeviceError::Node { path: first.path().clone(), source: errno.into() };
        let place = openat(CWD, "/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        mounts::attach_at(made, place.map_err(failed)?.as_fd()).map_err(failed)?;
        let opened = open_all(listed, Some(made));
        unmount("/proc", UnmountFlags::DETACH).map_err(failed)?;
        return opened;
    }
    open_all(listed, None)
}

fn open_all(
    listed: &[LinuxDevice],
    made: Option<BorrowedFd<'_>>,
) -> Result<Vec<(Node, Option<OwnedFd>)>, DeviceError> {
    let mut nodes = Vec::new();
    for (path, major, minor) in DEFAULT {
        if !listed.iter().any(|device| *device.path() == Path::new(path)) {
            let kind = FileType::CharacterDevice;
            let node = Node { path: path.into(), kind, major, minor, mode: 0o666, owner: None };
            nodes.push((node, None));
        }
    }
    for (position, device) in listed.iter().enumerate() {
        nodes.push((node(device)?, made.map(|made| (made, position.to_string()))));
    }
    let open = |(node, made): (Node, Option<(BorrowedFd<'_>, String)>)| {
        if node.kind == FileType::Fifo {
            return Ok((node, None));
        }
        let failed = |errno: Errno| DeviceError::Node { path: node.path.clone(), source: errno.into() };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match &made {
            Some((made, name)) => openat(made, name.as_str(), flags, Mode::empty()),
            None => openat(CWD, &node.path, flags, Mode::empty()),
        };
        let file = file.map_err(failed)?;
        let stat = fstat(&file).map_err(failed)?;
        let same = FileType::from_raw_mode(stat.st_mode) == node.kind
            && stat.st_rdev == makedev(node.major, node.minor);
        if !same {
            let reason = "in a user namespace it is the caller's, and that has other numbers";
            return Err(DeviceError::Invalid { path: node.path.clone(), reason });
        }
        let clone = mounts::clone_file(file.as_fd()).map_err(failed)?;
        Ok((node, Some(clone)))
    };
    nodes.into_iter().map(open).collect()
}

/// Shows the caller's nodes in the container, and makes the links.
pub(crate) fn bind(root: BorrowedFd<'_>, nodes: &[(Node, Option<OwnedFd>)]) -> Result<(), DeviceError> {
    for (node, file) in nodes {
        let Some(file) = file else {
            make_node(root, node)?;
            continue;
        };
        let failed = |source| DeviceError::Node { path: node.path.clone(), source };
        let target =
            paths::open_or_make(root, &node.path, Symlinks::Follow, Make::EmptyFile).map_err(failed)?;
        mounts::attach_at(file.as_fd(), target.as_fd()).map_err(|errno| failed(errno.into()))?;
    }
    make_links(dev(root)?.as_fd())
}

fn node(device: &LinuxDevice) -> Result<Node, DeviceError> {
    let path = device.path().clone();
    let invalid = |reason| DeviceError::Invalid { path: device.path().clone(), reason };
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => return Err(invalid("the type must be b, c, u or p")),
    };
    let number = |number| u32::try_from(number).map_err(|_| invalid("a device number is out of range"));
    let (major, minor) =
        if kind == FileType::Fifo { (0, 0) } else { (number(device.major())?, number(device.minor())?) };
    if !path.is_absolute() || path.file_name().is_none() {
        return Err(invalid("the path must be absolute and name a file"));
    }
    if device.uid() == Some(u32::MAX) || device.gid() == Some(u32::MAX) {
        return Err(invalid("4294967295 is no id"));
    }
    // Some callers put the type's bits into the mode, too.
    let mode = device.file_mode().unwrap_or(0o666) & 0o7777;
    let owner = Some((device.uid().unwrap_or(0), device.gid().unwrap_or(0))).filter(|owner| *owner != (0, 0));
    Ok(Node { path, kind, major, minor, mode, owner })
}

fn make_node(root: BorrowedFd<'_>, node: &Node) -> Result<(), DeviceError> {
    let failed = |source| DeviceError::Node { path: node.path.clone(), source };
    let parent = node.path.parent().ok_or_else(|| failed(Errno::INVAL.into()))?;
    let directory = paths::open_or_make(root, parent, Symlinks::Follow, Make::Directory).map_err(failed)?;
    make_node_in(directory.as_fd(), node)
}

/// Makes a node in the directory that its path leads to.
fn make_node_in(directory: BorrowedFd<'_>, node: &Node) -> Result<(), DeviceError> {
    let errno_failed = |errno: Errno| DeviceError::Node { path: node.path.clone(), source: errno.into() };
    let name = node.path.file_name().ok_or_else(|| errno_failed(Errno::INVAL))?;
    let number = makedev(node.major, node.minor);
    match mknodat(directory, name, node.kind, Mode::from_raw_mode(node.mode), number) {
        Err(Errno::EXIST) => {
            let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(errno_failed)?;
            let same = FileType::from_raw_mode(stat.st_mode) == node.kind
                && (node.kind == FileType::Fifo || stat.st_rdev == number);
            if !same {
                return Err(DeviceError::Occupied(node.path.clone()));
            }
        }
        result => result.map_err(errno_failed)?,
    }
    if let Some((uid, gid)) = node.owner {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(errno_failed)?;
    }
    Ok(())
}

fn make_links(dev: BorrowedFd<'_>) -> Result<(), DeviceError> {
    LINKS.into_iter().try_for_each(|(name, target)| make_link(dev, name, target))
}

fn make_link(dev: BorrowedFd<'_>, name: &'static str, target: &'static str) -> Result<(), DeviceError> {
    let make = || symlinkat(target, dev, name);
    let made = match make() {
        // The image's ptmx would be the caller's multiplexer; the other links may well be the image's own.
        Err(Errno::EXIST) if name == "ptmx" => unlinkat(dev, name, AtFlags::empty()).and_then(|()| make()),
        Err(Errno::EXIST) => Ok(()),
        result => result,
    };
    made.map_err(|errno| DeviceError::Link {
        path: Path::new("/dev").join(name),
        target,
        source: errno.into(),
    })
}
