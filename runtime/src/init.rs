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
    cell::RefCell,
    convert::Infallible,
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Linux, LinuxDevice, Spec};
use rustix::system::{setdomainname, sethostname};

use crate::{
    cgroup::{Cgroup, CgroupError, DeviceGuard, Entrances},
    console::{self, ConsoleError},
    devices::{self, DeviceError},
    entry::{Entry, step},
    hooks::{self, HookError},
    launch::{HookState, Rootfs},
    mounts::{
        self, Mount, MountError, Passing,
        paths::{self, Make, Symlinks},
        protect,
    },
    namespaces::{NamespaceError, Namespaces},
    process::{
        accounts::AccountError,
        capabilities::CapabilityError,
        labels::LabelError,
        program::ProgramError,
        rlimits::RlimitError,
        scheduling::{self, SchedulingError},
        user::UserError,
    },
    rootfs::{self, RootfsError},
    seccomp::SeccompError,
    syscalls,
    sysctls::{SysctlError, Sysctls},
    user_namespace::{self, UserNamespaceError},
};

/// Everything that was worked out before the process was made.
pub(crate) struct Init<'a> {
    pub(crate) entry: Entry<'a>,
    pub(crate) spec: &'a Spec,
    pub(crate) linux: &'a Linux,
    pub(crate) rootfs: &'a Rootfs,
    /// What is under its writable layer, if the parent keeps that.
    pub(crate) base: Option<BorrowedFd<'a>>,
    pub(crate) namespaces: &'a Namespaces,
    pub(crate) sysctls: &'a Sysctls,
    pub(crate) mounts: &'a [Mount],
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) entrances: &'a Entrances,
    pub(crate) device_guard: Option<&'a DeviceGuard>,
    /// Whether to wait for the parent before anything of the container is made.
    pub(crate) released_early: bool,
    /// What the parent has prepared, if the process cannot.
    pub(crate) prepared: Option<RefCell<Prepared>>,
    /// Whether device nodes are the caller's own, shown in the container: in a user namespace none can be made.
    pub(crate) binds_devices: bool,
    /// Gets the terminal.
    pub(crate) console_socket: Option<BorrowedFd<'a>>,
    /// Makes the state that hooks get.
    pub(crate) hook_state: Option<HookState<'a>>,
}

