//! What a microVM is made of, as data. The engine writes it, `cloche vmm` reads it as JSON, [`crate::run`] acts on
//! it. Every field is either acted on or refused by [`VmConfig::validate`]; unknown fields are refused by serde.
//!
//! Checks here are those that need no file and no KVM. What depends on a file's content or on the host (does the
//! kernel exist, is there so much memory) is checked by the step that opens it.

use std::{collections::HashSet, os::fd::RawFd, path::PathBuf};

use serde::{Deserialize, Serialize};

mod balloon;
mod console;
mod cpu;
mod limit;
mod memory;
mod net;
mod pmem;

pub use balloon::BalloonConfig;
pub use console::ConsoleConfig;
pub use cpu::CpuTemplate;
pub use limit::{BucketConfig, LimitConfig};
pub use memory::{MEMORY_BLOCK_MIB, MEMORY_CHUNK_MIB, MemoryDeviceConfig};
pub use net::{BadMacAddress, MAX_NETS, MIN_MTU, MacAddress, NetBackend, NetConfig};
pub use pmem::{MAX_PMEMS, PmemConfig};

/// vCPUs that a VM can have at most: an MP table names a CPU by an 8-bit APIC id, and more than this was never
/// tried.
pub const MAX_VCPUS: u8 = 32;
/// Memory that a VM needs at least, in MiB: a kernel, its initramfs, and room to unpack both.
pub const MIN_MEMORY_MIB: u32 = 32;
/// Disks that a VM can have at most: each takes some 36 of the 2048 bytes of a Linux command line.
pub const MAX_DISKS: usize = 40;
/// Files of one disk: the most layers of an image that Docker makes, and one.
pub const MAX_DISK_FILES: usize = 128;
/// Bytes of a disk's id that a guest can see (virtio 1.2 §5.2.6: `VIRTIO_BLK_T_GET_ID`).
pub const MAX_DISK_ID_BYTES: usize = 20;

/// Bytes of a share's tag (virtio 1.2 §5.11.4).
pub const MAX_TAG_BYTES: usize = 36;

/// A microVM. Serialised as JSON; see the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Virtual CPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// What all of them are.
    #[serde(default)]
    pub cpu_template: CpuTemplate,
    /// Guest memory in MiB, [`MIN_MEMORY_MIB`] up to what the host has.
    pub memory_mib: u32,
    /// Guest kernel: an uncompressed x86-64 ELF `vmlinux`, or a bzImage.
    pub kernel: PathBuf,
    /// Appended to the kernel command line that the VMM makes, so that it wins over it.
    #[serde(default)]
    pub cmdline_extra: String,
    /// cpio archives; concatenated, each padded with zeros to a multiple of 4 bytes. Later ones win.
    #[serde(default)]
    pub initramfs: Vec<InitramfsPart>,
    /// Disks in the order in which the guest names them: `vda`, `vdb`, …
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Persistent memory in the order in which the guest names it: `pmem0`, `pmem1`, …
    #[serde(default)]
    pub pmems: Vec<PmemConfig>,
    /// Network devices in the order in which the guest names them.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// The memory balloon, if the guest gets one.
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// Memory that can be added while the guest runs, if there is to be any.
    #[serde(default)]
    pub memory_device: Option<MemoryDeviceConfig>,
    /// The console device, if the guest gets one besides its serial port.
    #[serde(default)]
    pub console: Option<ConsoleConfig>,
    /// The socket device, if the guest gets one.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// The file system device, if the guest gets one.
    #[serde(default)]
    pub share: Option<ShareConfig>,
    /// Whether the guest gets a virtio entropy device.
    #[serde(default)]
    pub rng: bool,
    /// File to which the last 64 KiB of the guest's console are written when the VM ends; created or emptied.
    #[serde(default)]
    pub console_log: Option<PathBuf>,
    /// How long the guest may take from its first instruction to its `agent-ready` mark, in milliseconds; at least
    /// 1. `None` waits for ever.
    #[serde(default)]
    pub start_timeout_ms: Option<u64>,
    /// Inherited file descriptor to which [`crate::event::Event`]s are written, one JSON object a line.
    #[serde(default)]
    pub events_fd: Option<RawFd>,
    /// Inherited file descriptor of a listening unix socket, on which the VM takes requests: see [`crate::control`].
    #[serde(default)]
    pub control_fd: Option<RawFd>,
}

