//! A container of the guest as the agent has it: the first, which came with the boot, or one that joins it later.

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    time::Duration,
};

use cloche_protocol::message::{FromGuest, ToGuest};
use cloche_runtime::{Container, Exit, Filter, Launch, LaunchError, Oci, Rootfs, pump::Pump};
use oci_spec::runtime::Spec;
use rustix::event::{PollFd, PollFlags};

use crate::stdio::Streams;

/// At which containers wait to be started; each has a number behind it.
const GATE: &str = "/cloche/gate";

/// How long a process may take from its making to its program; nothing else goes on in the guest's agent meanwhile.
pub const START_PATIENCE: Duration = Duration::from_secs(20);

/// A container that runs, or waits to.
pub struct Contained {
    pub container: Container,
    pub spec: Spec,
    pub filter: Option<Filter>,
    pub streams: Streams,
    gate: Gate,
    /// Where the container, let through its gate, says what keeps it from running its program.
    starter: Option<UnixStream>,
    /// How its first process has ended.
    pub ended: Option<Exit>,
}

/// What is to become one.
pub struct Plan<'a> {
    pub id: &'a str,
    pub user: Option<&'a str>,
    pub spec: Spec,
    pub filter: Option<Filter>,
    pub rootfs: Rootfs,
    pub streams: Streams,
    /// The number of its gate, if it waits at one.
    pub gate: Option<u32>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// The runtime says it.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A system call that cannot fail did.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
}

impl MakeError {
    /// As [`LaunchError::exit_code`].
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Launch(error) => error.exit_code(),
            Self::System(..) => 125,
        }
    }
}

impl Contained {
    /// Makes it; `set_up` is called with its process's id once that is there.
    pub fn make(plan: Plan<'_>, set_up: impl FnOnce(i32) -> io::Result<()>) -> Result<Self, MakeError> {
        let Plan { id, user, spec, filter, rootfs, mut streams, gate } = plan;
        let gate = gate.map(|number| format!("{GATE}{number}"));
        let listener = gate.as_ref().map(UnixListener::bind).transpose();
        let listener = listener.map_err(|error| MakeError::System("make the container's gate", error))?;
        let stdio = streams.take_given().unwrap_or_else(|| unreachable!("a plan is used once"));
        let launched = cloche_runtime::launch(Launch {
            id,
            spec: &spec,
            user,
            filter: filter.as_ref(),
            rootfs,
            stdio,
            kill_on_parent_death: true,
            approve: None,
            oci: Oci {
                gate: listener.as_ref().map(AsFd::as_fd),
                console_socket: streams.console_socket(),
                patience: Some(START_PATIENCE),
                ..Oci::default()
            },
        });
        // Or its end would not be seen.
        drop(listener);
        let gate = Gate(gate.unwrap_or_default());
        let container = launched?;
        let system = |action| move |error| MakeError::System(action, error);
        let ready = set_up(container.pid())
            .map_err(system("set up the container's network"))
            .and_then(|()| streams.receive_terminal().map_err(system("receive the container's terminal")));
        if let Err(error) = ready {
            let _ = container.delete();
            return Err(error);
        }
        Ok(Self { container, spec, filter, streams, gate, starter: None, ended: None })
    }

    /// What to poll for, its end and whether [`Contained::read_start`] has something, and what moves.
    pub fn parts(&mut self) -> ([Option<PollFd<'_>>; 2], &mut [Pump]) {
        let of = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let pidfd = self.ended.is_none().then(|| of(self.container.pidfd()));
        let starter = self.starter.as_ref().map(|starter| of(starter.as_fd()));
        ([pidfd, starter], &mut self.streams.pumps)
    }

    /// Carries out what the host says.
    pub fn obey(&mut self, command: &ToGuest) {
        match *command {
            // The process may have ended meanwhile; then the signal has nobody to reach.
            ToGuest::Signal { signo } => drop(self.container.signal(signo)),
            ToGuest::Resize { rows, columns } => self.streams.resize(rows, columns),
            ToGuest::Start => {
                // One that was killed at its gate has ended, which is seen.
                let starter = UnixStream::connect(&self.gate.0);
                self.starter = starter.and_then(|mut gate| gate.write_all(&[1]).map(|()| gate)).ok();
            }
        }
    }

    /// What a container that was let through its gate has to say.
    pub fn read_start(&mut self) -> Option<FromGuest> {
        let mut starter = self.starter.take()?;
        let mut report = Vec::new();
        // One that is killed now has ended, which is seen.
        let _ = starter.read_to_end(&mut report);
        Some(match report.as_slice() {
            [] => FromGuest::Started,
            [exit_code, message @ ..] => FromGuest::Failed {
                exit_code: *exit_code,
                message: String::from_utf8_lossy(message).into_owned(),
            },
        })
    }
}

/// A gate's file, if it has one.
struct Gate(String);

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
