//! The console device (virtio 1.2 §5.3), with one port: what the guest prints goes into the machine's bounded console
//! and, if there is a terminal on the host, to that; what is typed there goes to the guest.
//!
//! ```text
//!   transmit ─▶ Console (the last 64 KiB) ─▶ socket ── full: the queue waits
//!   receive ◀───────────────────────────── socket ── no buffer: the socket waits
//! ```
//! Unlike the serial port's, a line of it is one doorbell, and not a VM exit for each character.

#[cfg(test)]
mod tests;

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    device::{Device, Identity, Poller, Progress, Readiness, Running, device_type},
    queue::QueueError,
};
use crate::{devices::console::Console, guest_memory};

const QUEUE_SIZES: &[u16] = &[64, 64];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// What one chain may print. Linux prints a page at a time.
const MAX_CHAIN_BYTES: usize = 64 << 10;
/// Chains of a queue before other devices have their turn.
const CHAINS_PER_TURN: u16 = 16;

/// The device.
pub struct Terminal {
    console: Arc<Mutex<Console>>,
    socket: Option<UnixStream>,
    /// What was printed and the socket has not taken: the rest of one chain. It stays over a driver's reset.
    unsent: Vec<u8>,
    /// Nobody types any more.
    input_ended: bool,
}

impl Terminal {
    /// A device that prints to `console`, and to the non-blocking `socket`, at which somebody may type.
    pub fn new(console: Arc<Mutex<Console>>, socket: Option<UnixStream>) -> Self {
        Self { console, socket, unsent: Vec::new(), input_ended: false }
    }

    /// Sends what is left. False if the socket takes no more for now.
    fn flush(&mut self) -> bool {
        let Some(socket) = &self.socket else { return true };
        while !self.unsent.is_empty() {
            match rustix::net::send(socket, &self.unsent, rustix::net::SendFlags::NOSIGNAL) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return false,
                // The terminal is gone: the machine's console still has it all.
                Err(_) => self.unsent = Vec::new(),
            }
        }
        true
    }

    fn transmit(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let memory = running.memory;
        let Some(queue) = running.queue(TRANSMIT) else { return Ok(Progress::Done) };
        for _ in 0..CHAINS_PER_TURN {
            if !self.flush() {
                // The socket's readiness goes on.
                return Ok(Progress::Done);
            }
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_doorbell(memory)? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            let head = chain.head;
            if !(1..=MAX_CHAIN_BYTES).contains(&chain.readable.len()) {
                let problem = "it prints nothing or more than 64 KiB (virtio 1.2 §5.3.6)";
                return Err(QueueError::BadRequest { head, problem });
            }
            let bytes = chain.readable.to_vec();
            self.console.lock().unwrap_or_else(PoisonError::into_inner).push(&bytes);
            if self.socket.is_some() {
                self.unsent = bytes;
            }
            queue.push_used(memory, head, 0)?;
        }
        Ok(Progress::More)
    }

    fn receive(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let memory = running.memory;
        let Some(socket) = self.socket.as_ref().filter(|_| !self.input_ended) else {
            return Ok(Progress::Done);
        };
        let Some(queue) = running.queue(RECEIVE) else { return Ok(Progress::Done) };
        for _ in 0..CHAINS_PER_TURN {
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_doorbell(memory)? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            if chain.writable.is_empty() {
                let problem = "it has no room for what is typed (virtio 1.2 §5.3.6)";
                return Err(QueueError::BadRequest { head: chain.head, problem });
            }
            match guest_memory::read(socket.as_fd(), chain.writable.slices()) {
                Ok(bytes @ 1..) => {
                    queue.push_used(memory, chain.head, u32::try_from(bytes).unwrap_or(u32::MAX))?;
                }
                result => {
                    // Nothing now, or nothing any more.
                    self.input_ended = !result.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
                    queue.put_back(&chain);
                    return Ok(Progress::Done);
                }
            }
        }
        Ok(Progress::More)
    }

    fn serve(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let both = [self.receive(running)?, self.transmit(running)?];
        Ok(if both.contains(&Progress::More) { Progress::More } else { Progress::Done })
    }
}

impl Device for Terminal {
    fn identity(&self) -> Identity {
        // Without features: neither a size, nor further ports, nor emergency writes, for which there is the serial
        // port. So all of the space (§5.3.4) is zero.
        Identity {
            device_type: device_type::CONSOLE,
            features: 0,
            queue_sizes: QUEUE_SIZES,
            optional_queues: 0,
            config: vec![0; 12],
        }
    }

    fn watch(&mut self, poller: &mut dyn Poller) -> io::Result<()> {
        self.socket.as_ref().map_or(Ok(()), |socket| poller.add(socket.as_raw_fd()))
    }

    fn queues_ready(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.serve(running)
    }

    fn fd_ready(&mut self, _: RawFd, _: Readiness, running: &mut Running) -> Result<Progress, QueueError> {
        self.serve(running)
    }
}
