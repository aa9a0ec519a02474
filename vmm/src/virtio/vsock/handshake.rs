//! Host programs that want a stream into the guest, until they have said to which port.
//!
//! ```text
//!   connected ── "CONNECT <port>\n" ──▶ stream is the muxer's ── guest accepts ──▶ "OK <host port>\n", then data
//!       └── anything else, or the end ──▶ closed
//! ```
//! The words are those of Firecracker's hybrid vsock, so that its clients work here too.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::RawFd,
};

use super::Stream;
use crate::virtio::device::Poller;

/// Host programs that have connected and not yet said where to; a further one takes the place of the oldest.
pub const MAX_WAITING: usize = 64;
/// `CONNECT 4294967295\n`.
const MAX_LINE_BYTES: usize = 19;

/// See the module's documentation.
pub struct Handshakes<S> {
    waiting: HashMap<RawFd, (S, Vec<u8>)>,
    order: VecDeque<RawFd>,
}

impl<S: Stream> Handshakes<S> {
    /// Nobody waits.
    pub fn new() -> Self {
        Self { waiting: HashMap::new(), order: VecDeque::new() }
    }

    /// Takes a program that has just connected.
    pub fn add(&mut self, stream: S, poller: &mut dyn Poller) -> io::Result<()> {
        while self.waiting.len() >= MAX_WAITING
            && let Some(oldest) = self.order.front().copied()
        {
            self.drop_one(oldest, poller);
        }
        let fd = stream.fd();
        poller.add(fd)?;
        self.waiting.insert(fd, (stream, Vec::new()));
        self.order.push_back(fd);
        Ok(())
    }

    /// How many wait.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether this descriptor belongs to one that waits.
    pub fn has(&self, fd: RawFd) -> bool {
        self.waiting.contains_key(&fd)
    }

    /// One of them has something to say. Returns its stream, still in the poller, and the port once that is known.
    pub fn ready(&mut self, fd: RawFd, poller: &mut dyn Poller) -> Option<(S, u32)> {
        let (stream, line) = self.waiting.get_mut(&fd)?;
        loop {
            // Byte by byte: what follows the line is the guest's.
            let mut byte = [0];
            match stream.read_own(&mut byte) {
                Ok(1) if byte != *b"\n" && line.len() < MAX_LINE_BYTES => line.extend(byte),
                Ok(1) if byte == *b"\n" => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                _ => {
                    self.drop_one(fd, poller);
                    return None;
                }
            }
        }
        let Some(port) = port_of(line) else {
            self.drop_one(fd, poller);
            return None;
        };
        self.order.retain(|waiting| *waiting != fd);
        self.waiting.remove(&fd).map(|(stream, _)| (stream, port))
    }

    fn drop_one(&mut self, fd: RawFd, poller: &mut dyn Poller) {
        poller.remove(fd);
        self.waiting.remove(&fd);
        self.order.retain(|waiting| *waiting != fd);
    }

    /// Sends all of them away.
    pub fn clear(&mut self, poller: &mut dyn Poller) {
        for fd in std::mem::take(&mut self.order) {
            self.drop_one(fd, poller);
        }
    }
}

/// The port that a line asks for.
fn port_of(line: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    // `parse` takes a sign, too.
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_of_a_well_formed_line_is_its_number() {
        assert_eq!(port_of(b"CONNECT 52"), Some(52));
        assert_eq!(port_of(b"CONNECT 4294967295"), Some(u32::MAX));
        for line in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT -1",
            "CONNECT +1",
            "CONNECT 4294967296",
            "connect 1",
            "CONNECT 1 ",
        ] {
            assert_eq!(port_of(line.as_bytes()), None, "{line:?}");
        }
        assert_eq!(port_of(b"CONNECT \xff"), None);
    }
}
