//! `cloche-container` and `cloche-vm`: this binary under other names, as an OCI runtime for engines such as podman,
//! containerd, CRI-O and Docker. The name says the isolation.

mod arguments;
mod exec;
mod log;
mod show;
mod update;

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::ExitCode,
};

use cloche_engine::OciVm;
use cloche_oci::{Creation, Error, Home, Isolation, Known, OnHost, Preserved};
use regex_lite::Regex;

use arguments::{Arguments, CgroupManager, Create, Delete, Kill, Named, Rootless, Verb};

/// The isolation by whose name this binary was called, if that is one of a runtime.
pub fn called(program: Option<&OsString>) -> Option<&'static dyn Isolation> {
    let name = program.and_then(|program| Path::new(program).file_name())?;
    let known: [&'static dyn Isolation; 2] = [&OnHost, &OciVm];
    known.into_iter().find(|isolation| name == OsStr::new(isolation.name()))
}

/// The whole command.
pub fn main(isolation: &dyn Isolation) -> ExitCode {
    let name = isolation.name();
    let arguments = Arguments::of_command_line(name);
    // Before anything is opened: see `Preserved`.
    let preserved = preserve(&arguments.verb);
    let log = match log::Log::open(name, &arguments.global) {
        Ok(log) => log,
        Err(error) => return log::Log::of(name).fail(&error, 1),
    };
    match carry_out(isolation, &arguments, &preserved, &log) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // What a process in the container would hardly say; engines tell by it that none ran.
            let code = match arguments.verb {
                Verb::Exec(_) => 255,
                _ => error.exit_code().unwrap_or(1),
            };
            log.fail(&error, code)
        }
    }
}

fn preserve(verb: &Verb) -> Preserved {
    let asked = match verb {
        Verb::Create(create) => create.preserve_fds,
        Verb::Run(run) => run.create.preserve_fds,
        // Only a first process is told of a service manager's sockets.
        Verb::Exec(exec) => return Preserved::find(exec.preserve_fds),
        _ => return Preserved::default(),
    };
    // sd_listen_fds(3): a service manager's sockets come first.
    let listening = std::env::var("LISTEN_FDS").ok().and_then(|count| count.parse().ok()).unwrap_or(0);
    Preserved::find(asked.saturating_add(listening))
}

