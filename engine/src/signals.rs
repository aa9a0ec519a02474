//! The signals that a foreground `run` passes on to its sandbox.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use cloche_runtime::signal_descriptor;

/// What a user or a supervisor sends to steer a program.
const FORWARDED: [i32; 7] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2, libc::SIGCONT];

/// By which other commands hand a signal to the monitor, so that signals which act on a process, or mean something to
/// this one, can be passed on too. It is queued (sigqueue(3)) with the number of the signal that is meant.
pub(crate) const RELAYED: i32 = 40;

/// Forwarded signals, blocked and collected by a descriptor, so that none is lost between two waits.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// From here on these signals no longer act on this process.
    pub fn collect() -> io::Result<Self> {
        let collected = [&FORWARDED[..], &[RELAYED]].concat();
        Ok(Self { fd: signal_descriptor(&collected)? })
    }

    /// Whether a signal, sent to what has not started yet, means that it need not start any more.
    pub fn asks_for_the_end(signo: i32) -> bool {
        [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGKILL].contains(&signo)
    }

    /// The next signal that has arrived.
    pub fn take(&self) -> Option<i32> {
        loop {
            let mut record = [0; RECORD_BYTES];
            if rustix::io::read(&self.fd, &mut record) != Ok(RECORD_BYTES) {
                return None;
            }
            // What means nothing was sent by nobody of ours.
            if let Some(signo) = signal_of(&record) {
                return Some(signo);
            }
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// signalfd(2): a read yields whole records of this size.
const RECORD_BYTES: usize = 128;

/// The signal that a record stands for: its number comes first, and what a queued one carries (`ssi_int`) at 44.
fn signal_of(record: &[u8; RECORD_BYTES]) -> Option<i32> {
    let number = |at: usize| record[at..].first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
    match (number(0), number(44)) {
        (RELAYED, meant @ 1..=64) => Some(meant),
        (RELAYED, _) => None,
        (signo, _) => Some(signo),
    }
}

/// Linux's signals of x86-64, by number from 1 on (signal(7)).
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
    "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
    "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];

/// A signal by its number, or its name with or without `SIG`, in any case of letters; real-time ones as `RTMIN+N`.
pub fn by_name(name: &str) -> Option<i32> {
    /// What programs in the sandbox call SIGRTMIN (signal(7): glibc keeps the first two for itself).
    const RTMIN: i32 = 34;
    if let Ok(number) = name.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = name.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        let offset = if rest.is_empty() { 0 } else { rest.strip_prefix('+')?.parse::<i32>().ok()? };
        return (0..=64 - RTMIN).contains(&offset).then_some(RTMIN + offset);
    }
    NAMES.iter().zip(1..).find(|(known, _)| **known == name).map(|(_, number)| number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_name_knows_numbers_names_and_real_time_signals() {
        for (name, number) in [
            ("9", 9),
            ("KILL", 9),
            ("SIGKILL", 9),
            ("sigterm", 15),
            ("sys", 31),
            ("RTMIN+3", 37),
            ("SIGRTMIN", 34),
        ] {
            assert_eq!(by_name(name), Some(number), "{name}");
        }
        for name in ["", "0", "65", "-1", "SIG", "NONSENSE", "RTMIN+31", "RTMIN-1"] {
            assert_eq!(by_name(name), None, "{name}");
        }
    }

    #[test]
    fn relayed_signal_is_the_one_that_is_meant() {
        let record = |signo: i32, queued: i32| {
            let mut record = [0; RECORD_BYTES];
            record[..4].copy_from_slice(&signo.to_ne_bytes());
            record[44..48].copy_from_slice(&queued.to_ne_bytes());
            signal_of(&record)
        };
        assert_eq!(record(15, 0), Some(15));
        assert_eq!(record(RELAYED, 9), Some(9));
        assert_eq!([record(RELAYED, 0), record(RELAYED, 65), record(RELAYED, -1)], [None; 3]);
    }
}
