//! The cgroup of a VM's processes on the host, the VMM and its file server: the same path as a container's, so that
//! whatever is left of a sandbox is found and ended in the same way.
//!
//! Its limits follow from the machine. A guest cannot make its VMM take more than they allow, and neither can whoever has
//! taken the VMM over. Where this user may make no cgroups, a plain user without a delegated one above all, there is
//! none; the guest is bounded by its own size then.

use std::{collections::HashSet, io, os::fd::OwnedFd, path::Path};

use cloche_runtime::cgroup::{Breadth, Cgroup, CgroupError};
use cloche_share::Shared;
use cloche_vmm::VmConfig;
use oci_spec::runtime::{LinuxMemory, LinuxPids, LinuxResources};

use crate::request::host_memory_bytes;

/// What the VMM takes besides guest memory: itself, its threads' stacks, KVM's structures, 32 MiB that may wait for slow
/// readers of streams, in up to twice the memory, and some room for the cached content of the files it reads, which
/// counts although it is given up first.
const VMM_BYTES: u64 = 128 << 20;
/// For each vCPU and each disk.
const THREAD_BYTES: u64 = 1 << 20;
/// Of guest memory: page tables of the VMM's and of KVM's, with reverse maps, in pages of 4 KiB: 8 bytes each of the
/// three, for every 4,096, and as much again.
const TABLES_FRACTION: u64 = 64;
/// What a file server holds at most is files: 2^18 of them, some 2 KiB of the kernel's memory each.
const FILE_SERVER_BYTES: u64 = 768 << 20;
/// Of unix sockets that wait for slow readers, which the kernel counts as the sender's: 512 streams, each of Linux's
/// default for `net.core.wmem_default`.
const STREAMS_BYTES: u64 = 512 * (208 << 10);
/// Main thread, KVM's setup, the file server, and threads that the kernel adds.
const OTHER_TASKS: u64 = 32;
/// Where others put processes into it: one that attends the VM, and one for each that is run in it besides the first.
const ATTENDING_TASKS: u64 = 1024;

/// It, or none. Dropping it kills what is in it and removes it, unless it is somebody else's.
#[derive(Debug, Default)]
pub struct VmCgroup {
    cgroup: Option<Cgroup>,
    /// It was there before, and the caller is in it.
    is_given: bool,
    limits: Option<Limits>,
    limited: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limits {
    memory_bytes: u64,
    tasks: u64,
}

impl VmCgroup {
    /// A VM without one.
    pub fn none() -> Self {
        Self::default()
    }

    /// Makes it, if this user may.
    pub(super) fn create(path: &Path, config: &VmConfig, shares: &[Shared]) -> Result<Self, CgroupError> {
        match Cgroup::create(path, None, Breadth::Needed) {
            Ok(cgroup) if cgroup.is_nowhere() => Ok(Self::none()),
            Ok(cgroup) => {
                let limits = Some(Limits::of(config, tmpfs_bytes(shares)));
                Ok(Self { cgroup: Some(cgroup), is_given: false, limits, limited: false })
            }
            Err(error) if is_forbidden(&error) => Ok(Self::none()),
            Err(error) => Err(error),
        }
    }

    /// A VM in the cgroup that this process is in, which stays.
    pub(super) fn around(cgroup: Cgroup, config: &VmConfig, shares: &[Shared]) -> Self {
        let mut limits = Limits::of(config, tmpfs_bytes(shares));
        limits.tasks += ATTENDING_TASKS;
        Self { cgroup: Some(cgroup), is_given: true, limits: Some(limits), limited: false }
    }

    /// Sets its limits, as far as there are controllers for them: without, it still tells whose these processes are, and
    /// `cloche doctor` says what is missing.
    pub(super) fn limit(&mut self) -> Result<(), CgroupError> {
        let (Some(cgroup), Some(limits)) = (&self.cgroup, self.limits) else { return Ok(()) };
        self.limited = true;
        for resources in limits.resources() {
            match cgroup.apply(&resources) {
                Err(error) if is_without_controller(&error) => self.limited = false,
                result => result?,
            }
        }
        cgroup.end_as_a_whole()
    }

