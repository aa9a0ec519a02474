//! A further process in a container that runs: it joins the namespaces and the cgroup of the container's first process,
//! and goes the same last steps as that did.
//!
//! The container is hostile by now. Nothing of it is looked up by path before this process is confined to its root;
//! its first process is known by a pidfd; and this process cannot be looked into until it is the container's.

use std::{
    cell::{Cell, RefCell},
    convert::Infallible,
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Component, Path},
    time::Duration,
};

use oci_spec::runtime::{LinuxPersonality, LinuxSeccomp, Process};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    pipe::{PipeFlags, pipe_with},
    thread::{CpuSet, LinkNameSpaceType, move_into_link_name_space, sched_getaffinity, sched_setaffinity},
};

use crate::{
    cgroup::{Cgroup, Entrances},
    console,
    container::{ExitStatus, WaitError, wait_for},
    entry::{Entry, step},
    init::InitError,
    launch::{LaunchError, Listener, Stdio, clone_by_go_between, granted, process_failed},
    namespaces::{KINDS, identity},
    process::{
        program::{self, OwnProgram},
        rlimits,
        scheduling::{self, Affinity},
    },
    seccomp::Filter,
    spec_check::{self, Means, SpecError},
    syscalls::{self, Cloned},
    user_namespace,
    verdict::{self, Reporter},
};

/// What to run in which container.
pub struct Join<'a> {
    /// The container's id.
    pub id: &'a str,
    /// Process id of the container's first process.
    pub pid: i32,
    /// Its pidfd.
    pub pidfd: BorrowedFd<'a>,
    /// What to run.
    pub process: &'a Process,
    /// The container's seccomp policy.
    pub seccomp: Option<&'a LinuxSeccomp>,
    /// As [`crate::Launch::filter`].
    pub filter: Option<&'a Filter>,
    /// The container's execution domain.
    pub personality: Option<&'a LinuxPersonality>,
    /// The cgroup to run in: the container's, or one below it.
    pub cgroup: &'a Cgroup,
    /// What becomes the process's file descriptors 0, 1 and 2.
    pub stdio: Stdio,
    /// A connected Unix socket that gets the terminal, if `process.terminal`.
    pub console_socket: Option<BorrowedFd<'a>>,
    /// Descriptors of the caller's, from 3 up, that the process keeps.
    pub preserved_fds: &'a [i32],
    /// Whether the process keeps the caller's session keyring.
    pub keep_keyring: bool,
    /// As [`crate::Oci::listener`].
    pub listener: Option<Listener<'a>>,
    /// As [`crate::Oci::warn`].
    pub warn: Option<&'a dyn Fn(&str)>,
    /// As [`crate::Oci::patience`].
    pub patience: Option<Duration>,
}

/// A process that has joined a container. Dropping it leaves the process running.
#[derive(Debug)]
pub struct Joined {
    pid: i32,
    pidfd: OwnedFd,
}

impl Joined {
    /// Process id in the caller's PID namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Readable (`POLLIN`) once the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Waits until the process has ended, and reaps it.
    pub fn wait(&self) -> Result<ExitStatus, WaitError> {
        wait_for(self.pidfd.as_fd(), self.pid)
    }
}

const NEW_MOUNTS: u64 = 0x0002_0000;
const NEW_USER: u64 = 0x1000_0000;
const NEW_PID: u64 = 0x2000_0000;

/// Those of `pid`'s namespaces that this process is not in. `pidfd` is that process's.
fn foreign_namespaces(pid: i32, pidfd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut foreign = 0;
    for (name, kind) in KINDS {
        match identity(Path::new(&format!("/proc/{pid}/ns/{name}"))) {
            // A kernel without this kind.
            Err(error) if error.kind() == io::ErrorKind::NotFound && name == "time" => {}
            theirs => {
                if theirs? != identity(Path::new(&format!("/proc/self/ns/{name}")))? {
                    foreign |= kind;
                }
            }
        }
    }
    // The number may have gone to another process, one of the host's. Whose descriptor still takes a signal is not reaped,
    // so that number was its own until now.
    syscalls::pidfd_send_signal(pidfd, 0)?;
    // And what joins nothing would run on the host: no container shares its mounts (`spec_check`).
    if foreign & NEW_MOUNTS == 0 {
        return Err(io::Error::other("it has no mount namespace of its own"));
    }
    Ok(foreign)
}

