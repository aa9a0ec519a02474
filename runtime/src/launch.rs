//! The parent's half of a start: everything up to `clone3`, and the wait for the child's verdict.

use std::{
    error::Error,
    ffi::CString,
    fmt::Write as _,
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Linux, Process, Spec};
use rustix::{
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::{
    cgroup::{Cgroup, CgroupError, DeviceGuard},
    container::Container,
    init::{Init, READY},
    mounts::{Mount, MountError},
    namespaces::{NamespaceError, Namespaces},
    process::{
        capabilities,
        program::{self, OwnProgram},
    },
    seccomp::{Filter, SeccompError},
    spec_check::{self, SpecError},
    syscalls::{self, Cloned},
    sysctls::{SysctlError, Sysctls},
};

/// What to start.
pub struct Launch<'a> {
    /// Sandbox id; names the cgroup, `/cloche/ID`, when the spec does not.
    pub id: &'a str,
    /// The OCI runtime spec. `root.path` is not read: [`Launch::rootfs`] takes its place.
    pub spec: &'a Spec,
    /// Docker's `user[:group]`, in place of the spec's numbers: names and numbers are looked up in the container's own
    /// `/etc/passwd` and `/etc/group`.
    pub user: Option<&'a str>,
    /// The root file system.
    pub rootfs: Rootfs,
    /// What becomes the process's file descriptors 0, 1 and 2.
    pub stdio: Stdio,
    /// Whether the kernel kills the process when the caller's process dies.
    pub kill_on_parent_death: bool,
    /// Called with the process's id once it is in its namespaces and before anything of the container runs. If it
    /// says no, the process is killed and the start fails with [`LaunchError::Rejected`].
    pub approve: Option<&'a dyn Fn(i32) -> bool>,
}

/// Where the container's root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rootfs {
    /// A directory, used as it is: what the container writes stays there.
    Directory(PathBuf),
    /// EROFS layers under a writable overlay that vanishes with the container's mount namespace.
    Layers {
        /// Block devices or EROFS image files, bottom layer first.
        lowers: Vec<PathBuf>,
        /// Size limit of the writable layer in bytes; `None` leaves tmpfs's default, half of the memory.
        upper_bytes: Option<u64>,
    },
}

/// File descriptors of the container's process.
#[derive(Debug)]
pub struct Stdio {
    /// Becomes file descriptor 0.
    pub stdin: OwnedFd,
    /// Becomes file descriptor 1.
    pub stdout: OwnedFd,
    /// Becomes file descriptor 2.
    pub stderr: OwnedFd,
}

/// Why a container could not be started. Nothing of it is left when this is returned.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The spec asks for what this runtime does not do, or contradicts itself.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A string for the kernel contains a NUL byte.
    #[error("{0} contains a NUL byte")]
    NulByte(&'static str),
    /// A mount of the spec is not usable.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A kernel parameter is not the container's.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// The seccomp policy is not usable.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The cgroup could not be made or limited.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The PID namespace could not be joined.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The process could not be made.
    #[error("cannot {action} to start the container's process")]
    Process {
        /// What was attempted.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The process failed between `clone3` and `execve`.
    #[error("{message}")]
    Init {
        /// 127 not found, 126 not executable, 125 anything else.
        exit_code: u8,
        /// What failed, with the whole chain of causes.
        message: String,
    },
    /// [`Launch::approve`] said no.
    #[error("the container's process is not isolated as required")]
    Rejected,
    /// The process was killed between `clone3` and `execve`.
    #[error("the container's process was killed by signal {signo} before it could start{hint}")]
    Killed {
        /// The signal.
        signo: i32,
        /// What is known about why, starting with `: `, or nothing.
        hint: &'static str,
    },
}

impl LaunchError {
    /// Exit code for a command line: 127 command not found, 126 found but not executable, 125 anything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Init { exit_code, .. } => *exit_code,
            _ => 125,
        }
    }
}

/// Starts the container and returns once its `execve` has succeeded.
///
/// The caller must be single-threaded. It must not have SIGCHLD ignored, and must not reap children that it does not
/// know: the container's process is its child.
pub fn launch(launch: Launch<'_>) -> Result<Container, LaunchError> {
    let plan = Plan::new(&launch)?;
    let path = match plan.linux.cgroups_path() {
        Some(path) => path.clone(),
        None => Path::new("/cloche").join(launch.id),
    };
    let cgroup = Cgroup::create(&path, plan.linux.resources().as_ref())?;
    match start(&launch, &plan, &cgroup) {
        Ok((child, oom_event)) => Ok(Container::new(child.pid, child.pidfd, oom_event, cgroup)),
        Err(error) => {
            // The first failure is what the caller has to know.
            let _ = cgroup.kill_all();
            let _ = cgroup.delete();
            Err(error)
        }
    }
}

