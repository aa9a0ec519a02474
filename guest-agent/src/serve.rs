//! The agent's one poll loop: what processes of the container read and write, what the host says and asks, and the end
//! of the container.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
};

use cloche_protocol::{
    VERSION,
    boot::{BootConfig, share_path},
    frame::{self, Decoder, FrameError},
    machine::{GuestMark, guest_port, vsock_port},
    message::{self, FromGuest, Status, ToGuest},
};
use cloche_runtime::{Container, Filter, Launch, LaunchError, Oci, Rootfs, WaitError, pump};
use oci_spec::runtime::Spec;
use rustix::{
    event::{PollFd, PollFlags},
    net::SocketFlags,
};

use crate::{
    boot::{self, Boot, BootError},
    chain,
    changes::Answer,
    disks, network,
    requests::{Requests, exit_status},
    say,
    stdio::{HostStreams, Streams},
    syscalls,
};

/// At which a container waits to be started.
const GATE: &str = "/cloche/gate";

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
    /// The container's interfaces cannot be set up.
    #[error("cannot set up the container's network")]
    Network(#[source] io::Error),
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
    let mut streams = connect_streams(&config, &spec)?;
    let gate = config.waits.then(|| UnixListener::bind(GATE)).transpose();
    let gate = gate.map_err(|error| ServeError::System("make the container's gate", error))?;
    match launch(&config, &spec, filter.as_ref(), &mut streams, gate.as_ref()) {
        Err(error) => {
            let report = FromGuest::Failed { exit_code: error.exit_code(), message: chain(&error) };
            frame::write(&control, &report)?;
        }
        Ok(container) => {
            // Or its end would not be seen.
            drop(gate);
            if network::is_given() {
                network::hand_over(container.pid()).map_err(ServeError::Network)?;
            }
            streams
                .receive_terminal()
                .map_err(|error| ServeError::System("receive the container's terminal", error))?;
            frame::write(&control, &if config.waits { FromGuest::Created } else { FromGuest::Started })?;
            let mut session = Session {
                container,
                spec: &spec,
                filter: filter.as_ref(),
                streams,
                control: &control,
                decoder: Decoder::default(),
                starter: None,
                questions: Questions::listen(),
            };
            let report = session.serve()?;
            frame::write(&control, &report)?;
            session.questions.serve(&session.container)?;
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
    spec: &Spec,
    filter: Option<&Filter>,
    streams: &mut Streams,
    gate: Option<&UnixListener>,
) -> Result<Container, LaunchError> {
    config.layers.iter().for_each(|disk| disks::prepare(disk));
    let rootfs = match config.root_share {
        Some(number) => Rootfs::Directory(share_path(number)),
        None => Rootfs::Layers {
            lowers: config.layers.iter().map(|layer| PathBuf::from(layer).into()).collect(),
            upper_bytes: config.upper_bytes,
        },
    };
    let stdio = streams.take_given().unwrap_or_else(|| unreachable!("a boot launches once"));
    syscalls::mark(GuestMark::ProcessStart);
    cloche_runtime::launch(Launch {
        id: &config.id,
        spec,
        user: config.user.as_deref(),
        filter,
        rootfs,
        stdio,
        kill_on_parent_death: true,
        approve: None,
        oci: Oci { gate: gate.map(AsFd::as_fd), console_socket: streams.console_socket(), ..Oci::default() },
    })
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

/// A container that runs, or waits to.
struct Session<'a> {
    container: Container,
    spec: &'a Spec,
    filter: Option<&'a Filter>,
    streams: Streams,
    control: &'a File,
    decoder: Decoder,
    /// Where the container, let through its gate, says what keeps it from running its program.
    starter: Option<UnixStream>,
    questions: Questions,
}

impl Session<'_> {
    /// Serves until the container's first process has ended; how it did, or why it does not run.
    fn serve(&mut self) -> Result<FromGuest, ServeError> {
        // The container is served without it, too; the host then sees that nobody answers.
        let requests = Requests::listen();
        let mut requests = requests
            .inspect_err(|error| say(&format!("cannot listen for requests of the host: {error}")))
            .ok();
        loop {
            let round = self.wait(requests.as_mut())?;
            if round.started
                && let Some(failure) = self.read_start()?
            {
                return Ok(failure);
            }
            if round.ended {
                return self.finish();
            }
            if round.asked {
                self.questions.answer(&self.container);
            }
            if let Some(requests) = &mut requests {
                for (further, [commanded, ended]) in requests.further.iter_mut().zip(round.further) {
                    let advanced = further.advance(commanded, ended);
                    advanced.map_err(|error| ServeError::System("carry stdio", error))?;
                }
                requests.tidy();
                if round.requested {
                    requests.accept(&self.container, self.spec, self.filter);
                }
            }
            if round.commanded {
                self.obey()?;
            }
        }
    }

    /// Waits until something happens, and lets what is carried move.
    fn wait(&mut self, requests: Option<&mut Requests>) -> Result<Round, ServeError> {
        let mut pumps: Vec<_> = self.streams.pumps.iter_mut().collect();
        let mut others = vec![
            PollFd::from_borrowed_fd(self.container.pidfd(), PollFlags::IN),
            PollFd::new(self.control, PollFlags::IN),
        ];
        // Each of those that may be missing, by its place.
        let started = place(
            &mut others,
            self.starter.as_ref().map(|starter| PollFd::from_borrowed_fd(starter.as_fd(), PollFlags::IN)),
        );
        let asked: Vec<_> =
            self.questions.poll_fds().map(|question| place(&mut others, Some(question))).collect();
        let mut requested = None;
        let mut further = Vec::new();
        if let Some(Requests { listener, further: each, .. }) = requests {
            requested = place(&mut others, Some(PollFd::new(&*listener, PollFlags::IN)));
            for one in each {
                let (control, pidfd, carried) = one.parts();
                pumps.extend(carried);
                further.push([control, pidfd].map(|fd| place(&mut others, fd)));
            }
        }
        let ready = pump::poll_each(pumps, &others, None)
            .map_err(|error| ServeError::System("carry stdio", error))?;
        let is_ready = |place: Option<usize>| place.is_some_and(|place| ready.get(place) == Some(&true));
        Ok(Round {
            ended: is_ready(Some(0)),
            commanded: is_ready(Some(1)),
            started: is_ready(started),
            asked: asked.into_iter().any(is_ready),
            requested: is_ready(requested),
            further: further.into_iter().map(|places| places.map(is_ready)).collect(),
        })
    }

    fn finish(&mut self) -> Result<FromGuest, ServeError> {
        let exit = self.container.wait()?;
        syscalls::mark(GuestMark::ProcessExit);
        self.streams.drain().map_err(|error| ServeError::System("carry stdio", error))?;
        Ok(FromGuest::Exited(message::Exit {
            status: exit_status(exit.status),
            oom_killed: exit.oom_killed,
            memory_peak_bytes: exit.memory_peak_bytes,
        }))
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
            match command {
                // The process may have ended meanwhile; then the signal has nobody to reach.
                ToGuest::Signal { signo } => drop(self.container.signal(signo)),
                ToGuest::Resize { rows, columns } => self.streams.resize(rows, columns),
                ToGuest::Start => {
                    // One that was killed at its gate has ended, which is seen.
                    let starter = UnixStream::connect(GATE);
                    self.starter = starter.and_then(|mut gate| gate.write_all(&[1]).map(|()| gate)).ok();
                }
            }
        }
        Ok(())
    }

    /// What a container that was let through its gate has to say: nothing, if it runs its program.
    fn read_start(&mut self) -> Result<Option<FromGuest>, ServeError> {
        let Some(mut starter) = self.starter.take() else { return Ok(None) };
        let mut report = Vec::new();
        // One that is killed now has ended, which is seen.
        let _ = starter.read_to_end(&mut report);
        Ok(match report.as_slice() {
            [] => {
                frame::write(self.control, &FromGuest::Started)?;
                None
            }
            [exit_code, message @ ..] => Some(FromGuest::Failed {
                exit_code: *exit_code,
                message: String::from_utf8_lossy(message).into_owned(),
            }),
        })
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
    /// Of each further process: whether its control stream has something, and whether it has ended.
    further: Vec<[bool; 2]>,
}