/// Runs a process in a container and returns once its `execve` has succeeded. The same holds for the caller as for
/// [`crate::launch`].
pub fn join(join: Join<'_>) -> Result<Joined, LaunchError> {
    let process = join.process;
    let means =
        Means { terminal: join.console_socket.is_some(), hooks: false, listener: join.listener.is_some() };
    spec_check::check_process(process, join.seccomp, means)?;
    let strings = |what, strings: &Option<Vec<String>>| {
        program::c_strings(strings.iter().flatten()).ok_or(LaunchError::NulByte(what))
    };
    let (args, env) = (strings("process.args", process.args())?, strings("process.env", process.env())?);
    let keyring = CString::new(format!("cloche.{}", join.id)).map_err(|_| LaunchError::NulByte("the id"))?;
    let own_program = OwnProgram::identify().map_err(process_failed("identify this program"))?;
    let foreign = foreign_namespaces(join.pid, join.pidfd)
        .map_err(process_failed("read the container's namespaces"))?;
    let entrances = join.cgroup.entrances()?;
    // In a user namespace the process has all there are.
    let capabilities = granted(process, join.warn.filter(|_| foreign & NEW_USER == 0))?;
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(process_failed("make a pipe"));
    let (verdict, verdict_writer) = pipe()?;
    let (released, released_writer) = pipe()?;
    let filter = Filter::of(join.filter, join.seccomp)?;
    let affinity = process.exec_cpu_affinity().as_ref().map(Affinity::from_spec).transpose();
    let affinity = affinity.map_err(|error| SpecError::Invalid(error.to_string()))?;
    match clone_on(affinity.as_ref().and_then(Affinity::initial), &join, foreign)? {
        Cloned::Parent { pid, pidfd } => {
            drop((verdict_writer, released));
            let joined = Joined { pid, pidfd };
            let reporter = Reporter {
                pid,
                pidfd: joined.pidfd(),
                verdict: verdict.as_fd(),
                released: Some(released_writer.as_fd()),
                patience: join.patience,
            };
            if let Err(error) = verdict::read(&reporter, join.cgroup, false, join.listener) {
                let _ = syscalls::pidfd_send_signal(joined.pidfd(), libc::SIGKILL);
                let _ = joined.wait();
                return Err(error);
            }
            Ok(joined)
        }
        Cloned::Child => {
            drop((verdict, released_writer));
            let child = Child {
                entry: Entry {
                    process,
                    user: None,
                    stdio: &join.stdio,
                    capabilities: &capabilities,
                    filter: filter.as_deref(),
                    args: &args,
                    env: &env,
                    keyring: (!join.keep_keyring).then_some(&keyring),
                    own_program,
                    kill_on_parent_death: false,
                    preserved_fds: join.preserved_fds,
                    keep_groups: false,
                    verdict: verdict_writer.as_fd(),
                    released: Some(released.as_fd()),
                    gate: None,
                    starter: RefCell::new(None),
                    label: RefCell::new(None),
                    is_filtered: Cell::new(false),
                },
                join: &join,
                kinds: foreign & !(NEW_PID | if needs_go_between(foreign) { NEW_USER } else { 0 }),
                entrances: &entrances,
                affinity: affinity.as_ref(),
            };
            verdict::run_to_program(&child.entry, || child.run())
        }
    }
}

/// A plain user has rights over its container's namespaces in the container's user namespace only; and who is root of a
/// user namespace, as rootless engines are, could not return to its own PID namespace.
fn needs_go_between(foreign: u64) -> bool {
    foreign & (NEW_USER | NEW_PID) != 0 && !user_namespace::is_machine_root()
}

/// Clones it on the CPUs where it is to begin, and where this process is for that moment.
fn clone_on(initial: Option<&CpuSet>, join: &Join<'_>, foreign: u64) -> Result<Cloned, LaunchError> {
    let Some(initial) = initial else { return clone_into(join, foreign) };
    let failed = || process_failed("run on the CPUs of process.execCPUAffinity.initial");
    let own = sched_getaffinity(None).map_err(failed())?;
    sched_setaffinity(None, initial).map_err(failed())?;
    let cloned = clone_into(join, foreign);
    if !matches!(cloned, Ok(Cloned::Child)) {
        sched_setaffinity(None, &own).map_err(failed())?;
    }
    cloned
}

