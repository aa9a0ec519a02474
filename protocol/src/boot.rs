//! What travels with the boot, as files in a cpio archive appended to the agent's initramfs.

use serde::{Deserialize, Serialize};

/// Path of the serialised [`BootConfig`] in the initramfs.
pub const BOOT_CONFIG_PATH: &str = "/cloche/boot.json";
/// Path of the OCI runtime spec (`config.json` in the runtime-spec's words) in the initramfs.
pub const SPEC_PATH: &str = "/cloche/spec.json";

/// How the agent finds and runs its one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// Must equal [`crate::VERSION`].
    pub version: u32,
    /// Sandbox id; names the container's cgroup.
    pub id: String,
    /// Block devices that hold the image's layers as EROFS, bottom layer first, e.g. `/dev/vda`.
    pub layers: Vec<String>,
    /// Docker's `user[:group]`, resolved in the container's own `/etc/passwd` and `/etc/group`; `None` keeps the
    /// spec's numbers.
    pub user: Option<String>,
    /// Size limit of the writable layer in bytes; `None` leaves the kernel's default (half of the memory).
    pub upper_bytes: Option<u64>,
    /// Whether the host forwards stdin. Without it the process reads `/dev/null`.
    pub stdin: bool,
    /// Host's wall clock at start, in nanoseconds since the Unix epoch: the guest has no RTC.
    pub realtime_ns: u64,
}
