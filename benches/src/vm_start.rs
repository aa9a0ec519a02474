//! The VMM alone: from its spawn to the first instruction of `/init`, and from there until the process is reaped, for
//! `cloche vmm` and for other VMMs, with one kernel and one initramfs; and what each costs besides time at `/init`.
//!
//! The guest's `/init` prints a line on the console, writes Cloche's mark port, waits until the line is out, and
//! resets the machine; to be looked at, it waits instead. `/init` runs when the port is written, which the host's kernel
//! tells of every VMM's guest ([`crate::port_trace`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::guest_cost::{self, GuestCost};
use crate::port_trace::PortTrace;
use crate::stopwatch::now_ns;
use crate::vmms::{Machine, Running, Vmm};

#[path = "../../engine/src/isolation/vm/cpio.rs"]
mod cpio;

const MEMORY_MIB: u32 = 128;

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

/// Where `ioctl` begins in it, and what waits there instead: `for (;;) pause();`.
const END_OFFSET: usize = 58;
const WAIT_CODE: [u8; 9] = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];

/// One start and end of a VM. Times are nanoseconds on CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy)]
pub struct VmLap {
    /// Just before the spawn.
    pub start_ns: u64,
    /// `/init` runs.
    pub init_ns: u64,
    /// The process was waited for.
    pub end_ns: u64,
}

/// What a VMM costs besides time.
#[derive(Debug, Serialize)]
pub struct VmmCost {
    /// Whose.
    pub contender: &'static str,
    /// The costs.
    #[serde(flatten)]
    pub cost: GuestCost,
}

/// The two initramfs.
#[derive(Debug)]
pub struct Guests {
    scratch: PathBuf,
    resets: PathBuf,
    waits: PathBuf,
}

impl Guests {
    /// Writes them into a directory.
    pub fn write(scratch: &Path) -> Result<Self> {
        let (resets, waits) = (scratch.join("init.cpio"), scratch.join("wait.cpio"));
        let mut waiting = INIT_CODE;
        for (to, from) in waiting.iter_mut().skip(END_OFFSET).zip(WAIT_CODE) {
            *to = from;
        }
        fs::write(&resets, archive(&INIT_CODE)).context("write an initramfs")?;
        fs::write(&waits, archive(&waiting)).context("write an initramfs")?;
        Ok(Self { scratch: scratch.to_owned(), resets, waits })
    }

    fn machine<'a>(&'a self, initramfs: &'a Path) -> Machine<'a> {
        Machine { memory_mib: MEMORY_MIB, initramfs, devices: None, scratch: &self.scratch }
    }

    /// Starts a VM and waits for its end.
    pub fn time(&self, vmm: &Vmm, trace: &PortTrace) -> Result<VmLap> {
        trace.clear()?;
        let mut running = vmm.start(&self.machine(&self.resets), Stdio::piped())?;
        let mut stdout = running.child.stdout.take().context("stdout is piped")?;
        // Or the VMM could not say what it has to.
        std::io::copy(&mut stdout, &mut std::io::sink()).context("read stdout")?;
        let status = running.child.wait().context("wait for the VMM")?;
        let end_ns = now_ns();
        let init_ns = trace.first_ns()?.with_context(|| no_init(&mut running, &status.to_string()))?;
        Ok(VmLap { start_ns: running.start_ns, init_ns, end_ns })
    }

    /// Starts a VM and looks at it when its `/init` has run and waits: when KVM counts no more exits.
    pub fn look(&self, vmm: &Vmm) -> Result<VmmCost> {
        /// Fewer have not brought any guest to its `/init`.
        const FEW_EXITS: u64 = 100;
        const QUIET: Duration = Duration::from_millis(100);
        const PATIENCE: Duration = Duration::from_secs(5);
        let before = guest_cost::Counters::open();
        let running = vmm.start(&self.machine(&self.waits), Stdio::null())?;
        let deadline = Instant::now() + PATIENCE;
        let mut last = None;
        while Instant::now() < deadline {
            std::thread::sleep(QUIET);
            let now = guest_cost::kvm_exits();
            if now == last && now.is_some_and(|exits| exits > FEW_EXITS) {
                break;
            }
            last = now;
        }
        let cost = before.look_at(running.child.id())?;
        Ok(VmmCost { contender: vmm.kind.name(), cost })
    }
}

fn no_init(running: &mut Running, end: &str) -> String {
    format!("its /init did not report; it ended with {end}: {}", running.complaint().trim())
}

/// The initramfs: the program and the console that the kernel opens for it.
fn archive(code: &[u8]) -> Vec<u8> {
    let mut archive = cpio::Archive::default();
    archive.directory("dev");
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, &program(code));
    archive.finish()
}

/// Code as an ELF executable of one segment.
fn program(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + code.len() as u64;
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
    file.extend_from_slice(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_init_differs_from_the_other_from_its_ioctl_on() {
        // mov eax, __NR_ioctl
        assert_eq!(INIT_CODE[END_OFFSET..END_OFFSET + 5], [0xb8, 16, 0, 0, 0]);
        assert!(END_OFFSET + WAIT_CODE.len() <= INIT_CODE.len());
    }
}
