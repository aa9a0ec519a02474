//! The agent's one poll loop: what processes of the container read and write, what the host says and asks, and the end
//! of the container.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::PathBuf,
};

use cloche_protocol::{
    VERSION,
    boot::{BootConfig, share_path},
    frame::{self, Decoder, FrameError},
    machine::{GuestMark, guest_port, vsock_port},
    message::{FromGuest, Status},
};
use cloche_runtime::{Container, Filter, Rootfs, WaitError, pump};
use oci_spec::runtime::Spec;
use rustix::{
    event::{PollFd, PollFlags},
    net::SocketFlags,
};

use crate::{
    boot::{self, Boot, BootError},
    chain,
    changes::Answer,
    contained::{Contained, MakeError, Plan},
    disks, network,
    requests::{News, Requests, exit_of},
    say,
    stdio::{HostStreams, Streams},
    syscalls,
};

/// Why the agent cannot serve. The host learns of it by the console.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The guest is not ready for a container.
    #[error("the guest could not be prepared")]
    Boot(#[from] BootError),
    /// The host does not answer on a port.
    #[error("cannot connect to vsock port {port} of the host")]
    Connect {
        /// The port.
        port: u32,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The control stream is unusable.
    #[error("the control stream to the host failed")]
    Control(#[from] FrameError),
    /// The container's end cannot be learnt.
    #[error(transparent)]
    Wait(#[from] WaitError),
    /// A system call that cannot fail did.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
}

/// Boots, runs the container to its end and reports; returns when the host knows all.
pub fn run() -> Result<(), ServeError> {
    let Boot { config, spec, filter } = boot::prepare()?;
    let control = File::from(connect(vsock_port::CONTROL)?);
    frame::write(&control, &FromGuest::Ready { version: VERSION })?;
    syscalls::mark(GuestMark::AgentReady);
    let streams = connect_streams(&config, &spec)?;
    match launch(&config, spec, filter, streams) {
        Err(error) => {
            let report = FromGuest::Failed { exit_code: error.exit_code(), message: chain(&error) };
            frame::write(&control, &report)?;
        }
        Ok(first) => {
            frame::write(&control, &if config.waits { FromGuest::Created } else { FromGuest::Started })?;
            let mut session = Session {
                first,
                control: &control,
                decoder: Decoder::default(),
                questions: Questions::listen(),
            };
            let report = session.serve()?;
            frame::write(&control, &report)?;
            session.questions.serve(&session.first.container)?;
        }
    }
    // The stream must outlive the report's delivery: closing it here could reset it under the host's hands.
    std::mem::forget(control);
    Ok(())
}

fn connect(port: u32) -> Result<OwnedFd, ServeError> {
    syscalls::connect_host(port).map_err(|source| ServeError::Connect { port, source })
}

/// The container's streams.
fn connect_streams(config: &BootConfig, spec: &Spec) -> Result<Streams, ServeError> {
    let has_terminal = spec.process().as_ref().is_some_and(|process| process.terminal() == Some(true));
    let streams = HostStreams {
        stdin: config.stdin.then(|| connect(vsock_port::STDIN)).transpose()?,
        stdout: connect(vsock_port::STDOUT)?,
        stderr: (!has_terminal).then(|| connect(vsock_port::STDERR)).transpose()?,
    };
    Streams::new(streams, has_terminal).map_err(|error| ServeError::System("prepare stdio", error))
}

fn launch(
    config: &BootConfig,
    spec: Spec,
    filter: Option<Filter>,
    streams: Streams,
) -> Result<Contained, MakeError> {
    config.layers.iter().for_each(|disk| disks::prepare(disk));
    let rootfs = match config.root_share {
        Some(number) => Rootfs::Directory(share_path(number)),
        None => Rootfs::Layers {
            lowers: config.layers.iter().map(|layer| PathBuf::from(layer).into()).collect(),
            upper_bytes: config.upper_bytes,
        },
    };
    syscalls::mark(GuestMark::ProcessStart);
    let (id, user) = (config.id.as_str(), config.user.as_deref());
    let plan = Plan { id, user, spec, filter, rootfs, streams, gate: config.waits.then_some(0) };
    Contained::make(plan, |pid| if network::is_given() { network::hand_over(pid) } else { Ok(()) })
}

/// What the host asks by dialling.
struct Questions {
    /// The container is served without them, too; the host then sees that nobody answers.
    status: Option<OwnedFd>,
    changes: Option<OwnedFd>,
    /// One at a time; others wait to be accepted.
    answer: Option<Answer>,
}

impl Questions {
    fn listen() -> Self {
        let listen = |port| {
            let listener = syscalls::listen(port);
            listener
                .inspect_err(|error| say(&format!("cannot listen for questions of the host: {error}")))
                .ok()
        };
        Self { status: listen(guest_port::STATUS), changes: listen(guest_port::CHANGES), answer: None }
    }

    fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        let changes = match &self.answer {
            Some(answer) => Some(answer.poll_fd()),
            None => self.changes.as_ref().map(|listener| PollFd::new(listener, PollFlags::IN)),
        };
        self.status.as_ref().map(|listener| PollFd::new(listener, PollFlags::IN)).into_iter().chain(changes)
    }

    /// Does all that can be done without waiting.
    fn answer(&mut self, container: &Container) {
        let accept = |listener: &OwnedFd| {
            rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC).ok()
        };
        while let Some(client) = self.status.as_ref().and_then(accept) {
            let usage = container.cgroup().usage();
            let status = Status { pids: usage.pids.ok(), memory_bytes: usage.memory_bytes.ok() };
            // Whoever does not listen is not waited for.
            let _ = frame::write(File::from(client), &status);
        }
        if self.answer.is_none() {
            self.answer = self.changes.as_ref().and_then(accept).map(Answer::new);
        }
        if self.answer.as_mut().is_some_and(|answer| !answer.advance(container)) {
            self.answer = None;
        }
    }

    /// Answers about a container that has ended, until the host ends the VM.
    fn serve(&mut self, container: &Container) -> Result<(), ServeError> {
        loop {
            self.answer(container);
            let fds: Vec<_> = self.poll_fds().collect();
            pump::poll(&mut [], &fds, None)
                .map_err(|error| ServeError::System("wait for questions of the host", error))?;
        }
    }
}

/// The guest's first container, which all others end with.
struct Session<'a> {
    first: Contained,
    control: &'a File,
    decoder: Decoder,
    questions: Questions,
}

