//! Loads in a process of their own, which can be killed, and whose memory can be measured.

use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use cloche_images::{LoadOptions, NoProgress, Store};

use crate::bed::{Failure, chain};

/// First argument of such a process.
const FLAG: &str = "--load-into";
/// First argument of one that pulls.
const PULL_FLAG: &str = "--pull-into";

/// If this process is to be one: loads, prints its peak memory in KiB, and says how it went.
pub fn run() -> Option<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [flag, store, archives @ ..] = arguments.as_slice() else { return None };
    if let (PULL_FLAG, [image]) = (flag.as_str(), archives) {
        return Some(match pull(store, image) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        });
    }
    if flag != FLAG {
        return None;
    }
    Some(match load(store, archives) {
        Ok(peak) => {
            println!("{peak}");
            ExitCode::SUCCESS
        }
        Err((error, peak)) => {
            println!("{peak}");
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    })
}

fn load(store: &str, archives: &[String]) -> Result<u64, (String, u64)> {
    let failed = |error: &dyn std::error::Error| (chain(error), peak_memory_kib());
    let store = Store::open(Path::new(store)).map_err(|error| failed(&error))?;
    for archive in archives {
        let loaded = store.load(Path::new(archive), &LoadOptions::default(), &NoProgress);
        loaded.map_err(|error| failed(&error))?;
    }
    Ok(peak_memory_kib())
}

fn pull(store: &str, image: &str) -> Result<(), Failure> {
    crate::registry::pull(&Store::open(Path::new(store))?, image)?;
    Ok(())
}

fn peak_memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(u64::MAX)
}

/// Starts a load of archives, one after the other.
pub fn spawn(store: &Path, archives: &[&Path]) -> Result<Child, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(FLAG).arg(store).args(archives);
    Ok(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// Starts a pull.
pub fn spawn_pull(store: &Path, image: &str) -> Result<Child, Failure> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(PULL_FLAG).arg(store).arg(image);
    Ok(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

/// How a load ended.
pub struct Outcome {
    /// The message, if it failed.
    pub error: Option<String>,
    pub peak_memory_kib: u64,
}

/// Loads and waits.
pub fn load_apart(store: &Path, archives: &[&Path]) -> Result<Outcome, Failure> {
    let output = spawn(store, archives)?.wait_with_output()?;
    let peak_memory_kib = String::from_utf8(output.stdout)?.trim().parse()?;
    let error = (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned());
    Ok(Outcome { error, peak_memory_kib })
}
