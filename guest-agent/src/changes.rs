//! Sends the host what the container has written, beside everything else: no read of the guest's memory file system
//! waits, and nothing is written to the host before it takes it.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
};

use cloche_protocol::{
    changes::{Ask, End},
    frame::{self, Decoder},
};
use cloche_runtime::{Changes, Container};
use rustix::event::{PollFd, PollFlags};

use crate::chain;

/// Bytes read at once; less than [`cloche_protocol::changes::MAX_CHUNK_BYTES`].
const CHUNK_BYTES: usize = 64 * 1024;

/// One host that asks.
pub struct Answer {
    stream: File,
    asked: Decoder,
    changes: Option<Changes>,
    /// Whether the container stands still for this.
    is_frozen: bool,
    out: Vec<u8>,
    out_at: usize,
    is_last: bool,
}

impl Answer {
    /// To whoever has connected; the stream is non-blocking.
    pub fn new(stream: OwnedFd) -> Self {
        Self {
            stream: stream.into(),
            asked: Decoder::default(),
            changes: None,
            is_frozen: false,
            out: Vec::new(),
            out_at: 0,
            is_last: false,
        }
    }

    /// What is to be waited for.
    pub fn poll_fd(&self) -> PollFd<'_> {
        let is_asked = self.changes.is_some() || self.is_last;
        PollFd::new(&self.stream, if is_asked { PollFlags::OUT } else { PollFlags::IN })
    }

    /// Does what can be done now; false once there is nothing left, or nobody who wants it.
    pub fn advance(&mut self, container: &Container) -> bool {
        let go_on = self.step(container).unwrap_or(false);
        if !go_on && self.is_frozen {
            // A container that cannot go on is the host's to end.
            let _ = container.cgroup().thaw();
        }
        go_on
    }

    fn step(&mut self, container: &Container) -> io::Result<bool> {
        if self.changes.is_none() && !self.is_last {
            let mut bytes = [0; 256];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(false),
                Ok(count) => self.asked.push(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
            let Some(ask) = self.asked.take().map_err(io::Error::other)? else { return Ok(true) };
            match self.begin(&ask, container) {
                Ok(changes) => self.changes = Some(changes),
                Err(error) => self.end(Some(error))?,
            }
        }
        while self.out_at < self.out.len() || self.fill()? {
            match self.stream.write(&self.out[self.out_at..]) {
                Ok(count) => self.out_at += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        // The host closes it, once it has read all.
        rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Write)?;
        Ok(false)
    }

    fn begin(&mut self, ask: &Ask, container: &Container) -> Result<Changes, String> {
        if ask.freeze {
            container.cgroup().freeze().map_err(|error| chain(&error))?;
            self.is_frozen = true;
        }
        let changes = container.changes().ok_or("the container has no writable layer of its own")?;
        changes.map_err(|error| error.to_string())
    }

    /// Makes the next chunk; false if the last one is sent.
    fn fill(&mut self) -> io::Result<bool> {
        let Some(changes) = &mut self.changes else { return Ok(false) };
        self.out.clear();
        self.out_at = 0;
        self.out.resize(4 + CHUNK_BYTES, 0);
        match changes.read(&mut self.out[4..]) {
            Ok(0) => self.end(None)?,
            Ok(count) => {
                self.out.truncate(4 + count);
                self.out[..4].copy_from_slice(&(count as u32).to_le_bytes());
            }
            Err(error) => self.end(Some(error.to_string()))?,
        }
        Ok(true)
    }

    fn end(&mut self, error: Option<String>) -> io::Result<()> {
        self.changes = None;
        self.is_last = true;
        self.out.clear();
        self.out_at = 0;
        self.out.extend([0; 4]);
        frame::write(&mut self.out, &End { error }).map_err(io::Error::other)
    }
}
