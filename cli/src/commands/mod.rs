//! One module for each verb: from arguments to the engine and back to text.

pub mod build;
pub mod changes;
pub mod compare;
pub mod doctor;
pub mod image;
pub mod kernel;
pub mod layers;
pub mod registry;
pub mod run;
pub mod sandbox;
pub mod share;
pub mod stats;
pub mod steer;
pub mod system;
pub mod vmm;
pub mod volume;

use std::process::ExitCode;

use clap::CommandFactory;
use cloche_engine::{
    home::{Home, HomeError},
    sandboxes::Sandboxes,
};

use crate::arguments::{Arguments, Global};

/// Prints completions.
pub fn completion(shell: clap_complete::Shell) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "cloche", &mut script);
    // By what minds no reader that is gone.
    print!("{}", String::from_utf8_lossy(&script));
}

fn home(global: &Global) -> Result<Home, HomeError> {
    Home::new(global.root.clone(), global.state.clone())
}

/// The sandboxes, after ending and reporting what dead monitors left, and cleaning up after dead builds.
fn reconciled(home: &Home) -> anyhow::Result<Sandboxes> {
    cloche_build::remove_remains(home);
    let sandboxes = Sandboxes::new(home.sandboxes());
    for notice in sandboxes.reconcile()? {
        eprintln!("cloche: {}", notice.message);
    }
    Ok(sandboxes)
}

/// Prints a value as JSON with line breaks.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Does all of several things, and fails at the end if any of them failed.
fn each(names: &[String], mut action: impl FnMut(&str) -> anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        if let Err(error) = action(name) {
            eprintln!("cloche: {error:#}");
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}
