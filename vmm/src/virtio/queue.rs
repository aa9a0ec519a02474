//! Split virtqueues as devices use them: chains come out checked, and any that is not as virtio 1.2 §2.7 demands is an
//! error that ends the queue.

use std::sync::{
    Arc,
    atomic::{Ordering, fence},
};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, VolatileMemory, VolatileSlice};

use super::{
    chain::{Descriptor, Walk},
    counters::QueueCounters,
    slices::Slices,
};
use crate::guest_memory::{self, Finder, GuestMemory};

/// VIRTIO_F_EVENT_IDX: both sides say at which index they want to be told (virtio 1.2 §2.7.7, §2.7.10).
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;

/// Offset of the index in either ring, and of the first element (virtio 1.2 §2.7.6, §2.7.8).
const RING_INDEX: u64 = 2;
const RING_ELEMENTS: u64 = 4;
/// Bytes of an element of the available ring, and of the used ring.
const AVAILABLE_ELEMENT_BYTES: u64 = 2;
const USED_ELEMENT_BYTES: u64 = 8;
/// In the available ring's flags (virtio 1.2 §2.7.6): the driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;

/// Addresses and size of a queue as its driver wrote them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// Entries.
    pub size: u16,
    /// Descriptor area.
    pub descriptors: u64,
    /// Driver area.
    pub available: u64,
    /// Device area.
    pub used: u64,
}

/// What a driver did wrong with a queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Size or addresses are impossible.
    #[error("queue {index} cannot be used: {setup:?} (virtio 1.2 §2.7)")]
    Setup {
        /// Number of the queue.
        index: usize,
        /// What the driver wrote.
        setup: QueueSetup,
    },
    /// The ring's index ran ahead, or a ring left guest memory.
    #[error("the available ring is corrupt (virtio 1.2 §2.7.6)")]
    Ring(#[source] virtio_queue::Error),
    /// The driver makes more chains available than it can have descriptors for: it repeats some.
    #[error("more than {limit} chains are outstanding (virtio 1.2 §2.7.13)")]
    Outstanding {
        /// Size of the queue.
        limit: u16,
    },
    /// The chain leads nowhere.
    #[error("descriptor chain {head} is broken: {problem}")]
    BrokenChain {
        /// Its first descriptor.
        head: u16,
        /// How, with the place in the specification.
        problem: &'static str,
    },
    /// More descriptors than the queue has entries, as a loop has.
    #[error("descriptor chain {head} has more than {limit} descriptors (virtio 1.2 §2.7.5.3.1)")]
    LongChain {
        /// Its first descriptor.
        head: u16,
        /// Size of the queue.
        limit: u16,
    },
    /// A device-readable descriptor after a device-writable one.
    #[error("descriptor chain {head} has a readable buffer after a writable one (virtio 1.2 §2.7.4.2)")]
    ReadableAfterWritable {
        /// Its first descriptor.
        head: u16,
    },
    /// A buffer that is not, or not all, in guest memory, or that the device is to write where nothing may be written.
    #[error(
        "descriptor chain {head} has a buffer outside of memory: {bytes} bytes at {address:#x} (virtio 1.2 §2.7.5)"
    )]
    BufferOutsideMemory {
        /// Its first descriptor.
        head: u16,
        /// Guest physical address.
        address: u64,
        /// Length.
        bytes: u32,
    },
    /// The device cannot make sense of the chain's layout.
    #[error("descriptor chain {head} is not a request: {problem}")]
    BadRequest {
        /// Its first descriptor.
        head: u16,
        /// What is missing, with the place in the specification.
        problem: &'static str,
    },
}

/// A queue that runs.
#[derive(Debug)]
pub struct VirtQueue {
    ring: Queue,
    /// The used ring's index when it was last decided whether to tell the driver.
    told: u16,
    /// Chains that were taken and not yet returned.
    outstanding: u16,
    /// Chains that are known to be available: so many are taken without reading the available ring's index again.
    known: u16,
    /// The driver has been asked to ring for the next chain, and there was none then.
    armed: bool,
    counters: Arc<QueueCounters>,
    /// Descriptors and readable bytes of the last chain, in case it is put back.
    last: (u64, u64),
}

