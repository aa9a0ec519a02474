//! Control messages on [`crate::machine::vsock_port::CONTROL`].

use serde::{Deserialize, Serialize};

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToGuest {
    /// Send a signal to the container's first process.
    Signal {
        /// Linux x86_64 signal number.
        signo: i32,
    },
}

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromGuest {
    /// The agent is up; first message on the stream.
    Ready {
        /// The agent's [`crate::VERSION`].
        version: u32,
    },
    /// The container's process runs: its `execve` succeeded.
    Started,
    /// The container could not be started; nothing of it runs.
    Failed {
        /// Exit code for the command line: 127 not found, 126 not executable, 125 anything else.
        exit_code: u8,
        /// The whole chain of causes, ready to print.
        message: String,
    },
    /// The container's first process ended, and all of its output has been sent.
    Exited(Exit),
}

/// What the guest's kernel knows of the container that runs. The guest's word: nobody checks it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Processes and threads in it.
    pub pids: Option<u64>,
    /// Memory that it uses, in bytes.
    pub memory_bytes: Option<u64>,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// How its first process ended.
    pub status: ExitStatus,
    /// Whether the kernel killed a process of the container because it hit its memory limit.
    pub oom_killed: bool,
    /// Highest memory use of the container's cgroup in bytes, where the kernel tells.
    pub memory_peak_bytes: Option<u64>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExitStatus {
    /// It called `exit` with this code.
    Code(u8),
    /// This signal killed it.
    Signal(i32),
}

impl ExitStatus {
    /// What a shell reports: the code, or 128 + the signal.
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            // The number may come from a guest.
            Self::Signal(signo) => u8::try_from(signo.clamp(1, 64)).map_or(u8::MAX, |signo| 128 + signo),
        }
    }
}
