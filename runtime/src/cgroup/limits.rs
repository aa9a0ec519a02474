//! The limits of a spec's `linux.resources` in the terms that both cgroup versions are set from.

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice, LinuxWeightDevice,
};

use super::{
    CgroupError,
    device_policy::{DevicePolicy, policy},
};

/// cgroup v2's weight for the BFQ scheduler, which not every kernel has.
pub(super) const BFQ_WEIGHT: &str = "io.bfq.weight";

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

/// A limit that is one write to one file, in one of the versions or both.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// The spec's field.
    pub(super) field: &'static str,
    /// The controller that it needs.
    pub(super) controller: &'static str,
    /// The file of v1, if v1 has this limit.
    pub(super) v1: Option<String>,
    /// The file of v2, if v2 has it.
    pub(super) v2: Option<String>,
    pub(super) value: V1V2,
}

/// What to write: the same to both, or a line of each version's own.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct V1V2 {
    pub(super) v1: String,
    pub(super) v2: String,
}

impl V1V2 {
    fn same(value: impl ToString) -> Self {
        Self { v1: value.to_string(), v2: value.to_string() }
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
    /// All that need no thought.
    pub(super) settings: Vec<Setting>,
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
        if let Some(block_io) = resources.block_io() {
            limits.set_block_io(block_io);
        }
        limits.set_others(resources)?;
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
        if let Some(swappiness) = memory.swappiness() {
            let files = (Some("memory.swappiness"), None);
            self.set("linux.resources.memory.swappiness", "memory", files, swappiness);
        }
        if memory.disable_oom_killer() == Some(true) {
            let files = (Some("memory.oom_control"), None);
            self.set("linux.resources.memory.disableOOMKiller", "memory", files, 1);
        }
        if let Some(tcp) = memory.kernel_tcp().filter(|&limit| limit != 0) {
            let files = (Some("memory.kmem.tcp.limit_in_bytes"), None);
            self.set("linux.resources.memory.kernelTCP", "memory", files, tcp);
        }
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

    /// A setting with the same value in both versions.
    fn set(
        &mut self,
        field: &'static str,
        controller: &'static str,
        files: (Option<&str>, Option<&str>),
        value: impl ToString,
    ) {
        let (v1, v2) = (files.0.map(str::to_owned), files.1.map(str::to_owned));
        self.settings.push(Setting { field, controller, v1, v2, value: V1V2::same(value) });
    }

    fn set_block_io(&mut self, block_io: &LinuxBlockIo) {
        if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
            let files = (Some("blkio.bfq.weight"), Some(BFQ_WEIGHT));
            self.set("linux.resources.blockIO.weight", "blkio", files, weight);
        }
        for device in block_io.weight_device().iter().flatten() {
            let weight = LinuxWeightDevice::weight(device).unwrap_or(0);
            let line = format!("{}:{} {weight}", device.major(), device.minor());
            let files = (Some("blkio.bfq.weight_device"), Some("io.bfq.weight"));
            self.set("linux.resources.blockIO.weightDevice", "blkio", files, line);
        }
        let mut throttle = |field, devices: &Option<Vec<LinuxThrottleDevice>>, file: &str, key: &str| {
            for device in devices.iter().flatten() {
                let (number, rate) = (format!("{}:{}", device.major(), device.minor()), device.rate());
                // 0 lifts the limit in v1.
                let limit = if rate == 0 { "max".to_owned() } else { rate.to_string() };
                self.settings.push(Setting {
                    field,
                    controller: "blkio",
                    v1: Some(format!("blkio.throttle.{file}")),
                    v2: Some("io.max".into()),
                    value: V1V2 { v1: format!("{number} {rate}"), v2: format!("{number} {key}={limit}") },
                });
            }
        };
        let field = "linux.resources.blockIO.throttleReadBpsDevice";
        throttle(field, block_io.throttle_read_bps_device(), "read_bps_device", "rbps");
        let field = "linux.resources.blockIO.throttleWriteBpsDevice";
        throttle(field, block_io.throttle_write_bps_device(), "write_bps_device", "wbps");
        let field = "linux.resources.blockIO.throttleReadIOPSDevice";
        throttle(field, block_io.throttle_read_iops_device(), "read_iops_device", "riops");
        let field = "linux.resources.blockIO.throttleWriteIOPSDevice";
        throttle(field, block_io.throttle_write_iops_device(), "write_iops_device", "wiops");
    }

    fn set_others(&mut self, resources: &LinuxResources) -> Result<(), CgroupError> {
        for limit in resources.hugepage_limits().iter().flatten() {
            let size = limit.page_size();
            if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
                let limit = format!("linux.resources.hugepageLimits {size:?}");
                return Err(CgroupError::Limit { limit, reason: "it is not a size such as 2MB" });
            }
            let (v1, v2) = (format!("hugetlb.{size}.limit_in_bytes"), format!("hugetlb.{size}.max"));
            let files = (Some(v1.as_str()), Some(v2.as_str()));
            self.set("linux.resources.hugepageLimits", "hugetlb", files, limit.limit());
        }
        let mut rdma: Vec<_> = resources.rdma().iter().flatten().collect();
        rdma.sort_by_key(|(device, _)| *device);
        for (device, limit) in rdma {
            let number = |number: Option<u32>| number.map_or("max".to_owned(), |number| number.to_string());
            let (handles, objects) = (number(limit.hca_handles()), number(limit.hca_objects()));
            let line = format!("{device} hca_handle={handles} hca_object={objects}");
            self.set("linux.resources.rdma", "rdma", (Some("rdma.max"), Some("rdma.max")), line);
        }
        let Some(network) = resources.network() else { return Ok(()) };
        if let Some(class) = network.class_id().filter(|class| *class != 0) {
            let files = (Some("net_cls.classid"), None);
            self.set("linux.resources.network.classID", "net_cls", files, class);
        }
        for priority in network.priorities().iter().flatten() {
            let line = format!("{} {}", priority.name(), priority.priority());
            let files = (Some("net_prio.ifpriomap"), None);
            self.set("linux.resources.network.priorities", "net_prio", files, line);
        }
        Ok(())
    }

    fn set_cpu(&mut self, cpu: &LinuxCpu) {
        if let Some(burst) = cpu.burst() {
            let files = (Some("cpu.cfs_burst_us"), Some("cpu.max.burst"));
            self.set("linux.resources.cpu.burst", "cpu", files, burst);
        }
        if let Some(idle) = cpu.idle() {
            self.set("linux.resources.cpu.idle", "cpu", (Some("cpu.idle"), Some("cpu.idle")), idle);
        }
        if let Some(period) = cpu.realtime_period().filter(|&period| period != 0) {
            let files = (Some("cpu.rt_period_us"), None);
            self.set("linux.resources.cpu.realtimePeriod", "cpu", files, period);
        }
        if let Some(runtime) = cpu.realtime_runtime().filter(|&runtime| runtime != 0) {
            let files = (Some("cpu.rt_runtime_us"), None);
            self.set("linux.resources.cpu.realtimeRuntime", "cpu", files, runtime);
        }
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
        for setting in &self.settings {
            need(setting.controller, true, setting.field);
        }
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