    /// Whether there is one, and what is in it can take no more than its limits.
    pub(super) fn is_limited(&self) -> bool {
        self.limited
    }

    /// Where `clone3` is to put the VMM.
    pub(super) fn clone_target(&self) -> Result<Option<OwnedFd>, CgroupError> {
        self.to_enter().map_or(Ok(None), Cgroup::clone_target)
    }

    /// Moves the calling process, which must have one thread, into v1 hierarchies.
    pub(super) fn enter(&self) -> io::Result<()> {
        let Some(cgroup) = self.to_enter() else { return Ok(()) };
        cgroup.entrances().map_err(io::Error::other)?.enter()
    }

    fn to_enter(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref().filter(|_| !self.is_given)
    }

    /// Says that the memory limit has killed a process, if it has.
    pub(super) fn exceeded(&self) -> Option<String> {
        let killed = self.cgroup.as_ref().is_some_and(|cgroup| cgroup.oom_kills() > 0);
        let limit = self.limits.filter(|_| killed)?.memory_bytes >> 20;
        Some(format!(
            "; its processes together took more than their limit of {limit} MiB of the host's memory"
        ))
    }

    fn take_own(&mut self) -> Option<Cgroup> {
        self.cgroup.take().filter(|_| !self.is_given)
    }

    /// Kills what is left in it and removes it.
    pub(super) fn remove(mut self) -> Result<(), CgroupError> {
        self.take_own().map_or(Ok(()), kill_and_delete)
    }

    /// Leaves it and what is in it to the next command's `reconcile`.
    pub(super) fn leave(mut self) {
        self.cgroup = None;
    }
}

impl Drop for VmCgroup {
    fn drop(&mut self) {
        // What goes wrong here, the next command's `reconcile` meets again.
        self.take_own().map(kill_and_delete);
    }
}

fn kill_and_delete(cgroup: Cgroup) -> Result<(), CgroupError> {
    cgroup.kill_all().and(cgroup.delete())
}

impl Limits {
    /// `tmpfs_bytes`: what the file server may put into file systems in memory, which counts as its own.
    fn of(config: &VmConfig, tmpfs_bytes: u64) -> Self {
        let guest = config.most_memory_bytes();
        let threads = u64::from(config.vcpus) + config.disks.len() as u64;
        let file_server = if config.share.is_some() { FILE_SERVER_BYTES } else { 0 };
        let streams = if config.vsock.is_some() { STREAMS_BYTES } else { 0 };
        let vmm = guest + guest / TABLES_FRACTION + VMM_BYTES + threads * THREAD_BYTES + streams;
        Self {
            memory_bytes: vmm.saturating_add(file_server).saturating_add(tmpfs_bytes),
            tasks: threads + OTHER_TASKS,
        }
    }

