//! The parent's half of a start: everything up to `clone3`, and the wait for the child's verdict.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use oci_spec::runtime::{Linux, LinuxIdMapping, Process, Spec};
use rustix::{
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::{
        DumpableBehavior, Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal,
        set_dumpable_behavior, waitid,
    },
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::{
    cgroup::{self, Breadth, Cgroup, CgroupError, DeviceGuard},
    container::Container,
    devices::{self, DeviceError},
    entry::{self, Entry},
    init::{Init, Prepared},
    mounts::{self, Mount, MountError, Passing},
    namespaces::{NamespaceError, Namespaces},
    process::{
        capabilities,
        program::{self, OwnProgram},
        rlimits::{self, RlimitError},
    },
    rootfs::{self, RootfsError},
    seccomp::{Filter, SeccompError},
    spec_check::{self, Means, SpecError},
    syscalls::{self, Cloned},
    sysctls::{SysctlError, Sysctls},
    user_namespace::{self, UserNamespaceError},
    verdict::{self, Reporter},
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
    /// The system-call filter, compiled by somebody else before, in place of the spec's `linux.seccomp`.
    pub filter: Option<&'a Filter>,
    /// The root file system.
    pub rootfs: Rootfs,
    /// What becomes the process's file descriptors 0, 1 and 2.
    pub stdio: Stdio,
    /// Whether the kernel kills the process when the caller's process dies.
    pub kill_on_parent_death: bool,
    /// Called with the process's id once it is in its namespaces and before anything of the container runs. If it
    /// says no, the process is killed and the start fails with [`LaunchError::Rejected`].
    pub approve: Option<&'a dyn Fn(i32) -> bool>,
    /// What only an OCI runtime's command line asks for.
    pub oci: Oci<'a>,
}

/// What a spec's author may ask for beyond what makes a sandbox of ours: the life that an OCI runtime's command line
/// gives a container. The default asks for nothing.
#[derive(Clone, Copy, Default)]
pub struct Oci<'a> {
    /// A listening Unix socket (stream). The process waits at it, ready, until a client writes a byte; [`launch`] then
    /// returns at the beginning of the wait. The client reads nothing if the program runs, else the exit code and the
    /// message.
    pub gate: Option<BorrowedFd<'a>>,
    /// A connected Unix socket that gets the terminal, for a spec with `process.terminal`.
    pub console_socket: Option<BorrowedFd<'a>>,
    /// Descriptors of the caller's, from 3 up, that the process keeps.
    pub preserved_fds: &'a [i32],
    /// Whether the process keeps the caller's session keyring.
    pub keep_keyring: bool,
    /// Called with the process's id and cgroup once its namespaces exist and before anything else of the container does.
    /// Its error ends the start.
    pub created: Option<Created<'a>>,
    /// Whether the process keeps the caller's additional groups.
    pub keep_groups: bool,
    /// Called with what is not done as asked, where the specification wants a warning instead of a failure. Without it,
    /// such a spec is refused.
    pub warn: Option<&'a dyn Fn(&str)>,
    /// Takes the listener of a seccomp policy that notifies. Without it, such a spec is refused. Its error ends the start.
    /// With a gate, it is whoever lets the process through that is asked: see [`take_listener`](crate::take_listener).
    pub listener: Option<Listener<'a>>,
    /// Makes the state that hooks inside of the container get on stdin. Without it, a spec with hooks is refused;
    /// `prestart`, `createRuntime`, `poststart` and `poststop` are the caller's to run.
    pub hook_state: Option<HookState<'a>>,
    /// How long the process may take to become its program, or to wait at its gate, before it is killed.
    pub patience: Option<Duration>,
}

impl<'a> Oci<'a> {
    fn console_socket(&self) -> Option<BorrowedFd<'a>> {
        self.console_socket.filter(|_| cfg!(feature = "terminal"))
    }

    fn hook_state(&self) -> Option<HookState<'a>> {
        self.hook_state.filter(|_| cfg!(feature = "hooks"))
    }
}

/// Takes the process's id and its cgroup.
pub type Created<'a> = &'a dyn Fn(i32, &Cgroup) -> Result<(), String>;

/// Takes the process's id, and the listener that its seccomp policy notifies.
pub type Listener<'a> = &'a dyn Fn(i32, OwnedFd) -> Result<(), String>;

/// Makes the state's JSON from process id and status.
pub type HookState<'a> = &'a dyn Fn(i32, &str) -> String;