/// Buffers that a driver made available together.
#[derive(Debug)]
pub struct Chain<'m> {
    /// Its first descriptor, by which it is returned.
    pub head: u16,
    /// What the device may read.
    pub readable: Buffers<'m>,
    /// What the device may write.
    pub writable: Buffers<'m>,
    /// Descriptors and readable bytes, as they were counted.
    size: (u64, u64),
}

impl VirtQueue {
    /// A queue as its driver set it up; `index` is for the error.
    pub fn new(
        index: usize,
        setup: QueueSetup,
        event_idx: bool,
        memory: &GuestMemory,
    ) -> Result<Self, QueueError> {
        let bad = || QueueError::Setup { index, setup };
        let mut ring = Queue::new(setup.size).map_err(|_| bad())?;
        ring.try_set_size(setup.size).map_err(|_| bad())?;
        ring.try_set_desc_table_address(GuestAddress(setup.descriptors)).map_err(|_| bad())?;
        ring.try_set_avail_ring_address(GuestAddress(setup.available)).map_err(|_| bad())?;
        ring.try_set_used_ring_address(GuestAddress(setup.used)).map_err(|_| bad())?;
        ring.set_event_idx(event_idx);
        ring.set_ready(true);
        // Flags, index, `size` elements and an event index (virtio 1.2 §2.7.8); all in one region, that may be written.
        let used_bytes = 6 + 8 * usize::from(setup.size);
        let written = guest_memory::buffer(memory, GuestAddress(setup.used), used_bytes, true);
        if !ring.is_valid(memory) || written.is_none() {
            return Err(bad());
        }
        Ok(Self {
            ring,
            told: 0,
            outstanding: 0,
            known: 0,
            armed: false,
            counters: Arc::default(),
            last: (0, 0),
        })
    }

    /// The same queue, counting here.
    pub fn counted_by(self, counters: Arc<QueueCounters>) -> Self {
        Self { counters, ..self }
    }

