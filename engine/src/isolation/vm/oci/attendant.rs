//! The process on the host that stands for one in a guest. It is a clone of the command that starts it, and outlives it.
//!
//! ```text
//!  command: clone3 ─▶ wait for HELD ─▶ record, hooks ─▶ release ─▶ wait for the verdict ─▶ end
//!  clone:   leave the command's files ─▶ HELD ─▶ wait ─▶ start ─▶ READY, or code and message ─▶ carry ─▶ end as the process
//! ```
//! Until READY it dies with the command.

use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use cloche_oci::{Child, Error, Signals};
use cloche_protocol::message::{FromGuest, ToGuest};
use cloche_runtime::{
    Cloned, ExitStatus,
    cgroup::Cgroup,
    clone3, close_all_but,
    pump::{self, Pump, Target},
    unblock_signals,
};
use oci_spec::runtime::Process;
use rustix::{
    event::{PollFd, PollFlags},
    io::{Errno, retry_on_intr},
    net::{SocketFlags, accept_with},
    pipe::{PipeFlags, pipe_with},
    process::{Signal, chdir, ioctl_tiocsctty, set_parent_process_death_signal, setsid},
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
    termios::{OptionalActions, Winsize, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize},
};

use crate::syscalls;

/// It is in its namespaces, and waits to be released.
const HELD: u8 = 0xfe;
/// What it stands for runs, or waits at the gate. No exit code is like it.
const READY: u8 = 0xff;
/// As in the runtime: a pipe takes that much whole.
const MAX_MESSAGE_BYTES: usize = 4000;
/// Exit code for what this process could not do.
const FAILED: u8 = 125;
/// That of a process whose machine is gone: it was killed.
const LOST: u8 = 137;
/// How long output may stay open, without a byte coming, after its process ended.
const SILENCE: Duration = Duration::from_secs(10);
/// For the first one: what it starts ends with it.
pub(super) const NEW_PID: u64 = libc::CLONE_NEWPID as u64;
/// For hooks, which set up the network of the process that they are told of.
pub(super) const NEW_NETWORK: u64 = libc::CLONE_NEWNET as u64;

/// One of them, as the command sees it. Dropping it leaves it running.
#[derive(Debug)]
pub(super) struct Attendant {
    pid: i32,
    pidfd: OwnedFd,
}

impl Child for Attendant {
    fn pid(&self) -> i32 {
        self.pid
    }

    fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    fn wait(&mut self) -> Result<ExitStatus, Error> {
        Ok(cloche_runtime::wait_for(self.pidfd.as_fd(), self.pid)?)
    }

    fn discard(self: Box<Self>) {
        let _ = cloche_runtime::send_signal(self.pidfd.as_fd(), libc::SIGKILL);
        let _ = cloche_runtime::wait_for(self.pidfd.as_fd(), self.pid);
    }
}

fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::System(action, source.into())
}

/// What the clone reports by.
pub(super) struct Report {
    verdict: OwnedFd,
    released: OwnedFd,
}

/// Why a start failed: an exit code, and what to say.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) exit_code: u8,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self { exit_code: FAILED, message: message.into() }
    }

    /// As a guest tells it: which may be anything, and other numbers have a meaning of their own where this goes.
    pub(super) fn of_guest(exit_code: u8, message: &str) -> Self {
        let exit_code = if matches!(exit_code, 126 | 127) { exit_code } else { FAILED };
        Self { exit_code, message: super::printable(message) }
    }

    pub(super) fn of(error: &dyn std::error::Error) -> Self {
        Self::new(cloche_runtime::chain(error))
    }

    pub(super) fn step<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::new(format!("cannot {action}: {}", source.into()))
    }
}

impl Report {
    /// In its namespaces; returns once it is released.
    pub(super) fn hold(&self) -> Result<(), Refusal> {
        rustix::io::write(&self.verdict, &[HELD]).map_err(Refusal::step("report to the command"))?;
        let count = retry_on_intr(|| rustix::io::read(&self.released, &mut [0]))
            .map_err(Refusal::step("wait for the command"))?;
        if count == 0 { Err(Refusal::new("the command gave up")) } else { Ok(()) }
    }

