//! The child's half of a start: from `clone3` to `execve`, in the order in which each step still has the rights
//! and the view of the machine that it needs.
//!
//! ```text
//!  caller's files    stdio ▸ namespaces ▸ host name, loopback, sysctls ▸ root file system ▸ bind sources
//!  pivot_root
//!  container's files mounts ▸ devices ▸ read-only and masked paths ▸ limits ▸ user ▸ find the program
//!  last rights       (no_new_privs: capabilities ▸ seccomp | else: seccomp ▸ capabilities) ▸ execve
//! ```
//!
//! Nothing of the container runs before `execve`, and no file of the caller's is open after it.

use std::{
    convert::Infallible,
    ffi::{CStr, CString},
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Linux, Process, Spec};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::Mode,
    io::{Errno, fcntl_dupfd_cloexec},
    process::{
        DumpableBehavior, Signal, chdir, getcwd, set_dumpable_behavior, set_parent_process_death_signal,
        setsid, umask,
    },
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
    system::{setdomainname, sethostname},
    thread::set_no_new_privs,
};

use crate::{
    cgroup::{Cgroup, CgroupError, DeviceGuard},
    devices::{self, DeviceError},
    launch::{Rootfs, Stdio},
    mounts::{
        self, Mount, MountError,
        paths::{self, Make, Symlinks},
        protect,
    },
    namespaces::{NamespaceError, Namespaces},
    process::{
        accounts::{self, Account, AccountError},
        capabilities::{self, CapabilityError},
        program::{self, OwnProgram, ProgramError},
        rlimits::{self, RlimitError},
        user::{self, UserError},
    },
    rootfs::{self, RootfsError},
    seccomp::{Filter, SeccompError},
    syscalls,
    sysctls::{SysctlError, Sysctls},
};

/// Everything that was worked out before the process was made.
pub(crate) struct Init<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) linux: &'a Linux,
    pub(crate) process: &'a Process,
    pub(crate) user: Option<&'a str>,
    pub(crate) rootfs: &'a Rootfs,
    pub(crate) stdio: &'a Stdio,
    pub(crate) namespaces: &'a Namespaces,
    pub(crate) sysctls: &'a Sysctls,
    pub(crate) mounts: &'a [Mount],
    pub(crate) capabilities: &'a capabilities::Sets,
    pub(crate) filter: Option<&'a Filter>,
    pub(crate) args: &'a [CString],
    pub(crate) env: &'a [CString],
    pub(crate) keyring: &'a CStr,
    pub(crate) own_program: OwnProgram,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) device_guard: Option<&'a DeviceGuard>,
    pub(crate) kill_on_parent_death: bool,
    /// Gets [`READY`] before the last steps, then nothing if they succeed.
    pub(crate) verdict: BorrowedFd<'a>,
    /// Yields one byte once the parent has moved this process into its v1 cgroups.
    pub(crate) attached: Option<BorrowedFd<'a>>,
}

/// Tells the parent that the process has come to its last steps. Without it, the end of the pipe means that the
/// process was killed on its way there.
pub(crate) const READY: u8 = 0xff;

/// Why the process could not become the container's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    #[error("cannot {action}")]
    Step { action: &'static str, source: io::Error },
    #[error("cannot set the OOM score adjustment to {value}: lowering it needs CAP_SYS_RESOURCE")]
    OomScore { value: i32, source: io::Error },
    #[error("cannot change to the working directory {path}")]
    WorkingDirectory { path: PathBuf, source: io::Error },
    #[error("the working directory {0} is outside of the container's root")]
    Outside(PathBuf),
    #[error("the parent process is gone")]
    Orphaned,
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Rlimit(#[from] RlimitError),
    #[error(transparent)]
    Account(#[from] AccountError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    Program(#[from] ProgramError),
}

impl InitError {
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Program(error) => error.exit_code(),
            _ => 125,
        }
    }
}

fn step<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> InitError {
    move |source| InitError::Step { action, source: source.into() }
}

