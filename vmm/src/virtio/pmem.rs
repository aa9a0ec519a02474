//! The persistent memory device (virtio 1.2 §5.19): a file in the guest's memory. The guest reads and writes it without
//! the device, which only makes durable what was written when the driver asks for it.
//!
//! ```text
//!   queue ─▶ flush ─▶ IoThread: fdatasync … eventfd ─▶ answer, used ring
//! ```
//! The bounds are those of the block device: no more flushes under way than the queue has entries, and a reset waits
//! for the one that has begun.

#[cfg(test)]
mod tests;

use std::{io, os::fd::RawFd, sync::Arc};

use tracing::warn;
use vm_memory::{Bytes, GuestAddress};

use super::{
    device::{Device, Identity, Poller, Progress, Readiness, Running, device_type},
    queue::{Buffers, QueueError},
    under_way::UnderWay,
};
use crate::{
    backends::disk::{Disk, IoThread, Operation, Work},
    guest_memory::{self, GuestMemory},
};

/// What Linux takes at least (`drivers/nvdimm/nd.h`: ND_MIN_NAMESPACE_SIZE), and at once (a subsection).
pub const LEAST_BYTES: u64 = 16 << 20;
pub const UNIT_BYTES: u64 = 2 << 20;

/// Bytes of the guest's memory that a file of `bytes` takes.
pub fn region_bytes(bytes: u64) -> u64 {
    bytes.max(LEAST_BYTES).checked_next_multiple_of(UNIT_BYTES).unwrap_or(u64::MAX)
}

const QUEUE_SIZE: u16 = 16;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];
/// VIRTIO_PMEM_REQ_TYPE_FLUSH (§5.19.6), the only request.
const FLUSH: u32 = 0;
const REQUEST_BYTES: usize = 4;
const RESPONSE_BYTES: usize = 4;
/// Failed flushes that are logged at most.
const MAX_LOGGED_ERRORS: u32 = 5;

/// The device.
pub struct Pmem {
    start: u64,
    bytes: u64,
    /// Each with the chain's head, and where its answer goes. No thread where there is never anything to flush.
    flushes: UnderWay<(u16, Answer)>,
    logged_errors: u32,
}

impl Pmem {
    /// A device for a file that the guest finds at this guest physical address, and what a thread has to do for it, if
    /// it needs one.
    pub fn new(disk: Disk, start: u64, bytes: u64) -> io::Result<(Self, Option<Work>)> {
        let disk = Arc::new(disk);
        let flushes = !disk.read_only() && !disk.never_waits();
        let io = if flushes { Some(IoThread::new(disk.clone())?) } else { None };
        let (thread, work) = io.unzip();
        Ok((Self { start, bytes, flushes: UnderWay::new(thread), logged_errors: 0 }, work))
    }

    fn serve(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let guest = running.memory;
        let Some(queue) = running.queue(0) else { return Ok(Progress::Done) };
        for _ in 0..QUEUE_SIZE {
            if self.flushes.count() >= usize::from(QUEUE_SIZE) {
                // The eventfd goes on.
                return Ok(Progress::Done);
            }
            let Some(chain) = queue.pop(guest)? else {
                if queue.enable_doorbell(guest)? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            let bad = |problem| QueueError::BadRequest { head: chain.head, problem };
            let kind = <[u8; REQUEST_BYTES]>::try_from(chain.readable.prefix(REQUEST_BYTES).to_vec())
                .map_err(|_| bad("it has no request type (virtio 1.2 §5.19.6)"))?;
            let answer = Answer::new(guest, &chain.writable)
                .ok_or_else(|| bad("it has no room for an answer (virtio 1.2 §5.19.6)"))?;
            let head = chain.head;
            let result = match (u32::from_le_bytes(kind), self.flushes.has_thread()) {
                (FLUSH, true) => {
                    self.flushes.submit((head, answer), Operation::Flush);
                    continue;
                }
                (FLUSH, false) => Ok(()),
                _ => Err(io::ErrorKind::Unsupported.into()),
            };
            answer.write(guest, &result);
            queue.push_used(guest, head, RESPONSE_BYTES as u32)?;
        }
        Ok(Progress::More)
    }

    fn finish(&mut self, running: &mut Running) -> Result<(), QueueError> {
        let guest = running.memory;
        let Some(queue) = running.queue(0) else { return Ok(()) };
        while let Some(((head, answer), result)) = self.flushes.next_done() {
            if let Err(error) = &result {
                self.logged_errors = self.logged_errors.saturating_add(1);
                if self.logged_errors <= MAX_LOGGED_ERRORS {
                    warn!(%error, "persistent memory could not be made durable");
                }
            }
            answer.write(guest, &result);
            queue.push_used(guest, head, RESPONSE_BYTES as u32)?;
        }
        Ok(())
    }
}

/// Where an answer goes: four bytes at most, in as many places.
struct Answer(Vec<(GuestAddress, usize)>);

impl Answer {
    fn new(memory: &GuestMemory, room: &Buffers) -> Option<Self> {
        let room = room.prefix(RESPONSE_BYTES);
        (room.len() == RESPONSE_BYTES).then(|| Self(guest_memory::places(memory, room.slices())))
    }

    /// §5.19.6: 0 is success.
    fn write(&self, memory: &GuestMemory, result: &io::Result<()>) {
        let code: u32 = if result.is_ok() { 0 } else { u32::MAX };
        let bytes = code.to_le_bytes();
        let mut rest = bytes.as_slice();
        for (address, bytes) in &self.0 {
            let Some((part, after)) = rest.split_at_checked(*bytes) else { return };
            // It fails only where the guest has given the memory back since.
            let _ = memory.write_slice(part, *address);
            rest = after;
        }
    }
}

impl Device for Pmem {
    fn identity(&self) -> Identity {
        let mut config = self.start.to_le_bytes().to_vec();
        config.extend(self.bytes.to_le_bytes());
        Identity {
            device_type: device_type::PMEM,
            features: 0,
            queue_sizes: QUEUE_SIZES,
            optional_queues: 0,
            config,
        }
    }

    fn start(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.flushes.start();
        self.serve(running)
    }

    fn watch(&mut self, poller: &mut dyn Poller) -> io::Result<()> {
        self.flushes.fd().map_or(Ok(()), |fd| poller.add(fd))
    }

    fn queues_ready(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.serve(running)
    }

    fn fd_ready(&mut self, fd: RawFd, _: Readiness, running: &mut Running) -> Result<Progress, QueueError> {
        if self.flushes.take_notice(fd) {
            self.finish(running)?;
        }
        self.serve(running)
    }

    fn fd_ready_while_stopped(&mut self, fd: RawFd, _: Readiness, _: &mut dyn Poller) {
        if self.flushes.take_notice(fd) {
            while self.flushes.next_done().is_some() {}
        }
    }

    fn stop(&mut self, _: &mut dyn Poller) {
        self.flushes.stop();
    }

    fn is_idle(&self) -> bool {
        self.flushes.count() == 0
    }
}
