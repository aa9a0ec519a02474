//! `create` and `run`.

use std::{
    cell::RefCell,
    fs,
    io::Write,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use cloche_runtime::{ExitStatus, cgroup::Cgroup, cgroup_path, chain, hooks};
use oci_spec::runtime::{Hook, Spec};
use rustix::process::{Signal, pidfd_send_signal};

use crate::{
    bundle::Bundle,
    console::{Console, own_stdio},
    error::{Error, of_file, system},
    foreground::{self, Signals},
    gate,
    isolation::{Child, First, Isolation},
    listener,
    process::ProcessId,
    state::{Home, Known, Record, Status},
    time,
};

/// What to create.
pub struct Creation<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The bundle's directory.
    pub bundle: &'a Path,
    /// Name of the configuration in it.
    pub config: &'a Path,
    /// File to write the first process's id to.
    pub pid_file: Option<&'a Path>,
    /// Socket that takes the terminal.
    pub console_socket: Option<&'a Path>,
    /// Descriptors that the process keeps.
    pub preserved: &'a Preserved,
    /// Whether the process keeps the caller's session keyring.
    pub keep_keyring: bool,
    /// Called with warnings.
    pub warn: &'a dyn Fn(&str),
    /// Called with what is done, step by step.
    pub debug: &'a dyn Fn(&str),
}

/// Descriptors from 3 up that were open when this process started.
#[derive(Debug, Clone, Default)]
pub struct Preserved(Vec<i32>);

impl Preserved {
    /// Looks at `count` descriptors from 3 on. To be called before this process opens anything, which could take the
    /// place of one that is missing, and be handed to the container.
    pub fn find(count: u32) -> Self {
        let is_open = |fd: &i32| fs::read_link(format!("/proc/self/fd/{fd}")).is_ok();
        // Nobody has more open than that.
        let count = i32::try_from(count).unwrap_or(i32::MAX).min(1 << 20);
        Self((3..count.saturating_add(3)).filter(is_open).collect())
    }

    pub(crate) fn fds(&self) -> &[i32] {
        &self.0
    }
}

/// Creates a container, which then waits to be started.
pub fn create(home: &Home<'_>, creation: &Creation<'_>) -> Result<(), Error> {
    make(home, creation, Style::Created).map(drop)
}

/// Creates and starts a container. In the foreground, waits for its end and removes it unless `keep`; returns the exit
/// code of its process, 0 in the background.
pub fn run(home: &Home<'_>, creation: &Creation<'_>, detach: bool, keep: bool) -> Result<u8, Error> {
    let warn = creation.warn;
    // Nobody is told of a container whose `run` fails, so that nobody would delete it.
    let remove = |known: &Known, spec: &Spec| {
        if let Err(error) = crate::verbs::remove(home.isolation, known, spec, warn) {
            warn(&chain(&error));
        }
    };
    if detach {
        let (known, spec, _) = make(home, creation, Style::Detached)?;
        return run_poststart(&known, &spec).map(|()| 0).inspect_err(|_| remove(&known, &spec));
    }
    let signals = Signals::collect().map_err(system("collect signals"))?;
    let (known, spec, Made { mut container, console }) = make(home, creation, Style::Foreground)?;
    let attend = || {
        run_poststart(&known, &spec)?;
        foreground::attend(container.pidfd(), &signals, console.terminal()?)?;
        container.wait()
    };
    let status = attend().inspect_err(|_| remove(&known, &spec))?;
    if !keep {
        // How the process ended is not changed by what comes after it.
        remove(&known, &spec);
    }
    Ok(exit_code(status))
}