/// Where the container's root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rootfs {
    /// A directory, used as it is: what the container writes stays there.
    Directory(PathBuf),
    /// EROFS layers under a writable overlay that vanishes with the container's mount namespace.
    Layers {
        /// Bottom layer first.
        lowers: Vec<Lower>,
        /// Size limit of the writable layer in bytes; `None` leaves tmpfs's default, half of the memory.
        upper_bytes: Option<u64>,
    },
}

/// A layer below the writable one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lower {
    /// A block device or image file with an EROFS file system.
    pub path: PathBuf,
    /// The block devices or files in which that has its files' data, in the order of its device table. If there are none,
    /// all is in the one.
    pub devices: Vec<PathBuf>,
}

impl From<PathBuf> for Lower {
    fn from(path: PathBuf) -> Self {
        Self { path, devices: Vec::new() }
    }
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
    /// The user namespace could not be set up.
    #[error(transparent)]
    UserNamespace(#[from] UserNamespaceError),
    /// A device node could not be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A resource limit could not be set.
    #[error(transparent)]
    Rlimit(#[from] RlimitError),
    /// The root file system could not be opened.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
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
    /// [`Oci::created`] or [`Oci::listener`] failed.
    #[error("{0}")]
    Refused(String),
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
    let path = cgroup_path(launch.spec, launch.id);
    // Who creates containers for others does not know who reads their cgroups.
    let breadth = if launch.oci.created.is_some() { Breadth::All } else { Breadth::Needed };
    let cgroup = Cgroup::create(&path, plan.linux.resources().as_ref(), breadth)?;
    match start(&launch, &plan, &cgroup) {
        Ok((child, oom_event)) => Ok(Container::new(child.pid, child.pidfd, oom_event, child.base, cgroup)),
        Err(error) => {
            // The first failure is what the caller has to know.
            let _ = cgroup.kill_all();
            let _ = cgroup.delete();
            Err(error)
        }
    }
}

/// Whether a spec can be started, as far as that can be told before anything is made: [`launch`] refuses the same.
pub fn check(launch: &Launch<'_>) -> Result<(), LaunchError> {
    let plan = Plan::new(launch)?;
    Ok(Cgroup::check(&cgroup_path(launch.spec, launch.id), plan.linux.resources().as_ref())?)
}

/// The path of a container's cgroup in its hierarchies: the spec's, or made of the id; if that is relative, below
/// `/cloche`, or below a plain user's own cgroup.
pub fn cgroup_path(spec: &Spec, id: &str) -> PathBuf {
    let listed = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref());
    let listed = listed.filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new(id));
    if listed.is_absolute() {
        return listed.to_owned();
    }
    let base = if user_namespace::is_machine_root() { PathBuf::from("/cloche") } else { cgroup::own_base() };
    base.join(listed)
}

/// The spec, read as far as that is possible before anything is made.
struct Plan<'a> {
    linux: &'a Linux,
    process: &'a Process,
    namespaces: Namespaces,
    sysctls: Sysctls,
    mounts: Vec<Mount>,
    capabilities: capabilities::Sets,
    filter: Option<Cow<'a, Filter>>,
    args: Vec<CString>,
    env: Vec<CString>,
    keyring: CString,
    own_program: OwnProgram,
}

impl<'a> Plan<'a> {
    fn new(launch: &Launch<'a>) -> Result<Self, LaunchError> {
        let spec = launch.spec;
        let means = Means {
            terminal: launch.oci.console_socket().is_some(),
            hooks: launch.oci.hook_state().is_some(),
            listener: launch.oci.listener.is_some(),
        };
        spec_check::check_with(spec, means)?;
        let missing = |what: &str| SpecError::Invalid(format!("{what} is missing"));
        let linux = spec.linux().as_ref().ok_or_else(|| missing("linux"))?;
        let process = spec.process().as_ref().ok_or_else(|| missing("process"))?;
        let namespaces = linux.namespaces().as_deref().unwrap_or_default();
        let strings = |what, strings: &Option<Vec<String>>| {
            program::c_strings(strings.iter().flatten()).ok_or(LaunchError::NulByte(what))
        };
        let understood = Namespaces::from_spec(namespaces);
        let has_user = understood.has_user();
        let users = match (linux.uid_mappings(), linux.gid_mappings()) {
            (Some(uids), Some(gids)) if understood.new_user => Some((uids.clone(), gids.clone())),
            _ => None,
        };
        let label = linux.mount_label().as_deref();
        let mounts = spec.mounts().iter().flatten();
        let mounts = mounts.map(|mount| Ok(Mount::from_spec(mount, users.as_ref())?.labelled(label)));
        Ok(Self {
            linux,
            process,
            namespaces: understood,
            sysctls: Sysctls::from_spec(linux.sysctl().as_ref(), namespaces)?,
            mounts: mounts.collect::<Result<_, MountError>>()?,
            // In a user namespace the process has all there are.
            capabilities: granted(process, launch.oci.warn.filter(|_| !has_user))?,
            filter: Filter::of(launch.filter, linux.seccomp().as_ref())?,
            args: strings("process.args", process.args())?,
            env: strings("process.env", process.env())?,
            keyring: CString::new(format!("cloche.{}", launch.id))
                .map_err(|_| LaunchError::NulByte("the id"))?,
            own_program: OwnProgram::identify().map_err(process_failed("identify this program"))?,
        })
    }
}

