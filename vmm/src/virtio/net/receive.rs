//! From the link into the guest's buffers (virtio 1.2 §5.1.6.3, §5.1.6.4).
//!
//! A frame's size is known only when it has been read, and it is read straight into guest memory. So buffers for the
//! largest frame are taken from the queue first, and what the frame does not need is kept for the next one. Behind them
//! the read has a spare buffer of our own, which catches what a driver with few or small buffers cannot take: with
//! merged buffers it waits there for more of them, else the frame is dropped.

use std::{collections::VecDeque, sync::Arc};

use vm_memory::VolatileSlice;

use super::{
    Limiter,
    device::{Dropped, count_drop},
    features,
};
use crate::{
    backends::{
        frame_socket::scatter,
        link::{HEADER_BYTES, Link, MAX_FRAME_BYTES, ReceiveError},
    },
    guest_memory::{GuestMemory, transfer::Kept},
    virtio::queue::{Buffers, Chain, QueueError, VirtQueue},
};

/// Buffers of a vectored read, the spare one not counted.
const MAX_SLICES: usize = 1000;
/// Bytes of a frame whose size is the MTU: Ethernet's header with a VLAN tag comes on top.
const ETHERNET_BYTES: usize = 18;
/// An MTU that nobody has set.
const DEFAULT_MTU: u16 = 1500;
/// Where the header has the number of merged buffers (§5.1.6).
const NUM_BUFFERS_OFFSET: usize = 10;

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
    mtu: u16,
    merge: bool,
    /// Buffers that are taken from the queue before reading, in bytes.
    wanted: usize,
    /// The link may have a frame.
    readable: bool,
    /// A frame for which there were too few buffers, with its header.
    waiting: Option<Vec<u8>>,
    /// Buffers that were taken from the queue.
    stock: Stock,
    /// What a frame's buffers could not take. Without pages of its own until it is first needed.
    spare: Vec<u8>,
}

impl Receiver {
    /// For a link with this MTU.
    pub fn new(mtu: Option<u16>, limiter: Limiter) -> Self {
        Self {
            limiter,
            mtu: mtu.unwrap_or(DEFAULT_MTU),
            merge: false,
            wanted: 0,
            readable: false,
            waiting: None,
            stock: Stock::default(),
            spare: vec![0; HEADER_BYTES + MAX_FRAME_BYTES],
        }
    }

