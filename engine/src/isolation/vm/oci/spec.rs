//! From a bundle's configuration to what a guest gets, what its machine is, and what is left to the host. What a virtual
//! machine cannot do is refused by the field's name.
//!
//! | of the configuration | goes to |
//! |---|---|
//! | root file system, bind mounts of files and directories | the VM's file server, and as binds of its share to the guest |
//! | `linux.resources.{cpu, blockIO, network}` | the container's cgroup on the host, where the VM's processes are |
//! | all other resources | the container's cgroup in the guest; the machine is as large as they need |
//! | a network namespace's path | the host: the VM's processes are in it |
//! | a member of a pod: the paths of its sandbox's namespaces; all resources | the guest, which has both containers |
//! | hooks | the host, but for those that run inside of the container |
//! | everything else | the guest, where the same runtime does it |

use std::{
    fs,
    path::{Path, PathBuf},
};

use cloche_oci::Error;
use cloche_protocol::boot::{FIRST_NAMESPACES, SHARED_MEMORY, share_path};
use cloche_runtime::Filter;
use cloche_share::Shared;
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceType, LinuxMemory, LinuxNamespaceType, LinuxResources, LinuxSeccomp,
    LinuxSeccompAction, Mount, Process, Spec,
};
use rustix::fs::{StatFs, statfs};

use super::pod::{self, Sandbox};
use crate::sources::inherited_flags;

/// A configuration, taken apart.
#[derive(Debug)]
pub(super) struct Split {
    /// For the guest.
    pub(super) guest: Spec,
    /// The guest's system-call filter, in place of its `linux.seccomp`.
    pub(super) filter: Option<Filter>,
    /// For the file server; the first is the root file system.
    pub(super) shares: Vec<Shared>,
    /// For the cgroup on the host.
    pub(super) host: LinuxResources,
    /// Of the container, in bytes.
    pub(super) memory_bytes: Option<u64>,
    /// Of the machine.
    pub(super) vcpus: u64,
    /// The network namespace to be in; `None` is one of its own.
    pub(super) network: Option<PathBuf>,
    /// Of the shared memory that members of its pod have with it.
    pub(super) shared_memory_bytes: Option<u64>,
}

/// Whose machine a container is in.
#[derive(Debug, Clone, Copy)]
pub(super) enum In<'a> {
    /// Its own.
    Own,
    /// Its own, which others may join.
    Pods {
        /// Whether it is known to be a pod's sandbox.
        is_declared: bool,
    },
    /// A sandbox's.
    With(&'a Sandbox),
}

/// The place of the root file system among the shares.
pub(super) const ROOT_SHARE: usize = 0;

/// File systems that need nothing of the host.
const OF_A_KERNEL: [&str; 12] = [
    "proc",
    "sysfs",
    "tmpfs",
    "ramfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "debugfs",
    "tracefs",
    "securityfs",
    "bpf",
];

fn refused<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Request(what.into()))
}

pub(super) fn split(spec: &Spec, rootfs: &Path, place: In<'_>) -> Result<Split, Error> {
    spec.process().as_ref().map_or(Ok(()), check_process)?;
    let mut guest = spec.clone();
    let mut binds = Binds {
        shares: vec![Shared { path: rootfs.to_owned(), recursive: true, read_only: false }],
        first: if let In::With(sandbox) = place { sandbox.first_share } else { 0 },
        place,
        shared_memory_bytes: None,
    };
    let mounts = spec.mounts().iter().flatten().map(|mount| binds.mount(mount));
    guest.set_mounts(Some(mounts.collect::<Result<_, _>>()?)).set_annotations(None);
    if let Some(hooks) = spec.hooks() {
        let inside =
            [("createContainer", hooks.create_container()), ("startContainer", hooks.start_container())];
        if let Some((name, _)) =
            inside.iter().find(|(_, listed)| listed.as_ref().is_some_and(|listed| !listed.is_empty()))
        {
            return refused(format!(
                "hooks.{name} is not supported: it would run inside of the virtual machine, where the host's programs \
                 are not; use createRuntime or poststart"
            ));
        }
        guest.set_hooks(None);
    }
    let mut split = Split {
        guest,
        filter: None,
        shares: binds.shares,
        host: LinuxResources::default(),
        memory_bytes: None,
        vcpus: 1,
        network: None,
        shared_memory_bytes: binds.shared_memory_bytes,
    };
    if let Some(linux) = spec.linux() {
        let linux = split.linux(linux, spec, place)?;
        split.guest.set_linux(Some(linux));
    }
    Ok(split)
}