    /// The next chain that the driver made available.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueError> {
        let mut readable = Buffers::default();
        let mut writable = Buffers::default();
        let head = self.pop_buffers(&mut Finder::new(memory), |slice, write| {
            if write { &mut writable } else { &mut readable }.push(slice);
        })?;
        Ok(head.map(|head| Chain { head, readable, writable, size: self.last }))
    }

    /// As [`VirtQueue::pop`], but hands over each buffer of the chain, and whether the device is to write it, and returns
    /// the chain's first descriptor. What has come before an error is the caller's to forget.
    pub fn pop_buffers<'m>(
        &mut self,
        finder: &mut Finder<'m>,
        mut take: impl FnMut(VolatileSlice<'m>, bool),
    ) -> Result<Option<u16>, QueueError> {
        let Some(head) = self.next_head(finder)? else { return Ok(None) };
        let limit = self.ring.size();
        if self.outstanding >= limit {
            return Err(QueueError::Outstanding { limit });
        }
        let (mut descriptors, mut readable_bytes) = (0, 0);
        let mut written_part = false;
        let mut walk = Walk::new(finder, self.ring.desc_table(), limit, head);
        while let Some(Descriptor { address, bytes, writable }) = walk.next(finder)? {
            descriptors += 1;
            let slice = finder
                .buffer(GuestAddress(address), bytes as usize, writable)
                .ok_or(QueueError::BufferOutsideMemory { head, address, bytes })?;
            written_part |= writable;
            if !writable {
                if written_part {
                    return Err(QueueError::ReadableAfterWritable { head });
                }
                readable_bytes += u64::from(bytes);
            }
            take(slice, writable);
        }
        self.outstanding += 1;
        self.last = (descriptors, readable_bytes);
        self.counters.taken(descriptors, readable_bytes);
        Ok(Some(head))
    }

    /// The first descriptor of the next chain.
    fn next_head(&mut self, finder: &mut Finder) -> Result<Option<u16>, QueueError> {
        let (available, size, next) = (self.ring.avail_ring(), self.ring.size(), self.ring.next_avail());
        if self.known == 0 {
            // Acquire: who sees the index sees the ring's elements and the descriptors (§2.7.13.3).
            let known = load(finder, available + RING_INDEX, Ordering::Acquire)?.wrapping_sub(next);
            if known > size {
                return Err(QueueError::Ring(virtio_queue::Error::InvalidAvailRingIndex));
            }
            self.known = known;
        }
        let Some(rest) = self.known.checked_sub(1) else { return Ok(None) };
        let slot = available + RING_ELEMENTS + u64::from(next % size) * AVAILABLE_ELEMENT_BYTES;
        let head = load(finder, slot, Ordering::Relaxed)?;
        self.known = rest;
        self.armed = false;
        self.ring.set_next_avail(next.wrapping_add(1));
        Ok(Some(head))
    }

    /// Its entries.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Makes the next [`VirtQueue::pop`] return the last chain once more.
    pub fn undo_pop(&mut self) {
        self.ring.go_to_previous_position();
        self.known = self.known.saturating_add(1);
        self.armed = false;
        self.outstanding = self.outstanding.saturating_sub(1);
        self.counters.untaken(self.last.0, self.last.1);
    }

    /// Puts back the chain that was taken last of those that are neither put back nor returned.
    pub fn put_back(&mut self, chain: &Chain) {
        self.ring.go_to_previous_position();
        self.known = self.known.saturating_add(1);
        self.armed = false;
        self.outstanding = self.outstanding.saturating_sub(1);
        self.counters.untaken(chain.size.0, chain.size.1);
    }

    /// Returns a chain, of which the device has written `written` bytes.
    pub fn push_used(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), QueueError> {
        self.push_used_together(memory, &[(head, written)])
    }

    /// Returns several chains, each with the bytes written, so that the driver sees all or none: what was received
    /// into merged buffers is one frame.
    pub fn push_used_together(
        &mut self,
        memory: &GuestMemory,
        returned: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let mut finder = Finder::new(memory);
        let (used, size) = (self.ring.used_ring(), self.ring.size());
        let mut next = self.ring.next_used();
        let bytes = usize::from(size) * USED_ELEMENT_BYTES as usize;
        let elements = place(&mut finder, used + RING_ELEMENTS, bytes, true)?;
        for (head, written) in returned {
            let slot = usize::from(next % size) * USED_ELEMENT_BYTES as usize;
            let element = u64::from(*written) << 32 | u64::from(*head);
            let slot = elements.get_ref::<u64>(slot).map_err(|error| memory_error(error.into()))?;
            slot.store(element.to_le());
            next = next.wrapping_add(1);
        }
        // Release: who sees the index sees the elements (§2.7.8.2).
        let index = place(&mut finder, used + RING_INDEX, size_of::<u16>(), true)?;
        index.store(next.to_le(), 0, Ordering::Release).map_err(|error| memory_error(error.into()))?;
        self.ring.set_next_used(next);
        self.outstanding = self.outstanding.saturating_sub(u16::try_from(returned.len()).unwrap_or(u16::MAX));
        self.counters.returned(returned.iter().map(|(_, written)| u64::from(*written)).sum());
        Ok(())
    }

    /// Whether the driver wants to be told of what was returned since the last call.
    pub fn take_notification(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let (before, now) = (self.told, self.ring.next_used());
        if before == now {
            return Ok(false);
        }
        self.told = now;
        // The driver must see the used ring's index before we look at whether it wants to know (§2.7.7.2).
        fence(Ordering::SeqCst);
        let available = self.ring.avail_ring();
        let finder = &mut Finder::new(memory);
        if self.ring.event_idx_enabled() {
            let event = available + RING_ELEMENTS + AVAILABLE_ELEMENT_BYTES * u64::from(self.ring.size());
            let wanted_at = load(finder, event, Ordering::Relaxed)?;
            // Whether the index that the driver waits for is among those passed since `before`, modulo 2^16.
            Ok(now.wrapping_sub(wanted_at).wrapping_sub(1) < now.wrapping_sub(before))
        } else {
            Ok(load(finder, available, Ordering::Relaxed)? & NO_INTERRUPT == 0)
        }
    }

    /// Asks the driver to ring when it makes something available. True if it has done so meanwhile: look again.
    pub fn enable_doorbell(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if self.armed {
            let index = self.ring.avail_ring() + RING_INDEX;
            let index = load(&mut Finder::new(memory), index, Ordering::Acquire)?;
            return Ok(index != self.ring.next_avail());
        }
        self.armed = !self.ring.enable_notification(memory).map_err(QueueError::Ring)?;
        Ok(!self.armed)
    }

    /// Tells the driver that it need not ring.
    pub fn disable_doorbell(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        // With event indices, nothing is said: the driver rings once, for the chain that it was asked to ring for.
        if self.ring.event_idx_enabled() {
            return Ok(());
        }
        self.armed = false;
        self.ring.disable_notification(memory).map_err(QueueError::Ring)
    }
}