impl Init<'_> {
    /// Becomes the container's process. Returns only if that fails.
    pub(crate) fn run(&self) -> Result<Infallible, InitError> {
        self.detach_from_parent()?;
        self.set_up_namespaces()?;
        let root = self.enter_root()?;
        self.set_up_files(root.as_fd())?;
        let account = self.account(root.as_fd())?;
        let env = self.environment(root.as_fd(), &account);
        let program = self.take_on_identity(&account)?;
        self.execute(&program, &env)
    }

    /// Nothing that the parent happens to have, be it signals, keys or a terminal, reaches the container.
    fn detach_from_parent(&self) -> Result<(), InitError> {
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("ask to die with the parent"))?;
        self.check_parent()?;
        // Until execve, nobody in a PID namespace that this process joins may look into it.
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("become undumpable"))?;
        syscalls::reset_signals();
        setsid().map_err(step("start a session"))?;
        umask(Mode::empty());
        self.place_stdio().map_err(step("place stdin, stdout and stderr"))?;
        match syscalls::join_session_keyring(self.keyring) {
            // Kernels without keyrings, and containers around us that forbid them.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Ok(()),
            result => result.map_err(step("join a session keyring")),
        }
    }

    /// The parent may have died before this process asked to be told.
    fn check_parent(&self) -> Result<(), InitError> {
        let mut pipe = [PollFd::from_borrowed_fd(self.verdict, PollFlags::empty())];
        poll(&mut pipe, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }))
            .map_err(step("poll the parent"))?;
        let [pipe] = &pipe;
        if pipe.revents().contains(PollFlags::ERR) { Err(InitError::Orphaned) } else { Ok(()) }
    }

    fn place_stdio(&self) -> Result<(), Errno> {
        // One of them might be where another one goes.
        let clear = |fd: &OwnedFd| fcntl_dupfd_cloexec(fd, 3);
        let Stdio { stdin, stdout, stderr } = self.stdio;
        let (stdin, stdout, stderr) = (clear(stdin)?, clear(stdout)?, clear(stderr)?);
        dup2_stdin(stdin)?;
        dup2_stdout(stdout)?;
        dup2_stderr(stderr)
    }

    fn set_up_namespaces(&self) -> Result<(), InitError> {
        self.namespaces.join()?;
        if let Some(name) = self.spec.hostname() {
            sethostname(name.as_bytes()).map_err(step("set the host name"))?;
        }
        if let Some(name) = self.spec.domainname() {
            setdomainname(name.as_bytes()).map_err(step("set the domain name"))?;
        }
        if self.namespaces.new_network {
            syscalls::interface_up(c"lo").map_err(step("bring the loopback interface up"))?;
        }
        self.sysctls.apply()?;
        match self.process.oom_score_adj() {
            Some(value) => set_oom_score(value).map_err(|source| InitError::OomScore { value, source }),
            None => Ok(()),
        }
    }

    /// From here on, no path leads to the caller's files.
    fn enter_root(&self) -> Result<OwnedFd, InitError> {
        rootfs::isolate_mounts()?;
        let sources = mounts::open_sources(self.mounts, self.namespaces, self.cgroup)?;
        let root = rootfs::mount(self.rootfs)?;
        rootfs::enter(root.as_fd())?;
        let mut in_cgroups = false;
        mounts::mount_all(root.as_fd(), self.mounts, sources, self.cgroup, || {
            if std::mem::replace(&mut in_cgroups, true) { Ok(()) } else { self.enter_cgroups() }
        })?;
        if !in_cgroups {
            self.enter_cgroups().map_err(step("enter the cgroup"))?;
        }
        Ok(root)
    }

    fn enter_cgroups(&self) -> io::Result<()> {
        if let Some(attached) = self.attached {
            let mut byte = [0];
            if rustix::io::retry_on_intr(|| rustix::io::read(attached, &mut byte))? == 0 {
                return Err(io::Error::other("the parent process gave up"));
            }
        }
        self.namespaces.unshare_cgroup().map_err(io::Error::other)
    }

    fn set_up_files(&self, root: BorrowedFd<'_>) -> Result<(), InitError> {
        let dev = Path::new("/dev");
        // What is bound to /dev from outside is complete as it is, and not ours to change.
        if !self.mounts.iter().any(|mount| mount.destination() == dev && mount.is_bind()) {
            devices::create(root, self.linux.devices().as_deref().unwrap_or_default())?;
        }
        self.device_guard.map_or(Ok(()), DeviceGuard::enforce)?;
        let cwd = self.process.cwd();
        paths::open_or_make(root, cwd, Symlinks::Follow, Make::Directory)
            .map_err(|source| InitError::WorkingDirectory { path: cwd.clone(), source })?;
        protect::make_readonly(root, self.linux.readonly_paths().as_deref().unwrap_or_default())?;
        protect::mask(root, self.linux.masked_paths().as_deref().unwrap_or_default())?;
        if self.spec.root().as_ref().is_some_and(|root| root.readonly() == Some(true)) {
            protect::remount_readonly(root, Path::new("/"))?;
        }
        match self.linux.rootfs_propagation() {
            Some(propagation) => Ok(protect::propagate_root(propagation)?),
            None => Ok(()),
        }
    }

    /// The user asked for by name, else by the spec's numbers.
    fn account(&self, root: BorrowedFd<'_>) -> Result<Account, AccountError> {
        self.user.map_or_else(|| Ok(self.process.user().into()), |user| accounts::resolve(root, user))
    }

    /// The spec's variables, and `HOME`, which programs rely on and other runtimes add, too.
    fn environment(&self, root: BorrowedFd<'_>, account: &Account) -> Vec<CString> {
        let mut env = self.env.to_vec();
        if !env.iter().any(|variable| variable.as_bytes().starts_with(b"HOME=")) {
            env.extend(CString::new(format!("HOME={}", accounts::home(root, account.uid))));
        }
        env
    }

    /// Limits, user and working directory. All permitted capabilities are still there afterwards.
    fn take_on_identity(&self, account: &Account) -> Result<PathBuf, InitError> {
        for rlimit in self.process.rlimits().iter().flatten() {
            rlimits::set(rlimit)?;
        }
        self.capabilities.check_held()?;
        self.capabilities.drop_bounding()?;
        // Root may enter directories that the user may not, and the other way round on network file systems.
        let entered = chdir(self.process.cwd());
        user::own_stdio(account)?;
        user::switch(account, self.process.user().umask())?;
        if entered.is_err() {
            chdir(self.process.cwd()).map_err(|errno| self.working_directory_failed(errno))?;
        }
        self.check_working_directory()?;
        let command = self.command();
        let env = self.process.env().as_deref().unwrap_or_default();
        Ok(program::find(command, env, self.own_program)?)
    }

    fn working_directory_failed(&self, errno: Errno) -> InitError {
        InitError::WorkingDirectory { path: self.process.cwd().clone(), source: errno.into() }
    }

    /// A working directory such as `/proc/self/fd/7` could be one of the caller's (CVE-2024-21626). The kernel
    /// marks what is outside of the root as unreachable.
    fn check_working_directory(&self) -> Result<(), InitError> {
        match getcwd(Vec::new()) {
            Ok(path) if path.as_bytes().starts_with(b"/") => Ok(()),
            Ok(_) | Err(Errno::NOENT) => Err(InitError::Outside(self.process.cwd().clone())),
            Err(errno) => Err(self.working_directory_failed(errno)),
        }
    }

    fn command(&self) -> &str {
        self.process.args().iter().flatten().next().map_or("", String::as_str)
    }

    fn execute(&self, program: &Path, env: &[CString]) -> Result<Infallible, InitError> {
        let no_new_privs = self.process.no_new_privileges() == Some(true);
        if no_new_privs {
            set_no_new_privs(true).map_err(step("set no_new_privs"))?;
        }
        syscalls::close_on_exec_from(3).map_err(step("mark open files close-on-exec"))?;
        // A change of user clears the death signal, so it is set, or given up, only now.
        let death_signal = self.kill_on_parent_death.then_some(Signal::KILL);
        set_parent_process_death_signal(death_signal).map_err(step("ask to die with the parent"))?;
        self.check_parent()?;
        rustix::io::write(self.verdict, &[READY]).map_err(step("report to the parent"))?;
        // Without no_new_privs only CAP_SYS_ADMIN may install a filter, and the filter then has to let capset pass.
        if no_new_privs {
            self.capabilities.apply()?;
            self.install_filter()?;
        } else {
            capabilities::raise_permitted()?;
            self.install_filter()?;
            self.capabilities.apply()?;
        }
        Err(program::execute(program, self.command(), self.args, env).into())
    }

    fn install_filter(&self) -> Result<(), SeccompError> {
        self.filter.map_or(Ok(()), Filter::install)
    }
}

/// Through the caller's `/proc`, where `self` is this process, too.
fn set_oom_score(value: i32) -> io::Result<()> {
    let file = "/proc/self/oom_score_adj";
    match fs::write(file, value.to_string()) {
        // Not being allowed to change it is fine if it need not change.
        Err(error) => match fs::read_to_string(file) {
            Ok(present) if present.trim().parse() == Ok(value) => Ok(()),
            _ => Err(error),
        },
        Ok(()) => Ok(()),
    }
}
