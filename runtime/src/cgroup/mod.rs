//! Control groups on v1, hybrid and v2: making one, limiting it, asking it, killing and removing it.
//!
//! A [`Cgroup`] is one path, e.g. `/cloche/ID`, in every hierarchy that matters for it. On v2 that is one
//! directory, into which `clone3` puts the container's process. On v1 it is one directory for each controller in
//! use, which the process is moved into; on a hybrid machine the v2 hierarchy beside them is used for killing.
//!
//! Hierarchies are expected where systemd, Docker and everybody else mount them: under `/sys/fs/cgroup`.

mod device_bpf;
mod device_policy;
mod files;
mod freezer;
mod limits;
mod oom;
mod removal;
mod usage;
mod v1;
mod v2;

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::LinuxResources;

pub use device_policy::DeviceRuleError;
pub use freezer::thaw_process;
use limits::Limits;
pub use oom::OomWatch;
use removal::Busy;
pub use removal::signal;
pub use usage::Usage;
pub(crate) use v1::SYSTEMD;

use crate::user_namespace;

const ROOT: &str = "/sys/fs/cgroup";

/// How the machine's cgroup hierarchies are laid out under `/sys/fs/cgroup`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One hierarchy for each controller.
    V1,
    /// As [`Layout::V1`], with a v2 hierarchy beside them at `/sys/fs/cgroup/unified`.
    Hybrid,
    /// The one unified hierarchy.
    V2,
}

/// Why a cgroup operation failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// There are no cgroup hierarchies where they are expected.
    #[error("no cgroup file system at {ROOT}; mount one there: mount -t cgroup2 cgroup2 {ROOT}")]
    NotMounted,
    /// The path cannot name a container's cgroup.
    #[error("the cgroup path {0:?} is not usable; it must be absolute, below the root, and without `..`")]
    Path(PathBuf),
    /// A limit's controller is not there.
    #[error(
        "the limit {limit} needs the cgroup controller `{controller}`, which this machine does not offer{reason}"
    )]
    NoController {
        /// The controller's name.
        controller: String,
        /// The spec's field.
        limit: &'static str,
        /// What is known about why, starting with `: `, or nothing.
        reason: String,
    },
    /// A limit cannot be expressed on this machine.
    #[error("the limit {limit} is not possible here: {reason}")]
    Limit {
        /// The spec's field, with its value.
        limit: String,
        /// Why.
        reason: &'static str,
    },
    /// This user may make no cgroup.
    #[error(
        "the limit {limit} needs a cgroup, and this user may make none{reason}; on a machine with cgroup v2 and \
         systemd, start it by `systemd-run --user --scope -p Delegate=yes …`"
    )]
    NotDelegated {
        /// The spec's field.
        limit: &'static str,
        /// Where one was to be made, and what the kernel said, starting with `: `.
        reason: String,
    },
    /// This user's container has no cgroup.
    #[error("there is no cgroup, since the user who started it may make none: nothing can {0}")]
    Nowhere(&'static str),
    /// A device rule cannot be enforced.
    #[error(transparent)]
    DeviceRule(#[from] DeviceRuleError),
    /// The kernel refused the device program.
    #[error("cannot {action} the program that enforces linux.resources.devices; it needs CONFIG_CGROUP_BPF")]
    DeviceProgram {
        /// What was attempted.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Processes or cgroups of somebody else are in it.
    #[error(
        "the container's cgroup is not empty: {0} has processes or cgroups of somebody else; is a container of this id \
         still running?"
    )]
    InUse(PathBuf),
    /// Another container's cgroup is below, which would stand still with it.
    #[error("another container has its cgroup in {path}, {tenant}: freezing one would freeze both")]
    Shared {
        /// The cgroup.
        path: PathBuf,
        /// The name of the one in it.
        tenant: String,
    },
    /// Whatever went into it would stand still.
    #[error(
        "the container's cgroup unexpectedly frozen: {0} was frozen by somebody else; thaw it, or that above it, or \
         remove it"
    )]
    Frozen(PathBuf),
    /// No cgroup below the container's.
    #[error("{0} is not a sub cgroup path: it must name a cgroup below the container's, without `..`")]
    NotBelow(String),
    /// A cgroup below the container's that is not there.
    #[error(
        "failed adding pid of the process to {0}/cgroup.procs: no such file or directory; make that cgroup first"
    )]
    NothingBelow(PathBuf),
    /// A hierarchy that the container has no cgroup in.
    #[error("unknown controller {controller:?} of the cgroup {asked:?}; {known}")]
    UnknownController {
        /// The controller's name.
        controller: String,
        /// What was asked for.
        asked: String,
        /// Which ones there are.
        known: String,
    },
    /// There is nothing to freeze with.
    #[error("this kernel cannot freeze the cgroup {0}; it needs Linux 5.2 with cgroup v2, or the v1 freezer")]
    NoFreezer(PathBuf),
    /// Processes did not stop.
    #[error("processes of the cgroup {path} did not {action} within {} s", freezer::PATIENCE.as_secs())]
    Stubborn {
        /// What they should have done.
        action: &'static str,
        /// The cgroup.
        path: PathBuf,
    },
    /// A file or directory of the cgroup file system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was attempted.
        action: String,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// In which v1 hierarchies a container gets a cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breadth {
    /// In those that its limits need, and those that tell of it: each costs a part of a start.
    Needed,
    /// In all, as engines expect who read a container's statistics there themselves.
    All,
}

