//! The cgroup of a VM's processes on the host, the VMM and its file server: the same path as a container's, so that
//! whatever is left of a sandbox is found and ended in the same way.
//!
//! Its limits follow from the machine. A guest cannot make its VMM take more than they allow, and neither can whoever has
//! taken the VMM over. Where this user may make no cgroups, a plain user without a delegated one above all, there is
//! none; the guest is bounded by its own size then.

use std::{io, os::fd::OwnedFd};

use cloche_runtime::cgroup::{Breadth, Cgroup, CgroupError};
use cloche_vmm::VmConfig;
use oci_spec::runtime::{LinuxMemory, LinuxPids, LinuxResources};

use crate::sandboxes::cgroup_path;

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
/// Main thread, KVM's setup, the file server, and threads that the kernel adds.
const OTHER_TASKS: u64 = 32;

/// It, or none. Dropping it kills what is in it and removes it.
#[derive(Debug, Default)]
pub struct VmCgroup {
    cgroup: Option<Cgroup>,
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
    pub(super) fn create(id: &str, config: &VmConfig) -> Result<Self, CgroupError> {
        match Cgroup::create(&cgroup_path(id), None, Breadth::Needed) {
            Ok(cgroup) => {
                let limits = Some(Limits::of(config));
                Ok(Self { cgroup: Some(cgroup), limits, limited: false })
            }
            Err(error) if is_forbidden(&error) => Ok(Self::none()),
            Err(error) => Err(error),
        }
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
        Ok(())
    }

    /// Whether there is one, and what is in it can take no more than its limits.
    pub(super) fn is_limited(&self) -> bool {
        self.limited
    }

    /// Where `clone3` is to put the VMM.
    pub(super) fn clone_target(&self) -> Result<Option<OwnedFd>, CgroupError> {
        self.cgroup.as_ref().map_or(Ok(None), Cgroup::clone_target)
    }

    /// Moves the calling process into v1 hierarchies. That takes milliseconds, since the kernel waits for RCU.
    pub(super) fn enter(&self) -> Result<(), CgroupError> {
        // cgroup.procs takes 0 for the writer.
        self.cgroup.as_ref().map_or(Ok(()), |cgroup| cgroup.attach(0))
    }

    /// Says that the memory limit has killed a process, if it has.
    pub(super) fn exceeded(&self) -> Option<String> {
        let killed = self.cgroup.as_ref().is_some_and(|cgroup| cgroup.oom_kills() > 0);
        let limit = self.limits.filter(|_| killed)?.memory_bytes >> 20;
        Some(format!(
            "; its processes together took more than their limit of {limit} MiB of the host's memory"
        ))
    }

    /// Kills what is left in it and removes it.
    pub(super) fn remove(mut self) -> Result<(), CgroupError> {
        self.cgroup.take().map_or(Ok(()), kill_and_delete)
    }
}

impl Drop for VmCgroup {
    fn drop(&mut self) {
        // What goes wrong here, the next command's `reconcile` meets again.
        self.cgroup.take().map(kill_and_delete);
    }
}

fn kill_and_delete(cgroup: Cgroup) -> Result<(), CgroupError> {
    cgroup.kill_all().and(cgroup.delete())
}

impl Limits {
    fn of(config: &VmConfig) -> Self {
        let guest = config.most_memory_bytes();
        let threads = u64::from(config.vcpus) + config.disks.len() as u64;
        let file_server = if config.share.is_some() { FILE_SERVER_BYTES } else { 0 };
        Self {
            memory_bytes: guest + guest / TABLES_FRACTION + VMM_BYTES + threads * THREAD_BYTES + file_server,
            tasks: threads + OTHER_TASKS,
        }
    }

    /// One for each controller.
    fn resources(self) -> [LinuxResources; 2] {
        let signed = |number| i64::try_from(number).unwrap_or(i64::MAX);
        let mut memory = LinuxMemory::default();
        memory.set_limit(Some(signed(self.memory_bytes)));
        let mut pids = LinuxPids::default();
        pids.set_limit(signed(self.tasks));
        let [mut of_memory, mut of_pids] = [LinuxResources::default(), LinuxResources::default()];
        of_memory.set_memory(Some(memory));
        of_pids.set_pids(Some(pids));
        [of_memory, of_pids]
    }
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
        assert_eq!(Limits::of(&config), Limits { memory_bytes: (1024 + 16 + 128 + 2) * MIB, tasks: 34 });
        config.share = Some(ShareConfig { tag: "share".into(), socket_fd: 3 });
        assert_eq!(Limits::of(&config).memory_bytes, (1024 + 16 + 128 + 2 + 768) * MIB);
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
