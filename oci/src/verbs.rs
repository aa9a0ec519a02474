//! The verbs for containers that are there.

use std::os::fd::AsFd;

use cloche_runtime::{cgroup::Cgroup, chain};
use oci_spec::runtime::{LinuxResources, Spec};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Signal, pidfd_send_signal},
};

use crate::{
    create::{run_hooks, run_poststart},
    error::{Error, of_file, system},
    gate::{self, Outcome},
    isolation::{Inside, Isolation},
    listener,
    state::{Home, Known, Status},
};

/// Lets a created container run its program.
pub fn start(home: &Home<'_>, id: &str) -> Result<(), Error> {
    home.find(id)?.await_creation("start")?;
    let known = home.find(id)?;
    let refused = |status: Status| {
        let hint = match status {
            Status::Stopped => "; delete it",
            Status::Paused => "; resume it first",
            _ => "; it was started already",
        };
        Error::Status { action: "start", id: id.to_owned(), status: status.name(), hint }
    };
    let Some(process) = known.alive() else { return Err(refused(Status::Stopped)) };
    if known.is_paused() {
        // It would not come to take what opens its gate.
        return Err(refused(Status::Paused));
    }
    let Some(pidfd) = process.open().map_err(system("open the container's process"))? else {
        return Err(refused(Status::Stopped));
    };
    let spec = known.spec()?;
    let take_listener = |number| {
        let listener = cloche_runtime::take_listener(pidfd.as_fd(), number)
            .map_err(|error| format!("cannot fetch the seccomp listener of the process: {error}"))?;
        let first = (process.pid, Status::Created);
        listener::send(&known.record, listener::policy(&spec), first, process.pid, listener)
    };
    let outcome = gate::open(&known.directory, &take_listener);
    match outcome.map_err(of_file("use the start socket of", &known.directory))? {
        Outcome::Started => {}
        Outcome::NotWaiting => return Err(refused(known.status())),
        Outcome::Failed { exit_code, message } => {
            // It may still wait for what has failed here.
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
            return Err(Error::Start { exit_code, message });
        }
    }
    run_poststart(&known, &spec)
}

/// The state of a container, as JSON.
pub fn state(home: &Home<'_>, id: &str) -> Result<String, Error> {
    let known = home.find(id)?;
    serde_json::to_string_pretty(&known.state()).map_err(|error| system("print the state")(error))
}

/// All containers.
pub fn list(home: &Home<'_>) -> Result<Vec<Known>, Error> {
    home.all()
}

/// Sends a signal to a container's first process, or to all of its processes.
pub fn kill(home: &Home<'_>, id: &str, signo: i32, all: bool) -> Result<(), Error> {
    let known = home.find(id)?;
    if all {
        return home.isolation.signal_all(&known, signo);
    }
    let pidfd = match known.record.process {
        Some(process) => process.open().map_err(system("open the container's process"))?,
        None => None,
    };
    let Some(pidfd) = pidfd else {
        return Err(Error::NotRunning(id.to_owned(), "stopped"));
    };
    home.isolation.signal(&known, pidfd.as_fd(), signo)
}

/// Removes a container that has ended or was never started; with `force` whatever it is doing, and without complaint
/// when there is none.
pub fn delete(home: &Home<'_>, id: &str, force: bool, warn: &dyn Fn(&str)) -> Result<(), Error> {
    let known = match home.find(id) {
        Ok(known) => known,
        Err(Error::NoContainer(_)) if force => {
            return if home.remove_claim(id)? { Ok(()) } else { delete(home, id, force, warn) };
        }
        Err(error) => return Err(error),
    };
    let status = known.status();
    if !force && !matches!(status, Status::Stopped | Status::Created) {
        let hint = "; kill it first, or use --force";
        return Err(Error::Status { action: "delete", id: id.to_owned(), status: status.name(), hint });
    }
    let spec = match known.spec() {
        Ok(spec) => spec,
        Err(_) if force => Spec::default(),
        Err(error) => return Err(error),
    };
    remove(home.isolation, &known, &spec, warn)
}

