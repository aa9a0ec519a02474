//! The signals that a foreground `run` passes on to its sandbox.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use crate::syscalls;

/// What a user or a supervisor sends to steer a program.
const FORWARDED: [i32; 7] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2, libc::SIGCONT];

/// Forwarded signals, blocked and collected by a descriptor, so that none is lost between two waits.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// From here on these signals no longer act on this process.
    pub fn collect() -> io::Result<Self> {
        Ok(Self { fd: syscalls::signal_descriptor(&FORWARDED)? })
    }

    /// Whether a signal, sent to what has not started yet, means that it need not start any more.
    pub fn asks_for_the_end(signo: i32) -> bool {
        [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM].contains(&signo)
    }

    /// The next signal that has arrived.
    pub fn take(&self) -> Option<i32> {
        // signalfd(2): a read yields whole records of 128 bytes; the first field is the signal's number.
        let mut record = [0; 128];
        match rustix::io::read(&self.fd, &mut record) {
            Ok(128) => record.first_chunk().map(|number| u32::from_ne_bytes(*number) as i32),
            _ => None,
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