/// As a shell has it.
pub(crate) fn exit_code(status: ExitStatus) -> u8 {
    match status {
        ExitStatus::Code(code) => code,
        ExitStatus::Signal(signo) => u8::try_from(128 + signo).unwrap_or(u8::MAX),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Created,
    Detached,
    Foreground,
}

struct Made {
    container: Box<dyn Child>,
    console: Console,
}

fn make(home: &Home<'_>, creation: &Creation<'_>, style: Style) -> Result<(Known, Spec, Made), Error> {
    let Bundle { path, text, mut spec, rootfs } =
        Bundle::read(creation.bundle, creation.config, creation.warn)?;
    let terminal = spec.process().as_ref().is_some_and(|process| process.terminal() == Some(true));
    let console = Console::new(terminal, creation.console_socket, style != Style::Foreground)?;
    pass_listen_fds(&mut spec);
    // Whether id and paths can be used at all; nothing is made yet.
    home.directory(creation.id)?;
    if let Some(path) = [&path, &rootfs].into_iter().find(|path| path.to_str().is_none()) {
        return Err(Error::Request(format!(
            "the path {path:?} is not UTF-8, which a container's state has to be"
        )));
    }
    let (cgroup, is_tenant) = place(&mut spec, creation)?;
    let record = Record {
        id: creation.id.to_owned(),
        oci_version: spec.version().clone(),
        bundle: path,
        rootfs,
        created: time::now(),
        owner: owner(),
        annotations: spec.annotations().clone().unwrap_or_default(),
        cgroup,
        cgroup_identity: Vec::new(),
        is_tenant,
        process: None,
    };
    let (known, lock) = home.claim(creation.id)?.begin(record, &text)?;
    let known = RefCell::new(known);
    let result = start(home.isolation, &known, creation, &spec, &console, style);
    let known = known.into_inner();
    drop(lock);
    match result {
        Ok(container) => Ok((known, spec, Made { container, console })),
        Err(error) => {
            // Processes and cgroup are gone already, as far as they were this container's. The first failure is what the
            // caller has to know.
            known.leave_shared_cgroup();
            let _ = crate::verbs::forget(home.isolation, &known, &spec, creation.warn);
            Err(error)
        }
    }
}

/// The path of the container's cgroup, and whether that is in one of somebody else: what the configuration asks for has
/// processes or cgroups in it then. Limits of that one hold for this container, too; but what is done to one container is
/// not done to the other's processes.
fn place(spec: &mut Spec, creation: &Creation<'_>) -> Result<(PathBuf, bool), Error> {
    let asked = cgroup_path(spec, creation.id);
    let present = Cgroup::open(&asked)?;
    // A plain user cannot mark its own.
    let Some(used) = present.in_use().filter(|_| crate::is_machine_root()) else { return Ok((asked, false)) };
    let name = format!("cloche-{}", creation.id);
    (creation.warn)(&format!(
        "the container's cgroup is not empty: {} has processes or cgroups of somebody else; this container gets one in it, \
         {name}",
        used.display()
    ));
    let own = asked.join(name);
    if let Some(linux) = spec.linux_mut() {
        linux.set_cgroups_path(Some(own.clone()));
    }
    Ok((own, true))
}

fn start(
    isolation: &dyn Isolation,
    known: &RefCell<Known>,
    creation: &Creation<'_>,
    spec: &Spec,
    console: &Console,
    style: Style,
) -> Result<Box<dyn Child>, Error> {
    let directory = known.borrow().directory.clone();
    let gate = match style {
        Style::Created => {
            Some(gate::make(&directory).map_err(of_file("make the start socket in", &directory))?)
        }
        Style::Detached | Style::Foreground => None,
    };
    let record = known.borrow().record.clone();
    (creation.debug)(&format!(
        "container setup: the bundle {}, in the cgroup {}",
        record.bundle.display(),
        record.cgroup.display()
    ));
    let created = |pid, cgroup: &Cgroup| {
        (creation.debug)(&format!("child process in init(): {pid}, which has its namespaces"));
        let mut known = known.borrow_mut();
        known.record.process = ProcessId::of(pid);
        if known.record.is_tenant {
            cgroup.mark_as_tenant().map_err(|error| chain(&error))?;
        }
        known.record.cgroup_identity = cgroup.identity();
        known.save().and_then(|()| run_runtime_hooks(spec, &known.record, pid)).map_err(|error| chain(&error))
    };
    let hook_state = |pid, status: &str| record.state_json(pid, status);
    let listener = |pid, listener| {
        listener::send(&record, listener::policy(spec), (pid, Status::Creating), pid, listener)
    };
    let container = isolation.launch(First {
        id: creation.id,
        spec,
        rootfs: &record.rootfs,
        directory: &directory,
        gate: gate.as_ref().map(AsFd::as_fd),
        stdio: own_stdio()?,
        console_socket: console.socket(),
        preserved_fds: creation.preserved.fds(),
        keep_keyring: creation.keep_keyring,
        keep_groups: record.annotations.get("run.oci.keep_original_groups").is_some_and(|keep| keep == "1"),
        created: &created,
        hook_state: &hook_state,
        listener: &listener,
        warn: creation.warn,
    })?;
    let next = if gate.is_some() { "waits to be started" } else { "has become the program" };
    (creation.debug)(&format!("init: closing the pipe to signal completion: {} {next}", container.pid()));
    if let Some(path) = creation.pid_file
        && let Err(error) = write_pid_file(path, container.pid())
    {
        container.discard();
        return Err(error);
    }
    Ok(container)
}

/// Writes a process's id so that a reader sees all of it or nothing.
pub(crate) fn write_pid_file(path: &Path, pid: i32) -> Result<(), Error> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Others may be able to write to the directory: what is there already is not written to, whatever it is.
    let new = path.with_file_name(format!(".{name}.{}.new", std::process::id()));
    let mut file = fs::File::create_new(&new).map_err(of_file("make", &new))?;
    let written = file.write_all(pid.to_string().as_bytes()).map_err(of_file("write", &new));
    written.and_then(|()| fs::rename(&new, path).map_err(of_file("write", path))).inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

/// Hooks that run on the caller's side once the namespaces exist.
fn run_runtime_hooks(spec: &Spec, record: &Record, pid: i32) -> Result<(), Error> {
    let Some(listed) = spec.hooks() else { return Ok(()) };
    let state = record.state_json(pid, "creating");
    #[allow(deprecated)]
    run_hooks("prestart", listed.prestart(), &state)?;
    run_hooks("createRuntime", listed.create_runtime(), &state)
}

pub(crate) fn run_poststart(known: &Known, spec: &Spec) -> Result<(), Error> {
    let (Some(listed), Some(process)) = (spec.hooks(), known.record.process) else { return Ok(()) };
    let state = known.record.state_json(process.pid, "running");
    run_hooks("poststart", listed.poststart(), &state).inspect_err(|_| {
        if let Ok(Some(pidfd)) = process.open() {
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
        let _ = known.cgroup().and_then(|cgroup| Ok(cgroup.kill_all()?));
    })
}

/// Runs a list of hooks on the caller's side.
pub(crate) fn run_hooks(kind: &'static str, listed: &Option<Vec<Hook>>, state: &str) -> Result<(), Error> {
    Ok(hooks::run(kind, listed.as_deref().unwrap_or_default(), state, &|| Ok(()))?)
}

/// Sockets that a service manager passed come through (sd_listen_fds(3)).
fn pass_listen_fds(spec: &mut Spec) {
    let Ok(count) = std::env::var("LISTEN_FDS") else { return };
    if let Some(process) = spec.process_mut() {
        let mut env = process.env().clone().unwrap_or_default();
        env.extend([format!("LISTEN_FDS={count}"), "LISTEN_PID=1".to_owned()]);
        process.set_env(Some(env));
    }
}

/// The name of this user, or its number.
fn owner() -> String {
    let uid = rustix::process::getuid().as_raw().to_string();
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    });
    name.unwrap_or(uid)
}
