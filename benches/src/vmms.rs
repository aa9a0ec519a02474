//! The VMMs that are compared, and how each is told to run the same machine: its best command line for a guest of ours.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::{Value, json};

use crate::alone;
use crate::contender::find_program;
use crate::stopwatch::now_ns;

#[path = "../../vmm/src/boot/options.rs"]
mod options;

/// What spares QEMU's guest a search for clocks.
const CLOCKS: &str = "no_timer_check tsc=reliable";
/// The guest's Ethernet address.
const MAC: &str = "02:00:00:00:00:02";
/// The guest's context id.
const CID: u32 = 3;

/// Who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `cloche vmm`.
    Cloche,
    /// Firecracker without its API.
    Firecracker,
    /// QEMU's microvm machine.
    Qemu,
}

/// A VMM.
#[derive(Debug)]
pub struct Vmm {
    /// Who it is.
    pub kind: Kind,
    program: PathBuf,
    kernel: PathBuf,
}

/// The machine that a VMM is to run, with one vCPU.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Memory.
    pub memory_mib: u32,
    /// What the kernel unpacks.
    pub initramfs: &'a Path,
    /// Disk, network and sockets, if it has any.
    pub devices: Option<Devices<'a>>,
    /// A directory for the VMM's configuration, and for its guest's last words.
    pub scratch: &'a Path,
}

/// A machine's devices.
#[derive(Debug)]
pub struct Devices<'a> {
    /// A file.
    pub disk: &'a Path,
    /// Name of a tap.
    pub tap: &'a str,
    /// Where host programs connect that want a stream into the guest. QEMU's has none: its vsock is the host's kernel.
    pub sockets: &'a Path,
}

/// A VMM that runs. It is killed if it has not ended when this is dropped.
#[derive(Debug)]
pub struct Running {
    /// Its process.
    pub child: Child,
    /// Just before its spawn, on CLOCK_MONOTONIC.
    pub start_ns: u64,
}

impl Running {
    /// What it said on standard error, once it has ended.
    pub fn complaint(&mut self) -> String {
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut said);
        }
        said
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Kind {
    /// Its name in the tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cloche => "cloche vmm",
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu microvm",
        }
    }

    /// The variable that names its program, and the name by which it is looked for otherwise.
    fn program(self) -> (&'static str, &'static str) {
        match self {
            Self::Cloche => ("CLOCHE_BIN", "cloche"),
            Self::Firecracker => ("FIRECRACKER_BIN", "firecracker"),
            Self::Qemu => ("QEMU_BIN", "qemu-system-x86_64"),
        }
    }

    fn find(self) -> Option<PathBuf> {
        let (variable, name) = self.program();
        std::env::var_os(variable).map(PathBuf::from).or_else(|| find_program(name))
    }
}

/// The program under test.
pub fn cloche() -> Result<PathBuf> {
    Kind::Cloche.find().context("cloche is not on PATH; set CLOCHE_BIN")
}

/// Those to be had here, and what is missing.
pub fn all(cloche: &Path) -> Result<(Vec<Vmm>, Vec<String>)> {
    let kernel = Command::new(cloche).args(["kernel", "path"]).output().context("ask for the kernel")?;
    ensure!(kernel.status.success(), "there is no guest kernel; run `cloche kernel build`");
    let kernel = PathBuf::from(String::from_utf8(kernel.stdout)?.trim_end());
    let mut vmms = vec![Vmm { kind: Kind::Cloche, program: cloche.to_owned(), kernel: kernel.clone() }];
    let mut missing = Vec::new();
    for kind in [Kind::Firecracker, Kind::Qemu] {
        match kind.find() {
            Some(program) => vmms.push(Vmm { kind, program, kernel: kernel.clone() }),
            None => {
                missing.push(format!("{}: not found on this machine; set {}", kind.name(), kind.program().0));
            }
        }
    }
    Ok((vmms, missing))
}

impl Vmm {
    /// Its program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Starts it on a machine. What it says goes to `stdout`: Cloche's events, or the peers' serial console.
    pub fn start(&self, machine: &Machine, stdout: Stdio) -> Result<Running> {
        match self.kind {
            Kind::Cloche => self.start_cloche(machine, stdout),
            Kind::Firecracker => start(self.firecracker(machine)?, stdout),
            Kind::Qemu => start(self.qemu(machine), stdout),
        }
    }

    /// The last words of a machine's guest, where they do not go to `stdout`.
    pub fn console(&self, machine: &Machine) -> Option<PathBuf> {
        (self.kind == Kind::Cloche && machine.devices.is_some())
            .then(|| machine.scratch.join("cloche-console"))
    }

