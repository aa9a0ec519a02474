//! The throughput benchmark: disk, network and sockets of a guest, for `cloche vmm` and for other VMMs, and the same
//! work by a process of the host as the floor.
//!
//! ```text
//!   host: this program                                guest: this program as /init (or a process of the host)
//!   dials the guest's vsock port, then for each of PHASES:
//!      KVM's counter, "go"  ◀── control, over TCP ──▶  "ready", the work, the time that it took (or "skip")
//!      its part of a stream ◀── TCP, or vsock ──────▶  its part of a stream
//! ```
//!
//! All times are taken in the guest, whose clock is the host's. A stream from the guest ends when the host has answered
//! that it got all of it. There is one CPU's worth of instructions in each figure: guest, VMM and host together, where
//! the host has one CPU.

mod phases;
mod report;
mod worker;

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::thread::UnshareFlags;

use self::phases::{Carrier, DISK_BYTES, PHASES, Work};
use self::report::Outcome;
use crate::bundle::Bundle;
use crate::cpio::Archive;
use crate::guest_cost::{Counters, kvm_exits};
use crate::surroundings::Surroundings;
use crate::vmms::{self, Devices, Machine, Running, Vmm, output_file};

pub use self::report::ThroughputReport;
pub use self::worker::{guest, is_guest, process};

const MEMORY_MIB: u32 = 256;
const TAP: &str = "tap0";
/// The host's end of the guest's network. RFC 5737: for documentation, so that it is nobody's.
const HOST: &str = "192.0.2.1";
const GUEST: &str = "192.0.2.2";
/// On which the host listens.
const HOST_PORT: u16 = 7000;
/// The guest's, for vsock.
const GUEST_PORT: u32 = 7000;
/// How long a guest may take to report, and a stream to go on.
const PATIENCE: Duration = Duration::from_secs(120);
/// Bytes that this end reads and writes at a time.
const PIECE_BYTES: usize = 256 * 1024;

/// What one run of a phase cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Figure {
    /// In the guest.
    pub ns: u64,
    /// KVM's exits meanwhile, if the kernel tells.
    pub exits: Option<u64>,
}

/// Who does the work.
enum Contender {
    Process,
    Vmm(Vmm),
}

impl Contender {
    fn name(&self) -> &'static str {
        match self {
            Self::Process => "host process",
            Self::Vmm(vmm) => vmm.kind.name(),
        }
    }
}

/// What all contenders share.
struct Bed<'a> {
    scratch: &'a Path,
    listener: TcpListener,
    initramfs: PathBuf,
    disk: PathBuf,
    /// What a phase's name must contain.
    only: String,
}