    /// A driver with these features is there.
    pub fn start(&mut self, accepted: u64) {
        let large = features::GUEST_OFFLOADS & !features::GUEST_CSUM;
        let frame = if accepted & large != 0 {
            MAX_FRAME_BYTES
        } else {
            usize::from(self.mtu.max(DEFAULT_MTU)) + ETHERNET_BYTES
        };
        self.wanted = HEADER_BYTES + frame;
        self.merge = accepted & features::MRG_RXBUF != 0;
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
            let frame = self.waiting.as_ref().map_or(self.wanted, Vec::len);
            let wanted = if self.merge { frame } else { 1 };
            while self.stock.bytes < wanted && self.stock.slices() < MAX_SLICES {
                let Some(chain) = queue.pop(memory)? else { break };
                self.stock.add(&chain, memory)?;
            }
            match self.one_frame(link) {
                Step::Received(returned) => {
                    let bytes: usize = returned.iter().map(|(_, bytes)| *bytes as usize).sum();
                    self.limiter.charge(bytes.saturating_sub(HEADER_BYTES));
                    queue.push_used_together(memory, &returned)?;
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

    fn one_frame(&mut self, link: &mut dyn Link) -> Step {
        if self.stock.chains.is_empty() {
            return Step::NoBuffers;
        }
        let room = self.stock.room(self.merge);
        if let Some(frame) = self.waiting.take() {
            if frame.len() > room {
                if !self.merge {
                    return Step::Dropped;
                }
                self.waiting = Some(frame);
                return Step::NoBuffers;
            }
            scatter(&[&frame], &self.stock.usable(self.merge));
            return Step::Received(self.stock.take(frame.len(), self.merge));
        }
        let mut slices = self.stock.usable(self.merge);
        slices.push(VolatileSlice::from(self.spare.as_mut_slice()));
        let bytes = match link.receive(&slices) {
            Ok(bytes) => bytes,
            Err(ReceiveError::Empty) => return Step::NoFrame,
            Err(ReceiveError::Gone) => return Step::Gone,
        };
        // A frame larger than the largest is cut off by the spare buffer's end; one without a header is nothing.
        if !(HEADER_BYTES..=HEADER_BYTES + MAX_FRAME_BYTES).contains(&bytes) {
            return Step::Dropped;
        }
        if bytes <= room {
            drop(slices);
            return Step::Received(self.stock.take(bytes, self.merge));
        }
        if !self.merge {
            return Step::Dropped;
        }
        // The guest's memory held the first part only for a moment; if it has changed it, the frame is as it wants it.
        let mut frame = vec![0; bytes];
        let mut rest = frame.as_mut_slice();
        for slice in slices {
            let here = slice.len().min(rest.len());
            let (now, later) = rest.split_at_mut(here);
            slice.copy_to(now);
            rest = later;
        }
        self.waiting = Some(frame);
        Step::NoBuffers
    }
}

enum Step {
    /// A frame is in these chains, of which so many bytes were written.
    Received(Vec<(u16, u32)>),
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
    fn add(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<(), QueueError> {
        let bad = |problem| Err(QueueError::BadRequest { head: chain.head, problem });
        if !chain.readable.is_empty() {
            return bad("a buffer for a received frame must be writable only (virtio 1.2 §5.1.6.3)");
        }
        let bytes = chain.writable.len();
        if bytes < HEADER_BYTES {
            return bad("it has no room for a header of 12 bytes (virtio 1.2 §5.1.6.3.1)");
        }
        let buffers = self.buffers.get_or_insert_with(|| Kept::new(Arc::new(memory.clone())));
        // Always true: the queue has found them in this memory.
        let kept = chain.writable.slices().iter().filter(|slice| buffers.push(slice)).count();
        self.bytes += bytes;
        self.chains.push_back(KeptChain { head: chain.head, buffers: kept, bytes });
        Ok(())
    }

    fn slices(&self) -> usize {
        self.buffers.as_ref().map_or(0, Kept::len)
    }

    /// Buffers that one frame may fill: those of one chain, if chains are not merged. With room for one more.
    fn usable(&self, merge: bool) -> Vec<VolatileSlice<'_>> {
        let of_first = self.chains.front().map_or(0, |chain| chain.buffers);
        let mut slices = Vec::with_capacity(self.slices() + 1);
        if let Some(buffers) = &self.buffers {
            slices.extend(buffers.slices(if merge { usize::MAX } else { of_first }));
        }
        slices
    }

    /// Bytes in them.
    fn room(&self, merge: bool) -> usize {
        if merge { self.bytes } else { self.chains.front().map_or(0, |chain| chain.bytes) }
    }

    /// Takes out the chains that `bytes` bytes have filled, with the bytes in each, and writes their number.
    fn take(&mut self, bytes: usize, merge: bool) -> Vec<(u16, u32)> {
        let mut returned = Vec::new();
        let (mut rest, mut emptied, mut of_first) = (bytes, 0, 0);
        while rest > 0 {
            let Some(chain) = self.chains.pop_front() else { break };
            self.bytes -= chain.bytes;
            emptied += chain.buffers;
            let here = rest.min(chain.bytes);
            rest -= here;
            if returned.is_empty() {
                of_first = chain.buffers;
            }
            returned.push((chain.head, here as u32));
            if !merge {
                break;
            }
        }
        if let Some(buffers) = &mut self.buffers {
            let mut header: Buffers = buffers.slices(of_first).collect();
            if header.take(NUM_BUFFERS_OFFSET).is_some() {
                // §5.1.6.4.1: 1 where buffers are not merged.
                header.write(&(returned.len() as u16).to_le_bytes());
            }
            buffers.drop_front(emptied);
        }
        returned
    }
}
