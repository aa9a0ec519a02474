//! Which fields of the OCI runtime spec this runtime acts on. Every other field is refused by its name, unless it
//! holds a value that asks for nothing: a sandbox never runs with less than what was asked for.
//!
//! Fields that JSON has but the `oci-spec` crate's types lack never get here; runtime-spec `spec.md#extensibility`
//! has runtimes ignore those.

use oci_spec::runtime::{
    Hooks, Linux, LinuxBlockIo, LinuxMemory, LinuxNamespace, LinuxNamespaceType, LinuxResources,
    LinuxSeccomp, LinuxSeccompAction, Process, Spec,
};

use crate::{
    namespaces,
    process::{labels, scheduling::Affinity},
};

/// Why a spec was refused before anything was created.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// The spec asks for something that this runtime does not do.
    #[error("not supported yet: {0}")]
    Unsupported(String),
    /// The spec contradicts itself or lacks what a start needs.
    #[error("the runtime spec is not usable: {0}")]
    Invalid(String),
}

/// Collects refusals; the first one counts.
struct Check(Result<(), SpecError>);

impl Check {
    /// Refuses the field `name` if it asks for something.
    fn refuse(&mut self, name: &str, asked_for: bool) {
        if asked_for && self.0.is_ok() {
            self.0 = Err(SpecError::Unsupported(name.to_owned()));
        }
    }

    fn require(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds && self.0.is_ok() {
            self.0 = Err(SpecError::Invalid(otherwise()));
        }
    }
}

/// Whether an optional list or map holds nothing.
trait Empty {
    fn is_empty_or_absent(&self) -> bool;
}

impl<C> Empty for Option<C>
where
    for<'a> &'a C: IntoIterator,
{
    fn is_empty_or_absent(&self) -> bool {
        self.as_ref().is_none_or(|list| list.into_iter().next().is_none())
    }
}

fn is_set(text: &Option<String>) -> bool {
    text.as_ref().is_some_and(|text| !text.is_empty())
}

/// What the caller of a start has arranged for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Means {
    /// Somebody takes the terminal.
    pub(crate) terminal: bool,
    /// Hooks are run.
    pub(crate) hooks: bool,
    /// Somebody passes on the listener of a seccomp policy.
    pub(crate) listener: bool,
}

/// Refuses a spec that asks for something this runtime would not do for a sandbox; `terminal` is whether somebody takes its
/// terminal.
pub fn check(spec: &Spec, terminal: bool) -> Result<(), SpecError> {
    check_with(spec, Means { terminal, ..Means::default() })
}

/// As [`check_with`], for a process that joins a container.
pub(crate) fn check_process(
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
    means: Means,
) -> Result<(), SpecError> {
    let mut check = Check(Ok(()));
    self::process(&mut check, process, means);
    if let Some(seccomp) = seccomp {
        self::seccomp(&mut check, seccomp, means);
    }
    check.0
}

pub(crate) fn check_with(spec: &Spec, means: Means) -> Result<(), SpecError> {
    let mut check = Check(Ok(()));
    // `root`, `hostname` and `domainname` are acted on; `annotations` are the caller's.
    let version = spec.version();
    check.require(version.starts_with("1."), || format!("ociVersion {version:?} is not 1.x"));
    check.refuse("solaris", spec.solaris().is_some());
    check.refuse("windows", spec.windows().is_some());
    check.refuse("vm", spec.vm().is_some());
    check.refuse("zos", spec.zos().is_some());
    #[allow(deprecated)]
    {
        check.refuse("uidMappings", !spec.uid_mappings().is_empty_or_absent());
        check.refuse("gidMappings", !spec.gid_mappings().is_empty_or_absent());
    }
    if let Some(hooks) = spec.hooks().as_ref().filter(|_| !means.hooks) {
        self::hooks(&mut check, hooks);
    }
    // `mounts` are acted on; see `mounts::options` for what is not.
    match spec.process() {
        Some(process) => self::process(&mut check, process, means),
        None => check.require(false, || "process is missing".into()),
    }
    match spec.linux() {
        Some(linux) => {
            self::linux(&mut check, spec, linux);
            check.refuse("linux.seccomp", linux.seccomp().is_some() && !cfg!(feature = "seccomp-policies"));
            if let Some(seccomp) = linux.seccomp() {
                self::seccomp(&mut check, seccomp, means);
            }
        }
        None => check.require(false, || "linux is missing".into()),
    }
    check.0
}

