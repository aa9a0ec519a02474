//! OCI runtimes side by side: one bundle, the same confinement for each, every runtime once per round. What counts is
//! the ratio to crun in the same run, since what a start takes depends on the machine and its load.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::{
    mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount},
    thread::UnshareFlags,
};
use serde::Serialize;

use crate::bundle::Bundle;
use crate::contender::find_program;
use crate::statistics::Summary;
use crate::stopwatch::{settle, time_to_exit};
use crate::surroundings::Surroundings;
use crate::vmms;

/// How long the process of a container that is weighed runs.
const LASTING: Duration = Duration::from_secs(1);
/// Whom the others are compared to.
const YARDSTICK: &str = "crun";

/// One runtime.
#[derive(Debug)]
struct Runtime {
    name: &'static str,
    program: PathBuf,
    state: PathBuf,
    lives: Vec<Life>,
    /// Largest resident set of its process during one `run`.
    peak_kib: Option<u64>,
}

/// What one round has shown of a runtime.
#[derive(Debug, Clone, Copy, Serialize)]
struct Life {
    /// `run` of `true`, until it is waited for.
    run_ns: u64,
    create_ns: u64,
    start_ns: u64,
    delete_ns: u64,
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    runs: u32,
    surroundings: Surroundings,
    /// Of each runtime, in the order of the rounds.
    runtimes: Vec<(&'static str, Vec<Life>)>,
    /// The bare process, spawned.
    process_ns: Vec<u64>,
    /// Each runtime's largest resident set in KiB.
    peaks_kib: Vec<(&'static str, Option<u64>)>,
    missing: Vec<String>,
}

/// Measures `runs` rounds, after one of warm-up.
pub fn measure(runs: u32) -> Result<Report> {
    let cloche = vmms::cloche()?;
    leave_hybrid_cgroups()?;
    let scratch = tempfile::Builder::new().prefix("cloche-bench.").tempdir().context("make a directory")?;
    let bundle = Bundle::make(&cloche, scratch.path().join("bundle"))?;
    let mut programs = vec![cloche.clone()];
    // By this name it is an OCI runtime.
    let link = scratch.path().join("cloche-container");
    std::os::unix::fs::symlink(&cloche, &link).context("link to cloche")?;
    let mut runtimes = vec![Runtime::new("cloche-container", link, scratch.path())];
    let mut missing = Vec::new();
    for name in [YARDSTICK, "runc"] {
        let Some(program) = find_program(name) else {
            missing.push(format!("{name}: not found on this machine"));
            continue;
        };
        let mut runtime = Runtime::new(name, program.clone(), scratch.path());
        match runtime.live(&bundle, 0) {
            Ok(()) => {
                runtimes.push(runtime);
                programs.push(program);
            }
            Err(error) => missing.push(format!("{name}: does not run here: {error:#}")),
        }
    }
    let mut process_ns = Vec::new();
    for round in 0..=runs {
        for runtime in &mut runtimes {
            settle(round);
            runtime.live(&bundle, round + 1).with_context(|| format!("measure {}", runtime.name))?;
        }
        settle(round);
        process_ns.push(time_to_exit(Command::new(bundle.busybox()).arg("true"))?);
    }
    bundle.lasts(LASTING)?;
    runtimes.iter_mut().try_for_each(|runtime| runtime.weigh(&bundle))?;
    let programs: Vec<&Path> = programs.iter().map(PathBuf::as_path).collect();
    let measured = |lives: Vec<Life>| lives.into_iter().rev().take(runs as usize).rev().collect();
    Ok(Report {
        runs,
        surroundings: Surroundings::explore(&programs),
        peaks_kib: runtimes.iter().map(|runtime| (runtime.name, runtime.peak_kib)).collect(),
        runtimes: runtimes.into_iter().map(|runtime| (runtime.name, measured(runtime.lives))).collect(),
        process_ns: process_ns.split_off(1),
        missing,
    })
}

/// crun refuses machines with cgroup v1 and v2 side by side. In a mount namespace of our own there is v1 only, for every
/// runtime.
fn leave_hybrid_cgroups() -> Result<()> {
    let unified = Path::new("/sys/fs/cgroup/unified");
    if !unified.join("cgroup.procs").exists() {
        return Ok(());
    }
    #[expect(deprecated, reason = "its successor is unsafe; nothing else of this process runs yet")]
    rustix::thread::unshare(UnshareFlags::NEWNS).context("make a mount namespace")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("keep mounts apart")?;
    unmount(unified, UnmountFlags::DETACH).context("unmount the v2 hierarchy beside v1's")
}

impl Runtime {
    fn new(name: &'static str, program: PathBuf, scratch: &Path) -> Self {
        Self {
            name,
            program,
            state: scratch.join(format!("{name}.state")),
            lives: Vec::new(),
            peak_kib: None,
        }
    }

    fn verb(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(&self.state).args(words);
        command
    }

    /// `run`, and the same life by `create`, `start` and `delete`.
    fn live(&mut self, bundle: &Bundle, round: u32) -> Result<()> {
        let bundle = bundle.directory().to_string_lossy();
        let id = format!("cloche-bench-{}-{round}", std::process::id());
        let run_ns = time_to_exit(&mut self.verb(&["run", "--bundle", &bundle, &id]))?;
        settle(round);
        let create_ns = time_to_exit(&mut self.verb(&["create", "--bundle", &bundle, &id]))?;
        let start_ns = time_to_exit(&mut self.verb(&["start", &id]))?;
        // Whether `true` has ended already is not the runtime's doing.
        let delete_ns = time_to_exit(&mut self.verb(&["delete", "--force", &id]))?;
        self.lives.push(Life { run_ns, create_ns, start_ns, delete_ns });
        Ok(())
    }

    /// One more `run`, of a bundle that lasts a moment: what its process had in memory at most until then.
    fn weigh(&mut self, bundle: &Bundle) -> Result<()> {
        let bundle = bundle.directory().to_string_lossy();
        let mut run = self.verb(&["run", "--bundle", &bundle, "cloche-bench-weighed"]);
        let mut child = run.stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("weigh")?;
        std::thread::sleep(LASTING / 2);
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).context("weigh")?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        self.peak_kib = peak.and_then(|kib| kib.parse().ok());
        child.wait().context("weigh")?;
        Ok(())
    }
}

impl Life {
    fn verbs_ns(&self) -> u64 {
        self.create_ns + self.start_ns + self.delete_ns
    }
}

/// One line of the table: a figure of each life.
type Column = (&'static str, fn(&Life) -> u64);

const TIMES: [Column; 5] = [
    ("run → exit", |life| life.run_ns),
    ("create + start + delete", Life::verbs_ns),
    ("create", |life| life.create_ns),
    ("start", |life| life.start_ns),
    ("delete --force", |life| life.delete_ns),
];

impl Report {
    /// Writes everything as JSON.
    pub fn write_json(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("write JSON")?;
        std::fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
    }

    fn summary(&self, name: &str, figure: fn(&Life) -> u64) -> Option<Summary> {
        let (_, lives) = self.runtimes.iter().find(|(known, _)| *known == name)?;
        Summary::of(&lives.iter().map(figure).collect::<Vec<_>>())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |ns: u64| ns as f64 / 1e6;
        let row = |f: &mut fmt::Formatter<'_>, label: &str, summary: Summary| {
            let [median, min, max] = [summary.median_ns, summary.min_ns, summary.max_ns].map(ms);
            write!(f, "{label:<44} {median:>9.2} {min:>9.2} {max:>9.2}")
        };
        writeln!(f, "{:<44} {:>9} {:>9} {:>9}  ms", "", "median", "min", "max")?;
        for (what, figure) in TIMES {
            for (name, _) in &self.runtimes {
                let Some(summary) = self.summary(name, figure) else { continue };
                row(f, &format!("{name}: {what}"), summary)?;
                match self.summary(YARDSTICK, figure) {
                    Some(yardstick) if *name != YARDSTICK => {
                        let ratio = summary.median_ns as f64 / yardstick.median_ns as f64;
                        writeln!(f, "  {ratio:.2} × {YARDSTICK}")?;
                    }
                    _ => writeln!(f)?,
                }
            }
        }
        if let Some(summary) = Summary::of(&self.process_ns) {
            row(f, "process", summary)?;
            writeln!(f)?;
        }
        writeln!(f, "\nlargest resident set of `run`, MiB")?;
        for (name, peak_kib) in &self.peaks_kib {
            match peak_kib {
                Some(kib) => writeln!(f, "{name:<44} {:>9.1}", *kib as f64 / 1024.0)?,
                None => writeln!(f, "{name:<44} not known")?,
            }
        }
        self.missing.iter().try_for_each(|line| writeln!(f, "{line}"))?;
        let here = &self.surroundings;
        writeln!(f, "\nhow: {}", here.clock.explanation())?;
        writeln!(
            f,
            "     {} rounds, every runtime once in each, after one of warm-up; spawn to wait, CLOCK_MONOTONIC",
            self.runs
        )?;
        writeln!(
            f,
            "     one bundle: busybox `true` in a directory as root, Docker's capabilities, masks and mounts, a"
        )?;
        writeln!(f, "     short seccomp policy; all runtimes on the same cgroup hierarchies")?;
        writeln!(
            f,
            "     kernel {}, {} × {}; {}",
            here.kernel,
            here.processors,
            here.processor,
            here.versions.join("; ")
        )
    }
}