/// Ends what is left of a container and removes all of it.
pub(crate) fn remove(
    isolation: &dyn Isolation,
    known: &Known,
    spec: &Spec,
    warn: &dyn Fn(&str),
) -> Result<(), Error> {
    let cgroup = known.possible_cgroup()?;
    let kill_all = || cgroup.as_ref().map_or(Ok(()), Cgroup::kill_all);
    if let Some(process) = known.record.process
        && let Some(pidfd) = process.open().map_err(system("open the container's process"))?
    {
        // It is perhaps not in its cgroup yet.
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        kill_all()?;
        if let Some(cgroup) = cgroup.as_ref().filter(|cgroup| cgroup.is_frozen()) {
            let _ = cgroup.thaw();
        }
        let has_ended = |patience| poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&patience)) == Ok(1);
        if !has_ended(Timespec { tv_sec: 0, tv_nsec: 300_000_000 }) {
            // Somebody may have moved it into a frozen cgroup of their own, where it cannot even die.
            cloche_runtime::cgroup::thaw_process(process.pid);
            has_ended(Timespec { tv_sec: 10, tv_nsec: 0 });
        }
    } else {
        kill_all()?;
    }
    match (cgroup, known.record.process) {
        // Whoever created it was killed before telling which cgroup it made, if any.
        (Some(_), None) => Cgroup::open(&known.record.cgroup)?.delete_unused(),
        (Some(cgroup), Some(_)) => cgroup.delete()?,
        (None, _) => {}
    }
    known.leave_shared_cgroup();
    forget(isolation, known, spec, warn)
}

/// Removes what is on disk of a container of which nothing else is left.
pub(crate) fn forget(
    isolation: &dyn Isolation,
    known: &Known,
    spec: &Spec,
    warn: &dyn Fn(&str),
) -> Result<(), Error> {
    if let Err(error) = isolation.give_back(known) {
        warn(&chain(&error));
    }
    known.forget()?;
    let Some(listed) = spec.hooks() else { return Ok(()) };
    // runtime.md#lifecycle: a poststop hook that fails is warned of, and all goes on as if it had succeeded.
    let state = known.record.state_json(0, Status::Stopped.name());
    for hook in listed.poststop().iter().flatten() {
        if let Err(error) = run_hooks("poststop", &Some(vec![hook.clone()]), &state) {
            warn(&chain(&error));
        }
    }
    Ok(())
}

/// Stops all processes of a container until they are resumed.
pub fn pause(home: &Home<'_>, id: &str) -> Result<(), Error> {
    let known = home.find(id)?;
    match known.status() {
        Status::Created | Status::Running => home.isolation.pause(&known),
        status => Err(Error::Status { action: "pause", id: id.to_owned(), status: status.name(), hint: "" }),
    }
}

/// Lets a paused container go on.
pub fn resume(home: &Home<'_>, id: &str) -> Result<(), Error> {
    let known = home.find(id)?;
    match known.status() {
        Status::Paused => home.isolation.resume(&known),
        _ => Err(Error::NotPaused(id.to_owned())),
    }
}

/// Changes the limits of a container that runs.
pub fn update(home: &Home<'_>, id: &str, resources: &LinuxResources) -> Result<(), Error> {
    let (_turn, mut known) = loop {
        home.find(id)?.await_creation("update")?;
        let turn = home.find(id)?.take_turn()?;
        // As it is now: whoever had the turn before may have changed the record, or removed it.
        let known = home.find(id)?;
        match known.status() {
            Status::Stopped => return Err(Error::NotRunning(id.to_owned(), "stopped")),
            // It is another one of the same name.
            Status::Creating => {}
            _ => break (turn, known),
        }
    };
    let mut resources = resources.clone();
    let spec = known.spec()?;
    let present = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    if present.is_some_and(|present| present.devices() == resources.devices()) {
        // Engines that change one limit send all there are (CRI). Device rules cannot be changed, and need not be.
        resources.set_devices(None);
    }
    let mut cgroup = known.cgroup()?;
    let updated = home.isolation.update(&known, &mut cgroup, &resources);
    // It may have got directories in further hierarchies.
    let identity = cgroup.identity();
    if identity != known.record.cgroup_identity {
        known.record.cgroup_identity = identity;
        known.save()?;
    }
    updated
}

/// The processes of a container.
pub fn processes(home: &Home<'_>, id: &str) -> Result<Vec<Inside>, Error> {
    home.isolation.processes(&home.find(id)?)
}
