//! The agent's one poll loop: a container's stdio, the host's control messages, and the end of the container.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use cloche_protocol::{
    VERSION,
    frame::{self, Decoder, FrameError},
    machine::{GuestMark, guest_port, vsock_port},
    message::{self, FromGuest, Status, ToGuest},
};
use cloche_runtime::{
    Container, ExitStatus, Launch, LaunchError, Oci, Rootfs, Stdio, WaitError,
    pump::{self, Pump, Target},
};
use rustix::{
    event::{PollFd, PollFlags},
    net::SocketFlags,
};

use crate::{
    boot::{self, Boot, BootError},
    chain,
    changes::Answer,
    disks, say, syscalls,
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
    let boot = boot::prepare()?;
    let control = File::from(connect(vsock_port::CONTROL)?);
    frame::write(&control, &FromGuest::Ready { version: VERSION })?;
    syscalls::mark(GuestMark::AgentReady);
    let mut streams = Streams::connect(boot.config.stdin)?;
    match launch(boot, &mut streams) {
        Err(error) => {
            let report = FromGuest::Failed { exit_code: error.exit_code(), message: chain(&error) };
            frame::write(&control, &report)?;
        }
        Ok(mut container) => {
            frame::write(&control, &FromGuest::Started)?;
            let mut questions = Questions::listen();
            serve(&mut container, &mut streams, &control, &mut questions)?;
            let exit = container.wait()?;
            syscalls::mark(GuestMark::ProcessExit);
            streams.drain()?;
            let report = FromGuest::Exited(message::Exit {
                status: match exit.status {
                    ExitStatus::Code(code) => message::ExitStatus::Code(code),
                    ExitStatus::Signal(signo) => message::ExitStatus::Signal(signo),
                },
                oom_killed: exit.oom_killed,
                memory_peak_bytes: exit.memory_peak_bytes,
            });
            frame::write(&control, &report)?;
            questions.serve(&container)?;
        }
    }
    // The stream must outlive the report's delivery: closing it here could reset it under the host's hands.
    std::mem::forget(control);
    Ok(())
}

fn connect(port: u32) -> Result<OwnedFd, ServeError> {
    syscalls::connect_host(port).map_err(|source| ServeError::Connect { port, source })
}

/// The container's three streams: the pumps that carry them, and the ends that the container gets.
struct Streams {
    pumps: Vec<Pump>,
    container: Option<Stdio>,
}

impl Streams {
    fn connect(with_stdin: bool) -> Result<Self, ServeError> {
        let pipe = |made: io::Result<_>| made.map_err(|error| ServeError::System("make a pipe", error));
        let mut pumps = Vec::with_capacity(3);
        let stdin = if with_stdin {
            let (read, write) = pipe(pump::pipe_write_side())?;
            pumps.push(Pump::new(connect(vsock_port::STDIN)?, write, Target::NonBlocking));
            read
        } else {
            File::open("/dev/null").map_err(|error| ServeError::System("open /dev/null", error))?.into()
        };
        let mut output = |port| {
            let (read, write) = pipe(pump::pipe_read_side())?;
            let stream = connect(port)?;
            rustix::io::ioctl_fionbio(&stream, true)
                .map_err(|error| ServeError::System("make a stream non-blocking", error.into()))?;
            pumps.push(Pump::new(read, stream, Target::NonBlocking));
            Ok::<_, ServeError>(write)
        };
        let stdout = output(vsock_port::STDOUT)?;
        let stderr = output(vsock_port::STDERR)?;
        Ok(Self { pumps, container: Some(Stdio { stdin, stdout, stderr }) })
    }

    /// Moves what is left in the pipes of a container that has ended. Every process of it is dead (its PID
    /// namespace died with its first process), so the pipes come to their end; stdin has nobody to go to.
    fn drain(&mut self) -> Result<(), ServeError> {
        let stdin_pumps = self.pumps.len() - 2;
        self.pumps.drain(..stdin_pumps);
        while !self.pumps.iter().all(Pump::is_done) {
            pump::poll(&mut self.pumps, &[], None)
                .map_err(|error| ServeError::System("carry stdio", error))?;
        }
        Ok(())
    }
}

fn launch(boot: Boot, streams: &mut Streams) -> Result<Container, LaunchError> {
    boot.config.layers.iter().for_each(|disk| disks::prepare(disk));
    let layers = boot.config.layers.into_iter().map(|layer| PathBuf::from(layer).into()).collect();
    let stdio = streams.container.take().unwrap_or_else(|| unreachable!("a boot launches once"));
    syscalls::mark(GuestMark::ProcessStart);
    cloche_runtime::launch(Launch {
        id: &boot.config.id,
        spec: &boot.spec,
        user: boot.config.user.as_deref(),
        filter: Some(&boot.filter),
        rootfs: Rootfs::Layers { lowers: layers, upper_bytes: boot.config.upper_bytes },
        stdio,
        kill_on_parent_death: true,
        approve: None,
        oci: Oci::default(),
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

/// Serves until the container's first process has ended.
fn serve(
    container: &mut Container,
    streams: &mut Streams,
    mut control: &File,
    questions: &mut Questions,
) -> Result<(), ServeError> {
    let mut decoder = Decoder::default();
    loop {
        let mut others = vec![
            PollFd::from_borrowed_fd(container.pidfd(), PollFlags::IN),
            PollFd::from_borrowed_fd(control.as_fd(), PollFlags::IN),
        ];
        others.extend(questions.poll_fds());
        let count = others.len();
        let ready = pump::poll(&mut streams.pumps, &others, None)
            .map_err(|error| ServeError::System("carry stdio", error))?;
        drop(others);
        let questioned = ready.iter().take(count).skip(2).any(|ready| *ready);
        let [ended, commanded] = [ready.first(), ready.get(1)].map(|ready| ready == Some(&true));
        if ended {
            return Ok(());
        }
        if questioned {
            questions.answer(container);
        }
        if commanded {
            let mut bytes = [0; 4096];
            match control.read(&mut bytes).map_err(FrameError::Io)? {
                // The host is gone, and with it everybody who wants this container.
                0 => return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into()).into()),
                count => decoder.push(&bytes[..count]),
            }
            while let Some(ToGuest::Signal { signo }) = decoder.take()? {
                // The process may have ended meanwhile; then the signal has nobody to reach.
                let _ = container.signal(signo);
            }
        }
    }
}
