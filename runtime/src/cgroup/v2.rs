//! The unified hierarchy: making a cgroup whose parents hand the needed controllers down, and its limits.

use std::path::{Path, PathBuf};

use super::{
    CgroupError, files,
    limits::{BFQ_WEIGHT, Limit, Limits},
    make_leaf_that_moves, make_parent,
};

/// Wanted for every container where they exist: for what it uses, and so that out-of-memory is seen.
const WANTED: [&str; 3] = ["memory", "pids", "io"];

/// Makes `relative` under `root` with the controllers that `limits` need.
pub(super) fn create(root: &Path, relative: &Path, limits: &Limits) -> Result<PathBuf, CgroupError> {
    let needed = needed(limits);
    let mut directory = root.to_owned();
    let mut names = relative.iter().peekable();
    while let Some(name) = names.next() {
        enable(&directory, &needed)?;
        directory.push(name);
        if names.peek().is_some() {
            make_parent(&directory)?;
        } else {
            make_leaf_that_moves(&directory)?;
        }
    }
    Ok(directory)
}

/// Hands the controllers that `limits` need down to the cgroup `relative`, which is there already.
pub(super) fn hand_down(root: &Path, relative: &Path, limits: &Limits) -> Result<(), CgroupError> {
    let needed = needed(limits);
    let parents = relative.ancestors().skip(1).collect::<Vec<_>>();
    parents.into_iter().rev().try_for_each(|parent| enable(&root.join(parent), &needed))
}

/// The controllers, by their names on v2.
fn needed(limits: &Limits) -> Vec<(String, &'static str)> {
    let mut needed = limits.controllers();
    for (controller, _) in &mut needed {
        if controller == "blkio" {
            "io".clone_into(controller);
        }
    }
    needed
}

/// Makes `relative` under `root` without controllers.
pub(super) fn create_bare(root: &Path, relative: &Path) -> Result<PathBuf, CgroupError> {
    let directory = root.join(relative);
    let parents: Vec<_> = directory.ancestors().skip(1).take_while(|parent| *parent != root).collect();
    parents.into_iter().rev().try_for_each(make_parent)?;
    make_leaf_that_moves(&directory)?;
    Ok(directory)
}

