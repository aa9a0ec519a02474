//! `cloche compare`.

use std::{
    io::{IsTerminal, stderr},
    process::ExitCode,
    time::Duration,
};

use cloche_engine::compare::{Comparison, Phase, Plan, Spread, compare as run_plan};
use indicatif::{ProgressBar, ProgressStyle};

use super::{home, print_json, reconciled};
use crate::{
    arguments::{Compare, Global},
    render,
};

/// Compares, with a progress bar on a terminal.
pub fn compare(global: &Global, arguments: &Compare) -> anyhow::Result<ExitCode> {
    let home = home(global)?;
    reconciled(&home)?;
    let directory = |option: &str, path: &std::path::Path| format!("{option}={}", path.display());
    let plan = Plan {
        global_arguments: vec![directory("--root", home.images()), directory("--state", home.state())],
        kernel: arguments.kernel.clone(),
        memory: arguments.memory.clone(),
        image_and_command: [std::slice::from_ref(&arguments.image), &arguments.command].concat(),
        isolations: arguments.isolation.iter().map(|isolation| (*isolation).into()).collect(),
        runs: arguments.runs as usize,
    };
    let bar = if stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} runs, {eta} left")?);
    bar.enable_steady_tick(Duration::from_millis(200));
    let result = run_plan(&plan, |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let comparison = result?;
    if arguments.json {
        print_json(&comparison)?
    } else {
        print!("{}", table(&comparison))
    }
    Ok(ExitCode::SUCCESS)
}

fn table(comparison: &Comparison) -> String {
    let spread = |spread: Option<&Spread>, unit: fn(u64) -> String| match spread {
        Some(Spread { median, min, max }) => format!("{} ({}–{})", unit(*median), unit(*min), unit(*max)),
        None => "–".into(),
    };
    let row = |label: &str, cell: &dyn Fn(&cloche_engine::compare::Column) -> String| {
        let cells = comparison.columns.iter().map(cell);
        [label.to_owned()].into_iter().chain(cells).collect::<Vec<_>>()
    };
    let mut rows = vec![row("", &|column| column.isolation.name().to_uppercase())];
    for phase in Phase::ALL {
        if comparison.columns.iter().any(|column| column.phases_ns.contains_key(&phase)) {
            rows.push(row(phase.label(), &|column| {
                spread(column.phases_ns.get(&phase), render::milliseconds)
            }));
        }
    }
    rows.push(row("peak memory on the host", &|column| {
        spread(column.host_memory_peak_bytes.as_ref(), render::bytes)
    }));
    rows.push(row("exit code", &|column| {
        column.exit_codes.iter().map(u8::to_string).collect::<Vec<_>>().join(", ")
    }));
    let right: Vec<usize> = (1..=comparison.columns.len()).collect();
    format!(
        "{}\n{}milliseconds, median (range) of {} runs; {}\n",
        comparison.command.join(" "),
        render::table(&rows, &right),
        comparison.runs,
        comparison.method
    )
}
