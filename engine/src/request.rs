//! What a user asks for, as plain data. The command line fills it in; [`RunRequest::validate`] checks it before
//! anything is touched.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::mounts::{MAX_MOUNTS, MountRequest};

/// What stands between the workload and the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// Nothing but a root directory of its own. Only `compare` uses it, as the baseline.
    Process,
    /// Linux namespaces, cgroups, capabilities and seccomp on the host's kernel.
    Container,
    /// A KVM microVM with a kernel of its own, and the same container inside it.
    Vm,
}

impl Isolation {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Container => "container",
            Self::Vm => "vm",
        }
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// `cloche run`, as data.
#[derive(Debug, Clone)]
pub struct RunRequest {
    /// Name or id of an image in the store.
    pub image: String,
    /// The isolation asked for.
    pub isolation: Isolation,
    /// Fail unless the running sandbox is observed to have this isolation.
    pub require: Option<Isolation>,
    /// Replaces the image's command; empty keeps it.
    pub command: Vec<String>,
    /// Replaces the image's entry point (and drops its command).
    pub entrypoint: Option<String>,
    /// `KEY=VALUE`, over the image's.
    pub env: Vec<String>,
    /// Replaces the image's working directory. Absolute.
    pub workdir: Option<String>,
    /// `user[:group]`, names or numbers; replaces the image's.
    pub user: Option<String>,
    /// Host name; the sandbox's id by default.
    pub hostname: Option<String>,
    /// Name of the sandbox; none by default.
    pub name: Option<String>,
    /// Forward stdin.
    pub interactive: bool,
    /// Forget the sandbox when it ends.
    pub remove: bool,
    /// Read-only root file system.
    pub read_only: bool,
    /// What is mounted into it, in this order.
    pub mounts: Vec<MountRequest>,
    /// Memory limit in bytes.
    pub memory_bytes: Option<u64>,
    /// CPU limit in thousandths of a CPU.
    pub millicpus: Option<u64>,
    /// Limit on processes and threads.
    pub pids: Option<u64>,
    /// Guest kernel to boot in place of Cloche's own.
    pub kernel: Option<PathBuf>,
}

/// A request that cannot be carried out anywhere.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// `--require` contradicts `--isolation`.
    #[error("--require {require} cannot hold with --isolation {isolation}; drop one of the two")]
    RequireContradicts {
        /// What must be observed.
        require: Isolation,
        /// What was asked for.
        isolation: Isolation,
    },
    /// Less memory than anything can run in.
    #[error("memory limit of {0} bytes is too small; the minimum is {MIN_MEMORY_BYTES} bytes (6m)")]
    MemoryTooSmall(u64),
    /// More memory than this machine has.
    #[error(
        "memory limit of {asked} bytes is more than the {available} bytes this machine has; ask for less"
    )]
    MemoryTooLarge {
        /// The limit asked for.
        asked: u64,
        /// MemTotal of the host.
        available: u64,
    },
    /// A CPU limit out of range.
    #[error("cpu limit of {asked} is not between 0.01 and the {available} CPUs this machine has")]
    Cpus {
        /// The limit asked for, as a decimal number.
        asked: f64,
        /// The host's CPUs.
        available: usize,
    },
    /// Zero processes.
    #[error("a pids limit of 0 lets nothing run; ask for at least 1")]
    NoPids,
    /// A relative working directory.
    #[error("working directory `{0}` is not absolute; start it with `/`")]
    RelativeWorkdir(String),
    /// An environment variable without a name.
    #[error("environment variable `{0}` has no name; write NAME=VALUE")]
    Env(String),
    /// A string that cannot be handed to a process.
    #[error("{what} `{}` contains a NUL byte; remove it", value.escape_debug())]
    Nul {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// A guest kernel for something that has no guest.
    #[error("--kernel `{0}` needs --isolation vm; a container runs on the host's kernel")]
    KernelWithoutVm(PathBuf),
    /// A limit for something that has none.
    #[error("{0} needs isolation; a bare process has none")]
    LimitWithoutIsolation(&'static str),
    /// A name that cannot be a sandbox's.
    #[error(
        "`{0}` cannot name a sandbox; use letters, digits, `_`, `.` and `-`, starting with a letter or digit"
    )]
    Name(String),
    /// More mounts than a sandbox can have.
    #[error(
        "{0} mounts are more than the {MAX_MOUNTS} that a sandbox can have; mount a directory that holds several"
    )]
    TooManyMounts(usize),
    /// Two mounts at one place.
    #[error("two mounts have the target {0}; drop one of the two")]
    DuplicateMount(String),
    /// A mount where the kernel's own file systems are.
    #[error("cannot mount at {0}: /proc and /sys are the kernel's; choose another target")]
    KernelMount(String),
    /// A host name that the kernel refuses.
    #[error("host name `{0}` is not between 1 and 63 letters, digits, `.` and `-`")]
    Hostname(String),
}

/// As Docker: below this no process can even start.
pub const MIN_MEMORY_BYTES: u64 = 6 << 20;