impl Split {
    /// The guest's section; fills in the rest.
    fn linux(&mut self, linux: &Linux, spec: &Spec, place: In<'_>) -> Result<Linux, Error> {
        let mut guest = linux.clone();
        guest.set_cgroups_path(None);
        self.namespaces(&mut guest, place)?;
        linux.devices().iter().flatten().try_for_each(device)?;
        if let Some(policy) = linux.seccomp() {
            self.filter = Some(filter(policy)?);
            guest.set_seccomp(None);
        }
        let own = linux.resources().clone().unwrap_or_default();
        if let In::With(sandbox) = place {
            guest.set_resources(Some(of_member(&own, &sandbox.id)?));
            return Ok(guest);
        }
        let whole = match place {
            In::Pods { is_declared: true } => pod::resources_of_all(spec, &own)?,
            _ => own.clone(),
        };
        self.memory_bytes = whole
            .memory()
            .as_ref()
            .and_then(|memory| memory.limit())
            .and_then(|bytes| u64::try_from(bytes).ok())
            .filter(|bytes| *bytes > 0);
        let (host, _) = divide(&whole);
        if let Some(cpu) = host.cpu()
            && let Some(quota @ 1..) = cpu.quota()
        {
            // The kernel's own, if none is given (kernel: cgroup-v2.rst, `cpu.max`).
            let period = cpu.period().filter(|period| *period > 0).unwrap_or(100_000);
            self.vcpus = u64::try_from(quota).unwrap_or(1).div_ceil(period).min(host_cpus());
        }
        self.host = host;
        if linux.resources().is_some() {
            guest.set_resources(Some(divide(&own).1));
        }
        Ok(guest)
    }

    /// In the guest, all of them are new, but for a sandbox's.
    fn namespaces(&mut self, guest: &mut Linux, place: In<'_>) -> Result<(), Error> {
        let mut namespaces = guest.namespaces().clone().unwrap_or_default();
        for namespace in &mut namespaces {
            match (namespace.typ(), namespace.path().clone()) {
                (_, None) => {}
                (kind, Some(path)) if let In::With(sandbox) = place => {
                    let Some(name) = sandbox.namespace(kind, &path) else {
                        return refused(format!(
                            "linux.namespaces[{kind}].path {}: a container of a pod can join the pid, network, ipc and uts \
                             namespaces of its sandbox {}, whose process is {}, and no others; leave the path out, or run the \
                             pod with cloche-container",
                            path.display(),
                            sandbox.id,
                            sandbox.pid
                        ));
                    };
                    namespace.set_path(Some(Path::new(FIRST_NAMESPACES).join(name)));
                }
                // Made for the pod by its engine: whoever names the same is in the guest's.
                (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, Some(path))
                    if matches!(place, In::Pods { is_declared: true }) && pod::is_pinned(&path) =>
                {
                    namespace.set_path(None);
                }
                (LinuxNamespaceType::Network, Some(path)) => {
                    self.network = Some(path);
                    namespace.set_path(None);
                }
                (kind, Some(path)) => {
                    return refused(format!(
                        "linux.namespaces[{kind}].path {}: a container in a virtual machine cannot join a namespace \
                         of the host; leave the path out",
                        path.display()
                    ));
                }
            }
        }
        use LinuxNamespaceType::{Ipc, Network, Pid, Uts};
        for kind in [Pid, Network, Ipc, Uts] {
            if !namespaces.iter().any(|namespace| namespace.typ() == kind) {
                return refused(format!(
                    "linux.namespaces has no {kind} namespace: a container in a virtual machine cannot share the \
                     host's; add {{\"type\": \"{kind}\"}}"
                ));
            }
        }
        guest.set_namespaces(Some(namespaces));
        Ok(())
    }
}

/// What the host limits for the whole VM, and what the guest limits for the container.
fn divide(resources: &LinuxResources) -> (LinuxResources, LinuxResources) {
    let (mut host, mut guest) = (LinuxResources::default(), resources.clone());
    host.set_cpu(resources.cpu().clone())
        .set_block_io(resources.block_io().clone())
        .set_network(resources.network().clone());
    guest.set_cpu(None).set_block_io(None).set_network(None);
    without_swap(&mut guest);
    (host, guest)
}

