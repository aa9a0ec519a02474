//! The file server of a VM that mounts files of the host: a process of its own, `cloche share`, that ends with the
//! VMM or with this process, whichever is first.
//!
//! ```text
//!  this process ── Config ──▶ cloche share ── "ready" ──▶ this process
//!                                  ▲
//!                cloche vmm ───────┘ the other end of the same socket, from here on
//! ```

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use cloche_share::{Config, READY, Shared};
use rustix::{
    event::{PollFd, PollFlags},
    net::{AddressFamily, SendFlags, SocketFlags, SocketType},
};

/// It only opens what is shared and locks itself in, but the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(30);
/// A message of 128 KiB and its header, with what the kernel counts besides.
const SEND_BUFFER_BYTES: usize = 512 << 10;
/// Longest reason why it does not serve.
const MAX_REASON_BYTES: u64 = 4096;

/// The process. Dropping it kills and reaps it.
#[derive(Debug)]
pub(super) struct FileServer {
    process: Child,
    pidfd: OwnedFd,
    status: File,
    /// The VMM's end, until the VMM has it.
    socket: Option<OwnedFd>,
    reported: bool,
}

impl FileServer {
    /// Starts a server for these files of the host; `None` if there are none.
    pub(super) fn start(shares: &[Shared]) -> io::Result<Option<Self>> {
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
        let mut process = Command::new("/proc/self/exe")
            .arg0("cloche")
            .arg("share")
            .arg(format!("--die-with={}", std::process::id()))
            .stdin(theirs)
            .stdout(Stdio::piped())
            // Nothing of the user's, a terminal least of all, for a process that a guest may take over.
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        let pid = rustix::process::Pid::from_child(&process);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
        let (Ok(pidfd), Some(status)) = (pidfd, process.stdout.take()) else {
            let _ = process.kill();
            let _ = process.wait();
            return Err(io::ErrorKind::NotFound.into());
        };
        let status = File::from(OwnedFd::from(status));
        let server = Self { process, pidfd, status, socket: Some(ours), reported: false };
        if let Some(socket) = &server.socket {
            rustix::net::send(socket, &config, SendFlags::NOSIGNAL)?;
        }
        Ok(Some(server))
    }

    /// The VMM's end of the socket. With the VMM, the socket ends.
    pub(super) fn take_socket(&mut self) -> Option<OwnedFd> {
        self.socket.take()
    }

    /// Waits until it serves. The inner error is its own reason why it does not.
    pub(super) fn wait_until_ready(&mut self) -> io::Result<Result<(), String>> {
        let started = Instant::now();
        let mut said = Vec::new();
        while !said.ends_with(b"\n") && (said.len() as u64) < MAX_REASON_BYTES {
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
        (!self.reported).then(|| self.pidfd.as_fd())
    }

    /// How it ended, once.
    pub(super) fn take_end(&mut self) -> Option<String> {
        if self.reported {
            return None;
        }
        let status = self.process.try_wait().ok().flatten()?;
        self.reported = true;
        Some(format!("its file server has ended ({status}); what it mounts of the host gives I/O errors"))
    }

    /// Kills it and waits for its end.
    pub(super) fn stop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.stop();
    }
}
