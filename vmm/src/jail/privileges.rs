//! Capabilities and resource limits.

use std::io;

use rustix::{
    process::{Resource, Rlimit, setrlimit},
    thread::{
        CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities, set_no_new_privs,
    },
};

use super::{JailError, failed, syscalls};

/// Takes every capability from every set of this thread, for good.
pub fn drop_all() -> Result<(), JailError> {
    const STEP: &str = "drop all capabilities";
    clear_ambient_capability_set().map_err(failed(STEP, ""))?;
    syscalls::empty_bounding_set().map_err(failed(STEP, ""))?;
    drop_capabilities()
}

/// Takes every capability that this thread has, and what it could gain by starting a program.
pub fn drop_capabilities() -> Result<(), JailError> {
    set_no_new_privs(true).map_err(failed("give up new privileges", ""))?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(failed("drop all capabilities", ""))
}

/// What a VM's own devices need of the host's resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Size in bytes of the largest file that it may write.
    pub file_bytes: u64,
    /// Descriptors that may be opened while the guest runs.
    pub more_files: u32,
}

/// Threads that the kernel may add to the VMM's own: KVM's page recovery, for one.
const KERNEL_THREADS: u64 = 16;

impl Limits {
    /// Sets them for the process, which has so many threads besides this one.
    pub(super) fn set(self, threads: usize) -> Result<(), JailError> {
        let open = syscalls::open_files().map_err(failed("count its descriptors", ""))?;
        let limits = [
            (Resource::Core, 0),
            (Resource::Fsize, self.file_bytes),
            (Resource::Nofile, u64::from(open) + u64::from(self.more_files)),
            (Resource::Nproc, threads as u64 + KERNEL_THREADS),
            (Resource::Msgqueue, 0),
        ];
        for (resource, limit) in limits {
            // One that is lower already stays.
            let limit = rustix::process::getrlimit(resource).maximum.map_or(limit, |hard| hard.min(limit));
            setrlimit(resource, Rlimit { current: Some(limit), maximum: Some(limit) })
                .map_err(|errno| failed("limit its resources", "")(io::Error::from(errno)))?;
        }
        Ok(())
    }
}