impl Session<'_> {
    /// Serves until the first container's first process has ended; how it did, or why it does not run.
    fn serve(&mut self) -> Result<FromGuest, ServeError> {
        // The container is served without it, too; the host then sees that nobody answers.
        let requests = Requests::listen();
        let mut requests = requests
            .inspect_err(|error| say(&format!("cannot listen for requests of the host: {error}")))
            .ok();
        loop {
            let round = self.wait(requests.as_mut())?;
            if round.started {
                match self.first.read_start() {
                    Some(failure @ FromGuest::Failed { .. }) => return Ok(failure),
                    Some(news) => frame::write(self.control, &news)?,
                    None => {}
                }
            }
            if round.ended {
                return self.finish();
            }
            if round.asked {
                self.questions.answer(&self.first.container);
            }
            if let Some(requests) = &mut requests {
                for (further, news) in requests.further.iter_mut().zip(round.further) {
                    let advanced = further.advance(news);
                    advanced.map_err(|error| ServeError::System("carry stdio", error))?;
                }
                requests.tidy();
                if round.requested {
                    requests.accept(&self.first);
                }
            }
            if round.commanded {
                self.obey()?;
            }
        }
    }

    /// Waits until something happens, and lets what is carried move.
    fn wait(&mut self, requests: Option<&mut Requests>) -> Result<Round, ServeError> {
        let ([pidfd, starter], pumps) = self.first.parts();
        let mut pumps: Vec<_> = pumps.iter_mut().collect();
        let mut others = vec![PollFd::new(self.control, PollFlags::IN)];
        // Each of those that may be missing, by its place.
        let ended = place(&mut others, pidfd);
        let started = place(&mut others, starter);
        let asked: Vec<_> =
            self.questions.poll_fds().map(|question| place(&mut others, Some(question))).collect();
        let mut requested = None;
        let mut further = Vec::new();
        if let Some(Requests { listener, further: each, .. }) = requests {
            requested = place(&mut others, Some(PollFd::new(&*listener, PollFlags::IN)));
            for one in each {
                let (fds, carried) = one.parts();
                pumps.extend(carried);
                further.push(fds.map(|fd| place(&mut others, fd)));
            }
        }
        let ready = pump::poll_each(pumps, &others, None)
            .map_err(|error| ServeError::System("carry stdio", error))?;
        let is_ready = |place: Option<usize>| place.is_some_and(|place| ready.get(place) == Some(&true));
        Ok(Round {
            ended: is_ready(ended),
            commanded: is_ready(Some(0)),
            started: is_ready(started),
            asked: asked.into_iter().any(is_ready),
            requested: is_ready(requested),
            further: further.into_iter().map(|places: [_; 3]| News::of(places.map(is_ready))).collect(),
        })
    }

    fn finish(&mut self) -> Result<FromGuest, ServeError> {
        let exit = self.first.container.wait()?;
        syscalls::mark(GuestMark::ProcessExit);
        self.first.streams.drain().map_err(|error| ServeError::System("carry stdio", error))?;
        Ok(FromGuest::Exited(exit_of(&exit)))
    }

    fn obey(&mut self) -> Result<(), ServeError> {
        let mut bytes = [0; 4096];
        let mut control = self.control;
        match control.read(&mut bytes).map_err(FrameError::Io)? {
            // The host is gone, and with it everybody who wants this container.
            0 => return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into()).into()),
            count => self.decoder.push(bytes.get(..count).unwrap_or_default()),
        }
        while let Some(command) = self.decoder.take()? {
            self.first.obey(&command);
        }
        Ok(())
    }
}

/// Adds to what is waited for; where it stands there.
fn place<'a>(others: &mut Vec<PollFd<'a>>, fd: Option<PollFd<'a>>) -> Option<usize> {
    others.push(fd?);
    Some(others.len() - 1)
}

/// What a round of waiting has brought.
struct Round {
    ended: bool,
    commanded: bool,
    started: bool,
    asked: bool,
    requested: bool,
    /// Of each further process and container.
    further: Vec<News>,
}
