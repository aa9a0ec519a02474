//! A child process with its output collected, its input fed, and a deadline that cannot be missed.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};

use crate::alone;
use crate::finished::{Finished, show_outputs};
use crate::procfs;

/// What a child gets on its standard input.
#[derive(Debug, Clone, Default)]
pub enum Input {
    /// `/dev/null`.
    #[default]
    Null,
    /// These bytes, then end of file.
    Bytes(Vec<u8>),
    /// A pipe that the test holds.
    Held,
}

/// A child that runs.
#[derive(Debug)]
pub struct Running {
    command: String,
    child: Child,
    pid: Pid,
    input: Option<ChildStdin>,
    stdout: Collector,
    stderr: Collector,
    deadline: Instant,
}

impl Running {
    /// Starts a command in a process group of its own.
    pub fn start(command: Command, input: &Input, deadline: Instant) -> Result<Self> {
        Self::start_reading(command, input, usize::MAX, deadline)
    }

    /// As [`Running::start`], in a PID namespace of its own.
    pub fn start_alone(command: Command, input: &Input, deadline: Instant) -> Result<Self> {
        Self::start_by(alone::spawn, command, input, usize::MAX, deadline)
    }

    /// Starts a command whose standard output is closed once this many bytes of it are read.
    pub fn start_reading(command: Command, input: &Input, longest: usize, deadline: Instant) -> Result<Self> {
        Self::start_by(Command::spawn, command, input, longest, deadline)
    }

    fn start_by(
        spawn: impl FnOnce(&mut Command) -> io::Result<Child>,
        mut command: Command,
        input: &Input,
        longest: usize,
        deadline: Instant,
    ) -> Result<Self> {
        let text = describe(&command);
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.stdin(if matches!(input, Input::Null) { Stdio::null() } else { Stdio::piped() });
        let mut child = spawn(&mut command).with_context(|| format!("start {text}"))?;
        let stdout = Collector::start(child.stdout.take().context("stdout is piped")?, longest);
        let stderr = Collector::start(child.stderr.take().context("stderr is piped")?, usize::MAX);
        let mut held = child.stdin.take();
        if let Input::Bytes(bytes) = input
            && let Some(mut pipe) = held.take()
        {
            let bytes = bytes.clone();
            // A child that does not read to the end is its own business.
            thread::spawn(move || pipe.write_all(&bytes));
        }
        let pid = Pid::from_child(&child);
        Ok(Self { command: text, child, pid, input: held, stdout, stderr, deadline })
    }

    /// The child's process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends the child, and only it, a signal. One that has ended already is fine.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        match kill_process(self.pid, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("signal {}", self.command)),
        }
    }

    /// Writes to a held input.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let pipe = self.input.as_mut().context("the input is not held")?;
        pipe.write_all(bytes).and_then(|()| pipe.flush()).context("write to stdin")
    }

    /// Ends a held input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Bytes that the child has printed so far.
    pub fn printed(&self) -> usize {
        self.stdout.lock().bytes.len()
    }

    /// Waits until the child has printed `text`.
    pub fn wait_for_stdout(&self, text: &str) -> Result<()> {
        let found = self.stdout.wait_until(self.deadline, |state| {
            state.closed || state.bytes.windows(text.len()).any(|window| window == text.as_bytes())
        });
        let printed = self.stdout.text();
        ensure!(
            found && printed.contains(text),
            "{} never printed {text:?}\n{}",
            self.command,
            self.outputs()
        );
        Ok(())
    }

    /// Waits until `find` gives something, e.g. a process below the child.
    pub fn wait_for<T>(&mut self, what: &str, mut find: impl FnMut(Pid) -> Option<T>) -> Result<T> {
        loop {
            if let Some(found) = find(self.pid) {
                return Ok(found);
            }
            ensure!(Instant::now() < self.deadline, "{what} never appeared\n{}", self.outputs());
            ensure!(!self.has_ended()?, "{} ended before {what} appeared\n{}", self.command, self.outputs());
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether the child has ended. It is reaped then, so that it no longer shows among this process's children.
    fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().context("look after the child")?.is_some())
    }

    /// Waits for the child to end and for its outputs to close.
    pub fn wait(mut self) -> Result<Finished> {
        self.input = None;
        if let Err(late) = self.wait_for_end() {
            self.kill_all();
            return Err(late);
        }
        let status = self.child.wait().context("wait for the child")?;
        // Whoever still holds the pipes after the child is gone would hang a shell pipeline, too.
        let patience = self.deadline.min(Instant::now() + Duration::from_secs(20));
        for (name, collector) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            ensure!(
                collector.wait_until(patience, |state| state.closed),
                "{} has ended, but something keeps its {name} open\n{}",
                self.command,
                self.outputs()
            );
        }
        Ok(Finished {
            command: self.command.clone(),
            status,
            stdout: self.stdout.bytes(),
            stderr: self.stderr.bytes(),
        })
    }

    /// Waits for the child to end while its held input stays open.
    pub fn wait_for_end(&mut self) -> Result<()> {
        while !self.has_ended()? {
            ensure!(
                Instant::now() < self.deadline,
                "{} did not end in time\n{}",
                self.command,
                self.outputs()
            );
            self.sleep_until_end(Duration::from_millis(200))?;
        }
        Ok(())
    }

    /// Repeats a signal every `pause` until the child ends.
    pub fn knock_until_end(mut self, signal: Signal, pause: Duration) -> Result<Finished> {
        let mut next = Instant::now() + pause;
        while !self.has_ended()? && Instant::now() < self.deadline {
            if Instant::now() >= next {
                self.signal(signal)?;
                next = Instant::now() + pause;
            }
            self.sleep_until_end(Duration::from_millis(20))?;
        }
        self.wait()
    }

    fn sleep_until_end(&self, longest: Duration) -> Result<()> {
        let pidfd = pidfd_open(self.pid, PidfdFlags::empty()).context("open a pidfd")?;
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        let longest = Timespec { tv_sec: 0, tv_nsec: i64::from(longest.subsec_nanos()) };
        match poll(&mut fds, Some(&longest)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("poll a pidfd"),
        }
    }

    fn outputs(&self) -> String {
        show_outputs(&self.stdout.bytes(), &self.stderr.bytes())
    }

    fn kill_all(&self) {
        for process in procfs::descendants_of(self.pid) {
            process.kill();
        }
        let _ = kill_process_group(self.pid, Signal::KILL);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Once it is reaped its number may be another's.
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            self.kill_all();
            let _ = self.child.wait();
        }
    }
}

/// Reads a pipe to its end, or to a number of bytes, on a thread of its own.
#[derive(Debug, Clone)]
struct Collector(Arc<(Mutex<Collected>, Condvar)>);

#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    closed: bool,
}

impl Collector {
    fn start(mut pipe: impl Read + Send + 'static, longest: usize) -> Self {
        let collector = Self(Arc::default());
        let shared = collector.clone();
        thread::spawn(move || {
            let mut chunk = vec![0; 64 * 1024];
            loop {
                let count = pipe.read(&mut chunk).unwrap_or(0);
                let mut state = shared.lock();
                state.bytes.extend_from_slice(&chunk[..count]);
                state.closed = count == 0 || state.bytes.len() >= longest;
                shared.0.1.notify_all();
                if state.closed {
                    return;
                }
            }
        });
        collector
    }

    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until(&self, deadline: Instant, met: impl Fn(&Collected) -> bool) -> bool {
        let mut state = self.lock();
        loop {
            if met(&state) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.0.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }
}

fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    format!("`{text}`")
}
