//! The schema of the control socket: one JSON object a line, a [`Call`] from the client, a [`Reply`] from the VM.
//!
//! Calls with unknown fields or another [`VERSION`] are refused. Replies may gain fields within a version: a client
//! ignores those that it does not know. `docs/control-api.md` is this file for people.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Version of the schema.
pub const VERSION: u32 = 1;
/// Bytes of a request at most, its newline included.
pub const MAX_REQUEST_BYTES: usize = 4096;
/// Bytes of a reply at most, its newline included: what a client must be ready to take.
pub const MAX_REPLY_BYTES: usize = 1 << 20;
/// Clients that are connected at a time; a further one takes the place of the one that has been idle longest.
pub const MAX_CLIENTS: usize = 16;

/// What a client sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// Must be [`VERSION`].
    pub version: u32,
    /// What is wanted.
    pub request: Request,
}

impl Call {
    /// A call of this version.
    pub fn new(request: Request) -> Self {
        Self { version: VERSION, request }
    }
}

/// What a client can want.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What the machine is: [`Answer::Info`].
    Info,
    /// Stop all vCPUs and all work of devices: [`Answer::State`], once nothing moves. Again: the same.
    Pause,
    /// Go on: [`Answer::State`]. Again: the same.
    Resume,
    /// End the machine.
    Stop(Stop),
    /// What it has used: [`Answer::Stats`].
    Stats,
    /// Change the machine's size.
    Resize(Resize),
    /// The end of what the guest printed: [`Answer::Console`].
    Console {
        /// Bytes at most, before they are made valid UTF-8.
        bytes: u32,
    },
    /// Start or stop counting the pages that the guest writes to, for [`MemoryStats::dirty_pages`]:
    /// [`Answer::State`]. It splits huge pages, which slows the guest.
    DirtyLog {
        /// Whether to count.
        enabled: bool,
    },
}

/// How to end a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Stop {
    /// As SIGTERM to the VMM: devices finish what they have begun, the end is reported. [`Answer::State`], then the
    /// connection ends. It does not ask the guest, which an orderly end of a container starts with.
    Orderly,
    /// As SIGKILL to the VMM: at once, without an answer.
    Kill,
}

/// A new size. What is left out stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Memory in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// Virtual CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u8>,
}

/// What the VM answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// [`VERSION`].
    pub version: u32,
    /// What came of the request.
    #[serde(flatten)]
    pub outcome: Outcome,
}

impl Reply {
    /// A reply of this version.
    pub fn new(outcome: Outcome) -> Self {
        Self { version: VERSION, outcome }
    }
}

/// Success or not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It is done.
    Answer(Answer),
    /// It is not done, and nothing has changed.
    Error(Refusal),
}

impl Outcome {
    /// A refusal.
    pub fn refused(code: RefusalCode, message: impl Into<String>) -> Self {
        Self::Error(Refusal { code, message: message.into() })
    }
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// For people.
    pub message: String,
}

/// Kinds of refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalCode {
    /// The line is no call: not JSON, an unknown request or field, too long.
    BadRequest,
    /// The call is of another version.
    Version,
    /// This machine cannot do it.
    Unsupported,
    /// Not in this state of the machine.
    State,
    /// The host refused.
    Host,
}

/// A successful answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// To [`Request::Info`].
    Info(Info),
    /// The machine's state after the request.
    State(RunState),
    /// To [`Request::Stats`].
    Stats(Box<MachineStats>),
    /// To [`Request::Console`]: text that is fit for a terminal.
    Console(String),
}

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// vCPUs and devices run.
    Running,
    /// Some vCPU has not stopped yet.
    Pausing,
    /// No vCPU runs, and no device works.
    Paused,
    /// It is coming to its end.
    Ending,
}

impl std::fmt::Display for RunState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Ending => "ending",
        })
    }
}

/// What a machine is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Version of the VMM.
    pub vmm_version: String,
    /// What it does.
    pub state: RunState,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Whether the guest's agent has reported.
    pub agent_ready: bool,
    /// Types of its virtio devices, in the order of their addresses.
    pub devices: Vec<String>,
}

