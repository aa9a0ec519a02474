//! The device's queue of requests.

use std::{ops::Range, sync::Arc};

use tracing::warn;
use vm_memory::{GuestAddress, GuestMemoryRegion};

use super::{
    ChunkSlots,
    blocks::{self, BLOCK_BYTES, Blocks, Refusal, State},
    handle::MemoryHandle,
};
use crate::{
    guest_memory::{self, CHUNK_BYTES, Region},
    virtio::{
        config_space::ConfigSpace,
        device::{Device, Identity, Progress, Running, device_type},
        queue::{Chain, QueueError},
    },
};

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (§5.15.3): a driver must not touch what is unplugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// Requests (§5.15.6).
mod request {
    pub const PLUG: u16 = 0;
    pub const UNPLUG: u16 = 1;
    pub const UNPLUG_ALL: u16 = 2;
    pub const STATE: u16 = 3;
}
/// Response types (§5.15.6).
mod response {
    pub const ACK: u16 = 0;
    pub const NACK: u16 = 1;
    pub const BUSY: u16 = 2;
    pub const ERROR: u16 = 3;
}

const QUEUE_SIZES: &[u16] = &[16];
/// A request and an answer: a type, padding, and what depends on the type.
const REQUEST_BYTES: usize = 24;
const RESPONSE_BYTES: usize = 10;
/// Requests before other devices have their turn: each may be several system calls.
const REQUESTS_PER_TURN: u16 = 4;
/// Refusals of the host in the log; a guest can bring about as many as it likes.
const MAX_LOGGED_ERRORS: u32 = 5;

/// The device.
pub struct MemoryDevice {
    region: Arc<Region>,
    slots: Box<dyn ChunkSlots>,
    blocks: Blocks,
    handle: MemoryHandle,
    logged_errors: u32,
}

impl MemoryDevice {
    /// A device that plugs memory of `region`, and asks for this much of it from the start.
    pub fn new(region: Arc<Region>, slots: Box<dyn ChunkSlots>, requested_mib: u32) -> Self {
        let (start, bytes) = (region.start_addr().0, region.len());
        let handle = MemoryHandle::new(start, bytes, requested_mib);
        Self { region, slots, blocks: Blocks::new(start, bytes), handle, logged_errors: 0 }
    }

    /// Steers the device.
    pub fn handle(&self) -> MemoryHandle {
        self.handle.clone()
    }

