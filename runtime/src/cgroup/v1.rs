//! Hierarchies of cgroup v1: one directory for each controller in use.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::event::EventfdFlags;

use super::{
    CgroupError,
    device_policy::DevicePolicy,
    files,
    limits::{Limit, Limits},
    make_leaf, make_leaf_that_moves, make_parent,
};

/// The hierarchies that a container can have a cgroup in: controllers, and systemd's own, which has none.
pub(super) const CONTROLLERS: [&str; 15] = [
    "memory",
    "pids",
    "devices",
    "cpu",
    "cpuset",
    "freezer",
    "cpuacct",
    "blkio",
    "hugetlb",
    "rdma",
    "net_cls",
    "net_prio",
    "perf_event",
    "misc",
    SYSTEMD,
];
/// The hierarchy by which systemd keeps processes apart, as it is mounted; the kernel calls it `name=systemd`.
pub(crate) const SYSTEMD: &str = "systemd";
/// Used for every container where they exist: for its memory, and to find and kill its processes.
pub(super) const WANTED: [&str; 2] = ["memory", "pids"];
/// As [`WANTED`] where there is no v2 hierarchy beside them, which freezes and tells of CPU time.
pub(super) const WANTED_ALONE: [&str; 4] = ["memory", "pids", "freezer", "cpuacct"];

/// A container's directory in one hierarchy.
#[derive(Debug)]
pub(super) struct Directory {
    /// The hierarchy's controllers as its mount point is named, e.g. `cpu,cpuacct`.
    controllers: String,
    path: PathBuf,
}

impl Directory {
    #[cfg(test)]
    pub(super) fn new(controllers: &str, path: PathBuf) -> Self {
        Self { controllers: controllers.into(), path }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn controllers(&self) -> &str {
        &self.controllers
    }

    /// Another directory of the same hierarchy.
    pub(super) fn replaced(&self, path: PathBuf) -> Self {
        Self { controllers: self.controllers.clone(), path }
    }

    pub(super) fn has(&self, controller: &str) -> bool {
        self.controllers.split(',').any(|listed| listed == controller)
    }
}

/// Whether any hierarchy is mounted under `root`.
pub(super) fn any_hierarchy(root: &Path) -> bool {
    CONTROLLERS.iter().any(|controller| files::is_cgroup1(&root.join(controller)))
}

/// Where a controller's hierarchy is mounted, with its mount point's name: `cpu` may be a link to `cpu,cpuacct`.
fn hierarchy(root: &Path, controller: &str) -> Option<(String, PathBuf)> {
    let mount_point = root.join(controller);
    if !cfg!(feature = "cgroup-v1") || !files::is_cgroup1(&mount_point) {
        return None;
    }
    let mount_point = match fs::read_link(&mount_point) {
        Ok(target) => root.join(target),
        Err(_) => mount_point,
    };
    let name = mount_point.file_name()?.to_str()?.to_owned();
    Some((name, mount_point))
}

/// Makes `relative` in each hierarchy that `limits` need, and adds it to `made` at once, so that the caller can
/// clean up after a failure.
pub(super) fn create(
    root: &Path,
    relative: &Path,
    limits: &Limits,
    wanted: &[&str],
    made: &mut Vec<Directory>,
) -> Result<(), CgroupError> {
    if !cfg!(feature = "cgroup-v1") {
        return Err(CgroupError::NotMounted);
    }
    if let Some((file, _)) = limits.unified.first() {
        return Err(CgroupError::Limit {
            limit: format!("linux.resources.unified {file:?}"),
            reason: "invalid configuration: this machine has cgroup v1",
        });
    }
    let mut needed = limits.controllers();
    if limits.devices.is_some() {
        needed.push(("devices".into(), "linux.resources.devices"));
    }
    for controller in CONTROLLERS {
        let limit = needed.iter().find(|(needed, _)| *needed == controller).map(|(_, limit)| *limit);
        if limit.is_none() && !wanted.contains(&controller) {
            continue;
        }
        let Some((name, mount_point)) = hierarchy(root, controller) else {
            match limit {
                Some(limit) => {
                    let reason = format!(": there is no v1 hierarchy at {}", root.join(controller).display());
                    return Err(CgroupError::NoController { controller: controller.into(), limit, reason });
                }
                None => continue,
            }
        };
        if made.iter().any(|directory| directory.controllers == name) {
            continue;
        }
        let path = mount_point.join(relative);
        let parents: Vec<_> = path.ancestors().skip(1).take_while(|parent| *parent != mount_point).collect();
        for parent in parents.into_iter().rev() {
            make_parent(parent)?;
            inherit_cpuset(controller, parent)?;
        }
        let make = if controller == "freezer" { make_leaf_that_moves } else { make_leaf };
        make(&path)?;
        made.push(Directory { controllers: name, path: path.clone() });
        inherit_cpuset(controller, &path)?;
    }
    Ok(())
}

/// A v1 cpuset starts empty and takes no process until it has CPUs and memory nodes: its parent's, at first.
fn inherit_cpuset(controller: &str, directory: &Path) -> Result<(), CgroupError> {
    if controller != "cpuset" {
        return Ok(());
    }
    let read = |directory: &Path, file| {
        files::read(directory, file).map_err(|source| CgroupError::Io {
            action: "read".into(),
            path: directory.join(file),
            source,
        })
    };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Some(parent) = directory.parent()
            && read(directory, file)?.trim().is_empty()
        {
            files::write(directory, file, read(parent, file)?.trim())?;
        }
    }
    Ok(())
}

