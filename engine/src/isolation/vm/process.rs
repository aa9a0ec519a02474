//! The VMM's process: cloned into a PID namespace and a cgroup of its own, configured, listened to, and ended.
//!
//! ```text
//!  this process ── clone3 ──▶ PID 1 of the namespace ──────────── execve ──▶ cloche vmm
//!                                  └── clone3, if there is a file server ──▶ cloche share
//! ```
//! When the first process of a PID namespace ends, the kernel ends all others in it, and the first one is not waited
//! for successfully before they are gone. So nothing can outlive the VMM, whatever was killed.
//!
//! Its standard input is its configuration; its standard output and error are one pipe, on which events come as JSON
//! lines and anything else is what it says before it dies. No terminal and no other descriptor of the monitor reaches
//! it but those that it is given here.

use std::{
    collections::VecDeque,
    ffi::CStr,
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use cloche_runtime::{Cloned, cgroup::CgroupError, clone3};
use cloche_vmm::{Event, VmConfig};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::fcntl_dupfd_cloexec,
    pipe::{PipeFlags, pipe_with},
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};

use super::{cgroup::VmCgroup, printable};
use crate::syscalls;

/// Descriptors that a VMM inherits are numbered from here, in the order in which they are given.
pub const FIRST_INHERITED_FD: i32 = 3;

/// Bytes of one event line at most: 4 KiB of console, each byte escaped, and what is around them.
const MAX_LINE_BYTES: usize = 64 << 10;
/// Reads of 4 KiB before others have their turn.
const MAX_ROUNDS: u32 = 64;
/// Lines that are kept of what is no event.
const MAX_WORDS: usize = 16;

/// How long a VMM that was killed may take to end. It ends after all that is in its PID namespace, and a file server that
/// waits for a file system of the host, where that waits for a server that does not answer, may never do.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a VMM is not gone.
#[derive(Debug, thiserror::Error)]
pub(super) enum RemoveError {
    /// It was killed in vain.
    #[error(
        "process {pid} or another of its VM was killed and has not ended within {} s: a mounted directory whose file \
         system does not answer (FUSE, NFS) holds it up; repair or unmount that, the next cloche command removes the rest",
        PATIENCE.as_secs()
    )]
    Hangs {
        /// The VMM.
        pid: i32,
    },
    /// Its cgroup stays.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// Why there is no VMM process.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub struct SpawnError {
    action: &'static str,
    #[source]
    source: io::Error,
}

fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> SpawnError {
    move |source| SpawnError { action, source: source.into() }
}

/// Another process in the VMM's PID namespace: this program, with these words, input and output.
#[derive(Debug)]
pub(super) struct Companion {
    pub(super) words: &'static [&'static CStr],
    pub(super) stdin: OwnedFd,
    pub(super) stdout: OwnedFd,
}

/// The VMM's process. Dropping it kills and reaps it, and whatever else is in its PID namespace and its cgroup.
#[derive(Debug)]
pub struct Vmm {
    pid: i32,
    pidfd: OwnedFd,
    cgroup: VmCgroup,
    events: File,
    lines: Lines,
    /// How it ended, once it is reaped.
    status: Option<String>,
    /// It was killed, and does not end.
    hangs: bool,
}

impl Vmm {
    /// Starts a VMM, whose configuration must name standard output for its events. It inherits `inherited` as
    /// descriptors [`FIRST_INHERITED_FD`] and up.
    ///
    /// The calling process must have one thread.
    pub fn spawn(config: &VmConfig, inherited: &[OwnedFd]) -> Result<Self, SpawnError> {
        Self::spawn_in(VmCgroup::none(), config, inherited, None)
    }