/// Bytes of a ring. `is_valid` has checked that all rings are in memory, so that no sum of their places overflows; but
/// memory can go away.
fn place<'m>(
    finder: &mut Finder<'m>,
    address: u64,
    bytes: usize,
    write: bool,
) -> Result<VolatileSlice<'m>, QueueError> {
    let address = GuestAddress(address);
    let gone = || memory_error(GuestMemoryError::InvalidGuestAddress(address));
    finder.buffer(address, bytes, write).ok_or_else(gone)
}

fn load(finder: &mut Finder, address: u64, order: Ordering) -> Result<u16, QueueError> {
    let place = place(finder, address, size_of::<u16>(), false)?;
    place.load(0, order).map(u16::from_le).map_err(|error| memory_error(error.into()))
}

fn memory_error(error: GuestMemoryError) -> QueueError {
    QueueError::Ring(virtio_queue::Error::GuestMemory(error))
}

/// Guest buffers, one after the other; reading and writing consume them from the front.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: Slices<'m>,
}

impl<'m> FromIterator<VolatileSlice<'m>> for Buffers<'m> {
    fn from_iter<I: IntoIterator<Item = VolatileSlice<'m>>>(slices: I) -> Self {
        let mut buffers = Self::default();
        slices.into_iter().for_each(|slice| buffers.push(slice));
        buffers
    }
}

impl<'m> Buffers<'m> {
    fn push(&mut self, slice: VolatileSlice<'m>) {
        if !slice.is_empty() {
            self.slices.push(slice);
        }
    }

    /// Bytes left. A chain has less than 4 GiB (virtio 1.2 §2.7.5.2), so this cannot overflow.
    pub fn len(&self) -> usize {
        self.slices().iter().map(VolatileSlice::len).sum()
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.slices().is_empty()
    }