impl RunRequest {
    /// Checks everything that can be checked before the image is known.
    pub fn validate(&self) -> Result<(), RequestError> {
        if let Some(require) = self.require
            && require != self.isolation
        {
            return Err(RequestError::RequireContradicts { require, isolation: self.isolation });
        }
        if let Some(kernel) = &self.kernel
            && self.isolation != Isolation::Vm
        {
            return Err(RequestError::KernelWithoutVm(kernel.clone()));
        }
        if self.isolation == Isolation::Process {
            self.validate_bare()?;
        }
        self.validate_limits()?;
        self.validate_mounts()?;
        if let Some(workdir) = &self.workdir
            && !workdir.starts_with('/')
        {
            return Err(RequestError::RelativeWorkdir(workdir.clone()));
        }
        if let Some(bad) = self.env.iter().find(|variable| variable.starts_with('=') || variable.is_empty()) {
            return Err(RequestError::Env(bad.clone()));
        }
        if let Some(name) = &self.name
            && !is_sandbox_name(name)
        {
            return Err(RequestError::Name(name.clone()));
        }
        if let Some(hostname) = &self.hostname
            && !is_hostname(hostname)
        {
            return Err(RequestError::Hostname(hostname.clone()));
        }
        let strings = (self.command.iter().map(|value| ("argument", value)))
            .chain(self.env.iter().map(|value| ("environment variable", value)))
            .chain(self.entrypoint.iter().map(|value| ("entry point", value)))
            .chain(self.workdir.iter().map(|value| ("working directory", value)));
        for (what, value) in strings {
            if value.contains('\0') {
                return Err(RequestError::Nul { what, value: value.clone() });
            }
        }
        Ok(())
    }

    /// What only a container can honour is refused for a bare process.
    fn validate_bare(&self) -> Result<(), RequestError> {
        let options = [
            ("--memory", self.memory_bytes.is_some()),
            ("--cpus", self.millicpus.is_some()),
            ("--pids-limit", self.pids.is_some()),
            ("--hostname", self.hostname.is_some()),
            ("--read-only", self.read_only),
            ("--volume, --mount or --tmpfs", !self.mounts.is_empty()),
        ];
        match options.into_iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(RequestError::LimitWithoutIsolation(option)),
            None => Ok(()),
        }
    }

    fn validate_mounts(&self) -> Result<(), RequestError> {
        if self.mounts.len() > MAX_MOUNTS {
            return Err(RequestError::TooManyMounts(self.mounts.len()));
        }
        for (index, mount) in self.mounts.iter().enumerate() {
            let target = &mount.target;
            if self.mounts.iter().take(index).any(|earlier| earlier.target == *target) {
                return Err(RequestError::DuplicateMount(target.clone()));
            }
            if ["proc", "sys"].contains(&target.split('/').nth(1).unwrap_or_default()) {
                return Err(RequestError::KernelMount(target.clone()));
            }
        }
        Ok(())
    }

    fn validate_limits(&self) -> Result<(), RequestError> {
        if let Some(asked) = self.memory_bytes {
            if asked < MIN_MEMORY_BYTES {
                return Err(RequestError::MemoryTooSmall(asked));
            }
            let available = host_memory_bytes();
            if asked > available {
                return Err(RequestError::MemoryTooLarge { asked, available });
            }
        }
        if let Some(millicpus) = self.millicpus {
            let available = std::thread::available_parallelism().map_or(1, usize::from);
            if millicpus < 10 || millicpus > available as u64 * 1000 {
                return Err(RequestError::Cpus { asked: millicpus as f64 / 1000.0, available });
            }
        }
        if self.pids == Some(0) {
            return Err(RequestError::NoPids);
        }
        Ok(())
    }
}

/// The rule of Docker for container names.
fn is_sandbox_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() <= 128
        && bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

fn is_hostname(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte))
        && !name.starts_with(['-', '.'])
}

/// MemTotal of the host in bytes.
pub fn host_memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

/// A size on the command line: a number with an optional unit `b`, `k`, `m`, `g` or `t` (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        let trimmed = lower.strip_suffix("ib").or_else(|| lower.strip_suffix('b')).unwrap_or(&lower);
        let (digits, shift) = match trimmed.char_indices().next_back() {
            Some((at, 'k')) => (&trimmed[..at], 10),
            Some((at, 'm')) => (&trimmed[..at], 20),
            Some((at, 'g')) => (&trimmed[..at], 30),
            Some((at, 't')) => (&trimmed[..at], 40),
            _ => (trimmed, 0),
        };
        let bad = || format!("`{text}` is not a size; write a number with a unit, such as 512m or 2g");
        let value: f64 = digits.parse().map_err(|_| bad())?;
        let bytes = value * (1u64 << shift) as f64;
        // `<` and not `<=`: u64::MAX as f64 rounds up to 2^64.
        if value.is_finite() && bytes >= 0.0 && bytes < u64::MAX as f64 {
            Ok(Self(bytes as u64))
        } else {
            Err(bad())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_with_units_parse_as_docker_does() {
        for (text, bytes) in
            [("6m", 6 << 20), ("1g", 1 << 30), ("100", 100), ("2KB", 2048), ("1.5k", 1536), ("3MiB", 3 << 20)]
        {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn bytes_of_nonsense_are_refused() {
        for text in ["", "m", "-1m", "1x", "nan", "inf", "1e30g", "ib"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn sandbox_names_follow_docker() {
        assert!(is_sandbox_name("web-1.a_b"));
        for bad in ["", "-a", ".a", "a/b", "a b", "ü"] {
            assert!(!is_sandbox_name(bad), "{bad}");
        }
    }
}