    /// As [`Vmm::spawn`], in this cgroup and with this companion.
    pub(super) fn spawn_in(
        cgroup: VmCgroup,
        config: &VmConfig,
        inherited: &[OwnedFd],
        companion: Option<Companion>,
    ) -> Result<Self, SpawnError> {
        let json = serde_json::to_vec(config).map_err(failed("configure the VMM"))?;
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(failed("make a pipe for the VMM"));
        let (stdin, config_writer) = pipe()?;
        let (events, stdout) = pipe()?;
        let (gate, gate_writer) = pipe()?;
        let Clone { pid, pidfd, in_user_namespace } = match clone(&cgroup)? {
            Some(clone) => clone,
            None => {
                drop((config_writer, events, gate_writer));
                // Until this user is mapped: an execve before that would take all capabilities away.
                let _ = rustix::io::retry_on_intr(|| rustix::io::read(&gate, &mut [0; 1]));
                let mut given = vec![stdin.as_fd(), stdout.as_fd(), stdout.as_fd()];
                given.extend(inherited.iter().map(AsFd::as_fd));
                become_vmm(&cgroup, &given, companion.as_ref())
            }
        };
        drop((stdin, stdout, companion));
        let (events, lines) = (events.into(), Lines::default());
        let mut vmm = Self { pid, pidfd, cgroup, events, lines, status: None, hangs: false };
        if in_user_namespace {
            map_own_user(pid).map_err(failed("map this user into the VMM's user namespace"))?;
        }
        drop(gate_writer);
        rustix::io::ioctl_fionbio(&vmm.events, true).map_err(failed("listen to the VMM"))?;
        // It waits for the end of this, and so for all that is done above.
        File::from(config_writer).write_all(&json).map_err(failed("configure the VMM"))?;
        // Before the guest runs, which takes a VMM milliseconds, but not before the VMM: that would make starts longer.
        let limited = vmm.cgroup.limit();
        limited.map_err(|error| failed("limit the VM's processes")(io::Error::other(error)))?;
        Ok(vmm)
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Readable when it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Readable when [`Vmm::take_events`] has something.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// The events that have arrived, and whether no more can come.
    pub fn take_events(&mut self) -> (Vec<Event>, bool) {
        let mut chunk = [0; 4096];
        let mut events = Vec::new();
        // One that sends without end must not keep its monitor from all else.
        let mut rounds = 0..MAX_ROUNDS;
        let closed = loop {
            if rounds.next().is_none() {
                break false;
            }
            match self.events.read(&mut chunk) {
                Ok(0) => break true,
                Ok(count) => self.lines.take(&chunk[..count], &mut events),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break error.kind() != io::ErrorKind::WouldBlock,
            }
        };
        (events, closed)
    }

    /// Says how it ended, and what it said last. One that is well is gone by now; one that lives on without a word is
    /// not waited for long.
    pub fn obituary(&mut self) -> String {
        has_ended_within(self.pidfd(), Duration::from_secs(2));
        self.end();
        let mut told = self.status.clone().unwrap_or_default();
        if let Some(limit) = self.cgroup.exceeded() {
            told.push_str(&limit);
        }
        for words in &self.lines.words {
            told.push('\n');
            told.push_str(words);
        }
        told
    }

    /// As [`Vmm::end`], and removes its cgroup. What hangs is left to the next command's `reconcile`, by its cgroup.
    pub(super) fn remove(mut self) -> Result<(), RemoveError> {
        self.end();
        let cgroup = std::mem::take(&mut self.cgroup);
        if self.hangs {
            cgroup.leave();
            return Err(RemoveError::Hangs { pid: self.pid });
        }
        Ok(cgroup.remove()?)
    }

    /// Kills it and waits for its end, within [`PATIENCE`].
    pub fn end(&mut self) {
        if self.status.is_none() {
            // A process gives up its namespaces before its files. The end of a network namespace waits for the host's
            // RCU in the background, and KVM's own wait would queue behind it: so it ends after KVM (decision 0018).
            let network =
                name_in_proc(self.pidfd()).and_then(|pid| File::open(format!("/proc/{pid}/ns/net")).ok());
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            if has_ended_within(self.pidfd(), PATIENCE) {
                self.reap();
            } else {
                self.hangs = true;
                self.status = Some(RemoveError::Hangs { pid: self.pid }.to_string());
            }
            drop(network);
        }
    }

    fn reap(&mut self) {
        while self.status.is_none() {
            let status = match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok(Some(status)) => status,
                _ => {
                    self.status = Some("unknown status".into());
                    return;
                }
            };
            self.status = Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (_, Some(signo)) => format!("signal {signo}"),
                _ => "unknown status".into(),
            });
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.end();
        if self.hangs {
            std::mem::take(&mut self.cgroup).leave();
        }
    }
}

