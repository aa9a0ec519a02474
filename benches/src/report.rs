//! The figures as a table for people and as JSON for programs.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::guest_cost::GuestCost;
use crate::statistics::Summary;
use crate::surroundings::{Clock, Surroundings};
use crate::vm_start::VmmCost;

/// Targets in milliseconds, for an emulated host under icount.
const TARGETS: &[(&str, &str, u64)] =
    &[("cloche vm", "first byte", 45), ("cloche vmm", "/init", 26), ("cloche container", "exit", 20)];

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Measured runs of each contender.
    pub runs: u32,
    /// Runs before.
    pub warm_up: u32,
    /// Where this was.
    pub surroundings: Surroundings,
    /// From the spawn to a moment, seen from outside.
    pub rows: Vec<Row>,
    /// What each VMM costs besides time at its guest's `/init`.
    pub vmm_costs: Vec<VmmCost>,
    /// Steps of a start, by isolation.
    pub phases: Vec<(&'static str, Vec<Phase>)>,
    /// What a VM costs besides time.
    pub guest_cost: Option<GuestCost>,
    /// Peers that could not take part, and why.
    pub missing: Vec<String>,
}

/// One contender's time to one moment.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Who.
    pub contender: &'static str,
    /// The moment.
    pub until: &'static str,
    /// In short.
    pub summary: Summary,
    /// In full, in the order of the runs.
    pub series_ns: Vec<u64>,
}

/// One step of a start.
#[derive(Debug, Serialize)]
pub struct Phase {
    /// The mark that ends it.
    pub until: String,
    /// How long it took.
    pub summary: Summary,
}

impl Report {
    /// Writes everything as JSON.
    pub fn write_json(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("write JSON")?;
        fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
    }

    fn write_rows(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quotable = self.surroundings.clock.is_quotable();
        let unit = if quotable { "ms" } else { "ms (noise)" };
        writeln!(f, "{:<32} {:>10} {:>10} {:>10}  {unit}", "run →", "median", "min", "max")?;
        for row in &self.rows {
            let label = format!("{} → {}", row.contender, row.until);
            write!(f, "{label:<32}")?;
            write_summary(f, row.summary)?;
            if let Some(ratio) = self.ratio_to_process(row) {
                write!(f, "  {ratio:>6.1} × process")?;
            }
            writeln!(f)?;
        }
        for name in &self.missing {
            writeln!(f, "{name}")?;
        }
        Ok(())
    }

    fn ratio_to_process(&self, row: &Row) -> Option<f64> {
        let process = self.rows.iter().find(|row| row.contender == "process")?;
        let ratio = row.summary.median_ns as f64 / process.summary.median_ns as f64;
        (row.contender != "process").then_some(ratio)
    }

    fn write_phases(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (isolation, phases) in &self.phases {
            writeln!(
                f,
                "\n{:<32} {:>10} {:>10} {:>10}  ms",
                format!("{isolation}: step to"),
                "median",
                "min",
                "max"
            )?;
            for phase in phases {
                write!(f, "{:<32}", phase.until)?;
                write_summary(f, phase.summary)?;
                writeln!(f)?;
            }
        }
        Ok(())
    }

    fn write_guest_cost(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |kib: u64| kib as f64 / 1024.0;
        if !self.vmm_costs.is_empty() {
            writeln!(
                f,
                "\n{:<16} {:>10} {:>12} {:>12}  MiB of the VMM's without the guest's memory, and that",
                "at /init", "KVM exits", "VMM", "guest"
            )?;
        }
        for VmmCost { contender, cost } in &self.vmm_costs {
            let exits = cost.kvm_counters.iter().find(|(name, _)| name == "exits");
            let exits = exits.map_or("?".to_owned(), |(_, count)| count.to_string());
            let (vmm, guest) = (mib(cost.vmm_resident_kib), mib(cost.guest_resident_kib));
            writeln!(f, "{contender:<16} {exits:>10} {vmm:>12.1} {guest:>12.1}")?;
        }
        let Some(cost) = &self.guest_cost else { return Ok(()) };
        writeln!(
            f,
            "\nvm at its first output: guest memory resident {:.1} MiB, VMM besides {:.1} MiB",
            mib(cost.guest_resident_kib),
            mib(cost.vmm_resident_kib)
        )?;
        if cost.kvm_counters.is_empty() {
            return writeln!(f, "KVM's counters are not to be had (debugfs)");
        }
        let counters: Vec<_> =
            cost.kvm_counters.iter().map(|(name, count)| format!("{name} {count}")).collect();
        writeln!(f, "KVM's counters until then: {}", counters.join(", "))
    }

    fn write_targets(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.surroundings.clock != Clock::InstructionCount {
            return Ok(());
        }
        writeln!(f)?;
        for (contender, until, target_ms) in TARGETS {
            let Some(row) = self.rows.iter().find(|row| row.contender == *contender && row.until == *until)
            else {
                continue;
            };
            let met = if row.summary.median_ns <= target_ms * 1_000_000 { "met" } else { "MISSED" };
            writeln!(f, "target {contender} → {until} ≤ {target_ms} ms: {met}")?;
        }
        Ok(())
    }

    fn write_surroundings(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let here = &self.surroundings;
        writeln!(f, "\nhow: {}", here.clock.explanation())?;
        writeln!(
            f,
            "     {} runs of each, interleaved, after {} of warm-up; spawn to read or wait, CLOCK_MONOTONIC",
            self.runs, self.warm_up
        )?;
        writeln!(f, "     `busybox true`; where the first byte counts, `busybox echo hi`; all with --rm")?;
        writeln!(
            f,
            "     crun and runc: an unpacked directory as root, no overlay; Docker's capabilities, masks and"
        )?;
        writeln!(f, "     mounts, a short seccomp policy; process: the same busybox, spawned")?;
        if !self.vmm_costs.is_empty() {
            writeln!(
                f,
                "     VMMs: one kernel, 1 vCPU, 128 MiB, an /init that reports and resets the machine"
            )?;
        }
        writeln!(
            f,
            "     kernel {}, {} × {}, flags of note: {}",
            here.kernel,
            here.processors,
            here.processor,
            if here.flags.is_empty() { "none".to_owned() } else { here.flags.join(" ") }
        )?;
        writeln!(f, "     transparent huge pages {}; {}", here.huge_pages, here.versions.join("; "))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_rows(f)?;
        self.write_targets(f)?;
        self.write_phases(f)?;
        self.write_guest_cost(f)?;
        self.write_surroundings(f)
    }
}

/// Median, minimum and maximum in aligned columns of milliseconds.
fn write_summary(f: &mut fmt::Formatter<'_>, summary: Summary) -> fmt::Result {
    let ms = |ns: u64| ns as f64 / 1e6;
    write!(f, " {:>10.2} {:>10.2} {:>10.2}", ms(summary.median_ns), ms(summary.min_ns), ms(summary.max_ns))
}
