//! `compare`: one image and command under each isolation, many times, phase by phase.
//!
//! Each run is a whole `cloche run` in a process of its own, as a user would start it, interleaved so that a machine
//! that gets slower does so for all. The first round warms up and is not counted.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::{Command, Stdio},
};

use serde::{Deserialize, Serialize};

use crate::{
    isolation::vm,
    request::Isolation,
    trace::{Mark, Stamp, Trace, now_ns},
};

/// What to compare.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Arguments of the `cloche` binary that come before `run`.
    pub global_arguments: Vec<String>,
    /// Guest kernel to boot, if not the default.
    pub kernel: Option<String>,
    /// Memory limit of containers and VMs, as on the command line.
    pub memory: Option<String>,
    /// Image and command.
    pub image_and_command: Vec<String>,
    /// Isolations to compare, in the order of the report.
    pub isolations: Vec<Isolation>,
    /// Counted runs of each.
    pub runs: usize,
}

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// VM isolation was asked for on a machine without it.
    #[error("cannot compare with VM isolation here; --isolation process,container leaves it out")]
    NoVm(#[source] vm::kvm::KvmError),
    /// A run could not be started.
    #[error("cannot start {}", .0.display())]
    Spawn(PathBuf, #[source] std::io::Error),
    /// A run failed where its process did not.
    #[error("a run under {isolation} isolation failed: {stderr}")]
    Run {
        /// Its isolation.
        isolation: Isolation,
        /// What it printed.
        stderr: String,
    },
}

/// What `run --trace=json` prints on the last line of stderr.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TraceLine {
    /// The one field of the line.
    pub trace: RunTrace,
}

/// One run's marks and costs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunTrace {
    /// Its isolation.
    pub isolation: Isolation,
    /// Its exit code.
    pub exit_code: u8,
    /// As in [`crate::run::Outcome`].
    pub host_memory_peak_bytes: Option<u64>,
    /// Sorted by time.
    #[serde(flatten)]
    pub marks: Trace,
}

/// Median and range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// The middle value; of an even number, the mean of the two in the middle.
    pub median: u64,
    /// Smallest.
    pub min: u64,
    /// Largest.
    pub max: u64,
}

impl Spread {
    fn of(mut values: Vec<u64>) -> Option<Self> {
        values.sort_unstable();
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let upper = *values.get(middle)?;
        let median = match values.len() % 2 {
            0 => upper.midpoint(*values.get(middle - 1)?),
            _ => upper,
        };
        Some(Self { median, min, max })
    }
}

/// A stretch between two marks. One whose marks a run lacks is left out of its column.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The command line: arguments, image, spec.
    Prepare,
    /// The VMM, up to the guest's first instruction.
    Vmm,
    /// The guest's kernel.
    GuestKernel,
    /// The guest's agent, up to the container.
    Agent,
    /// Namespaces, mounts, limits, filters, `execve`.
    Container,
    /// The process itself.
    Process,
    /// From its end to the monitor knowing of it and having all output.
    Report,
    /// From there to nothing being left.
    Teardown,
    /// From the start of the command line to the running process.
    StartTotal,
    /// The whole command, seen from outside.
    Whole,
}

impl Phase {
    /// In the order of a table.
    pub const ALL: [Self; 10] = [
        Self::Prepare,
        Self::Vmm,
        Self::GuestKernel,
        Self::Agent,
        Self::Container,
        Self::Process,
        Self::Report,
        Self::Teardown,
        Self::StartTotal,
        Self::Whole,
    ];