    /// It goes on by itself from here.
    pub(super) fn ready(self) -> Result<(), Refusal> {
        set_parent_process_death_signal(None).map_err(Refusal::step("outlive the command"))?;
        rustix::io::write(&self.verdict, &[READY]).map_err(Refusal::step("report to the command")).map(drop)
    }
}

/// Clones this process, into `cgroup` and these new namespaces. In the clone, which keeps the descriptors `kept` and those of stdio, `work` reports,
/// and attends to the end; it returns its exit code. `created` is called with the clone's id once that is in its
/// namespaces.
pub(super) fn start(
    cgroup: &Cgroup,
    kept: &[RawFd],
    created: &dyn Fn(i32) -> Result<(), String>,
    namespaces: u64,
    work: impl FnOnce(Report) -> Result<u8, Refusal>,
) -> Result<Attendant, Error> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(system("make a pipe"));
    let (verdict, verdict_writer) = pipe()?;
    let (released, released_writer) = pipe()?;
    let target = cgroup.clone_target()?;
    match clone3(namespaces, target.as_ref().map(AsFd::as_fd)).map_err(system("clone this process"))? {
        Cloned::Child => {
            let kept = [kept, &[verdict_writer.as_raw_fd(), released.as_raw_fd()]].concat();
            // What was open before is not touched any more, and not given back: this process does not return.
            let again = verdict_writer.try_clone();
            let kept = again.iter().map(AsRawFd::as_raw_fd).chain(kept).collect::<Vec<_>>();
            let attempt = || {
                leave_command(&kept)?;
                let entrances = cgroup.entrances().map_err(|error| Refusal::of(&error))?;
                entrances.enter().map_err(Refusal::step("enter the container's cgroup"))?;
                work(Report { verdict: verdict_writer, released })
            };
            let code = match catch_unwind(AssertUnwindSafe(attempt)) {
                Ok(Ok(code)) => code,
                Ok(Err(refusal)) => tell(again.ok(), &refusal),
                Err(_) => tell(
                    again.ok(),
                    &Refusal::new("the attending process panicked; this is a defect in cloche"),
                ),
            };
            syscalls::exit_now(code)
        }
        Cloned::Parent { pid, pidfd } => {
            drop((verdict_writer, released));
            let mut attendant = Attendant { pid, pidfd };
            let result = see_through(&mut attendant, &verdict, released_writer, created);
            match result {
                Ok(()) => Ok(attendant),
                Err(error) => {
                    Box::new(attendant).discard();
                    Err(error)
                }
            }
        }
    }
}

fn tell(verdict: Option<OwnedFd>, refusal: &Refusal) -> u8 {
    if let Some(verdict) = verdict {
        let mut report = vec![refusal.exit_code];
        report.extend(refusal.message.bytes().take(MAX_MESSAGE_BYTES));
        // Without a reader, nobody is left to tell.
        let _ = rustix::io::write(verdict, &report);
    }
    refusal.exit_code
}

/// The command's side.
fn see_through(
    attendant: &mut Attendant,
    verdict: &OwnedFd,
    released: OwnedFd,
    created: &dyn Fn(i32) -> Result<(), String>,
) -> Result<(), Error> {
    let read = || {
        let mut report = vec![0; 1 + MAX_MESSAGE_BYTES];
        let count = retry_on_intr(|| rustix::io::read(verdict, &mut report))
            .map_err(system("read from the attending process"))?;
        report.truncate(count);
        Ok::<_, Error>(report)
    };
    let mut report = read()?;
    if report == [HELD] {
        created(attendant.pid).map_err(|message| Error::Start { exit_code: FAILED, message })?;
        match rustix::io::write(&released, &[1]) {
            // It has failed already, and the verdict tells why.
            Err(Errno::PIPE) => {}
            result => drop(result.map_err(system("tell the attending process to go on"))?),
        }
        report = read()?;
    }
    match report.as_slice() {
        [READY] => Ok(()),
        [exit_code, message @ ..] => Err(Error::Start {
            exit_code: *exit_code,
            message: String::from_utf8_lossy(message).into_owned(),
        }),
        [] => {
            let how = attendant.wait()?;
            Err(Error::Start {
                exit_code: FAILED,
                message: format!("its attending process was ended: {how:?}"),
            })
        }
    }
}