/// The guest's kernel has no swap, and so keeps to any limit of it. Engines set one with every limit of memory.
fn without_swap(guest: &mut LinuxResources) {
    if let Some(mut memory) = *guest.memory() {
        memory.set_swap(None);
        guest.set_memory((memory != LinuxMemory::default()).then_some(memory));
    }
}

/// What the guest limits for a member of a pod: all of it.
pub(super) fn of_member(resources: &LinuxResources, sandbox: &str) -> Result<LinuxResources, Error> {
    let mut guest = resources.clone();
    let cpu = resources.cpu().clone().unwrap_or_default();
    let is_set = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    let of_host = [
        ("cpu.cpus", is_set(cpu.cpus())),
        ("cpu.mems", is_set(cpu.mems())),
        ("blockIO", resources.block_io().as_ref().is_some_and(|block_io| *block_io != Default::default())),
        ("network", resources.network().as_ref().is_some_and(|network| *network != Default::default())),
    ];
    if let Some((name, _)) = of_host.iter().find(|(_, is_set)| *is_set) {
        return refused(format!(
            "linux.resources.{name}: processors, disks and networks are the host's, and the virtual machine has them as a \
             whole; limit the pod's sandbox {sandbox}"
        ));
    }
    guest.set_block_io(None).set_network(None);
    without_swap(&mut guest);
    if let Some(cpu) = guest.cpu_mut() {
        cpu.set_cpus(None).set_mems(None);
    }
    Ok(guest)
}

/// Limits of a container that runs: for the host and for the guest, if they have anything for it.
pub(super) fn divide_update(resources: &LinuxResources) -> (Option<LinuxResources>, Option<LinuxResources>) {
    let (host, guest) = divide(resources);
    let asks = |resources: &LinuxResources| *resources != LinuxResources::default();
    let (asks_host, asks_guest) = (asks(&host), asks(&guest));
    (asks_host.then_some(host), asks_guest.then_some(guest))
}

/// Takes out labels of the host's security modules, which engines give to every container where the host has one: they say
/// what a process may do to the host, from which the guest's has a kernel between it and them.
pub(super) fn drop_labels(process: &mut Process, warn: &dyn Fn(&str)) {
    for (field, value) in
        [("apparmorProfile", process.apparmor_profile()), ("selinuxLabel", process.selinux_label())]
    {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            warn(&format!(
                "process.{field} {value:?} is not applied: the host's security modules do not see processes of a \
                 virtual machine"
            ));
        }
    }
    process.set_apparmor_profile(None).set_selinux_label(None);
}

/// Refuses what a process cannot have in a guest.
pub(super) fn check_process(process: &Process) -> Result<(), Error> {
    if process.exec_cpu_affinity().is_some() {
        return refused(
            "process.execCPUAffinity is not supported: a process in a virtual machine runs on its vCPUs, not on CPUs of the \
             host; leave it out",
        );
    }
    Ok(())
}

/// As [`drop_labels`], of files.
pub(super) fn drop_mount_label(linux: &mut Linux, warn: &dyn Fn(&str)) {
    if let Some(label) = linux.mount_label().as_ref().filter(|label| !label.is_empty()) {
        warn(&format!(
            "linux.mountLabel {label:?} is not applied: the host's security modules do not see files of a virtual machine"
        ));
    }
    linux.set_mount_label(None);
}

/// Compiled here, since the agent does not.
fn filter(policy: &LinuxSeccomp) -> Result<Filter, Error> {
    let actions = policy.syscalls().iter().flatten().map(|rule| rule.action());
    let notifies =
        actions.chain([policy.default_action()]).any(|action| action == LinuxSeccompAction::ScmpActNotify);
    if notifies {
        return refused(
            "linux.seccomp with a listener is not supported: nobody outside of the virtual machine could decide on its \
             system calls",
        );
    }
    // The guest's kernel runs no programs of other architectures.
    let mut policy = policy.clone();
    policy.set_architectures(None);
    Filter::compile(&policy).map_err(|error| Error::Request(format!("linux.seccomp: {error}")))
}

fn host_cpus() -> u64 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u64)
}

