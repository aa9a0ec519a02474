//! The monitor's loop: it carries a running sandbox's stdio, passes signals on, and learns how the process ended.

use std::{io, os::fd::OwnedFd, time::Duration};

use cloche_protocol::message::Exit;
use cloche_runtime::pump::{self, Pump, Target};
use rustix::event::{PollFd, PollFlags};

use crate::{
    isolation::{Lost, Running},
    signals::Signals,
    trace::{Mark, Trace},
};

/// Why a monitor could not see a sandbox through to its end.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The sandbox ended, but not its process.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// The monitor's own stdio or waiting failed.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
}

/// The pumps of the outputs; further ones carry stdin.
const OUTPUTS: usize = 2;

/// How long output may stay open, without a byte coming, after its process ended. A container's ends with it; this is for
/// a guest that breaks its word.
const SILENCE: Duration = Duration::from_secs(10);

/// Attends a running sandbox until its process has ended and all of its output is written.
pub fn attend(running: &mut dyn Running, signals: &Signals, trace: &mut Trace) -> Result<Exit, MonitorError> {
    let mut pumps = connect(running)?;
    // The start may have read on past the news of the start.
    let mut exit = running.advance(trace)?;
    loop {
        if exit.is_some() {
            // There is nobody left to read its stdin.
            pumps.truncate(OUTPUTS);
            if pumps.iter().all(Pump::is_done) {
                break;
            }
        }
        let mut others = vec![PollFd::new(signals, PollFlags::IN)];
        if exit.is_none() {
            others.extend(running.poll_fds());
        }
        let count = others.len();
        // A slow reader of the output is waited for; a guest that neither ends it nor sends any is not.
        let only_source = pumps.iter().all(|pump| pump.is_done() || pump.waits_for_source());
        let timeout = (exit.is_some() && only_source).then_some(SILENCE);
        let ready = pump::poll(&mut pumps, &others, timeout)
            .map_err(|error| MonitorError::System("carry stdio", error))?;
        drop(others);
        if pumps.iter().take(OUTPUTS).any(|pump| pump.carried() > 0) {
            trace.mark(Mark::FirstOutput);
        }
        let mut signalled = false;
        while let Some(signo) = signals.take() {
            running.signal(signo);
            signalled = true;
        }
        if exit.is_some() && (signalled || timeout.is_some() && !ready.contains(&true)) {
            break;
        }
        if exit.is_none() && ready.iter().take(count).skip(1).any(|ready| *ready) {
            exit = running.advance(trace)?;
        }
    }
    trace.mark(Mark::Exit);
    exit.ok_or_else(|| MonitorError::Lost(Lost("the sandbox's end was not reported".into())))
}

/// Pumps between the sandbox's stdio and this process's own: stdout, stderr, and stdin if it is forwarded.
fn connect(running: &mut dyn Running) -> Result<Vec<Pump>, MonitorError> {
    let own = |fd: rustix::fd::BorrowedFd<'_>| -> Result<OwnedFd, MonitorError> {
        fd.try_clone_to_owned().map_err(|error| MonitorError::System("duplicate its stdio", error))
    };
    let Some(streams) = running.take_streams() else { return Ok(Vec::new()) };
    let mut pumps = vec![
        Pump::new(streams.stdout, own(rustix::stdio::stdout())?, Target::Shared),
        Pump::new(streams.stderr, own(rustix::stdio::stderr())?, Target::Shared),
    ];
    if let Some(stdin) = streams.stdin {
        pumps.push(Pump::new(own(rustix::stdio::stdin())?, stdin, Target::NonBlocking));
    }
    Ok(pumps)
}
