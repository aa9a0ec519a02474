//! `exec`: a further process in a container.

use std::{os::fd::AsFd, path::Path};

use oci_spec::runtime::Process;

use crate::{
    console::{Console, own_stdio},
    create::{Preserved, exit_code, write_pid_file},
    error::{Error, system},
    foreground::{self, Signals},
    isolation::{Child, Further},
    listener,
    state::{Home, Status},
};

/// What to run.
pub struct Execution<'a> {
    /// In which container.
    pub id: &'a str,
    /// Makes the process from the container's own.
    pub process: &'a dyn Fn(&Process) -> Result<Process, Error>,
    /// Whether to leave it running.
    pub detach: bool,
    /// File to write its id to.
    pub pid_file: Option<&'a Path>,
    /// Socket that takes its terminal.
    pub console_socket: Option<&'a Path>,
    /// Descriptors that it keeps.
    pub preserved: &'a Preserved,
    /// Cgroups below the container's to run in, as [`Cgroup::below`] has them; none for the container's own.
    pub cgroup: &'a [String],
    /// Whether a paused container is no obstacle.
    pub ignore_paused: bool,
    /// Called with warnings.
    pub warn: &'a dyn Fn(&str),
    /// Called with what is done, step by step.
    pub debug: &'a dyn Fn(&str),
}

/// Runs a process in a container; returns its exit code, 0 in the background.
pub fn exec(home: &Home<'_>, execution: &Execution<'_>) -> Result<u8, Error> {
    // Until it is created, its first process is still in the caller's root file system.
    home.find(execution.id)?.await_creation("exec in")?;
    let known = home.find(execution.id)?;
    let status = known.status();
    let first = match (status, known.record.process) {
        (Status::Paused, _) if !execution.ignore_paused => {
            return Err(Error::Request(format!(
                "cannot exec in a paused container: {}; resume it first",
                execution.id
            )));
        }
        (Status::Stopped, _) | (_, None) => {
            return Err(Error::NotRunning(execution.id.to_owned(), status.name()));
        }
        (_, Some(first)) => first,
    };
    let pidfd = first.open().map_err(system("open the container's process"))?;
    let pidfd = pidfd.ok_or_else(|| Error::NotRunning(execution.id.to_owned(), "stopped"))?;
    let spec = known.spec()?;
    let own = spec.process().as_ref();
    let process = (execution.process)(own.unwrap_or(&Process::default()))?;
    let console = Console::new(process.terminal() == Some(true), execution.console_socket, execution.detach)?;
    let signals =
        if execution.detach { None } else { Some(Signals::collect().map_err(system("collect signals"))?) };
    let listener = |pid, listener| {
        listener::send(&known.record, listener::policy(&spec), (first.pid, status), pid, listener)
    };
    let program = process.args().iter().flatten().next().map_or("", String::as_str);
    (execution.debug)(&format!("container setup: joining {} by its process {}", execution.id, first.pid));
    (execution.debug)(&format!("about to exec {program:?}"));
    let mut joined = home.isolation.join(Further {
        known: &known,
        spec: &spec,
        first,
        pidfd: pidfd.as_fd(),
        process: &process,
        cgroup: execution.cgroup,
        listener: &listener,
        stdio: own_stdio()?,
        console_socket: console.socket(),
        preserved_fds: execution.preserved.fds(),
        warn: execution.warn,
    })?;
    (execution.debug)(&format!("child process in init() has become the program: {}", joined.pid()));
    let result = attend(joined.as_mut(), execution.pid_file, signals, console);
    if result.is_err() {
        // Whoever is told of a failure believes that nothing runs.
        joined.discard();
    }
    result
}

fn attend(
    joined: &mut dyn Child,
    pid_file: Option<&Path>,
    signals: Option<Signals>,
    console: Console,
) -> Result<u8, Error> {
    if let Some(path) = pid_file {
        write_pid_file(path, joined.pid())?;
    }
    let Some(signals) = signals else { return Ok(0) };
    foreground::attend(joined.pidfd(), &signals, console.terminal()?)?;
    Ok(exit_code(joined.wait()?))
}
