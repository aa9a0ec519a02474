//! The mounts that a spec lists.
//!
//! They are made after `pivot_root`, when no path can lead out of the container any more. What they need from the
//! caller's side, the sources of bind mounts, is opened before ([`open_sources`]). Each mount is made unattached
//! and gets all its properties before it appears at its destination.

mod cgroups;
mod copy_up;
mod options;
pub(crate) mod paths;
pub(crate) mod protect;

use std::{
    ffi::c_int,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::{Linux, LinuxIdMapping, Mount as SpecMount, Process, Spec};
use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
    },
};

use crate::{
    cgroup::Cgroup,
    namespaces::Namespaces,
    procfs,
    syscalls::{MountAttr, mount_setattr},
    user_namespace,
};
use options::{ATTR_RDONLY, Bind, Datum, Options, Propagation};
pub use options::{KNOWN as MOUNT_OPTIONS, OptionError};
use paths::{Make, Symlinks};

/// Why a mount could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// An option cannot be honoured.
    #[error("cannot mount {destination}")]
    Option {
        /// Path in the container.
        destination: PathBuf,
        /// The option.
        source: OptionError,
    },
    /// The mount is not described well.
    #[error("cannot mount {destination}: {reason}")]
    Invalid {
        /// Path in the container.
        destination: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The source of a bind mount cannot be used.
    #[error("cannot bind {origin} to {destination}: the source")]
    Source {
        /// Path on the caller's side.
        origin: PathBuf,
        /// Path in the container.
        destination: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The mount failed.
    #[error("cannot mount {what} at {destination}: {step}")]
    Mount {
        /// The file system's type, or `bind`.
        what: String,
        /// Path in the container.
        destination: PathBuf,
        /// What was attempted, with the kernel's explanation if it gave one.
        step: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A path could not be masked or made read-only.
    #[error("cannot {action} {path}")]
    Protect {
        /// What was attempted.
        action: &'static str,
        /// Path in the container.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// One mount of the spec, understood.
#[derive(Debug)]
pub(crate) struct Mount {
    destination: PathBuf,
    kind: Kind,
    options: Options,
    /// Maps of users and groups, if its files belong to other users than they say.
    maps: Option<Maps>,
}

/// Of users, and of groups.
pub(crate) type Maps = (Vec<LinuxIdMapping>, Vec<LinuxIdMapping>);

#[derive(Debug)]
enum Kind {
    Bind {
        origin: PathBuf,
        extent: Bind,
    },
    /// The container's view of its cgroups, whatever the machine's cgroup version is.
    Cgroup,
    FileSystem {
        name: String,
        source: String,
    },
}

/// Where a mount of a spec goes: a relative path is meant from the root (config.md#mounts), `.` and `..` as words only.
pub fn destination(mount: &SpecMount) -> PathBuf {
    let mut plain = PathBuf::from("/");
    for component in mount.destination().components() {
        match component {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => drop(plain.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    plain
}

/// File systems of the kernel's own: instances may be shared with the caller, so `ro` is a matter of this mount
/// only; and they must be where their path says, since masked paths are protected by that path.
const KERNEL_OWN: [&str; 10] =
    ["proc", "sysfs", "cgroup", "cgroup2", "mqueue", "devpts", "debugfs", "tracefs", "securityfs", "bpf"];

impl Mount {
    /// Reads one entry of the spec's `mounts`. `users` are the maps of the container's new user namespace.
    pub(crate) fn from_spec(mount: &SpecMount, users: Option<&Maps>) -> Result<Self, MountError> {
        let destination = destination(mount);
        let invalid = |reason| MountError::Invalid { destination: destination.clone(), reason };
        if destination == Path::new("/") {
            return Err(invalid("the destination must be another than the root itself"));
        }
        let listed = mount.options().as_deref().unwrap_or_default();
        let of_option = |source| MountError::Option { destination: destination.clone(), source };
        let mut options = options::parse(listed).map_err(of_option)?;
        let is_bind = options.bind.is_some() || mount.typ().as_deref() == Some("bind");
        if !is_bind {
            options.apply_recursive();
            options.check_for_file_system(mount.typ().as_deref().unwrap_or_default()).map_err(of_option)?;
        }
        let source = mount.source().as_deref();
        let kind = match (options.bind, mount.typ().as_deref()) {
            (Some(_), _) | (None, Some("bind")) => {
                options.check_for_bind().map_err(of_option)?;
                let origin = source.filter(|source| source.is_absolute());
                let origin =
                    origin.ok_or_else(|| invalid("the source of a bind must be an absolute path"))?;
                Kind::Bind { origin: origin.to_owned(), extent: options.bind.unwrap_or(Bind::Alone) }
            }
            (None, Some("cgroup" | "cgroup2")) => Kind::Cgroup,
            (None, Some(name)) if !name.is_empty() => Kind::FileSystem {
                name: name.to_owned(),
                source: source.unwrap_or(Path::new(name)).to_string_lossy().into_owned(),
            },
            _ => return Err(invalid("it has neither a type nor the option bind")),
        };
        let maps = (mount.uid_mappings().clone(), mount.gid_mappings().clone());
        let maps = match maps {
            (Some(uids), Some(gids)) if !uids.is_empty() && !gids.is_empty() => Some((uids, gids)),
            (uids, gids) if uids.iter().chain(&gids).any(|maps| !maps.is_empty()) => {
                return Err(invalid("uidMappings and gidMappings go together"));
            }
            // As the container's users are (config.md#posix-platform-mounts).
            _ if options.idmap.is_some() => match users {
                Some(users) => Some(users.clone()),
                None => {
                    return Err(invalid(
                        "idmap needs uidMappings and gidMappings, of the mount or of a new user namespace",
                    ));
                }
            },
            _ => None,
        };
        if maps.is_some() && !cfg!(feature = "user-namespaces") {
            return Err(invalid("uidMappings and gidMappings are not supported here"));
        }
        if maps.is_some() && !matches!(kind, Kind::Bind { .. }) {
            return Err(invalid("uidMappings and gidMappings are for bind mounts"));
        }
        Ok(Self { destination, kind, options, maps })
    }

    /// Gives the files of a new file system `linux.mountLabel`, unless the options say otherwise. The kernel's own keep
    /// theirs, by which policies know them.
    pub(crate) fn labelled(mut self, label: Option<&str>) -> Self {
        const CONTEXTS: [&str; 4] = ["context", "fscontext", "defcontext", "rootcontext"];
        let is_plain = matches!(&self.kind, Kind::FileSystem { name, .. } if !["proc", "sysfs", "mqueue"].contains(&name.as_str()));
        let data = &mut self.options.data;
        if let Some(label) = label.filter(|label| is_plain && !label.is_empty())
            && !data.iter().any(|datum| CONTEXTS.contains(&datum.key.as_str()))
        {
            data.push(Datum { key: "context".into(), value: Some(label.to_owned()) });
        }
        self
    }

    pub(crate) fn destination(&self) -> &Path {
        &self.destination
    }

    /// Whether something has to be made in it before it is read-only: device nodes, or copies of what it covers.
    fn is_filled_later(&self) -> bool {
        let is_tmpfs = matches!(&self.kind, Kind::FileSystem { name, .. } if name == "tmpfs");
        is_tmpfs
            && self.options.is_readonly()
            && (self.options.tmp_copy_up || self.destination == Path::new("/dev"))
    }

    /// Whether only a process of the caller's PID namespace can make it.
    pub(crate) fn is_mapped(&self) -> bool {
        self.maps.is_some()
    }

    pub(crate) fn is_bind(&self) -> bool {
        matches!(self.kind, Kind::Bind { .. })
    }

    fn failed(&self, step: impl Into<String>) -> impl FnOnce(io::Error) -> MountError {
        let what = match &self.kind {
            Kind::Bind { origin, .. } => origin.display().to_string(),
            Kind::Cgroup => "cgroup".into(),
            Kind::FileSystem { name, .. } => name.clone(),
        };
        let (destination, step) = (self.destination.clone(), step.into());
        |source| MountError::Mount { what, destination, step, source }
    }
}

/// Mounts made on the caller's side, by position in the spec.
#[derive(Debug)]
pub(crate) struct Sources {
    made: Vec<Option<OwnedFd>>,
    cgroups: Vec<OwnedFd>,
}

/// What is done below the clone of a bind's source, while this process's mounts are the caller's or their peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Passing {
    /// The mounts are isolated already.
    Settled,
    /// Nothing reaches the caller.
    Nothing,
    /// Mounts that are made below binds with the option `shared` reach the caller; as with runc, those below what was
    /// mounted there before, too.
    Shared,
}

/// Whether mounts may pass from a container to the caller's: both the root's propagation and a bind's must say so, as with
/// runc.
pub(crate) fn pass_on(linux: &Linux) -> bool {
    matches!(linux.rootfs_propagation().as_deref(), Some("shared" | "rshared"))
}

/// Clones the sources of bind mounts, and gives them their properties; by position in the spec.
pub(crate) fn clone_binds(mounts: &[Mount], passing: Passing) -> Result<Vec<Option<OwnedFd>>, MountError> {
    let clone = |mount: &Mount| -> Result<Option<OwnedFd>, MountError> {
        let Kind::Bind { origin, extent } = &mount.kind else { return Ok(None) };
        let tree = clone_tree(CWD, origin, *extent).map_err(|errno| MountError::Source {
            origin: origin.clone(),
            destination: mount.destination.clone(),
            source: errno.into(),
        })?;
        let stays_peer = passing == Passing::Shared && mount.options.is_shared();
        if passing != Passing::Settled && !stays_peer {
            mount_setattr(tree.as_fd(), true, MountAttr::propagating(libc::MS_SLAVE))
                .map_err(mount.failed("make it independent of the caller's"))?;
        }
        if let Some((uids, gids)) = mount.maps.as_ref().filter(|_| cfg!(feature = "user-namespaces")) {
            let namespace = user_namespace::of_maps(uids, gids)
                .map_err(|error| mount.failed("map its users")(io::Error::other(error)))?;
            let recursive = mount.options.idmap == Some(Bind::WithSubmounts);
            mount_setattr(tree.as_fd(), recursive, MountAttr::mapping(namespace.as_fd()))
                .map_err(mount.failed("map its users; does its file system allow that?"))?;
        }
        if !mount.options.copy_up {
            set_properties(mount, tree.as_fd())?;
        }
        Ok(Some(tree))
    };
    mounts.iter().map(clone).collect()
}

/// Makes what the mounts need from the caller's side: file systems, as long as the caller's are seen, which in a user
/// namespace the kernel wants for some kinds; and views of cgroups. `binds` are from [`clone_binds`].
pub(crate) fn open_sources(
    mounts: &[Mount],
    binds: Vec<Option<OwnedFd>>,
    namespaces: &Namespaces,
    cgroup: &Cgroup,
) -> Result<Sources, MountError> {
    let mut sources = Sources { made: Vec::new(), cgroups: Vec::new() };
    for (mount, bind) in mounts.iter().zip(binds) {
        let source = match &mount.kind {
            Kind::Bind { .. } => bind,
            Kind::FileSystem { name, source } => {
                let made = if mount.is_filled_later() {
                    make(name, source, &mount.options.writable())
                } else {
                    make(name, source, &mount.options)
                };
                Some(made.map_err(|(step, error)| mount.failed(step)(error))?)
            }
            // Without a namespace of its own, a new mount would show the caller's whole hierarchy.
            Kind::Cgroup if !namespaces.has_cgroup() && sources.cgroups.is_empty() => {
                for view in cgroup.views() {
                    let tree = clone_tree(CWD, view.directory, Bind::Alone);
                    let tree =
                        tree.map_err(io::Error::from).map_err(mount.failed("clone the cgroup directory"));
                    sources.cgroups.push(tree?);
                }
                None
            }
            _ => None,
        };
        sources.made.push(source);
    }
    Ok(sources)
}

/// Makes in a root file system, by itself, what mounting all of this and entering the working directory would make there:
/// for whoever then mounts it read-only. False if more than that would be made, since there is no file system for `/dev`.
pub fn make_mount_points(root: &Path, spec: &Spec) -> io::Result<bool> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty())?;
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let is_covered = |path: &Path, mounts: &[SpecMount]| {
        mounts.iter().map(destination).any(|above| path != above && path.starts_with(above))
    };
    for (index, mount) in mounts.iter().enumerate() {
        let destination = destination(mount);
        // It is made in what is mounted before.
        if is_covered(&destination, &mounts[..index]) {
            continue;
        }
        let is_file = Mount::from_spec(mount, None).is_ok_and(|mount| mount.is_bind())
            && mount.source().as_ref().is_some_and(|source| !source.is_dir());
        let make = if is_file { Make::EmptyFile } else { Make::Directory };
        paths::open_or_make(root.as_fd(), &destination, Symlinks::Follow, make)?;
    }
    let cwd = spec.process().as_ref().map(Process::cwd);
    if let Some(cwd) = cwd.filter(|cwd| !is_covered(cwd, mounts)) {
        paths::open_or_make(root.as_fd(), cwd, Symlinks::Follow, Make::Directory)?;
    }
    Ok(mounts.iter().any(|mount| destination(mount) == Path::new("/dev")))
}

/// Makes the mounts in their order. `before_cgroups` is called before the first cgroup mount, when the process must
/// be in its cgroups and their namespace.
pub(crate) fn mount_all(
    root: BorrowedFd<'_>,
    mounts: &[Mount],
    sources: Sources,
    cgroup: &Cgroup,
    mut before_cgroups: impl FnMut() -> Result<(), io::Error>,
) -> Result<(), MountError> {
    for (mount, source) in mounts.iter().zip(sources.made) {
        match (&mount.kind, source) {
            (Kind::Bind { .. }, Some(tree)) => attach_bind(root, mount, tree.as_fd())?,
            (Kind::FileSystem { name, .. }, Some(made)) => {
                let symlinks =
                    if name == "proc" || name == "sysfs" { Symlinks::Refuse } else { Symlinks::Follow };
                let (target, was_there) = place(root, mount, symlinks, Make::Directory)?;
                if mount.options.tmp_copy_up && was_there {
                    copy_up::fill(target.as_fd(), made.as_fd())
                        .map_err(mount.failed("fill it with what it covers"))?;
                }
                attach_to(target.as_fd(), mount, made.as_fd())?;
            }
            (Kind::Cgroup, _) => {
                before_cgroups().map_err(mount.failed("enter the cgroup"))?;
                cgroups::mount(root, mount, cgroup, &sources.cgroups)?;
            }
            (Kind::Bind { .. } | Kind::FileSystem { .. }, None) => {}
        }
    }
    Ok(())
}

/// Makes read-only what had to be filled before.
pub(crate) fn close_filled(root: BorrowedFd<'_>, mounts: &[Mount]) -> Result<(), MountError> {
    let filled = mounts.iter().filter(|mount| mount.is_filled_later());
    filled.map(Mount::destination).try_for_each(|destination| protect::remount_readonly(root, destination))
}

/// Clones a mount, and those below it if asked for, without attaching it anywhere.
fn clone_tree(at: BorrowedFd<'_>, path: &Path, extent: Bind) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if extent == Bind::WithSubmounts {
        flags |= OpenTreeFlags::from_bits_retain(libc::AT_RECURSIVE as u32);
    }
    if path.as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    open_tree(at, path, flags)
}

fn attach_bind(root: BorrowedFd<'_>, mount: &Mount, tree: BorrowedFd<'_>) -> Result<(), MountError> {
    let is_directory =
        paths::is_directory(tree).map_err(|errno| mount.failed("stat the source")(errno.into()))?;
    let make = if is_directory { Make::Directory } else { Make::EmptyFile };
    let (target, was_there) = place(root, mount, Symlinks::Follow, make)?;
    if mount.options.copy_up && is_directory && was_there {
        copy_up::fill(target.as_fd(), tree).map_err(mount.failed("fill it with the image's files"))?;
    }
    if mount.options.copy_up {
        set_properties(mount, tree)?;
    }
    attach_to(target.as_fd(), mount, tree)
}

fn set_properties(mount: &Mount, tree: BorrowedFd<'_>) -> Result<(), MountError> {
    for (attr, recursive) in [(mount.options.attr, false), (mount.options.recursive_attr, true)] {
        if !attr.is_noop() {
            mount_setattr(tree, recursive, attr).map_err(mount.failed("set its options"))?;
        }
    }
    Ok(())
}

/// Clones the mount that a file is on, so that it shows this file only.
pub(crate) fn clone_file(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    clone_tree(file, Path::new(""), Bind::Alone)
}

/// Shows one file at the place of another.
pub(crate) fn bind_at(file: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let clone = clone_tree(file, Path::new(""), Bind::Alone)?;
    attach_at(clone.as_fd(), target)
}

fn differ_in_kind(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    paths::is_directory(one) != paths::is_directory(other)
}

/// Files of procfs that may be covered, as in runc: what tells of the machine's size.
const COVERABLE: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
];

/// What is mounted inside of procfs could stand for a file that this runtime or the container's programs trust to be the
/// kernel's. An image leads there by a symbolic link at the destination (CVE-2019-16884, CVE-2023-28642). Another procfs
/// is the kernel's, too, and a new file system may be wanted there, if the configuration says so itself.
fn refuse_procfs(mount: &Mount, target: BorrowedFd<'_>) -> Result<(), MountError> {
    let is_procfs =
        procfs::is_on_procfs(target).map_err(|errno| mount.failed("stat the mount point")(errno.into()))?;
    let coverable = COVERABLE.iter().any(|path| mount.destination == Path::new(path));
    let is_wanted = match &mount.kind {
        Kind::Bind { .. } => coverable,
        Kind::FileSystem { name, .. } => name == "proc" || mount.destination.starts_with("/proc"),
        Kind::Cgroup => false,
    };
    if is_procfs && !is_wanted {
        let destination = mount.destination.clone();
        return Err(MountError::Invalid {
            destination,
            reason: "it leads into /proc, which is the kernel's",
        });
    }
    Ok(())
}

/// Finds a mount's destination, or makes it, which is told.
fn place(
    root: BorrowedFd<'_>,
    mount: &Mount,
    symlinks: Symlinks,
    make: Make,
) -> Result<(OwnedFd, bool), MountError> {
    let find = || match paths::open(root, &mount.destination, symlinks) {
        Err(Errno::NOENT) => {
            paths::open_or_make(root, &mount.destination, symlinks, make).map(|made| (made, false))
        }
        found => Ok((found?, true)),
    };
    let found = find().map_err(|error| {
        let step = match error.raw_os_error() {
            Some(libc::ELOOP) => {
                "it must be mounted on ordinary directory, and no symbolic link may lead there"
            }
            _ => "find or make the mount point",
        };
        mount.failed(step)(error)
    })?;
    refuse_procfs(mount, found.0.as_fd())?;
    Ok(found)
}

/// Attaches a mount at its destination, which is made if it is missing, and sets its propagation.
fn attach(
    root: BorrowedFd<'_>,
    mount: &Mount,
    made: BorrowedFd<'_>,
    symlinks: Symlinks,
    make: Make,
) -> Result<(), MountError> {
    let (target, _) = place(root, mount, symlinks, make)?;
    attach_to(target.as_fd(), mount, made)
}

fn attach_to(target: BorrowedFd<'_>, mount: &Mount, made: BorrowedFd<'_>) -> Result<(), MountError> {
    attach_at(made, target).map_err(|errno| {
        let step = match errno {
            // move_mount(2) says so of a directory on a file, too.
            Errno::NOTDIR | Errno::INVAL if differ_in_kind(made, target) => {
                "attach it: one of source and destination is a directory, and the other is not"
            }
            _ => "attach it",
        };
        mount.failed(step)(errno.into())
    })?;
    for Propagation { kind, recursive } in &mount.options.propagation {
        mount_setattr(made, *recursive, MountAttr::propagating(*kind))
            .map_err(mount.failed("set its propagation"))?;
    }
    Ok(())
}

pub(crate) fn attach_at(made: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(made, "", target, "", flags)
}

/// Makes a tmpfs, unattached.
pub(crate) fn own_tmpfs() -> io::Result<OwnedFd> {
    make("tmpfs", "tmpfs", &Options::default()).map_err(|(_, error)| error)
}

/// Makes a file system, unattached. An error says at which step, and what the kernel said about it.
fn make(name: &str, source: &str, options: &Options) -> Result<OwnedFd, (String, io::Error)> {
    let context = fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| ("ask the kernel for this file system".to_owned(), errno.into()))?;
    let configured = configure(&context, name, source, options);
    let attr = options.attr.set as c_int as u32;
    configured
        .and_then(|()| {
            let attr = MountAttrFlags::from_bits_retain(attr);
            let made = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attr);
            made.map_err(|errno| ("make the mount".to_owned(), errno.into()))
        })
        .map_err(|(step, error)| match explanation(&context) {
            Some(explanation) => (format!("{step}: {explanation}"), error),
            None => (step, error),
        })
}

