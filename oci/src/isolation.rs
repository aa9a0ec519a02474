//! What stands between a container and the host. The verbs are the same whatever it is: directory, record, gate, hooks
//! and the host's cgroup are theirs; how processes come to be, and how they are reached, is here.

use std::{
    fmt::Debug,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use cloche_runtime::{
    Container, Created, ExitStatus, HookState, Join, Joined, Launch, Listener, Oci, Rootfs, Stdio,
    cgroup::Cgroup,
};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources, Process, Spec};

use crate::{
    error::{Error, system},
    process::ProcessId,
    state::Known,
};

/// A container's first process, to be made.
pub struct First<'a> {
    /// The container's id.
    pub id: &'a str,
    /// Its configuration.
    pub spec: &'a Spec,
    /// Its root file system's directory.
    pub rootfs: &'a Path,
    /// The container's directory, for what an isolation needs to find again.
    pub directory: &'a Path,
    /// As [`Oci::gate`].
    pub gate: Option<BorrowedFd<'a>>,
    /// What becomes its stdio, if it has no terminal.
    pub stdio: Stdio,
    /// As [`Oci::console_socket`].
    pub console_socket: Option<BorrowedFd<'a>>,
    /// As [`Oci::preserved_fds`].
    pub preserved_fds: &'a [i32],
    /// As [`Oci::keep_keyring`].
    pub keep_keyring: bool,
    /// As [`Oci::keep_groups`].
    pub keep_groups: bool,
    /// As [`Oci::created`].
    pub created: Created<'a>,
    /// As [`Oci::hook_state`].
    pub hook_state: HookState<'a>,
    /// As [`Oci::listener`].
    pub listener: Listener<'a>,
    /// Called with warnings.
    pub warn: &'a dyn Fn(&str),
}

/// A further process of a container, to be made.
pub struct Further<'a> {
    /// The container.
    pub known: &'a Known,
    /// Its configuration.
    pub spec: &'a Spec,
    /// The container's first process, and its descriptor.
    pub first: ProcessId,
    #[allow(missing_docs)]
    pub pidfd: BorrowedFd<'a>,
    /// What to run.
    pub process: &'a Process,
    /// Cgroups below the container's to run in, as [`Cgroup::below`] has them; none for the container's own.
    pub cgroup: &'a [String],
    /// What becomes its stdio, if it has no terminal.
    pub stdio: Stdio,
    /// Gets its terminal.
    pub console_socket: Option<BorrowedFd<'a>>,
    /// Descriptors that it keeps.
    pub preserved_fds: &'a [i32],
    /// As [`Oci::listener`].
    pub listener: Listener<'a>,
    /// Called with warnings.
    pub warn: &'a dyn Fn(&str),
}

/// A process of the host that stands for one of a container: engines signal it, and wait for it. It ends as that does.
pub trait Child {
    /// Its id.
    fn pid(&self) -> i32;
    /// Readable once it has ended.
    fn pidfd(&self) -> BorrowedFd<'_>;
    /// Waits for its end.
    fn wait(&mut self) -> Result<ExitStatus, Error>;
    /// Ends it, if it is a container's first process, and all others of the container.
    fn discard(self: Box<Self>);
}

/// A process inside of a container, as `ps` tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inside {
    /// Its id, where the container's kernel runs.
    pub pid: i32,
    /// What else the host cannot look up.
    pub seen: Option<Seen>,
}

/// What the container's own kernel says of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Seen {
    pub uid: u32,
    pub parent: i32,
    pub command: String,
}

/// An isolation.
pub trait Isolation: Debug {
    /// What this runtime is called with it.
    fn name(&self) -> &'static str;

    /// Whether processes of the host enter the containers.
    fn enters_containers(&self) -> bool;

