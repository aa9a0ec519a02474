//! What is written down about a sandbox, so that any later command can read it: see [`crate::sandboxes`] for where.

use std::{fs, path::PathBuf, time::SystemTime};

use cloche_images::Settings;
use serde::{Deserialize, Serialize};

use crate::request::Isolation;

/// One sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// 12 hexadecimal digits.
    pub id: String,
    /// The name given by the user.
    pub name: Option<String>,
    /// The image's name as the user wrote it.
    pub image: String,
    /// The image's id: the digest of its configuration.
    pub image_id: String,
    /// The command line of the first process.
    pub command: Vec<String>,
    /// What it was run with in place of what its image says.
    #[serde(default)]
    pub settings: Settings,
    /// The isolation asked for. What it really is, is observed: [`crate::isolation::observed`].
    pub isolation: Isolation,
    /// Unix time in seconds.
    pub created: u64,
    /// Forget the sandbox when it ends.
    pub remove: bool,
    /// The signal by which `stop` asks it to end: the image's, or SIGTERM.
    #[serde(default = "sigterm")]
    pub stop_signal: i32,
    /// Path of its cgroup in the hierarchies.
    #[serde(default)]
    pub cgroup: PathBuf,
    /// The process that attends it.
    pub monitor: ProcessId,
    /// Where it is in its life.
    pub state: State,
}

fn sigterm() -> i32 {
    libc::SIGTERM
}

/// A sandbox's life: starting, running, exited; only forwards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub enum State {
    /// Its monitor is at work on the start.
    Starting,
    /// Its process runs.
    Running(Processes),
    /// It has ended and nothing of it is left but this record.
    Exited(Ended),
}

/// Host processes of a running sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processes {
    /// The container's first process, or the VMM.
    pub leader: ProcessId,
    /// The monitor's descriptor of a container's writable layer: see [`cloche_runtime::Container::writable`].
    #[serde(default)]
    pub writable: Option<i32>,
}

/// How and when a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// As a shell reports it.
    pub exit_code: u8,
    /// Whether the memory limit ended it.
    pub oom_killed: bool,
    /// Unix time in seconds.
    pub finished: u64,
    /// What went wrong, if not the process itself ended it.
    pub reason: Option<String>,
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id on the host.
    pub pid: i32,
    /// Start time in clock ticks since boot (proc(5), `/proc/pid/stat` field 22).
    pub start_ticks: u64,
}

impl ProcessId {
    /// The calling process.
    pub fn own() -> Self {
        let pid = std::process::id() as i32;
        // Without /proc nothing of this works, and the sandbox's start will say so.
        Self::of(pid).unwrap_or(Self { pid, start_ticks: 0 })
    }

    /// The running process with this number; `None` if there is none, or only what its parent has not reaped yet.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in parentheses that may contain anything; fields are counted after it.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_whitespace();
        if matches!(fields.next()?, "Z" | "X") {
            return None;
        }
        let start_ticks = fields.nth(22 - 4)?.parse().ok()?;
        Some(Self { pid, start_ticks })
    }

    /// Whether this very process still exists.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// Unix time in seconds.
pub fn unix_time() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_id_of_self_is_alive_and_with_another_start_is_not() {
        let own = ProcessId::own();
        assert!(own.is_alive());
        assert!(!ProcessId { start_ticks: own.start_ticks + 1, ..own }.is_alive());
        assert!(ProcessId::of(i32::MAX).is_none());
    }
}
