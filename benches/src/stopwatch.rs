//! Times one command from outside: from just before the spawn to its first byte of output and to its end.
//!
//! `std` spawns by `posix_spawn` (that is `CLONE_VFORK | CLONE_VM`) when nothing has to be done in the child, so the
//! measuring process's size does not count. All times are CLOCK_MONOTONIC, which the traces of `cloche run` use, too.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::time::{ClockId, clock_gettime};

/// One timed run. All times are nanoseconds on CLOCK_MONOTONIC.
#[derive(Debug, Clone)]
pub struct Lap {
    /// Just before the spawn.
    pub start_ns: u64,
    /// The first byte of standard output was read, if there was one.
    pub first_byte_ns: Option<u64>,
    /// The process was waited for.
    pub end_ns: u64,
    /// All of standard error.
    pub stderr: String,
}

/// The time on CLOCK_MONOTONIC in nanoseconds.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Waits between two runs: what the first has left to the kernel to end in the background must not weigh on the second,
/// and no run may begin at a moment of the host's timer tick that the one before it has set. A start and an end wait
/// for ticks, so their times depend on it.
pub fn settle(run: u32) {
    /// One tick at 250 Hz.
    const TICK_NS: f64 = 4e6;
    /// Multiples of it spread evenly over a tick, however many there are.
    const GOLDEN_RATIO: f64 = 0.618_033_988_749_895;
    let phase_ns = (f64::from(run) * GOLDEN_RATIO).fract() * TICK_NS;
    std::thread::sleep(Duration::from_millis(40) + Duration::from_nanos(phase_ns as u64));
}

/// Runs a command to its end; one that fails is an error with what it said.
pub fn time(command: &mut Command) -> Result<Lap> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start_ns = now_ns();
    let mut child = command.spawn().with_context(|| format!("start {}", command.get_program().display()))?;
    let mut stdout = child.stdout.take().context("stdout is piped")?;
    let mut stderr = child.stderr.take().context("stderr is piped")?;
    let mut buffer = [0; 4096];
    let mut first_byte_ns = None;
    while stdout.read(&mut buffer).context("read stdout")? > 0 {
        first_byte_ns.get_or_insert_with(now_ns);
    }
    let status = child.wait().context("wait for the command")?;
    let end_ns = now_ns();
    // Short texts only: more than a pipe holds would have kept the command from ending.
    let mut said = Vec::new();
    stderr.read_to_end(&mut said).context("read stderr")?;
    let stderr = String::from_utf8_lossy(&said).into_owned();
    ensure!(status.success(), "{} ended with {status}: {}", command.get_program().display(), stderr.trim());
    Ok(Lap { start_ns, first_byte_ns, end_ns, stderr })
}

/// As [`time`], for a command that says nothing: nanoseconds until it was waited for. What it leaves running keeps nobody
/// waiting.
pub fn time_to_exit(command: &mut Command) -> Result<u64> {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let start_ns = now_ns();
    let mut child = command.spawn().with_context(|| format!("start {}", command.get_program().display()))?;
    let status = child.wait().context("wait for the command")?;
    let end_ns = now_ns();
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(end_ns - start_ns)
}
