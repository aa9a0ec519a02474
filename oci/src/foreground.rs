//! A verb that stays until its process ends: it passes signals on, and carries the terminal.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use cloche_runtime::{
    pump::{self, Pump},
    send_signal, signal_descriptor,
};
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

/// How long, once the process has ended, its terminal is waited for in all.
const PATIENCE: Duration = Duration::from_millis(50);
/// What is read of it by then: more than a terminal holds (Linux: 8192 bytes in `drivers/tty/pty.c`, 4096 in `n_tty.c`).
const HELD_BYTES: u64 = 16 << 10;

/// What is left of both.
struct Rest {
    patience: Duration,
    until: u64,
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
    let mut rest: Option<Rest> = None;
    loop {
        let waits_for_source = pumps.first().is_some_and(Pump::waits_for_source);
        if let Some(rest) = &rest
            && pumps.first().is_none_or(|output| {
                let is_enough = rest.patience.is_zero() || output.carried() >= rest.until;
                output.is_done() || waits_for_source && is_enough
            })
        {
            return Ok(());
        }
        let mut others = vec![PollFd::new(signals, PollFlags::IN)];
        if rest.is_none() {
            others.push(PollFd::from_borrowed_fd(pidfd, PollFlags::IN));
        }
        // Something that the process left behind may keep the terminal open, and write to it without end; what is in it by
        // now is enough. A slow reader of that is waited for.
        let started = Instant::now();
        let timeout = rest.as_ref().filter(|_| waits_for_source).map(|rest| rest.patience);
        let ready = pump::poll(&mut pumps, &others, timeout).map_err(system("carry the terminal"))?;
        match &mut rest {
            Some(rest) if waits_for_source => {
                rest.patience = rest.patience.saturating_sub(started.elapsed());
            }
            None if ready.get(1) == Some(&true) => {
                let carried = pumps.first().map_or(0, Pump::carried);
                rest = Some(Rest { patience: PATIENCE, until: carried + HELD_BYTES });
                // There is nobody left to read what is typed.
                pumps.truncate(1);
            }
            _ => {}
        }
        while let Some(signo) = signals.take() {
            match &terminal {
                Some(terminal) if signo == libc::SIGWINCH => terminal.resize(),
                _ if rest.is_some() => {
                    if [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM].contains(&signo) {
                        return Ok(());
                    }
                }
                _ => {
                    // A process that has just ended needs no signal.
                    let _ = send_signal(pidfd, signo);
                }
            }
        }
    }
}
