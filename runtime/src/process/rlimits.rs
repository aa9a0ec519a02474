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

/// Raises what must be raised for [`set`] to succeed later, without this process's rights; nothing is lowered. Of a process
/// that has this one's limits; 0 is this one.
pub(crate) fn raise(pid: i32, rlimit: &PosixRlimit) -> Result<(), RlimitError> {
    match syscalls::rlimit(resource(rlimit.typ())) {
        Ok((soft, hard)) if rlimit.hard() > hard => set_to(pid, rlimit.typ(), soft, rlimit.hard()),
        _ => Ok(()),
    }
}

/// Sets one limit of this process.
pub(crate) fn set(rlimit: &PosixRlimit) -> Result<(), RlimitError> {
    set_to(0, rlimit.typ(), rlimit.soft(), rlimit.hard())
}

fn set_to(pid: i32, limit: PosixRlimitType, soft: u64, hard: u64) -> Result<(), RlimitError> {
    let resource = resource(limit);
    syscalls::set_rlimit(pid, resource, soft, hard).map_err(|source| match syscalls::rlimit(resource) {
        Ok((_, present)) if source.raw_os_error() == Some(Errno::PERM.raw_os_error()) && hard > present => {
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
