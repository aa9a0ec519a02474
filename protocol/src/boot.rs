//! What travels with the boot, as files in a cpio archive appended to the agent's initramfs.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Path of the serialised [`BootConfig`] in the initramfs.
pub const BOOT_CONFIG_PATH: &str = "/cloche/boot.json";
/// Path of the OCI runtime spec (`config.json` in the runtime-spec's words) in the initramfs.
pub const SPEC_PATH: &str = "/cloche/spec.json";
/// Path of the compiled system-call filter in the initramfs, in place of the spec's `linux.seccomp`: most of a spec is its
/// policy, and compiling it the same work for each guest. The form is the container runtime's.
pub const FILTER_PATH: &str = "/cloche/filter";

/// Path of messages to the guest's kernel (rtnetlink(7)), one behind the other, each padded to four bytes: one for each
/// network device, which the agent completes by the attribute `IFLA_NET_NS_PID`, and so moves to the container.
pub const LINKS_PATH: &str = "/cloche/links";
/// Path of further ones, which the agent sends in the container's network namespace: what the interfaces there are
/// called, their addresses and routes. Each asks for an answer.
pub const NETWORK_PATH: &str = "/cloche/network";

/// Where the guest finds what the host shares with it; see [`share_path`].
pub const SHARES_DIR: &str = "/cloche/shares";
/// The tag by which the guest mounts the host's share (virtio 1.2 §5.11.4).
pub const SHARE_TAG: &str = "cloche";

/// Where the guest's agent shows namespaces of its first container, for others to join by the names that they have in
/// `/proc/PID/ns` (proc(5)).
pub const FIRST_NAMESPACES: &str = "/cloche/first";
/// Where the agent has a tmpfs for all containers whose shared memory is one.
pub const SHARED_MEMORY: &str = "/cloche/shm";

/// Where the guest finds the host's mount number `index`.
pub fn share_path(index: usize) -> PathBuf {
    Path::new(SHARES_DIR).join(index.to_string())
}

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
    /// The share that is the root file system, in place of layers; see [`share_path`].
    pub root_share: Option<usize>,
    /// Whether the container waits, made but not started, for [`crate::message::ToGuest::Start`].
    pub waits: bool,
    /// Docker's `user[:group]`, resolved in the container's own `/etc/passwd` and `/etc/group`; `None` keeps the
    /// spec's numbers.
    pub user: Option<String>,
    /// Size limit of the writable layer in bytes; `None` leaves the kernel's default (half of the memory).
    pub upper_bytes: Option<u64>,
    /// Size in bytes of a tmpfs at [`SHARED_MEMORY`], if there is to be one.
    pub shared_memory_bytes: Option<u64>,
    /// Whether the host shares files, under the tag [`SHARE_TAG`].
    pub share: bool,
    /// Whether the host forwards stdin. Without it the process reads `/dev/null`.
    pub stdin: bool,
    /// Host's wall clock at start, in nanoseconds since the Unix epoch: the guest has no RTC.
    pub realtime_ns: u64,
}