/// The spec, read as far as that is possible before anything is made.
struct Plan<'a> {
    linux: &'a Linux,
    process: &'a Process,
    namespaces: Namespaces,
    sysctls: Sysctls,
    mounts: Vec<Mount>,
    capabilities: capabilities::Sets,
    filter: Option<Filter>,
    args: Vec<CString>,
    env: Vec<CString>,
    keyring: CString,
    own_program: OwnProgram,
}

impl<'a> Plan<'a> {
    fn new(launch: &Launch<'a>) -> Result<Self, LaunchError> {
        let spec = launch.spec;
        spec_check::check(spec)?;
        let missing = |what: &str| SpecError::Invalid(format!("{what} is missing"));
        let linux = spec.linux().as_ref().ok_or_else(|| missing("linux"))?;
        let process = spec.process().as_ref().ok_or_else(|| missing("process"))?;
        let namespaces = linux.namespaces().as_deref().unwrap_or_default();
        let strings = |what, strings: &Option<Vec<String>>| {
            program::c_strings(strings.iter().flatten()).ok_or(LaunchError::NulByte(what))
        };
        Ok(Self {
            linux,
            process,
            namespaces: Namespaces::from_spec(namespaces),
            sysctls: Sysctls::from_spec(linux.sysctl().as_ref(), namespaces)?,
            mounts: spec.mounts().iter().flatten().map(Mount::from_spec).collect::<Result<_, _>>()?,
            capabilities: capabilities::Sets::from_spec(process.capabilities().as_ref()),
            filter: linux.seccomp().as_ref().map(Filter::compile).transpose()?,
            args: strings("process.args", process.args())?,
            env: strings("process.env", process.env())?,
            keyring: CString::new(format!("cloche.{}", launch.id))
                .map_err(|_| LaunchError::NulByte("the id"))?,
            own_program: OwnProgram::identify().map_err(process_failed("identify this program"))?,
        })
    }
}

fn process_failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> LaunchError {
    move |source| LaunchError::Process { action, source: source.into() }
}

/// Makes the process and waits until it runs the container's program.
fn start(
    launch: &Launch<'_>,
    plan: &Plan<'_>,
    cgroup: &Cgroup,
) -> Result<(Child, Option<OwnedFd>), LaunchError> {
    let limited = plan.linux.resources().as_ref().is_some_and(|resources| resources.memory().is_some());
    let oom_event = if limited { cgroup.oom_event()? } else { None };
    let device_guard = cgroup.device_guard(plan.linux.resources().as_ref())?;
    let mut child = spawn(launch, plan, cgroup, device_guard.as_ref())?;
    match child.release(launch.approve, cgroup).and_then(|()| child.read_verdict(cgroup)) {
        Ok(()) => Ok((child, oom_event)),
        Err(error) => {
            child.kill();
            Err(error)
        }
    }
}

/// The process on its way to `execve`.
struct Child {
    pid: i32,
    pidfd: OwnedFd,
    /// Where it says how it fares.
    verdict: File,
    /// Where it is told to go on: it is approved, and in its v1 cgroups.
    attached: Option<OwnedFd>,
}

fn spawn(
    launch: &Launch<'_>,
    plan: &Plan<'_>,
    cgroup: &Cgroup,
    device_guard: Option<&DeviceGuard>,
) -> Result<Child, LaunchError> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(process_failed("make a pipe"));
    let (verdict, verdict_writer) = pipe()?;
    let (attached, attached_writer) =
        if cgroup.needs_attach() || launch.approve.is_some() { Some(pipe()?) } else { None }.unzip();
    match clone(&plan.namespaces, cgroup)? {
        Cloned::Parent { pid, pidfd } => {
            Ok(Child { pid, pidfd, verdict: verdict.into(), attached: attached_writer })
        }
        Cloned::Child => {
            // The death of either side must be seen by the other.
            drop((verdict, attached_writer));
            run_init(&Init {
                spec: launch.spec,
                linux: plan.linux,
                process: plan.process,
                user: launch.user,
                rootfs: &launch.rootfs,
                stdio: &launch.stdio,
                namespaces: &plan.namespaces,
                sysctls: &plan.sysctls,
                mounts: &plan.mounts,
                capabilities: &plan.capabilities,
                filter: plan.filter.as_ref(),
                args: &plan.args,
                env: &plan.env,
                keyring: &plan.keyring,
                own_program: plan.own_program,
                cgroup,
                device_guard,
                kill_on_parent_death: launch.kill_on_parent_death,
                verdict: verdict_writer.as_fd(),
                attached: attached.as_ref().map(AsFd::as_fd),
            })
        }
    }
}

