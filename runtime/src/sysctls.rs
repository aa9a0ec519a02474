//! Kernel parameters of the container's own namespaces (`linux.sysctl`).

use std::{collections::HashMap, io};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};

use crate::{namespaces, procfs};

/// Why a kernel parameter could not be set.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// It is the machine's, or that of a namespace which the container shares with the caller.
    #[error("cannot set the sysctl {name}: {reason}")]
    NotOwn {
        /// The parameter.
        name: String,
        /// Why.
        reason: &'static str,
    },
    /// The kernel refused.
    #[error("cannot set the sysctl {name} to {value:?}")]
    Set {
        /// The parameter.
        name: String,
        /// The value asked for.
        value: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Parameters of an IPC namespace (ipc_namespaces(7)); those of message queues are under `fs.mqueue.`.
const IPC: [&str; 12] = [
    "kernel/auto_msgmni",
    "kernel/msg_next_id",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/sem_next_id",
    "kernel/shm_next_id",
    "kernel/shm_rmid_forced",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
];

/// Parameters that passed [`Sysctls::from_spec`], in a fixed order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Sysctls(Vec<(String, String)>);

impl Sysctls {
    /// Accepts only parameters of namespaces that are not the caller's: all others would change its machine. Engines name
    /// those of the host by their paths, too.
    pub(crate) fn from_spec(
        listed: Option<&HashMap<String, String>>,
        namespaces: &[LinuxNamespace],
    ) -> Result<Self, SysctlError> {
        let mut sysctls: Vec<_> =
            listed.into_iter().flatten().map(|(name, value)| (name.clone(), value.clone())).collect();
        sysctls.sort();
        for (name, _) in &sysctls {
            check(name, namespaces).map_err(|reason| SysctlError::NotOwn { name: name.clone(), reason })?;
        }
        Ok(Self(sysctls))
    }

    /// Sets them for the namespaces of this process, through the caller's `/proc`: which namespace a parameter is
    /// of depends on who asks, and the container's own `/proc` might not be what it seems.
    pub(crate) fn apply(&self) -> Result<(), SysctlError> {
        self.0.iter().try_for_each(|(name, value)| {
            procfs::write(&format!("sys/{}", path(name)), value.as_bytes())
                .map_err(|source| SysctlError::Set { name: name.clone(), value: value.clone(), source })
        })
    }
}

/// Below `/proc/sys`. If the first of its separators is a slash, dots are dots (sysctl.d(5)): of an interface `eth0.100`.
fn path(name: &str) -> String {
    match name.find(['.', '/']).map(|first| name.as_bytes().get(first)) {
        Some(Some(b'/')) => name.to_owned(),
        _ => {
            let swap = |letter| match letter {
                '.' => '/',
                '/' => '.',
                other => other,
            };
            name.chars().map(swap).collect()
        }
    }
}

fn check(name: &str, namespaces: &[LinuxNamespace]) -> Result<(), &'static str> {
    let path = path(name);
    // Nothing but a name: `net/../kernel/core_pattern` begins like a network's.
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("the name is malformed");
    }
    let (needed, reason) = if path.starts_with("net/") {
        (LinuxNamespaceType::Network, "the container has no network namespace of its own")
    } else if path.starts_with("fs/mqueue/") || IPC.contains(&path.as_str()) {
        (LinuxNamespaceType::Ipc, "the container has no IPC namespace of its own")
    } else if path == "kernel/domainname" {
        (LinuxNamespaceType::Uts, "the container has no UTS namespace of its own")
    } else {
        return Err("it is not a parameter of a namespace, and would change the whole machine");
    };
    let is_containers = |namespace: &LinuxNamespace| {
        namespace.typ() == needed
            && namespace.path().as_ref().is_none_or(|path| !namespaces::is_own(needed, path))
    };
    if namespaces.iter().any(is_containers) { Ok(()) } else { Err(reason) }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxNamespaceBuilder;

    use super::*;

    fn accepts(name: &str, kinds: &[LinuxNamespaceType]) -> bool {
        let namespaces: Vec<_> =
            kinds.iter().map(|kind| LinuxNamespaceBuilder::default().typ(*kind).build().unwrap()).collect();
        let listed = HashMap::from([(name.to_owned(), "1".to_owned())]);
        Sysctls::from_spec(Some(&listed), &namespaces).is_ok()
    }

    #[test]
    fn sysctl_is_accepted_only_with_its_own_namespace() {
        use LinuxNamespaceType::{Ipc, Network, Uts};
        assert!(accepts("net.ipv4.ip_forward", &[Network]));
        assert!(accepts("net/core/somaxconn", &[Network]));
        assert_eq!(path("net/ipv4/conf/eth0.100/rp_filter"), "net/ipv4/conf/eth0.100/rp_filter");
        assert_eq!(path("net.ipv4.conf.eth0/100.rp_filter"), "net/ipv4/conf/eth0.100/rp_filter");
        assert!(!accepts("net.ipv4.ip_forward", &[Ipc, Uts]));
        assert!(accepts("kernel.shmmax", &[Ipc]));
        assert!(accepts("fs.mqueue.msg_max", &[Ipc]));
        assert!(!accepts("fs.mqueue.msg_max", &[]));
        assert!(accepts("kernel.domainname", &[Uts]));
    }

    #[test]
    fn sysctl_of_a_namespace_that_is_the_callers_is_refused() {
        let joins = |path: &str| {
            let namespace = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network).path(path);
            let listed = HashMap::from([("net.ipv4.ip_forward".to_owned(), "1".to_owned())]);
            Sysctls::from_spec(Some(&listed), &[namespace.build().unwrap()]).map(drop)
        };
        let error = joins("/proc/self/ns/net").unwrap_err().to_string();
        assert!(error.contains("no network namespace of its own"), "{error}");
        // Of another kind it is not what is asked for, and it cannot be joined as such.
        joins("/proc/self/ns/uts").unwrap();
    }

    #[test]
    fn sysctl_of_the_machine_or_outside_of_its_tree_is_refused() {
        let all = [LinuxNamespaceType::Network, LinuxNamespaceType::Ipc, LinuxNamespaceType::Uts];
        for name in
            ["kernel.core_pattern", "vm.overcommit_memory", "net", "net/../kernel/core_pattern", "net..x"]
        {
            assert!(!accepts(name, &all), "{name}");
        }
    }
}
