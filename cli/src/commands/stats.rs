//! `cloche stats`.

use std::{
    collections::HashMap,
    io::{IsTerminal, stdout},
    process::ExitCode,
    thread::sleep,
    time::Duration,
};

use cloche_engine::{
    sandboxes::Sandboxes,
    stats::{Known, Sample},
    steering::Steered,
};

use super::{home, reconciled};
use crate::{
    arguments::{Global, Stats},
    output, render,
};

/// Between two samples.
const INTERVAL: Duration = Duration::from_secs(1);
/// Clears the screen and goes to its first line.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Shows what running sandboxes use, again and again until it is interrupted or none is left, or once.
pub fn stats(global: &Global, arguments: &Stats) -> anyhow::Result<ExitCode> {
    let sandboxes = reconciled(&home(global)?)?;
    // A named sandbox must be there, at first.
    for reference in &arguments.sandboxes {
        sandboxes.steer(reference)?;
    }
    let mut before = HashMap::new();
    // CPU use needs two samples: the first is not shown.
    sample_all(&sandboxes, arguments, &mut before, false)?;
    loop {
        sleep(INTERVAL);
        let samples = sample_all(&sandboxes, arguments, &mut before, !arguments.no_stream)?;
        if arguments.json {
            if arguments.no_stream {
                super::print_json(&samples)?;
            } else {
                println!("{}", serde_json::to_string(&samples)?);
            }
        } else {
            if !arguments.no_stream && stdout().is_terminal() {
                print!("{CLEAR}");
            }
            print!("{}", table(&samples));
        }
        let is_over = samples.is_empty() && !arguments.sandboxes.is_empty();
        if arguments.no_stream || is_over || !output::has_reader() {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// Measures what is asked for. A sandbox that has ended meanwhile is left out.
fn sample_all(
    sandboxes: &Sandboxes,
    arguments: &Stats,
    before: &mut HashMap<String, Sample>,
    quiet: bool,
) -> anyhow::Result<Vec<Sample>> {
    let steered: Vec<Steered> = if arguments.sandboxes.is_empty() {
        sandboxes.steer_all()?
    } else {
        arguments.sandboxes.iter().filter_map(|reference| sandboxes.steer(reference).ok()).collect()
    };
    let mut samples = Vec::new();
    for sandbox in steered {
        match Sample::take(&sandbox, before.get(&sandbox.record.id)) {
            Ok(sample) => samples.push(sample),
            Err(error) if !quiet => eprintln!("cloche: {:#}", anyhow::Error::new(error)),
            Err(_) => {}
        }
    }
    *before = samples.iter().map(|sample| (sample.id.clone(), sample.clone())).collect();
    Ok(samples)
}

fn table(samples: &[Sample]) -> String {
    let head = [
        "ID",
        "NAME",
        "ISOLATION",
        "STATUS",
        "CPU %",
        "MEM USAGE / LIMIT",
        "MEM %",
        "NET I/O",
        "BLOCK I/O",
        "PIDS",
    ];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(samples.iter().map(row));
    render::table(&rows, &[4, 5, 6, 7, 8, 9])
}

fn row(sample: &Sample) -> Vec<String> {
    let percent = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}%"));
    let pair = |a: &Known<u64>, b: &Known<u64>| format!("{} / {}", bytes(a), bytes(b));
    let memory_percent = match (sample.memory_bytes.value(), sample.memory_limit_bytes.value()) {
        (Some(used), Some(limit)) if limit > 0 => Some(100.0 * used as f64 / limit as f64),
        _ => None,
    };
    vec![
        sample.id.clone(),
        sample.name.clone().unwrap_or_default(),
        sample.isolation.to_string(),
        sample.status.name().into(),
        percent(sample.cpu_percent.value()),
        pair(&sample.memory_bytes, &sample.memory_limit_bytes),
        percent(memory_percent),
        pair(&sample.net_received_bytes, &sample.net_sent_bytes),
        pair(&sample.block_read_bytes, &sample.block_written_bytes),
        sample.pids.value().map_or("-".into(), |pids| pids.to_string()),
    ]
}

fn bytes(figure: &Known<u64>) -> String {
    figure.value().map_or("-".into(), render::bytes)
}
