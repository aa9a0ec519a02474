//! The table.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::Figure;
use super::phases::{PHASES, Phase};
use crate::statistics::Summary;
use crate::surroundings::Surroundings;

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct ThroughputReport {
    /// Runs of each contender.
    pub runs: u32,
    /// Where this was.
    pub surroundings: Surroundings,
    /// By contender.
    pub columns: Vec<(&'static str, Outcome)>,
    /// Who could not take part, and why.
    pub missing: Vec<String>,
}

/// What one contender did.
#[derive(Debug, Default, Serialize)]
pub struct Outcome {
    /// By phase, then by run. Empty: not measured.
    pub figures: Vec<Vec<Figure>>,
    /// Why it takes no part.
    #[serde(skip)]
    pub failure: Option<String>,
}

impl Outcome {
    /// Adds the figures of a run.
    pub fn add(&mut self, run: Vec<Option<Figure>>) {
        self.figures.resize_with(run.len(), Vec::new);
        for (series, figure) in self.figures.iter_mut().zip(run) {
            series.extend(figure);
        }
    }

    fn median(&self, phase: usize, figure: fn(&Figure) -> Option<u64>) -> Option<u64> {
        let series: Vec<u64> = self.figures.get(phase)?.iter().filter_map(figure).collect();
        Summary::of(&series).map(|summary| summary.median_ns)
    }
}

impl ThroughputReport {
    /// Writes everything as JSON.
    pub fn write_json(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("write JSON")?;
        fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
    }

    fn cell(&self, outcome: &Outcome, index: usize, phase: &Phase) -> String {
        let Some(ns) = outcome.median(index, |figure| Some(figure.ns)) else { return "-".to_owned() };
        let per_second = |count: u64| count as f64 * 1e9 / ns.max(1) as f64;
        let speed = if phase.is_small() {
            format!("{:.0}/s", per_second(phase.units()))
        } else {
            format!("{:.0} MB/s", per_second(phase.bytes()) / 1e6)
        };
        let exits =
            outcome.median(index, |figure| figure.exits).map(|exits| exits as f64 / phase.units() as f64);
        exits.filter(|exits| *exits > 0.0).map_or(speed.clone(), |exits| format!("{speed} ({exits:.1})"))
    }
}

impl fmt::Display for ThroughputReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<30}", "")?;
        for (name, _) in &self.columns {
            write!(f, " {name:>20}")?;
        }
        writeln!(f)?;
        for (index, phase) in PHASES.iter().enumerate() {
            if self
                .columns
                .iter()
                .all(|(_, outcome)| outcome.median(index, |figure| Some(figure.ns)).is_none())
            {
                continue;
            }
            write!(f, "{:<30}", phase.name)?;
            for (_, outcome) in &self.columns {
                write!(f, " {:>20}", self.cell(outcome, index, phase))?;
            }
            writeln!(f)?;
        }
        for why in &self.missing {
            writeln!(f, "{why}")?;
        }
        let here = &self.surroundings;
        writeln!(f, "\nhow: {}", here.clock.explanation())?;
        writeln!(
            f,
            "     medians of {} runs of each, interleaved; each a fresh VM with 1 vCPU and 256 MiB",
            self.runs
        )?;
        writeln!(f, "     in brackets: KVM exits for one operation of the disk, or for 1 MiB of a stream")?;
        writeln!(
            f,
            "     disk: a file of 64 MiB, opened with O_DIRECT in the guest; TCP: through a tap; vsock: to a"
        )?;
        writeln!(f, "     unix socket; timed in the guest, with the host's ends in this program")?;
        writeln!(f, "     host process: the same program on the same file, over loopback and a unix socket")?;
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
