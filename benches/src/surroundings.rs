//! Where the figures come from, so that nobody reads them for what they are not.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

/// What a figure's meaning depends on.
#[derive(Debug, Clone, Serialize)]
pub struct Surroundings {
    /// How time passes here.
    pub clock: Clock,
    /// Host kernel's release.
    pub kernel: String,
    /// Host kernel's command line.
    pub kernel_command_line: String,
    /// Processor's name.
    pub processor: String,
    /// Processors online.
    pub processors: usize,
    /// Flags that change what an instruction count means, those that are set.
    pub flags: Vec<String>,
    /// `/sys/kernel/mm/transparent_hugepage/enabled`.
    pub huge_pages: String,
    /// First line of each program's `--version`.
    pub versions: Vec<String>,
}

/// How time passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// On real hardware: latencies as users see them, on this machine at this load.
    Hardware,
    /// In an emulated host that counts instructions: repeatable, and no latency.
    InstructionCount,
    /// In an emulated host whose clock runs freely: noise.
    Emulated,
}

impl Clock {
    /// Whether milliseconds may be quoted.
    pub fn is_quotable(self) -> bool {
        self != Self::Emulated
    }

    /// One sentence for people.
    pub fn explanation(self) -> &'static str {
        match self {
            Self::Hardware => "wall-clock time on this machine, at its present load",
            Self::InstructionCount => "instruction time (1 instruction = 1 ns), not hardware latency",
            Self::Emulated => {
                "an emulated host without icount: milliseconds are noise, quote ratios only; \
                 use scripts/kvm-host --icount"
            }
        }
    }
}

impl Surroundings {
    /// Looks around; `programs` are asked for their versions.
    pub fn explore(programs: &[&Path]) -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = info.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(": ").map(|(_, value)| value.to_owned()).unwrap_or_default()
        };
        let processor = field("model name");
        let known = field("flags");
        let telling = ["svm", "vmx", "erms", "fsrm", "hypervisor"];
        let flags = telling.into_iter().filter(|flag| known.split(' ').any(|word| word == *flag));
        Self {
            clock: clock(&processor),
            kernel: read("/proc/sys/kernel/osrelease"),
            kernel_command_line: read("/proc/cmdline"),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            flags: flags.map(str::to_owned).collect(),
            huge_pages: read("/sys/kernel/mm/transparent_hugepage/enabled"),
            versions: programs.iter().filter_map(|program| version(program)).collect(),
            processor,
        }
    }
}

fn clock(processor: &str) -> Clock {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| value == "1");
    if set("CLOCHE_ICOUNT") {
        Clock::InstructionCount
    } else if set("CLOCHE_KVM_HOST") || processor.contains("QEMU") {
        Clock::Emulated
    } else {
        Clock::Hardware
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}
