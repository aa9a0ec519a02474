//! VM isolation: a VMM process with a guest in it, whose agent starts the same container as on the host.
//!
//! ```text
//!  monitor (this process)                    cloche vmm (child, jailed)        guest
//!    clone ──── config on stdin ───────────▶ boots ──────────────────────────▶ agent
//!    streams ◀────────────────── one connected socket for each ◀──── vsock ───── dials
//!    events ◀── JSON lines on its stdout ───
//! ```
//!
//! The VMM inherits its ends of the streams. It is told to die with its monitor, and nothing outlives the VMM. Both it
//! and its file server are in the sandbox's cgroup.

mod cgroup;
pub(crate) mod changes;
mod cpio;
pub(crate) mod dial;
pub mod kernel;
pub mod kvm;
pub mod oci;
pub mod process;
mod share;

use std::{
    fs::{self, Permissions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cloche_protocol::{
    VERSION,
    boot::{BOOT_CONFIG_PATH, BootConfig, FILTER_PATH, LINKS_PATH, NETWORK_PATH, SHARE_TAG, SPEC_PATH},
    frame::{self, Decoder, FrameError},
    machine::{GUEST_CID, vsock_port},
    message::{Exit, FromGuest, ToGuest},
};
use cloche_runtime::{
    Filter, Lower,
    cgroup::{CgroupError, own_base},
};
use cloche_share::Shared;
use cloche_vmm::{
    config::{ConfigError, DiskConfig, InitramfsPart, ShareConfig, VmConfig, VsockConfig, VsockPort},
    event::Event,
    jail::ThreadKind,
};
use oci_spec::runtime::Spec;
use rustix::event::{PollFd, PollFlags};

use process::{FIRST_INHERITED_FD, SpawnError, Vmm};

use self::{cgroup::VmCgroup, dial::VSOCK_SOCKET, oci::network::Network, share::FileServer};
use super::{Lost, Running, Streams, observed};
use crate::{
    record::{ProcessId, Processes},
    request::{Isolation, RunRequest},
    sandboxes::Owned,
    signals::Signals,
    spec::Workload,
    steering::CONTROL_SOCKET,
    trace::{Mark, Trace},
};

/// The guest agent, packed as the initramfs that every VM starts with.
pub static INITRAMFS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/initramfs.cpio"));

/// Guest memory when the request sets no limit, in MiB. Booting takes longer the more there is.
const DEFAULT_MEMORY_MIB: u64 = 256;
/// What the guest needs besides the container, in MiB: kernel, agent, initramfs.
const OVERHEAD_MIB: u64 = 64;
/// The agent is up within a fraction of this even on an emulated CPU.
const START_TIMEOUT_MS: u64 = 60_000;
/// For the whole start, seen from outside: what the VMM's own watch does not see.
const START_PATIENCE: Duration = Duration::from_millis(2 * START_TIMEOUT_MS);
/// Between the end of the control stream and the VMM saying why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why a VM, or the container in it, did not start.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// This machine runs no VMs.
    #[error(transparent)]
    Kvm(#[from] kvm::KvmError),
    /// No kernel to boot.
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    /// The machine asked for cannot be.
    #[error("this VM cannot be built")]
    Config(#[from] ConfigError),
    /// The sandbox's directory or processes could not be made.
    #[error("cannot {action}")]
    Setup {
        /// What was attempted.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The host's files cannot be served.
    #[error("the file server of this VM did not start: {0}")]
    Share(String),
    /// Its cgroup could not be made.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The VMM's process could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The VMM gave up or died.
    #[error("the VM did not start: {0}")]
    Vmm(String),
    /// The guest runs, but its container could not be started.
    #[error("{message}")]
    Workload {
        /// 127 not found, 126 not executable, 125 anything else.
        exit_code: u8,
        /// The runtime's own words, the same as under container isolation.
        message: String,
    },
    /// The guest says what no agent says.
    #[error("the guest agent broke the protocol")]
    Protocol(#[from] FrameError),
    /// What runs is not what was required.
    #[error("--require {required}: what was started is observed to be {}; it was stopped", match observed {
        Some(observed) => observed.name(),
        None => "hidden or gone",
    })]
    NotAsRequired {
        /// The isolation that must hold.
        required: Isolation,
        /// The isolation seen.
        observed: Option<Isolation>,
    },
    /// A signal asked for the end before the start was over.
    #[error("stopped by signal {0} before it had started")]
    Interrupted(i32),
}

impl VmError {
    /// Exit code for a command line.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Workload { exit_code, .. } => *exit_code,
            Self::Interrupted(signo) => u8::try_from(128 + signo).unwrap_or(125),
            _ => 125,
        }
    }
}