/// Hands controllers down to the children of `directory`.
fn enable(directory: &Path, needed: &[(String, &'static str)]) -> Result<(), CgroupError> {
    let read = |file| {
        files::read(directory, file).map_err(|source| CgroupError::Io {
            action: "read".into(),
            path: directory.join(file),
            source,
        })
    };
    let enabled = read("cgroup.subtree_control")?;
    let is_in = |list: &str, controller: &str| list.split_whitespace().any(|listed| listed == controller);
    let wanted =
        WANTED.into_iter().filter(|wanted| !needed.iter().any(|(controller, _)| controller == wanted));
    let missing_needed: Vec<_> =
        needed.iter().filter(|(controller, _)| !is_in(&enabled, controller)).collect();
    let missing_wanted: Vec<_> = wanted.filter(|controller| !is_in(&enabled, controller)).collect();
    if missing_needed.is_empty() && missing_wanted.is_empty() {
        return Ok(());
    }
    let available = read("cgroup.controllers")?;
    // Only the real root, which has no type, may have processes and hand controllers down. Others are refused some, and of
    // the rest, those for threads, become the top of a tree whose cgroups take no processes (kernel: cgroup-v2.rst,
    // "No Internal Process Constraint" and "Threads").
    let mut is_occupied = directory.join("cgroup.type").exists()
        && !files::read(directory, "cgroup.procs").unwrap_or_default().trim().is_empty();
    for (controller, limit) in missing_needed {
        let refused = |reason| CgroupError::NoController { controller: controller.clone(), limit, reason };
        if !is_in(&available, controller) {
            return Err(refused(format!(": {}/cgroup.controllers lacks it", directory.display())));
        }
        is_occupied = is_occupied && !step_aside(directory)?;
        if is_occupied {
            let reason = format!(": {} has processes of its own; move them to a child", directory.display());
            return Err(refused(reason));
        }
        files::write(directory, "cgroup.subtree_control", &format!("+{controller}"))?;
    }
    for controller in missing_wanted.into_iter().filter(|controller| is_in(&available, controller)) {
        // Nobody asked for it: without it, only statistics are missing.
        if !is_occupied {
            let _ = files::write(directory, "cgroup.subtree_control", &format!("+{controller}"));
        }
    }
    Ok(())
}

/// Moves this process out of a cgroup that is to hand controllers down, if it alone is in there: a plain user's, whose
/// containers' cgroups are below its own. Who has made that one removes it, with all below it.
fn step_aside(directory: &Path) -> Result<bool, CgroupError> {
    let own = std::process::id().to_string();
    if files::read(directory, "cgroup.procs").unwrap_or_default().trim() != own {
        return Ok(false);
    }
    let aside = directory.join(format!("cloche-monitor-{own}"));
    make_parent(&aside)?;
    files::write(&aside, "cgroup.procs", &own)?;
    Ok(true)
}

/// Sets the limits of the container's directory.
pub(super) fn apply(directory: &Path, limits: &Limits) -> Result<(), CgroupError> {
    if let Some(memory) = limits.memory {
        files::write(directory, "memory.max", &memory.or_max())?;
    }
    // Without a limit on memory, one on both together means nothing.
    if let Some(both) = limits.memory_and_swap.or(limits.memory.filter(|memory| *memory == Limit::Unlimited))
    {
        set_swap(directory, limits.memory, both)?;
    }
    if let Some(reservation) = limits.memory_reservation {
        files::write(directory, "memory.low", &reservation.or_max())?;
    }
    if let Some(shares) = limits.cpu_shares {
        files::write(directory, "cpu.weight", &weight(shares).to_string())?;
    }
    match (limits.cpu_quota, limits.cpu_period) {
        (None, None) => {}
        (quota, None) => files::write(directory, "cpu.max", &quota.unwrap_or(Limit::Unlimited).or_max())?,
        (quota, Some(period)) => {
            let quota = match quota {
                Some(quota) => quota.or_max(),
                None => present_quota(directory),
            };
            files::write(directory, "cpu.max", &format!("{quota} {period}"))?;
        }
    }
    if let Some(cpus) = &limits.cpus {
        files::write(directory, "cpuset.cpus", cpus)?;
    }
    if let Some(mems) = &limits.mems {
        files::write(directory, "cpuset.mems", mems)?;
    }
    if let Some(pids) = limits.pids {
        let written = files::write_if_present(directory, "pids.max", &pids.or_max())?;
        // An unlimited number is what a cgroup without the controller has, too.
        if !written && pids != Limit::Unlimited {
            let reason = format!(": {} was made without it", directory.display());
            return Err(CgroupError::NoController {
                controller: "pids".into(),
                limit: "linux.resources.pids",
                reason,
            });
        }
    }
    for setting in &limits.settings {
        let Some(file) = &setting.v2 else {
            let reason = "cgroup v2 has no such limit";
            return Err(CgroupError::Limit { limit: setting.field.into(), reason });
        };
        if file == BFQ_WEIGHT && !directory.join(file).exists() {
            // Without that scheduler the weight is the cost model's.
            let weight = setting
                .value
                .v2
                .parse()
                .map_or(setting.value.v2.clone(), |weight| io_weight(weight).to_string());
            files::write(directory, "io.weight", &weight)?;
            continue;
        }
        files::write(directory, file, &setting.value.v2)?;
    }
    limits.unified.iter().try_for_each(|(file, value)| files::write(directory, file, value))
}

/// The file has quota and period; one is not written without the other.
fn present_quota(directory: &Path) -> String {
    let present = files::read(directory, "cpu.max").unwrap_or_default();
    present.split_whitespace().next().unwrap_or("max").to_owned()
}

/// v2 limits swap alone, the spec memory and swap together.
fn set_swap(directory: &Path, memory: Option<Limit>, both: Limit) -> Result<(), CgroupError> {
    let swap = match (memory, both) {
        (Some(Limit::At(memory)), Limit::At(both)) => Limit::At(both.saturating_sub(memory)),
        _ => Limit::Unlimited,
    };
    let written = files::write_if_present(directory, "memory.swap.max", &swap.or_max())?;
    match swap {
        // A kernel that does not account for swap can still keep to "none" or "any".
        _ if written => Ok(()),
        Limit::At(0) | Limit::Unlimited => Ok(()),
        Limit::At(swap) => Err(CgroupError::Limit {
            limit: format!("linux.resources.memory.swap ({swap} bytes of swap)"),
            reason: "this kernel does not account for swap",
        }),
    }
}

/// v1's CPU shares, 2 to 262144, on v2's scale, 1 to 10000. The formula is the one of the runtime-spec's users
/// (Kubernetes KEP-2254), so a container gets the same share from each of them.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// v1's weights of block devices, 10 to 1000, on v2's scale, 1 to 10000, as other runtimes do.
fn io_weight(weight: u64) -> u64 {
    1 + (weight.clamp(10, 1000) - 10) * 9999 / 990
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_of_block_devices_is_the_cost_models_where_there_is_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let mut block_io = oci_spec::runtime::LinuxBlockIo::default();
        block_io.set_weight(Some(500));
        let mut resources = oci_spec::runtime::LinuxResources::default();
        resources.set_block_io(Some(block_io));
        let limits = Limits::from_spec(Some(&resources)).unwrap();
        let read = |file: &str| std::fs::read_to_string(directory.path().join(file)).unwrap();
        std::fs::write(directory.path().join("io.weight"), "").unwrap();
        apply(directory.path(), &limits).unwrap();
        assert_eq!(read("io.weight"), "4950");
        std::fs::write(directory.path().join(BFQ_WEIGHT), "").unwrap();
        apply(directory.path(), &limits).unwrap();
        assert_eq!(read(BFQ_WEIGHT), "500");
        assert_eq!([10, 1000].map(io_weight), [1, 10_000]);
    }

    #[test]
    fn weight_of_the_extremes_and_the_default_is_on_the_v2_scale() {
        assert_eq!([0, 2, 1024, 262_144, u64::MAX].map(weight), [1, 1, 39, 10_000, 10_000]);
    }

    #[test]
    fn period_alone_keeps_the_quota() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("cpu.max");
        std::fs::write(&file, "50000 100000\n").unwrap();
        let limits = Limits { cpu_period: Some(200_000), ..Limits::default() };
        apply(directory.path(), &limits).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap().trim(), "50000 200000");
    }
}
