//! Resource limits of the process (getrlimit(2)).

use std::io;

use oci_spec::runtime::{PosixRlimit, PosixRlimitType};
use rustix::io::Errno;

use crate::syscalls;

/// Why a limit could not be set.
#[derive(Debug, thiserror::Error)]
pub enum RlimitError {
    /// Only CAP_SYS_RESOURCE raises a hard limit.
    #[error(
        "cannot raise the hard limit {limit} from {present} to {wanted}: that needs CAP_SYS_RESOURCE, which this process does not have"
    )]
    NotPermitted {
        /// E.g. `RLIMIT_NOFILE`.
        limit: PosixRlimitType,
        /// The hard limit now.
        present: String,
        /// The hard limit asked for.
        wanted: String,
    },
    /// The kernel refused.
    #[error("cannot set {limit} to soft={soft} hard={hard}")]
    Set {
        /// E.g. `RLIMIT_NOFILE`.
        limit: PosixRlimitType,
        /// The soft limit asked for.
        soft: String,
        /// The hard limit asked for.
        hard: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Sets one limit of a process; 0 is this one.
pub(crate) fn set(pid: i32, rlimit: &PosixRlimit) -> Result<(), RlimitError> {
    let (limit, soft, hard) = (rlimit.typ(), rlimit.soft(), rlimit.hard());
    let resource = resource(limit);
    syscalls::set_rlimit(pid, resource, soft, hard).map_err(|source| match syscalls::hard_rlimit(resource) {
        Ok(present) if source.raw_os_error() == Some(Errno::PERM.raw_os_error()) && hard > present => {
            RlimitError::NotPermitted { limit, present: show(present), wanted: show(hard) }
        }
        _ => RlimitError::Set { limit, soft: show(soft), hard: show(hard), source },
    })
}

fn show(value: u64) -> String {
    if value == libc::RLIM_INFINITY { "unlimited".into() } else { value.to_string() }
}

fn resource(limit: PosixRlimitType) -> libc::__rlimit_resource_t {
    match limit {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}