impl Layout {
    /// Finds out how hierarchies are mounted.
    pub fn detect() -> Result<Self, CgroupError> {
        if files::is_cgroup2(Path::new(ROOT)) {
            Ok(Self::V2)
        } else if !cfg!(feature = "cgroup-v1") {
            Err(CgroupError::NotMounted)
        } else if files::is_cgroup2(&Path::new(ROOT).join("unified")) {
            Ok(Self::Hybrid)
        } else if v1::any_hierarchy(Path::new(ROOT)) {
            Ok(Self::V1)
        } else {
            Err(CgroupError::NotMounted)
        }
    }
}

/// Below which path the caller may make cgroups: the machine's root at the top, a plain user below the cgroup that it is
/// in, if there is one hierarchy only and somebody has given that cgroup to it.
pub fn own_base() -> PathBuf {
    let top = PathBuf::from("/");
    if user_namespace::is_machine_root() || !matches!(Layout::detect(), Ok(Layout::V2)) {
        return top;
    }
    let listed = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    listed.lines().find_map(|line| line.strip_prefix("0::")).map_or(top, PathBuf::from)
}

/// One container's cgroup, in every hierarchy where it has one.
#[derive(Debug)]
pub struct Cgroup {
    /// Its directory in the v2 hierarchy.
    unified: Option<PathBuf>,
    /// Its directories in v1 hierarchies.
    v1: Vec<v1::Directory>,
    layout: Layout,
}

/// A hierarchy as a container's cgroup mount shows it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct View<'a> {
    /// The controllers of a v1 hierarchy, e.g. `cpu,cpuacct`; `None` for v2.
    pub(crate) controllers: Option<&'a str>,
    /// The container's own directory on the caller's side.
    pub(crate) directory: &'a Path,
}

