//! The open phase: every file that a VM needs is opened here, and every descriptor that it inherited is taken, before
//! anything of the VM exists. After it, the process needs no path any more, and the jail takes them all away.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
};

use kvm_ioctls::{Cap, Kvm};

use crate::{
    backends::{
        disk::{Disk, DiskError, DiskOptions, SECTOR_BYTES},
        frame_socket::FrameSocket,
        link::Link,
        share::Channel,
        tap::{Tap, TapError},
    },
    boot::initramfs::Part,
    config::{DiskCache, InitramfsPart, NetBackend, PmemConfig, VmConfig, VsockPort},
    control::api::MAX_CLIENTS,
    jail::Limits,
    syscalls::{self, take_inherited_fd},
    virtio::pmem,
};

/// Version of the KVM API; it has not changed since Linux 2.6.22 (Linux `Documentation/virt/kvm/api.rst` §4.1).
const KVM_API_VERSION: i32 = 12;

/// What a machine cannot do without.
const REQUIRED_CAPABILITIES: [(Cap, &str); 5] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

/// Everything that was opened.
pub struct Opened<'a> {
    /// `/dev/kvm`.
    pub kvm: Kvm,
    /// The socket device's streams, by the port that the guest connects to.
    pub ports: Vec<(u32, OwnedFd)>,
    /// The kernel's file.
    pub kernel: File,
    /// The initramfs.
    pub initramfs: Vec<Part<'a>>,
    /// Disks in the configuration's order.
    pub disks: Vec<Disk>,
    /// Files in the guest's memory, in the configuration's order.
    pub pmems: Vec<Disk>,
    /// What is at the other end of each network device, in the configuration's order.
    pub links: Vec<Box<dyn Link>>,
    /// The file server of the share.
    pub share: Option<Channel>,
    /// The console device's terminal.
    pub terminal: Option<UnixStream>,
    /// Where the console's contents go in the end.
    pub console_log: Option<File>,
    /// Where clients of the control socket connect.
    pub control: Option<UnixListener>,
    /// Where host programs connect that want a stream into the guest.
    pub vsock: Option<UnixListener>,
}

/// Bytes of the console that are kept and may be written to the console log.
const CONSOLE_LOG_BYTES: u64 = 64 << 10;

impl Opened<'_> {
    /// What the devices behind these files need, while the guest of so many vCPUs runs.
    pub fn limits(&self, vcpus: u8) -> Limits {
        let written = self.disks.iter().filter(|disk| !disk.read_only());
        let largest = written.map(|disk| disk.sectors() * SECTOR_BYTES).max();
        // Host programs that reach into the guest, which the socket device bounds, and those that have not said yet
        // where they want to.
        const HOST_PROGRAMS: u32 = 1024;
        let host_programs = self.vsock.as_ref().map_or(0, |_| HOST_PROGRAMS);
        // For the VM and each vCPU its own descriptor and that of its statistics, the event loop's, clients of the
        // control socket, and some leeway for what closes late.
        Limits {
            file_bytes: largest.unwrap_or(0).max(CONSOLE_LOG_BYTES),
            more_files: 16 + 2 * u32::from(vcpus) + MAX_CLIENTS as u32 + host_programs,
        }
    }
}

