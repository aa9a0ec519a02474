//! What a process on its way to its program tells the one that made it: [`READY`] before the last steps, then an exit
//! code and a message, or nothing. Between them, it may ask for its seccomp listener to be taken.

use std::{
    convert::Infallible,
    error::Error,
    fmt::Write as _,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, read as read_fd, retry_on_intr},
    process::{PidfdGetfdFlags, WaitId, WaitIdOptions, pidfd_getfd, waitid},
};

use crate::{
    cgroup::Cgroup,
    entry::{Entry, LISTENER, READY},
    init::InitError,
    launch::{LaunchError, Listener, process_failed},
    syscalls,
};

/// Runs what ends in a program, and reports if it does not.
pub(crate) fn run_to_program(entry: &Entry<'_>, run: impl FnOnce() -> Result<Infallible, InitError>) -> ! {
    // A panic must not unwind into the caller's frames, which exist twice now.
    let (exit_code, message) = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Err(error)) => (error.exit_code(), chain(&error)),
        Ok(Ok(never)) => match never {},
        Err(_) => (125, "the container's process panicked; this is a defect in cloche".into()),
    };
    let mut report = vec![exit_code];
    report.extend(message.bytes().take(MAX_MESSAGE_BYTES));
    entry.report(&report);
    syscalls::exit_now(exit_code)
}

/// A report is one write, which a pipe takes whole up to a page (pipe(7)).
const MAX_MESSAGE_BYTES: usize = 4000;

/// An error with all its causes.
pub fn chain(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(message, ": {error}");
        cause = error.source();
    }
    message
}

/// A process on its way to its program, as the one that made it sees it.
pub(crate) struct Reporter<'a> {
    pub(crate) pid: i32,
    pub(crate) pidfd: BorrowedFd<'a>,
    /// Where it says how it fares.
    pub(crate) verdict: BorrowedFd<'a>,
    /// Where it is told that its listener was taken.
    pub(crate) released: Option<BorrowedFd<'a>>,
    /// How long it may take.
    pub(crate) patience: Option<Duration>,
}

impl Reporter<'_> {
    fn take_listener(&self, number: i32, take: Option<Listener<'_>>) -> Result<(), LaunchError> {
        let listener = take_listener(self.pidfd, number)
            .map_err(process_failed("fetch the seccomp listener of the process"))?;
        let (Some(take), Some(released)) = (take, self.released) else {
            return Err(LaunchError::Refused("nobody takes the seccomp listener".into()));
        };
        take(self.pid, listener).map_err(LaunchError::Refused)?;
        let told = rustix::io::write(released, &[0]).map_err(process_failed("tell the child to go on"));
        told.map(drop)
    }
}

/// The listener's number, if the report starts with one; that part is taken out.
pub fn listener_in(report: &mut Vec<u8>) -> Option<i32> {
    match report.as_slice() {
        [LISTENER, a, b, c, d, ..] => {
            let number = i32::from_le_bytes([*a, *b, *c, *d]);
            report.drain(..5);
            Some(number)
        }
        _ => None,
    }
}

/// Duplicates the listener that a process hands over.
pub fn take_listener(pidfd: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    Ok(pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())?)
}

/// Who shares a PID namespace with the process can stop it before its program does anything.
fn await_more(verdict: BorrowedFd<'_>, patience: Duration, started: Instant) -> Result<(), LaunchError> {
    let left = patience.saturating_sub(started.elapsed());
    let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    let mut fds = [PollFd::from_borrowed_fd(verdict, PollFlags::IN)];
    match retry_on_intr(|| poll(&mut fds, Some(&left))) {
        Ok(0) => Err(LaunchError::Init {
            exit_code: 125,
            message: format!("its program did not run within {} s; has it been stopped?", patience.as_secs()),
        }),
        Ok(_) => Ok(()),
        Err(errno) => Err(process_failed("wait for the child")(errno)),
    }
}

/// Waits until the process has become its program, or failed; if `is_gated`, until it waits at its gate.
pub(crate) fn read(
    process: &Reporter<'_>,
    cgroup: &Cgroup,
    is_gated: bool,
    listener: Option<Listener<'_>>,
) -> Result<(), LaunchError> {
    let mut report = Vec::new();
    let mut buffer = [0; 1 + MAX_MESSAGE_BYTES];
    let mut is_ready = false;
    let started = Instant::now();
    loop {
        if let Some(patience) = process.patience {
            await_more(process.verdict, patience, started)?;
        }
        let count = retry_on_intr(|| read_fd(process.verdict, &mut buffer))
            .map_err(|errno: Errno| process_failed("read from the child")(errno))?;
        report.extend(buffer.iter().take(count));
        if !is_ready && report.first() == Some(&READY) {
            is_ready = true;
            report.remove(0);
        }
        if let Some(number) = listener_in(&mut report) {
            process.take_listener(number, listener)?;
        }
        // What says that the process waits at its gate is a write of its own.
        if count == 0 || is_gated && is_ready && report.is_empty() {
            break;
        }
    }
    match report.as_slice() {
        [] if is_ready => Ok(()),
        [exit_code, message @ ..] => Err(LaunchError::Init {
            exit_code: *exit_code,
            message: String::from_utf8_lossy(message).into_owned(),
        }),
        [] => {
            let status = waitid(WaitId::PidFd(process.pidfd), WaitIdOptions::EXITED);
            let signo = status.ok().flatten().and_then(|status| status.terminating_signal()).unwrap_or(0);
            let hint = if cgroup.oom_kills() > 0 { ": its memory limit is too small" } else { "" };
            Err(LaunchError::Killed { signo, hint })
        }
    }
}
