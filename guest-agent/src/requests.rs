//! What the host asks about the container while it runs, each on a stream that the host opens: further processes,
//! signals, limits, a list of processes.
//!
//! The host is trusted, and says what it wants as soon as it has connected.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::fd::OwnedFd,
    time::Duration,
};

use cloche_protocol::{
    frame::{self, Decoder, FrameError},
    machine::guest_port,
    message::{self, Answer, FromGuest, Request, Stream, ToGuest},
};
use cloche_runtime::{Container, ExitStatus, Filter, Join, Joined, cgroup::CgroupError, join, pump::Pump};
use oci_spec::runtime::{LinuxResources, Process, Spec};
use rustix::{
    event::{PollFd, PollFlags},
    net::{
        SocketFlags,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use crate::{
    chain, spec,
    stdio::{HostStreams, Streams},
    syscalls,
};

/// Within this, a host that has connected says what it wants.
const PATIENCE: Duration = Duration::from_secs(5);
/// A command line is shown up to here.
const MAX_COMMAND_BYTES: usize = 4096;
/// All of them together, as JSON: so much of an answer that the rest has room.
const MAX_COMMANDS_BYTES: usize = 128 << 10;

/// Where requests come in, and the further processes that they have led to.
pub struct Requests {
    pub listener: OwnedFd,
    next: u32,
    pub further: Vec<Further>,
}

/// The container that a further process goes into, its configuration and its filter.
type Target<'a> = (&'a Container, &'a Spec, Option<&'a Filter>);

/// A further process, from the request on.
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
    Awaited { process: Process, cgroup: Option<String>, streams: [Option<OwnedFd>; 3] },
    /// It runs, or has ended and what it wrote is not carried yet.
    Made { joined: Joined, streams: Streams, ended: Option<ExitStatus> },
    /// The host knows all.
    Over,
}

impl Requests {
    pub fn listen() -> io::Result<Self> {
        Ok(Self { listener: syscalls::listen(guest_port::REQUESTS)?, next: 0, further: Vec::new() })
    }

    /// Takes in everybody who has connected. What one of them does wrong is its own affair.
    pub fn accept(&mut self, container: &Container, spec: &Spec, filter: Option<&Filter>) {
        while let Ok(client) = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
            let _ = set_socket_timeout(&client, Timeout::Recv, Some(PATIENCE));
            let client = File::from(client);
            let Ok(Some(request)) = frame::read::<Request>(&client) else { continue };
            let answer = match request {
                Request::Stream { number, stream } => {
                    self.attach(number, stream, client.into(), (container, spec, filter));
                    continue;
                }
                Request::Exec { process, cgroup } => match spec::read_process(&process) {
                    Ok(process) => {
                        self.expect(client, process, cgroup);
                        continue;
                    }
                    Err(error) => Err(format!("the process is not usable: {error}")),
                },
                Request::Signal { signo, all: false } => {
                    container.signal(signo).map(|()| Answer::Done).map_err(|error| chain(&error))
                }
                Request::Signal { signo, all: true } => {
                    container.cgroup().signal_all(signo).map(|()| Answer::Done).map_err(|error| chain(&error))
                }
                Request::Processes => processes(container)
                    .map(|processes| Answer::Processes { processes })
                    .map_err(|error| chain(&error)),
                Request::Update { resources } => update(container, &resources).map(|()| Answer::Done),
            };
            let answer = answer.unwrap_or_else(|message| Answer::Failed { message });
            if let Err(error @ FrameError::TooLong(_)) = frame::write(&client, &answer) {
                let _ = frame::write(&client, &Answer::Failed { message: chain(&error) });
            }
        }
    }

    fn expect(&mut self, control: File, process: Process, cgroup: Option<String>) {
        let number = self.next;
        self.next = number.wrapping_add(1);
        if frame::write(&control, &Answer::Accepted { number }).is_err() {
            return;
        }
        let state = State::Awaited { process, cgroup, streams: [None, None, None] };
        self.further.push(Further {
            number,
            control,
            is_deserted: false,
            decoder: Decoder::default(),
            state,
        });
    }

    fn attach(&mut self, number: u32, stream: Stream, client: OwnedFd, target: Target<'_>) {
        let Some(further) = self.further.iter_mut().find(|further| further.number == number) else { return };
        let State::Awaited { process, streams, .. } = &mut further.state else { return };
        let [stdin, stdout, stderr] = streams;
        *match stream {
            Stream::Stdin => stdin,
            Stream::Stdout => stdout,
            Stream::Stderr => stderr,
        } = Some(client);
        let has_terminal = process.terminal() == Some(true);
        if streams.iter().flatten().count() == if has_terminal { 2 } else { 3 } {
            further.start(has_terminal, target);
        }
    }

    /// Forgets those that are over.
    pub fn tidy(&mut self) {
        self.further.retain(|further| !matches!(further.state, State::Over));
    }
}