fn setup(action: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Setup { action, source }
}

/// Starts a VM with `workload` in it, on `layers` (EROFS, bottom first), and waits until the container's
/// `execve` has succeeded. `dir` is the sandbox's own directory.
pub fn start(
    sandbox: &Owned,
    workload: &Workload,
    layers: Vec<Lower>,
    request: &RunRequest,
    signals: &Signals,
    trace: &mut Trace,
) -> Result<Box<dyn Running>, VmError> {
    let (id, dir, cgroup) = (sandbox.record.id.as_str(), sandbox.dir(), sandbox.record.cgroup.as_path());
    let load = Load {
        id,
        spec: &workload.spec,
        filter: workload.filter.as_ref(),
        user: workload.user.as_deref(),
        shares: &workload.shares,
        root_share: None,
        waits: false,
        stdin: request.interactive,
        network: None,
        pod: None,
    };
    let config = machine(dir, layers, request)?;
    let mut machine =
        boot(dir, &load, config, trace, |config| VmCgroup::create(cgroup, config, &workload.shares))?;
    let mut held_back = Vec::new();
    let mut is_ready = false;
    let started = Instant::now();
    loop {
        machine.wait(signals)?;
        machine.read_events(trace)?;
        while let Some(signo) = signals.take() {
            if Signals::asks_for_the_end(signo) {
                return Err(VmError::Interrupted(signo));
            }
            held_back.push(signo);
        }
        if started.elapsed() > START_PATIENCE {
            let waited = START_PATIENCE.as_secs();
            return Err(VmError::Vmm(format!("the guest has not started the process within {waited} s")));
        }
        while let Some(message) = machine.receive()? {
            match message {
                // The guest says that it runs; whether it does so in a VM is seen from outside, if anybody insists.
                // Once: a guest that says it for ever would keep this from its signals and its patience.
                FromGuest::Ready { .. } if is_ready => {
                    return Err(VmError::Vmm(
                        "its agent reports for the second time that it is ready".into(),
                    ));
                }
                FromGuest::Ready { version } if version == VERSION => {
                    is_ready = true;
                    if let Some(required) = request.require {
                        let observed = observed::isolation(machine.vmm.pid());
                        if observed != Some(required) {
                            return Err(VmError::NotAsRequired { required, observed });
                        }
                    }
                }
                FromGuest::Ready { version } => {
                    let reason = format!("its agent speaks protocol version {version}, not {VERSION}");
                    return Err(VmError::Vmm(reason));
                }
                FromGuest::Failed { exit_code, message } => {
                    return Err(VmError::Workload { exit_code, message: printable(&message) });
                }
                FromGuest::Started => {
                    trace.mark(Mark::ProcessStarted);
                    held_back.into_iter().for_each(|signo| machine.signal(signo));
                    return Ok(Box::new(machine));
                }
                FromGuest::Exited(_) | FromGuest::Created => {
                    return Err(VmError::Vmm("its agent reports what it was not asked for".into()));
                }
            }
        }
    }
}

/// What is put into a VM.
struct Load<'a> {
    id: &'a str,
    spec: &'a Spec,
    filter: Option<&'a Filter>,
    user: Option<&'a str>,
    shares: &'a [Shared],
    /// As [`BootConfig`] has them.
    root_share: Option<usize>,
    waits: bool,
    stdin: bool,
    network: Option<&'a Network>,
    /// If others may join.
    pod: Option<Pod>,
}

/// What a machine has for containers that join it.
#[derive(Debug, Clone, Copy)]
struct Pod {
    /// As [`BootConfig`] has it.
    shared_memory_bytes: Option<u64>,
}

