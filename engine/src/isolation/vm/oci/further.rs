//! The attendant of a further process: it reaches the guest by the socket of the container's VMM.

use std::{
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant},
};

use cloche_oci::Signals;
use cloche_protocol::{
    frame::{self, Decoder},
    machine::guest_port,
    message::{Answer, FromGuest, Question, Request, Stream, ToGuest},
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
    /// The container's id, if it is not the first of its machine.
    pub(super) container: Option<&'a str>,
    pub(super) process: &'a Process,
    pub(super) cgroup: Option<&'a str>,
    pub(super) console_socket: Option<BorrowedFd<'a>>,
}

/// Runs a process in the guest, and attends it to its end; how it ended.
pub(super) fn attend(plan: &Plan<'_>, report: Report) -> Result<u8, Refusal> {
    report.hold()?;
    let signals = Signals::collect().map_err(Refusal::step("collect signals"))?;
    let process = serde_json::to_string(plan.process).map_err(|error| Refusal::of(&error))?;
    let request = Request::Exec { process, cgroup: plan.cgroup.map(str::to_owned) };
    let question = Question { container: plan.container.map(str::to_owned), request };
    let terminal = terminal(plan.process, plan.console_socket)?;
    let (mut control, carried) = ask(plan.directory, &question, terminal)?;
    // As long as it takes: a program may be on a slow disk.
    control.expect(&FromGuest::Started, None)?;
    control.listen()?;
    report.ready()?;
    attendant::attend(&mut control, carried, &signals, None).map_err(Refusal::step("attend the process"))
}

/// Asks for a process or container, and gives it streams, or a terminal.
pub(super) fn ask(
    directory: &Path,
    question: &Question,
    terminal: Option<OwnedFd>,
) -> Result<(Control, Carried), Refusal> {
    let control = dial(directory)?;
    say(&control, question)?;
    let number = match frame::read(dial::answer(&control)).map_err(|error| Refusal::of(&error))? {
        Some(Answer::Accepted { number }) => number,
        Some(Answer::Failed { message }) => return Err(Refusal::new(super::printable(&message))),
        _ => return Err(Refusal::new("the guest's agent gave an answer to something else")),
    };
    let stream = |stream| -> Result<OwnedFd, Refusal> {
        let connection = dial(directory)?;
        let request = Request::Stream { number, stream };
        say(&connection, &Question { container: None, request })?;
        Ok(connection.into())
    };
    let streams = GuestStreams {
        stdin: stream(Stream::Stdin)?,
        stdout: stream(Stream::Stdout)?,
        stderr: terminal.is_none().then(|| stream(Stream::Stderr)).transpose()?,
    };
    let carried = Carried::new(streams, terminal).map_err(Refusal::step("carry stdio"))?;
    Ok((Control { stream: control, decoder: Decoder::default(), is_container: false }, carried))
}

fn dial(directory: &Path) -> Result<UnixStream, Refusal> {
    dial::connect(directory, guest_port::REQUESTS).map_err(Refusal::step("reach the guest's agent"))
}

fn say(stream: &UnixStream, question: &Question) -> Result<(), Refusal> {
    frame::write(stream, question).map_err(|error| Refusal::of(&error))
}

/// The control stream of a process or container.
pub(super) struct Control {
    stream: UnixStream,
    decoder: Decoder,
    /// Whether its end is worth a word.
    pub(super) is_container: bool,
}

impl Control {
    /// Waits for one piece of news.
    pub(super) fn expect(&mut self, expected: &FromGuest, patience: Option<Duration>) -> Result<(), Refusal> {
        let told = match patience {
            Some(patience) => {
                let stream = &self.stream;
                frame::read(dial::Until { stream, until: Instant::now() + patience })
            }
            None => {
                self.stream.set_read_timeout(None).map_err(Refusal::step("wait for the guest"))?;
                frame::read(&self.stream)
            }
        };
        match told.map_err(|error| Refusal::of(&error))? {
            Some(news) if news == *expected => Ok(()),
            Some(FromGuest::Failed { exit_code, message }) => Err(Refusal::of_guest(exit_code, &message)),
            Some(_) => Err(Refusal::new("the guest's agent broke the protocol")),
            None => Err(Refusal::new("the virtual machine is gone")),
        }
    }

    /// From here on, news is heard of by polling.
    pub(super) fn listen(&self) -> Result<(), Refusal> {
        self.stream.set_nonblocking(true).map_err(Refusal::step("listen to the guest"))
    }
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
        self.is_container
    }

    fn tell(&mut self, command: &ToGuest) {
        let _ = frame::write(&self.stream, command);
    }
}
