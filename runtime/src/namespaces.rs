//! Which namespaces the container's process gets: new ones from `clone3`, existing ones by `setns`.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The kinds of namespaces: their names in `/proc/PID/ns`, and their `CLONE_NEW…` flags (linux/sched.h).
pub(crate) const KINDS: [(&str, u64); 8] = [
    ("user", LinuxNamespaceType::User as u64),
    ("mnt", LinuxNamespaceType::Mount as u64),
    ("cgroup", LinuxNamespaceType::Cgroup as u64),
    ("uts", LinuxNamespaceType::Uts as u64),
    ("ipc", LinuxNamespaceType::Ipc as u64),
    ("pid", LinuxNamespaceType::Pid as u64),
    ("net", LinuxNamespaceType::Network as u64),
    ("time", LinuxNamespaceType::Time as u64),
];

/// What tells a namespace from all others there are, by its file: device and inode (ioctl_nsfs(2)).
pub(crate) fn identity(file: &Path) -> io::Result<(u64, u64)> {
    std::fs::metadata(file).map(|file| (file.dev(), file.ino()))
}

/// Whether this is a file of the namespace that this process is in itself. One that cannot be looked at is not: it cannot
/// be joined either.
pub(crate) fn is_own(kind: LinuxNamespaceType, file: &Path) -> bool {
    let name = KINDS.iter().find(|(_, flag)| *flag == kind as u64).map(|(name, _)| *name);
    let own = name.and_then(|name| identity(&Path::new("/proc/self/ns").join(name)).ok());
    own.is_some() && own == identity(file).ok()
}

/// The namespaces that a spec asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Namespaces {
    /// `CLONE_NEW…` flags of those to be made by `clone3`.
    pub(crate) clone_flags: u64,
    /// Whether to make a cgroup namespace once the process is in its cgroup, which becomes the namespace's root.
    pub(crate) new_cgroup: bool,
    /// Whether the network namespace is new, and so lacks even a loopback interface that is up.
    pub(crate) new_network: bool,
    /// Whether the user namespace is new.
    pub(crate) new_user: bool,
    /// Whether the time namespace is new. `clone3` cannot make one whose clocks are set.
    pub(crate) new_time: bool,
    /// Those to join.
    pub(crate) joined: Vec<Joined>,
}

/// A namespace that exists already.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Joined {
    kind: LinuxNamespaceType,
    path: PathBuf,
}

