//! The disk benchmark: random reads of 4 KiB and sequential reads of 1 MiB, past the guest's page cache, one at a time.
//!
//! The guest is `cloche vmm` with this very program as its first process: nothing else runs there. The same reads by a
//! process on the host are the floor.

use std::fmt;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};
use serde_json::{Value, json};

use crate::alone;
use crate::contender::find_program;
use crate::cpio::Archive;
use crate::statistics::Summary;
use crate::surroundings::Surroundings;

const DISK_BYTES: u64 = 64 << 20;
const SMALL_BYTES: usize = 4096;
const SMALL_READS: u64 = 2000;
const LARGE_BYTES: usize = 1 << 20;
/// Before each figure in the guest's output.
const MARK: &str = "cloche-bench-figure";

/// What a round of reads took: nanoseconds for one small read, and for one large.
#[derive(Debug, Clone, Copy)]
struct Figures {
    small_ns: u64,
    large_ns: u64,
}

/// The table.
#[derive(Debug)]
pub struct DiskReport {
    surroundings: Surroundings,
    rows: Vec<(&'static str, Vec<Figures>)>,
}

/// Measures every way, round after round.
pub fn measure(runs: u32) -> Result<DiskReport> {
    let cloche = match std::env::var_os("CLOCHE_BIN") {
        Some(path) => PathBuf::from(path),
        None => find_program("cloche").context("cloche is not on PATH; set CLOCHE_BIN")?,
    };
    let scratch = tempfile::Builder::new().prefix("cloche-bench.").tempdir().context("make a directory")?;
    let disk = scratch.path().join("disk");
    fill(&disk)?;
    let initramfs = scratch.path().join("init.cpio");
    let own = fs::read("/proc/self/exe").context("read this program")?;
    let mut archive = Archive::default();
    archive.directory("dev").program("init", &own);
    fs::write(&initramfs, archive.finish()).context("write an initramfs")?;
    let kernel = Command::new(&cloche).args(["kernel", "path"]).output().context("ask for the kernel")?;
    ensure!(kernel.status.success(), "there is no guest kernel; run `cloche kernel build`");
    let kernel = String::from_utf8(kernel.stdout)?.trim_end().to_owned();
    let guest = |disk_fields: Value, console: &str| -> Result<Figures> {
        let console = scratch.path().join(console);
        let mut its = json!({ "path": disk, "id": "bench", "read_only": true });
        if let (Value::Object(all), Value::Object(new)) = (&mut its, disk_fields) {
            all.extend(new);
        }
        let config = json!({
            "vcpus": 1, "memory_mib": 256, "kernel": kernel, "initramfs": [{ "file": initramfs }],
            "disks": [its], "console_log": console, "start_timeout_ms": 120_000,
        });
        run_vmm(&cloche, &config)?;
        figures_in(&fs::read_to_string(&console).context("read the guest's console")?)
    };

    let mut rows = vec![
        ("host process", Vec::new()),
        ("guest, at once", Vec::new()),
        ("guest, disk's thread", Vec::new()),
    ];
    for round in 1..=runs {
        eprintln!("cloche-bench: round {round} of {runs}");
        let figures =
            [read_all(&disk)?, guest(json!({}), "at-once")?, guest(json!({ "direct": true }), "thread")?];
        for ((_, series), figures) in rows.iter_mut().zip(figures) {
            series.push(figures);
        }
    }
    Ok(DiskReport { surroundings: Surroundings::explore(&[&cloche]), rows })
}

fn fill(disk: &Path) -> Result<()> {
    let mut file = File::create(disk).context("make a disk")?;
    let piece: Vec<u8> = (0..LARGE_BYTES).map(|index| (index % 251) as u8).collect();
    for _ in 0..DISK_BYTES / LARGE_BYTES as u64 {
        file.write_all(&piece).context("fill the disk")?;
    }
    Ok(())
}

fn run_vmm(cloche: &Path, config: &Value) -> Result<()> {
    let mut vmm =
        alone::spawn(Command::new(cloche).arg("vmm").stdin(Stdio::piped())).context("start `cloche vmm`")?;
    let written = vmm.stdin.take().context("stdin is piped")?.write_all(config.to_string().as_bytes());
    let status = vmm.wait().context("wait for `cloche vmm`")?;
    written.context("tell `cloche vmm` its configuration")?;
    ensure!(status.success(), "`cloche vmm` failed: {status}");
    Ok(())
}

fn figures_in(console: &str) -> Result<Figures> {
    let line = console.lines().find_map(|line| line.split_once(MARK)).map(|(_, figures)| figures);
    let line = line.with_context(|| format!("the guest told no figures; its console:\n{console}"))?;
    let mut numbers = line.split_whitespace().map(str::parse);
    let (small_ns, large_ns) =
        (numbers.next().context("a figure is missing")??, numbers.next().context("a figure is missing")??);
    Ok(Figures { small_ns, large_ns })
}

/// Whether this program is the first process of the benchmark's guest.
pub fn is_guest() -> bool {
    std::process::id() == 1
}

/// The guest's side: reads, tells, and resets the machine.
pub fn guest() {
    let figures = mount("dev", "/dev", "devtmpfs", MountFlags::empty(), None)
        .context("mount /dev")
        .and_then(|()| read_all(Path::new("/dev/vda")));
    match figures {
        Ok(Figures { small_ns, large_ns }) => println!("\n{MARK} {small_ns} {large_ns}"),
        Err(error) => println!("\ncloche-bench: {error:#}"),
    }
    // Waits until the serial port has sent it.
    let _ = rustix::termios::tcdrain(std::io::stdout());
    let _ = reboot(RebootCommand::Restart);
}

fn read_all(disk: &Path) -> Result<Figures> {
    let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap_or_default();
    let mut file = File::options()
        .read(true)
        .custom_flags(direct)
        .open(disk)
        .with_context(|| format!("open {}", disk.display()))?;
    let bytes = file.seek(SeekFrom::End(0))?;
    ensure!(bytes == DISK_BYTES, "{} has {bytes} bytes", disk.display());
    let mut buffer = vec![0; LARGE_BYTES + SMALL_BYTES];
    let lead = buffer.as_ptr().align_offset(SMALL_BYTES);
    let aligned = &mut buffer[lead..lead + LARGE_BYTES];

    // xorshift64 (Marsaglia 2003): the same places every time.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let started = Instant::now();
    for _ in 0..SMALL_READS {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let place = state % (DISK_BYTES / SMALL_BYTES as u64) * SMALL_BYTES as u64;
        file.read_exact_at(&mut aligned[..SMALL_BYTES], place).context("read 4 KiB")?;
    }
    let small_ns = started.elapsed().as_nanos() as u64 / SMALL_READS;

    file.rewind()?;
    let started = Instant::now();
    let reads = DISK_BYTES / LARGE_BYTES as u64;
    for _ in 0..reads {
        file.read_exact(aligned).context("read 1 MiB")?;
    }
    Ok(Figures { small_ns, large_ns: started.elapsed().as_nanos() as u64 / reads })
}

impl fmt::Display for DiskReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.surroundings.clock.explanation())?;
        writeln!(
            f,
            "{:<22} {:>16} {:>18}",
            "reads, one at a time", "4 KiB random, µs", "1 MiB in order, µs"
        )?;
        for (name, series) in &self.rows {
            let median = |figure: fn(&Figures) -> u64| {
                let series: Vec<u64> = series.iter().map(figure).collect();
                Summary::of(&series).map_or(0.0, |summary| summary.median_ns as f64 / 1000.0)
            };
            let (small, large) = (median(|figures| figures.small_ns), median(|figures| figures.large_ns));
            writeln!(f, "{name:<22} {small:>16.1} {large:>18.1}")?;
        }
        Ok(())
    }
}
