//! The attendant of a further process: it reaches the guest by the socket of the container's VMM.

use std::{
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use cloche_oci::Signals;
use cloche_protocol::{
    frame::{self, Decoder},
    machine::guest_port,
    message::{Answer, FromGuest, Request, Stream, ToGuest},
};
use oci_spec::runtime::Process;
use rustix::event::{PollFd, PollFlags};

use super::{
    super::dial,
    attendant::{self, Carried, GuestStreams, Peer, Refusal, Report},
    first::terminal,
};

/// What to run.
pub(super) struct Plan<'a> {
    /// The VM's.
    pub(super) directory: &'a Path,
    pub(super) process: &'a Process,
    pub(super) cgroup: Option<&'a str>,
    pub(super) console_socket: Option<BorrowedFd<'a>>,
}

/// Runs a process in the guest, and attends it to its end; how it ended.
pub(super) fn attend(plan: &Plan<'_>, report: Report) -> Result<u8, Refusal> {
    report.hold()?;
    let signals = Signals::collect().map_err(Refusal::step("collect signals"))?;
    let process = serde_json::to_string(plan.process).map_err(|error| Refusal::of(&error))?;
    let control = dial(plan.directory)?;
    say(&control, &Request::Exec { process, cgroup: plan.cgroup.map(str::to_owned) })?;
    let number = match frame::read(dial::answer(&control)).map_err(|error| Refusal::of(&error))? {
        Some(Answer::Accepted { number }) => number,
        Some(Answer::Failed { message }) => return Err(Refusal::new(super::printable(&message))),
        _ => return Err(Refusal::new("the guest's agent gave an answer to something else")),
    };
    let terminal = terminal(plan.process, plan.console_socket)?;
    let stream = |stream| -> Result<OwnedFd, Refusal> {
        let connection = dial(plan.directory)?;
        say(&connection, &Request::Stream { number, stream })?;
        Ok(connection.into())
    };
    let streams = GuestStreams {
        stdin: stream(Stream::Stdin)?,
        stdout: stream(Stream::Stdout)?,
        stderr: terminal.is_none().then(|| stream(Stream::Stderr)).transpose()?,
    };
    // As long as it takes: a program may be on a slow disk.
    control.set_read_timeout(None).map_err(Refusal::step("wait for the guest"))?;
    match frame::read(&control).map_err(|error| Refusal::of(&error))? {
        Some(FromGuest::Started) => {}
        Some(FromGuest::Failed { exit_code, message }) => {
            return Err(Refusal::of_guest(exit_code, &message));
        }
        Some(_) => return Err(Refusal::new("the guest's agent broke the protocol")),
        None => return Err(Refusal::new("the virtual machine is gone")),
    }
    control.set_nonblocking(true).map_err(Refusal::step("listen to the guest"))?;
    let carried = Carried::new(streams, terminal).map_err(Refusal::step("carry stdio"))?;
    report.ready()?;
    let mut control = Control { stream: control, decoder: Decoder::default() };
    attendant::attend(&mut control, carried, &signals, None).map_err(Refusal::step("attend the process"))
}

fn dial(directory: &Path) -> Result<UnixStream, Refusal> {
    dial::connect(directory, guest_port::REQUESTS).map_err(Refusal::step("reach the guest's agent"))
}

fn say(stream: &UnixStream, request: &Request) -> Result<(), Refusal> {
    frame::write(stream, request).map_err(|error| Refusal::of(&error))
}

/// The process's control stream.
struct Control {
    stream: UnixStream,
    decoder: Decoder,
}

impl Peer for Control {
    fn poll_fds(&self) -> Vec<PollFd<'_>> {
        vec![PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::IN)]
    }

    fn news(&mut self) -> Result<Option<FromGuest>, String> {
        let take = |decoder: &mut Decoder| decoder.take().map_err(|error| cloche_runtime::chain(&error));
        if let Some(news) = take(&mut self.decoder)? {
            return Ok(Some(news));
        }
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => return Err("it has ended".into()),
            Ok(count) => self.decoder.push(bytes.get(..count).unwrap_or_default()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error.to_string()),
        }
        take(&mut self.decoder)
    }

    fn is_the_machine(&self) -> bool {
        false
    }

    fn tell(&mut self, command: &ToGuest) {
        let _ = frame::write(&self.stream, command);
    }
}
