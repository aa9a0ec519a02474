//! What the host asks about containers while the first one runs, each on a stream that the host opens: further containers
//! and processes, signals, limits, a list of processes.
//!
//! The host is trusted, and says what it wants as soon as it has connected.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::symlink},
    path::Path,
    time::Duration,
};

use cloche_protocol::{
    boot::{FIRST_NAMESPACES, share_path},
    frame::{self, Decoder, FrameError},
    machine::guest_port,
    message::{self, Answer, FromGuest, Question, Request, Stream, ToGuest},
};
use cloche_runtime::{
    Container, ExitStatus, Filter, Join, Joined, Rootfs, cgroup::CgroupError, join, pump::Pump,
};
use oci_spec::runtime::{LinuxResources, Process, Spec};
use rustix::{
    event::{PollFd, PollFlags},
    net::{
        SocketFlags,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use crate::{
    chain,
    contained::{Contained, Plan, START_PATIENCE},
    spec,
    stdio::{HostStreams, Streams},
    syscalls,
};

/// Within this, a host that has connected says what it wants.
const PATIENCE: Duration = Duration::from_secs(5);
/// A command line is shown up to here.
const MAX_COMMAND_BYTES: usize = 4096;
/// All of them together, as JSON: so much of an answer that the rest has room.
const MAX_COMMANDS_BYTES: usize = 128 << 10;

/// Containers beside the first one; each is some processes and files, and a cgroup.
const MAX_CONTAINERS: usize = 64;

/// Where requests come in, and the further processes and containers that they have led to.
pub struct Requests {
    pub listener: OwnedFd,
    next: u32,
    pub further: Vec<Further>,
}

/// A further process or container, from the request on.
pub struct Further {
    number: u32,
    control: File,
    /// Whoever wanted it is gone.
    is_deserted: bool,
    decoder: Decoder,
    state: State,
}

#[allow(clippy::large_enum_variant, reason = "there are few of them")]
enum State {
    /// Not all of its streams are there.
    Awaited { wanted: Wanted, streams: [Option<OwnedFd>; 3] },
    /// It runs, or has ended and what it wrote is not carried yet.
    Process { joined: Joined, streams: Streams, ended: Option<ExitStatus> },
    /// As is this.
    Container { id: String, contained: Contained },
    /// The host knows all.
    Over,
}

#[allow(clippy::large_enum_variant, reason = "there are few of them")]
enum Wanted {
    /// In the container of this id, or in the first.
    Process {
        container: Option<String>,
        process: Process,
        cgroup: Option<String>,
    },
    Container {
        id: String,
        spec: Spec,
        filter: Option<Filter>,
        root_share: usize,
    },
}

impl Wanted {
    fn has_terminal(&self) -> bool {
        let process = match self {
            Self::Process { process, .. } => Some(process),
            Self::Container { spec, .. } => spec.process().as_ref(),
        };
        process.is_some_and(|process| process.terminal() == Some(true))
    }
}

/// What a round has brought of one.
pub struct News {
    /// Its control stream has something.
    commanded: bool,
    ended: bool,
    /// Its gate has.
    started: bool,
}

impl News {
    /// In the order of [`Further::parts`].
    pub fn of([commanded, ended, started]: [bool; 3]) -> Self {
        Self { commanded, ended, started }
    }
}

impl Requests {
    pub fn listen() -> io::Result<Self> {
        Ok(Self { listener: syscalls::listen(guest_port::REQUESTS)?, next: 0, further: Vec::new() })
    }

    /// Takes in everybody who has connected. What one of them does wrong is its own affair.
    pub fn accept(&mut self, first: &Contained) {
        while let Ok(client) = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
            let _ = set_socket_timeout(&client, Timeout::Recv, Some(PATIENCE));
            let client = File::from(client);
            let Ok(Some(Question { container, request })) = frame::read::<Question>(&client) else {
                continue;
            };
            let wanted = match request {
                Request::Stream { number, stream } => {
                    self.attach(number, stream, client.into(), first);
                    continue;
                }
                Request::Exec { process, cgroup } => spec::read_process(&process)
                    .map(|process| Wanted::Process { container, process, cgroup })
                    .map_err(|error| format!("the process is not usable: {error}")),
                Request::Create { id, spec, filter, root_share } => {
                    self.container(id, &spec, filter.as_deref(), root_share, first)
                }
                asked => {
                    let container = self.find(first, container.as_deref()).map(|found| &found.container);
                    let answer = container.and_then(|container| answer(container, &asked));
                    let answer = answer.unwrap_or_else(|message| Answer::Failed { message });
                    if let Err(error @ FrameError::TooLong(_)) = frame::write(&client, &answer) {
                        let _ = frame::write(&client, &Answer::Failed { message: chain(&error) });
                    }
                    continue;
                }
            };
            match wanted {
                Ok(wanted) => self.expect(client, wanted),
                Err(message) => drop(frame::write(&client, &Answer::Failed { message })),
            }
        }
    }

    /// A container that runs, by its id.
    fn find<'a>(&'a self, first: &'a Contained, id: Option<&str>) -> Result<&'a Contained, String> {
        let Some(id) = id else { return Ok(first) };
        let found = self.further.iter().find_map(|further| match &further.state {
            State::Container { id: of, contained } if of == id => Some(contained),
            _ => None,
        });
        found.ok_or_else(|| format!("container {id} has ended"))
    }

    /// A further container, as far as it can be told now.
    fn container(
        &self,
        id: String,
        spec: &str,
        filter: Option<&[u8]>,
        root_share: usize,
        first: &Contained,
    ) -> Result<Wanted, String> {
        let is_container = |further: &&Further| {
            matches!(
                further.state,
                State::Container { .. } | State::Awaited { wanted: Wanted::Container { .. }, .. }
            )
        };
        if self.further.iter().filter(is_container).count() >= MAX_CONTAINERS {
            return Err(format!(
                "the virtual machine has {MAX_CONTAINERS} containers beside its first, and takes no more"
            ));
        }
        let mut spec =
            spec::read(spec.as_bytes()).map_err(|error| format!("its spec is not usable: {error}"))?;
        if let Some(linux) = spec.linux_mut() {
            linux.set_cgroups_path(Some(Path::new("/").join(&id)));
            linux.resources().as_ref().map_or(Ok(()), fits)?;
        }
        let filter = match filter {
            Some(bytes) => Some(Filter::from_bytes(bytes).ok_or("its system-call filter is none")?),
            None => None,
        };
        // There already, but for the first time.
        let _ = symlink(format!("/proc/{}/ns", first.container.pid()), FIRST_NAMESPACES);
        Ok(Wanted::Container { id, spec, filter, root_share })
    }

    fn expect(&mut self, control: File, wanted: Wanted) {
        let number = self.next;
        self.next = number.wrapping_add(1);
        if frame::write(&control, &Answer::Accepted { number }).is_err() {
            return;
        }
        let state = State::Awaited { wanted, streams: [None, None, None] };
        self.further.push(Further {
            number,
            control,
            is_deserted: false,
            decoder: Decoder::default(),
            state,
        });
    }

    fn attach(&mut self, number: u32, stream: Stream, client: OwnedFd, first: &Contained) {
        let is_meant = |further: &Further| further.number == number;
        let Some(index) = self.further.iter().position(is_meant) else { return };
        let Some(further) = self.further.get_mut(index) else { return };
        let State::Awaited { wanted, streams } = &mut further.state else { return };
        let [stdin, stdout, stderr] = streams;
        *match stream {
            Stream::Stdin => stdin,
            Stream::Stdout => stdout,
            Stream::Stderr => stderr,
        } = Some(client);
        let has_terminal = wanted.has_terminal();
        if streams.iter().flatten().count() < if has_terminal { 2 } else { 3 } {
            return;
        }
        let State::Awaited { wanted, streams: [stdin, Some(stdout), stderr] } =
            std::mem::replace(&mut further.state, State::Over)
        else {
            return;
        };
        let streams = HostStreams { stdin, stdout, stderr };
        let made = Streams::new(streams, has_terminal)
            .map_err(|error| (125, chain(&error)))
            .and_then(|streams| self.make(number, wanted, streams, first));
        let Some(further) = self.further.get_mut(index) else { return };
        let news = match made {
            Ok(state) => {
                let is_container = matches!(state, State::Container { .. });
                further.state = state;
                if is_container { FromGuest::Created } else { FromGuest::Started }
            }
            Err((exit_code, message)) => FromGuest::Failed { exit_code, message },
        };
        let _ = frame::write(&further.control, &news);
    }

    /// Makes what is wanted. An error is an exit code and a message.
    fn make(
        &self,
        number: u32,
        wanted: Wanted,
        streams: Streams,
        first: &Contained,
    ) -> Result<State, (u8, String)> {
        match wanted {
            Wanted::Process { container, process, cgroup } => {
                let target = self.find(first, container.as_deref()).map_err(|message| (125, message))?;
                let (joined, streams) = enter(target, &process, cgroup.as_deref(), streams)?;
                Ok(State::Process { joined, streams, ended: None })
            }
            Wanted::Container { id, spec, filter, root_share } => {
                let rootfs = Rootfs::Directory(share_path(root_share));
                // The first one's is 0.
                let gate = Some(number.saturating_add(1));
                let plan = Plan { id: &id, user: None, spec, filter, rootfs, streams, gate };
                let contained =
                    Contained::make(plan, |_| Ok(())).map_err(|error| (error.exit_code(), chain(&error)))?;
                Ok(State::Container { id, contained })
            }
        }
    }

    /// Forgets those that are over.
    pub fn tidy(&mut self) {
        self.further.retain(|further| !matches!(further.state, State::Over));
    }
}

impl Further {
    /// What to poll for, and what moves.
    pub fn parts(&mut self) -> ([Option<PollFd<'_>>; 3], &mut [Pump]) {
        let control = (!self.is_deserted).then(|| PollFd::new(&self.control, PollFlags::IN));
        match &mut self.state {
            State::Process { joined, streams, ended } => {
                let pidfd = PollFd::from_borrowed_fd(joined.pidfd(), PollFlags::IN);
                ([control, ended.is_none().then_some(pidfd), None], &mut streams.pumps)
            }
            State::Container { contained, .. } => {
                let ([pidfd, starter], pumps) = contained.parts();
                ([control, pidfd, starter], pumps)
            }
            State::Awaited { .. } | State::Over => ([control, None, None], &mut []),
        }
    }

    /// After a round.
    pub fn advance(&mut self, news: News) -> io::Result<()> {
        if news.commanded && !self.obey() {
            // Who stands for it on the host ends before it only if killed; so would it be. With that one the other ends of
            // its streams are gone.
            self.is_deserted = true;
            self.kill();
        }
        let exit = match &mut self.state {
            State::Process { joined, streams, ended } => {
                if news.ended && ended.is_none() {
                    *ended = Some(joined.wait().map_err(io::Error::other)?);
                    streams.close_stdin();
                }
                let Some(status) = *ended else { return Ok(()) };
                if !streams.is_drained()? {
                    return Ok(());
                }
                message::Exit { status: exit_status(status), oom_killed: false, memory_peak_bytes: None }
            }
            State::Container { contained, .. } => {
                if news.started
                    && let Some(news) = contained.read_start()
                {
                    let _ = frame::write(&self.control, &news);
                }
                if news.ended && contained.ended.is_none() {
                    contained.ended = Some(contained.container.wait().map_err(io::Error::other)?);
                    contained.streams.close_stdin();
                    // In a PID namespace that is not its own, others may be left.
                    let _ = contained.container.cgroup().kill_all();
                }
                let Some(exit) = &contained.ended else { return Ok(()) };
                if !contained.streams.is_drained()? {
                    return Ok(());
                }
                exit_of(exit)
            }
            State::Awaited { .. } | State::Over => return Ok(()),
        };
        if let State::Container { contained, .. } = std::mem::replace(&mut self.state, State::Over) {
            // What stays of it is a cgroup without processes.
            let _ = contained.container.delete();
        }
        // With all of it gone, and not before: the host gives its files back.
        let _ = frame::write(&self.control, &FromGuest::Exited(exit));
        Ok(())
    }

    fn kill(&mut self) {
        match &mut self.state {
            State::Process { joined, streams, ended } => {
                streams.pumps.clear();
                if ended.is_none() {
                    let _ = cloche_runtime::send_signal(joined.pidfd(), libc::SIGKILL);
                }
            }
            State::Container { contained, .. } => {
                contained.streams.pumps.clear();
                let _ = contained.container.kill();
            }
            State::Awaited { .. } => self.state = State::Over,
            State::Over => {}
        }
    }

    /// Carries out what came on its control stream; whether that still stands.
    fn obey(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match (&self.control).read(&mut bytes) {
            Ok(0) => return false,
            Ok(count) => self.decoder.push(bytes.get(..count).unwrap_or_default()),
            Err(error) => return error.kind() == io::ErrorKind::Interrupted,
        }
        loop {
            let command = match self.decoder.take::<ToGuest>() {
                Ok(Some(command)) => command,
                Ok(None) => return true,
                Err(_) => return false,
            };
            match (&mut self.state, command) {
                (State::Container { contained, .. }, command) => contained.obey(&command),
                (State::Process { joined, ended: None, .. }, ToGuest::Signal { signo }) => {
                    let _ = cloche_runtime::send_signal(joined.pidfd(), signo);
                }
                (State::Process { streams, .. }, ToGuest::Resize { rows, columns }) => {
                    streams.resize(rows, columns);
                }
                _ => {}
            }
        }
    }
}

/// What can be told of a container at once.
fn answer(container: &Container, asked: &Request) -> Result<Answer, String> {
    let done = |result: Result<(), CgroupError>| result.map(|()| Answer::Done).map_err(|error| chain(&error));
    let cgroup = container.cgroup();
    match asked {
        Request::Signal { signo, all: false } => {
            container.signal(*signo).map(|()| Answer::Done).map_err(|error| chain(&error))
        }
        Request::Signal { signo, all: true } => done(cgroup.signal_all(*signo)),
        Request::Freeze { freeze } => done(if *freeze { cgroup.freeze() } else { cgroup.thaw() }),
        Request::Update { resources } => update(container, resources).map(|()| Answer::Done),
        Request::Processes => processes(container)
            .map(|processes| Answer::Processes { processes })
            .map_err(|error| chain(&error)),
        Request::Create { .. } | Request::Exec { .. } | Request::Stream { .. } => {
            Err("it is no question".into())
        }
    }
}

/// Joins a container. An error is an exit code and a message.
fn enter(
    target: &Contained,
    process: &Process,
    cgroup: Option<&str>,
    mut streams: Streams,
) -> Result<(Joined, Streams), (u8, String)> {
    let failed = |error: &dyn std::error::Error| (125, chain(error));
    let container = &target.container;
    let below =
        cgroup.map(|path| container.cgroup().below(&[path])).transpose().map_err(|error| failed(&error))?;
    let Some(stdio) = streams.take_given() else { return Err((125, "its streams are taken".into())) };
    let linux = target.spec.linux().as_ref();
    // It would not run, and this process would wait for it.
    if container.cgroup().is_frozen() {
        return Err((125, "the container is paused".into()));
    }
    let joined = join(Join {
        patience: Some(START_PATIENCE),
        id: "container",
        pid: container.pid(),
        pidfd: container.pidfd(),
        process,
        seccomp: None,
        filter: target.filter.as_ref(),
        personality: linux.and_then(|linux| linux.personality().as_ref()),
        cgroup: below.as_ref().unwrap_or(container.cgroup()),
        stdio,
        console_socket: streams.console_socket(),
        preserved_fds: &[],
        keep_keyring: false,
        listener: None,
        warn: None,
    })
    .map_err(|error| (error.exit_code(), chain(&error)))?;
    streams.receive_terminal().map_err(|error| failed(&error))?;
    Ok((joined, streams))
}

/// As the protocol has it.
pub fn exit_of(exit: &cloche_runtime::Exit) -> message::Exit {
    message::Exit {
        status: exit_status(exit.status),
        oom_killed: exit.oom_killed,
        memory_peak_bytes: exit.memory_peak_bytes,
    }
}

/// As the protocol has it.
fn exit_status(status: ExitStatus) -> message::ExitStatus {
    match status {
        ExitStatus::Code(code) => message::ExitStatus::Code(code),
        ExitStatus::Signal(signo) => message::ExitStatus::Signal(signo),
    }
}

fn update(container: &Container, resources: &str) -> Result<(), String> {
    let resources: LinuxResources = serde_json::from_str(resources).map_err(|error| error.to_string())?;
    fits(&resources)?;
    container.cgroup().apply(&resources).map_err(|error| chain(&error))
}

/// Refuses a limit on memory that the machine could not keep.
fn fits(resources: &LinuxResources) -> Result<(), String> {
    let limit = resources.memory().as_ref().and_then(|memory| memory.limit()).unwrap_or(0);
    let machine = rustix::system::sysinfo().totalram;
    if u64::try_from(limit).is_ok_and(|limit| limit > machine) {
        return Err(format!(
            "linux.resources.memory.limit {limit} is more than the memory of the virtual machine, {machine} bytes, \
             which the limit of its first container has fixed at creation"
        ));
    }
    Ok(())
}

fn processes(container: &Container) -> Result<Vec<message::Process>, CgroupError> {
    let pids = container.cgroup().processes()?;
    let most = (MAX_COMMANDS_BYTES / pids.len().max(1)).min(MAX_COMMAND_BYTES);
    // One that ends meanwhile is none.
    Ok(pids.into_iter().filter_map(|pid| process(pid, most)).collect())
}

/// proc(5): `/proc/PID/status` and `/proc/PID/cmdline`, of which `most` bytes are shown.
fn process(pid: i32, most: usize) -> Option<message::Process> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next().map(str::to_owned)
    };
    let mut words = Vec::new();
    let command = File::open(format!("/proc/{pid}/cmdline"));
    let _ = command.and_then(|file| file.take(most as u64).read_to_end(&mut words));
    let command = String::from_utf8_lossy(&words).trim_end_matches('\0').replace('\0', " ");
    let command = cut(command, most);
    let command = if command.is_empty() { format!("[{}]", field("Name:")?) } else { command };
    Some(message::Process {
        pid,
        parent: field("PPid:")?.parse().ok()?,
        uid: field("Uid:")?.parse().ok()?,
        command,
    })
}

/// The beginning of a text, as long as its JSON may be: the container chooses it, and some characters take six bytes there.
fn cut(text: String, most: usize) -> String {
    let mut left = most;
    let fits = |character: &char| {
        let length = match character {
            '"' | '\\' => 2,
            '\0'..='\x1f' => 6,
            other => other.len_utf8(),
        };
        left.checked_sub(length).map(|rest| left = rest).is_some()
    };
    text.chars().take_while(fits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_are_cut_to_what_their_json_may_take() {
        for text in ["plain", "\u{1}\u{2}\"\\\n", "äöü€"].map(|text| text.repeat(1000)) {
            let shown = cut(text.clone(), 100);
            let json = serde_json::to_string(&shown).unwrap_or_default();
            assert!(text.starts_with(&shown) && (60..=102).contains(&json.len()), "{json}");
        }
        assert_eq!(cut("short".into(), 100), "short");
    }
}