/// The clone's first steps.
fn leave_command(kept: &[RawFd]) -> Result<(), Refusal> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(Refusal::step("ask to die with the command"))?;
    close_all_but(kept).map_err(Refusal::step("close the command's files"))?;
    // A command that collects signals has blocked them, which the VMM would inherit: it kicks its vCPUs by one.
    unblock_signals();
    setsid().map_err(Refusal::step("start a session"))?;
    chdir("/").map_err(Refusal::step("change to /"))
}

/// What it says of a process, and hears of it.
pub(super) trait Peer {
    /// Readable when there is news.
    fn poll_fds(&self) -> Vec<PollFd<'_>>;
    /// News that has arrived. An error is that none comes any more.
    fn news(&mut self) -> Result<Option<FromGuest>, String>;
    /// Whether its end is that of the machine, which somebody should be told of.
    fn is_the_machine(&self) -> bool;
    /// Says something. A guest that does not listen can still be killed.
    fn tell(&mut self, command: &ToGuest);
}

/// The guest's streams.
pub(super) struct GuestStreams {
    pub(super) stdin: OwnedFd,
    pub(super) stdout: OwnedFd,
    /// None with a terminal.
    pub(super) stderr: Option<OwnedFd>,
}

/// This process's stdio or terminal, carried to and from the guest.
pub(super) struct Carried {
    /// Of the outputs; that of stdin is the last.
    pumps: Vec<Pump>,
    outputs: usize,
    terminal: Option<OwnedFd>,
}

impl Carried {
    pub(super) fn new(streams: GuestStreams, terminal: Option<OwnedFd>) -> io::Result<Self> {
        for stream in
            [Some(&streams.stdin), Some(&streams.stdout), streams.stderr.as_ref()].into_iter().flatten()
        {
            rustix::io::ioctl_fionbio(stream, true)?;
        }
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let mut pumps = Vec::with_capacity(3);
        let stdin = match &terminal {
            Some(terminal) => {
                // Its only user is this process.
                rustix::io::ioctl_fionbio(terminal, true)?;
                pumps.push(Pump::new(streams.stdout, terminal.try_clone()?, Target::NonBlocking));
                dup2_stderr(&null)?;
                terminal.try_clone()?
            }
            None => {
                pumps.push(Pump::new(streams.stdout, own(rustix::stdio::stdout())?, Target::Shared));
                if let Some(stderr) = streams.stderr {
                    pumps.push(Pump::new(stderr, own(rustix::stdio::stderr())?, Target::Shared));
                }
                own(rustix::stdio::stdin())?
            }
        };
        let outputs = pumps.len();
        pumps.push(Pump::new(stdin, streams.stdin, Target::NonBlocking));
        // What a process closes is closed for whoever is at the other end. Its stderr stays, for this one's last words.
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        Ok(Self { pumps, outputs, terminal })
    }
}

/// A terminal of the host, whose other end goes to `socket`: what is typed and shown passes through, since the guest's own
/// terminal does the rest. It is this process's controlling terminal, by which it learns of changes of size.
pub(super) fn open_terminal(process: &Process, socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let terminal = ioctl_tiocgptpeer(&master, flags)?;
    let mut settings = tcgetattr(&terminal)?;
    settings.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &settings)?;
    if let Some(size) = process.console_size() {
        let cells = |number: u64| u16::try_from(number).unwrap_or(u16::MAX);
        let (ws_row, ws_col) = (cells(size.height()), cells(size.width()));
        tcsetwinsize(&terminal, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 })?;
    }
    ioctl_tiocsctty(&terminal)?;
    cloche_runtime::send_terminal(socket, master.as_fd())?;
    Ok(terminal)
}

/// Where a container waits to be started.
pub(super) struct Gate {
    socket: OwnedFd,
    starter: Option<UnixStream>,
}

