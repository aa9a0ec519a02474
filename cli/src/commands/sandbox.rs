//! `cloche ps` and `cloche rm`.

use std::process::ExitCode;

use cloche_engine::{
    isolation::observed,
    record::State,
    request::Isolation,
    sandboxes::{Entry, Sandboxes},
    steering::Activity,
};
use serde::Serialize;

use super::{home, print_json, reconciled};
use crate::{
    arguments::{Global, Ps, Rm},
    render,
};

/// One line of `ps`.
#[derive(Serialize)]
struct Line {
    id: String,
    name: Option<String>,
    image: String,
    command: Vec<String>,
    /// What the kernel shows of a running sandbox; what was asked for of one that has ended.
    isolation: Isolation,
    created: u64,
    status: &'static str,
    pid: Option<i32>,
    exit_code: Option<u8>,
    oom_killed: bool,
    reason: Option<String>,
}

impl Line {
    fn of(sandboxes: &Sandboxes, entry: Entry) -> Self {
        // Seen, not remembered: nobody writes down that a sandbox is paused.
        let activity = match entry.record.state {
            State::Running(_) => sandboxes.steer(&entry.record.id).ok().map(|steered| steered.activity()),
            _ => None,
        };
        let record = entry.record;
        let mut line = Self {
            id: record.id,
            name: record.name,
            image: record.image,
            command: record.command,
            isolation: record.isolation,
            created: record.created,
            status: "starting",
            pid: None,
            exit_code: None,
            oom_killed: false,
            reason: None,
        };
        match record.state {
            State::Starting => {}
            State::Running(processes) => {
                line.status = activity.unwrap_or(Activity::Running).name();
                line.pid = Some(processes.leader.pid);
                line.isolation = observed::isolation(processes.leader.pid).unwrap_or(line.isolation);
            }
            State::Exited(ended) => {
                line.status = "exited";
                line.exit_code = Some(ended.exit_code);
                line.oom_killed = ended.oom_killed;
                line.reason = ended.reason;
            }
        }
        line
    }
}

/// Lists sandboxes.
pub fn ps(global: &Global, arguments: &Ps) -> anyhow::Result<ExitCode> {
    let sandboxes = reconciled(&home(global)?)?;
    let entries = sandboxes.entries()?.into_iter();
    let lines: Vec<Line> = entries
        .map(|entry| Line::of(&sandboxes, entry))
        .filter(|line| arguments.all || line.status != "exited")
        .collect();
    if arguments.json {
        print_json(&lines)?;
    } else if arguments.quiet {
        lines.iter().for_each(|line| println!("{}", line.id));
    } else {
        let head = ["ID", "IMAGE", "ISOLATION", "COMMAND", "CREATED", "STATUS", "NAME"];
        let mut rows = vec![head.map(String::from).to_vec()];
        rows.extend(lines.iter().map(row));
        print!("{}", render::table(&rows, &[]));
    }
    Ok(ExitCode::SUCCESS)
}

fn row(line: &Line) -> Vec<String> {
    const COMMAND_WIDTH: usize = 30;
    let mut command = line.command.join(" ").escape_debug().to_string();
    if command.chars().count() > COMMAND_WIDTH {
        command = command.chars().take(COMMAND_WIDTH - 1).chain(['…']).collect();
    }
    let status = match (line.exit_code, &line.reason) {
        (Some(code), Some(reason)) => format!("exited ({code}): {reason}"),
        (Some(code), None) => format!("exited ({code})"),
        (None, _) => line.status.to_owned(),
    };
    let name = line.name.clone().unwrap_or_default();
    let created = render::age(line.created);
    vec![line.id.clone(), line.image.clone(), line.isolation.to_string(), command, created, status, name]
}

/// Removes sandboxes; goes on after one that cannot be.
pub fn rm(global: &Global, arguments: &Rm) -> anyhow::Result<ExitCode> {
    let sandboxes = reconciled(&home(global)?)?;
    let mut code = ExitCode::SUCCESS;
    for reference in &arguments.sandboxes {
        match sandboxes.remove(reference, arguments.force) {
            Ok(id) => println!("{id}"),
            Err(error) => {
                eprintln!("cloche: {:#}", anyhow::Error::new(error));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}