    /// Makes a container's first process, in the container's cgroup on the host, and returns once it waits at the gate,
    /// or runs if there is none. After an error nothing of it is left.
    fn launch(&self, first: First<'_>) -> Result<Box<dyn Child>, Error>;

    /// Makes a further process, and returns once it runs.
    fn join(&self, further: Further<'_>) -> Result<Box<dyn Child>, Error>;

    /// Sends a signal to a container's first process, whose pidfd this is.
    fn signal(&self, known: &Known, pidfd: BorrowedFd<'_>, signo: i32) -> Result<(), Error>;

    /// Sends a signal to all processes of a container.
    fn signal_all(&self, known: &Known, signo: i32) -> Result<(), Error>;

    /// The processes of a container.
    fn processes(&self, known: &Known) -> Result<Vec<Inside>, Error>;

    /// Takes back what a container, of which no process is left, has of the host but for its cgroup.
    fn give_back(&self, known: &Known) -> Result<(), Error> {
        let _ = known;
        Ok(())
    }

    /// Has all processes of a container stand still. Its cgroup on the host does, too: by that it is seen.
    fn pause(&self, known: &Known) -> Result<(), Error> {
        Ok(known.cgroup()?.freeze()?)
    }

    /// Lets them go on.
    fn resume(&self, known: &Known) -> Result<(), Error> {
        Ok(known.cgroup()?.thaw()?)
    }

    /// Changes limits of a container; `cgroup` is the host's.
    fn update(&self, known: &Known, cgroup: &mut Cgroup, resources: &LinuxResources) -> Result<(), Error>;
}

/// Namespaces and cgroups of the host's own kernel.
#[derive(Debug)]
pub struct OnHost;

impl Isolation for OnHost {
    fn name(&self) -> &'static str {
        "cloche-container"
    }

    fn enters_containers(&self) -> bool {
        true
    }

    fn launch(&self, first: First<'_>) -> Result<Box<dyn Child>, Error> {
        let container = cloche_runtime::launch(Launch {
            id: first.id,
            spec: &denying_devices(first.spec),
            user: None,
            filter: None,
            rootfs: Rootfs::Directory(first.rootfs.to_owned()),
            stdio: first.stdio,
            kill_on_parent_death: false,
            approve: None,
            oci: Oci {
                patience: None,
                gate: first.gate,
                console_socket: first.console_socket,
                preserved_fds: first.preserved_fds,
                keep_groups: first.keep_groups,
                keep_keyring: first.keep_keyring,
                created: Some(first.created),
                hook_state: Some(first.hook_state),
                listener: Some(first.listener),
                warn: Some(first.warn),
            },
        })?;
        Ok(Box::new(container))
    }

    fn join(&self, further: Further<'_>) -> Result<Box<dyn Child>, Error> {
        let own = further.known.cgroup()?;
        let cgroup = if further.cgroup.is_empty() { own } else { own.below(further.cgroup)? };
        let linux = further.spec.linux().as_ref();
        let joined = cloche_runtime::join(Join {
            patience: None,
            id: further.known.id(),
            pid: further.first.pid,
            pidfd: further.pidfd,
            process: further.process,
            seccomp: linux.and_then(|linux| linux.seccomp().as_ref()),
            filter: None,
            personality: linux.and_then(|linux| linux.personality().as_ref()),
            cgroup: &cgroup,
            stdio: further.stdio,
            console_socket: further.console_socket,
            preserved_fds: further.preserved_fds,
            keep_keyring: false,
            listener: Some(further.listener),
            warn: Some(further.warn),
        })?;
        Ok(Box::new(joined))
    }

    fn signal(&self, known: &Known, pidfd: BorrowedFd<'_>, signo: i32) -> Result<(), Error> {
        // Itself in any case: a plain user's container may have no cgroup.
        let sent = cloche_runtime::send_signal(pidfd, signo);
        if signo == libc::SIGKILL && shares_pids(&known.spec()?) {
            known.cgroup()?.kill_all()?;
        }
        match sent {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                Err(Error::NotRunning(known.id().to_owned(), "stopped"))
            }
            result => result.map_err(system("send the signal")),
        }
    }

    fn signal_all(&self, known: &Known, signo: i32) -> Result<(), Error> {
        // Also where the first process is gone: others may be left, if they have no PID namespace to die with.
        let cgroup = known.cgroup()?;
        if cgroup.is_nowhere() {
            cloche_runtime::cgroup::signal(&listed(known, &cgroup)?, signo)?;
        }
        Ok(cgroup.signal_all(signo)?)
    }

    fn processes(&self, known: &Known) -> Result<Vec<Inside>, Error> {
        let pids = listed(known, &known.cgroup()?)?;
        Ok(pids.into_iter().map(|pid| Inside { pid, seen: None }).collect())
    }

    fn update(&self, known: &Known, cgroup: &mut Cgroup, resources: &LinuxResources) -> Result<(), Error> {
        Ok(cgroup.update(&known.record.cgroup, resources)?)
    }
}

/// What a configuration says of devices, as engines mean it: an exception from a ban. runc begins with it whether or not
/// the list does, and whether or not there is one (crun, where there is one).
fn denying_devices(spec: &Spec) -> Spec {
    let mut spec = spec.clone();
    if let Some(linux) = spec.linux_mut() {
        let mut resources = linux.resources().clone().unwrap_or_default();
        let mut ban = LinuxDeviceCgroup::default();
        ban.set_allow(false).set_access(Some("rwm".into()));
        let listed = resources.devices().iter().flatten().cloned();
        resources.set_devices(Some(std::iter::once(ban).chain(listed).collect()));
        linux.set_resources(Some(resources));
    }
    spec
}

/// Those of its cgroup. A plain user's container has none where no cgroup is the user's; then, those of its PID namespace,
/// if that is its own, else the first one alone.
fn listed(known: &Known, cgroup: &Cgroup) -> Result<Vec<i32>, Error> {
    if !cgroup.is_nowhere() {
        return Ok(cgroup.processes()?);
    }
    let Some(first) = known.alive() else { return Ok(Vec::new()) };
    Ok(if shares_pids(&known.spec()?) { vec![first.pid] } else { first.with_its_namespace() })
}

/// Whether its processes do not die with the first one.
fn shares_pids(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let pid = namespaces.and_then(|namespaces| {
        namespaces.iter().find(|one| one.typ() == oci_spec::runtime::LinuxNamespaceType::Pid)
    });
    pid.is_none_or(|pid| pid.path().is_some())
}

impl Child for Container {
    fn pid(&self) -> i32 {
        self.pid()
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd()
    }

    fn wait(&mut self) -> Result<ExitStatus, Error> {
        Ok(cloche_runtime::wait_for(self.pidfd(), self.pid())?)
    }

    fn discard(self: Box<Self>) {
        let _ = self.delete();
    }
}

impl Child for Joined {
    fn pid(&self) -> i32 {
        self.pid()
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd()
    }

    fn wait(&mut self) -> Result<ExitStatus, Error> {
        Ok(Joined::wait(self)?)
    }

    fn discard(self: Box<Self>) {
        let _ = cloche_runtime::send_signal(self.pidfd().as_fd(), libc::SIGKILL);
    }
}
