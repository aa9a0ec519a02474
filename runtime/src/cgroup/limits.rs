//! The limits of a spec's `linux.resources` in the terms that both cgroup versions are set from.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::{
    CgroupError,
    device_policy::{DevicePolicy, policy},
};

/// A limit in bytes or a number of things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Limit {
    Unlimited,
    At(u64),
}

impl Limit {
    /// The spec's convention: negative is unlimited.
    fn from_spec(value: i64) -> Self {
        u64::try_from(value).map_or(Self::Unlimited, Self::At)
    }

    /// As cgroup v2 and v1's pids controller want it.
    pub(super) fn or_max(self) -> String {
        match self {
            Self::Unlimited => "max".into(),
            Self::At(value) => value.to_string(),
        }
    }

    /// As cgroup v1's memory and cpu controllers want it.
    pub(super) fn or_minus_one(self) -> String {
        match self {
            Self::Unlimited => "-1".into(),
            Self::At(value) => value.to_string(),
        }
    }
}

/// What to set; `None` and empty leave the kernel's default.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// Memory in bytes.
    pub(super) memory: Option<Limit>,
    /// Memory and swap together, in bytes. Only with `memory`.
    pub(super) memory_and_swap: Option<Limit>,
    /// Memory in bytes that is reclaimed last.
    pub(super) memory_reservation: Option<Limit>,
    /// Relative weight, 2 to 262144.
    pub(super) cpu_shares: Option<u64>,
    /// CPU time in microseconds for each period.
    pub(super) cpu_quota: Option<Limit>,
    /// The period in microseconds.
    pub(super) cpu_period: Option<u64>,
    /// CPUs to run on, e.g. `0-1`.
    pub(super) cpus: Option<String>,
    /// Memory nodes to allocate from.
    pub(super) mems: Option<String>,
    /// Number of tasks.
    pub(super) pids: Option<Limit>,
    /// Device access, unless everything is allowed.
    pub(super) devices: Option<DevicePolicy>,
    /// Files of the v2 directory and what to write to them.
    pub(super) unified: Vec<(String, String)>,
}

