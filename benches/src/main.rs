//! `cloche-bench`: how long Cloche and its peers take, measured from outside, in one run, side by side.
//!
//! ```text
//! scripts/kvm-host --icount --in target/…/cloche-bench -- ./cloche-bench startup
//! ```
//!
//! The programs measured are the ones on `PATH` (`CLOCHE_BIN`, `QEMU_BIN` and `FIRECRACKER_BIN` name others). A peer
//! that is missing is named as missing.

#[path = "../../tests/src/alone.rs"]
mod alone;
mod bundle;
mod contender;
/// The suite's writer of initramfs archives.
#[path = "../../tests/src/cpio.rs"]
mod cpio;
mod guest_cost;
mod images;
mod port_trace;
mod report;
mod runtimes;
mod start_order;
mod startup;
mod statistics;
mod stopwatch;
mod surroundings;
mod throughput;
mod vm_start;
mod vmms;
/// AF_VSOCK.
#[path = "../../tests/src/vsock.rs"]
mod vsock;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::startup::Scope;

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
    /// OCI runtimes: `run`, `create`, `start` and `delete`, as ratios to crun
    Runtimes(RuntimesArguments),
    /// A VM's disk, network and sockets: operations and bytes a second, exits for each
    Throughput(ThroughputArguments),
    /// From an image's archive, or from a registry, to an image that can be started
    Images(ImagesArguments),
    /// Print which functions of `cloche` a command runs through, for the linker (see scripts/start-order)
    #[command(hide = true)]
    StartOrder {
        /// The linker's map of that `cloche`
        #[arg(long)]
        map: PathBuf,
        /// What to run
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// The work of `throughput` in this process, at its request
    #[command(hide = true)]
    Worker {
        /// The disk
        disk: PathBuf,
        /// Where to listen
        sockets: PathBuf,
    },
}

/// What `throughput` is told.
#[derive(Debug, clap::Args)]
struct ThroughputArguments {
    /// Runs of each contender
    #[arg(short = 'n', long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only the process of the host
    #[arg(long)]
    no_vm: bool,
    /// Only rows with this in their name, such as `disk` or `host to guest`
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Also write every figure to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What `images` is told.
#[derive(Debug, clap::Args)]
struct ImagesArguments {
    /// A docker-archive of one image
    archive: PathBuf,
    /// Measured rounds
    #[arg(short = 'n', long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Also write every figure to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What `runtimes` is told.
#[derive(Debug, clap::Args)]
struct RuntimesArguments {
    /// Measured rounds
    #[arg(short = 'n', long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Also write every figure to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
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
    /// Leave VMs out
    #[arg(long)]
    no_vm: bool,
    /// Only VMMs, with a guest that does nothing
    #[arg(long, conflicts_with = "no_vm")]
    vmms: bool,
    /// Also write every figure to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    if throughput::is_guest() {
        throughput::guest();
        return ExitCode::FAILURE;
    }
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cloche-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Startup(StartupArguments { runs, warm_up, no_vm, vmms, json }) => {
            let scope = match (no_vm, vmms) {
                (true, _) => Scope::WithoutVms,
                (_, true) => Scope::Vmms,
                _ => Scope::All,
            };
            let report = startup::measure(runs, warm_up, scope)?;
            print!("{report}");
            json.map_or(Ok(()), |file| report.write_json(&file))
        }
        Command::Runtimes(RuntimesArguments { runs, json }) => {
            let report = runtimes::measure(runs)?;
            print!("{report}");
            json.map_or(Ok(()), |file| report.write_json(&file))
        }
        Command::Throughput(ThroughputArguments { runs, no_vm, only, json }) => {
            let report = throughput::measure(runs, no_vm, only)?;
            print!("{report}");
            json.map_or(Ok(()), |file| report.write_json(&file))
        }
        Command::Images(ImagesArguments { archive, runs, json }) => {
            let report = images::measure(&archive, runs)?;
            print!("{report}");
            json.map_or(Ok(()), |file| report.write_json(&file))
        }
        Command::StartOrder { map, command } => start_order::print(&vmms::cloche()?, &map, &command),
        Command::Worker { disk, sockets } => throughput::process(&disk, &sockets),
    }
}