    /// For people.
    pub fn label(self) -> &'static str {
        match self {
            Self::Prepare => "prepare (image, spec)",
            Self::Vmm => "VMM to first guest instruction",
            Self::GuestKernel => "guest kernel to /init",
            Self::Agent => "guest agent",
            Self::Container => "container set-up to execve",
            Self::Process => "process",
            Self::Report => "exit known, output drained",
            Self::Teardown => "teardown",
            Self::StartTotal => "start: command line to process",
            Self::Whole => "whole: command line to gone",
        }
    }

    fn ends(self) -> Option<(Mark, Mark)> {
        Some(match self {
            Self::Prepare => (Mark::CliExec, Mark::NetworkReady),
            Self::Vmm => (Mark::NetworkReady, Mark::FirstGuestInstruction),
            Self::GuestKernel => (Mark::FirstGuestInstruction, Mark::KernelToInit),
            Self::Agent => (Mark::KernelToInit, Mark::ProcessStart),
            Self::Container => (Mark::ProcessStart, Mark::ProcessStarted),
            Self::Process => (Mark::ProcessStarted, Mark::ProcessExit),
            Self::Report => (Mark::ProcessExit, Mark::Exit),
            Self::Teardown => (Mark::Exit, Mark::TeardownDone),
            Self::StartTotal => (Mark::CliExec, Mark::ProcessStarted),
            Self::Whole => return None,
        })
    }
}

/// The results of one isolation.
#[derive(Debug, Clone, Serialize)]
pub struct Column {
    /// Which.
    pub isolation: Isolation,
    /// Nanoseconds by phase.
    pub phases_ns: BTreeMap<Phase, Spread>,
    /// Peak use of host memory in bytes.
    pub host_memory_peak_bytes: Option<Spread>,
    /// The exit codes seen, each once.
    pub exit_codes: Vec<u8>,
}

/// The whole result.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Image and command.
    pub command: Vec<String>,
    /// Counted runs of each isolation.
    pub runs: usize,
    /// How the figures were got, for people.
    pub method: String,
    /// One for each isolation, in the order asked for.
    pub columns: Vec<Column>,
}

/// Carries out `plan`; `progress` hears of each finished run, of how many.
pub fn compare(plan: &Plan, mut progress: impl FnMut(usize, usize)) -> Result<Comparison, CompareError> {
    if plan.isolations.contains(&Isolation::Vm) {
        vm::kvm::check().map_err(CompareError::NoVm)?;
    }
    let total = (plan.runs + 1) * plan.isolations.len();
    let mut results: Vec<Vec<(RunTrace, u64)>> = vec![Vec::new(); plan.isolations.len()];
    for round in 0..=plan.runs {
        for (index, isolation) in plan.isolations.iter().enumerate() {
            let result = run_once(plan, *isolation)?;
            if round > 0 {
                results[index].push(result);
            }
            progress(round * plan.isolations.len() + index + 1, total);
        }
    }
    let columns =
        plan.isolations.iter().zip(results).map(|(isolation, runs)| column(*isolation, &runs)).collect();
    Ok(Comparison { command: plan.image_and_command.clone(), runs: plan.runs, method: method(), columns })
}