    /// What a request comes to; `None` if there is more of it to do, for another turn.
    fn answer(&mut self, chain: &Chain) -> Result<Option<[u8; RESPONSE_BYTES]>, QueueError> {
        let bytes = chain.readable.prefix(REQUEST_BYTES).to_vec();
        let fields = (|| {
            let kind = u16::from_le_bytes(bytes.get(0..2)?.try_into().ok()?);
            let address = u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?);
            let count = u16::from_le_bytes(bytes.get(16..18)?.try_into().ok()?);
            Some((kind, address, count))
        })();
        let Some((kind, address, count)) = fields.filter(|_| bytes.len() == REQUEST_BYTES) else {
            let problem = "it is no whole request (virtio 1.2 §5.15.6)";
            return Err(QueueError::BadRequest { head: chain.head, problem });
        };
        if chain.writable.len() < RESPONSE_BYTES {
            let problem = "it has no room for an answer (virtio 1.2 §5.15.6)";
            return Err(QueueError::BadRequest { head: chain.head, problem });
        }
        let range = self.blocks.range(address, count);
        let mut state = 0u16;
        let done = match kind {
            request::PLUG => range.and_then(|range| self.plug(&range)),
            request::UNPLUG => range.and_then(|range| match self.blocks.state(&range) {
                State::Plugged if !blocks::is_at_once(&range) => Err(Refusal::Busy),
                State::Plugged => self.unplug(&range),
                State::Unplugged | State::Mixed => Err(Refusal::Wrong),
            }),
            request::UNPLUG_ALL => match self.blocks.first_plugged() {
                Some(range) => self.unplug(&range),
                None => Ok(()),
            },
            request::STATE => range.map(|range| {
                state = match self.blocks.state(&range) {
                    State::Plugged => 0,
                    State::Unplugged => 1,
                    State::Mixed => 2,
                };
            }),
            _ => Err(Refusal::Wrong),
        };
        self.handle.set_plugged_bytes(self.blocks.plugged_bytes());
        if kind == request::UNPLUG_ALL && self.blocks.plugged_bytes() > 0 {
            return Ok(None);
        }
        let kind = match done {
            Ok(()) => response::ACK,
            Err(Refusal::TooMuch) => response::NACK,
            Err(Refusal::Busy) => response::BUSY,
            Err(Refusal::Wrong) => response::ERROR,
        };
        let mut answer = [0; RESPONSE_BYTES];
        let (kind_at, state_at) = (kind.to_le_bytes(), state.to_le_bytes());
        let written = answer.iter_mut().zip(kind_at.into_iter().chain([0; 6]).chain(state_at));
        written.for_each(|(to, from)| *to = from);
        Ok(Some(answer))
    }

    fn chunk_start(&self, chunk: usize) -> GuestAddress {
        // A chunk of the region, which fits the address space.
        GuestAddress(self.region.start_addr().0 + chunk as u64 * CHUNK_BYTES)
    }

    fn plug(&mut self, range: &Range<usize>) -> Result<(), Refusal> {
        self.blocks.check_plug(range, self.handle.requested_bytes())?;
        for chunk in blocks::chunks(range).filter(|chunk| self.blocks.plugged_in_chunk(*chunk) == 0) {
            if let Err(error) = self.slots.insert(self.chunk_start(chunk)) {
                self.log(chunk, &error, "the host does not let the guest have more memory");
                self.drop_empty_chunks(range);
                return Err(Refusal::Busy);
            }
            self.region.set_present(chunk, true);
        }
        self.blocks.set(range, true);
        Ok(())
    }

    fn unplug(&mut self, range: &Range<usize>) -> Result<(), Refusal> {
        self.blocks.set(range, false);
        self.drop_empty_chunks(range);
        // What is not plugged any more reads as zeros when it is plugged again (§5.15.6: or as anything), and takes no
        // memory of the host.
        self.discard(range.start as u64 * BLOCK_BYTES, range.len() as u64 * BLOCK_BYTES);
        Ok(())
    }

    fn discard(&self, offset: u64, bytes: u64) {
        if let Ok(slice) = self.region.raw_slice(offset as usize, bytes as usize) {
            guest_memory::discard(&slice);
        }
    }

    fn log(&mut self, chunk: usize, error: &std::io::Error, what: &str) {
        self.logged_errors = self.logged_errors.saturating_add(1);
        if self.logged_errors <= MAX_LOGGED_ERRORS {
            warn!(%error, chunk, "{what}");
        }
    }

    /// Takes away the chunks of a range that have no plugged block, with what a guest has put into the others, which
    /// were within its reach.
    fn drop_empty_chunks(&mut self, range: &Range<usize>) {
        let present: Vec<bool> = self.region.parts().map(|part| part.present).collect();
        for chunk in blocks::chunks(range) {
            if self.blocks.plugged_in_chunk(chunk) > 0 || present.get(chunk) != Some(&true) {
                continue;
            }
            self.region.set_present(chunk, false);
            if let Err(error) = self.slots.remove(self.chunk_start(chunk)) {
                self.log(chunk, &error, "memory that the guest gave back stays within its reach");
            }
            self.discard(chunk as u64 * CHUNK_BYTES, CHUNK_BYTES);
        }
    }
}

impl Device for MemoryDevice {
    fn identity(&self) -> Identity {
        Identity {
            device_type: device_type::MEMORY,
            features: UNPLUGGED_INACCESSIBLE,
            queue_sizes: QUEUE_SIZES,
            optional_queues: 0,
            config: Vec::new(),
        }
    }

    fn config_space(&self) -> Option<Arc<ConfigSpace>> {
        Some(self.handle.config().clone())
    }

    fn queues_ready(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let memory = running.memory;
        let Some(queue) = running.queue(0) else { return Ok(Progress::Done) };
        for _ in 0..REQUESTS_PER_TURN {
            let Some(mut chain) = queue.pop(memory)? else {
                if queue.enable_doorbell(memory)? {
                    continue;
                }
                return Ok(Progress::Done);
            };
            let Some(answer) = self.answer(&chain)? else {
                // It is found again, and goes on where it was; its driver waits for the answer.
                queue.put_back(&chain);
                return Ok(Progress::More);
            };
            chain.writable.write(&answer);
            queue.push_used(memory, chain.head, RESPONSE_BYTES as u32)?;
        }
        Ok(Progress::More)
    }

    // §5.15.5: a reset of the device leaves what is plugged plugged, so that there is nothing to stop.
}