/// Boots a machine with `load` in it. `dir` is for this VM only.
fn boot(
    dir: &Path,
    load: &Load<'_>,
    mut config: VmConfig,
    trace: &mut Trace,
    cgroup: impl FnOnce(&VmConfig) -> Result<VmCgroup, CgroupError>,
) -> Result<Machine, VmError> {
    let listener = load.pod.map(|_| oci::listen_for_members(dir)).transpose();
    let listener = listener.map_err(setup("listen for containers of the pod"))?;
    let mut file_server = FileServer::new(load.shares, listener.as_ref().map(AsFd::as_fd))
        .map_err(setup("start the file server"))?;
    drop(listener);
    let control_socket = listen(dir, CONTROL_SOCKET).map_err(setup("make the VM's control socket"))?;
    let programs = listen(dir, VSOCK_SOCKET).map_err(setup("listen for host programs"))?;
    let (control, streams, mut theirs) = connect(&mut config, load.stdin)?;
    let mut inherit = |fd: OwnedFd| {
        theirs.push(fd);
        FIRST_INHERITED_FD + theirs.len() as i32 - 1
    };
    config.control_fd = Some(inherit(control_socket.into()));
    let listen_fd = inherit(programs.into());
    config.vsock.iter_mut().for_each(|vsock| vsock.listen_fd = Some(listen_fd));
    let socket = file_server.as_mut().and_then(FileServer::take_socket);
    if let Some(network) = load.network {
        config.nets = network.devices(&mut inherit).map_err(setup("hand the container's network on"))?;
    }
    config.share = socket.map(|socket| ShareConfig { tag: SHARE_TAG.into(), socket_fd: inherit(socket) });
    config.validate()?;
    write_boot_archive(dir, load, &config)?;
    // It gets ready while the VM boots.
    let companion = file_server.as_mut().and_then(FileServer::take_process);
    let vmm = Vmm::spawn_in(cgroup(&config)?, &config, &theirs, companion)?;
    // Only then their end is seen.
    drop(theirs);
    trace.mark(Mark::VmmSpawned);
    let mut machine = Machine {
        dir: dir.to_owned(),
        most_changes_bytes: changes::most_bytes(config.memory_mib),
        vmm,
        file_server,
        control: Some(control),
        silent_since: None,
        decoder: Decoder::default(),
        streams: Some(streams),
    };
    machine.await_file_server(trace)?;
    Ok(machine)
}

/// Whether a VM started now would have a cgroup with limits; makes one and removes it.
pub(crate) fn probe_cgroup() -> Result<bool, CgroupError> {
    let path = own_base().join(format!("cloche-doctor-{}", std::process::id()));
    let mut made = VmCgroup::create(&path, &VmConfig::new(1, 128, ""), &[])?;
    made.limit()?;
    let limited = made.is_limited();
    made.remove().map(|()| limited)
}