/// Measures every contender, round after round.
pub fn measure(runs: u32, only_process: bool, only: String) -> Result<ThroughputReport> {
    ensure!(PHASES.iter().any(|phase| phase.name.contains(&only)), "no row has {only:?} in its name");
    let scratch = tempfile::Builder::new().prefix("cloche-bench.").tempdir().context("make a directory")?;
    let mut contenders = vec![Contender::Process];
    let mut missing = Vec::new();
    let initramfs = scratch.path().join("init.cpio");
    // Its own network, which ends with this process. Nothing else here has threads yet.
    #[expect(deprecated, reason = "its successor is unsafe")]
    rustix::thread::unshare(UnshareFlags::NEWNET).context("make a network namespace; this needs root")?;
    sh("ip link set lo up")?;
    if !only_process {
        let cloche = vmms::cloche()?;
        let bundle = Bundle::make(&cloche, scratch.path().join("bundle"))?;
        let own = fs::read("/proc/self/exe").context("read this program")?;
        let busybox = fs::read(bundle.busybox()).context("read busybox")?;
        let mut archive = Archive::default();
        archive.directory("dev").directory("bin").program("init", &own).program("bin/busybox", &busybox);
        fs::write(&initramfs, archive.finish()).context("write an initramfs")?;
        let (found, lacking) = vmms::all(&cloche)?;
        missing = lacking;
        contenders.extend(found.into_iter().map(Contender::Vmm));
        sh(&format!(
            "ip tuntap add dev {TAP} mode tap vnet_hdr; ip address add {HOST}/24 dev {TAP}; ip link set {TAP} up"
        ))?;
    }
    let listener = TcpListener::bind(("0.0.0.0", HOST_PORT)).context("listen for guests")?;
    listener.set_nonblocking(true)?;
    let bed = Bed { scratch: scratch.path(), listener, initramfs, disk: scratch.path().join("disk"), only };
    fill(&bed.disk)?;
    let mut outcomes: Vec<(Contender, Outcome)> =
        contenders.into_iter().map(|contender| (contender, Outcome::default())).collect();
    for round in 1..=runs {
        eprintln!("cloche-bench: round {round} of {runs}");
        for (contender, outcome) in &mut outcomes {
            match bed.run(contender) {
                Ok(figures) => outcome.add(figures),
                Err(error) if round == 1 && !is_own(contender) => {
                    outcome.failure = Some(format!("{error:#}"));
                }
                Err(error) => return Err(error.context(format!("measure {}", contender.name()))),
            }
        }
        outcomes.retain(|(contender, outcome)| {
            let failure = outcome.failure.as_ref();
            missing.extend(failure.map(|why| format!("{}: does not run here: {why}", contender.name())));
            failure.is_none()
        });
    }
    let programs: Vec<&Path> = outcomes
        .iter()
        .filter_map(|(contender, _)| match contender {
            Contender::Process => None,
            Contender::Vmm(vmm) => Some(vmm.program()),
        })
        .collect();
    Ok(ThroughputReport {
        runs,
        surroundings: Surroundings::explore(&programs),
        columns: outcomes.into_iter().map(|(contender, outcome)| (contender.name(), outcome)).collect(),
        missing,
    })
}

fn is_own(contender: &Contender) -> bool {
    match contender {
        Contender::Process => true,
        Contender::Vmm(vmm) => vmm.kind == vmms::Kind::Cloche,
    }
}