impl Gate {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, starter: None }
    }

    /// Lets somebody in, if it is one who says go; others only look whether anybody waits. From then on nobody gets through
    /// any more.
    fn open(&mut self) -> bool {
        let Ok(client) = accept_with(&self.socket, SocketFlags::CLOEXEC) else { return false };
        let client = UnixStream::from(client);
        let _ = client.set_read_timeout(Some(Duration::from_secs(5)));
        if retry_on_intr(|| rustix::io::read(&client, &mut [0])) != Ok(1) {
            return false;
        }
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        self.starter = Some(client);
        true
    }

    /// Tells the one who was let in.
    fn tell(&mut self, failure: &Refusal) {
        if let Some(starter) = self.starter.take() {
            tell(Some(starter.into()), failure);
        }
    }
}

/// Attends a process that runs, or waits at a gate, to its end; the exit code that stands for how it ended.
pub(super) fn attend(
    peer: &mut dyn Peer,
    mut carried: Carried,
    signals: &Signals,
    mut gate: Option<Gate>,
) -> io::Result<u8> {
    let mut exit = None;
    loop {
        if let Some(code) = exit {
            // There is nobody left to read its stdin.
            carried.pumps.truncate(carried.outputs);
            if carried.pumps.iter().all(Pump::is_done) {
                return Ok(code);
            }
        }
        let waiting = gate.as_ref().filter(|gate| gate.starter.is_none());
        let mut others = vec![PollFd::new(signals, PollFlags::IN)];
        others.extend(waiting.map(|gate| PollFd::new(&gate.socket, PollFlags::IN)));
        let first_of_peer = others.len();
        if exit.is_none() {
            others.extend(peer.poll_fds());
        }
        let count = others.len();
        // A slow reader of the output is waited for; a guest that neither ends it nor sends any is not.
        let only_source = carried.pumps.iter().all(|pump| pump.is_done() || pump.waits_for_source());
        let timeout = (exit.is_some() && only_source).then_some(SILENCE);
        let ready = pump::poll(&mut carried.pumps, &others, timeout)?;
        drop(others);
        if let (Some(code), true) = (exit, timeout.is_some() && !ready.contains(&true)) {
            return Ok(code);
        }
        while let Some(signo) = signals.take() {
            match &carried.terminal {
                Some(terminal) if signo == libc::SIGWINCH => {
                    if let Ok(size) = tcgetwinsize(terminal) {
                        peer.tell(&ToGuest::Resize { rows: size.ws_row, columns: size.ws_col });
                    }
                }
                _ => peer.tell(&ToGuest::Signal { signo }),
            }
        }
        let is_knocked_at = first_of_peer == 2 && ready.get(1) == Some(&true);
        if let Some(gate) = gate.as_mut().filter(|_| is_knocked_at)
            && gate.open()
        {
            peer.tell(&ToGuest::Start);
        }
        let has_news = ready.iter().take(count).skip(first_of_peer).any(|ready| *ready);
        while exit.is_none() && has_news {
            match peer.news() {
                Ok(None) => break,
                // Once: a guest that says it for ever would keep this from everything else.
                Ok(Some(FromGuest::Started)) if gate.is_some() => drop(gate.take()),
                Ok(Some(FromGuest::Failed { exit_code, message })) => {
                    let refusal = Refusal::of_guest(exit_code, &message);
                    gate.iter_mut().for_each(|gate| gate.tell(&refusal));
                    exit = Some(refusal.exit_code);
                }
                Ok(Some(FromGuest::Exited(end))) => exit = Some(end.status.shell_code()),
                Ok(Some(other @ (FromGuest::Ready { .. } | FromGuest::Created | FromGuest::Started))) => {
                    let _ = writeln!(
                        io::stderr(),
                        "cloche-vm: the guest's agent says {other:?} of a process that is there already"
                    );
                    return Ok(LOST);
                }
                Err(reason) => {
                    if peer.is_the_machine() {
                        let _ = writeln!(io::stderr(), "cloche-vm: the virtual machine is gone: {reason}");
                    }
                    gate.iter_mut().for_each(|gate| gate.tell(&Refusal::new(reason.clone())));
                    exit = Some(LOST);
                }
            }
        }
    }
}
