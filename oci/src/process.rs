//! A process of the machine, told from a later one with the same number by when it was started.

use std::{fs, io};

use std::os::fd::OwnedFd;

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};
use serde::{Deserialize, Serialize};

/// A process, for as long as the machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number in this process's PID namespace.
    pub pid: i32,
    /// When it was started, in clock ticks since boot.
    pub start_ticks: u64,
}

/// What `/proc/PID/stat` says (proc(5)).
struct Stat {
    /// Whether its first thread has ended: of others nothing is said.
    is_zombie: bool,
    start_ticks: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse(text: &str) -> Option<Stat> {
    // The name in parentheses may itself contain anything.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?;
    // Field 22; the state was field 3.
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some(Stat { is_zombie: matches!(state, "Z" | "X" | "x"), start_ticks })
}

/// Whether all of its threads have ended.
fn has_ended(pid: i32) -> bool {
    let Some(pid) = Pid::from_raw(pid) else { return true };
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&now)) == Ok(1),
        Err(errno) => errno == Errno::SRCH,
    }
}

impl ProcessId {
    /// The calling process.
    pub fn own() -> Self {
        let pid = std::process::id() as i32;
        // Without /proc nothing of this works, and a sandbox's start will say so.
        Self::of(pid).unwrap_or(Self { pid, start_ticks: 0 })
    }

    /// The process that has this number now, unless it is dead already: a zombie is.
    pub fn of(pid: i32) -> Option<Self> {
        // A program can end its first thread, and go on in others.
        let stat = stat(pid).filter(|stat| !stat.is_zombie || !has_ended(pid))?;
        Some(Self { pid, start_ticks: stat.start_ticks })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// It and all others of its PID namespace, if that is not the caller's, too.
    pub(crate) fn with_its_namespace(self) -> Vec<i32> {
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = namespace(&self.pid.to_string());
        if own.is_none() || own == namespace("self") {
            return vec![self.pid];
        }
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let pids = names.filter_map(|name| name.parse::<i32>().ok());
        pids.filter(|pid| namespace(&pid.to_string()) == own).collect()
    }

    /// Its pidfd, if it still runs.
    pub(crate) fn open(self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        match pidfd_open(pid, PidfdFlags::empty()) {
            // Once the descriptor is open, it stays that of the process which the number belongs to now.
            Ok(pidfd) => Ok(self.is_alive().then_some(pidfd)),
            Err(Errno::SRCH) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_of_a_process_with_a_confusing_name_is_read() {
        let text = "12 (a) S 1) Z 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20 21";
        let stat = parse(text).unwrap();
        assert!(stat.is_zombie);
        assert_eq!(stat.start_ticks, 777);
        assert!(parse("12 (a").is_none());
    }

    #[test]
    fn process_is_alive_only_with_its_own_start() {
        let own = ProcessId::own();
        assert!(ProcessId::of(i32::MAX).is_none());
        assert!(own.is_alive() && own.open().unwrap().is_some());
        let other = ProcessId { start_ticks: own.start_ticks + 1, ..own };
        assert!(!other.is_alive() && other.open().unwrap().is_none());
    }
}
