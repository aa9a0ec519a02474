//! What a process on its way to its program tells the one that made it: [`READY`] before the last steps, then an exit
//! code and a message, or nothing.

use std::{
    convert::Infallible,
    error::Error,
    fmt::Write as _,
    os::fd::BorrowedFd,
    panic::{AssertUnwindSafe, catch_unwind},
};

use rustix::{
    io::{Errno, read as read_fd, retry_on_intr},
    process::{WaitId, WaitIdOptions, waitid},
};

use crate::{
    cgroup::Cgroup,
    entry::{Entry, READY},
    init::InitError,
    launch::{LaunchError, process_failed},
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
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(message, ": {error}");
        cause = error.source();
    }
    message
}

/// Waits until the process of `pidfd` has become its program, or failed; if `is_gated`, until it waits at its gate.
pub(crate) fn read(
    verdict: BorrowedFd<'_>,
    pidfd: BorrowedFd<'_>,
    cgroup: &Cgroup,
    is_gated: bool,
) -> Result<(), LaunchError> {
    let mut report = Vec::new();
    let mut buffer = [0; 1 + MAX_MESSAGE_BYTES];
    loop {
        let count = retry_on_intr(|| read_fd(verdict, &mut buffer))
            .map_err(|errno: Errno| process_failed("read from the child")(errno))?;
        report.extend(buffer.iter().take(count));
        // What says that the process waits at its gate is a write of its own.
        if count == 0 || is_gated && report == [READY] {
            break;
        }
    }
    match report.as_slice() {
        [READY] => Ok(()),
        [READY, exit_code, message @ ..] | [exit_code, message @ ..] => Err(LaunchError::Init {
            exit_code: *exit_code,
            message: String::from_utf8_lossy(message).into_owned(),
        }),
        [] => {
            let status = waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED);
            let signo = status.ok().flatten().and_then(|status| status.terminating_signal()).unwrap_or(0);
            let hint = if cgroup.oom_kills() > 0 { ": its memory limit is too small" } else { "" };
            Err(LaunchError::Killed { signo, hint })
        }
    }
}