/// A device policy that is not in force yet: to make its own files, the process may need devices that it must not
/// have afterwards.
#[derive(Debug)]
pub(crate) enum DeviceGuard {
    V1 { devices: OwnedFd, lines: Vec<(&'static str, String)> },
    V2 { cgroup: OwnedFd, program: OwnedFd },
}

/// The ways into a cgroup's v1 directories; `clone3` does not put a process there.
#[derive(Debug)]
pub struct Entrances(Vec<OwnedFd>);

impl Entrances {
    /// Has the calling process, which must have one thread, go in. A thread that moves itself waits for nobody; who is
    /// moved by another, or moves a process as a whole, first waits for RCU, some 10 ms (Linux 5.5 and later,
    /// `kernel/cgroup/cgroup.c`: `cgroup_procs_write_start`).
    pub fn enter(&self) -> io::Result<()> {
        self.0.iter().try_for_each(|tasks| Ok(rustix::io::write(tasks, b"0").map(drop)?))
    }
}

impl DeviceGuard {
    /// Puts it into force, without need of any path.
    pub(crate) fn enforce(&self) -> Result<(), CgroupError> {
        match self {
            Self::V1 { devices, lines } => {
                lines.iter().try_for_each(|(file, value)| files::write_at(devices.as_fd(), file, value))
            }
            Self::V2 { cgroup, program } => device_bpf::attach(cgroup.as_fd(), program.as_fd()),
        }
    }
}

impl Cgroup {
    /// Makes the cgroup of this path (absolute within the hierarchies), its parents included, and sets the
    /// limits, device rules excepted. If that fails, nothing but possibly parents is left.
    ///
    /// A plain user who may make none there gets one without any directory, unless there are limits. Device rules do not
    /// count: such a user's container has its user namespace's devices only, which are those that are mounted in it.
    pub fn create(
        path: &Path,
        resources: Option<&LinuxResources>,
        breadth: Breadth,
    ) -> Result<Self, CgroupError> {
        let limits = Limits::from_spec(resources)?;
        let relative = relative(path)?;
        let layout = Layout::detect()?;
        let mut made = Self { unified: None, v1: Vec::new(), layout };
        let result = made.fill(&relative, &limits, breadth);
        if result.is_err() {
            // The first failure is what the caller has to know.
            let _ = removal::remove(made.paths(), Busy::Wait);
        }
        match result {
            Err(error) if is_refusal(&error) && !user_namespace::is_machine_root() => {
                let wanted = limits.controllers();
                let Some((_, limit)) = wanted.first() else {
                    return Ok(Self { unified: None, v1: Vec::new(), layout });
                };
                let cause =
                    std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
                Err(CgroupError::NotDelegated { limit, reason: format!(": {error}{cause}") })
            }
            result => result.map(|()| made),
        }
    }

    /// Whether such a cgroup could be made, as far as path and limits tell.
    pub fn check(path: &Path, resources: Option<&LinuxResources>) -> Result<(), CgroupError> {
        relative(path)?;
        Limits::from_spec(resources).map(drop)
    }

    fn fill(&mut self, relative: &Path, limits: &Limits, breadth: Breadth) -> Result<(), CgroupError> {
        let wanted = |needed: &'static [&'static str]| match breadth {
            Breadth::Needed => needed,
            Breadth::All => &v1::CONTROLLERS,
        };
        match self.layout {
            Layout::V2 => self.unified = Some(v2::create(Path::new(ROOT), relative, limits)?),
            Layout::Hybrid => {
                self.unified = Some(v2::create_bare(&Path::new(ROOT).join("unified"), relative)?);
                v1::create(Path::new(ROOT), relative, limits, wanted(&v1::WANTED), &mut self.v1)?;
            }
            Layout::V1 => {
                v1::create(Path::new(ROOT), relative, limits, wanted(&v1::WANTED_ALONE), &mut self.v1)?
            }
        }
        self.apply_limits(limits)
    }

    /// From now on hitting the memory limit ends all processes in it and below it, not whichever the kernel picks: for a
    /// sandbox, which is one thing. Where cgroups are v1's, see [`Cgroup::oom_event`].
    pub fn end_as_a_whole(&self) -> Result<(), CgroupError> {
        match (self.layout, &self.unified) {
            (Layout::V2, Some(unified)) => {
                files::write_if_present(unified, "memory.oom.group", "1").map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Changes the limits of a running container. Limits that `resources` does not mention stay as they are.
    /// The device policy of a running container cannot be changed.
    pub fn apply(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        if resources.devices().as_ref().is_some_and(|rules| !rules.is_empty()) {
            return Err(CgroupError::Limit {
                limit: "linux.resources.devices".into(),
                reason: "device rules are fixed when the container starts",
            });
        }
        self.apply_limits(&Limits::from_spec(Some(&self.with_present_memory(resources)))?)
    }

    /// Memory and swap together mean nothing without memory, which stays what it is.
    fn with_present_memory(&self, resources: &LinuxResources) -> LinuxResources {
        let mut resources = resources.clone();
        if let Some(mut memory) = *resources.memory()
            && memory.swap().is_some()
            && memory.limit().is_none()
        {
            let present = self.usage().memory_limit_bytes.and_then(|bytes| i64::try_from(bytes).ok());
            memory.set_limit(present);
            resources.set_memory(Some(memory));
        }
        resources
    }

    /// As [`Cgroup::apply`], for a container whose cgroup is at `path`. On v2 it gets the controllers that it lacks. In v1
    /// hierarchies, where a container has a cgroup only if a limit needed it, what is missing is made now, and all of its
    /// processes are moved there.
    pub fn update(&mut self, path: &Path, resources: &LinuxResources) -> Result<(), CgroupError> {
        let resources = &self.with_present_memory(resources);
        let limits = Limits::from_spec(Some(resources))?;
        if self.layout == Layout::V2 {
            v2::hand_down(Path::new(ROOT), &relative(path)?, &limits)?;
        } else {
            let present = self.v1.len();
            let processes = self.processes()?;
            let made = v1::create(Path::new(ROOT), &relative(path)?, &limits, &[], &mut self.v1);
            let moved = made.and_then(|()| {
                let new = self.v1.iter().skip(present);
                new.flat_map(|new| processes.iter().map(move |pid| (new, pid))).try_for_each(|(new, pid)| {
                    match files::write(new.path(), "cgroup.procs", &pid.to_string()) {
                        // It has ended meanwhile.
                        Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(libc::ESRCH) => {
                            Ok(())
                        }
                        result => result,
                    }
                })
            });
            moved?;
        }
        self.apply(resources)
    }

    fn apply_limits(&self, limits: &Limits) -> Result<(), CgroupError> {
        match (self.layout, &self.unified) {
            (Layout::V2, Some(unified)) => v2::apply(unified, limits),
            _ => v1::apply(&self.v1, limits),
        }
    }

    /// The cgroup of this path as it exists now, in whichever hierarchies it exists; possibly none. For cleaning
    /// up after a process that was killed.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        let relative = relative(path)?;
        let layout = Layout::detect()?;
        let unified = match layout {
            Layout::V1 => None,
            Layout::Hybrid => Some(Path::new(ROOT).join("unified").join(&relative)),
            Layout::V2 => Some(Path::new(ROOT).join(&relative)),
        };
        let v1 = if layout == Layout::V2 { Vec::new() } else { v1::open(Path::new(ROOT), &relative) };
        Ok(Self { unified: unified.filter(|unified| unified.is_dir()), v1, layout })
    }

    /// Which directories these are, as nobody else's at the same path will be: device and inode of each. The kernel does
    /// not use an inode number of a cgroup again while it runs.
    pub fn identity(&self) -> Vec<(u64, u64)> {
        self.paths().filter_map(directory_identity).collect()
    }

    /// As [`Cgroup::open`], less the directories that are not among these of [`Cgroup::identity`]: somebody else's.
    pub fn open_known(path: &Path, identity: &[(u64, u64)]) -> Result<Self, CgroupError> {
        let is_known =
            |directory: &Path| directory_identity(directory).is_some_and(|found| identity.contains(&found));
        let mut opened = Self::open(path)?;
        opened.unified = opened.unified.filter(|unified| is_known(unified));
        opened.v1.retain(|v1| is_known(v1.path()));
        Ok(opened)
    }

    /// The directory, of those that exist, that has processes or cgroups of somebody in it.
    pub fn in_use(&self) -> Option<&Path> {
        self.paths().find(|directory| removal::is_in_use(directory))
    }

    /// Marks it as that of a container which is in another's cgroup, or in that of somebody's processes. From then on, what
    /// kills, lists or removes the outer one leaves this alone.
    pub fn mark_as_tenant(&self) -> Result<(), CgroupError> {
        self.paths().try_for_each(removal::mark_as_tenant)
    }

    /// Whether it has no directory in any hierarchy: a plain user may make none.
    pub fn is_nowhere(&self) -> bool {
        self.paths().next().is_none()
    }

    /// Cgroups below this one, which must be there already: each `[CONTROLLER,…:]PATH`. Where no controller is named, in
    /// all hierarchies that no other of them names.
    pub fn below(&self, asked: &[impl AsRef<str>]) -> Result<Self, CgroupError> {
        let mut everywhere = None;
        let mut named: Vec<(&str, &str)> = Vec::new();
        for asked in asked.iter().map(AsRef::as_ref) {
            let (controllers, path) =
                asked.split_once(':').map_or((None, asked), |(controllers, path)| (Some(controllers), path));
            let is_inside = Path::new(path)
                .components()
                .all(|part| matches!(part, Component::Normal(_) | Component::RootDir));
            if !is_inside {
                return Err(CgroupError::NotBelow(path.into()));
            }
            let Some(controllers) = controllers else {
                everywhere = Some(path);
                continue;
            };
            for controller in controllers.split(',') {
                if v1::of(&self.v1, controller).is_none() {
                    let listed: Vec<_> = self.v1.iter().map(v1::Directory::controllers).collect();
                    let known = if listed.is_empty() {
                        "there is one hierarchy for all, so name none".to_owned()
                    } else {
                        format!("the container has {}", listed.join(" "))
                    };
                    let controller = controller.to_owned();
                    return Err(CgroupError::UnknownController { controller, asked: asked.into(), known });
                }
                named.push((controller, path));
            }
        }
        let enter = |directory: &Path, path: &str| {
            let below = directory.join(path.trim_start_matches('/'));
            if below.is_dir() { Ok(below) } else { Err(CgroupError::NothingBelow(below)) }
        };
        let unified = match (&self.unified, everywhere) {
            (Some(unified), Some(path)) => match enter(unified, path) {
                // Nothing is limited there if there are other hierarchies.
                Err(_) if self.layout == Layout::Hybrid => Some(unified.clone()),
                result => Some(result?),
            },
            (unified, _) => unified.clone(),
        };
        let mut v1 = Vec::with_capacity(self.v1.len());
        for directory in &self.v1 {
            let own = named.iter().rev().find(|(controller, _)| directory.has(controller));
            let path = own.map(|(_, path)| *path).or(everywhere).unwrap_or_default();
            v1.push(directory.replaced(enter(directory.path(), path)?));
        }
        Ok(Self { unified, v1, layout: self.layout })
    }

    /// Its directories, one for each hierarchy.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.unified.as_deref().into_iter().chain(self.v1.iter().map(v1::Directory::path))
    }

    /// The hierarchies that a cgroup mount in the container shows.
    pub(crate) fn views(&self) -> impl Iterator<Item = View<'_>> {
        let unified = self.unified.as_deref().map(|directory| View { controllers: None, directory });
        let v1 = self.v1.iter().map(|v1| View { controllers: Some(v1.controllers()), directory: v1.path() });
        unified.into_iter().chain(v1)
    }

    /// Readies the device policy to be put into force by the process itself, once it needs no more devices.
    pub(crate) fn device_guard(
        &self,
        resources: Option<&LinuxResources>,
    ) -> Result<Option<DeviceGuard>, CgroupError> {
        let Some(policy) = Limits::from_spec(resources)?.devices else { return Ok(None) };
        if self.layout == Layout::V2 && !user_namespace::is_machine_root() {
            // Only the machine's root may load programs of this kind; see `create`.
            return Ok(None);
        }
        Ok(match (self.layout, &self.unified, v1::of(&self.v1, "devices")) {
            (Layout::V2, Some(unified), _) => Some(DeviceGuard::V2 {
                cgroup: files::open_directory(unified)?,
                program: device_bpf::load(&policy)?,
            }),
            (_, _, Some(devices)) => Some(DeviceGuard::V1 {
                devices: files::open_directory(devices)?,
                lines: v1::device_lines(&policy),
            }),
            _ => None,
        })
    }

    /// How hierarchies are laid out on this machine.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The v2 directory, for `CLONE_INTO_CGROUP`.
    pub fn clone_target(&self) -> Result<Option<OwnedFd>, CgroupError> {
        self.unified.as_deref().map(files::open_directory).transpose()
    }

    /// Opens the ways into its v1 directories, for a process that will have no paths to them.
    pub fn entrances(&self) -> Result<Entrances, CgroupError> {
        let open = |v1: &v1::Directory| files::open_to_write(v1.path(), "tasks");
        Ok(Entrances(self.v1.iter().map(open).collect::<Result<_, _>>()?))
    }

    /// On v1: an eventfd that becomes readable when the memory limit is hit. On v2 the kernel itself can be told to kill the
    /// whole cgroup then ([`Cgroup::end_as_a_whole`]).
    pub(crate) fn oom_event(&self) -> Result<Option<OwnedFd>, CgroupError> {
        v1::of(&self.v1, "memory").map(v1::oom_event).transpose()
    }

    /// News of processes killed for want of memory.
    pub fn watch_oom(&self) -> Result<OomWatch, CgroupError> {
        OomWatch::new(self)
    }

    /// The directory that has a controller's files, if it has one.
    pub fn directory_of(&self, controller: &str) -> Option<PathBuf> {
        let unified = self.unified.as_deref().filter(|_| self.layout == Layout::V2);
        unified.or(v1::of(&self.v1, controller)).map(Path::to_owned)
    }

    /// Its directory in the v2 hierarchy.
    pub fn unified_directory(&self) -> Option<&Path> {
        self.unified.as_deref()
    }

    /// Where the v2 hierarchy is mounted, if there is one.
    pub(crate) fn unified_root(&self) -> PathBuf {
        let root = Path::new(ROOT);
        if self.layout == Layout::V2 { root.to_owned() } else { root.join("unified") }
    }

    /// How many processes the kernel has killed because the memory limit was hit.
    pub fn oom_kills(&self) -> u64 {
        match (self.layout, &self.unified, v1::of(&self.v1, "memory")) {
            (Layout::V2, Some(unified), _) => files::read_field(unified, "memory.events", "oom_kill"),
            (_, _, Some(memory)) => files::read_field(memory, "memory.oom_control", "oom_kill"),
            _ => None,
        }
        .unwrap_or(0)
    }

    /// Highest memory use in bytes since it was made; `None` where the kernel does not tell (v2 before Linux 5.19,
    /// or no memory controller).
    pub fn memory_peak_bytes(&self) -> Option<u64> {
        match (self.layout, &self.unified, v1::of(&self.v1, "memory")) {
            (Layout::V2, Some(unified), _) => files::read_number(unified, "memory.peak"),
            (_, _, Some(memory)) => files::read_number(memory, "memory.max_usage_in_bytes"),
            _ => None,
        }
    }

    /// Kills every process in it and below it, but no tenant's.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        match &self.unified {
            Some(unified)
                if unified.join("cgroup.kill").exists() && removal::tenant_in(unified).is_none() =>
            {
                match files::write(unified, "cgroup.kill", "1") {
                    // Somebody else removes it at the same time.
                    Err(CgroupError::Io { source, .. })
                        if matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) =>
                    {
                        Ok(())
                    }
                    result => result,
                }
            }
            _ => self.paths().try_for_each(removal::kill_listed),
        }
    }

    /// Sends a signal to every process in it and below it.
    pub fn signal_all(&self, signo: i32) -> Result<(), CgroupError> {
        if signo == libc::SIGKILL { self.kill_all() } else { removal::signal(&self.processes()?, signo) }
    }

    /// The processes in it and below it, in whichever hierarchy lists them; no tenant's.
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut processes: Vec<_> = self.paths().flat_map(removal::listed).collect();
        processes.sort_unstable();
        processes.dedup();
        Ok(processes)
    }

    /// Stops every process in it and below it, and waits until all stand still. They can still be killed.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        freezer::set(self, true)
    }

    /// Lets them go on.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        freezer::set(self, false)
    }

    /// Whether its processes stand still.
    pub fn is_frozen(&self) -> bool {
        freezer::is_frozen(self)
    }

    /// What its processes use and have used.
    pub fn usage(&self) -> Usage {
        Usage::read(self)
    }

    /// Removes it and whatever is below it. Kills what has come in after [`Cgroup::kill_all`], and waits for the killed to be
    /// gone, but not for ever. As long as a tenant is in it, it stays.
    pub fn delete(self) -> Result<(), CgroupError> {
        removal::remove(self.paths(), Busy::Kill)
    }

    /// Removes those of its directories that nothing is in, without waiting.
    pub fn delete_empty(self) {
        for directory in self.paths() {
            let _ = fs::remove_dir(directory);
        }
    }

    /// Removes those of its directories that are empty, which a maker who was killed may have left. What is in use is
    /// somebody else's.
    pub fn delete_unused(self) {
        self.paths().for_each(removal::remove_unused);
    }
}

