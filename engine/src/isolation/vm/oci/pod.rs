//! Pods: containers that share a virtual machine. The first container of one, its sandbox, is made as any other is, and is
//! the machine's first; the others join it. By annotations, engines say which is which.
//!
//! ```text
//!  sandbox's attendant ── parent of ──▶ cloche vmm ── cloche share, which listens in the VM's directory
//!  member's attendant  ── files ──────────────────────▶ ▲        (for as long as it lives)
//!                      ── container, stdio, signals ──▶ agent     (vsock, by the VMM's socket)
//! ```
//! In a member's directory, the VM's is a symbolic link to that of the sandbox.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt, symlink},
    },
    path::{Path, PathBuf},
};

use cloche_oci::{Error, Home, Isolation, Known, Status};
use cloche_share::additions::Addition;
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Spec};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

use super::{super::dial, DIRECTORY};

/// What a container is in its pod, and the id of its sandbox: of containerd's CRI, and of CRI-O, whose names podman uses.
const ROLES: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
];
/// The pod's limits as a whole, by containerd: bytes; and as `linux.resources.cpu` has them.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";
/// Memory of the containers of a pod without a limit.
const DEFAULT_MEMORY_BYTES: u64 = 1 << 30;
/// Where a VM's file server takes in what members bring, in the VM's directory.
const SOCKET: &str = "share.sock";

/// What a container is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The only one in its machine.
    Alone,
    /// Others may join it. Of podman's containers each may be one: those of pods are not told from others.
    Sandbox {
        /// Whether it is for nothing else.
        is_declared: bool,
    },
    /// Joins the sandbox of this id, which is the value of this annotation.
    Member {
        /// The sandbox's id.
        sandbox: String,
        /// The annotation's name.
        annotation: &'static str,
    },
}

impl Role {
    pub(super) fn of(spec: &Spec) -> Result<Self, Error> {
        let annotation = |name: &str| spec.annotations().as_ref()?.get(name).map(String::as_str);
        for (kind, id) in ROLES {
            match annotation(kind) {
                Some("container") => {
                    let sandbox = annotation(id).filter(|sandbox| !sandbox.is_empty()).ok_or_else(|| {
                        Error::Request(format!(
                            "annotation {kind}=container without {id}: the id of the pod's sandbox is missing"
                        ))
                    })?;
                    return Ok(Self::Member { sandbox: sandbox.to_owned(), annotation: id });
                }
                Some("sandbox") => return Ok(Self::Sandbox { is_declared: true }),
                _ => {}
            }
        }
        Ok(match annotation("io.container.manager") {
            Some("libpod") => Self::Sandbox { is_declared: false },
            _ => Self::Alone,
        })
    }
}

