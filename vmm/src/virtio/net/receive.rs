//! From the link into the guest's buffers (virtio 1.2 §5.1.6.3, §5.1.6.4).
//!
//! A frame's size is known only when it has been read, and it is read straight into guest memory. So buffers are taken
//! from the queue first: as many as the frames before it needed, since each costs the kernel something to look at. What
//! the frame does not need is kept for the next one. Behind them the read has a spare buffer of our own, which catches
//! the rest of a larger frame. With merged buffers it is copied into more of them, or waits until the driver has some;
//! else the frame is dropped.

use std::{collections::VecDeque, sync::Arc};

use vm_memory::VolatileSlice;

use super::{
    Limiter,
    device::{Dropped, QUEUE_SIZE, count_drop},
    features,
};
use crate::{
    backends::{
        frame_socket::scatter,
        link::{HEADER_BYTES, Link, MAX_FRAME_BYTES, ReceiveError},
    },
    guest_memory::{Finder, GuestMemory, transfer::Kept},
    virtio::queue::{QueueError, VirtQueue},
};

/// So many buffers are enough: with those of one chain more and the spare one, they are what one read takes.
const MAX_SLICES: usize = 1024 - QUEUE_SIZE as usize - 1;
/// Where the header has the number of merged buffers (§5.1.6).
const NUM_BUFFERS_OFFSET: usize = 10;
/// After each frame, what the next one is expected to need is less by a part in so many, down to what it needed. A
/// buffer too many costs less than a byte that is copied, so that it takes a while.
const FORGETTING: usize = 16;

/// Why receiving ended for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// There is nothing more, or nowhere to put it.
    All,
    /// There is more, but it is the turn of others.
    Turn,
    /// The link is gone.
    LinkGone,
}

/// What receiving has to remember.
pub struct Receiver {
    limiter: Limiter,
    merge: bool,
    /// Bytes that the next frame is expected to have, by those before it.
    expected: usize,
    /// The link may have a frame.
    readable: bool,
    /// A frame for which there were too few buffers, with its header.
    waiting: Option<Vec<u8>>,
    /// Buffers that were taken from the queue.
    stock: Stock,
    /// What a frame's buffers could not take. Without pages of its own until it is first needed.
    spare: Vec<u8>,
    /// The chains of one frame.
    returned: Vec<(u16, u32)>,
}

impl Receiver {
    /// With this limit.
    pub fn new(limiter: Limiter) -> Self {
        Self {
            limiter,
            merge: false,
            expected: 0,
            readable: false,
            waiting: None,
            stock: Stock::default(),
            spare: vec![0; HEADER_BYTES + MAX_FRAME_BYTES],
            returned: Vec::new(),
        }
    }

    /// A driver with these features is there.
    pub fn start(&mut self, accepted: u64) {
        self.merge = accepted & features::MRG_RXBUF != 0;
        self.expected = 0;
        self.readable = true;
        self.waiting = None;
        // What a driver before this one made available is its own again.
        self.stock = Stock::default();
    }

    /// The limit on what is received.
    pub fn limiter(&self) -> &Limiter {
        &self.limiter
    }

    /// The link's file descriptor is readable.
    pub fn link_readable(&mut self) {
        self.readable = true;
    }

    /// Fills the guest's buffers with at most `budget` frames.
    pub fn receive(
        &mut self,
        link: &mut dyn Link,
        queue: &mut VirtQueue,
        memory: &GuestMemory,
        budget: u16,
        dropped: &mut Dropped,
    ) -> Result<Received, QueueError> {
        let mut outcome = Received::Turn;
        for _ in 0..budget {
            if (self.waiting.is_none() && !self.readable) || !self.limiter.permits() {
                outcome = Received::All;
                break;
            }
            // At least one chain.
            let frame = self.waiting.as_ref().map_or(self.expected, Vec::len).max(1);
            self.stock.fill(if self.merge { frame } else { 1 }, queue, memory)?;
            match self.one_frame(link, queue, memory)? {
                Step::Received(bytes) => {
                    self.limiter.charge(bytes.saturating_sub(HEADER_BYTES));
                    self.expected = bytes.max(self.expected - self.expected / FORGETTING);
                    self.stock.take(bytes, &mut self.returned);
                    queue.push_used_together(memory, &self.returned)?;
                }
                Step::Dropped => count_drop(&mut dropped.received, "to the guest"),
                Step::NoBuffers => {
                    // What can never fit must not be waited for.
                    let stock = &self.stock;
                    if stock.slices() >= MAX_SLICES || stock.chains.len() >= usize::from(queue.size()) {
                        self.waiting = None;
                        count_drop(&mut dropped.received, "to the guest");
                    } else if !queue.enable_doorbell(memory)? {
                        // The driver rings when it has added some. Else they have come just now.
                        outcome = Received::All;
                        break;
                    }
                }
                Step::NoFrame => self.readable = false,
                Step::Gone => {
                    self.readable = false;
                    outcome = Received::LinkGone;
                    break;
                }
            }
        }
        Ok(outcome)
    }

