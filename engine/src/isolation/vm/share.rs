//! The file server of a VM that mounts files of the host: a process of its own, `cloche share`, in the PID namespace
//! whose first process is the VMM. So it ends with the VMM at the latest, whatever it or its guest wants.
//!
//! ```text
//!  this process ── Config ──▶ cloche share ── "ready", last words ──▶ this process
//!                                  ▲
//!                cloche vmm ───────┘ the other end of the same socket, from here on
//! ```

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use cloche_share::{Config, READY, Shared};
use rustix::{
    event::{PollFd, PollFlags},
    net::{AddressFamily, SocketFlags, SocketType},
    pipe::{PipeFlags, pipe_with},
};

use super::{printable, process::Companion};

/// It only opens what is shared and locks itself in, but the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);
/// A message of 128 KiB and its header, with what the kernel counts besides.
const SEND_BUFFER_BYTES: usize = 512 << 10;
/// Longest reason why it does not serve.
const MAX_REASON_BYTES: usize = 4096;

/// The process, as this one sees it: by what it says.
#[derive(Debug)]
pub(super) struct FileServer {
    status: File,
    /// The VMM's end of the socket, until the VMM has it.
    socket: Option<OwnedFd>,
    /// What the process is started with, until it is.
    process: Option<Companion>,
    reported: bool,
}

impl FileServer {
    /// A server for these files of the host, to be started with the VMM, and for what others bring to this listening
    /// socket; `None` if there are none.
    pub(super) fn new(shares: &[Shared], listener: Option<BorrowedFd<'_>>) -> io::Result<Option<Self>> {
        if shares.is_empty() {
            return Ok(None);
        }
        let config = serde_json::to_vec(&Config { shares: shares.to_vec() })?;
        if config.len() > cloche_share::MAX_CONFIG_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the paths to mount are too long together",
            ));
        }
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        for end in [&ours, &theirs] {
            // The longest message must fit, whatever this host's default is. The kernel caps it at net.core.wmem_max.
            rustix::net::sockopt::set_socket_send_buffer_size(end, SEND_BUFFER_BYTES)?;
        }
        // It waits there for the process.
        cloche_share::configure(ours.as_fd(), &config, listener)?;
        let (status, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
        let process = Companion { words: &[c"cloche", c"share"], stdin: theirs, stdout };
        Ok(Some(Self { status: status.into(), socket: Some(ours), process: Some(process), reported: false }))
    }

    /// How to start it.
    pub(super) fn take_process(&mut self) -> Option<Companion> {
        self.process.take()
    }

    /// The VMM's end of the socket. With the VMM, the socket ends.
    pub(super) fn take_socket(&mut self) -> Option<OwnedFd> {
        self.socket.take()
    }

    /// Waits until it serves. The inner error is its own reason why it does not.
    pub(super) fn wait_until_ready(&mut self) -> io::Result<Result<(), String>> {
        let started = Instant::now();
        let mut said = Vec::new();
        while !said.ends_with(b"\n") && said.len() < MAX_REASON_BYTES {
            let left = PATIENCE.saturating_sub(started.elapsed());
            let timeout = rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: 0 };
            let mut fds = [PollFd::new(&self.status, PollFlags::IN)];
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Ok(Err(format!("it is not ready within {} s", PATIENCE.as_secs()))),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let mut chunk = [0; 512];
            match self.status.read(&mut chunk)? {
                0 => break,
                count => said.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            }
        }
        let said = String::from_utf8_lossy(&said);
        match said.trim_end() {
            READY => Ok(Ok(())),
            "" => Ok(Err("it ended without a word".into())),
            reason => Ok(Err(reason.into())),
        }
    }

    /// Readable once it has ended, if nobody has been told yet.
    pub(super) fn end(&self) -> Option<BorrowedFd<'_>> {
        (!self.reported).then(|| self.status.as_fd())
    }

    /// That it has ended, once.
    pub(super) fn take_end(&mut self) -> Option<String> {
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.status, PollFlags::IN)];
        if self.reported || !matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(1..)) {
            return None;
        }
        self.reported = true;
        let mut words = [0; MAX_REASON_BYTES];
        let count = self.status.read(&mut words).unwrap_or_default();
        let words = printable(String::from_utf8_lossy(words.get(..count).unwrap_or_default()).trim_end());
        let words = if words.is_empty() { words } else { format!(" ({words})") };
        Some(format!("its file server has ended{words}; what it mounts of the host gives I/O errors"))
    }
}
