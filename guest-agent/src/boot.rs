//! From a freshly booted kernel to a known state: file systems mounted, drivers checked, clock set, configuration
//! read.

use std::{fs, io, path::Path};

use cloche_protocol::{
    VERSION,
    boot::{BOOT_CONFIG_PATH, BootConfig, FILTER_PATH, SHARE_TAG, SHARED_MEMORY, SHARES_DIR, SPEC_PATH},
};
use cloche_runtime::Filter;
use oci_spec::runtime::Spec;
use rustix::mount::MountFlags;

use crate::{network, say, spec, syscalls};

/// Why the guest could not get ready.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A kernel file system is missing from the kernel, most likely.
    #[error("cannot mount {kind} on {target}")]
    Mount {
        /// File system type.
        kind: &'static str,
        /// Mount point.
        target: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel lacks drivers, or has them as modules, which are not here.
    #[error(
        "this kernel lacks these built-in drivers: {0}; boot one that has them, such as that of `cloche kernel build`"
    )]
    MissingDrivers(String),
    /// The host's file server does not answer as it should.
    #[error("cannot mount the host's share on {SHARES_DIR}")]
    Share(#[source] io::Error),
    /// The host wrote no usable configuration into the initramfs.
    #[error("cannot read {path} of the initramfs")]
    Config {
        /// The file.
        path: &'static str,
        /// What is wrong with it.
        #[source]
        source: io::Error,
    },
    /// Host and agent were not built together.
    #[error("the host speaks protocol version {0}, this agent {VERSION}; rebuild both together")]
    Version(u32),
}

/// What the host sent with the boot.
pub struct Boot {
    /// The agent's own configuration.
    pub config: BootConfig,
    /// The container's.
    pub spec: Spec,
    /// The container's, if it has one.
    pub filter: Option<Filter>,
}

/// Mounts, checks, reads; in this order, so that a foreign kernel is told apart from a broken one.
pub fn prepare() -> Result<Boot, BootError> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "/proc", quiet)?;
    mount("sysfs", "/sys", quiet)?;
    mount("devtmpfs", "/dev", MountFlags::NOSUID | MountFlags::NOEXEC)?;
    let config: BootConfig = read(BOOT_CONFIG_PATH, |json| Ok(serde_json::from_slice(json)?))?;
    if config.version != VERSION {
        return Err(BootError::Version(config.version));
    }
    check_drivers(&config)?;
    mount("cgroup2", "/sys/fs/cgroup", quiet)?;
    if config.share {
        mount_share().map_err(BootError::Share)?;
    }
    if let Some(bytes) = config.shared_memory_bytes {
        mount_shared_memory(bytes).map_err(|source| BootError::Mount {
            kind: "tmpfs",
            target: SHARED_MEMORY,
            source,
        })?;
    }
    set_clock(config.realtime_ns);
    allow_overcommit();
    let mut spec = read(SPEC_PATH, |json| Ok(spec::read(json)?))?;
    if let Some(linux) = spec.linux_mut() {
        // The host's has a parent for all sandboxes, which costs some of a start. Here is but one.
        linux.set_cgroups_path(Some(Path::new("/").join(&config.id)));
    }
    let filter = read_filter()?;
    Ok(Boot { config, spec, filter })
}

/// A container without a policy comes without a filter.
fn read_filter() -> Result<Option<Filter>, BootError> {
    if !Path::new(FILTER_PATH).exists() {
        return Ok(None);
    }
    let filter = read(FILTER_PATH, |bytes| {
        Filter::from_bytes(bytes).ok_or_else(|| io::Error::other("it is no system-call filter"))
    });
    filter.map(Some)
}

fn mount(kind: &'static str, target: &'static str, flags: MountFlags) -> Result<(), BootError> {
    fs::create_dir_all(target)
        .and_then(|()| Ok(rustix::mount::mount(kind, target, kind, flags, None)?))
        .map_err(|source| BootError::Mount { kind, target, source })
}