/// The number by which `/proc` knows a process, which may be another one than in this process's PID namespace (proc(5)).
fn name_in_proc(pidfd: BorrowedFd) -> Option<i32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok().filter(|pid| *pid > 0)
}

/// Whether a process ends in this time. Its end is not taken.
fn has_ended_within(pidfd: BorrowedFd, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)], Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return ready.is_ok_and(|ready| ready > 0),
        }
    }
}

/// What a VMM says, line by line, within bounds: one that was taken over may send anything.
#[derive(Debug, Default)]
struct Lines {
    unread: Vec<u8>,
    /// What is no event, the last lines of it.
    words: VecDeque<String>,
}

impl Lines {
    fn take(&mut self, bytes: &[u8], events: &mut Vec<Event>) {
        self.unread.extend_from_slice(bytes);
        while let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.unread.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(event) => events.push(event),
                Err(_) => self.remember(&line),
            }
        }
        if self.unread.len() > MAX_LINE_BYTES {
            let line = std::mem::take(&mut self.unread);
            self.remember(&line);
        }
    }

    fn remember(&mut self, line: &[u8]) {
        let words = printable(String::from_utf8_lossy(line).trim_end());
        if words.is_empty() {
            return;
        }
        if self.words.len() == MAX_WORDS {
            self.words.pop_front();
        }
        self.words.push_back(words);
    }
}

struct Clone {
    pid: i32,
    pidfd: OwnedFd,
    in_user_namespace: bool,
}

/// Clones this process into a new PID namespace and, on v2, into the cgroup; `None` in the clone. A plain user needs a
/// user namespace for that; the VMM makes all others of its namespaces by itself.
fn clone(cgroup: &VmCgroup) -> Result<Option<Clone>, SpawnError> {
    const NEW_PID: u64 = libc::CLONE_NEWPID as u64;
    const NEW_USER: u64 = libc::CLONE_NEWUSER as u64;
    let target =
        cgroup.clone_target().map_err(|error| failed("enter the VM's cgroup")(io::Error::other(error)))?;
    let target = target.as_ref().map(AsFd::as_fd);
    let (cloned, in_user_namespace) = match clone3(NEW_PID, target) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => (clone3(NEW_PID | NEW_USER, target), true),
        cloned => (cloned, false),
    };
    let cloned = cloned.map_err(failed(
        "start the VMM in a user and PID namespace of its own; this host, or the container that this runs in, forbids \
         them: allow them (sysctl kernel.unprivileged_userns_clone=1, \
         kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces above 0), or run as root",
    ))?;
    Ok(match cloned {
        Cloned::Child => None,
        Cloned::Parent { pid, pidfd } => Some(Clone { pid, pidfd, in_user_namespace }),
    })
}

/// In the clone: enters what is left of the cgroup, starts the companion, and becomes the VMM with `given` as descriptors
/// 0 and up.
fn become_vmm(cgroup: &VmCgroup, given: &[BorrowedFd], companion: Option<&Companion>) -> ! {
    let prepare = || -> io::Result<()> {
        cgroup.enter()?;
        if let Some(companion) = companion {
            start(companion)?;
        }
        Ok(())
    };
    match prepare() {
        Ok(()) => execute(given, &[c"cloche", c"vmm"]),
        Err(error) => give_up(&error),
    }
}