/// The capabilities of the spec; less what this process lacks itself, if somebody is there to be told of it.
pub(crate) fn granted(
    process: &Process,
    warn: Option<&dyn Fn(&str)>,
) -> Result<capabilities::Sets, LaunchError> {
    let mut sets = capabilities::Sets::from_spec(process.capabilities().as_ref());
    let Some(warn) = warn else { return Ok(sets) };
    let missing = sets
        .take_out_unheld()
        .map_err(|error| process_failed("read its capabilities")(io::Error::other(error)))?;
    if !missing.is_empty() {
        warn(&format!("not granted, since this process does not have it itself: {}", missing.join(", ")));
    }
    Ok(sets)
}

pub(crate) fn process_failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> LaunchError {
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
    // A sandbox ends as a whole; containers of engines lose one process, as they do with other runtimes, and ask for more
    // by `linux.resources.unified`.
    let is_engines = launch.oci.created.is_some() || launch.oci.gate.is_some();
    if limited && !is_engines {
        cgroup.end_as_a_whole()?;
    }
    let device_guard = cgroup.device_guard(plan.linux.resources().as_ref())?;
    let child = spawn(launch, plan, cgroup, device_guard.as_ref())?;
    match child
        .release(launch, plan, cgroup, device_guard.as_ref())
        .and_then(|()| child.read_verdict(cgroup, launch))
    {
        Ok(()) => Ok((child, oom_event)),
        Err(error) => {
            child.kill();
            Err(error)
        }
    }
}

/// What the process itself could not get at, if the caller can: in a user namespace it has no rights over the caller's
/// files, and in a PID namespace it cannot map users for a mount.
fn prepare(launch: &Launch<'_>, plan: &Plan<'_>) -> Result<Option<Prepared>, LaunchError> {
    let is_mapped = plan.mounts.iter().any(Mount::is_mapped);
    let is_root = user_namespace::is_machine_root();
    if is_mapped && !is_root {
        // The process would have to write the maps of one that its /proc does not know.
        return Err(SpecError::Unsupported("mounts[].uidMappings for a user who is not root".into()).into());
    }
    // Another user has rights over its files in its own user namespace only, and that is the process's.
    if !is_root || !is_mapped && !plan.namespaces.has_user() {
        return Ok(None);
    }
    let root = match &launch.rootfs {
        Rootfs::Directory(path) if plan.namespaces.has_user() => Some(rootfs::clone_directory(path)?),
        Rootfs::Directory(_) | Rootfs::Layers { .. } => None,
    };
    let maps = |maps: &Option<Vec<LinuxIdMapping>>| maps.clone().unwrap_or_default();
    let devices = match plan.linux.devices() {
        // Whose users those of a joined namespace are, is not in the spec.
        Some(listed) if plan.namespaces.has_user() && plan.namespaces.new_user => {
            let (uids, gids) = (maps(plan.linux.uid_mappings()), maps(plan.linux.gid_mappings()));
            devices::make_for_other(listed, &uids, &gids)?
        }
        _ => None,
    };
    let passes_on = mounts::pass_on(plan.linux) && !plan.namespaces.has_user();
    let passing = if passes_on { Passing::Shared } else { Passing::Nothing };
    Ok(Some(Prepared { root, devices, binds: mounts::clone_binds(&plan.mounts, passing)? }))
}

