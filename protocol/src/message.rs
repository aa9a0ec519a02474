//! Control messages on [`crate::machine::vsock_port::CONTROL`], and requests on [`crate::machine::guest_port::REQUESTS`].

use serde::{Deserialize, Serialize};

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToGuest {
    /// Send a signal to the container's first process, or to the process that this stream is about.
    Signal {
        /// Linux x86_64 signal number.
        signo: i32,
    },
    /// Let a container that waits run its program. Answered by [`FromGuest::Started`] or [`FromGuest::Failed`].
    Start,
    /// Give the process's terminal this size, in characters.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters of a line.
        columns: u16,
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
    /// The container is made, and waits for [`ToGuest::Start`].
    Created,
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

/// What is asked of the agent, on a stream that the host opens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// The id of the container that it is about, if that is not the guest's first.
    pub container: Option<String>,
    /// What.
    pub request: Request,
}

/// What is asked of the agent about a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Request {
    /// Make a further container beside the first one. Answered as [`Request::Exec`] is; then, once its streams are there,
    /// by [`FromGuest::Created`] or [`FromGuest::Failed`], and it waits for [`ToGuest::Start`].
    Create {
        /// Its id, which names its cgroup, too.
        id: String,
        /// The OCI runtime spec, in JSON.
        spec: String,
        /// The compiled system-call filter, as [`crate::boot::FILTER_PATH`] has it.
        filter: Option<Vec<u8>>,
        /// The share that is its root file system; see [`crate::boot::share_path`].
        root_share: usize,
    },
    /// Run a further process. Answered by [`Answer::Accepted`]; then, once its streams are there, as a container's start is
    /// on the control stream, which this becomes one of: [`FromGuest`] and [`ToGuest`].
    Exec {
        /// The process, as runtime-spec `config.md#process`, in JSON.
        process: String,
        /// A cgroup below the container's to run in.
        cgroup: Option<String>,
    },
    /// This stream carries what a further process, or a further container's first one, reads or writes, from here on.
    Stream {
        /// From [`Answer::Accepted`].
        number: u32,
        /// What it is for the process.
        stream: Stream,
    },
    /// Send a signal to the first process, or to all of them.
    Signal {
        /// Linux x86_64 signal number.
        signo: i32,
        /// To all.
        all: bool,
    },
    /// Tell of all processes, by [`Answer::Processes`].
    Processes,
    /// Have all of its processes stand still, or go on.
    Freeze {
        /// Whether they stand still.
        freeze: bool,
    },
    /// Change limits.
    Update {
        /// As runtime-spec `config-linux.md#control-groups`, in JSON.
        resources: String,
    },
}

/// A stream of a further process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Stream {
    Stdin,
    /// Or its terminal's output.
    Stdout,
    /// None with a terminal.
    Stderr,
}

/// An answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Answer {
    /// It is done.
    Done,
    /// It is not; why.
    Failed {
        /// The whole chain of causes, ready to print.
        message: String,
    },
    /// A further process or container waits for its streams under this number.
    Accepted {
        /// It.
        number: u32,
    },
    /// The container's processes.
    Processes {
        /// Each of them.
        processes: Vec<Process>,
    },
}

/// A process of the container, as its kernel tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id in the guest.
    pub pid: i32,
    /// That of its parent.
    pub parent: i32,
    /// Its user.
    pub uid: u32,
    /// Its command line, or its name if it has none; cut where it is long.
    pub command: String,
}
