//! The isolation backends behind one trait: what the monitor needs to know of a running sandbox, whatever holds it.

pub mod container;
pub mod observed;
pub mod vm;

use std::{io::Read, os::fd::OwnedFd};

use cloche_protocol::message::Exit;
use rustix::event::PollFd;

use crate::{record::Processes, trace::Trace};

/// The host's ends of a sandbox's stdio.
#[derive(Debug)]
pub struct Streams {
    /// Write here what the process reads; `None` when the request forwards no stdin.
    pub stdin: Option<OwnedFd>,
    /// Non-blocking; at its end once the process and all its children are gone.
    pub stdout: OwnedFd,
    /// As `stdout`.
    pub stderr: OwnedFd,
}

/// Why a running sandbox stopped being one without its process having ended.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Lost(pub String);

/// A sandbox whose process runs.
pub trait Running {
    /// Takes the stdio; the monitor calls this once.
    fn take_streams(&mut self) -> Option<Streams>;

    /// Processes on the host that this sandbox consists of; `None` if they have ended already.
    fn processes(&self) -> Option<Processes>;

    /// Descriptors that are readable when [`Running::advance`] has something to do.
    fn poll_fds(&self) -> Vec<PollFd<'_>>;

    /// Handles what is readable; returns how the process ended once that is known.
    fn advance(&mut self, trace: &mut Trace) -> Result<Option<Exit>, Lost>;

    /// Sends a signal to the process.
    fn signal(&mut self, signo: i32);

    /// What it has written to its root file system, as a layer's tar archive ([`crate::changes`]); also once its process
    /// has ended.
    fn changes(&mut self) -> Result<Box<dyn Read + Send>, Lost>;

    /// Ends and removes everything of the sandbox but its directory.
    fn teardown(self: Box<Self>) -> Result<(), Lost>;
}