/// Puts the limits of a pod as a whole in the place of its sandbox's own, which does nothing but wait.
pub(super) fn resources_of_all(spec: &Spec, own: &LinuxResources) -> Result<LinuxResources, Error> {
    let mut all = own.clone();
    let number = |name: &str| {
        let value = spec.annotations().as_ref().and_then(|annotations| annotations.get(name));
        let number = value.map(|value| value.parse::<i64>());
        number.transpose().map(|number| number.filter(|number| *number > 0)).map_err(|_| {
            Error::Request(format!("annotation {name}={:?} is no number", value.map_or("", String::as_str)))
        })
    };
    let mut memory = own.memory().unwrap_or_default();
    let default = i64::try_from(DEFAULT_MEMORY_BYTES).ok();
    // Not on top of what the guest's kernel lets the sandbox itself have.
    memory.set_limit(number(MEMORY)?.or(memory.limit()).or(default));
    all.set_memory(Some(memory));
    let mut cpu = own.cpu().clone().unwrap_or_default();
    let positive = |name| Ok::<_, Error>(number(name)?.and_then(|number| u64::try_from(number).ok()));
    cpu.set_quota(number(CPU_QUOTA)?).set_period(positive(CPU_PERIOD)?).set_shares(positive(CPU_SHARES)?);
    all.set_cpu(Some(cpu));
    Ok(all)
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

/// A sandbox that runs, to be joined.
#[derive(Debug)]
pub(super) struct Sandbox {
    pub(super) id: String,
    /// Its attendant.
    pub(super) pid: i32,
    pub(super) spec: Spec,
    /// The number of the first share that a member may add.
    pub(super) first_share: usize,
}

impl Sandbox {
    /// Finds the sandbox that a container in this directory is to join, and reaches its file server.
    pub(super) fn find(
        isolation: &dyn Isolation,
        directory: &Path,
        (id, annotation): (&str, &str),
    ) -> Result<(Self, Addition), Error> {
        let refused = |why: String| Error::Request(format!("annotation {annotation}={id}: {why}"));
        let root = directory.parent().unwrap_or(directory);
        let known = Home::new(root, isolation).find(id).map_err(|error| match error {
            Error::NoContainer(_) => refused(format!(
                "there is no such container in {}; the pod's sandbox has to be made first, by cloche-vm with the same \
                 --root",
                root.display()
            )),
            other => other,
        })?;
        let spec = known.spec()?;
        if !matches!(Role::of(&spec)?, Role::Sandbox { .. }) {
            return Err(refused(format!(
                "that container is no pod's sandbox, so that its virtual machine takes no others; it would have the \
                 annotation {}=sandbox",
                ROLES.iter().find(|(_, id)| *id == annotation).map_or("", |(kind, _)| kind),
            )));
        }
        match known.status() {
            Status::Created | Status::Running => {}
            Status::Paused => return Err(refused("the sandbox is paused; resume it first".into())),
            status => return Err(refused(format!("the sandbox is {}", status.name()))),
        }
        let addition = reach(&vm(&known))
            .map_err(|source| Error::System("reach the sandbox's virtual machine", source))?;
        let first_share = addition.first();
        Ok((Self { id: id.to_owned(), pid: known.state().pid, spec, first_share }, addition))
    }

    /// The name, in `/proc/PID/ns` of the guest (proc(5)), of the sandbox's namespace that this path is that of: by its
    /// attendant, or because the sandbox has joined the same. The attendant itself is in namespaces of the host.
    pub(super) fn namespace(&self, kind: LinuxNamespaceType, path: &Path) -> Option<&'static str> {
        let name = match kind {
            LinuxNamespaceType::Network => "net",
            LinuxNamespaceType::Ipc => "ipc",
            LinuxNamespaceType::Uts => "uts",
            LinuxNamespaceType::Pid => "pid",
            _ => return None,
        };
        let is_attendants = path == Path::new("/proc").join(self.pid.to_string()).join("ns").join(name);
        (is_attendants || self.has_joined(kind, path)).then_some(name)
    }

    fn has_joined(&self, kind: LinuxNamespaceType, path: &Path) -> bool {
        let own = self.spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        let own = own.and_then(|listed| listed.iter().find(|namespace| namespace.typ() == kind));
        let own = own.and_then(|namespace| namespace.path().as_deref()).and_then(identity);
        own.is_some() && own == identity(path)
    }

    /// Whether a member that binds this path to `/dev/shm` has the sandbox's shared memory.
    pub(super) fn has_shared_memory(&self, source: &Path) -> bool {
        let own = self.spec.mounts().iter().flatten();
        let own = own.filter(|mount| cloche_runtime::destination(mount) == Path::new("/dev/shm"));
        own.filter_map(|mount| identity(mount.source().as_deref()?)).any(|own| Some(own) == identity(source))
    }

    /// Leaves in a member's directory where its VM is.
    pub(super) fn link(&self, directory: &Path) -> Result<PathBuf, Error> {
        let path = directory.join(DIRECTORY);
        let target = Path::new("..").join(&self.id).join(DIRECTORY);
        match symlink(target, &path) {
            Err(source) => Err(Error::File { action: "make the link to the sandbox's VM,", path, source }),
            Ok(()) => Ok(path),
        }
    }
}

/// Whether this is a namespace that somebody has made for a pod, and not the host's own.
pub(super) fn is_pinned(path: &Path) -> bool {
    let namespace = identity(path);
    let of = |process: &str, kind| identity(&Path::new("/proc").join(process).join("ns").join(kind));
    let hosts = ["self", "1"].into_iter().flat_map(|process| ["ipc", "uts"].map(|kind| of(process, kind)));
    namespace.is_some() && !hosts.into_iter().any(|own| own == namespace)
}