/// A socket for other programs of this user: to ask the VM (`cloche_vmm::control`), or to reach into it (`dial`). The
/// sandbox's directory keeps everybody else out, too.
fn listen(dir: &Path, name: &str) -> io::Result<UnixListener> {
    let (_held, short) = dial::short(dir)?;
    let path = short.join(name);
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The machine for this request.
fn machine(dir: &Path, layers: Vec<Lower>, request: &RunRequest) -> Result<VmConfig, VmError> {
    let vcpus = request.millicpus.unwrap_or(1000).div_ceil(1000);
    let mut config = machine_of(dir, request.memory_bytes, vcpus, request.kernel.as_deref())?;
    config.disks = layers
        .into_iter()
        .enumerate()
        .map(|(index, Lower { path, devices })| {
            DiskConfig::new(path, format!("layer{index}")).followed_by(devices)
        })
        .collect();
    Ok(config)
}

/// A machine for a container with this memory limit.
fn machine_of(
    dir: &Path,
    memory_bytes: Option<u64>,
    vcpus: u64,
    kernel: Option<&Path>,
) -> Result<VmConfig, VmError> {
    let memory_mib = match memory_bytes {
        // The limit is the container's. On top come the agent and the kernel with its map of all pages (1/64).
        Some(bytes) => (bytes.div_ceil(1 << 20) * 33 / 32).saturating_add(OVERHEAD_MIB),
        None => DEFAULT_MEMORY_MIB,
    };
    kvm::check()?;
    let kernel = kernel::find(kernel)?;
    let mut config = VmConfig::new(
        u8::try_from(vcpus).unwrap_or(u8::MAX),
        u32::try_from(memory_mib).unwrap_or(u32::MAX),
        kernel,
    );
    config.initramfs = vec![InitramfsPart::Embedded, InitramfsPart::File(dir.join("boot.cpio"))];
    config.vsock = Some(VsockConfig { guest_cid: GUEST_CID, listen_fd: None, ports: Vec::new() });
    config.rng = true;
    config.start_timeout_ms = Some(START_TIMEOUT_MS);
    // The VMM's stdout.
    config.events_fd = Some(1);
    Ok(config)
}

/// Gives the guest a port for each of its streams. Returns the control stream, the others, and what the VMM inherits.
fn connect(config: &mut VmConfig, interactive: bool) -> Result<(UnixStream, Streams, Vec<OwnedFd>), VmError> {
    let mut theirs = Vec::new();
    let mut pair = |port| -> io::Result<UnixStream> {
        let (ours, vmms) = UnixStream::pair()?;
        for end in [&ours, &vmms] {
            end.set_nonblocking(true)?;
        }
        let fd = FIRST_INHERITED_FD + theirs.len() as i32;
        config.vsock.iter_mut().for_each(|vsock| vsock.ports.push(VsockPort { port, fd }));
        theirs.push(vmms.into());
        Ok(ours)
    };
    let mut connect = || {
        let stdin = if interactive { Some(pair(vsock_port::STDIN)?.into()) } else { None };
        let (stdout, stderr) = (pair(vsock_port::STDOUT)?.into(), pair(vsock_port::STDERR)?.into());
        Ok((pair(vsock_port::CONTROL)?, Streams { stdin, stdout, stderr }))
    };
    let (control, streams) = connect().map_err(setup("make the guest's streams"))?;
    Ok((control, streams, theirs))
}

/// The kernel's names for virtio disks: vda to vdz, then vdaa.
fn disk_device(index: usize) -> String {
    let letter = |n: usize| char::from(b'a' + (n % 26) as u8);
    match index.checked_sub(26) {
        None => format!("/dev/vd{}", letter(index)),
        Some(over) => format!("/dev/vd{}{}", letter(over / 26), letter(over)),
    }
}

fn write_boot_archive(dir: &Path, load: &Load<'_>, config: &VmConfig) -> Result<(), VmError> {
    let realtime = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let boot = BootConfig {
        version: VERSION,
        id: load.id.into(),
        layers: (0..config.disks.len()).map(disk_device).collect(),
        root_share: load.root_share,
        waits: load.waits,
        user: load.user.map(str::to_owned),
        upper_bytes: None,
        shared_memory_bytes: load.pod.and_then(|pod| pod.shared_memory_bytes),
        share: config.share.is_some(),
        stdin: load.stdin,
        realtime_ns: realtime.tv_sec as u64 * 1_000_000_000 + realtime.tv_nsec as u64,
    };
    let json = |value: Result<Vec<u8>, serde_json::Error>| {
        value.map_err(|error| setup("write the guest's configuration")(error.into()))
    };
    let mut archive = cpio::Archive::default();
    archive.directory("cloche");
    archive.file(BOOT_CONFIG_PATH, 0o600, &json(serde_json::to_vec(&boot))?);
    archive.file(SPEC_PATH, 0o600, &json(serde_json::to_vec(load.spec))?);
    if let Some(filter) = load.filter {
        archive.file(FILTER_PATH, 0o600, &filter.to_bytes());
    }
    if let Some(messages) = load.network.and_then(Network::messages) {
        archive.file(LINKS_PATH, 0o600, &messages.links);
        archive.file(NETWORK_PATH, 0o600, &messages.network);
    }
    fs::write(dir.join("boot.cpio"), archive.finish()).map_err(setup("write the guest's configuration"))
}

/// A VM with a container in it.
struct Machine {
    dir: PathBuf,
    /// Of what the container in it can have written.
    most_changes_bytes: u64,
    vmm: Vmm,
    file_server: Option<FileServer>,
    control: Option<UnixStream>,
    /// When the guest closed the control stream. A VM on its way down does so shortly before the VMM says why.
    silent_since: Option<Instant>,
    decoder: Decoder,
    streams: Option<Streams>,
}

impl Machine {
    /// Sleeps until something happens while the VM starts, or for a while.
    fn wait(&self, signals: &Signals) -> Result<(), VmError> {
        let mut fds = self.poll_fds();
        fds.push(PollFd::new(signals, PollFlags::IN));
        let timeout = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(setup("wait for the VM")(errno.into())),
        }
    }

    fn await_file_server(&mut self, trace: &mut Trace) -> Result<(), VmError> {
        let Some(server) = &mut self.file_server else { return Ok(()) };
        let ready = server.wait_until_ready().map_err(setup("watch the file server"))?;
        ready.or_else(|reason| {
            // It ends with the VMM, which knows better why.
            self.read_events(trace)?;
            Err(VmError::Share(reason))
        })
    }

    /// Takes in the VMM's marks; an end of the VM is an error that says why.
    fn read_events(&mut self, trace: &mut Trace) -> Result<(), VmError> {
        let (events, closed) = self.vmm.take_events();
        for event in events {
            match event {
                Event::Mark { name, ns } => trace.mark_at(name.into(), ns),
                Event::Exited { reason, console_tail, .. } => {
                    return Err(VmError::Vmm(with_console(reason.to_string(), &console_tail)));
                }
                Event::Seccomp { call, thread } => {
                    return Err(VmError::Vmm(seccomp_kill(call, thread)));
                }
                Event::Failed { step, message, console_tail } => {
                    return Err(VmError::Vmm(with_console(format!("{step}: {message}"), &console_tail)));
                }
            }
        }
        if closed {
            return Err(VmError::Vmm(format!("its VMM ended unexpectedly: {}", self.vmm.obituary())));
        }
        Ok(())
    }

    /// Waits for the VMM to say why the guest fell silent, but not for ever.
    fn await_last_words(&self) {
        let timeout = rustix::event::Timespec { tv_sec: LAST_WORDS.as_secs() as i64, tv_nsec: 0 };
        let _ = rustix::event::poll(
            &mut [PollFd::from_borrowed_fd(self.vmm.events(), PollFlags::IN)],
            Some(&timeout),
        );
    }

    /// Takes in the guest's last mark. The guest wrote it before its report, but the VMM passes marks on after the
    /// round of its loop that carried the report.
    fn await_last_mark(&mut self, trace: &mut Trace) {
        let deadline = Instant::now() + Duration::from_secs(1);
        while trace.get(Mark::ProcessExit).is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            let left =
                rustix::event::Timespec { tv_sec: 0, tv_nsec: left.as_nanos().min(999_999_999) as i64 };
            let mut events = [PollFd::from_borrowed_fd(self.vmm.events(), PollFlags::IN)];
            // With no time left it does not wait, and what talks on and on is heard once more at most.
            let arrived = rustix::event::poll(&mut events, Some(&left)).is_ok_and(|count| count > 0);
            let arrived = arrived && Instant::now() < deadline;
            // A mark that does not come is missed in the trace only.
            if !arrived || self.read_events(trace).is_err() {
                return;
            }
        }
    }

    /// The next message of the guest that has fully arrived.
    fn receive(&mut self) -> Result<Option<FromGuest>, FrameError> {
        if let Some(message) = self.decoder.take()? {
            return Ok(Some(message));
        }
        let Some(control) = &mut self.control else { return Ok(None) };
        let mut bytes = [0; 4096];
        match control.read(&mut bytes) {
            Ok(0) => {
                self.control = None;
                self.silent_since = Some(Instant::now());
            }
            Ok(count) => self.decoder.push(&bytes[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error.into()),
        }
        self.decoder.take()
    }
}