    /// One for each controller.
    fn resources(self) -> [LinuxResources; 2] {
        let signed = |number| i64::try_from(number).unwrap_or(i64::MAX);
        let mut memory = LinuxMemory::default();
        memory.set_limit(Some(signed(self.memory_bytes)));
        // Memory and swap together, as a container's: no swap on top.
        memory.set_swap(Some(signed(self.memory_bytes)));
        let mut pids = LinuxPids::default();
        pids.set_limit(signed(self.tasks));
        let [mut of_memory, mut of_pids] = [LinuxResources::default(), LinuxResources::default()];
        of_memory.set_memory(Some(memory));
        of_pids.set_pids(Some(pids));
        [of_memory, of_pids]
    }
}

/// Sizes of the file systems in memory, each once, that a guest may write to. Nothing reclaims what is in them, so that
/// the guest would die of a file that its user let it write. What is mounted below a share is not looked for.
fn tmpfs_bytes(shares: &[Shared]) -> u64 {
    const RAMFS_MAGIC: u64 = 0x8584_58f6;
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    let host = host_memory_bytes();
    let mut seen = HashSet::new();
    let sizes = shares.iter().filter(|share| !share.read_only).filter_map(|share| {
        let file_system = rustix::fs::statfs(&share.path).ok()?;
        let device = rustix::fs::stat(&share.path).ok()?.st_dev;
        let size = match file_system.f_type as u64 {
            // C's long types have 64 bits here.
            TMPFS_MAGIC => file_system.f_blocks.saturating_mul(file_system.f_bsize as u64),
            RAMFS_MAGIC => 0,
            _ => return None,
        };
        // Without a limit of its own, it has none but the host.
        let size = if size == 0 { host } else { size.min(host) };
        seen.insert(device).then_some(size)
    });
    sizes.fold(0, u64::saturating_add)
}

/// Whether this user, or the container that all this runs in, may make no cgroups here.
fn is_forbidden(error: &CgroupError) -> bool {
    match error {
        CgroupError::NotMounted => true,
        CgroupError::Io { source, .. } => {
            matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem)
        }
        _ => false,
    }
}

/// The file of a limit is there only with its controller.
fn is_without_controller(error: &CgroupError) -> bool {
    match error {
        CgroupError::NoController { .. } => true,
        CgroupError::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use cloche_vmm::config::ShareConfig;

    use super::*;

    #[test]
    fn limit_follows_from_the_guests_memory_and_what_serves_it() {
        const MIB: u64 = 1 << 20;
        let mut config = VmConfig::new(2, 1024, "/kernel");
        assert_eq!(Limits::of(&config, 0), Limits { memory_bytes: (1024 + 16 + 128 + 2) * MIB, tasks: 34 });
        config.share = Some(ShareConfig { tag: "share".into(), socket_fd: 3 });
        assert_eq!(Limits::of(&config, 0).memory_bytes, (1024 + 16 + 128 + 2 + 768) * MIB);
        assert_eq!(Limits::of(&config, 64 * MIB).memory_bytes, (1024 + 16 + 128 + 2 + 768 + 64) * MIB);
        assert_eq!(Limits::of(&config, u64::MAX).memory_bytes, u64::MAX);
        config.vsock = Some(serde_json::from_str(r#"{"guest_cid": 3}"#).unwrap());
        assert_eq!(Limits::of(&config, 0).memory_bytes, (1024 + 16 + 128 + 2 + 768 + 104) * MIB);
    }

    #[test]
    fn limit_is_of_memory_and_swap_together() {
        let [resources, _] = Limits { memory_bytes: 5 << 20, tasks: 1 }.resources();
        let memory = resources.memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(5 << 20), Some(5 << 20)));
    }

    #[test]
    fn file_systems_in_memory_count_once_and_only_where_they_are_written() {
        let share = |path: &str, read_only| Shared { path: path.into(), recursive: true, read_only };
        let size = tmpfs_bytes(&[share("/dev/shm", false)]);
        assert!(size > 0, "this test needs a tmpfs at /dev/shm");
        assert_eq!(tmpfs_bytes(&[share("/dev/shm", false), share("/dev/shm/.", false)]), size);
        assert_eq!(
            tmpfs_bytes(&[share("/dev/shm", true), share("/proc", false), share("/nothing", false)]),
            0
        );
    }

    #[test]
    fn only_what_permissions_forbid_is_done_without() {
        let refused = |errno| {
            let source = io::Error::from_raw_os_error(errno);
            is_forbidden(&CgroupError::Io { action: "create".into(), path: "/".into(), source })
        };
        assert!([libc::EACCES, libc::EPERM, libc::EROFS].into_iter().all(refused));
        assert!(![libc::ENOSPC, libc::EBUSY, libc::ENOENT].into_iter().any(refused));
        assert!(!is_forbidden(&CgroupError::InUse("/".into())));
    }
}