    /// The buffers that are left.
    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        self.slices.as_slice()
    }

    /// The first `bytes` bytes, or all if there are fewer; nothing is consumed.
    pub fn prefix(&self, bytes: usize) -> Buffers<'m> {
        let mut prefix = Buffers::default();
        let mut missing = bytes;
        for slice in self.slices() {
            let here = missing.min(slice.len());
            if here == 0 {
                break;
            }
            missing -= here;
            if let Ok(part) = slice.subslice(0, here) {
                prefix.push(part);
            }
        }
        prefix
    }

    /// Splits off the first `bytes` bytes; `None`, and nothing is consumed, if there are fewer.
    pub fn take(&mut self, bytes: usize) -> Option<Buffers<'m>> {
        if self.len() < bytes {
            return None;
        }
        let front = self.prefix(bytes);
        self.slices.drop_front(bytes);
        Some(front)
    }

    /// Reads the first `N` bytes; `None`, and nothing is consumed, if there are fewer.
    pub fn read<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        if let Some(first) = self.slices().first().filter(|first| first.len() >= N) {
            // As nearly always.
            first.copy_to(&mut bytes);
            self.slices.drop_front(N);
            return Some(bytes);
        }
        let mut rest = bytes.as_mut_slice();
        for slice in self.take(N)?.slices() {
            let (here, after) = rest.split_at_mut_checked(slice.len())?;
            slice.copy_to(here);
            rest = after;
        }
        Some(bytes)
    }

    /// Copies all bytes that are left, without consuming them. The caller has bounded their number.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        let mut rest = bytes.as_mut_slice();
        for slice in self.slices() {
            let Some((here, after)) = rest.split_at_mut_checked(slice.len()) else { break };
            slice.copy_to(here);
            rest = after;
        }
        bytes
    }

    /// Writes `bytes` to the front; false, and nothing is written, if they do not fit.
    pub fn write(&mut self, mut bytes: &[u8]) -> bool {
        if let Some(first) = self.slices().first().filter(|first| first.len() >= bytes.len()) {
            first.copy_from(bytes);
            self.slices.drop_front(bytes.len());
            return true;
        }
        let Some(front) = self.take(bytes.len()) else { return false };
        for slice in front.slices() {
            let Some((here, after)) = bytes.split_at_checked(slice.len()) else { return false };
            slice.copy_from(here);
            bytes = after;
        }
        true
    }
}