/// Clones this process once more, into the companion.
fn start(companion: &Companion) -> io::Result<()> {
    // Nothing of the user's, a terminal least of all, for a process that a guest may take over.
    let null = File::options().read(true).write(true).open("/dev/null")?;
    match clone3(0, None)? {
        Cloned::Parent { .. } => Ok(()),
        Cloned::Child => {
            execute(&[companion.stdin.as_fd(), companion.stdout.as_fd(), null.as_fd()], companion.words)
        }
    }
}

/// Replaces this process by its own program, with these words and `given` as descriptors 0 and up.
fn execute(given: &[BorrowedFd], words: &[&CStr]) -> ! {
    let attempt = || -> io::Result<()> {
        // No terminal, and no signal that is typed on one: the monitor passes on what is for the guest.
        rustix::process::setsid()?;
        let count = i32::try_from(given.len()).map_err(io::Error::other)?;
        // Above all targets first, since sources may be among them.
        let moved: Vec<OwnedFd> =
            given.iter().map(|fd| fcntl_dupfd_cloexec(fd, count)).collect::<Result<_, _>>()?;
        for (target, fd) in (0..).zip(moved) {
            syscalls::dup_to(fd, target)?;
        }
        Err(syscalls::execute(c"/proc/self/exe", words))
    };
    give_up(&attempt().err().unwrap_or_else(|| io::ErrorKind::Other.into()))
}

fn give_up(error: &io::Error) -> ! {
    // Only exit statuses are left to tell that this failed; none is expected to.
    const NOT_STARTED: u8 = 125;
    // Standard error may be the pipe already, whose reader shows this.
    let _ = writeln!(io::stderr(), "cloche vmm: cannot be started: {error}");
    syscalls::exit_now(NOT_STARTED)
}

/// Makes this user the root of the user namespace that the process is in.
fn map_own_user(pid: i32) -> io::Result<()> {
    let write = |file: &str, text: String| {
        fs::OpenOptions::new()
            .write(true)
            .open(Path::new("/proc").join(pid.to_string()).join(file))?
            .write_all(text.as_bytes())
    };
    write("setgroups", "deny".into())?;
    write("uid_map", format!("0 {} 1", rustix::process::geteuid().as_raw()))?;
    write("gid_map", format!("0 {} 1", rustix::process::getegid().as_raw()))
}

#[cfg(test)]
mod tests {
    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;

    #[test]
    fn end_of_a_process_is_awaited_for_a_time_only() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        assert_eq!(name_in_proc(pidfd.as_fd()), Some(child.id() as i32));
        let begun = Instant::now();
        assert!(!has_ended_within(pidfd.as_fd(), Duration::from_millis(50)));
        assert!(begun.elapsed() >= Duration::from_millis(50));
        child.kill().unwrap();
        assert!(has_ended_within(pidfd.as_fd(), Duration::from_secs(60)));
        child.wait().unwrap();
    }

    #[test]
    fn lines_in_pieces_become_events_and_words() {
        let mut lines = Lines::default();
        let mut events = Vec::new();
        for piece in
            ["{\"type\":\"seccomp\",\"call\":2,", "\"thread\":\"vcpu\"}\npanicked\x1b[2J\n\n", "more"]
        {
            lines.take(piece.as_bytes(), &mut events);
        }
        assert_eq!(events, [Event::Seccomp { call: 2, thread: cloche_vmm::jail::ThreadKind::Vcpu }]);
        assert_eq!(lines.words, ["panicked\\u{1b}[2J"]);
    }

    #[test]
    fn lines_without_end_stay_bounded() {
        let mut lines = Lines::default();
        let mut events = Vec::new();
        for _ in 0..10_000 {
            lines.take(&[b'x'; 4096], &mut events);
            assert!(lines.unread.len() <= MAX_LINE_BYTES && lines.words.len() <= MAX_WORDS);
        }
        assert!(lines.words.iter().all(|words| words.len() <= 4096));
        assert_eq!(events, []);
    }
}