/// What a process in a user namespace of its own could not get at.
pub(crate) struct Prepared {
    pub(crate) root: Option<OwnedFd>,
    /// From [`devices::make_for_other`].
    pub(crate) devices: Option<OwnedFd>,
    pub(crate) binds: Vec<Option<OwnedFd>>,
}

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
    Label(#[from] LabelError),
    #[error(transparent)]
    Account(#[from] AccountError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    Scheduling(#[from] SchedulingError),
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error(transparent)]
    UserNamespace(#[from] UserNamespaceError),
    #[error(transparent)]
    Hook(#[from] HookError),
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

impl Init<'_> {
    /// Becomes the container's process. Returns only if that fails.
    pub(crate) fn run(&self) -> Result<Infallible, InitError> {
        // In namespaces that it has joined, others may be root. In a new user namespace it is so already, or its parent, who
        // is not root, could not write the maps (`user_namespace::clone_hidden`).
        if !self.namespaces.new_user {
            self.entry.become_undumpable()?;
        }
        self.entry.detach_from_parent()?;
        self.entrances.enter().map_err(step("enter the cgroup"))?;
        let mut pid = None;
        if self.released_early {
            pid = Some(self.await_release().map_err(step("wait for the parent"))?);
        }
        if self.namespaces.has_user() {
            user_namespace::become_root(self.entry.keep_groups)?;
            // The switch made it dumpable or not by the machine's settings.
            self.entry.become_undumpable()?;
        }
        self.set_up_namespaces()?;
        let root = self.enter_root(pid)?;
        self.set_up_files(root.as_fd())?;
        if let Some(personality) = self.linux.personality() {
            scheduling::set_personality(personality)?;
        }
        let account = self.entry.account(root.as_fd())?;
        let env = self.entry.environment(root.as_fd(), &account);
        let program = self.entry.take_on_identity(&account)?;
        drop(root);
        self.entry.execute(&program, &env, &|| self.run_start_hooks(pid, &env))
    }

    fn set_up_namespaces(&self) -> Result<(), InitError> {
        self.namespaces.join()?;
        if let Some(name) = self.spec.hostname().as_ref().filter(|name| !name.is_empty()) {
            sethostname(name.as_bytes()).map_err(step("set the host name"))?;
        }
        if let Some(name) = self.spec.domainname().as_ref().filter(|name| !name.is_empty()) {
            setdomainname(name.as_bytes()).map_err(step("set the domain name"))?;
        }
        if self.namespaces.new_network {
            syscalls::interface_up(c"lo").map_err(step("bring the loopback interface up"))?;
        }
        self.sysctls.apply()?;
        let offsets = self.linux.time_offsets().iter().flatten();
        let offsets = offsets.map(|(clock, offset)| {
            (clock.as_str(), offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0))
        });
        self.namespaces.enter_time(&offsets.collect::<Vec<_>>())?;
        self.entry.use_own_proc()
    }

    /// From here on, no path leads to the caller's files.
    fn enter_root(&self, pid: Option<i32>) -> Result<OwnedFd, InitError> {
        // What is to pass mounts on to the caller's must be cloned as long as the mounts here are peers of those. In a user
        // namespace they never are.
        let peers = match self.prepared {
            None if mounts::pass_on(self.linux) => Some(mounts::clone_binds(self.mounts, Passing::Shared)?),
            _ => None,
        };
        rootfs::isolate_mounts()?;
        if let (Some(hooks), Some(state), Some(pid)) = (self.spec.hooks(), self.hook_state(), pid) {
            let listed = hooks.create_container().as_deref().unwrap_or_default();
            // Other runtimes run these in the root file system, and hooks count on it.
            let enter = || match self.rootfs {
                Rootfs::Directory(path) => std::env::set_current_dir(path).map_err(|error| error.to_string()),
                Rootfs::Layers { .. } => Ok(()),
            };
            hooks::run("createContainer", listed, &state(pid, "creating"), &enter)?;
        }
        let (binds, root, made) = match &self.prepared {
            Some(prepared) => {
                let mut prepared = prepared.borrow_mut();
                (Some(std::mem::take(&mut prepared.binds)), prepared.root.take(), prepared.devices.take())
            }
            None => (peers, None, None),
        };
        // Mounts are listed in the order in which they were made, and programs expect the root to be the first.
        let root = match (root, self.rootfs) {
            (Some(root), Rootfs::Directory(path)) => {
                rootfs::attach_clone(root.as_fd(), path)?;
                root
            }
            _ => rootfs::mount(self.rootfs, self.base)?,
        };
        let binds = match binds {
            Some(binds) => binds,
            None => mounts::clone_binds(self.mounts, Passing::Settled)?,
        };
        let sources = mounts::open_sources(self.mounts, binds, self.namespaces, self.cgroup)?;
        let devices = if self.binds_devices {
            devices::open(self.listed_devices(), made.as_ref().map(AsFd::as_fd))?
        } else {
            Vec::new()
        };
        rootfs::enter(root.as_fd())?;
        let mut in_cgroups = false;
        mounts::mount_all(root.as_fd(), self.mounts, sources, self.cgroup, || {
            if std::mem::replace(&mut in_cgroups, true) { Ok(()) } else { self.enter_cgroups(pid) }
        })?;
        if !in_cgroups {
            self.enter_cgroups(pid).map_err(step("enter the cgroup"))?;
        }
        if self.binds_devices && self.makes_dev() {
            devices::bind(root.as_fd(), &devices)?;
        }
        Ok(root)
    }

    fn listed_devices(&self) -> &[LinuxDevice] {
        self.linux.devices().as_deref().unwrap_or_default()
    }

    /// What is bound to /dev from outside is complete as it is, and not ours to change.
    fn makes_dev(&self) -> bool {
        let dev = Path::new("/dev");
        !self.mounts.iter().any(|mount| mount.destination() == dev && mount.is_bind())
    }

    fn enter_cgroups(&self, pid: Option<i32>) -> io::Result<()> {
        if pid.is_none() {
            self.await_release()?;
        }
        self.namespaces.unshare_cgroup().map_err(io::Error::other)
    }

    /// Waits until the parent lets this process go on; returns the process's id in the parent's eyes.
    fn await_release(&self) -> io::Result<i32> {
        let Some(released) = self.entry.released else { return Ok(0) };
        let mut pid = [0; 4];
        match rustix::io::retry_on_intr(|| rustix::io::read(released, &mut pid))? {
            4 => Ok(i32::from_le_bytes(pid)),
            _ => Err(io::Error::other("the parent process gave up")),
        }
    }

    fn set_up_files(&self, root: BorrowedFd<'_>) -> Result<(), InitError> {
        let is_own_dev = self.makes_dev();
        if is_own_dev && !self.binds_devices {
            devices::create(root, self.listed_devices())?;
        }
        if let Some(socket) = self.console_socket.filter(|_| cfg!(feature = "terminal")) {
            console::set_up(root, self.entry.process, is_own_dev, socket)?;
        }
        mounts::close_filled(root, self.mounts)?;
        // From a user namespace, it is the parent who has to put it into force.
        if !self.namespaces.has_user() {
            self.device_guard.map_or(Ok(()), DeviceGuard::enforce)?;
        }
        let cwd = self.entry.process.cwd();
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

    fn hook_state(&self) -> Option<HookState<'_>> {
        self.hook_state.filter(|_| cfg!(feature = "hooks"))
    }

    fn run_start_hooks(&self, pid: Option<i32>, env: &[CString]) -> Result<(), InitError> {
        let listed = self.spec.hooks().as_ref().and_then(|hooks| hooks.start_container().as_deref());
        match (listed, self.hook_state(), pid) {
            (Some(listed), Some(state), Some(pid)) => {
                self.entry.run_confined_hooks("startContainer", listed, &state(pid, "created"), env)
            }
            _ => Ok(()),
        }
    }
}