/// The directories of `relative` that exist.
pub(super) fn open(root: &Path, relative: &Path) -> Vec<Directory> {
    let mut found: Vec<Directory> = Vec::new();
    for (controllers, mount_point) in CONTROLLERS.iter().filter_map(|controller| hierarchy(root, controller))
    {
        let path = mount_point.join(relative);
        if path.is_dir() && !found.iter().any(|directory| directory.controllers == controllers) {
            found.push(Directory { controllers, path });
        }
    }
    found
}

/// A controller's directory.
pub(super) fn of<'a>(directories: &'a [Directory], controller: &str) -> Option<&'a Path> {
    let mut here = directories.iter().filter(|_| cfg!(feature = "cgroup-v1"));
    here.find(|directory| directory.has(controller)).map(Directory::path)
}

/// Sets the limits.
pub(super) fn apply(directories: &[Directory], limits: &Limits) -> Result<(), CgroupError> {
    if !cfg!(feature = "cgroup-v1") {
        return Err(CgroupError::NotMounted);
    }
    let write = |controller: &'static str, limit: &'static str, file: &str, value: &str| match directories
        .iter()
        .find(|directory| directory.has(controller))
    {
        Some(directory) => files::write(directory.path(), file, value),
        None => Err(CgroupError::NoController {
            controller: controller.into(),
            limit,
            reason: ": the container was started without it".into(),
        }),
    };
    if let Some(memory) = limits.memory {
        let set =
            || write("memory", "linux.resources.memory", "memory.limit_in_bytes", &memory.or_minus_one());
        // Without a limit on memory, one on both together means nothing.
        let both =
            limits.memory_and_swap.or_else(|| Some(memory).filter(|memory| *memory == Limit::Unlimited));
        match (set(), both) {
            // Memory alone cannot be more than memory and swap together, so which of them goes first depends.
            (Err(_), Some(both)) => {
                set_memory_and_swap(of(directories, "memory"), limits.memory, both)?;
                set()?;
            }
            (result, _) => result?,
        }
    }
    if let Some(both) = limits.memory_and_swap {
        set_memory_and_swap(of(directories, "memory"), limits.memory, both)?;
    }
    for setting in &limits.settings {
        let Some(file) = &setting.v1 else {
            let reason = "cgroup v1 has no such limit";
            return Err(CgroupError::Limit { limit: setting.field.into(), reason });
        };
        write(setting.controller, setting.field, file, &setting.value.v1)?;
    }
    if let Some(reservation) = limits.memory_reservation {
        let value = reservation.or_minus_one();
        write("memory", "linux.resources.memory", "memory.soft_limit_in_bytes", &value)?;
    }
    if let Some(shares) = limits.cpu_shares {
        write("cpu", "linux.resources.cpu", "cpu.shares", &shares.to_string())?;
    }
    let set_quota = || match limits.cpu_quota {
        Some(quota) => write("cpu", "linux.resources.cpu", "cpu.cfs_quota_us", &quota.or_minus_one()),
        None => Ok(()),
    };
    if let Some(period) = limits.cpu_period {
        let set = || write("cpu", "linux.resources.cpu", "cpu.cfs_period_us", &period.to_string());
        // Their ratio may not exceed the parent's at any moment, so which of them goes first depends.
        set().or_else(|_| set_quota().and_then(|()| set()))?;
    }
    set_quota()?;
    if let Some(cpus) = &limits.cpus {
        write("cpuset", "linux.resources.cpu.cpus", "cpuset.cpus", cpus)?;
    }
    if let Some(mems) = &limits.mems {
        write("cpuset", "linux.resources.cpu.mems", "cpuset.mems", mems)?;
    }
    match limits.pids {
        // What a cgroup without the controller has, too.
        Some(Limit::Unlimited) if !directories.iter().any(|directory| directory.has("pids")) => {}
        Some(pids) => write("pids", "linux.resources.pids", "pids.max", &pids.or_max())?,
        None => {}
    }
    Ok(())
}

fn set_memory_and_swap(
    directory: Option<&Path>,
    memory: Option<Limit>,
    both: Limit,
) -> Result<(), CgroupError> {
    let file = "memory.memsw.limit_in_bytes";
    let written = match directory {
        Some(directory) => files::write_if_present(directory, file, &both.or_minus_one())?,
        None => false,
    };
    // A kernel that does not account for swap can still keep to "any", and to "none" if there is none.
    if written || both == Limit::Unlimited || Some(both) == memory {
        return Ok(());
    }
    Err(CgroupError::Limit {
        limit: format!("linux.resources.memory.swap={}", both.or_minus_one()),
        reason: "this kernel does not account for swap",
    })
}

/// What to write to which file of the devices controller, in this order.
pub(super) fn device_lines(policy: &DevicePolicy) -> Vec<(&'static str, String)> {
    let (by_default, exceptions) = if policy.allow_by_default {
        ("devices.allow", "devices.deny")
    } else {
        ("devices.deny", "devices.allow")
    };
    let lines = policy.exceptions.iter().map(|exception| (exceptions, exception.to_string()));
    [(by_default, "a".to_owned())].into_iter().chain(lines).collect()
}

/// Asks for a note when the limit of this memory cgroup is hit (kernel: `cgroup-v1/memory.rst` §10).
pub(super) fn oom_event(memory: &Path) -> Result<OwnedFd, CgroupError> {
    let failed = |source: io::Error| CgroupError::Io {
        action: "watch for out-of-memory in".into(),
        path: memory.to_owned(),
        source,
    };
    let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
    let control = fs::File::open(memory.join("memory.oom_control")).map_err(failed)?;
    let request = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
    files::write(memory, "cgroup.event_control", &request)?;
    Ok(event)
}