/// Why something could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No usable `/dev/kvm`.
    #[error("opening /dev/kvm failed; run `cloche doctor`")]
    Kvm(#[source] kvm_ioctls::Error),
    /// Not the KVM that this program was written for.
    #[error("KVM has API version {0}, and {KVM_API_VERSION} is needed; run `cloche doctor`")]
    KvmVersion(i32),
    /// A capability is missing.
    #[error("this host's KVM lacks {0}; run `cloche doctor`")]
    Capability(&'static str),
    /// A file.
    #[error("opening the {role} {path:?} failed")]
    File {
        /// What it is for.
        role: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The share's socket.
    #[error("the share.socket_fd {fd} cannot be used")]
    Share {
        /// Its number.
        fd: i32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An inherited socket.
    #[error("the {field} {fd} cannot be used")]
    Socket {
        /// Its field in the configuration.
        field: &'static str,
        /// Its number.
        fd: RawFd,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An inherited descriptor.
    #[error("the descriptor {fd} for vsock port {port} cannot be used")]
    Port {
        /// The port.
        port: u32,
        /// The descriptor's number.
        fd: RawFd,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A tap.
    #[error("the {backend} cannot be used")]
    Tap {
        /// Which.
        backend: NetBackend,
        /// Why not.
        #[source]
        source: TapError,
    },
    /// The other end of a network device that is no tap, or a descriptor that is not open.
    #[error("the {backend} cannot be used")]
    Link {
        /// Which.
        backend: NetBackend,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file in the guest's memory.
    #[error("the persistent memory {path:?} cannot be used: {problem}")]
    Pmem {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        problem: &'static str,
    },
    /// A disk.
    #[error("the disk {path:?} cannot be used")]
    Disk {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: DiskError,
    },
}

/// Opens everything that `config` names.
pub fn open<'a>(config: &VmConfig, embedded_initramfs: &'a [u8]) -> Result<Opened<'a>, OpenError> {
    let initramfs = config.initramfs.iter().map(|part| match part {
        InitramfsPart::Embedded => Ok(Part::embedded(embedded_initramfs)),
        InitramfsPart::File(path) => Part::open(path).map_err(file_error("initramfs", path)),
    });
    let disks = config.disks.iter().map(|disk| {
        let options = DiskOptions {
            read_only: disk.read_only,
            direct: disk.direct,
            never_flush: disk.cache == DiskCache::Unsafe,
        };
        let failed = |path: &PathBuf| {
            let path = path.clone();
            move |source| OpenError::Disk { path, source }
        };
        let mut opened = Disk::open(&disk.path, options).map_err(failed(&disk.path))?;
        disk.more.iter().try_for_each(|path| opened.append(path).map_err(failed(path)))?;
        Ok(opened)
    });
    let ports = config.vsock.iter().flat_map(|vsock| &vsock.ports).map(|&VsockPort { port, fd }| {
        let taken = syscalls::take_inherited_fd(fd);
        taken.map(|fd| (port, fd)).map_err(|source| OpenError::Port { port, fd, source })
    });
    Ok(Opened {
        ports: ports.collect::<Result<_, _>>()?,
        kernel: open_kernel(config)?,
        initramfs: initramfs.collect::<Result<_, _>>()?,
        disks: disks.collect::<Result<_, _>>()?,
        pmems: config.pmems.iter().map(open_pmem).collect::<Result<_, _>>()?,
        links: config.nets.iter().map(|net| open_link(&net.backend)).collect::<Result<_, _>>()?,
        share: config.share.as_ref().map(|share| open_share(share.socket_fd)).transpose()?,
        terminal: config.console.as_ref().and_then(|its| its.socket_fd).map(take_terminal).transpose()?,
        console_log: config
            .console_log
            .as_ref()
            .map(|path| {
                OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .open(path)
                    .map_err(file_error("console log", path))
            })
            .transpose()?,
        control: take_listener("control_fd", config.control_fd)?,
        vsock: take_listener("vsock.listen_fd", config.vsock.as_ref().and_then(|vsock| vsock.listen_fd))?,
        // Last, so that a wrong path is reported on any host.
        kvm: open_kvm()?,
    })
}

fn take_terminal(fd: RawFd) -> Result<UnixStream, OpenError> {
    let take = || {
        let socket = UnixStream::from(syscalls::take_inherited_fd(fd)?);
        // It fails on what is no connected unix socket.
        socket.peer_addr()?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    take().map_err(|source| OpenError::Socket { field: "console.socket_fd", fd, source })
}

fn take_listener(field: &'static str, fd: Option<RawFd>) -> Result<Option<UnixListener>, OpenError> {
    let Some(fd) = fd else { return Ok(None) };
    let take = || {
        let listener = UnixListener::from(syscalls::take_inherited_fd(fd)?);
        // It fails on what is no unix socket.
        listener.local_addr()?;
        listener.set_nonblocking(true)?;
        Ok(Some(listener))
    };
    take().map_err(|source| OpenError::Socket { field, fd, source })
}

/// A file that the guest writes has all its pages, and blocks on the disk for all of them: where there is none, a write
/// of the guest to its own memory would have nobody to be told of the failure.
fn open_pmem(pmem: &PmemConfig) -> Result<Disk, OpenError> {
    let PmemConfig { path, read_only } = pmem;
    let options = DiskOptions { read_only: *read_only, ..DiskOptions::default() };
    let disk = Disk::open(path, options).map_err(|source| OpenError::Disk { path: path.clone(), source })?;
    let metadata = rustix::fs::fstat(disk.as_fd())
        .map_err(|source| file_error("persistent memory", path)(source.into()))?;
    let bytes = disk.sectors() * SECTOR_BYTES;
    let problem = if !rustix::fs::FileType::from_raw_mode(metadata.st_mode).is_file() {
        Some("it is no regular file")
    } else if !*read_only && bytes != pmem::region_bytes(bytes) {
        Some("the guest may write it, and its size is no multiple of 2 MiB from 16 MiB on")
    } else if !*read_only && (metadata.st_blocks as u64) * SECTOR_BYTES < bytes {
        Some("it has holes, and the guest may write it; fill them with `fallocate`")
    } else {
        None
    };
    match problem {
        Some(problem) => Err(OpenError::Pmem { path: path.clone(), problem }),
        None => Ok(disk),
    }
}

fn open_link(backend: &NetBackend) -> Result<Box<dyn Link>, OpenError> {
    let link = |source| OpenError::Link { backend: backend.clone(), source };
    let tap = |source| OpenError::Tap { backend: backend.clone(), source };
    Ok(match backend {
        NetBackend::TapFd(fd) => Box::new(Tap::inherit(take_inherited_fd(*fd).map_err(link)?).map_err(tap)?),
        NetBackend::TapName(name) => Box::new(Tap::open(name).map_err(tap)?),
        NetBackend::SocketFd(fd) => {
            Box::new(take_inherited_fd(*fd).and_then(FrameSocket::inherit).map_err(link)?)
        }
        NetBackend::SocketPath(path) => Box::new(FrameSocket::connect(path).map_err(link)?),
    })
}

fn open_share(fd: i32) -> Result<Channel, OpenError> {
    syscalls::take_inherited_fd(fd).and_then(Channel::new).map_err(|source| OpenError::Share { fd, source })
}

fn open_kernel(config: &VmConfig) -> Result<File, OpenError> {
    let failed = file_error("guest kernel", &config.kernel);
    let file = match File::open(&config.kernel) {
        Ok(file) => file,
        Err(error) => return Err(failed(error)),
    };
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        Ok(_) => Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))),
        Err(error) => Err(failed(error)),
    }
}

fn file_error<'a>(role: &'static str, path: &'a std::path::Path) -> impl Fn(io::Error) -> OpenError + 'a {
    move |source| OpenError::File { role, path: path.to_owned(), source }
}

fn open_kvm() -> Result<Kvm, OpenError> {
    let kvm = Kvm::new().map_err(OpenError::Kvm)?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return Err(OpenError::KvmVersion(version));
    }
    for (capability, name) in REQUIRED_CAPABILITIES {
        if !kvm.check_extension(capability) {
            return Err(OpenError::Capability(name));
        }
    }
    Ok(kvm)
}