/// One piece of the initramfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum InitramfsPart {
    /// The archive that the calling binary carries and hands to [`crate::run`].
    Embedded,
    /// A cpio archive on disk.
    File(PathBuf),
}

/// One virtio block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A file or block device; its size is rounded down to whole 512-byte sectors.
    pub path: PathBuf,
    /// Files that follow it on the same disk, one behind the other. The disk is then read-only, each of its files has
    /// whole sectors, and there are at most [`MAX_DISK_FILES`] with the first.
    #[serde(default)]
    pub more: Vec<PathBuf>,
    /// Whether the guest is kept from writing. The file is then opened read-only too.
    #[serde(default)]
    pub read_only: bool,
    /// What the guest reads as the disk's serial number: 1 to [`MAX_DISK_ID_BYTES`] bytes of printable ASCII.
    pub id: String,
    /// Whether to read and write past the host's page cache (O_DIRECT). What is not aligned goes through it anyway.
    #[serde(default)]
    pub direct: bool,
    /// What the guest's flushes do.
    #[serde(default)]
    pub cache: DiskCache,
    /// How much the guest may read and write in a span of time; `None` is as much as it can.
    #[serde(default)]
    pub limit: Option<LimitConfig>,
}

/// What a guest's flushes do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskCache {
    /// They make what was written durable (`fdatasync`).
    #[default]
    Writeback,
    /// Nothing: a crash of the host may lose what the guest believes to be safe. For disks that nobody keeps.
    Unsafe,
}

impl DiskConfig {
    /// A disk that the guest may write.
    pub fn new(path: impl Into<PathBuf>, id: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            more: Vec::new(),
            read_only: false,
            id: id.into(),
            direct: false,
            cache: DiskCache::default(),
            limit: None,
        }
    }

    /// The same disk, which the guest is kept from writing.
    pub fn read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// The same disk, read-only, with these files behind its own.
    pub fn followed_by(self, more: Vec<PathBuf>) -> Self {
        Self { more, read_only: true, ..self }
    }
}

/// The virtio socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id: 3 or above (virtio 1.2 §5.10.4 reserves 0 to 2), and not 0xffff_ffff.
    pub guest_cid: u32,
    /// Inherited file descriptor of a listening unix socket, by which host programs get streams into the guest: they say
    /// `CONNECT <port>\n` and are answered `OK <port of the host>\n` when the guest accepts.
    #[serde(default)]
    pub listen_fd: Option<RawFd>,
    /// What the guest can connect to.
    #[serde(default)]
    pub ports: Vec<VsockPort>,
}

/// One stream that the guest can open, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockPort {
    /// The host's port to which the guest connects.
    pub port: u32,
    /// Inherited descriptor of a connected, non-blocking stream socket: the other end of the guest's stream.
    pub fd: RawFd,
}

/// The virtio file system device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// What the guest mounts it by: 1 to [`MAX_TAG_BYTES`] printable ASCII characters.
    pub tag: String,
    /// Inherited file descriptor of a connected `SOCK_SEQPACKET` unix socket, at whose other end a FUSE server is.
    pub socket_fd: RawFd,
}

/// A value of [`VmConfig`] that no VM can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field} is {value}; allowed: {allowed}")]
pub struct ConfigError {
    /// The field, as it is spelt in JSON.
    pub field: String,
    /// The value that was given.
    pub value: String,
    /// What would have been accepted.
    pub allowed: String,
}

impl ConfigError {
    fn new(field: impl Into<String>, value: impl ToString, allowed: impl Into<String>) -> Self {
        Self { field: field.into(), value: value.to_string(), allowed: allowed.into() }
    }
}

