//! The VMM alone: from its spawn to the first instruction of `/init`, and from there until the process is reaped, for
//! `cloche vmm` and for other VMMs, with one kernel and one initramfs.
//!
//! The guest's `/init` prints a line on the console, writes Cloche's mark port, waits until the line is out, and
//! resets the machine. Cloche's moment is the mark, which comes after the line was handed to the console; a peer's is
//! the line arriving here.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::alone;
use crate::contender::find_program;
use crate::stopwatch::now_ns;

#[path = "../../engine/src/isolation/vm/cpio.rs"]
mod cpio;

const MEMORY_MIB: u32 = 128;
/// What `cloche vmm` tells the kernel, and what spares QEMU's guest a search for clocks.
const PEER_COMMAND_LINE: &str =
    "console=ttyS0 quiet reboot=t panic=-1 8250.nr_uarts=1 noreplace-smp no_timer_check tsc=reliable";

/// The program that is `/init`:
/// `write(1, "init\n", 5); if (!ioperm(0x5c0, 8, 1)) outb(1, 0x5c0); ioctl(1, TCSBRK, 1); reboot(…RESTART); ud2`.
const INIT_CODE: [u8; 109] = [
    0xb8, 1, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0x48, 0x8d, 0x35, 0x57, 0, 0, 0, 0xba, 5, 0, 0, 0, 0x0f,
    0x05, //
    0xb8, 173, 0, 0, 0, 0xbf, 0xc0, 0x05, 0, 0, 0xbe, 8, 0, 0, 0, 0xba, 1, 0, 0, 0, 0x0f, 0x05, //
    0x85, 0xc0, 0x75, 0x08, 0xba, 0xc0, 0x05, 0, 0, 0xb0, 1, 0xee, //
    0xb8, 16, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0xbe, 0x09, 0x54, 0, 0, 0xba, 1, 0, 0, 0, 0x0f, 0x05, //
    0xb8, 169, 0, 0, 0, 0xbf, 0xad, 0xde, 0xe1, 0xfe, 0xbe, 0x69, 0x19, 0x12, 0x28, //
    0xba, 0x67, 0x45, 0x23, 0x01, 0x0f, 0x05, 0x0f, 0x0b, //
    b'i', b'n', b'i', b't', b'\n',
];

/// One start and end of a VM. Times are nanoseconds on CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy)]
pub struct VmLap {
    /// Just before the spawn.
    pub start_ns: u64,
    /// `/init` runs.
    pub init_ns: u64,
    /// The process was waited for.
    pub end_ns: u64,
    /// KVM exits over the VM's life, where the VMM tells.
    pub exits: Option<u64>,
}

/// A VMM to be measured.
#[derive(Debug)]
pub enum Vmm {
    /// `cloche vmm`.
    Cloche { program: PathBuf, config: Value },
    /// QEMU's microvm machine.
    Qemu { program: PathBuf, kernel: PathBuf, initramfs: PathBuf },
    /// Firecracker without its API.
    Firecracker { program: PathBuf, config: PathBuf },
}