/// What several containers have as their `/dev/shm`.
fn mount_shared_memory(bytes: u64) -> io::Result<()> {
    let options = std::ffi::CString::new(format!("mode=1777,size={bytes}"))?;
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    fs::create_dir_all(SHARED_MEMORY)?;
    Ok(rustix::mount::mount("shm", SHARED_MEMORY, "tmpfs", quiet, Some(options.as_c_str()))?)
}

/// The spec's binds have their sources here.
fn mount_share() -> io::Result<()> {
    fs::create_dir_all(SHARES_DIR)?;
    Ok(rustix::mount::mount(SHARE_TAG, SHARES_DIR, "virtiofs", MountFlags::empty(), None)?)
}

fn read<T>(path: &'static str, parse: fn(&[u8]) -> io::Result<T>) -> Result<T, BootError> {
    fs::read(path).and_then(|bytes| parse(&bytes)).map_err(|source| BootError::Config { path, source })
}

/// Names every missing driver at once, by its kernel option.
fn check_drivers(config: &BootConfig) -> Result<(), BootError> {
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has_filesystem = |name: &str| filesystems.split_whitespace().any(|word| word == name);
    let mut missing = Vec::new();
    let mut need = |present: bool, option: &'static str| {
        if !present {
            missing.push(option);
        }
    };
    need(has_filesystem("erofs"), "EROFS (CONFIG_EROFS_FS)");
    need(has_filesystem("overlay"), "overlayfs (CONFIG_OVERLAY_FS)");
    need(has_filesystem("cgroup2"), "cgroup v2 (CONFIG_CGROUPS)");
    need(syscalls::has_io_ports(), "I/O ports for PID 1 (CONFIG_X86_IOPL_IOPERM)");
    need(Path::new("/sys/bus/virtio").exists(), "virtio (CONFIG_VIRTIO)");
    need(
        Path::new("/sys/bus/platform/drivers/virtio-mmio").exists(),
        "virtio over MMIO (CONFIG_VIRTIO_MMIO, CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES)",
    );
    need(Path::new("/sys/bus/virtio/drivers/virtio_blk").exists(), "virtio block (CONFIG_VIRTIO_BLK)");
    need(
        Path::new("/sys/bus/virtio/drivers/vmw_vsock_virtio_transport").exists(),
        "virtio vsock (CONFIG_VIRTIO_VSOCKETS)",
    );
    need(
        !network::is_given() || Path::new("/sys/bus/virtio/drivers/virtio_net").exists(),
        "virtio network (CONFIG_VIRTIO_NET)",
    );
    need(!config.share || has_filesystem("virtiofs"), "virtio file system (CONFIG_VIRTIO_FS)");
    if missing.is_empty() && config.layers.iter().any(|layer| !Path::new(layer).exists()) {
        missing.push("virtio-mmio devices from the command line (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES)");
    }
    if missing.is_empty() { Ok(()) } else { Err(BootError::MissingDrivers(missing.join(", "))) }
}

/// On a host of many gigabytes the kernel refuses no allocation that a container under a memory limit can ask for; the
/// limit acts when memory is used. So that a small guest does not refuse it either, nothing is refused here.
fn allow_overcommit() {
    if let Err(error) = fs::write("/proc/sys/vm/overcommit_memory", "1") {
        say(&format!("cannot allow overcommitted memory: {error}"));
    }
}

/// The guest has no RTC. A clock that cannot be set is no reason to fail: time then starts in 1970, as on a board
/// without a battery.
fn set_clock(realtime_ns: u64) {
    let time = rustix::time::Timespec {
        tv_sec: (realtime_ns / 1_000_000_000) as i64,
        tv_nsec: (realtime_ns % 1_000_000_000) as _,
    };
    if let Err(error) = rustix::time::clock_settime(rustix::time::ClockId::Realtime, time) {
        say(&format!("cannot set the clock: {error}"));
    }
}