/// Whether it is for want of rights.
fn is_refusal(error: &CgroupError) -> bool {
    let CgroupError::Io { source, .. } = error else { return false };
    matches!(source.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS))
}

fn directory_identity(directory: &Path) -> Option<(u64, u64)> {
    fs::metadata(directory).ok().map(|found| (found.dev(), found.ino()))
}

/// The path below a hierarchy's root.
fn relative(path: &Path) -> Result<PathBuf, CgroupError> {
    let relative: Option<PathBuf> = path
        .components()
        .filter(|component| *component != Component::RootDir)
        .map(|component| match component {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    relative
        .filter(|relative| path.is_absolute() && !relative.as_os_str().is_empty())
        .ok_or_else(|| CgroupError::Path(path.to_owned()))
}

/// Makes a container's directory in one hierarchy. An empty one of that name is a leftover whose limits are
/// unknown, so it is made anew; but not if it is frozen, since somebody did that for a reason.
fn make_leaf(directory: &Path) -> Result<(), CgroupError> {
    let made = match fs::create_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if freezer::stands_still(directory) {
                return Err(CgroupError::Frozen(directory.to_owned()));
            }
            fs::remove_dir(directory).and_then(|()| fs::create_dir(directory))
        }
        made => made,
    };
    made.map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY | libc::ENOTEMPTY) => CgroupError::InUse(directory.to_owned()),
        _ => CgroupError::Io { action: "create".into(), path: directory.to_owned(), source },
    })
}