/// A device node of the guest's own, or none.
fn device(device: &LinuxDevice) -> Result<(), Error> {
    // Linux: Documentation/admin-guide/devices.txt. Memory devices, terminals, tun and FUSE are every kernel's.
    let is_character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
    let is_everywhere =
        is_character && matches!((device.major(), device.minor()), (1 | 5, _) | (10, 200 | 229));
    if device.typ() == LinuxDeviceType::P || is_everywhere {
        return Ok(());
    }
    refused(format!(
        "linux.devices {} ({}:{}): a device of the host is not passed on to a virtual machine; run it with \
         cloche-container",
        device.path().display(),
        device.major(),
        device.minor()
    ))
}

/// Mounts of a container, and what they need.
struct Binds<'a> {
    shares: Vec<Shared>,
    /// The number of the first one.
    first: usize,
    place: In<'a>,
    shared_memory_bytes: Option<u64>,
}

impl Binds<'_> {
    fn mount(&mut self, mount: &Mount) -> Result<Mount, Error> {
        let options = mount.options().as_deref().unwrap_or_default();
        let has = |names: &[&str]| options.iter().find(|option| names.contains(&option.as_str()));
        let at = mount.destination().display();
        let kind = mount.typ().as_deref();
        if kind != Some("bind") && has(&["bind", "rbind"]).is_none() {
            return match kind {
                Some(name) if !OF_A_KERNEL.contains(&name) => refused(format!(
                    "cannot mount {at}: a file system of type {name} would be mounted from the host's devices; mount it \
                 on the host, and bind it"
                )),
                _ => Ok(mount.clone()),
            };
        }
        if let Some(option) = has(&["shared", "rshared", "slave", "rslave"]) {
            return refused(format!(
                "cannot bind {at} with the option {option}: mounts do not pass between the host and a virtual machine; \
             use rprivate"
            ));
        }
        let is_mapped = [mount.uid_mappings(), mount.gid_mappings()]
            .iter()
            .any(|maps| maps.as_ref().is_some_and(|maps| !maps.is_empty()));
        if is_mapped || has(&["idmap", "ridmap"]).is_some() {
            return refused(format!("cannot bind {at} with mapped users into a virtual machine"));
        }
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        let failed = |action| {
            let path = source.to_owned();
            move |source: std::io::Error| Error::File { action, path, source }
        };
        let metadata = fs::metadata(source).map_err(failed("find the source of a bind,"))?;
        let file_system = statfs(source).map_err(|errno| failed("look at")(errno.into()))?;
        if is_kernels(&file_system) {
            // The host's would tell of the host. The guest has its own at the same place.
            return Ok(mount.clone());
        }
        if cloche_runtime::destination(mount) == Path::new("/dev/shm") && is_tmpfs(&file_system) {
            return Ok(self.shared_memory(mount, source, &file_system));
        }
        if !metadata.is_file() && !metadata.is_dir() {
            return refused(format!(
                "cannot bind {} at {at}: it is neither a regular file nor a directory, and two kernels cannot share it; \
             run it with cloche-container",
                source.display()
            ));
        }
        let mut bound = mount.clone();
        let inherited = inherited_flags(source).map_err(failed("look at"))?;
        bound.set_source(Some(share_path(self.first + self.shares.len()))).set_options(Some(
            options.iter().cloned().chain(inherited.into_iter().map(String::from)).collect(),
        ));
        self.shares.push(Shared {
            path: source.to_owned(),
            recursive: has(&["rbind"]).is_some(),
            read_only: has(&["ro", "rro"]).is_some(),
        });
        Ok(bound)
    }

    /// Engines make a container's shared memory on the host, to have several containers share it. Only processes of one
    /// kernel can, so it is the guest's own, of the same size: that of the pod, or the container's.
    fn shared_memory(&mut self, mount: &Mount, source: &Path, file_system: &StatFs) -> Mount {
        let bytes = file_system.f_blocks.saturating_mul(u64::try_from(file_system.f_bsize).unwrap_or(0));
        let mut made = Mount::default();
        made.set_destination(mount.destination().clone());
        let is_pods = match self.place {
            In::Own => false,
            In::Pods { .. } => {
                self.shared_memory_bytes = Some(bytes);
                true
            }
            In::With(sandbox) => sandbox.has_shared_memory(source),
        };
        if is_pods {
            let options = ["bind", "nosuid", "noexec", "nodev"].map(String::from).to_vec();
            made.set_typ(Some("bind".into()))
                .set_source(Some(SHARED_MEMORY.into()))
                .set_options(Some(options));
        } else {
            let options = ["nosuid", "noexec", "nodev", "mode=1777", &format!("size={bytes}")];
            made.set_typ(Some("tmpfs".into()))
                .set_source(Some("shm".into()))
                .set_options(Some(options.map(String::from).to_vec()));
        }
        made
    }
}

