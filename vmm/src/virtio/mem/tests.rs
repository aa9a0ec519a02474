//! The device with a model of its driver, and slots that only take note.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex},
};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{BLOCK_BYTES, ChunkSlots, MemoryDevice, MemoryHandle, MemoryStatistics};
use crate::{
    guest_memory::{self, CHUNK_BYTES, GuestMemory},
    virtio::{
        device::Device,
        driver_model::{Driver, Part, memory, ring},
        queue::{QueueError, VirtQueue},
    },
};

const START: u64 = 4 << 30;
const CHUNKS: u64 = 3;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// Chunks that vCPUs can reach, by address; `Err` while the host refuses.
#[derive(Default)]
struct Reach {
    chunks: BTreeSet<u64>,
    refuses: bool,
}

#[derive(Clone, Default)]
struct NotedSlots(Arc<Mutex<Reach>>);

impl ChunkSlots for NotedSlots {
    fn insert(&self, start: GuestAddress) -> io::Result<()> {
        let mut reach = self.0.lock().unwrap();
        if reach.refuses {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        assert!(reach.chunks.insert(start.0), "a chunk is inserted twice");
        Ok(())
    }

    fn remove(&self, start: GuestAddress) -> io::Result<()> {
        if self.0.lock().unwrap().refuses {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        assert!(self.0.lock().unwrap().chunks.remove(&start.0), "a chunk is removed that is not there");
        Ok(())
    }
}

struct Fixture {
    memory: GuestMemory,
    driver: Driver,
    queue: VirtQueue,
    device: MemoryDevice,
    handle: MemoryHandle,
    slots: NotedSlots,
}

impl Fixture {
    fn new(requested_mib: u32) -> Self {
        Self::with_chunks(CHUNKS, requested_mib)
    }

    fn with_chunks(chunks: u64, requested_mib: u32) -> Self {
        let region = guest_memory::map_pluggable(GuestAddress(START), chunks * CHUNK_BYTES).unwrap();
        let memory = guest_memory::with_region(&memory(), region.clone()).unwrap();
        let driver = Driver::new(&memory, 0, 16);
        let slots = NotedSlots::default();
        let device = MemoryDevice::new(region, Box::new(slots.clone()), requested_mib);
        let (queue, handle) = (driver.queue(), device.handle());
        Self { memory, driver, queue, device, handle, slots }
    }

    fn ring(&mut self) -> Result<(), QueueError> {
        while ring(&mut self.device, std::slice::from_mut(&mut self.queue), &self.memory)?
            == crate::virtio::device::Progress::More
        {}
        Ok(())
    }

    fn request(kind: u16, address: u64, count: u16) -> Vec<u8> {
        let mut request = kind.to_le_bytes().to_vec();
        request.extend([0; 6]);
        request.extend(address.to_le_bytes());
        request.extend(count.to_le_bytes());
        request.extend([0; 6]);
        request
    }

    /// Response type and state, for blocks counted from the start of the region.
    fn ask(&mut self, kind: u16, first: u64, count: u16) -> (u16, u16) {
        let request = Self::request(kind, START + first * BLOCK_BYTES, count);
        self.driver.add(&[Part::Readable(&request), Part::Writable(10)]);
        self.ring().unwrap();
        let (_, bytes, written) = self.driver.take_used().unwrap();
        assert_eq!(written, 10);
        let answer = &bytes[24..];
        (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
    }

    fn plugged_mib(&self) -> u32 {
        self.handle.statistics().plugged_mib
    }

    fn reach(&self) -> Vec<u64> {
        self.slots.0.lock().unwrap().chunks.iter().map(|start| (start - START) / CHUNK_BYTES).collect()
    }
}

#[test]
fn configuration_space_has_the_region_and_what_is_requested() {
    let fixture = Fixture::new(8);
    let config = fixture.device.config_space().unwrap();
    let fields = [0, 16, 24, 32, 40, 48].map(|offset| u64::from_le_bytes(config.field(offset)));
    let region = CHUNKS * CHUNK_BYTES;
    assert_eq!(fields, [BLOCK_BYTES, START, region, region, 0, 8 << 20]);
    fixture.handle.set_requested_mib(u32::MAX);
    let most = (region >> 20) as u32;
    assert_eq!(
        fixture.handle.statistics(),
        MemoryStatistics { size_mib: most, requested_mib: most, plugged_mib: 0 }
    );
    config.driver_write(48, &[0; 8]);
    assert_eq!(fixture.handle.statistics().requested_mib, most);
}

#[test]
fn plugged_memory_can_be_used_and_unplugged_memory_is_gone() {
    let mut fixture = Fixture::new(8);
    let at = GuestAddress(START + BLOCK_BYTES);
    assert!(fixture.memory.write_obj(7u8, at).is_err());
    assert_eq!(fixture.ask(PLUG, 0, 2), (ACK, 0));
    assert_eq!((fixture.plugged_mib(), fixture.reach()), (8, vec![0]));
    fixture.memory.write_obj(7u8, at).unwrap();
    assert_eq!(fixture.ask(UNPLUG, 1, 1), (ACK, 0));
    assert_eq!(fixture.memory.read_obj::<u8>(at).unwrap(), 0, "what was unplugged is kept");
    assert_eq!(fixture.ask(STATE, 0, 2), (ACK, 2));
    assert_eq!(fixture.ask(UNPLUG, 0, 1), (ACK, 0));
    assert_eq!((fixture.plugged_mib(), fixture.reach()), (0, vec![]));
    assert!(fixture.memory.get_slice(GuestAddress(START), 1).is_err());
}

#[test]
fn unplugging_gives_the_hosts_memory_back() {
    let mut fixture = Fixture::new(128);
    assert_eq!(fixture.ask(PLUG, 0, 32), (ACK, 0));
    let before = guest_memory::resident_bytes(&fixture.memory);
    fixture.memory.write_slice(&vec![1; 16 << 20], GuestAddress(START)).unwrap();
    let touched = guest_memory::resident_bytes(&fixture.memory);
    assert!(touched >= before + (16 << 20), "{before} {touched}");
    assert_eq!(fixture.ask(UNPLUG, 0, 4), (ACK, 0));
    assert!(guest_memory::resident_bytes(&fixture.memory) <= touched - (16 << 20));
    fixture.memory.write_slice(&vec![1; 16 << 20], GuestAddress(START + (64 << 20))).unwrap();
    assert_eq!(fixture.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!((fixture.plugged_mib(), fixture.reach()), (0, vec![]));
    assert_eq!(guest_memory::resident_bytes(&fixture.memory), before);
}

#[test]
fn chunk_that_goes_takes_along_what_was_touched_without_being_plugged() {
    let mut fixture = Fixture::new(4);
    // The rings are touched first.
    assert_eq!(fixture.ask(STATE, 0, 1), (ACK, 1));
    let before = guest_memory::resident_bytes(&fixture.memory);
    for chunk in 0..CHUNKS {
        assert_eq!(fixture.ask(PLUG, 32 * chunk, 1), (ACK, 0));
        let unplugged = GuestAddress(START + chunk * CHUNK_BYTES + (64 << 20));
        fixture.memory.write_slice(&vec![1; 16 << 20], unplugged).unwrap();
        // The host may refuse: then it is within reach, but given back.
        fixture.slots.0.lock().unwrap().refuses = chunk == 2;
        assert_eq!(fixture.ask(UNPLUG, 32 * chunk, 1), (ACK, 0));
    }
    let region = fixture.memory.find_region(GuestAddress(START)).unwrap();
    (0..CHUNKS as usize).for_each(|chunk| region.set_present(chunk, true));
    assert_eq!(guest_memory::resident_bytes(&fixture.memory), before);
}

#[test]
fn request_for_very_many_chunks_is_put_off() {
    let mut fixture = Fixture::with_chunks(20, 20 * 128);
    for chunk in 0..20 {
        assert_eq!(fixture.ask(PLUG, 32 * chunk, 32), (ACK, 0));
    }
    assert_eq!(fixture.ask(UNPLUG, 0, 32 * 20), (BUSY, 0));
    assert_eq!(fixture.plugged_mib(), 20 * 128);
    assert_eq!(fixture.ask(UNPLUG, 0, 32 * 17), (ACK, 0));
    assert_eq!(fixture.ask(PLUG, 0, 32 * 17), (ACK, 0));
    assert_eq!(fixture.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert!(fixture.reach().is_empty());
}

#[test]
fn unplugging_all_of_very_many_chunks_takes_several_turns() {
    let mut fixture = Fixture::with_chunks(40, 40 * 128);
    for chunk in 0..40 {
        assert_eq!(fixture.ask(PLUG, 32 * chunk, 32), (ACK, 0));
    }
    fixture.driver.add(&[Part::Readable(&Fixture::request(UNPLUG_ALL, 0, 0)), Part::Writable(10)]);
    for left in [40 - 17, 40 - 2 * 17] {
        let progress = ring(&mut fixture.device, std::slice::from_mut(&mut fixture.queue), &fixture.memory);
        assert_eq!(progress.unwrap(), crate::virtio::device::Progress::More);
        assert_eq!((fixture.reach().len(), fixture.plugged_mib()), (left, left as u32 * 128));
        assert!(fixture.driver.take_used().is_none(), "it is answered before it is done");
    }
    fixture.ring().unwrap();
    assert_eq!((fixture.driver.take_used().map(|used| used.2), fixture.plugged_mib()), (Some(10), 0));
}

#[test]
fn requests_that_may_not_be_are_answered_so() {
    let mut fixture = Fixture::new(8);
    assert_eq!(fixture.ask(PLUG, 0, 3), (NACK, 0));
    assert_eq!(fixture.ask(PLUG, 0, 0), (ERROR, 0));
    assert_eq!(fixture.ask(PLUG, 32 * CHUNKS, 1), (ERROR, 0));
    assert_eq!(fixture.ask(UNPLUG, 0, 1), (ERROR, 0));
    assert_eq!(fixture.ask(STATE, 32 * CHUNKS - 1, 2), (ERROR, 0));
    assert_eq!(fixture.ask(9, 0, 1), (ERROR, 0));
    assert_eq!(fixture.ask(PLUG, 0, 2), (ACK, 0));
    assert_eq!(fixture.ask(PLUG, 1, 1), (ERROR, 0));
    // The operator wants it back: the guest keeps it until it says otherwise, and gets no more.
    fixture.handle.set_requested_mib(0);
    assert_eq!(fixture.ask(PLUG, 2, 1), (NACK, 0));
    assert_eq!(fixture.plugged_mib(), 8);
    fixture.handle.set_requested_mib(128);
    fixture.slots.0.lock().unwrap().refuses = true;
    assert_eq!(fixture.ask(PLUG, 32, 1), (BUSY, 0));
    assert_eq!(fixture.reach(), [0]);
    fixture.slots.0.lock().unwrap().refuses = false;
    assert_eq!(fixture.ask(PLUG, 32, 1), (ACK, 0));
    assert_eq!(fixture.reach(), [0, 1]);
}

#[test]
fn request_or_room_that_is_too_short_fails_the_queue() {
    for (request, room) in [(23, 10), (0, 10), (24, 9), (24, 0)] {
        let mut fixture = Fixture::new(8);
        let bytes = Fixture::request(PLUG, START, 1);
        fixture.driver.add(&[Part::Readable(&bytes[..request]), Part::Writable(room)]);
        assert!(matches!(fixture.ring(), Err(QueueError::BadRequest { .. })), "{request} {room}");
        assert_eq!(fixture.plugged_mib(), 0);
    }
}

proptest! {
    /// Against a set of block numbers: what is plugged, what is within reach, what is counted, and how much a guest
    /// reaches at most.
    #[test]
    fn any_requests_keep_the_account_right(
        steps in prop::collection::vec((0u16..5, 0u64..100, 0u16..70, 0u32..400), 0..60),
    ) {
        let mut fixture = Fixture::new(0);
        let mut model = BTreeSet::new();
        let mut most_mib = 0;
        for (kind, first, count, requested_mib) in steps {
            if kind == 4 {
                fixture.handle.set_requested_mib(requested_mib);
                most_mib = most_mib.max(fixture.handle.statistics().requested_mib);
                continue;
            }
            let blocks: BTreeSet<u64> = (first..first + u64::from(count)).collect();
            let (answer, state) = fixture.ask(kind, first, count);
            let inside = count > 0 && first + u64::from(count) <= 32 * CHUNKS;
            let requested = u64::from(fixture.handle.statistics().requested_mib) / 4;
            match kind {
                PLUG if !inside || !model.is_disjoint(&blocks) => prop_assert_eq!(answer, ERROR),
                PLUG if (model.len() + blocks.len()) as u64 > requested => prop_assert_eq!(answer, NACK),
                PLUG if answer == ACK => model.extend(blocks),
                PLUG => prop_assert_eq!(answer, BUSY),
                UNPLUG if inside && model.is_superset(&blocks) => {
                    prop_assert_eq!(answer, ACK);
                    model.retain(|block| !blocks.contains(block));
                }
                UNPLUG => prop_assert_eq!(answer, ERROR),
                UNPLUG_ALL => {
                    prop_assert_eq!(answer, ACK);
                    model.clear();
                }
                _ if inside => {
                    let plugged = model.intersection(&blocks).count();
                    let expected = if plugged == blocks.len() { 0 } else if plugged == 0 { 1 } else { 2 };
                    prop_assert_eq!((answer, state), (ACK, expected));
                }
                _ => prop_assert_eq!(answer, ERROR),
            }
            prop_assert_eq!(u64::from(fixture.plugged_mib()), model.len() as u64 * 4);
            let chunks: BTreeSet<u64> = model.iter().map(|block| block / 32).collect();
            prop_assert_eq!(fixture.reach(), chunks.into_iter().collect::<Vec<_>>());
            prop_assert!(fixture.reach().len() as u32 * 128 <= most_mib + 256);
        }
    }
}