/// As [`make_leaf`], where there is a freezer: a process would stand still in a cgroup below one that is frozen.
fn make_leaf_that_moves(directory: &Path) -> Result<(), CgroupError> {
    make_leaf(directory)?;
    if freezer::stands_still(directory) {
        let _ = fs::remove_dir(directory);
        return Err(CgroupError::Frozen(directory.to_owned()));
    }
    Ok(())
}

/// Makes a directory between the root and a container's, if it is not there yet.
fn make_parent(directory: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(directory) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::Io { action: "create".into(), path: directory.to_owned(), source })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_of_usable_paths_drops_the_root() {
        assert_eq!(relative(Path::new("/cloche/a")).unwrap(), Path::new("cloche/a"));
        assert_eq!(relative(Path::new("//cloche/./a/")).unwrap(), Path::new("cloche/a"));
    }

    #[test]
    fn cgroup_below_is_there_and_inside() {
        let top = tempfile::tempdir().unwrap();
        let own = |hierarchy: &str| {
            let own = top.path().join(hierarchy).join("own");
            fs::create_dir_all(own.join("low")).unwrap();
            own
        };
        let v1 = ["memory", "cpu,cpuacct"].map(|name| v1::Directory::new(name, own(name))).into();
        let cgroup = Cgroup { unified: Some(own("unified")), v1, layout: Layout::Hybrid };
        fs::create_dir(top.path().join("memory/own/alone")).unwrap();
        let below = |asked: &[&str]| {
            let below = cgroup.below(asked)?;
            let name = |path: &Path| path.strip_prefix(top.path()).unwrap().display().to_string();
            Ok(below.paths().map(name).collect::<Vec<_>>())
        };
        assert_eq!(below(&["/"]).unwrap(), ["unified/own", "memory/own", "cpu,cpuacct/own"]);
        assert_eq!(below(&["low"]).unwrap(), ["unified/own/low", "memory/own/low", "cpu,cpuacct/own/low"]);
        assert_eq!(below(&["cpu:low"]).unwrap(), ["unified/own", "memory/own", "cpu,cpuacct/own/low"]);
        let both = ["memory:alone", "low"];
        assert_eq!(below(&both).unwrap(), ["unified/own/low", "memory/own/alone", "cpu,cpuacct/own/low"]);
        let refused = |asked: &str| below(&[asked]).map_err(|error: CgroupError| error).unwrap_err();
        assert!(matches!(refused("../other"), CgroupError::NotBelow(_)));
        assert!(matches!(refused("alone"), CgroupError::NothingBelow(_)));
        assert!(matches!(refused("cpuacct:alone"), CgroupError::NothingBelow(_)));
        assert!(matches!(refused("blkio:low"), CgroupError::UnknownController { .. }));
    }

    #[test]
    fn relative_of_paths_that_could_leave_the_hierarchy_is_refused() {
        for path in ["", "/", "cloche/a", "/cloche/../a", "/..", "."] {
            assert!(matches!(relative(Path::new(path)), Err(CgroupError::Path(_))), "{path:?}");
        }
    }
}