impl VmConfig {
    /// A VM of this size with this kernel and nothing else.
    pub fn new(vcpus: u8, memory_mib: u32, kernel: impl Into<PathBuf>) -> Self {
        Self {
            vcpus,
            cpu_template: CpuTemplate::default(),
            memory_mib,
            kernel: kernel.into(),
            cmdline_extra: String::new(),
            initramfs: Vec::new(),
            disks: Vec::new(),
            pmems: Vec::new(),
            nets: Vec::new(),
            balloon: None,
            memory_device: None,
            console: None,
            vsock: None,
            share: None,
            rng: false,
            console_log: None,
            start_timeout_ms: None,
            events_fd: None,
            control_fd: None,
        }
    }

    /// Guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    /// Every descriptor that the process inherits for the VM.
    pub fn inherited_fds(&self) -> Vec<RawFd> {
        self.named_fds().into_iter().map(|(_, fd)| fd).collect()
    }

    /// The same, each with the field that names it.
    fn named_fds(&self) -> Vec<(String, RawFd)> {
        let named = |field: &str, fd: Option<RawFd>| fd.map(|fd| (field.to_owned(), fd));
        let nets = self.nets.iter().enumerate().filter_map(|(index, net)| {
            net.backend.inherited_fd().map(|fd| (format!("nets[{index}].backend"), fd))
        });
        let ports = self.vsock.iter().flat_map(|vsock| &vsock.ports).enumerate();
        let ports = ports.map(|(index, port)| (format!("vsock.ports[{index}].fd"), port.fd));
        let one_each = [
            named("events_fd", self.events_fd),
            named("control_fd", self.control_fd),
            named("console.socket_fd", self.console.as_ref().and_then(|console| console.socket_fd)),
            named("share.socket_fd", self.share.as_ref().map(|share| share.socket_fd)),
            named("vsock.listen_fd", self.vsock.as_ref().and_then(|vsock| vsock.listen_fd)),
        ];
        one_each.into_iter().flatten().chain(nets).chain(ports).collect()
    }

    /// Each becomes one owner's, who closes it. The standard streams are the process's own; events may go to its output.
    fn validate_fds(&self) -> Result<(), ConfigError> {
        let mut seen: HashSet<RawFd> = (0..=2).collect();
        for (field, fd) in self.named_fds() {
            let is_output = field == "events_fd" && matches!(fd, 1 | 2);
            if fd < 0 || !is_output && !seen.insert(fd) {
                return Err(ConfigError::new(field, fd, "an open descriptor above 2 that nothing else uses"));
            }
        }
        Ok(())
    }

