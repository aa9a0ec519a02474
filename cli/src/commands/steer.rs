//! Commands that steer running sandboxes: `pause`, `unpause`, `stop`, `kill`, `console`.

use std::{process::ExitCode, time::Duration};

use anyhow::Context;
use cloche_engine::{sandboxes::Sandboxes, steering::SteeringError};

use super::{home, reconciled};
use crate::arguments::{ConsoleArguments, Global, Kill, SandboxList, Stop};

/// Does the same to each sandbox, prints its name as given, and goes on after one that fails.
fn each(
    global: &Global,
    references: &[String],
    act: impl Fn(&Sandboxes, &str) -> Result<(), SteeringError>,
) -> anyhow::Result<ExitCode> {
    let sandboxes = reconciled(&home(global)?)?;
    let mut code = ExitCode::SUCCESS;
    for reference in references {
        match act(&sandboxes, reference) {
            Ok(()) => println!("{reference}"),
            Err(error) => {
                eprintln!("cloche: {:#}", anyhow::Error::new(error));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

/// Stops everything in sandboxes.
pub fn pause(global: &Global, arguments: &SandboxList) -> anyhow::Result<ExitCode> {
    each(global, &arguments.sandboxes, |sandboxes, reference| sandboxes.steer(reference)?.pause())
}

/// Lets paused sandboxes go on.
pub fn unpause(global: &Global, arguments: &SandboxList) -> anyhow::Result<ExitCode> {
    each(global, &arguments.sandboxes, |sandboxes, reference| sandboxes.steer(reference)?.resume())
}

/// Ends sandboxes in order, or by force when their time is up.
pub fn stop(global: &Global, arguments: &Stop) -> anyhow::Result<ExitCode> {
    let patience = Duration::from_secs(arguments.time.into());
    each(global, &arguments.sandboxes, |sandboxes, reference| {
        sandboxes.stop(reference, arguments.signal, patience).map(drop)
    })
}

/// Sends a signal.
pub fn kill(global: &Global, arguments: &Kill) -> anyhow::Result<ExitCode> {
    each(global, &arguments.sandboxes, |sandboxes, reference| {
        sandboxes.signal(reference, arguments.signal).map(drop)
    })
}

/// Prints the end of a VM's console.
pub fn console(global: &Global, arguments: &ConsoleArguments) -> anyhow::Result<ExitCode> {
    let steered = reconciled(&home(global)?)?.steer(&arguments.sandbox)?;
    let text = steered.console(arguments.bytes).context("only a VM has a console")?;
    print!("{text}");
    if !text.is_empty() && !text.ends_with('\n') {
        println!();
    }
    Ok(ExitCode::SUCCESS)
}