fn clone_into(join: &Join<'_>, foreign: u64) -> Result<Cloned, LaunchError> {
    let directory = join.cgroup.clone_target()?;
    let clone = || {
        let cloned = syscalls::clone3(0, directory.as_ref().map(AsFd::as_fd));
        match (cloned, &directory) {
            // Once the container has handed controllers down, only the cgroups below its own take processes (kernel:
            // cgroup-v2.rst, "No Internal Process Constraint").
            (Err(error), Some(_)) if error.raw_os_error() == Some(libc::EBUSY) => {
                let own = open_cgroup_of_first(join.pid, join.cgroup)?;
                syscalls::clone3(0, Some(own.as_fd()))
            }
            (cloned, _) => cloned,
        }
        .map_err(process_failed("clone this process"))
    };
    if needs_go_between(foreign) {
        let directory = directory.as_ref().map(AsFd::as_fd);
        let first = foreign & (NEW_USER | NEW_PID);
        let join = || {
            let joined = syscalls::join_namespaces(join.pidfd, first);
            joined.map_err(|error| format!("cannot join the container's user or PID namespace: {error}"))
        };
        return clone_by_go_between(true, 0, directory, &join);
    }
    if foreign & NEW_PID == 0 {
        return clone();
    }
    // Only later children are affected by this, and then none any more.
    let own = File::open("/proc/self/ns/pid").map_err(process_failed("open the own PID namespace"))?;
    syscalls::join_namespaces(join.pidfd, NEW_PID).map_err(process_failed("join the PID namespace"))?;
    let cloned = clone();
    if !matches!(cloned, Ok(Cloned::Child)) {
        move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID))
            .map_err(process_failed("return to the own PID namespace"))?;
    }
    cloned
}

/// The v2 cgroup that the container's first process has moved itself to, below this one.
fn open_cgroup_of_first(pid: i32, cgroup: &Cgroup) -> Result<OwnedFd, LaunchError> {
    let failed = process_failed("find the cgroup of the container's first process");
    let find = || -> io::Result<OwnedFd> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        // The kernel's path is as this process sees the hierarchy; the names in it are the container's.
        let own = cgroup.unified_root().join(path);
        if !cgroup.unified_directory().is_some_and(|directory| own.starts_with(directory))
            || own.components().any(|part| part == Component::ParentDir)
        {
            return Err(io::Error::other(format!("/{path} is not below the container's cgroup")));
        }
        Ok(openat(CWD, own, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
    };
    find().map_err(failed)
}

struct Child<'a> {
    entry: Entry<'a>,
    join: &'a Join<'a>,
    kinds: u64,
    entrances: &'a Entrances,
    affinity: Option<&'a Affinity>,
}

impl Child<'_> {
    fn run(&self) -> Result<Infallible, InitError> {
        self.entry.become_undumpable()?;
        self.entry.detach_from_parent()?;
        self.entrances.enter().map_err(step("enter the container's cgroup"))?;
        self.affinity.map_or(Ok(()), Affinity::apply)?;
        self.entry.use_own_proc()?;
        for rlimit in self.entry.process.rlimits().iter().flatten() {
            // In a user namespace only root of the machine can.
            rlimits::raise(0, rlimit)?;
        }
        if self.kinds != 0 {
            syscalls::join_namespaces(self.join.pidfd, self.kinds)
                .map_err(step("join the container's namespaces"))?;
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, "/", flags, Mode::empty()).map_err(step("open the container's root"))?;
        if let Some(socket) = self.join.console_socket {
            console::set_up(root.as_fd(), self.entry.process, false, socket)?;
        }
        if let Some(personality) = self.join.personality {
            scheduling::set_personality(personality)?;
        }
        let account = self.entry.account(root.as_fd())?;
        let env = self.entry.environment(root.as_fd(), &account);
        let program = self.entry.take_on_identity(&account)?;
        self.entry.execute(&program, &env, &|| Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;

    #[test]
    fn number_of_a_process_that_is_gone_is_not_anothers_to_answer_for() {
        let mut gone = Command::new("true").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&gone), PidfdFlags::empty()).unwrap();
        gone.wait().unwrap();
        let own = std::process::id() as i32;
        let error = foreign_namespaces(own, pidfd.as_fd()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn process_without_mounts_of_its_own_is_not_joined() {
        let own = std::process::id() as i32;
        let pidfd = pidfd_open(Pid::from_raw(own).unwrap(), PidfdFlags::empty()).unwrap();
        let error = foreign_namespaces(own, pidfd.as_fd()).unwrap_err().to_string();
        assert!(error.contains("no mount namespace of its own"), "{error}");
    }
}