    fn start_cloche(&self, machine: &Machine, stdout: Stdio) -> Result<Running> {
        let mut config = json!({
            "vcpus": 1,
            "memory_mib": machine.memory_mib,
            "kernel": self.kernel,
            "initramfs": [{ "file": machine.initramfs }],
            "events_fd": 1,
        });
        let mut listener = None;
        if let (Some(devices), Value::Object(fields)) = (&machine.devices, &mut config) {
            let _ = fs::remove_file(devices.sockets);
            let socket = UnixListener::bind(devices.sockets).context("listen for streams into the guest")?;
            // The VMM inherits it by its number.
            fcntl_setfd(&socket, FdFlags::empty()).context("let the VMM inherit a socket")?;
            fields.insert("console_log".to_owned(), json!(self.console(machine)));
            fields.insert("disks".to_owned(), json!([{ "path": devices.disk, "id": "bench" }]));
            fields.insert("nets".to_owned(), json!([{ "backend": { "tap-name": devices.tap }, "mac": MAC }]));
            fields.insert("vsock".to_owned(), json!({ "guest_cid": CID, "listen_fd": socket.as_raw_fd() }));
            listener = Some(socket);
        }
        let mut command = Command::new(&self.program);
        command.arg("vmm").stdin(Stdio::piped()).stdout(stdout).stderr(Stdio::piped());
        let config = config.to_string();
        let start_ns = now_ns();
        // A VMM's parent gives it a PID namespace; that is part of its start.
        let child = alone::spawn(&mut command).context("start `cloche vmm`")?;
        let mut running = Running { child, start_ns };
        drop(listener);
        let mut stdin = running.child.stdin.take().context("stdin is piped")?;
        stdin.write_all(config.as_bytes()).context("hand over the configuration")?;
        Ok(running)
    }

    fn firecracker(&self, machine: &Machine) -> Result<Command> {
        let mut config = json!({
            "boot-source": {
                "kernel_image_path": self.kernel,
                "initrd_path": machine.initramfs,
                "boot_args": peer_command_line(),
            },
            "drives": [],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": machine.memory_mib },
        });
        if let (Some(devices), Value::Object(fields)) = (&machine.devices, &mut config) {
            let _ = fs::remove_file(devices.sockets);
            fields.insert(
                "drives".to_owned(),
                json!([{
                    "drive_id": "bench",
                    "path_on_host": devices.disk,
                    "is_root_device": false,
                    "is_read_only": false,
                }]),
            );
            fields.insert(
                "network-interfaces".to_owned(),
                json!([{ "iface_id": "eth0", "host_dev_name": devices.tap, "guest_mac": MAC }]),
            );
            fields.insert("vsock".to_owned(), json!({ "guest_cid": CID, "uds_path": devices.sockets }));
        }
        let file = machine.scratch.join("firecracker.json");
        fs::write(&file, config.to_string()).context("write Firecracker's configuration")?;
        let mut command = Command::new(&self.program);
        command.args(["--no-api", "--config-file"]).arg(file);
        Ok(command)
    }

    fn qemu(&self, machine: &Machine) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["-M", "microvm,acpi=off,x-option-roms=off,rtc=off,pit=off,pic=off,isa-serial=on"])
            .args(["-enable-kvm", "-cpu", "host", "-smp", "1", "-m", &machine.memory_mib.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-serial", "stdio", "-append", &peer_command_line()])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(machine.initramfs);
        if let Some(devices) = &machine.devices {
            command
                .args(["-global", "virtio-mmio.force-legacy=false"])
                .arg("-drive")
                .arg(format!("id=bench,if=none,format=raw,file={}", devices.disk.display()))
                .args(["-device", "virtio-blk-device,drive=bench"])
                .arg("-netdev")
                .arg(format!("tap,id=net,ifname={},script=no,downscript=no", devices.tap))
                .args(["-device", &format!("virtio-net-device,netdev=net,mac={MAC}")]);
        }
        command
    }
}

/// What `cloche vmm` tells the kernel, but for devices, and [`CLOCKS`].
fn peer_command_line() -> String {
    [options::OPTIONS, options::ONE_VCPU, CLOCKS].join(" ")
}

fn start(mut command: Command, stdout: Stdio) -> Result<Running> {
    command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
    let start_ns = now_ns();
    let child = command.spawn().with_context(|| format!("start {}", command.get_program().display()))?;
    Ok(Running { child, start_ns })
}

/// A file for what a VMM says.
pub fn output_file(path: &Path) -> Result<Stdio> {
    Ok(File::create(path).with_context(|| format!("create {}", path.display()))?.into())
}