/// What a machine has used since its start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MachineStats {
    /// Nanoseconds since the guest's first instruction.
    pub uptime_ns: u64,
    /// Of these, nanoseconds spent paused.
    pub paused_ns: u64,
    /// CPU time of the whole VMM process in nanoseconds: vCPUs and devices, in guest, user and system mode.
    pub cpu_ns: u64,
    /// vCPUs by index.
    pub vcpus: Vec<VcpuStats>,
    /// KVM's own statistics.
    pub kvm: KvmStats,
    /// Guest memory.
    pub memory: MemoryStats,
    /// virtio devices in the order of their addresses.
    pub devices: Vec<DeviceStats>,
}

/// One vCPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStats {
    /// CPU time of its thread in nanoseconds.
    pub cpu_ns: u64,
    /// Exits to the VMM for port I/O.
    pub io_exits: u64,
    /// Exits to the VMM for memory-mapped I/O.
    pub mmio_exits: u64,
    /// Exits because the VMM wanted the vCPU to stop.
    pub interrupted_exits: u64,
}

/// Numbers that KVM counts (`KVM_GET_STATS_FD`), by KVM's names; empty where KVM does not tell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmStats {
    /// Of the vCPUs, summed: `exits` is all exits, `io_exits`, `mmio_exits`, `halt_exits`, … are reasons.
    pub vcpus: BTreeMap<String, u64>,
    /// Of the machine: `pages_4k`, `pages_2m`, ….
    pub machine: BTreeMap<String, u64>,
}

/// Guest memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStats {
    /// What the guest has.
    pub size_bytes: u64,
    /// What of it takes memory of the host.
    pub resident_bytes: u64,
    /// 4 KiB pages that were written to since the previous [`Request::Stats`], while [`Request::DirtyLog`] is on.
    pub dirty_pages: Option<u64>,
    /// The balloon; none if the machine has none.
    #[serde(default)]
    pub balloon: Option<BalloonStats>,
    /// The memory device; none if the machine has none.
    #[serde(default)]
    pub device: Option<MemoryDeviceStats>,
}

/// The memory device: memory that is added while the guest runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDeviceStats {
    /// What the guest can have of it at most, in MiB.
    pub size_mib: u32,
    /// What it is asked to have, in MiB.
    pub requested_mib: u32,
    /// What it has, in MiB.
    pub plugged_mib: u32,
}

/// The balloon: memory that the guest gives back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStats {
    /// What the guest is asked to have given back, in MiB.
    pub target_mib: u32,
    /// What it says it has.
    pub actual_mib: u32,
    /// What it tells of its memory, by name (`free-bytes`, `available-bytes`, `major-faults`, …), where it is asked.
    pub guest: BTreeMap<String, u64>,
}

/// One virtio device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// `block`, `net`, `vsock`, ….
    pub device: String,
    /// Interrupts that were sent to the driver.
    pub interrupts: u64,
    /// How often the driver broke the device (virtio 1.2 §2.1.2: DEVICE_NEEDS_RESET).
    pub failures: u64,
    /// Its queues.
    pub queues: Vec<QueueStats>,
}