/// The process on its way to `execve`.
struct Child {
    pid: i32,
    pidfd: OwnedFd,
    /// Where it says how it fares.
    verdict: OwnedFd,
    /// Where it is told to go on.
    held: Option<OwnedFd>,
    /// What is under its writable layer.
    base: Option<OwnedFd>,
}

fn spawn(
    launch: &Launch<'_>,
    plan: &Plan<'_>,
    cgroup: &Cgroup,
    device_guard: Option<&DeviceGuard>,
) -> Result<Child, LaunchError> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(process_failed("make a pipe"));
    let (verdict, verdict_writer) = pipe()?;
    let released_early = launch.oci.created.is_some() || plan.namespaces.has_user();
    let prepared = prepare(launch, plan)?.map(RefCell::new);
    let notifies = plan.filter.as_deref().is_some_and(Filter::notifies);
    let is_held = released_early || launch.approve.is_some() || notifies;
    let (held, held_writer) = if is_held { Some(pipe()?) } else { None }.unzip();
    // A user namespace's mounts are its own to make.
    let base = if plan.namespaces.has_user() { None } else { rootfs::base(&launch.rootfs)? };
    let entrances = cgroup.entrances()?;
    match clone(&plan.namespaces, cgroup)? {
        Cloned::Parent { pid, pidfd } => Ok(Child { pid, pidfd, verdict, held: held_writer, base }),
        Cloned::Child => {
            // The death of either side must be seen by the other.
            drop((verdict, held_writer));
            run_init(&Init {
                entry: Entry {
                    process: plan.process,
                    user: launch.user,
                    stdio: &launch.stdio,
                    capabilities: &plan.capabilities,
                    filter: plan.filter.as_deref(),
                    args: &plan.args,
                    env: &plan.env,
                    keyring: (!launch.oci.keep_keyring).then_some(&plan.keyring),
                    own_program: plan.own_program,
                    kill_on_parent_death: launch.kill_on_parent_death,
                    preserved_fds: launch.oci.preserved_fds,
                    keep_groups: launch.oci.keep_groups,
                    verdict: verdict_writer.as_fd(),
                    released: held.as_ref().map(AsFd::as_fd),
                    gate: launch.oci.gate,
                    starter: RefCell::new(None),
                    label: RefCell::new(None),
                    is_filtered: Cell::new(false),
                },
                spec: launch.spec,
                linux: plan.linux,
                rootfs: &launch.rootfs,
                base: base.as_ref().map(AsFd::as_fd),
                namespaces: &plan.namespaces,
                sysctls: &plan.sysctls,
                mounts: &plan.mounts,
                cgroup,
                device_guard,
                entrances: &entrances,
                released_early,
                prepared,
                binds_devices: plan.namespaces.has_user() || !user_namespace::is_machine_root(),
                console_socket: launch.oci.console_socket(),
                hook_state: launch.oci.hook_state(),
            })
        }
    }
}

/// Makes the process by way of another one, which joins namespaces first, hidden from who is in them, and ends.
pub(crate) fn clone_by_go_between(
    hides: bool,
    clone_flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
    join: &dyn Fn() -> Result<(), String>,
) -> Result<Cloned, LaunchError> {
    let (news, news_writer) = pipe_with(PipeFlags::CLOEXEC).map_err(process_failed("make a pipe"))?;
    match syscalls::clone3(0, None).map_err(process_failed("clone this process"))? {
        Cloned::Child => {
            drop(news);
            // Once it has joined, root of a namespace could look into it, and into its child. See `Init::run`.
            let hidden = if hides {
                set_dumpable_behavior(DumpableBehavior::NotDumpable)
                    .map_err(|errno| format!("cannot become undumpable: {errno}"))
            } else {
                Ok(())
            };
            let cloned = hidden.and_then(|()| join()).and_then(|()| {
                let cloned = syscalls::clone3_sibling(clone_flags, cgroup);
                cloned.map_err(|error| format!("cannot clone in the joined namespaces: {error}"))
            });
            let news = match cloned {
                Ok(Cloned::Child) => return Ok(Cloned::Child),
                Ok(Cloned::Parent { pid, .. }) => pid.to_string(),
                Err(message) => message,
            };
            let _ = rustix::io::write(&news_writer, news.as_bytes());
            syscalls::exit_now(0)
        }
        Cloned::Parent { pidfd, .. } => {
            drop(news_writer);
            let mut text = [0; 4096];
            // One write, of which a pipe takes a page whole; the process itself has the other end, too, until it ends.
            let count = rustix::io::retry_on_intr(|| rustix::io::read(&news, &mut text))
                .map_err(process_failed("read from the process in between"))?;
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
            let text = String::from_utf8_lossy(text.get(..count).unwrap_or_default()).into_owned();
            let Some(pid) = text.parse().ok().and_then(Pid::from_raw) else {
                return Err(LaunchError::Init { exit_code: 125, message: text });
            };
            // Not reaped, it is still the one that it was.
            let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(process_failed("open the child"))?;
            Ok(Cloned::Parent { pid: pid.as_raw_nonzero().get(), pidfd })
        }
    }
}

