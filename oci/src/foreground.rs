//! A verb that stays until its process ends: it passes signals on, and carries the terminal.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use cloche_runtime::{pump, send_signal, signal_descriptor};
use rustix::event::{PollFd, PollFlags};

use crate::{
    console::Terminal,
    error::{Error, system},
};

/// Signals that are passed on, collected so that none is lost.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Signals {
    /// From here on these signals no longer act on this process.
    pub fn collect() -> io::Result<Self> {
        // Not those which tell of a defect of this process itself or of its children, or that cannot be collected.
        let own = [
            libc::SIGCHLD,
            libc::SIGPIPE,
            libc::SIGKILL,
            libc::SIGSTOP,
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGABRT,
            libc::SIGSYS,
            libc::SIGTRAP,
        ];
        let passed: Vec<_> = (1..=31).chain(34..=64).filter(|signo| !own.contains(signo)).collect();
        signal_descriptor(&passed).map(Self)
    }

    /// The next one that has come, if any.
    pub fn take(&self) -> Option<i32> {
        // signalfd(2): whole records of this size, with the number first.
        let mut record = [0; 128];
        match rustix::io::read(&self.0, &mut record) {
            Ok(128) => record.first_chunk().map(|number| i32::from_ne_bytes(*number)),
            _ => None,
        }
    }
}

/// Attends a process until it has ended, and what it wrote to the terminal is carried.
pub(crate) fn attend(
    pidfd: BorrowedFd<'_>,
    signals: &Signals,
    terminal: Option<Terminal>,
) -> Result<(), Error> {
    let mut pumps = match &terminal {
        Some(terminal) => Vec::from(terminal.pumps()?),
        None => Vec::new(),
    };
    let mut has_ended = false;
    loop {
        if has_ended && pumps.first().is_none_or(pump::Pump::is_done) {
            return Ok(());
        }
        let mut others = vec![PollFd::new(signals, PollFlags::IN)];
        if !has_ended {
            others.push(PollFd::from_borrowed_fd(pidfd, PollFlags::IN));
        }
        // Something that the process left behind may keep the terminal open; what is in it by now is enough.
        let timeout = has_ended.then_some(std::time::Duration::from_millis(50));
        let ready = pump::poll(&mut pumps, &others, timeout).map_err(system("carry the terminal"))?;
        if has_ended && !ready.contains(&true) {
            return Ok(());
        }
        if !has_ended && ready.get(1) == Some(&true) {
            has_ended = true;
            // There is nobody left to read what is typed.
            pumps.truncate(1);
        }
        while let Some(signo) = signals.take() {
            match &terminal {
                Some(terminal) if signo == libc::SIGWINCH => terminal.resize(),
                _ if has_ended => {}
                _ => {
                    // A process that has just ended needs no signal.
                    let _ = send_signal(pidfd, signo);
                }
            }
        }
    }
}