    /// Checks every field that can be checked without touching the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(ConfigError::new("vcpus", self.vcpus, format!("1 to {MAX_VCPUS}")));
        }
        if self.memory_mib < MIN_MEMORY_MIB {
            return Err(ConfigError::new(
                "memory_mib",
                self.memory_mib,
                format!("{MIN_MEMORY_MIB} and above"),
            ));
        }
        if !self.cmdline_extra.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
            return Err(ConfigError::new(
                "cmdline_extra",
                format!("{:?}", self.cmdline_extra),
                "printable ASCII",
            ));
        }
        if self.start_timeout_ms == Some(0) {
            return Err(ConfigError::new("start_timeout_ms", 0, "1 and above, or none"));
        }
        self.validate_fds()?;
        self.validate_disks()?;
        self.validate_pmems()?;
        self.validate_nets()?;
        self.validate_share()?;
        self.validate_balloon()?;
        self.validate_memory_device()?;
        self.validate_vsock()
    }

    fn validate_disks(&self) -> Result<(), ConfigError> {
        if self.disks.len() > MAX_DISKS {
            return Err(ConfigError::new("disks", self.disks.len(), format!("at most {MAX_DISKS} disks")));
        }
        let mut seen = HashSet::new();
        for (index, disk) in self.disks.iter().enumerate() {
            let field = || format!("disks[{index}].id");
            let printable = disk.id.bytes().all(|byte| byte.is_ascii_graphic());
            if disk.id.is_empty() || disk.id.len() > MAX_DISK_ID_BYTES || !printable {
                return Err(ConfigError::new(
                    field(),
                    format!("{:?}", disk.id),
                    format!("1 to {MAX_DISK_ID_BYTES} printable ASCII characters"),
                ));
            }
            let files = disk.more.len() + 1;
            if files > MAX_DISK_FILES {
                let field = format!("disks[{index}].more");
                return Err(ConfigError::new(
                    field,
                    disk.more.len(),
                    format!("at most {MAX_DISK_FILES} files of one disk"),
                ));
            }
            if files > 1 && (!disk.read_only || disk.direct) {
                let field = format!("disks[{index}].more");
                return Err(ConfigError::new(
                    field,
                    disk.more.len(),
                    "only of a disk with `read_only` and without `direct`",
                ));
            }
            if !seen.insert(disk.id.as_str()) {
                return Err(ConfigError::new(
                    field(),
                    format!("{:?}", disk.id),
                    "an id that no other disk has",
                ));
            }
        }
        Ok(())
    }

    fn validate_share(&self) -> Result<(), ConfigError> {
        let Some(share) = &self.share else { return Ok(()) };
        let printable = share.tag.bytes().all(|byte| byte.is_ascii_graphic());
        if share.tag.is_empty() || share.tag.len() > MAX_TAG_BYTES || !printable {
            let allowed = format!("1 to {MAX_TAG_BYTES} printable ASCII characters");
            return Err(ConfigError::new("share.tag", format!("{:?}", share.tag), allowed));
        }
        Ok(())
    }

    fn validate_vsock(&self) -> Result<(), ConfigError> {
        let Some(vsock) = &self.vsock else { return Ok(()) };
        if vsock.guest_cid < 3 || vsock.guest_cid == u32::MAX {
            return Err(ConfigError::new("vsock.guest_cid", vsock.guest_cid, "3 to 4294967294"));
        }
        let mut ports = HashSet::new();
        for (index, VsockPort { port, .. }) in vsock.ports.iter().enumerate() {
            if !ports.insert(port) {
                return Err(ConfigError::new(
                    format!("vsock.ports[{index}].port"),
                    port,
                    "a port that no other stream has",
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(id: &str) -> DiskConfig {
        DiskConfig::new("/disk", id).read_only()
    }

    fn port(port: u32, fd: RawFd) -> VsockPort {
        VsockPort { port, fd }
    }

    fn refused(change: impl FnOnce(&mut VmConfig)) -> String {
        let mut config = VmConfig::new(1, 128, "/vmlinux");
        change(&mut config);
        config.validate().unwrap_err().to_string()
    }

    #[test]
    fn validate_of_plain_config_passes() {
        let mut config = VmConfig::new(MAX_VCPUS, MIN_MEMORY_MIB, "/vmlinux");
        config.disks = vec![disk("a"), disk("b")];
        config.vsock =
            Some(VsockConfig { guest_cid: 3, listen_fd: None, ports: vec![port(7, 3), port(8, 4)] });
        assert_eq!(config.validate(), Ok(()));
    }

    #[test]
    fn validate_of_value_out_of_range_names_field_value_and_range() {
        assert_eq!(refused(|c| c.vcpus = 0), "vcpus is 0; allowed: 1 to 32");
        assert_eq!(refused(|c| c.vcpus = 33), "vcpus is 33; allowed: 1 to 32");
        assert_eq!(refused(|c| c.memory_mib = 0), "memory_mib is 0; allowed: 32 and above");
        assert!(refused(|c| c.cmdline_extra = "a\nb".into()).starts_with("cmdline_extra is \"a\\nb\""));
        assert!(refused(|c| c.start_timeout_ms = Some(0)).starts_with("start_timeout_ms is 0"));
        assert!(refused(|c| c.events_fd = Some(-1)).starts_with("events_fd is -1"));
        assert!(refused(|c| c.control_fd = Some(-1)).starts_with("control_fd is -1"));
    }

    #[test]
    fn validate_of_disk_ids_refuses_empty_long_odd_and_repeated_ones() {
        for id in ["", "123456789012345678901", "a b", "é"] {
            assert!(refused(|c| c.disks = vec![disk(id)]).starts_with("disks[0].id is"), "{id:?}");
        }
        assert!(refused(|c| c.disks = vec![disk("a"), disk("a")]).contains("no other disk"));
        let files = |count, id: &str| disk(id).followed_by(vec!["/more".into(); count]);
        assert!(refused(|c| c.disks = vec![files(MAX_DISK_FILES, "a")]).starts_with("disks[0].more is 128"));
        let writable = DiskConfig { read_only: false, ..files(1, "a") };
        assert!(refused(|c| c.disks = vec![writable]).contains("read_only"));
        let direct = DiskConfig { direct: true, ..files(1, "a") };
        assert!(refused(|c| c.disks = vec![direct]).contains("direct"));
        let many = (0..=MAX_DISKS).map(|n| disk(&n.to_string())).collect();
        assert!(refused(|c| c.disks = many).starts_with("disks is 41"));
    }

    #[test]
    fn validate_of_vsock_refuses_reserved_cids_and_shared_ports_and_descriptors() {
        let vsock = |guest_cid, ports| Some(VsockConfig { guest_cid, listen_fd: None, ports });
        assert!(refused(|c| c.vsock = vsock(2, vec![])).starts_with("vsock.guest_cid is 2"));
        let twice = vec![port(7, 3), port(7, 4)];
        assert!(refused(|c| c.vsock = vsock(3, twice)).starts_with("vsock.ports[1].port is 7"));
        for fd in [-1, 2, 5] {
            let refused = refused(|c| {
                c.events_fd = Some(5);
                c.vsock = vsock(3, vec![port(7, fd)]);
            });
            assert!(refused.starts_with(&format!("vsock.ports[0].fd is {fd}")), "{refused}");
        }
    }

    #[test]
    fn validate_of_one_descriptor_for_two_things_is_refused() {
        let mut config = VmConfig::new(1, 128, "/vmlinux");
        config.events_fd = Some(1);
        config.control_fd = Some(3);
        config.share = Some(ShareConfig { tag: "x".into(), socket_fd: 4 });
        config.vsock = Some(VsockConfig { guest_cid: 3, listen_fd: Some(5), ports: vec![port(7, 6)] });
        assert_eq!(config.validate(), Ok(()));
        assert_eq!(config.inherited_fds(), [1, 3, 4, 5, 6]);
        let with = |change: &dyn Fn(&mut VmConfig)| {
            let mut config = config.clone();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        for fd in [0, 1, 2, 3] {
            let refused = with(&|c| c.share = Some(ShareConfig { tag: "x".into(), socket_fd: fd }));
            assert!(refused.starts_with(&format!("share.socket_fd is {fd}")), "{refused}");
        }
        let listen = with(&|c| c.vsock.as_mut().unwrap().listen_fd = Some(4));
        assert!(listen.starts_with("vsock.listen_fd is 4"), "{listen}");
        assert!(with(&|c| c.events_fd = Some(0)).starts_with("events_fd is 0"));
    }

    #[test]
    fn validate_of_share_refuses_odd_tags_and_descriptors() {
        let share = |tag: &str, socket_fd| Some(ShareConfig { tag: tag.into(), socket_fd });
        assert!(refused(|c| c.share = share("", 3)).starts_with("share.tag is \"\""));
        assert!(refused(|c| c.share = share(&"x".repeat(37), 3)).starts_with("share.tag"));
        assert!(refused(|c| c.share = share("x", -1)).starts_with("share.socket_fd is -1"));
    }

    #[test]
    fn config_with_unknown_field_is_refused() {
        let json = r#"{"vcpus":1,"memory_mib":64,"kernel":"/k","initramfs":["embedded",{"file":"/a"}]}"#;
        let config: VmConfig = serde_json::from_str(json).unwrap();
        assert_eq!(config.initramfs, [InitramfsPart::Embedded, InitramfsPart::File("/a".into())]);
        let unknown = json.replace("\"vcpus\"", "\"cpu\"");
        assert!(serde_json::from_str::<VmConfig>(&unknown).unwrap_err().to_string().contains("cpu"));
    }
}