fn hooks(check: &mut Check, hooks: &Hooks) {
    #[allow(deprecated)]
    check.refuse("hooks.prestart", !hooks.prestart().is_empty_or_absent());
    check.refuse("hooks.createRuntime", !hooks.create_runtime().is_empty_or_absent());
    check.refuse("hooks.createContainer", !hooks.create_container().is_empty_or_absent());
    check.refuse("hooks.startContainer", !hooks.start_container().is_empty_or_absent());
    check.refuse("hooks.poststart", !hooks.poststart().is_empty_or_absent());
    check.refuse("hooks.poststop", !hooks.poststop().is_empty_or_absent());
}

fn process(check: &mut Check, process: &Process, means: Means) {
    // `user`, `args`, `env`, `cwd`, `capabilities`, `rlimits`, `noNewPrivileges`, `oomScoreAdj`, `ioPriority`, `scheduler`,
    // `execCPUAffinity` and, where the machine has them on, labels are acted on.
    // `consoleSize` means nothing without a terminal (config.md: "ignored if terminal is false or unset").
    check.refuse("process.terminal", process.terminal() == Some(true) && !means.terminal);
    check.refuse("process.commandLine", is_set(process.command_line()));
    for (field, value, module, is_on) in [
        (
            "process.apparmorProfile",
            process.apparmor_profile(),
            "AppArmor",
            labels::has_apparmor as fn() -> bool,
        ),
        ("process.selinuxLabel", process.selinux_label(), "SELinux", labels::has_selinux),
    ] {
        let is_possible = !is_set(value) || is_on();
        check.require(is_possible, || format!("{field} is set, and {module} is off on this machine"));
    }
    let both = is_set(process.apparmor_profile()) && is_set(process.selinux_label());
    check.refuse("process.apparmorProfile together with process.selinuxLabel", both);
    if let Some(affinity) = process.exec_cpu_affinity()
        && let Err(error) = Affinity::from_spec(affinity)
    {
        check.require(false, || format!("process.execCPUAffinity: {error}"));
    }
    // Windows only (config.md#user).
    check.refuse("process.user.username", is_set(process.user().username()));
    check.require(process.args().as_ref().is_some_and(|args| !args.is_empty()), || {
        "process.args is empty".into()
    });
    let user = process.user();
    let mut ids =
        [user.uid(), user.gid()].into_iter().chain(user.additional_gids().iter().flatten().copied());
    check.require(!ids.any(|id| id == u32::MAX), || "process.user: 4294967295 is no id".into());
    check.require(process.cwd().is_absolute(), || {
        format!("process.cwd {:?} is not an absolute path", process.cwd())
    });
}

fn linux(check: &mut Check, spec: &Spec, linux: &Linux) {
    // `sysctl`, `cgroupsPath`, `devices`, `maskedPaths` and `readonlyPaths` are acted on.
    check.refuse("linux.netDevices", !linux.net_devices().is_empty_or_absent());
    check.require(!is_set(linux.mount_label()) || labels::has_selinux(), || {
        "linux.mountLabel is set, and SELinux is off on this machine".into()
    });
    check.refuse("linux.intelRdt", linux.intel_rdt().is_some());
    check.refuse("linux.memoryPolicy", linux.memory_policy().is_some());
    let flags = linux.personality().as_ref().and_then(|personality| personality.flags().as_ref());
    check.refuse("linux.personality.flags", flags.is_some_and(|flags| !flags.is_empty()));
    match linux.rootfs_propagation().as_deref() {
        None
        | Some(
            "" | "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" | "unbindable"
            | "runbindable",
        ) => {}
        Some(other) => check.require(false, || format!("linux.rootfsPropagation {other:?} is unknown")),
    }
    if let Some(resources) = linux.resources() {
        self::resources(check, resources);
    }
    self::namespaces(check, spec, linux.namespaces().as_deref().unwrap_or_default());
    let new = |kind| {
        linux.namespaces().iter().flatten().any(|listed| listed.typ() == kind && listed.path().is_none())
    };
    let has_maps = [linux.uid_mappings(), linux.gid_mappings()].map(|maps| !maps.is_empty_or_absent());
    let has_user = linux.namespaces().iter().flatten().any(|listed| listed.typ() == LinuxNamespaceType::User);
    check.refuse("linux.namespaces[user]", has_user && !cfg!(feature = "user-namespaces"));
    if new(LinuxNamespaceType::User) {
        check.require(has_maps == [true, true], || {
            "a new user namespace needs linux.uidMappings and linux.gidMappings".into()
        });
    } else {
        check.require(has_user || has_maps == [false, false], || {
            "linux.uidMappings and linux.gidMappings need a user namespace".into()
        });
    }
    let clocks = linux.time_offsets().iter().flatten();
    check.require(clocks.clone().next().is_none() || new(LinuxNamespaceType::Time), || {
        "linux.timeOffsets needs a new time namespace".into()
    });
    for (clock, _) in clocks {
        check.require(matches!(clock.as_str(), "monotonic" | "boottime"), || {
            format!("linux.timeOffsets has {clock:?}, which is neither monotonic nor boottime")
        });
    }
}