/// Why a namespace could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// `setns` failed, or the file is not there.
    #[error("cannot join the {kind} namespace {path}")]
    Join {
        /// The kind of namespace.
        kind: LinuxNamespaceType,
        /// Its file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// `unshare` failed.
    #[error("cannot make a cgroup namespace")]
    Cgroup(#[source] io::Error),
    /// The time namespace could not be made, set, or entered.
    #[error("cannot make a time namespace")]
    Time(#[source] io::Error),
}

impl Namespaces {
    /// Reads a list that `spec_check` has passed.
    pub(crate) fn from_spec(listed: &[LinuxNamespace]) -> Self {
        let mut namespaces = Self::default();
        for namespace in listed {
            let kind = namespace.typ();
            match namespace.path() {
                Some(path) => namespaces.joined.push(Joined { kind, path: path.clone() }),
                None if kind == LinuxNamespaceType::Cgroup => namespaces.new_cgroup = true,
                None if kind == LinuxNamespaceType::Time => namespaces.new_time = true,
                None => {
                    // The enumeration's values are the kernel's flags.
                    namespaces.clone_flags |= kind as u64;
                    namespaces.new_network |= kind == LinuxNamespaceType::Network;
                    namespaces.new_user |= kind == LinuxNamespaceType::User;
                }
            }
        }
        namespaces
    }

    /// Whether the container sees its cgroup as the root of the hierarchy.
    pub(crate) fn has_cgroup(&self) -> bool {
        self.new_cgroup || self.joined.iter().any(|joined| joined.kind == LinuxNamespaceType::Cgroup)
    }

    /// The PID namespace to join. `setns` puts only later children there, so the parent has to do it.
    pub(crate) fn joined_pid(&self) -> Option<&Joined> {
        self.joined.iter().find(|joined| joined.kind == LinuxNamespaceType::Pid)
    }

    fn joins_user(&self) -> bool {
        cfg!(feature = "user-namespaces")
            && self.joined.iter().any(|joined| joined.kind == LinuxNamespaceType::User)
    }

    fn has_new_user(&self) -> bool {
        cfg!(feature = "user-namespaces") && self.new_user
    }

    /// Whether the container's root is not the caller's.
    pub(crate) fn has_user(&self) -> bool {
        self.has_new_user() || self.joins_user()
    }

    /// Whether a process in between has to join before the container's is made: new namespaces belong to the user
    /// namespace that their maker is in, and from within a new one the caller's could not be joined.
    pub(crate) fn need_go_between(&self) -> bool {
        self.joins_user() || self.has_new_user() && !self.joined.is_empty()
    }

    /// Joins all, the user namespace first.
    pub(crate) fn join_all(&self) -> Result<(), NamespaceError> {
        let is_user = |joined: &&Joined| joined.kind == LinuxNamespaceType::User;
        self.joined.iter().filter(is_user).try_for_each(Joined::join)?;
        self.joined.iter().filter(|joined| !is_user(joined)).try_for_each(Joined::join)
    }

    /// Makes the time namespace, if one is asked for, with these offsets of its clocks, and enters it.
    pub(crate) fn enter_time(&self, offsets: &[(&str, i64, u32)]) -> Result<(), NamespaceError> {
        if !self.new_time {
            return Ok(());
        }
        let enter = || -> io::Result<()> {
            crate::syscalls::unshare_time_namespace()?;
            let lines = offsets
                .iter()
                .map(|(clock, seconds, nanoseconds)| format!("{clock} {seconds} {nanoseconds}\n"));
            let text: String = lines.collect();
            if !text.is_empty() {
                std::fs::write("/proc/self/timens_offsets", text)?;
            }
            let namespace = File::open("/proc/self/ns/time_for_children")?;
            Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Time))?)
        };
        enter().map_err(NamespaceError::Time)
    }

    /// Joins all but the PID namespace; none where a process in between has done so.
    pub(crate) fn join(&self) -> Result<(), NamespaceError> {
        if self.need_go_between() {
            return Ok(());
        }
        self.joined.iter().filter(|joined| joined.kind != LinuxNamespaceType::Pid).try_for_each(Joined::join)
    }

    /// Makes the cgroup namespace, if one is asked for.
    pub(crate) fn unshare_cgroup(&self) -> Result<(), NamespaceError> {
        if !self.new_cgroup {
            return Ok(());
        }
        crate::syscalls::unshare_cgroup_namespace().map_err(NamespaceError::Cgroup)
    }
}

impl Joined {
    /// Joins it.
    pub(crate) fn join(&self) -> Result<(), NamespaceError> {
        let kind = match self.kind {
            LinuxNamespaceType::Mount => LinkNameSpaceType::Mount,
            LinuxNamespaceType::Cgroup => LinkNameSpaceType::ControlGroup,
            LinuxNamespaceType::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            LinuxNamespaceType::Ipc => LinkNameSpaceType::InterProcessCommunication,
            LinuxNamespaceType::User => LinkNameSpaceType::User,
            LinuxNamespaceType::Pid => LinkNameSpaceType::ProcessID,
            LinuxNamespaceType::Network => LinkNameSpaceType::Network,
            LinuxNamespaceType::Time => LinkNameSpaceType::Time,
        };
        File::open(&self.path)
            .and_then(|file| Ok(move_into_link_name_space(file.as_fd(), Some(kind))?))
            .map_err(|source| NamespaceError::Join { kind: self.kind, path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_namespace_is_known_by_its_identity() {
        use LinuxNamespaceType::{Ipc, Network, Uts};
        let own = format!("/proc/{}/ns/uts", std::process::id());
        assert!(is_own(Uts, Path::new(&own)));
        assert!(!is_own(Ipc, Path::new(&own)));
        assert!(!is_own(Network, Path::new("/not/there")));
        for (name, flag) in KINDS {
            let own = Path::new("/proc/self/ns").join(name);
            // A kernel may lack one of them.
            assert!(!own.exists() || identity(&own).is_ok() && flag != 0, "{name}");
        }
    }
}