fn clone(namespaces: &Namespaces, cgroup: &Cgroup) -> Result<Cloned, LaunchError> {
    let directory = cgroup.clone_target()?;
    let directory = directory.as_ref().map(AsFd::as_fd);
    let clone =
        || syscalls::clone3(namespaces.clone_flags, directory).map_err(process_failed("clone this process"));
    let Some(joined) = namespaces.joined_pid() else { return clone() };
    // Only the next child is affected, and then none any more.
    let own = File::open("/proc/self/ns/pid").map_err(process_failed("open the own PID namespace"))?;
    joined.join()?;
    let cloned = clone();
    if !matches!(cloned, Ok(Cloned::Child)) {
        move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID))
            .map_err(process_failed("return to the own PID namespace"))?;
    }
    cloned
}

/// Ends in the container's program, or reports why not.
fn run_init(init: &Init<'_>) -> ! {
    // A panic must not unwind into the caller's frames, which exist twice now.
    let (exit_code, message) = match catch_unwind(AssertUnwindSafe(|| init.run())) {
        Ok(Err(error)) => (error.exit_code(), chain(&error)),
        Ok(Ok(never)) => match never {},
        Err(_) => (125, "the container's process panicked; this is a defect in cloche".into()),
    };
    let mut report = vec![exit_code];
    report.extend(message.bytes().take(MAX_MESSAGE_BYTES));
    // Without a reader, nobody is left to tell.
    let _ = rustix::io::write(init.verdict, &report);
    syscalls::exit_now(exit_code)
}

/// A report is one write, which a pipe takes whole up to a page (pipe(7)).
const MAX_MESSAGE_BYTES: usize = 4000;

/// An error with all its causes.
fn chain(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(message, ": {error}");
        cause = error.source();
    }
    message
}

impl Child {
    /// Lets the child go on: approves of it and moves it into its v1 cgroups. It prepares its files meanwhile, since
    /// that can take milliseconds.
    fn release(&mut self, approve: Option<&dyn Fn(i32) -> bool>, cgroup: &Cgroup) -> Result<(), LaunchError> {
        let Some(attached) = self.attached.take() else { return Ok(()) };
        if !approve.is_none_or(|approve| approve(self.pid)) {
            return Err(LaunchError::Rejected);
        }
        if cgroup.needs_attach() {
            cgroup.attach(self.pid)?;
        }
        match rustix::io::write(&attached, &[0]) {
            // It has failed already, and the verdict tells why.
            Err(Errno::PIPE) => Ok(()),
            result => result.map(drop).map_err(process_failed("tell the child to go on")),
        }
    }

    /// Waits until the child has become the container's program, or failed.
    fn read_verdict(&mut self, cgroup: &Cgroup) -> Result<(), LaunchError> {
        let mut verdict = Vec::new();
        self.verdict.read_to_end(&mut verdict).map_err(process_failed("read from the child"))?;
        match verdict.as_slice() {
            [READY] => Ok(()),
            [READY, exit_code, message @ ..] | [exit_code, message @ ..] => Err(LaunchError::Init {
                exit_code: *exit_code,
                message: String::from_utf8_lossy(message).into_owned(),
            }),
            [] => Err(self.killed(cgroup)),
        }
    }

    fn killed(&self, cgroup: &Cgroup) -> LaunchError {
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
        let signo = status.ok().flatten().and_then(|status| status.terminating_signal()).unwrap_or(0);
        let hint = if cgroup.oom_kills() > 0 { ": its memory limit is too small" } else { "" };
        LaunchError::Killed { signo, hint }
    }

    /// Leaves neither a process nor a zombie.
    fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}
