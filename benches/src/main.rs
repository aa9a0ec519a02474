//! `cloche-bench`: how long Cloche and its peers take, measured from outside, in one run, side by side.
//!
//! ```text
//! scripts/kvm-host --icount --in target/…/cloche-bench -- ./cloche-bench startup
//! ```
//!
//! The programs measured are the ones on `PATH` (`CLOCHE_BIN`, `QEMU_BIN` and `FIRECRACKER_BIN` name others). A peer that is missing is named
//! as missing.

#[path = "../../tests/src/alone.rs"]
mod alone;
mod bundle;
mod contender;
/// The suite's writer of initramfs archives.
#[path = "../../tests/src/cpio.rs"]
mod cpio;
mod disk;
mod guest_cost;
mod report;
mod startup;
mod statistics;
mod stopwatch;
mod surroundings;
mod vm_start;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures Cloche next to its peers.
#[derive(Debug, Parser)]
#[command(name = "cloche-bench")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// From the start of a command to its first byte of output and to its exit
    Startup(StartupArguments),
    /// Reads of a VM's disk: 4 KiB at random and 1 MiB in order
    Disk(DiskArguments),
}

/// What `disk` is told.
#[derive(Debug, clap::Args)]
struct DiskArguments {
    /// Rounds
    #[arg(short = 'n', long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

/// What `startup` is told.
#[derive(Debug, clap::Args)]
struct StartupArguments {
    /// Measured runs of each contender
    #[arg(short = 'n', long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Runs of each contender before the first measured one
    #[arg(long, default_value_t = 2)]
    warm_up: u32,
    /// Leave the VM out
    #[arg(long)]
    no_vm: bool,
    /// Also write every figure to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    if disk::is_guest() {
        disk::guest();
        return ExitCode::FAILURE;
    }
    let result = match Arguments::parse().command {
        Command::Startup(arguments) => startup::measure(arguments.runs, arguments.warm_up, !arguments.no_vm)
            .and_then(|report| {
                print!("{report}");
                match &arguments.json {
                    Some(file) => report.write_json(file),
                    None => Ok(()),
                }
            }),
        Command::Disk(arguments) => disk::measure(arguments.runs).map(|report| print!("{report}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cloche-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