impl Limits {
    pub(super) fn from_spec(resources: Option<&LinuxResources>) -> Result<Self, CgroupError> {
        let mut limits = Self::default();
        let Some(resources) = resources else { return Ok(limits) };
        if let Some(memory) = resources.memory() {
            limits.set_memory(memory)?;
        }
        if let Some(cpu) = resources.cpu() {
            limits.set_cpu(cpu);
        }
        // Docker and podman write 0 and -1 for "no limit".
        limits.pids = resources.pids().as_ref().map(|pids| match pids.limit() {
            ..=0 => Limit::Unlimited,
            limit => Limit::from_spec(limit),
        });
        limits.devices = policy(resources.devices().as_deref().unwrap_or_default())?;
        for (file, value) in resources.unified().iter().flatten() {
            if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
                return Err(CgroupError::Limit {
                    limit: format!("linux.resources.unified {file:?}"),
                    reason: "it does not name a controller's file",
                });
            }
            limits.unified.push((file.clone(), value.clone()));
        }
        // The map has no order, and errors should not depend on chance.
        limits.unified.sort();
        Ok(limits)
    }

    fn set_memory(&mut self, memory: &LinuxMemory) -> Result<(), CgroupError> {
        // 0 stands for "not set" in all of these, as in runc.
        let limit = |value: Option<i64>| value.filter(|&value| value != 0).map(Limit::from_spec);
        self.memory = limit(memory.limit());
        self.memory_reservation = limit(memory.reservation());
        self.memory_and_swap = limit(memory.swap());
        let refused = match (self.memory, self.memory_and_swap) {
            (None | Some(Limit::Unlimited), Some(Limit::At(_))) => Some("it needs a memory limit"),
            (Some(Limit::At(memory)), Some(Limit::At(both))) if both < memory => {
                Some("memory and swap together cannot be less than memory")
            }
            _ => None,
        };
        match (refused, memory.swap()) {
            (Some(reason), Some(swap)) => {
                Err(CgroupError::Limit { limit: format!("linux.resources.memory.swap={swap}"), reason })
            }
            _ => Ok(()),
        }
    }

    fn set_cpu(&mut self, cpu: &LinuxCpu) {
        let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        self.cpu_shares = cpu.shares().filter(|&shares| shares != 0);
        self.cpu_quota = cpu.quota().filter(|&quota| quota != 0).map(Limit::from_spec);
        self.cpu_period = cpu.period().filter(|&period| period != 0);
        self.cpus = text(cpu.cpus());
        self.mems = text(cpu.mems());
    }

    /// The controllers that the limits need, each with the spec's field that needs it.
    pub(super) fn controllers(&self) -> Vec<(String, &'static str)> {
        let memory = self.memory.is_some() || self.memory_reservation.is_some();
        let cpu = self.cpu_shares.is_some() || self.cpu_quota.is_some() || self.cpu_period.is_some();
        let cpuset = self.cpus.is_some() || self.mems.is_some();
        let mut needed: Vec<(String, _)> = Vec::new();
        let mut need = |controller: &str, is_needed, field| {
            if is_needed && !needed.iter().any(|(listed, _)| listed == controller) {
                needed.push((controller.to_owned(), field));
            }
        };
        need("memory", memory, "linux.resources.memory");
        need("pids", self.pids.is_some_and(|pids| pids != Limit::Unlimited), "linux.resources.pids");
        need("cpu", cpu, "linux.resources.cpu");
        need("cpuset", cpuset, "linux.resources.cpu.cpus");
        for (file, _) in &self.unified {
            let (controller, _) = file.split_once('.').unwrap_or((file, ""));
            need(controller, true, "linux.resources.unified");
        }
        needed
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResourcesBuilder};

    use super::*;

    fn limits(memory: Option<i64>, swap: Option<i64>) -> Result<Limits, CgroupError> {
        let mut builder = LinuxMemoryBuilder::default();
        if let Some(memory) = memory {
            builder = builder.limit(memory);
        }
        if let Some(swap) = swap {
            builder = builder.swap(swap);
        }
        let resources = LinuxResourcesBuilder::default().memory(builder.build().unwrap()).build().unwrap();
        Limits::from_spec(Some(&resources))
    }

    #[test]
    fn memory_zero_and_negative_mean_unset_and_unlimited() {
        assert_eq!(limits(Some(0), None).unwrap().memory, None);
        assert_eq!(limits(Some(-1), Some(-1)).unwrap().memory_and_swap, Some(Limit::Unlimited));
        assert_eq!(limits(Some(4096), Some(4096)).unwrap().memory, Some(Limit::At(4096)));
    }

    #[test]
    fn swap_below_or_without_memory_is_refused() {
        for (memory, swap) in [(None, 1), (Some(-1), 1), (Some(4096), 4095)] {
            let error = limits(memory, Some(swap)).unwrap_err().to_string();
            assert!(error.contains(&format!("linux.resources.memory.swap={swap}")), "{error}");
        }
    }

    #[test]
    fn controllers_are_those_of_the_limits_set() {
        assert!(Limits::default().controllers().is_empty());
        let pids = |limit| {
            let pids = LinuxPidsBuilder::default().limit(limit).build().unwrap();
            let resources = LinuxResourcesBuilder::default().pids(pids).build().unwrap();
            Limits::from_spec(Some(&resources)).unwrap().controllers()
        };
        assert_eq!(pids(10), [("pids".to_owned(), "linux.resources.pids")]);
        assert!(pids(-1).is_empty());
    }

    #[test]
    fn unified_file_outside_of_a_controller_is_refused() {
        for file in ["../memory.max", "cgroup.procs", "memory"] {
            let unified = std::collections::HashMap::from([(file.to_owned(), "1".to_owned())]);
            let resources = LinuxResourcesBuilder::default().unified(unified).build().unwrap();
            assert!(Limits::from_spec(Some(&resources)).is_err(), "{file}");
        }
    }
}