/// One virtqueue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStats {
    /// Chains that the device took.
    pub chains: u64,
    /// Descriptors of these.
    pub descriptors: u64,
    /// Bytes in them that the device could read: from the guest, headers included.
    pub bytes_from_guest: u64,
    /// Bytes that the device wrote into them: to the guest, headers and status bytes included.
    pub bytes_to_guest: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(json: &str) -> Result<Request, String> {
        serde_json::from_str::<Call>(json).map(|call| call.request).map_err(|error| error.to_string())
    }

    #[test]
    fn call_as_json_keeps_its_spelling() {
        for (json, request) in [
            (r#"{"version":1,"request":"info"}"#, Request::Info),
            (r#"{"version":1,"request":{"stop":"kill"}}"#, Request::Stop(Stop::Kill)),
            (
                r#"{"version":1,"request":{"resize":{"memory_mib":64}}}"#,
                Request::Resize(Resize { memory_mib: Some(64), vcpus: None }),
            ),
            (r#"{"version":1,"request":{"console":{"bytes":7}}}"#, Request::Console { bytes: 7 }),
            (
                r#"{"version":1,"request":{"dirty-log":{"enabled":true}}}"#,
                Request::DirtyLog { enabled: true },
            ),
        ] {
            assert_eq!(call(json).unwrap(), request);
            assert_eq!(serde_json::to_string(&Call::new(request)).unwrap(), json);
        }
    }

    /// All names in a JSON value, of variants and of fields.
    fn names(value: &serde_json::Value, found: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(fields) => {
                for (name, value) in fields {
                    found.push(name.clone());
                    names(value, found);
                }
            }
            serde_json::Value::Array(values) => values.iter().for_each(|value| names(value, found)),
            _ => {}
        }
    }

    /// `docs/control-api.md` is what clients are written by: it has each request, each answer's fields, each state and
    /// each code in backquotes, or in an example.
    #[test]
    fn documentation_names_everything_that_is_on_the_socket() {
        let documentation = include_str!("../../../docs/control-api.md");
        let stats = MachineStats {
            vcpus: vec![VcpuStats::default()],
            memory: MemoryStats {
                dirty_pages: Some(1),
                balloon: Some(BalloonStats::default()),
                device: Some(MemoryDeviceStats::default()),
                ..MemoryStats::default()
            },
            devices: vec![DeviceStats { queues: vec![QueueStats::default()], ..DeviceStats::default() }],
            ..MachineStats::default()
        };
        let mut found = Vec::new();
        let resize = Resize { memory_mib: Some(1), vcpus: Some(1) };
        let requests = [
            Request::Stop(Stop::Orderly),
            Request::Stop(Stop::Kill),
            Request::Resize(resize),
            Request::DirtyLog { enabled: true },
            Request::Console { bytes: 1 },
        ];
        for request in requests {
            names(&serde_json::to_value(Call::new(request)).unwrap(), &mut found);
        }
        for outcome in [
            Outcome::Answer(Answer::Stats(Box::new(stats))),
            Outcome::Answer(Answer::State(RunState::Running)),
            Outcome::refused(RefusalCode::State, ""),
        ] {
            names(&serde_json::to_value(Reply::new(outcome)).unwrap(), &mut found);
        }
        let states = [RunState::Running, RunState::Pausing, RunState::Paused, RunState::Ending];
        found.extend(states.map(|state| state.to_string()));
        for code in
            ["bad-request", "version", "unsupported", "state", "host", "info", "pause", "resume", "stats"]
        {
            found.push(code.into());
        }
        let is_named = |name: &String| {
            ["`", "\"", "."].iter().any(|before| documentation.contains(&format!("{before}{name}")))
        };
        let missing: Vec<_> = found.into_iter().filter(|name| !is_named(name)).collect();
        assert!(missing.is_empty(), "docs/control-api.md does not name {missing:?}");
    }

    #[test]
    fn call_with_anything_unknown_is_refused() {
        for json in [
            r#"{"version":1,"request":"pause","more":1}"#,
            r#"{"version":1,"request":{"resize":{"disks":1}}}"#,
            r#"{"version":1,"request":{"console":{"bytes":1,"lines":1}}}"#,
            r#"{"version":1,"request":"explode"}"#,
            r#"{"version":1,"request":{"pause":{},"resume":{}}}"#,
            r#"{"request":"pause"}"#,
            r#"{"version":-1,"request":"pause"}"#,
        ] {
            assert!(call(json).is_err(), "{json}");
        }
    }

    #[test]
    fn reply_as_json_keeps_its_spelling() {
        let done = Reply::new(Outcome::Answer(Answer::State(RunState::Paused)));
        assert_eq!(serde_json::to_string(&done).unwrap(), r#"{"version":1,"answer":{"state":"paused"}}"#);
        let refused = Reply::new(Outcome::refused(RefusalCode::Unsupported, "no"));
        assert_eq!(
            serde_json::to_string(&refused).unwrap(),
            r#"{"version":1,"error":{"code":"unsupported","message":"no"}}"#
        );
        let newer = r#"{"version":1,"answer":{"state":"paused"},"since":5}"#;
        assert_eq!(serde_json::from_str::<Reply>(newer).unwrap(), done);
    }
}