fn sh(script: &str) -> Result<()> {
    let output = Command::new("sh").args(["-euc", script]).output().context("start sh")?;
    ensure!(output.status.success(), "`{script}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

fn fill(disk: &Path) -> Result<()> {
    let mut file = File::create(disk).context("make a disk")?;
    let piece: Vec<u8> = (0..1 << 20).map(|index: u32| (index % 251) as u8).collect();
    for _ in 0..DISK_BYTES / piece.len() as u64 {
        file.write_all(&piece).context("fill the disk")?;
    }
    Ok(())
}

impl Bed<'_> {
    fn run(&self, contender: &Contender) -> Result<Vec<Option<Figure>>> {
        let sockets = self.scratch.join("sockets");
        match contender {
            Contender::Process => {
                let _ = fs::remove_file(&sockets);
                let mut command = Command::new("/proc/self/exe");
                command.arg("worker").arg(&self.disk).arg(&sockets).stdin(Stdio::null());
                let child = command.spawn().context("start this program")?;
                let mut running = Running { child, start_ns: 0 };
                self.converse(&mut running, || Ok(Some(UnixStream::connect(&sockets)?)))
            }
            Contender::Vmm(vmm) => {
                let devices = Devices { disk: &self.disk, tap: TAP, sockets: &sockets };
                let machine = Machine {
                    memory_mib: MEMORY_MIB,
                    initramfs: &self.initramfs,
                    devices: Some(devices),
                    scratch: self.scratch,
                };
                let output = self.scratch.join("output");
                let mut running = vmm.start(&machine, output_file(&output)?)?;
                let figures = self.converse(&mut running, || match vmm.kind {
                    vmms::Kind::Qemu => Ok(None),
                    _ => dial(&sockets).map(Some),
                });
                if figures.is_err() {
                    let _ = running.child.kill();
                }
                let end = running.child.wait().context("wait for the VMM");
                figures.with_context(|| {
                    let console = vmm.console(&machine).unwrap_or(output);
                    let text = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
                    let lines: Vec<&str> = text.lines().collect();
                    let last = lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n");
                    format!("it ended with {end:?}: {}\nits last words: {last}", running.complaint().trim())
                })
            }
        }
    }

    /// The host's side of a run.
    fn converse(
        &self,
        running: &mut Running,
        dial: impl Fn() -> Result<Option<UnixStream>>,
    ) -> Result<Vec<Option<Figure>>> {
        let _counters = Counters::open();
        let mut control = self.accept(running)?;
        let mut network = self.accept(running)?;
        let mut sockets = dial().context("open a stream into the guest")?;
        if let Some(stream) = &sockets {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
        }
        // Whether there is one.
        control.write_all(&[sockets.is_some().into()])?;
        let mut buffer = vec![0; PIECE_BYTES];
        let mut figures = Vec::new();
        for phase in PHASES {
            let mut ready = [0];
            control
                .read_exact(&mut ready)
                .with_context(|| format!("wait for the guest before {}", phase.name))?;
            let impossible = phase.carrier() == Some(Carrier::Sockets) && sockets.is_none();
            if impossible || !phase.name.contains(&self.only) {
                control.write_all(&[0])?;
                figures.push(None);
                continue;
            }
            let before = kvm_exits();
            control.write_all(&[1])?;
            let part = match phase.carrier() {
                None => Ok(()),
                Some(Carrier::Network) => serve(&mut network, &phase.work, &mut buffer),
                Some(Carrier::Sockets) => match &mut sockets {
                    Some(stream) => serve(stream, &phase.work, &mut buffer),
                    None => Ok(()),
                },
            };
            part.with_context(|| format!("the host's part of {}", phase.name))?;
            let mut ns = [0; 8];
            control.read_exact(&mut ns).with_context(|| format!("wait for the end of {}", phase.name))?;
            let exits = before.zip(kvm_exits()).map(|(before, after)| after.saturating_sub(before));
            figures.push(Some(Figure { ns: u64::from_le_bytes(ns), exits }));
        }
        Ok(figures)
    }

    fn accept(&self, running: &mut Running) -> Result<TcpStream> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(PATIENCE))?;
                    stream.set_write_timeout(Some(PATIENCE))?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("accept a guest"),
            }
            if let Some(status) = running.child.try_wait()? {
                bail!("it ended before its guest reported: {status}");
            }
            ensure!(Instant::now() < deadline, "its guest did not report within {} s", PATIENCE.as_secs());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The host's part of a stream.
fn serve<S: std::io::Read + Write>(stream: &mut S, work: &Work, buffer: &mut [u8]) -> Result<()> {
    match *work {
        Work::Send { bytes, .. } => {
            worker::take(stream, bytes, buffer)?;
            stream.write_all(&[1])?;
        }
        Work::Receive { bytes, .. } => {
            let mut go = [0];
            stream.read_exact(&mut go)?;
            worker::give(stream, bytes, buffer)?;
        }
        Work::Disk { .. } => {}
    }
    Ok(())
}

/// A stream to the guest's port, by the words that both Firecracker and Cloche understand.
fn dial(sockets: &Path) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(sockets).context("connect to the VMM's socket")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // At once: Firecracker takes a line only whole.
    stream.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut byte = [0];
    // Not a byte more than the line.
    while byte != *b"\n" {
        ensure!(stream.read(&mut byte)? == 1 && answer.len() < 32, "the guest took no stream");
        answer.extend(byte);
    }
    ensure!(answer.starts_with(b"OK "), "the guest took no stream: {}", String::from_utf8_lossy(&answer));
    Ok(stream)
}
