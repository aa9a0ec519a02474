//! `run`: a request becomes a sandbox, which is attended to its end and cleaned up.
//!
//! ```text
//!  validate ▸ resolve image ▸ spec ▸ record ▸ start ▸ observe ▸ attend ▸ tear down ▸ record
//! ```

use std::{
    io::{self, Read, Write},
    path::PathBuf,
};

use cloche_images::{Image, MergeError, ResolveError, Settings, Store, StoreError};
pub use cloche_protocol::message::Exit;
use cloche_runtime::{Lower, is_machine_root};
use oci_spec::image::ImageConfiguration;

use crate::{
    changes,
    home::Home,
    isolation::{Lost, Running, container, vm},
    monitor::{self, MonitorError},
    record::{Ended, ProcessId, Record, State, unix_time},
    request::{Isolation, RequestError, RunRequest},
    rootless::{IdMaps, RootlessError, Trees},
    sandboxes::{Owned, SandboxError, Sandboxes},
    signals::{self, Signals},
    sources::{Source, SourceError},
    spec::{self, Place, SpecError},
    trace::{Mark, Trace},
    volumes::Volumes,
};

/// Why a run failed, other than by its process's own exit code.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The request cannot be carried out anywhere.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A bare process is root's.
    #[error(
        "process isolation needs CAP_SYS_ADMIN, which this user lacks; run as root, or use another isolation"
    )]
    Unprivileged,
    /// A plain user cannot have the image's files.
    #[error(transparent)]
    Rootless(#[from] RootlessError),
    /// The image store is unusable.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no such image.
    #[error(transparent)]
    Image(#[from] ResolveError),
    /// The image's layers make no file system.
    #[error("image {0} cannot be used")]
    Layers(String, #[source] MergeError),
    /// Image and request together make no runnable command.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// What is to be mounted is not there.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The sandbox could not be written down.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Signals could not be collected.
    #[error("cannot collect signals")]
    Signals(#[source] std::io::Error),
    /// Container isolation failed to start it.
    #[error(transparent)]
    Container(#[from] container::ContainerError),
    /// VM isolation failed to start it.
    #[error(transparent)]
    Vm(#[from] vm::VmError),
    /// The process's end was not seen.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The process ended, but what it has written could not be read.
    #[error("cannot read what the sandbox has written: {0}")]
    Changes(String),
    /// The process ended, but what was to be done with what it has written failed.
    #[error("cannot use what the sandbox has written")]
    AtEnd(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The process ended, but something of the sandbox is left.
    #[error("the sandbox could not be removed")]
    Teardown(#[source] Lost),
}

impl RunError {
    /// Exit code for the command line: the codes of Docker.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Container(container::ContainerError::Launch(error)) => error.exit_code(),
            Self::Vm(error) => error.exit_code(),
            // What ended the sandbox also killed its process.
            Self::Monitor(_) => 137,
            _ => 125,
        }
    }
}

/// A run that came to its end.
#[derive(Debug)]
pub struct Outcome {
    /// The sandbox's id.
    pub id: String,
    /// How its process ended.
    pub exit: Exit,
    /// What the sandbox used of the host's memory at most, in bytes: the container's cgroup, or the resident set of
    /// the VMM with its guest's memory, or of the bare process.
    pub host_memory_peak_bytes: Option<u64>,
}

/// Takes what a sandbox has written, as a layer's archive ([`crate::changes`]), once its process has ended like this and
/// before anything of it is removed.
pub type AtEnd<'a> =
    dyn FnMut(&Exit, &mut (dyn Read + Send)) -> Result<(), Box<dyn std::error::Error + Send + Sync>> + 'a;

/// Runs a sandbox in the foreground: this process is its monitor, and its stdio is this process's. `warn` is told what is
/// not as the image has it.
pub fn run(
    home: &Home,
    request: &RunRequest,
    trace: &mut Trace,
    warn: &dyn Fn(&str),
) -> Result<Outcome, RunError> {
    run_to(home, request, trace, warn, None)
}

/// As [`run`], and hands what it has written to `at_end`, whatever its process's exit code.
pub fn run_to(
    home: &Home,
    request: &RunRequest,
    trace: &mut Trace,
    warn: &dyn Fn(&str),
    at_end: Option<&mut AtEnd<'_>>,
) -> Result<Outcome, RunError> {
    run_in(home, request, None, trace, warn, at_end)
}

/// As [`run_to`], on an image that need not be in the store's index; the request's is then only what it is called.
pub fn run_image_to(
    home: &Home,
    request: &RunRequest,
    image: Option<&Image>,
    trace: &mut Trace,
    at_end: Option<&mut AtEnd<'_>>,
) -> Result<Outcome, RunError> {
    run_in(home, request, image, trace, &|_| {}, at_end)
}

fn run_in(
    home: &Home,
    request: &RunRequest,
    image: Option<&Image>,
    trace: &mut Trace,
    warn: &dyn Fn(&str),
    at_end: Option<&mut AtEnd<'_>>,
) -> Result<Outcome, RunError> {
    request.validate()?;
    let users = match request.isolation {
        Isolation::Vm => None,
        _ if has_sys_admin() && is_machine_root() => None,
        Isolation::Container => Some(IdMaps::of_caller()),
        Isolation::Process => return Err(RunError::Unprivileged),
    };
    if users.is_some() && at_end.is_some() {
        return Err(RunError::Changes(
            "a plain user cannot read from outside what its container has written; use --isolation vm".into(),
        ));
    }
    let store = Store::open(home.images())?;
    // Until the layers are open, nobody may delete them.
    let hold = store.hold()?;
    let image = match image {
        Some(image) => image.clone(),
        None => store.resolve(&request.image)?,
    };
    let root = store.root_fs(&image);
    let root = root.map_err(|error| RunError::Layers(request.image.clone(), error))?;
    trace.mark(Mark::ImageReady);
    let mut sources: Vec<Source> = Source::find_all(&request.mounts, &Volumes::new(home.volumes()))?;
    if request.isolation == Isolation::Vm {
        sources.iter().try_for_each(Source::check_for_vm)?;
    }
    // Of a plain user, who could not mount the file system; held until the sandbox has ended.
    let tree = users.as_ref().map(|users| Trees::new(home.trees()).hold(&image, &root, users)).transpose()?;
    if let Some(devices) = tree.as_ref().map(|tree| tree.left_out.devices).filter(|devices| *devices > 0) {
        warn(&format!(
            "{devices} device nodes of image {} are left out: only root can make them, and a container opens none but its own",
            request.image
        ));
    }
    let signals = Signals::collect().map_err(RunError::Signals)?;
    let mut sandbox = Sandboxes::new(home.sandboxes()).create(Record {
        id: String::new(),
        name: request.name.clone(),
        image: request.image.clone(),
        image_id: image.id.to_string(),
        command: request.command.clone(),
        settings: Settings {
            entrypoint: request.entrypoint.clone(),
            command: request.command.clone(),
            env: request.env.clone(),
            workdir: request.workdir.clone(),
            user: request.user.clone(),
        },
        isolation: request.isolation,
        created: unix_time(),
        remove: request.remove,
        stop_signal: stop_signal(&image.config),
        cgroup: PathBuf::new(),
        monitor: ProcessId::own(),
        state: State::Starting,
    })?;
    let layers = vec![match &tree {
        Some(tree) => Lower { path: tree.root.clone(), devices: Vec::new() },
        None => Lower { path: root.metadata, devices: root.layers },
    }];
    let what = What { config: &image.config, layers, sources: &sources, users: users.as_ref() };
    let started = start(&mut sandbox, request, what, &signals, trace);
    drop(hold);
    if started.is_ok() {
        // It runs, so that this is no reason to end it.
        for error in sources.iter_mut().filter_map(|source| source.filled().err()) {
            warn(&format!(
                "{}; a later sandbox may take what is in the volume for a part of the image's files, and empty it: \
                 remove this file once no sandbox uses the volume",
                cloche_runtime::chain(&error)
            ));
        }
    }
    let result =
        started.and_then(|running| attend(&mut sandbox, running, users.is_none(), &signals, trace, at_end));
    let id = sandbox.record.id.clone();
    match result {
        Ok(exit) => {
            let memory = match request.isolation {
                Isolation::Container => exit.memory_peak_bytes,
                Isolation::Process | Isolation::Vm => children_peak_bytes(),
            };
            sandbox.finish(Ended {
                exit_code: exit.status.shell_code(),
                oom_killed: exit.oom_killed,
                finished: unix_time(),
                reason: exit.oom_killed.then(|| "it hit its memory limit".into()),
            })?;
            trace.mark(Mark::TeardownDone);
            Ok(Outcome { id, exit, host_memory_peak_bytes: memory })
        }
        // Its process ran: that is worth a record.
        Err(
            error
            @ (RunError::Monitor(_) | RunError::Changes(_) | RunError::AtEnd(_) | RunError::Teardown(_)),
        ) => {
            sandbox.finish(Ended {
                exit_code: error.exit_code(),
                oom_killed: false,
                finished: unix_time(),
                reason: Some(error.to_string()),
            })?;
            Err(error)
        }
        Err(error) => {
            sandbox.forget()?;
            Err(error)
        }
    }
}

fn has_sys_admin() -> bool {
    use rustix::thread::{CapabilitySet, capabilities};
    // Where they cannot be read, the start itself tells.
    capabilities(None).map_or(true, |sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// What an image's author wants to be stopped by (OCI image-spec: config.md `StopSignal`); SIGTERM if it is no signal.
fn stop_signal(config: &ImageConfiguration) -> i32 {
    let config = config.config().as_ref();
    let named = config.and_then(|config| config.stop_signal().as_deref().and_then(signals::by_name));
    named.unwrap_or(libc::SIGTERM)
}

/// What of image and host goes into a sandbox.
struct What<'a> {
    config: &'a ImageConfiguration,
    layers: Vec<Lower>,
    sources: &'a [Source],
    users: Option<&'a IdMaps>,
}

fn start(
    sandbox: &mut Owned,
    request: &RunRequest,
    What { config, layers, sources, users }: What<'_>,
    signals: &Signals,
    trace: &mut Trace,
) -> Result<Box<dyn Running>, RunError> {
    let id = sandbox.record.id.clone();
    let cgroup = sandbox.record.cgroup.clone();
    let workload = spec::workload(&id, request, config, sources, &Place { cgroup: &cgroup, users })?;
    sandbox.record.command.clone_from(&workload.args);
    trace.mark(Mark::RootfsReady);
    // The only network yet is the sandbox's own `lo`, which the runtime brings up: nothing to prepare.
    trace.mark(Mark::NetworkReady);
    Ok(match request.isolation {
        Isolation::Vm => vm::start(sandbox, &workload, layers, request, signals, trace)?,
        Isolation::Container | Isolation::Process => {
            container::start(&id, &workload, layers, request, trace)?
        }
    })
}

fn attend(
    sandbox: &mut Owned,
    mut running: Box<dyn Running>,
    keeps_changes: bool,
    signals: &Signals,
    trace: &mut Trace,
    at_end: Option<&mut AtEnd<'_>>,
) -> Result<Exit, RunError> {
    let written = running.processes().map(|processes| sandbox.set_state(State::Running(processes)));
    let attended = match written {
        Some(Err(error)) => Err(error.into()),
        _ => monitor::attend(running.as_mut(), signals, trace).map_err(RunError::from),
    };
    let used = match (&attended, at_end) {
        (Ok(exit), Some(at_end)) => use_changes(running.as_mut(), exit, at_end),
        _ => Ok(()),
    };
    // What a plain user's container has written, only its own processes can read.
    if attended.is_ok() && !sandbox.record.remove && keeps_changes {
        keep_changes(sandbox, running.as_mut());
    }
    let removed = running.teardown();
    let exit = attended?;
    used?;
    removed.map_err(RunError::Teardown)?;
    Ok(exit)
}

fn use_changes(running: &mut dyn Running, exit: &Exit, at_end: &mut AtEnd<'_>) -> Result<(), RunError> {
    let mut changes = running.changes().map_err(|lost| RunError::Changes(lost.to_string()))?;
    at_end(exit, &mut changes).map_err(RunError::AtEnd)
}

/// That they are not kept is no reason to fail: the process has done what it was for.
fn keep_changes(sandbox: &Owned, running: &mut dyn Running) {
    let kept = running.changes().map_err(|lost| std::io::Error::other(lost.to_string()));
    if let Err(error) = kept.and_then(|mut changes| changes::save(sandbox.dir(), &mut changes)) {
        let _ = writeln!(
            io::stderr(),
            "cloche: what sandbox {} has written is not kept: {error}",
            sandbox.record.id
        );
    }
}

/// Largest resident set of any child that was waited for (getrusage(2)).
fn children_peak_bytes() -> Option<u64> {
    crate::syscalls::children_max_rss_kib().map(|kib| kib * 1024)
}