/// The VM's directory, or a member's link to it.
fn vm(known: &Known) -> PathBuf {
    known.directory().join(DIRECTORY)
}

/// Whether a container is a member of a pod.
pub(super) fn is_member(known: &Known) -> bool {
    vm(known).is_symlink()
}

/// The id of a member's sandbox.
pub(super) fn sandbox_of(known: &Known) -> Option<String> {
    let target = fs::read_link(vm(known)).ok()?;
    Some(target.parent()?.file_name()?.to_str()?.to_owned())
}

/// The id of a member's sandbox, if that is paused, and with it the machine.
pub(super) fn paused_sandbox(isolation: &dyn Isolation, known: &Known) -> Option<String> {
    let sandbox = sandbox_of(known)?;
    let found = Home::new(known.directory().parent()?, isolation).find(&sandbox).ok()?;
    (found.status() == Status::Paused).then_some(sandbox)
}

/// Returns once the file server has nothing of a member any more, of which no process is left.
pub(super) fn give_back(known: &Known) -> io::Result<()> {
    match reach(&vm(known)) {
        Ok(addition) => addition.settle(),
        // It has ended.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn seqpacket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn reach(vm: &Path) -> io::Result<Addition> {
    let (_held, short) = dial::short(vm)?;
    let socket = seqpacket()?;
    // That of sending is for the connection, too, which waits if nobody accepts (unix(7)).
    for kind in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(&socket, kind, Some(dial::PATIENCE))?;
    }
    connect(&socket, &SocketAddrUnix::new(short.join(SOCKET))?)?;
    Addition::over(socket)
}

/// Where members bring their files, for a sandbox's file server.
pub(in super::super) fn listen_in(vm: &Path) -> io::Result<OwnedFd> {
    let (_held, short) = dial::short(vm)?;
    let socket = seqpacket()?;
    let path = short.join(SOCKET);
    bind(&socket, &SocketAddrUnix::new(&path)?)?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    listen(&socket, 16)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn role(annotations: Value) -> Result<Role, Error> {
        let spec = json!({ "ociVersion": "1.2.0", "annotations": annotations });
        Role::of(&serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn roles_are_what_engines_say() {
        let member = |annotation| Role::Member { sandbox: "s".into(), annotation };
        let cri =
            json!({ "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s" });
        assert_eq!(role(cri).unwrap(), member("io.kubernetes.cri.sandbox-id"));
        let podman = json!({
            "io.container.manager": "libpod", "io.kubernetes.cri-o.ContainerType": "container",
            "io.kubernetes.cri-o.SandboxID": "s",
        });
        assert_eq!(role(podman).unwrap(), member("io.kubernetes.cri-o.SandboxID"));
        let declared = |is_declared| Role::Sandbox { is_declared };
        assert_eq!(role(json!({ "io.kubernetes.cri.container-type": "sandbox" })).unwrap(), declared(true));
        assert_eq!(role(json!({ "io.container.manager": "libpod" })).unwrap(), declared(false));
        assert_eq!(role(json!({ "a": "b" })).unwrap(), Role::Alone);
        let lost = role(json!({ "io.kubernetes.cri.container-type": "container" })).unwrap_err().to_string();
        assert!(lost.contains("without io.kubernetes.cri.sandbox-id"), "{lost}");
    }

    #[test]
    fn limit_that_is_no_number_is_refused_by_name() {
        let spec =
            json!({ "ociVersion": "1.2.0", "annotations": { "io.kubernetes.cri.sandbox-memory": "1Gi" } });
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let told = resources_of_all(&spec, &LinuxResources::default()).unwrap_err().to_string();
        assert!(told.contains("sandbox-memory=\"1Gi\""), "{told}");
    }

    #[test]
    fn namespaces_of_the_host_are_pinned_by_nobody() {
        assert!(!is_pinned(Path::new("/proc/self/ns/ipc")) && !is_pinned(Path::new("/proc/1/ns/uts")));
        assert!(!is_pinned(Path::new("/not/there")));
        assert!(is_pinned(Path::new("/proc/self/ns/net")));
    }
}
