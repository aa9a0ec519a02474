//! A driver's side of a split virtqueue, and doubles for what surrounds a device: for tests of devices without a guest.
#![allow(missing_docs, dead_code, clippy::unwrap_used, clippy::indexing_slicing)]

use std::{
    collections::HashMap,
    io,
    os::fd::RawFd,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use vm_memory::{Bytes, GuestAddress};

use super::{
    device::{Device, Poller, Progress, Running},
    queue::{QueueError, QueueSetup, VirtQueue},
};
use crate::{
    devices::Interrupt,
    guest_memory::{self, GuestMemory},
};

/// Guest memory for a test.
pub const MEMORY_BYTES: u64 = 16 << 20;
/// Descriptor flags (virtio 1.2 §2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Memory as a test needs it.
pub fn memory() -> GuestMemory {
    guest_memory::map(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap()
}

/// A buffer to make available.
pub enum Part<'a> {
    /// For the device to read.
    Readable(&'a [u8]),
    /// For the device to write: so many bytes.
    Writable(usize),
}

/// A queue as its driver sees it. It lies at `base` and takes 1 MiB, buffers included.
pub struct Driver {
    pub memory: GuestMemory,
    base: u64,
    size: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<(u16, u64, usize)>>,
    next_buffer: u64,
    available: u16,
    used_seen: u16,
}

const BUFFERS: u64 = 0x1_0000;
const AREA: u64 = 1 << 20;

impl Driver {
    pub fn new(memory: &GuestMemory, index: u64, size: u16) -> Self {
        Self {
            memory: memory.clone(),
            base: AREA * (index + 1),
            size,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            next_buffer: BUFFERS,
            available: 0,
            used_seen: 0,
        }
    }

    pub fn setup(&self) -> QueueSetup {
        QueueSetup {
            size: self.size,
            descriptors: self.base,
            available: self.base + 0x8000,
            used: self.base + 0xc000,
        }
    }

    /// The device's end of the queue, without event indices, so that every return asks for an interrupt.
    pub fn queue(&self) -> VirtQueue {
        VirtQueue::new(0, self.setup(), false, &self.memory).unwrap()
    }

    /// Starts with both rings at this index, as after so many chains.
    pub fn start_at(&mut self, index: u16) {
        (self.available, self.used_seen) = (index, index);
        self.set_available_index(index);
        self.set_used_index(index);
    }

    /// Descriptors that are not in use.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Makes a chain available that is one descriptor with a table at `table`; returns its head.
    pub fn add_indirect(&mut self, parts: &[Part], table: u64) -> u16 {
        let head = self.free.pop().unwrap();
        let mut chain = Vec::new();
        for (position, part) in parts.iter().enumerate() {
            let (address, bytes, flag) = self.place(part);
            let last = position + 1 == parts.len();
            let flags = flag | if last { 0 } else { NEXT };
            let at = table + position as u64 * 16;
            self.descriptor_at(at, address, bytes as u32, flags, position as u16 + 1);
            // Only the head is one of the queue's own descriptors.
            chain.push((if last { head } else { u16::MAX }, address, bytes));
        }
        self.descriptor(head, table, parts.len() as u32 * 16, INDIRECT, 0);
        self.chains.insert(head, chain);
        self.publish(head);
        head
    }

    /// Tells the device at which entry of the used ring the driver wants to hear of it (virtio 1.2 §2.7.7).
    pub fn set_used_event(&self, index: u16) {
        let at = self.setup().available + 4 + 2 * u64::from(self.size);
        self.memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// A part's address, length and flag; what it holds is written to memory.
    fn place(&mut self, part: &Part) -> (u64, usize, u16) {
        let (bytes, flag) = match part {
            Part::Readable(bytes) => (bytes.len(), 0),
            Part::Writable(bytes) => (*bytes, WRITE),
        };
        let address = self.allocate(bytes);
        if let Part::Readable(bytes) = part {
            self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        }
        (address, bytes, flag)
    }

    /// Makes a chain available; returns its head.
    pub fn add(&mut self, parts: &[Part]) -> u16 {
        let indices: Vec<u16> = parts.iter().map(|_| self.free.pop().unwrap()).collect();
        let mut chain = Vec::new();
        for (position, part) in parts.iter().enumerate() {
            let (address, bytes, flag) = self.place(part);
            let next = indices.get(position + 1);
            let flags = flag | if next.is_some() { NEXT } else { 0 };
            self.descriptor(indices[position], address, bytes as u32, flags, next.copied().unwrap_or(0));
            chain.push((indices[position], address, bytes));
        }
        self.chains.insert(indices[0], chain);
        self.publish(indices[0]);
        indices[0]
    }

    fn allocate(&mut self, bytes: usize) -> u64 {
        if self.next_buffer + bytes as u64 > AREA {
            self.next_buffer = BUFFERS;
        }
        let address = self.base + self.next_buffer;
        self.next_buffer += bytes as u64;
        address
    }

    /// Writes a descriptor as it is given, right or wrong.
    pub fn descriptor(&self, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        self.descriptor_at(self.base + u64::from(index) * 16, address, bytes, flags, next);
    }

    /// As [`Driver::descriptor`], anywhere.
    pub fn descriptor_at(&self, at: u64, address: u64, bytes: u32, flags: u16, next: u16) {
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(bytes, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Puts a head into the available ring.
    pub fn publish(&mut self, head: u16) {
        let ring = self.setup().available;
        let slot = u64::from(self.available % self.size);
        self.memory.write_obj(head, GuestAddress(ring + 4 + slot * 2)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available_index(self.available);
    }

    /// Sets the available ring's index, right or wrong.
    pub fn set_available_index(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.setup().available + 2)).unwrap();
    }

    /// Sets the used ring's index, for a queue that starts anew.
    pub fn set_used_index(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.setup().used + 2)).unwrap();
    }

    /// The next chain that came back: its head, what the device wrote, and the length that it claims to have written.
    pub fn take_used(&mut self) -> Option<(u16, Vec<u8>, u32)> {
        let ring = self.setup().used;
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        if index == self.used_seen {
            return None;
        }
        let slot = ring + 4 + u64::from(self.used_seen % self.size) * 8;
        self.used_seen = self.used_seen.wrapping_add(1);
        let head = self.memory.read_obj::<u32>(GuestAddress(slot)).unwrap() as u16;
        let written: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        let mut bytes = Vec::new();
        for (index, address, len) in self.chains.remove(&head).unwrap_or_default() {
            if index != u16::MAX {
                self.free.push(index);
            }
            let mut part = vec![0; len];
            self.memory.read_slice(&mut part, GuestAddress(address)).unwrap();
            bytes.extend(part);
        }
        Some((head, bytes, written))
    }
}

/// A poller that notes what is watched.
#[derive(Default)]
pub struct Watched {
    pub fds: Vec<RawFd>,
}

impl Poller for Watched {
    fn add(&mut self, fd: RawFd) -> io::Result<()> {
        self.fds.push(fd);
        Ok(())
    }

    fn remove(&mut self, fd: RawFd) {
        self.fds.retain(|watched| *watched != fd);
    }
}

/// Rings a device.
pub fn ring(
    device: &mut dyn Device,
    queues: &mut [VirtQueue],
    memory: &GuestMemory,
) -> Result<Progress, QueueError> {
    let features = device.identity().features;
    device.queues_ready(&mut Running { queues, features, memory, poller: &mut Watched::default() })
}

/// An interrupt line that counts.
#[derive(Clone, Default)]
pub struct CountingLine(pub Arc<AtomicU32>);

impl CountingLine {
    pub fn count(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Interrupt for CountingLine {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
