//! Carries the bytes of a process's stdio between two file descriptors without ever blocking the caller.
//!
//! The monitor on the host and the agent in the guest are both single poll loops; each has one [`Pump`] per stream.
//! A pump reads only when its buffer is empty and writes only when `poll` said that the target takes bytes, so a
//! slow reader stops the writer (back-pressure) and nothing grows.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::{
    buffer::spare_capacity,
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
};

/// Bytes read at once.
const BUFFER_BYTES: usize = 64 * 1024;

/// How much may be written at once without blocking when `poll` reports a target writable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A non-blocking descriptor of ours: as much as it takes.
    NonBlocking,
    /// A descriptor shared with others, which may not be made non-blocking: `PIPE_BUF` bytes, what a writable pipe
    /// always takes (pipe(7)).
    Shared,
}

impl Target {
    fn chunk_bytes(self) -> usize {
        match self {
            Self::NonBlocking => BUFFER_BYTES,
            Self::Shared => 4096,
        }
    }
}

/// One direction of one stream.
#[derive(Debug)]
pub struct Pump {
    ends: Option<(OwnedFd, OwnedFd)>,
    target: Target,
    buffer: Vec<u8>,
    /// How much of the buffer is written.
    start: usize,
    carried: u64,
}

impl Pump {
    /// Carries bytes from `from` to `to`. `from` may be blocking: it is read only when it is readable.
    pub fn new(from: OwnedFd, to: OwnedFd, target: Target) -> Self {
        Self { ends: Some((from, to)), target, buffer: Vec::new(), start: 0, carried: 0 }
    }

    /// Whether nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.ends.is_none()
    }

    /// Whether it waits for its source, and not for its target.
    pub fn waits_for_source(&self) -> bool {
        self.ends.is_some() && self.start == self.buffer.len()
    }

    /// What to poll for: the source when the buffer is empty, else the target. `None` when done.
    pub fn poll_fd(&self) -> Option<PollFd<'_>> {
        let (from, to) = self.ends.as_ref()?;
        Some(if self.start == self.buffer.len() {
            PollFd::from_borrowed_fd(from.as_fd(), PollFlags::IN)
        } else {
            PollFd::from_borrowed_fd(to.as_fd(), PollFlags::OUT)
        })
    }

    /// Bytes read from the source so far.
    pub fn carried(&self) -> u64 {
        self.carried
    }

    /// Call when `poll` returned any event for [`Pump::poll_fd`]. A target that is gone (EPIPE, reset, hung up) ends the pump
    /// and closes the source, so that its writer learns of it as it would without a pump in between.
    pub fn advance(&mut self) -> io::Result<()> {
        let Some((from, to)) = &self.ends else { return Ok(()) };
        if self.start == self.buffer.len() {
            self.start = 0;
            self.buffer.clear();
            self.buffer.reserve(BUFFER_BYTES);
            // Not filled with zeros before: a first line of output touches one page and not sixteen.
            match rustix::io::read(from, spare_capacity(&mut self.buffer)) {
                Ok(0) => return self.finish(),
                Ok(count) => self.carried += count as u64,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                // A hung-up terminal, a reset peer, or no readable file in the first place: nothing more comes.
                Err(_) => return self.finish(),
            }
            if self.target == Target::Shared {
                // Whether the target takes bytes is known only after the next poll.
                return Ok(());
            }
        }
        let end = self.buffer.len().min(self.start + self.target.chunk_bytes());
        match rustix::io::write(to, &self.buffer[self.start..end]) {
            Ok(count) => self.start += count,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN | Errno::SHUTDOWN | Errno::IO) => {
                return self.finish();
            }
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        if let Some((_, to)) = self.ends.take() {
            // Half-close: a socket's other direction and bytes in flight outlive this. ENOTSOCK for everything else.
            let _ = rustix::net::shutdown(&to, rustix::net::Shutdown::Write);
        }
        Ok(())
    }
}

/// One round of a poll loop: waits until a pump can move or one of `others` is ready, or for as long as `timeout` says,
/// and lets the ready pumps move. Says which descriptors were ready: first those of `others`, then those of the pumps
/// that were at work.
pub fn poll(pumps: &mut [Pump], others: &[PollFd<'_>], timeout: Option<Duration>) -> io::Result<Vec<bool>> {
    poll_each(pumps.iter_mut().collect(), others, timeout)
}

/// As [`poll`], for pumps that are kept in several places.
pub fn poll_each(
    mut pumps: Vec<&mut Pump>,
    others: &[PollFd<'_>],
    timeout: Option<Duration>,
) -> io::Result<Vec<bool>> {
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    let mut fds = others.to_vec();
    fds.extend(pumps.iter().filter_map(|pump| pump.poll_fd()));
    match rustix::event::poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    drop(fds);
    let at_work = pumps.iter_mut().filter(|pump| !pump.is_done());
    for (pump, _) in at_work.zip(ready.iter().skip(others.len())).filter(|(_, ready)| **ready) {
        pump.advance()?;
    }
    Ok(ready)
}

/// A pipe whose end kept by the caller is non-blocking and whose both ends are close-on-exec: (read, write).
pub fn pipe_read_side() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&read, true)?;
    Ok((read, write))
}

/// As [`pipe_read_side`], with the write end kept by the caller and so non-blocking: (read, write).
pub fn pipe_write_side() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&write, true)?;
    Ok((read, write))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn pump_of_more_than_its_buffer_and_the_pipe_hold_moves_all_bytes() {
        let (source, feed) = pipe_read_side().unwrap();
        let (sink, target) = pipe_write_side().unwrap();
        let sent: Vec<u8> = (0..1_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let expected = sent.clone();
        let writer = std::thread::spawn(move || std::fs::File::from(feed).write_all(&sent).unwrap());
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            std::fs::File::from(sink).read_to_end(&mut got).unwrap();
            got
        });
        let mut pump = Pump::new(source, target, Target::NonBlocking);
        while !pump.is_done() {
            poll(std::slice::from_mut(&mut pump), &[], None).unwrap();
        }
        assert_eq!(pump.carried(), expected.len() as u64);
        writer.join().unwrap();
        assert!(reader.join().unwrap() == expected);
    }

    #[test]
    fn pump_whose_target_is_gone_closes_its_source() {
        let (source, feed) = pipe_read_side().unwrap();
        let (sink, target) = pipe_write_side().unwrap();
        drop(sink);
        let mut pump = Pump::new(source, target, Target::NonBlocking);
        rustix::io::write(&feed, b"x").unwrap();
        while !pump.is_done() {
            pump.advance().unwrap();
        }
        assert_eq!(rustix::io::write(&feed, b"x"), Err(Errno::PIPE));
    }
}