/// `listenerPath` and `listenerMetadata` are the caller's; they ask for nothing without SCMP_ACT_NOTIFY
/// (config-linux.md#seccomp).
fn seccomp(check: &mut Check, seccomp: &LinuxSeccomp, means: Means) {
    let mut actions = seccomp.syscalls().iter().flatten().map(|rule| rule.action());
    let notifies = actions.any(|action| action == LinuxSeccompAction::ScmpActNotify);
    check.refuse("linux.seccomp action SCMP_ACT_NOTIFY", notifies && !means.listener);
    let path = seccomp.listener_path().as_ref().filter(|path| !path.as_os_str().is_empty());
    check.require(!notifies || path.is_some(), || "SCMP_ACT_NOTIFY needs linux.seccomp.listenerPath".into());
}

fn namespaces(check: &mut Check, spec: &Spec, namespaces: &[LinuxNamespace]) {
    let listed = |typ| namespaces.iter().filter(move |namespace| namespace.typ() == typ);
    let mount = listed(LinuxNamespaceType::Mount);
    check.refuse("linux.namespaces[mount].path", mount.clone().any(|mount| mount.path().is_some()));
    check.require(mount.count() > 0, || "linux.namespaces has no mount namespace".into());
    for namespace in namespaces {
        check.require(listed(namespace.typ()).count() == 1, || {
            format!("linux.namespaces lists {} twice", namespace.typ())
        });
    }
    // Without a namespace of its own, the container would rename the caller's machine.
    let is_other = |uts: &LinuxNamespace| {
        uts.path().as_deref().is_none_or(|path| !namespaces::is_own(LinuxNamespaceType::Uts, path))
    };
    for (field, name) in [("hostname", spec.hostname()), ("domainname", spec.domainname())] {
        check.require(!is_set(name) || listed(LinuxNamespaceType::Uts).any(is_other), || {
            format!("{field} is set without a UTS namespace other than the caller's")
        });
    }
}

fn resources(check: &mut Check, resources: &LinuxResources) {
    // `devices`, `pids`, `cpu`, `hugepageLimits`, `network`, `rdma` and `unified` are acted on.
    if let Some(memory) = resources.memory() {
        self::memory(check, memory);
    }
    if let Some(block_io) = resources.block_io() {
        self::block_io(check, block_io);
    }
}

fn memory(check: &mut Check, memory: &LinuxMemory) {
    // All others are acted on; 0 means "not set" for limits.
    #[allow(deprecated)]
    check.refuse("linux.resources.memory.kernel", memory.kernel().is_some_and(|limit| limit != 0));
    // Kernels do nothing else: the file is read-only since Linux 5.11.
    check.refuse("linux.resources.memory.useHierarchy", memory.use_hierarchy() == Some(false));
    check.refuse("linux.resources.memory.checkBeforeUpdate", memory.check_before_update() == Some(true));
}

fn block_io(check: &mut Check, block_io: &LinuxBlockIo) {
    // Weights of leaves are cgroup v1's CFQ scheduler's, which kernels have not had since 5.0.
    let of_device = block_io
        .weight_device()
        .iter()
        .flatten()
        .any(|device| device.leaf_weight().is_some_and(|weight| weight != 0));
    let leaf = block_io.leaf_weight().is_some_and(|weight| weight != 0);
    check.refuse("linux.resources.blockIO.leafWeight", leaf || of_device);
}

#[cfg(test)]
mod tests;