    fn one_frame(
        &mut self,
        link: &mut dyn Link,
        queue: &mut VirtQueue,
        memory: &GuestMemory,
    ) -> Result<Step, QueueError> {
        let Some(buffers) = &mut self.stock.buffers else { return Ok(Step::NoBuffers) };
        if self.stock.chains.is_empty() {
            return Ok(Step::NoBuffers);
        }
        let (room, slices) = (self.stock.bytes, buffers.len());
        if let Some(frame) = self.waiting.take() {
            if frame.len() <= room {
                scatter(&[&frame], buffers.slices());
                return Ok(Step::Received(frame.len()));
            }
            if !self.merge {
                return Ok(Step::Dropped);
            }
            self.waiting = Some(frame);
            return Ok(Step::NoBuffers);
        }
        let bytes = match link.receive(&buffers.room(&mut self.spare)) {
            Ok(bytes) => bytes,
            Err(ReceiveError::Empty) => return Ok(Step::NoFrame),
            Err(ReceiveError::Gone) => return Ok(Step::Gone),
        };
        // A frame larger than the largest is cut off by the spare buffer's end; one without a header is nothing.
        if !(HEADER_BYTES..=HEADER_BYTES + MAX_FRAME_BYTES).contains(&bytes) {
            return Ok(Step::Dropped);
        }
        let Some(rest) = bytes.checked_sub(room).and_then(|rest| self.spare.get(..rest)) else {
            return Ok(Step::Received(bytes));
        };
        if rest.is_empty() {
            return Ok(Step::Received(bytes));
        }
        if !self.merge {
            return Ok(Step::Dropped);
        }
        self.stock.fill(bytes, queue, memory)?;
        if self.stock.bytes >= bytes {
            scatter(&[rest], self.stock.buffers().skip(slices));
            return Ok(Step::Received(bytes));
        }
        // The guest's memory held the first part only for a moment; if it has changed it, the frame is as it wants it.
        let mut frame = vec![0; room];
        let mut unfilled = frame.as_mut_slice();
        for slice in self.stock.buffers().take(slices) {
            let here = slice.len().min(unfilled.len());
            let (now, later) = unfilled.split_at_mut(here);
            slice.copy_to(now);
            unfilled = later;
        }
        frame.extend_from_slice(rest);
        self.waiting = Some(frame);
        Ok(Step::NoBuffers)
    }
}

enum Step {
    /// A frame of so many bytes, with its header, is in the first chains of the stock.
    Received(usize),
    Dropped,
    NoBuffers,
    NoFrame,
    Gone,
}

/// Chains that were taken from the queue and not yet filled.
#[derive(Default)]
struct Stock {
    chains: VecDeque<KeptChain>,
    /// Their buffers, one chain's after the other's. Made for the first of them.
    buffers: Option<Kept>,
    bytes: usize,
}

/// A chain whose buffers are kept.
struct KeptChain {
    head: u16,
    buffers: usize,
    bytes: usize,
}

impl Stock {
    /// Takes chains from the queue until there are so many bytes, or no more chains.
    fn fill(&mut self, bytes: usize, queue: &mut VirtQueue, memory: &GuestMemory) -> Result<(), QueueError> {
        if self.bytes >= bytes {
            return Ok(());
        }
        let buffers = self.buffers.get_or_insert_with(|| Kept::new(Arc::new(memory.clone())));
        let mut finder = Finder::new(memory);
        while self.bytes < bytes && buffers.len() < MAX_SLICES {
            let (mut added, mut room, mut is_writable) = (0, 0, true);
            let head = queue.pop_buffers(&mut finder, |slice, writable| {
                is_writable &= writable;
                // It is always kept, if it is not empty: the queue has found it in this memory.
                if !slice.is_empty() && buffers.push(&slice) {
                    added += 1;
                    room += slice.len();
                }
            })?;
            let Some(head) = head else { break };
            if !is_writable {
                let problem = "a buffer for a received frame must be writable only (virtio 1.2 §5.1.6.3)";
                return Err(QueueError::BadRequest { head, problem });
            }
            if room < HEADER_BYTES {
                let problem = "it has no room for a header of 12 bytes (virtio 1.2 §5.1.6.3.1)";
                return Err(QueueError::BadRequest { head, problem });
            }
            self.bytes += room;
            self.chains.push_back(KeptChain { head, buffers: added, bytes: room });
        }
        Ok(())
    }

    fn slices(&self) -> usize {
        self.buffers.as_ref().map_or(0, Kept::len)
    }

    fn buffers(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.buffers.iter().flat_map(Kept::slices)
    }

    /// Takes out the chains that `bytes` bytes have filled, tells them with the bytes in each, and writes their number
    /// into the header.
    fn take(&mut self, bytes: usize, returned: &mut Vec<(u16, u32)>) {
        returned.clear();
        let (mut rest, mut emptied) = (bytes, 0);
        while rest > 0 {
            let Some(chain) = self.chains.pop_front() else { break };
            self.bytes -= chain.bytes;
            emptied += chain.buffers;
            let here = rest.min(chain.bytes);
            rest -= here;
            returned.push((chain.head, here as u32));
        }
        // The first chain has room for a header (`fill`). §5.1.6.4.1: 1 where buffers are not merged.
        let mut place = NUM_BUFFERS_OFFSET;
        let mut number: &[u8] = &(returned.len() as u16).to_le_bytes();
        for slice in self.buffers() {
            if let Ok(here) = slice.offset(place) {
                let (now, later) = number.split_at(number.len().min(here.len()));
                here.copy_from(now);
                number = later;
            }
            if number.is_empty() {
                break;
            }
            place = place.saturating_sub(slice.len());
        }
        if let Some(buffers) = &mut self.buffers {
            buffers.drop_front(emptied);
        }
    }
}