/// linux/magic.h.
fn is_kernels(file_system: &StatFs) -> bool {
    const PROC: i64 = 0x9fa0;
    const SYSFS: i64 = 0x6265_6572;
    const CGROUP: i64 = 0x27_e0eb;
    const CGROUP2: i64 = 0x6367_7270;
    [PROC, SYSFS, CGROUP, CGROUP2].contains(&file_system.f_type)
}

fn is_tmpfs(file_system: &StatFs) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    file_system.f_type == TMPFS
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn config() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": ["x"] },
            "root": { "path": "rootfs" },
            "mounts": [],
            "annotations": { "a": "b" },
            "linux": {
                "cgroupsPath": "/x/y",
                "namespaces": [
                    { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                ],
            },
        })
    }

    fn with(pointer: &str, value: Value) -> Result<Split, Error> {
        let mut config = config();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        match config.pointer_mut(parent).unwrap() {
            Value::Array(list) => list.push(value),
            parent => parent[name] = value,
        }
        split(&serde_json::from_value(config).unwrap(), Path::new("/rootfs"), In::Own)
    }

    fn refusal(pointer: &str, value: Value) -> String {
        with(pointer, value).unwrap_err().to_string()
    }

    #[test]
    fn limits_go_to_whom_they_bind() {
        let resources = json!({
            "memory": { "limit": 64 << 20 }, "pids": { "limit": 7 },
            "cpu": { "quota": 150_000, "period": 100_000, "shares": 512 },
        });
        let split = with("/linux/resources", resources).unwrap();
        assert_eq!(split.memory_bytes, Some(64 << 20));
        assert_eq!(split.vcpus, 2.min(host_cpus()));
        let without_period = with("/linux/resources", json!({ "cpu": { "quota": 150_000 } })).unwrap();
        assert_eq!(without_period.vcpus, 2.min(host_cpus()));
        assert!(split.host.cpu().is_some() && split.host.memory().is_none() && split.host.pids().is_none());
        let inside = split.guest.linux().as_ref().unwrap().resources().as_ref().unwrap();
        assert!(inside.cpu().is_none() && inside.memory().is_some() && inside.pids().is_some());
    }

    #[test]
    fn update_that_asks_for_nothing_is_nobodys() {
        assert_eq!(divide_update(&LinuxResources::default()), (None, None));
        let cpu = serde_json::from_value(json!({ "cpu": { "shares": 5 } })).unwrap();
        let (host, guest) = divide_update(&cpu);
        assert!(host.is_some() && guest.is_none());
    }

    #[test]
    fn binds_become_shares_and_the_rest_is_the_guests() {
        let directory = tempfile::tempdir().unwrap();
        let bind = json!({
            "destination": "/data", "type": "bind", "source": directory.path(), "options": ["rbind", "ro"],
        });
        let split = with("/mounts/-", bind).unwrap();
        let expected = Shared { path: directory.path().into(), recursive: true, read_only: true };
        assert_eq!(split.shares[1], expected);
        assert_eq!(
            split.shares[ROOT_SHARE],
            Shared { path: "/rootfs".into(), recursive: true, read_only: false }
        );
        let mounts = split.guest.mounts().as_ref().unwrap();
        assert_eq!(mounts[0].source().as_deref(), Some(share_path(1).as_path()));
        assert_eq!(split.guest.annotations(), &None);
        assert_eq!(split.guest.linux().as_ref().unwrap().cgroups_path(), &None);
        let proc = json!({ "destination": "/p", "type": "bind", "source": "/proc", "options": ["rbind"] });
        let split = with("/mounts/-", proc).unwrap();
        assert_eq!(split.shares.len(), 1);
    }

    #[test]
    fn shared_memory_of_an_engine_becomes_the_guests() {
        let bind =
            json!({ "destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["bind"] });
        let split = with("/mounts/-", bind).unwrap();
        let mount = &split.guest.mounts().as_ref().unwrap()[0];
        assert_eq!((mount.typ().as_deref(), split.shares.len()), (Some("tmpfs"), 1));
        assert!(mount.options().as_ref().unwrap().iter().any(|option| option.starts_with("size=")));
    }

    #[test]
    fn network_namespace_is_the_hosts_business() {
        let split = with("/linux/namespaces/-", json!({ "type": "cgroup" })).unwrap();
        assert_eq!(split.network, None);
        let mut config = config();
        config["linux"]["namespaces"][1]["path"] = "/run/netns/x".into();
        let split = split_of(config);
        assert_eq!(split.network.as_deref(), Some(Path::new("/run/netns/x")));
        let namespaces = split.guest.linux().as_ref().unwrap().namespaces().as_ref().unwrap();
        assert!(namespaces.iter().all(|namespace| namespace.path().is_none()));
    }

    fn split_of(config: Value) -> Split {
        split(&serde_json::from_value(config).unwrap(), Path::new("/rootfs"), In::Own).unwrap()
    }

    fn sandbox(spec: Value) -> Sandbox {
        Sandbox { id: "box".into(), pid: 77, spec: serde_json::from_value(spec).unwrap(), first_share: 4096 }
    }

    fn of_member_of(sandbox: &Sandbox, config: Value) -> Result<Split, Error> {
        split(&serde_json::from_value(config).unwrap(), Path::new("/rootfs"), In::With(sandbox))
    }

    #[test]
    fn namespaces_of_a_sandbox_are_the_guests_and_no_others() {
        let pinned = tempfile::NamedTempFile::new().unwrap();
        let mut pod = config();
        pod["linux"]["namespaces"][1]["path"] = pinned.path().to_str().into();
        let sandbox = sandbox(pod);
        let mut member = config();
        for (index, path) in [(0, "/proc/77/ns/pid"), (2, "/proc/77/ns/ipc"), (3, "/proc/77/ns/uts")] {
            member["linux"]["namespaces"][index]["path"] = path.into();
        }
        member["linux"]["namespaces"][1]["path"] = pinned.path().to_str().into();
        let split = of_member_of(&sandbox, member).unwrap();
        let namespaces = split.guest.linux().as_ref().unwrap().namespaces().clone().unwrap();
        let paths: Vec<_> = namespaces.iter().filter_map(|one| one.path().as_deref()?.file_name()).collect();
        assert_eq!(paths, ["pid", "net", "ipc", "uts"]);
        assert_eq!(split.network, None);
        for (index, path) in
            [(0, "/proc/78/ns/pid"), (1, "/proc/77/ns/ipc"), (2, "/proc/1/ns/ipc"), (4, "/proc/77/ns/mnt")]
        {
            let mut member = config();
            member["linux"]["namespaces"][index]["path"] = path.into();
            let told = of_member_of(&sandbox, member).unwrap_err().to_string();
            assert!(told.contains(path) && told.contains("its sandbox box"), "{told}");
        }
    }

    #[test]
    fn files_of_a_member_are_behind_those_of_others() {
        let shm = tempfile::tempdir_in("/dev/shm").unwrap();
        let bind = |source: &Path| json!({ "destination": "/dev/shm", "type": "bind", "source": source });
        let mut pod = config();
        pod["mounts"] = json!([bind(shm.path())]);
        let place = In::Pods { is_declared: true };
        let of_sandbox =
            split(&serde_json::from_value(pod.clone()).unwrap(), Path::new("/rootfs"), place).unwrap();
        assert!(of_sandbox.shared_memory_bytes.is_some());
        let sandbox = sandbox(pod);
        let mut member = config();
        let data = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir_in("/dev/shm").unwrap();
        let files = json!({ "destination": "/data", "type": "bind", "source": data.path() });
        member["mounts"] = json!([bind(shm.path()), files, bind(other.path())]);
        let split = of_member_of(&sandbox, member).unwrap();
        let mounts = split.guest.mounts().clone().unwrap();
        let source = |index: usize| mounts[index].source().as_deref().unwrap().to_owned();
        assert_eq!(source(0), Path::new(SHARED_MEMORY));
        assert_eq!((source(1), split.shares.len()), (share_path(4097), 2));
        assert_eq!(mounts[2].typ().as_deref(), Some("tmpfs"));
        assert_eq!(
            of_sandbox.guest.mounts().as_ref().unwrap()[0].source().as_deref(),
            Some(Path::new(SHARED_MEMORY))
        );
    }

    #[test]
    fn machine_of_a_pod_is_as_large_as_the_pod() {
        let mut pod = config();
        pod["linux"]["resources"] = json!({ "cpu": { "shares": 2 }, "pids": { "limit": 7 } });
        let split = |pod: &Value, place| {
            split(&serde_json::from_value(pod.clone()).unwrap(), Path::new("/rootfs"), place).unwrap()
        };
        let declared = In::Pods { is_declared: true };
        let unlimited = split(&pod, declared);
        assert_eq!((unlimited.memory_bytes, unlimited.vcpus), (Some(1 << 30), 1));
        // What is meant for a process that waits is not for all of them.
        assert_eq!(unlimited.host.cpu().as_ref().unwrap().shares(), None);
        let podmans = split(&pod, In::Pods { is_declared: false });
        assert_eq!((podmans.memory_bytes, podmans.host.cpu().as_ref().unwrap().shares()), (None, Some(2)));
        pod["annotations"] = json!({
            "io.kubernetes.cri.sandbox-memory": "5000000", "io.kubernetes.cri.sandbox-cpu-quota": "150000",
            "io.kubernetes.cri.sandbox-cpu-period": "100000", "io.kubernetes.cri.sandbox-cpu-shares": "512",
        });
        let limited = split(&pod, declared);
        assert_eq!((limited.memory_bytes, limited.vcpus), (Some(5_000_000), 2.min(host_cpus())));
        assert_eq!(limited.host.cpu().as_ref().unwrap().shares(), Some(512));
        let inside = limited.guest.linux().as_ref().unwrap().resources().clone().unwrap();
        assert!(inside.memory().is_none() && inside.cpu().is_none() && inside.pids().is_some());
    }

    #[test]
    fn limits_of_a_member_are_the_guests_or_refused_by_name() {
        let resources = |value: Value| of_member(&serde_json::from_value(value).unwrap(), "box");
        let all = json!({ "cpu": { "quota": 5, "cpus": "" }, "blockIO": {}, "memory": { "limit": 9 } });
        let guest = resources(all).unwrap();
        assert!(guest.cpu().as_ref().unwrap().quota() == Some(5) && guest.memory().is_some());
        assert!(guest.block_io().is_none() && guest.cpu().as_ref().unwrap().cpus().is_none());
        for (name, value) in [
            ("cpu.cpus", json!({ "cpu": { "cpus": "0-1" } })),
            ("blockIO", json!({ "blockIO": { "weight": 100 } })),
            ("network", json!({ "network": { "classID": 5 } })),
        ] {
            assert!(resources(value).unwrap_err().to_string().contains(&format!("linux.resources.{name}")));
        }
    }

    #[test]
    fn what_a_virtual_machine_cannot_do_is_refused_by_name() {
        let hook = json!({ "createContainer": [{ "path": "/bin/true" }] });
        assert!(refusal("/hooks", hook).contains("hooks.createContainer"));
        let disk = json!({ "path": "/dev/sda", "type": "b", "major": 8, "minor": 0 });
        assert!(refusal("/linux/devices", json!([disk])).contains("/dev/sda (8:0)"));
        let joined = json!({ "type": "ipc", "path": "/proc/1/ns/ipc" });
        assert!(refusal("/linux/namespaces/-", joined).contains("/proc/1/ns/ipc"));
        assert!(refusal("/linux/namespaces", json!([{ "type": "mount" }])).contains("no pid namespace"));
        for (mount, word) in [
            (json!({ "destination": "/a", "type": "ext4", "source": "/dev/sda" }), "type ext4"),
            (json!({ "destination": "/a", "type": "bind", "source": "/", "options": ["rslave"] }), "rslave"),
            (
                json!({ "destination": "/a", "type": "bind", "source": "/", "options": ["idmap"] }),
                "mapped users",
            ),
            (json!({ "destination": "/a", "type": "bind", "source": "/dev/null" }), "neither a regular file"),
            (json!({ "destination": "/a", "type": "bind", "source": "/not/there" }), "/not/there"),
        ] {
            let refusal = refusal("/mounts/-", mount);
            assert!(refusal.contains(word), "{refusal}");
        }
    }
}
