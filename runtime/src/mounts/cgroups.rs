//! The container's view of its cgroups at a mount of type `cgroup`: on v2 the one hierarchy, on v1 a tmpfs with a
//! directory for each hierarchy that the container has a cgroup in.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::fs::{Mode, mkdirat, symlinkat};

use super::{Make, Mount, MountError, Options, Symlinks, attach, attach_at, make, options::Datum, paths};
use crate::{
    cgroup::{Cgroup, Layout, SYSTEMD},
    syscalls::mount_setattr,
};

/// Mounts the view. `clones` are mounts of the container's own directories, in the order of [`Cgroup::views`], to
/// be used where there is no cgroup namespace; with one, they are empty.
pub(super) fn mount(
    root: BorrowedFd<'_>,
    mount: &Mount,
    cgroup: &Cgroup,
    clones: &[OwnedFd],
) -> Result<(), MountError> {
    if cgroup.layout() == Layout::V2 || !cfg!(feature = "cgroup-v1") {
        let view = view_mount(mount, None, clones.first())?;
        return attach(root, mount, view.as_fd(), Symlinks::Follow, Make::Directory);
    }
    let mode = Datum { key: "mode".into(), value: Some("755".into()) };
    let options = Options { data: vec![mode], ..Options::default() };
    let tmpfs = make("tmpfs", "cgroup", &options).map_err(|(step, error)| mount.failed(step)(error))?;
    attach(root, mount, tmpfs.as_fd(), Symlinks::Follow, Make::Directory)?;
    for (number, view) in cgroup.views().enumerate() {
        let made = view_mount(mount, view.controllers, clones.get(number))?;
        let name = view.controllers.unwrap_or("unified");
        attach_view(tmpfs.as_fd(), made.as_fd(), name).map_err(mount.failed(format!("attach {name}")))?;
    }
    mount_setattr(tmpfs.as_fd(), false, mount.options.attr).map_err(mount.failed("set its options"))
}

/// One hierarchy's mount, unattached.
fn view_mount(
    mount: &Mount,
    controllers: Option<&str>,
    clone: Option<&OwnedFd>,
) -> Result<OwnedFd, MountError> {
    if let Some(clone) = clone {
        let clone = clone.try_clone().map_err(mount.failed("duplicate the cgroup mount"))?;
        mount_setattr(clone.as_fd(), false, mount.options.attr).map_err(mount.failed("set its options"))?;
        return Ok(clone);
    }
    let of_controllers = controllers.into_iter().flat_map(|list| list.split(','));
    let option = |name: &str| match name {
        SYSTEMD => Datum { key: "name".into(), value: Some(name.into()) },
        controller => Datum { key: controller.into(), value: None },
    };
    let data = of_controllers.map(option).collect();
    let options = Options { attr: mount.options.attr, data, ..Options::default() };
    let name = if controllers.is_some() { "cgroup" } else { "cgroup2" };
    make(name, "cgroup", &options).map_err(|(step, error)| mount.failed(step)(error))
}

fn attach_view(tmpfs: BorrowedFd<'_>, made: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    mkdirat(tmpfs, name, Mode::from_raw_mode(0o755))?;
    let target = paths::open(tmpfs, Path::new(name), Symlinks::Refuse)?;
    attach_at(made, target.as_fd())?;
    if name.contains(',') {
        name.split(',').try_for_each(|controller| symlinkat(name, tmpfs, controller))?;
    }
    Ok(())
}
