//! The `cloche` binary: arguments become a request, the engine carries it out, the outcome is rendered. How anything
//! is done is the engine's business.
//!
//! The binary is multi-call: `cloche vmm` is the process that one microVM lives in, `cloche share` the one that serves
//! it files of the host, `cloche build-step` the monitor of one step of a build. They are started by the engine and the
//! builder only and are looked for before arguments are parsed, to keep the start of a VM short. Called `cloche-container` or
//! `cloche-vm`, it is an OCI runtime.

#[macro_use]
mod output;
mod arguments;
mod commands;
mod oci;
mod render;
mod terminal;

use std::process::ExitCode;

use crate::arguments::{Arguments, Verb};

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    if let Some(isolation) = oci::called(words.next().as_ref()) {
        return oci::main(isolation);
    }
    match words.next() {
        Some(word) if word == "vmm" => return commands::vmm::main(words),
        Some(word) if word == cloche_build::step::WORD => return cloche_build::step::main(),
        Some(word) if word == "share" => return commands::share::main(),
        _ => {}
    }
    let started = cloche_engine::trace::now_ns();
    let arguments = Arguments::of_command_line();
    match dispatch(arguments, started) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cloche: {error:#}");
            ExitCode::from(exit_code(&error))
        }
    }
}

fn dispatch(Arguments { global, verb }: Arguments, started_ns: u64) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Run(arguments) => commands::run::run(&global, *arguments, started_ns),
        Verb::Compare(arguments) => commands::compare::compare(&global, &arguments),
        Verb::Ps(arguments) => commands::sandbox::ps(&global, &arguments),
        Verb::Stats(arguments) => commands::stats::stats(&global, &arguments),
        Verb::Pause(arguments) => commands::steer::pause(&global, &arguments),
        Verb::Unpause(arguments) => commands::steer::unpause(&global, &arguments),
        Verb::Stop(arguments) => commands::steer::stop(&global, &arguments),
        Verb::Kill(arguments) => commands::steer::kill(&global, &arguments),
        Verb::Console(arguments) => commands::steer::console(&global, &arguments),
        Verb::Rm(arguments) => commands::sandbox::rm(&global, &arguments),
        Verb::Diff(arguments) => commands::changes::diff(&global, &arguments),
        Verb::Export(arguments) => commands::changes::export(&global, &arguments),
        Verb::Commit(arguments) => commands::changes::commit(&global, &arguments),
        Verb::Build(arguments) => commands::build::build(&global, *arguments),
        Verb::Builder(verb) => commands::build::builder(&global, &verb),
        Verb::Pull(arguments) => commands::registry::pull(&global, &arguments),
        Verb::Push(arguments) => commands::registry::push(&global, &arguments),
        Verb::Search(arguments) => commands::registry::search(&arguments),
        Verb::Login(arguments) => commands::registry::login(&arguments),
        Verb::Logout(arguments) => commands::registry::logout(&arguments),
        Verb::Load(arguments) => commands::image::load(&global, &arguments),
        Verb::Save(arguments) => commands::image::save(&global, &arguments),
        Verb::Import(arguments) => commands::image::import(&global, &arguments),
        Verb::Tag(arguments) => commands::image::tag(&global, &arguments),
        Verb::Images(arguments) => commands::image::list(&global, &arguments),
        Verb::Rmi(arguments) => commands::image::remove(&global, &arguments),
        Verb::History(arguments) => commands::layers::history(&global, &arguments),
        Verb::System(verb) => commands::system::system(&global, &verb),
        Verb::Image(verb) => commands::image::image(&global, verb),
        Verb::Volume(verb) => commands::volume::volume(&global, verb),
        Verb::Kernel(verb) => commands::kernel::kernel(verb),
        Verb::Doctor(arguments) => commands::doctor::doctor(&arguments),
        Verb::Completion { shell } => {
            commands::completion(shell);
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The one place that maps errors to exit codes: those of the process's start as Docker has them (127 not found, 126
/// not executable), 125 for everything else that Cloche itself could not do.
fn exit_code(error: &anyhow::Error) -> u8 {
    let run = error.downcast_ref::<cloche_engine::run::RunError>();
    run.map_or(125, cloche_engine::run::RunError::exit_code)
}