fn carry_out(
    isolation: &dyn Isolation,
    arguments: &Arguments,
    preserved: &Preserved,
    log: &log::Log,
) -> Result<u8, Error> {
    let manager = arguments.global.cgroup_manager;
    if arguments.global.systemd_cgroup || manager != CgroupManager::Cgroupfs {
        let option = if arguments.global.systemd_cgroup {
            "--systemd-cgroup".to_owned()
        } else {
            format!("--cgroup-manager {}", format!("{manager:?}").to_lowercase())
        };
        return Err(Error::Request(format!(
            "{option} is not supported: cgroups are made directly, in the cgroup file system; configure your engine for \
             the cgroupfs driver"
        )));
    }
    let disagrees = match arguments.global.rootless {
        Rootless::Auto => None,
        Rootless::True => cloche_oci::is_machine_root().then_some(
            "--rootless true: root's containers are not started without their cgroups; leave it out",
        ),
        Rootless::False => (!cloche_oci::is_machine_root())
            .then_some("--rootless false: only root can be sure of its containers' cgroups; leave it out"),
    };
    if let Some(what) = disagrees {
        return Err(Error::Request(what.into()));
    }
    let root = root(isolation.name(), arguments.global.root.as_deref());
    let home = Home::new(&root, isolation);
    if isolation.enters_containers()
        && matches!(arguments.verb, Verb::Create(_) | Verb::Run(_) | Verb::Exec(_))
    {
        cloche_oci::protect_own_binary()?;
    }
    // After that, which may start this program once more.
    log.debug(|| format!("{} {:?}", isolation.name(), arguments.verb));
    let warn = |message: &str| log.warn(message);
    let debug = |message: &str| log.debug(|| message.to_owned());
    match &arguments.verb {
        Verb::Create(create) => cloche_oci::create(&home, &creation(create, preserved, &warn, &debug)).map(|()| 0),
        Verb::Run(run) => {
            cloche_oci::run(&home, &creation(&run.create, preserved, &warn, &debug), run.detach, run.keep)
        }
        Verb::Start(Named { id }) => cloche_oci::start(&home, id).map(|()| 0),
        Verb::State(Named { id }) => cloche_oci::state(&home, id).map(|state| show::line(&state)),
        Verb::Kill(Kill { all, regex: true, id, signal }) => {
            each(&home, id, |id| cloche_oci::kill(&home, id, *signal, *all))
        }
        Verb::Kill(Kill { all, id, signal, .. }) => cloche_oci::kill(&home, id, *signal, *all).map(|()| 0),
        Verb::Delete(Delete { force, regex: true, id }) => {
            each(&home, id, |id| cloche_oci::delete(&home, id, *force, &warn))
        }
        Verb::Delete(Delete { force, id, .. }) => cloche_oci::delete(&home, id, *force, &warn).map(|()| 0),
        Verb::Exec(exec) => exec::exec(&home, exec, preserved, &warn, &debug),
        Verb::List { format, quiet } => show::list(&home, *format, *quiet),
        Verb::Ps { format, id, options } => show::processes(&home, id, *format, options),
        Verb::Pause(Named { id }) => cloche_oci::pause(&home, id).map(|()| 0),
        Verb::Resume(Named { id }) => cloche_oci::resume(&home, id).map(|()| 0),
        Verb::Update(update) => update::update(&home, update),
        Verb::Events { stats: true, id, .. } => {
            cloche_oci::events::statistics(&home, id).and_then(|report| Ok(show::line(&show::json(&report)?)))
        }
        Verb::Events { interval, id, .. } => cloche_oci::events::watch(&home, id, *interval, &mut |event| {
            let is_printable = show::json(event).map(|line| show::line(&line)).is_ok();
            is_printable && crate::output::has_reader()
        })
        .map(|()| 0),
        Verb::Spec { bundle, rootless } => cloche_oci::template::write(bundle, *rootless).map(|()| 0),
        Verb::Checkpoint(_) | Verb::Restore(_) => Err(Error::Request(
            "the processes of a container cannot be saved and restored by this runtime; a file system can, by commit or \
             export of your engine"
                .into(),
        )),
        Verb::Features => Ok(show::line(&format!("{:#}", cloche_oci::features()))),
    }
}

/// Does something to all containers whose ids a regular expression matches.
fn each(home: &Home<'_>, pattern: &str, act: impl Fn(&str) -> Result<(), Error>) -> Result<u8, Error> {
    let matcher =
        Regex::new(pattern).map_err(|error| Error::Request(format!("--regex {pattern}: {error}")))?;
    let all = cloche_oci::list(home)?;
    all.iter().map(Known::id).filter(|id| matcher.is_match(id)).try_for_each(act).map(|()| 0)
}

fn creation<'a>(
    create: &'a Create,
    preserved: &'a Preserved,
    warn: &'a dyn Fn(&str),
    debug: &'a dyn Fn(&str),
) -> Creation<'a> {
    Creation {
        id: &create.id,
        bundle: &create.bundle,
        config: &create.config,
        pid_file: create.pid_file.as_deref(),
        console_socket: create.console_socket.as_deref(),
        preserved,
        keep_keyring: create.no_new_keyring,
        warn,
        debug,
    }
}

/// Where state is kept: as asked for, else one directory of the machine, or of the user who is not root; nor is root of a
/// user namespace, as rootless engines make themselves.
fn root(name: &str, asked: Option<&Path>) -> PathBuf {
    let of_user = std::env::var_os("XDG_RUNTIME_DIR").filter(|_| !cloche_oci::is_machine_root());
    match (asked, of_user) {
        (Some(root), _) => root.to_owned(),
        (None, Some(directory)) => Path::new(&directory).join(name),
        (None, None) => Path::new("/run").join(name),
    }
}