/// One run and its duration in nanoseconds as seen from outside.
fn run_once(plan: &Plan, isolation: Isolation) -> Result<(RunTrace, u64), CompareError> {
    let own = PathBuf::from("/proc/self/exe");
    let mut command = Command::new(&own);
    // `run` first, as users have it: only then it is parsed in a hurry.
    command.args(["run", "--rm", "--trace=json", "--isolation", isolation.name()]);
    command.args(&plan.global_arguments);
    if let (Isolation::Vm, Some(kernel)) = (isolation, &plan.kernel) {
        command.arg(format!("--kernel={kernel}"));
    }
    if let (Isolation::Container | Isolation::Vm, Some(memory)) = (isolation, &plan.memory) {
        command.arg(format!("--memory={memory}"));
    }
    command.args(&plan.image_and_command);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let started = now_ns();
    let output = command.output().map_err(|error| CompareError::Spawn(own, error))?;
    let whole = now_ns() - started;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let line = stderr.lines().rev().find(|line| line.starts_with(r#"{"trace":"#));
    match line.map(serde_json::from_str::<TraceLine>) {
        Some(Ok(line)) => Ok((line.trace, whole)),
        _ => Err(CompareError::Run { isolation, stderr: stderr.trim().into() }),
    }
}

fn column(isolation: Isolation, runs: &[(RunTrace, u64)]) -> Column {
    let duration = |phase: Phase, (trace, whole): &(RunTrace, u64)| match phase.ends() {
        Some((from, to)) => Some(trace.marks.get(to)?.saturating_sub(trace.marks.get(from)?)),
        None => Some(*whole),
    };
    let phases_ns = Phase::ALL
        .into_iter()
        .filter_map(|phase| {
            Some((phase, Spread::of(runs.iter().filter_map(|run| duration(phase, run)).collect())?))
        })
        .collect();
    let memory = runs.iter().filter_map(|(trace, _)| trace.host_memory_peak_bytes).collect();
    let mut exit_codes: Vec<u8> = runs.iter().map(|(trace, _)| trace.exit_code).collect();
    exit_codes.sort_unstable();
    exit_codes.dedup();
    Column { isolation, phases_ns, host_memory_peak_bytes: Spread::of(memory), exit_codes }
}

/// Printed beside every figure: what clock, what machine.
fn method() -> String {
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let clock = match (
        std::env::var_os("CLOCHE_KVM_HOST").is_some(),
        std::env::var_os("CLOCHE_ICOUNT").is_some(),
    ) {
        (true, true) => {
            "emulated KVM host under icount: instruction time (1 instruction = 1 ns), not hardware latency"
        }
        (true, false) => {
            "emulated KVM host without icount: not to be quoted, use it for exit codes and memory only"
        }
        (false, _) => "this machine's own clock",
    };
    format!("whole `cloche run` commands, interleaved after one warm-up each; host kernel {kernel}; {clock}")
}

/// The marks as successive differences, for `run --trace`.
pub fn steps(trace: &Trace) -> impl Iterator<Item = (Stamp, u64)> {
    let stamps = trace.stamps();
    let previous = stamps.first().into_iter().chain(stamps);
    previous.zip(stamps).map(|(before, stamp)| (*stamp, stamp.ns - before.ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_of_odd_and_even_counts_has_the_middle() {
        assert_eq!(Spread::of(vec![]), None);
        assert_eq!(Spread::of(vec![5, 1, 9]), Some(Spread { median: 5, min: 1, max: 9 }));
        assert_eq!(Spread::of(vec![4, 1, 9, 6]), Some(Spread { median: 5, min: 1, max: 9 }));
    }

    #[test]
    fn trace_line_as_json_is_read_back() {
        let mut marks = Trace::default();
        marks.mark_at(Mark::CliExec, 5);
        let line = TraceLine {
            trace: RunTrace { isolation: Isolation::Vm, exit_code: 0, host_memory_peak_bytes: None, marks },
        };
        let json = serde_json::to_string(&line).unwrap();
        assert!(json.starts_with(r#"{"trace":{"isolation":"vm""#), "{json}");
        assert!(json.contains(r#""marks":[{"name":"cli-exec","ns":5}]"#), "{json}");
        let read: TraceLine = serde_json::from_str(&json).unwrap();
        assert_eq!(read.trace.marks.get(Mark::CliExec), Some(5));
    }

    #[test]
    fn column_leaves_out_phases_without_marks() {
        let mut marks = Trace::default();
        marks.mark_at(Mark::CliExec, 10);
        marks.mark_at(Mark::NetworkReady, 30);
        let run =
            RunTrace { isolation: Isolation::Container, exit_code: 3, host_memory_peak_bytes: None, marks };
        let column = column(Isolation::Container, &[(run, 100)]);
        assert_eq!(column.phases_ns.keys().copied().collect::<Vec<_>>(), [Phase::Prepare, Phase::Whole]);
        assert_eq!(column.phases_ns[&Phase::Prepare].median, 20);
        assert_eq!(column.exit_codes, [3]);
    }
}