impl Vmm {
    /// Its name in the tables.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cloche { .. } => "cloche vmm",
            Self::Qemu { .. } => "qemu microvm",
            Self::Firecracker { .. } => "firecracker",
        }
    }

    /// Those to be had here, and what is missing. `QEMU_BIN` and `FIRECRACKER_BIN` name programs off `PATH`.
    pub fn all(cloche: &Path, scratch: &Path) -> Result<(Vec<Self>, Vec<String>)> {
        let kernel = Command::new(cloche).args(["kernel", "path"]).output().context("ask for the kernel")?;
        ensure!(kernel.status.success(), "there is no guest kernel; run `cloche kernel build`");
        let kernel = PathBuf::from(String::from_utf8(kernel.stdout)?.trim_end());
        let initramfs = scratch.join("init.cpio");
        fs::write(&initramfs, archive()).context("write an initramfs")?;
        let config = json!({
            "vcpus": 1,
            "memory_mib": MEMORY_MIB,
            "kernel": kernel,
            "initramfs": [{ "file": initramfs }],
            "events_fd": 1,
        });
        let mut vmms = vec![Self::Cloche { program: cloche.to_owned(), config }];
        let mut missing = Vec::new();
        let named = |variable: &str, name: &str| {
            std::env::var_os(variable).map(PathBuf::from).or_else(|| find_program(name))
        };
        match named("QEMU_BIN", "qemu-system-x86_64") {
            Some(program) => {
                vmms.push(Self::Qemu { program, kernel: kernel.clone(), initramfs: initramfs.clone() });
            }
            None => missing.push("qemu microvm: not found on this machine; set QEMU_BIN".to_owned()),
        }
        match named("FIRECRACKER_BIN", "firecracker") {
            Some(program) => {
                let config = scratch.join("firecracker.json");
                let text = json!({
                    "boot-source": {
                        "kernel_image_path": kernel,
                        "initrd_path": initramfs,
                        "boot_args": PEER_COMMAND_LINE,
                    },
                    "drives": [],
                    "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
                });
                fs::write(&config, text.to_string()).context("write Firecracker's configuration")?;
                vmms.push(Self::Firecracker { program, config });
            }
            None => missing.push("firecracker: not found on this machine; set FIRECRACKER_BIN".to_owned()),
        }
        Ok((vmms, missing))
    }

    fn command(&self) -> Command {
        match self {
            Self::Cloche { program, .. } => {
                let mut command = Command::new(program);
                command.arg("vmm");
                command
            }
            Self::Qemu { program, kernel, initramfs } => {
                let mut command = Command::new(program);
                command
                    .args(["-M", "microvm,acpi=off,x-option-roms=off,rtc=off,pit=off,pic=off,isa-serial=on"])
                    .args(["-enable-kvm", "-cpu", "host", "-smp", "1", "-m", &MEMORY_MIB.to_string()])
                    .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
                    .args(["-serial", "stdio", "-append", PEER_COMMAND_LINE])
                    .arg("-kernel")
                    .arg(kernel)
                    .arg("-initrd")
                    .arg(initramfs);
                command
            }
            Self::Firecracker { program, config } => {
                let mut command = Command::new(program);
                command.args(["--no-api", "--config-file"]).arg(config);
                command
            }
        }
    }

    /// Starts it and waits for its end.
    pub fn time(&self) -> Result<VmLap> {
        let mut command = self.command();
        let stdin = if matches!(self, Self::Cloche { .. }) { Stdio::piped() } else { Stdio::null() };
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let config = match self {
            Self::Cloche { config, .. } => Some(config.to_string()),
            _ => None,
        };
        let start_ns = now_ns();
        // A VMM's parent gives it a PID namespace; that is part of its start.
        let child =
            if matches!(self, Self::Cloche { .. }) { alone::spawn(&mut command) } else { command.spawn() };
        let mut child = child.with_context(|| format!("start {}", self.name()))?;
        if let (Some(mut stdin), Some(config)) = (child.stdin.take(), config) {
            stdin.write_all(config.as_bytes()).context("hand over the configuration")?;
        }
        let stdout = BufReader::new(child.stdout.take().context("stdout is piped")?);
        let (mut init_ns, mut exits) = (None, None);
        for line in stdout.split(b'\n') {
            let line = line.context("read stdout")?;
            let now = now_ns();
            if !matches!(self, Self::Cloche { .. }) {
                if line.trim_ascii().ends_with(b"init") {
                    init_ns.get_or_insert(now);
                }
                continue;
            }
            let event: Value = serde_json::from_slice(&line).context("read an event")?;
            match event["type"].as_str() {
                Some("mark") if event["name"] == "init" => init_ns = event["ns"].as_u64(),
                Some("exited") => exits = event["stats"]["kvm_exits"].as_u64(),
                _ => {}
            }
        }
        let status = child.wait().context("wait for the VMM")?;
        let end_ns = now_ns();
        let mut said = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            let _ = std::io::Read::read_to_string(&mut stderr, &mut said);
        }
        let init_ns =
            init_ns.with_context(|| format!("its /init did not report; it ended with {status}: {said}"))?;
        Ok(VmLap { start_ns, init_ns, end_ns, exits })
    }
}

/// The initramfs: the program and the console that the kernel opens for it.
fn archive() -> Vec<u8> {
    let mut archive = cpio::Archive::default();
    archive.directory("dev");
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, &program());
    archive.finish()
}

/// [`INIT_CODE`] as an ELF executable of one segment.
fn program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + INIT_CODE.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Executable, x86-64, version 1.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry, program headers, no sections.
    for word in [BASE + HEADERS, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0; 4]);
    // Sizes and counts of headers.
    for half in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // A loadable segment, readable and executable.
    file.extend(1_u32.to_le_bytes());
    file.extend(5_u32.to_le_bytes());
    for word in [0, BASE, BASE, size, size, 4096] {
        file.extend(word.to_le_bytes());
    }
    file.extend(INIT_CODE);
    file
}