/// What the VMM's seccomp filter has killed it for.
pub(crate) fn seccomp_kill(call: u32, thread: ThreadKind) -> String {
    use cloche_seccomp::{bpf::X32_SYSCALL_BIT, syscall_table::name};
    let known = |number| name(number).map(str::to_owned);
    let of_x32 = || Some(format!("{} (x32)", known(call.checked_sub(X32_SYSCALL_BIT)?)?));
    let name = known(call).or_else(of_x32).unwrap_or_else(|| call.to_string());
    format!("seccomp: system call {name} on thread {}", thread.name())
}

/// A guest's words as a terminal may show them: on as many lines as they are, and no longer than anybody reads.
fn printable(words: &str) -> String {
    const MAX_CHARACTERS: usize = 4096;
    let mut shown = String::new();
    for character in words.chars().take(MAX_CHARACTERS) {
        if character.is_control() && character != '\n' {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown
}

/// A reason with the end of the guest's console under it, if there was any output.
fn with_console(reason: String, console: &str) -> String {
    let (reason, console) = (printable(&reason), printable(console));
    let console: Vec<&str> = console.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    let last = &console[console.len().saturating_sub(12)..];
    if last.is_empty() { reason } else { format!("{reason}\nguest console:\n  {}", last.join("\n  ")) }
}

impl Running for Machine {
    fn take_streams(&mut self) -> Option<Streams> {
        self.streams.take()
    }

    fn processes(&self) -> Option<Processes> {
        Some(Processes { leader: ProcessId::of(self.vmm.pid())?, writable: None })
    }

    fn poll_fds(&self) -> Vec<PollFd<'_>> {
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.vmm.pidfd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.vmm.events(), PollFlags::IN),
        ];
        let file_server = self.file_server.as_ref().and_then(FileServer::end);
        fds.extend(file_server.map(|end| PollFd::from_borrowed_fd(end, PollFlags::IN)));
        fds.extend(
            self.control.as_ref().map(|control| PollFd::from_borrowed_fd(control.as_fd(), PollFlags::IN)),
        );
        fds
    }

    fn advance(&mut self, trace: &mut Trace) -> Result<Option<Exit>, Lost> {
        match self.receive() {
            Ok(Some(FromGuest::Exited(exit))) => {
                self.await_last_mark(trace);
                return Ok(Some(exit));
            }
            Ok(Some(other)) => {
                let what = printable(&format!("{other:?}"));
                return Err(Lost(format!("the guest agent sent {what} to a running container")));
            }
            Ok(None) => {}
            Err(error) => return Err(Lost(error.to_string())),
        }
        if self.silent_since.is_some() {
            self.await_last_words();
        }
        self.read_events(trace).map_err(|error| match error {
            VmError::Vmm(reason) => Lost(format!("the VM ended under the process: {reason}")),
            other => Lost(other.to_string()),
        })?;
        // After the VMM's own end, which is the server's, too.
        if let Some(end) = self.file_server.as_mut().and_then(FileServer::take_end) {
            // The sandbox goes on; only its user can tell what that is worth.
            let _ = writeln!(io::stderr(), "cloche: {end}");
        }
        match self.silent_since {
            Some(since) if since.elapsed() >= LAST_WORDS => {
                Err(Lost("the guest agent closed its control stream under the process".into()))
            }
            _ => Ok(None),
        }
    }

    fn signal(&mut self, signo: i32) {
        if let Some(control) = &self.control {
            // A guest that does not read its control stream cannot be signalled; it can still be killed.
            let _ = frame::write(control, &ToGuest::Signal { signo });
        }
    }

    fn changes(&mut self) -> Result<Box<dyn Read + Send>, Lost> {
        let changes = changes::ask(&self.dir, false, self.most_changes_bytes);
        changes.map(|changes| Box::new(changes) as _).map_err(|error| Lost(error.to_string()))
    }

    fn teardown(self: Box<Self>) -> Result<(), Lost> {
        self.vmm.remove().map_err(|error| Lost(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_devices_are_named_as_linux_does() {
        let names: Vec<_> = [0, 25, 26, 51, 52].map(disk_device).into();
        assert_eq!(names, ["/dev/vda", "/dev/vdz", "/dev/vdaa", "/dev/vdaz", "/dev/vdba"]);
    }

    #[test]
    fn seccomp_kill_names_the_call_of_either_abi() {
        let told = |call| seccomp_kill(call, ThreadKind::Vcpu);
        assert_eq!(told(257), "seccomp: system call openat on thread vcpu");
        assert_eq!(told(0x4000_0000 | 257), "seccomp: system call openat (x32) on thread vcpu");
        assert_eq!(told(1000), "seccomp: system call 1000 on thread vcpu");
        assert_eq!(told(u32::MAX), "seccomp: system call 4294967295 on thread vcpu");
    }

    #[test]
    fn printable_words_steer_no_terminal() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a\\u{1b}[2Jb\nc");
        assert_eq!(printable(&"x".repeat(100_000)).len(), 4096);
    }

    #[test]
    fn console_is_shown_by_its_last_lines() {
        assert_eq!(with_console("reason".into(), "\n\n"), "reason");
        assert_eq!(
            with_console("reason".into(), "a\nb\x1b[2J\n"),
            "reason\nguest console:\n  a\n  b\\u{1b}[2J"
        );
    }
}