impl Further {
    fn start(&mut self, has_terminal: bool, target: Target<'_>) {
        let State::Awaited { process, cgroup, streams: [stdin, stdout, stderr] } =
            std::mem::replace(&mut self.state, State::Over)
        else {
            return;
        };
        let Some(stdout) = stdout else { return };
        let made =
            make(target, &process, cgroup.as_deref(), HostStreams { stdin, stdout, stderr }, has_terminal);
        let news = match made {
            Ok((joined, streams)) => {
                self.state = State::Made { joined, streams, ended: None };
                FromGuest::Started
            }
            Err((exit_code, message)) => FromGuest::Failed { exit_code, message },
        };
        let _ = frame::write(&self.control, &news);
    }

    /// What to poll for, and what moves.
    pub fn parts(&mut self) -> (Option<PollFd<'_>>, Option<PollFd<'_>>, &mut [Pump]) {
        let control = (!self.is_deserted).then(|| PollFd::new(&self.control, PollFlags::IN));
        match &mut self.state {
            State::Made { joined, streams, ended } => {
                let pidfd = PollFd::from_borrowed_fd(joined.pidfd(), PollFlags::IN);
                (control, ended.is_none().then_some(pidfd), &mut streams.pumps)
            }
            _ => (control, None, &mut []),
        }
    }

    /// After a round in which `commanded` and `has_ended` told that its control stream, or its process, has something.
    pub fn advance(&mut self, commanded: bool, has_ended: bool) -> io::Result<()> {
        if commanded && !self.obey() {
            // Who stands for it on the host ends before it only if killed; so would it be. With that one the other ends of
            // its streams are gone.
            self.is_deserted = true;
            if let State::Made { joined, streams, ended } = &mut self.state {
                streams.pumps.clear();
                if ended.is_none() {
                    let _ = cloche_runtime::send_signal(joined.pidfd(), libc::SIGKILL);
                }
            }
            if matches!(self.state, State::Awaited { .. }) {
                self.state = State::Over;
                return Ok(());
            }
        }
        let State::Made { joined, streams, ended } = &mut self.state else { return Ok(()) };
        if has_ended && ended.is_none() {
            *ended = Some(joined.wait().map_err(io::Error::other)?);
            streams.close_stdin();
        }
        let Some(status) = *ended else { return Ok(()) };
        if streams.is_drained()? {
            let exit =
                message::Exit { status: exit_status(status), oom_killed: false, memory_peak_bytes: None };
            self.state = State::Over;
            let _ = frame::write(&self.control, &FromGuest::Exited(exit));
        }
        Ok(())
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
            match (self.decoder.take(), &self.state) {
                (Ok(Some(ToGuest::Signal { signo })), State::Made { joined, ended: None, .. }) => {
                    let _ = cloche_runtime::send_signal(joined.pidfd(), signo);
                }
                (Ok(Some(ToGuest::Resize { rows, columns })), State::Made { streams, .. }) => {
                    streams.resize(rows, columns);
                }
                (Ok(Some(_)), _) => {}
                (Ok(None), _) => return true,
                (Err(_), _) => return false,
            }
        }
    }
}

/// Joins the container. An error is an exit code and a message.
fn make(
    (container, spec, filter): Target<'_>,
    process: &Process,
    cgroup: Option<&str>,
    streams: HostStreams,
    has_terminal: bool,
) -> Result<(Joined, Streams), (u8, String)> {
    let failed = |error: &dyn std::error::Error| (125, chain(error));
    let mut streams = Streams::new(streams, has_terminal).map_err(|error| failed(&error))?;
    let below =
        cgroup.map(|path| container.cgroup().below(&[path])).transpose().map_err(|error| failed(&error))?;
    let Some(stdio) = streams.take_given() else { return Err((125, "its streams are taken".into())) };
    let linux = spec.linux().as_ref();
    let joined = join(Join {
        id: "container",
        pid: container.pid(),
        pidfd: container.pidfd(),
        process,
        seccomp: None,
        filter,
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
pub fn exit_status(status: ExitStatus) -> message::ExitStatus {
    match status {
        ExitStatus::Code(code) => message::ExitStatus::Code(code),
        ExitStatus::Signal(signo) => message::ExitStatus::Signal(signo),
    }
}

fn update(container: &Container, resources: &str) -> Result<(), String> {
    let resources: LinuxResources = serde_json::from_str(resources).map_err(|error| error.to_string())?;
    let limit = resources.memory().as_ref().and_then(|memory| memory.limit()).unwrap_or(0);
    let machine = rustix::system::sysinfo().totalram;
    if u64::try_from(limit).is_ok_and(|limit| limit > machine) {
        return Err(format!(
            "linux.resources.memory.limit {limit} is more than the memory of the virtual machine, {machine} bytes, \
             which its limit at creation has fixed"
        ));
    }
    container.cgroup().apply(&resources).map_err(|error| chain(&error))
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