fn configure(
    context: &OwnedFd,
    name: &str,
    source: &str,
    options: &Options,
) -> Result<(), (String, io::Error)> {
    let set = |key: &str, value: Option<&str>| {
        let result = match value {
            Some(value) => fsconfig_set_string(context, key, value),
            None => fsconfig_set_flag(context, key),
        };
        result.map_err(|errno| (format!("set the option {key:?}"), errno.into()))
    };
    set("source", Some(source))?;
    if options.is_readonly() && !KERNEL_OWN.contains(&name) {
        set("ro", None)?;
    }
    for datum in &options.data {
        set(&datum.key, datum.value.as_deref())?;
    }
    fsconfig_create(context).map_err(|errno| ("create it".to_owned(), errno.into()))
}

/// What the file system itself says about a failure (`e file-system: message`).
fn explanation(context: &OwnedFd) -> Option<String> {
    let mut message = [0; 256];
    let length = rustix::io::read(context, &mut message).ok()?;
    let message = String::from_utf8_lossy(message.get(..length)?);
    message.strip_prefix("e ").map(|message| message.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_label_is_the_context_of_new_file_systems_only() {
        let context = |kind: &str, option: &str| {
            let mount = serde_json::json!({
                "destination": "/x", "type": kind, "source": "/s", "options": [option],
            });
            let mount = Mount::from_spec(&serde_json::from_value(mount).unwrap(), None).unwrap();
            let data = mount.labelled(Some("a:b:c:s0:c1,c2")).options.data;
            let found = data.into_iter().find(|datum| datum.key == "context");
            found.map(|datum| datum.value.unwrap())
        };
        assert_eq!(context("tmpfs", "nosuid").as_deref(), Some("a:b:c:s0:c1,c2"));
        assert_eq!(context("devpts", "nosuid").as_deref(), Some("a:b:c:s0:c1,c2"));
        assert_eq!(context("tmpfs", "context=own").as_deref(), Some("own"));
        for (kind, option) in
            [("proc", "ro"), ("sysfs", "ro"), ("mqueue", "ro"), ("bind", "rbind"), ("cgroup", "ro")]
        {
            assert_eq!(context(kind, option), None, "{kind}");
        }
    }
}
