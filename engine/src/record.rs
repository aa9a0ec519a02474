//! What is written down about a sandbox, so that any later command can read it: see [`crate::sandboxes`] for where.

use std::{path::PathBuf, time::SystemTime};

use cloche_images::Settings;
pub use cloche_oci::ProcessId;
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

/// Unix time in seconds.
pub fn unix_time() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