fn clone(namespaces: &Namespaces, cgroup: &Cgroup) -> Result<Cloned, LaunchError> {
    let directory = cgroup.clone_target()?;
    let directory = directory.as_ref().map(AsFd::as_fd);
    if namespaces.need_go_between() {
        let join = || namespaces.join_all().map_err(|error| verdict::chain(&error));
        let hides = !namespaces.new_user || user_namespace::can_hide();
        return clone_by_go_between(hides, namespaces.clone_flags, directory, &join);
    }
    let clone3 = if namespaces.new_user { user_namespace::clone_hidden } else { syscalls::clone3 };
    let clone = || clone3(namespaces.clone_flags, directory).map_err(process_failed("clone this process"));
    let Some(joined) = namespaces.joined_pid() else { return clone() };
    // Who is root of a user namespace only could not return to its own.
    if !user_namespace::is_machine_root() {
        let join = || joined.join().map_err(|error| verdict::chain(&error));
        return clone_by_go_between(true, namespaces.clone_flags, directory, &join);
    }
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
    verdict::run_to_program(&init.entry, || init.run())
}

impl Child {
    /// Approves of the child and lets it go on.
    fn release(
        &self,
        launch: &Launch<'_>,
        plan: &Plan<'_>,
        cgroup: &Cgroup,
        device_guard: Option<&DeviceGuard>,
    ) -> Result<(), LaunchError> {
        let Some(held) = &self.held else { return Ok(()) };
        if !launch.approve.is_none_or(|approve| approve(self.pid)) {
            return Err(LaunchError::Rejected);
        }
        if plan.namespaces.has_user() {
            self.set_up_as_caller(plan, device_guard)?;
        }
        if let Some(created) = launch.oci.created {
            created(self.pid, cgroup).map_err(LaunchError::Refused)?;
        }
        match rustix::io::write(held, &self.pid.to_le_bytes()) {
            // It has failed already, and the verdict tells why.
            Err(Errno::PIPE) => Ok(()),
            result => result.map(drop).map_err(process_failed("tell the child to go on")),
        }
    }

    /// Does what the process cannot do from within a user namespace.
    fn set_up_as_caller(
        &self,
        plan: &Plan<'_>,
        device_guard: Option<&DeviceGuard>,
    ) -> Result<(), LaunchError> {
        if plan.namespaces.new_user {
            let maps = |maps: &Option<Vec<_>>| maps.clone().unwrap_or_default();
            let (uids, gids) = (maps(plan.linux.uid_mappings()), maps(plan.linux.gid_mappings()));
            user_namespace::map_ids(self.pid, &uids, &gids)?;
        }
        for rlimit in plan.process.rlimits().iter().flatten() {
            rlimits::raise(self.pid, rlimit)?;
        }
        if let Some(value) = plan.process.oom_score_adj() {
            entry::set_oom_score(&self.pid.to_string(), value)
                .map_err(process_failed("set the OOM score adjustment"))?;
        }
        Ok(device_guard.map_or(Ok(()), DeviceGuard::enforce)?)
    }

    /// Waits until the child has become the container's program, waits at its gate, or failed.
    fn read_verdict(&self, cgroup: &Cgroup, launch: &Launch<'_>) -> Result<(), LaunchError> {
        let process = Reporter {
            pid: self.pid,
            pidfd: self.pidfd.as_fd(),
            verdict: self.verdict.as_fd(),
            released: self.held.as_ref().map(AsFd::as_fd),
            patience: launch.oci.patience,
        };
        verdict::read(&process, cgroup, launch.oci.gate.is_some(), launch.oci.listener)
    }

    /// Leaves neither a process nor a zombie.
    fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        let _ = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}

#[cfg(test)]
mod tests;