#[cfg(test)]
#[path = "queue_model.rs"]
mod model;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::driver_model::{Driver, INDIRECT, MEMORY_BYTES, NEXT, Part, WRITE, memory};

    #[test]
    fn pop_of_good_chain_yields_its_buffers_in_order() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 8);
        let head = driver.add(&[Part::Readable(b"ab"), Part::Readable(b"cde"), Part::Writable(4)]);
        let mut queue = driver.queue();
        let mut chain = queue.pop(&memory).unwrap().unwrap();
        assert_eq!((chain.head, chain.readable.len(), chain.writable.len()), (head, 5, 4));
        assert_eq!(chain.readable.read::<3>(), Some(*b"abc"));
        assert_eq!(chain.readable.to_vec(), b"de");
        assert_eq!(chain.readable.read::<3>(), None);
        assert_eq!(chain.readable.len(), 2);
        assert!(!chain.writable.write(b"12345"));
        assert!(chain.writable.write(b"123"));
        queue.push_used(&memory, head, 3).unwrap();
        assert!(queue.take_notification(&memory).unwrap());
        assert!(!queue.take_notification(&memory).unwrap());
        assert_eq!(driver.take_used(), Some((head, b"abcde123\0".to_vec(), 3)));
        assert!(queue.pop(&memory).unwrap().is_none());
    }

    #[test]
    fn chains_pushed_together_appear_with_one_index_across_the_ring_s_end() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 4);
        let mut queue = driver.queue();
        for round in 0..5 {
            let heads: Vec<u16> = (0..3).map(|_| driver.add(&[Part::Writable(1)])).collect();
            for _ in &heads {
                queue.pop(&memory).unwrap().unwrap();
            }
            let returned: Vec<_> = heads.iter().map(|head| (*head, 1)).collect();
            queue.push_used_together(&memory, &returned).unwrap();
            let index: u16 = memory.read_obj(GuestAddress(driver.setup().used + RING_INDEX)).unwrap();
            assert_eq!(index, 3 * (round + 1));
            let seen: Vec<_> = std::iter::from_fn(|| driver.take_used()).map(|(head, _, _)| head).collect();
            assert_eq!(seen, heads);
        }
    }

    #[test]
    fn notification_is_asked_for_as_flag_or_event_index_say() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 8);
        let setup = driver.setup();
        let mut give_back = |queue: &mut VirtQueue| {
            let head = driver.add(&[Part::Writable(1)]);
            queue.pop(&memory).unwrap().unwrap();
            queue.push_used(&memory, head, 1).unwrap();
            driver.take_used().unwrap();
        };
        let mut queue = VirtQueue::new(0, setup, false, &memory).unwrap();
        memory.write_obj(NO_INTERRUPT, GuestAddress(setup.available)).unwrap();
        give_back(&mut queue);
        assert!(!queue.take_notification(&memory).unwrap());
        memory.write_obj(0u16, GuestAddress(setup.available)).unwrap();
        give_back(&mut queue);
        assert!(queue.take_notification(&memory).unwrap());

        let mut driver = Driver::new(&memory, 1, 8);
        let setup = driver.setup();
        let mut queue = VirtQueue::new(0, setup, true, &memory).unwrap();
        let mut told = Vec::new();
        // The driver wants to be told of the third (§2.7.7.2).
        memory.write_obj(2u16, GuestAddress(setup.available + RING_ELEMENTS + 16)).unwrap();
        for _ in 0..5 {
            let head = driver.add(&[Part::Writable(1)]);
            queue.pop(&memory).unwrap().unwrap();
            queue.push_used(&memory, head, 1).unwrap();
            driver.take_used().unwrap();
            told.push(queue.take_notification(&memory).unwrap());
        }
        assert_eq!(told, [false, false, true, false, false]);
    }

    #[test]
    fn pop_after_undo_yields_the_same_chain() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 8);
        let head = driver.add(&[Part::Writable(1)]);
        let mut queue = driver.queue();
        queue.pop(&memory).unwrap().unwrap();
        queue.undo_pop();
        assert_eq!(queue.pop(&memory).unwrap().unwrap().head, head);
    }

    #[test]
    fn pop_of_indirect_chain_yields_its_table() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 8);
        let table = 0x80_0000;
        driver.descriptor_at(table, 0x81_0000, 16, NEXT, 1);
        driver.descriptor_at(table + 16, 0x82_0000, 32, WRITE, 0);
        driver.descriptor(0, table, 32, INDIRECT, 0);
        driver.publish(0);
        let chain = driver.queue().pop(&memory).unwrap().unwrap();
        assert_eq!((chain.readable.len(), chain.writable.len()), (16, 32));
    }

    fn broken(descriptors: &[(u64, u32, u16, u16)]) -> QueueError {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 8);
        for (index, (address, bytes, flags, next)) in descriptors.iter().enumerate() {
            driver.descriptor(index as u16, *address, *bytes, *flags, *next);
        }
        driver.publish(0);
        driver.queue().pop(&memory).unwrap_err()
    }

    #[test]
    fn pop_of_broken_chain_fails() {
        let at = 0x80_0000;
        // A loop, an index outside of the table, impossible indirect tables.
        assert!(matches!(broken(&[(at, 1, NEXT, 0)]), QueueError::LongChain { head: 0, limit: 8 }));
        assert!(matches!(broken(&[(at, 0, INDIRECT, 0)]), QueueError::BrokenChain { .. }));
        assert!(matches!(broken(&[(at, 16, INDIRECT | NEXT, 1)]), QueueError::BrokenChain { .. }));
        assert!(matches!(broken(&[(at, 1, NEXT, 8)]), QueueError::BrokenChain { .. }));
        assert!(matches!(broken(&[(at, 15, INDIRECT, 0)]), QueueError::BrokenChain { .. }));
        assert!(matches!(broken(&[(MEMORY_BYTES, 16, INDIRECT, 0)]), QueueError::BrokenChain { .. }));
        // Together more than 4 GiB.
        assert!(matches!(
            broken(&[(at, 1, NEXT, 1), (at, u32::MAX, 0, 0)]),
            QueueError::BrokenChain { .. } | QueueError::BufferOutsideMemory { .. }
        ));
        assert!(matches!(
            broken(&[(MEMORY_BYTES - 1, 2, 0, 0)]),
            QueueError::BufferOutsideMemory { bytes: 2, .. }
        ));
        assert!(matches!(broken(&[(u64::MAX, 2, 0, 0)]), QueueError::BufferOutsideMemory { .. }));
        assert!(matches!(
            broken(&[(at, 1, WRITE | NEXT, 1), (at, 1, 0, 0)]),
            QueueError::ReadableAfterWritable { .. }
        ));
    }

    #[test]
    fn pop_of_head_outside_of_table_fails() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 8);
        driver.publish(8);
        assert!(matches!(driver.queue().pop(&memory), Err(QueueError::BrokenChain { head: 8, .. })));
    }

    #[test]
    fn pop_of_ring_that_ran_ahead_fails() {
        let memory = memory();
        let driver = Driver::new(&memory, 0, 8);
        driver.set_available_index(9);
        assert!(matches!(driver.queue().pop(&memory), Err(QueueError::Ring(_))));
    }

    #[test]
    fn pop_of_indirect_chain_longer_than_queue_fails() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 8);
        let table = 0x80_0000;
        for index in 0..9 {
            driver.descriptor_at(
                table + u64::from(index) * 16,
                table,
                1,
                if index < 8 { NEXT } else { 0 },
                index + 1,
            );
        }
        driver.descriptor(0, table, 9 * 16, INDIRECT, 0);
        driver.publish(0);
        assert!(matches!(driver.queue().pop(&memory), Err(QueueError::LongChain { limit: 8, .. })));
    }

    #[test]
    fn used_ring_that_goes_on_in_memory_that_is_not_written_is_refused() {
        use std::os::fd::AsFd;
        let file = tempfile::tempfile().unwrap();
        let end = GuestAddress(MEMORY_BYTES);
        let region = guest_memory::map_file(end, file.as_fd(), 0x1000, 2 << 20, true).unwrap();
        let memory = guest_memory::with_region(&memory(), region).unwrap();
        let good = Driver::new(&memory, 0, 8).setup();
        let ring = |used| VirtQueue::new(0, QueueSetup { used, ..good }, false, &memory);
        assert!(ring(MEMORY_BYTES - (6 + 8 * 8 + 2)).is_ok());
        assert!(matches!(ring(MEMORY_BYTES - 8), Err(QueueError::Setup { .. })));
    }

    #[test]
    fn new_with_impossible_setup_fails() {
        let memory = memory();
        let good = Driver::new(&memory, 0, 8).setup();
        for bad in [
            QueueSetup { size: 0, ..good },
            QueueSetup { size: 3, ..good },
            QueueSetup { descriptors: 8, ..good },
            QueueSetup { descriptors: MEMORY_BYTES, ..good },
            QueueSetup { available: MEMORY_BYTES - 2, ..good },
            QueueSetup { used: u64::MAX - 3, ..good },
            QueueSetup { used: 2, ..good },
        ] {
            assert!(
                matches!(VirtQueue::new(0, bad, false, &memory), Err(QueueError::Setup { .. })),
                "{bad:?}"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever is in the table, popping ends, and all of a chain's buffers are in memory.
        #[test]
        fn pop_of_any_table_ends(
            descriptors in prop::collection::vec(
                (0u64..MEMORY_BYTES + 4096, 0u32..8192, 0u16..8, 0u16..10), 8,
            ),
            heads in prop::collection::vec(0u16..10, 1..8),
        ) {
            let memory = memory();
            let mut driver = Driver::new(&memory, 0, 8);
            for (index, (address, bytes, flags, next)) in descriptors.into_iter().enumerate() {
                driver.descriptor(index as u16, address, bytes, flags, next);
            }
            heads.iter().for_each(|head| driver.publish(*head));
            let mut queue = driver.queue();
            let mut popped = 0;
            while let Ok(Some(chain)) = queue.pop(&memory) {
                popped += 1;
                prop_assert!(chain.readable.len() + chain.writable.len() <= 8 * 8192);
                prop_assert!(memory.write_slice(&chain.readable.to_vec(), GuestAddress(0)).is_ok());
            }
            prop_assert!(popped <= heads.len());
        }
    }
}
