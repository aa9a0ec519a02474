//! Queues against models: a chain is what a second, naive reading of virtio 1.2 §2.7.5 makes of the table; and rings
//! hand over, in order and once, what a driver puts into them, wherever their indices stand.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::virtio::driver_model::{Driver, INDIRECT, MEMORY_BYTES, NEXT, Part, WRITE, memory};

thread_local! {
    /// Memory stays mapped for ever, so that all cases of a test share one.
    static MEMORY: GuestMemory = memory();
}

/// Where the naive reader keeps descriptors: address, length, flags, next.
type Raw = (u64, u32, u16, u16);

const SIZE: u16 = 8;
const TABLE: u64 = 0x80_0000;
const TABLE_ENTRIES: usize = 12;

/// The buffers of a chain, or nothing if it breaks a rule. `direct` is the queue's table, `indirect` lies at [`TABLE`];
/// what an indirect descriptor finds elsewhere is zeros, or no memory.
fn naive(direct: &[Raw], indirect: &[Raw], head: u16) -> Option<Vec<(u64, u32, bool)>> {
    let mut buffers: Vec<(u64, u32, bool)> = Vec::new();
    let mut entries: Vec<Raw> = direct.to_vec();
    let mut inside = false;
    let mut index = usize::from(head);
    loop {
        let (address, bytes, flags, next) = *entries.get(index)?;
        if flags & INDIRECT != 0 {
            let count = bytes as usize / 16;
            let last = address.checked_add(u64::from(bytes))?;
            if inside || flags & NEXT != 0 || count == 0 || bytes % 16 != 0 {
                return None;
            }
            entries = match address.checked_sub(TABLE).map(|offset| (offset / 16, offset % 16)) {
                Some((first, 0)) if (first as usize) < indirect.len() => {
                    let mut rest = indirect[first as usize..].to_vec();
                    rest.resize(count.max(rest.len()), (0, 0, 0, 0));
                    rest.truncate(count);
                    rest
                }
                // The tests put tables there, at the very end of memory, or beyond it.
                _ if last <= MEMORY_BYTES => vec![(0, 0, 0, 0); count],
                _ => return None,
            };
            (inside, index) = (true, 0);
            continue;
        }
        let writable = flags & WRITE != 0;
        let ordered = writable || buffers.iter().all(|(_, _, writable)| !writable);
        let in_memory = address.checked_add(u64::from(bytes)).is_some_and(|end| end <= MEMORY_BYTES)
            && address < MEMORY_BYTES;
        if buffers.len() == usize::from(SIZE) || !ordered || !in_memory {
            return None;
        }
        buffers.push((address, bytes, writable));
        if flags & NEXT == 0 {
            return Some(buffers);
        }
        index = next.into();
    }
}

fn descriptor() -> impl Strategy<Value = Raw> {
    let address = prop_oneof![
        8 => 0x90_0000u64..0xa0_0000,
        1 => MEMORY_BYTES - 64..MEMORY_BYTES + 64,
        1 => u64::MAX - 4096..=u64::MAX,
    ];
    let plain = (address, 0u32..200, 0u16..4, 0u16..SIZE + 2);
    let table = prop_oneof![8 => (0..TABLE_ENTRIES as u64).prop_map(|first| TABLE + first * 16),
        1 => Just(MEMORY_BYTES), 1 => Just(u64::MAX - 15)];
    let to_table =
        (table, prop_oneof![6 => (0u32..14).prop_map(|count| count * 16), 1 => 0u32..64], 4u16..8, 0..SIZE);
    // A link onwards is what makes a chain interesting.
    let linked = (0x90_0000u64..0xa0_0000, 0u32..200, Just(NEXT), 0u16..SIZE + 1);
    prop_oneof![4 => plain, 2 => to_table, 6 => linked]
}

#[derive(Debug, Clone)]
enum Step {
    Add { readable: Vec<u8>, writable: Vec<usize>, indirect: bool },
    Pop,
    PopAndUndo,
    Return { from: usize, together: usize, written: u32 },
    Notify { event: u16 },
    Doorbell { enable: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let parts = (prop::collection::vec(1u8.., 0..3), prop::collection::vec(1usize..40, 0..3), any::<bool>());
    prop_oneof![
        4 => parts.prop_map(|(readable, writable, indirect)| Step::Add { readable, writable, indirect }),
        4 => Just(Step::Pop),
        1 => Just(Step::PopAndUndo),
        3 => (any::<usize>(), 1usize..4, any::<u32>())
            .prop_map(|(from, together, written)| Step::Return { from, together, written }),
        2 => (0u16..12).prop_map(|event| Step::Notify { event }),
        1 => any::<bool>().prop_map(|enable| Step::Doorbell { enable }),
    ]
}

/// A chain that a driver made available: head, readable bytes, room.
#[derive(Debug, Clone, PartialEq)]
struct Offered {
    head: u16,
    readable: Vec<u8>,
    room: usize,
}

struct Ring {
    memory: GuestMemory,
    driver: Driver,
    queue: VirtQueue,
    event_idx: bool,
    /// Made available, not yet taken.
    waiting: VecDeque<Offered>,
    /// Taken, not yet returned.
    taken: Vec<Offered>,
    /// Index of the used ring, and where it was when it was last asked whether to notify.
    used: u16,
    told: u16,
    tables: u64,
}

impl Ring {
    fn new(start: u16, event_idx: bool) -> Self {
        let memory = MEMORY.with(GuestMemory::clone);
        let mut driver = Driver::new(&memory, 0, SIZE);
        driver.start_at(start);
        let mut queue = VirtQueue::new(0, driver.setup(), event_idx, &memory).unwrap();
        queue.ring.set_next_avail(start);
        queue.ring.set_next_used(start);
        queue.told = start;
        Self {
            memory,
            driver,
            queue,
            event_idx,
            waiting: VecDeque::new(),
            taken: Vec::new(),
            used: start,
            told: start,
            tables: 0,
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Add { readable, writable, indirect } => self.add(readable, writable, *indirect),
            Step::Pop => self.pop(),
            Step::PopAndUndo => {
                if self.queue.pop(&self.memory).unwrap().is_some() {
                    self.queue.undo_pop();
                }
            }
            Step::Return { from, together, written } => self.give_back(*from, *together, *written),
            Step::Notify { event } => self.notify(*event),
            Step::Doorbell { enable: true } => {
                assert_eq!(self.queue.enable_doorbell(&self.memory).unwrap(), !self.waiting.is_empty());
            }
            Step::Doorbell { enable: false } => self.queue.disable_doorbell(&self.memory).unwrap(),
        }
    }

    /// Each readable byte is a buffer that is filled with it.
    fn add(&mut self, readable: &[u8], writable: &[usize], indirect: bool) {
        let count = readable.len() + writable.len();
        if count == 0 || self.driver.free() < if indirect { 1 } else { count } {
            return;
        }
        let content: Vec<Vec<u8>> =
            readable.iter().map(|byte| vec![*byte; usize::from(*byte % 40) + 1]).collect();
        let parts: Vec<Part> = (content.iter().map(|bytes| Part::Readable(bytes)))
            .chain(writable.iter().map(|bytes| Part::Writable(*bytes)))
            .collect();
        let head = if indirect {
            self.tables += 1;
            self.driver.add_indirect(&parts, TABLE + self.tables % 64 * 256)
        } else {
            self.driver.add(&parts)
        };
        let room = writable.iter().sum();
        self.waiting.push_back(Offered { head, readable: content.concat(), room });
    }

    fn pop(&mut self) {
        let popped = self.queue.pop(&self.memory).unwrap().map(|chain| Offered {
            head: chain.head,
            readable: chain.readable.to_vec(),
            room: chain.writable.len(),
        });
        assert_eq!(popped, self.waiting.pop_front());
        self.taken.extend(popped);
    }

    fn give_back(&mut self, from: usize, together: usize, written: u32) {
        let mut returned = Vec::new();
        for _ in 0..together.min(self.taken.len()) {
            let chain = self.taken.swap_remove(from % self.taken.len());
            returned.push((chain.head, written));
        }
        self.queue.push_used_together(&self.memory, &returned).unwrap();
        self.used = self.used.wrapping_add(returned.len() as u16);
        for expected in returned {
            let (head, _, written) = self.driver.take_used().unwrap();
            assert_eq!((head, written), expected);
        }
        assert_eq!(self.driver.take_used(), None);
    }

    /// §2.7.7.2: with event indices, the driver is told when the entry at `used_event` was written; else always.
    fn notify(&mut self, event: u16) {
        let event = self.told.wrapping_add(event).wrapping_sub(2);
        self.driver.set_used_event(event);
        let written = self.used.wrapping_sub(self.told);
        let expected = if self.event_idx {
            (0..written).any(|entry| self.told.wrapping_add(entry) == event)
        } else {
            written > 0
        };
        assert_eq!(self.queue.take_notification(&self.memory).unwrap(), expected);
        self.told = self.used;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn pop_reads_a_chain_as_the_naive_reader_does(
        direct in prop::collection::vec(descriptor(), usize::from(SIZE)),
        indirect in prop::collection::vec(descriptor(), TABLE_ENTRIES),
        head in 0..SIZE + 1,
    ) {
        let memory = MEMORY.with(GuestMemory::clone);
        let mut driver = Driver::new(&memory, 0, SIZE);
        driver.start_at(0);
        for (index, (address, bytes, flags, next)) in direct.iter().enumerate() {
            driver.descriptor(index as u16, *address, *bytes, *flags, *next);
        }
        for (index, (address, bytes, flags, next)) in indirect.iter().enumerate() {
            driver.descriptor_at(TABLE + index as u64 * 16, *address, *bytes, *flags, *next);
        }
        driver.publish(head);
        let expected = naive(&direct, &indirect, head);
        match driver.queue().pop(&memory) {
            Ok(Some(chain)) => {
                let expected = expected.expect("a chain that breaks a rule was taken");
                for (buffers, kind) in [(&chain.readable, false), (&chain.writable, true)] {
                    let lengths: Vec<usize> =
                        expected.iter().filter(|b| b.2 == kind && b.1 > 0).map(|b| b.1 as usize).collect();
                    prop_assert_eq!(buffers.slices().iter().map(VolatileSlice::len).collect::<Vec<_>>(), lengths);
                }
            }
            Ok(None) => prop_assert!(false, "nothing was taken"),
            Err(error) => {
                prop_assert!(expected.is_none(), "{} for {:?}", error, expected);
                prop_assert!(error.to_string().contains("virtio 1.2 §"), "{}", error);
            }
        }
    }

    #[test]
    fn ring_hands_over_everything_in_order_and_once(
        start in prop_oneof![Just(0), 65_520u16..=65_535, any::<u16>()],
        event_idx: bool,
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut ring = Ring::new(start, event_idx);
        for step in &steps {
            ring.step(step);
        }
        while !ring.waiting.is_empty() {
            ring.pop();
        }
        ring.give_back(0, usize::MAX, 0);
        ring.notify(0);
    }
}

#[test]
fn pop_of_more_chains_than_the_queue_has_entries_fails() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 0, SIZE);
    driver.descriptor(0, TABLE, 1, WRITE, 0);
    let mut queue = driver.queue();
    for _ in 0..SIZE {
        driver.publish(0);
        queue.pop(&memory).unwrap().unwrap();
    }
    // A driver that offers the same chain again and again, and a device that takes its time.
    driver.publish(0);
    assert!(matches!(queue.pop(&memory), Err(QueueError::Outstanding { limit: SIZE })));
    // One that returns them in time.
    driver.start_at(0);
    let mut queue = driver.queue();
    for _ in 0..3 * SIZE {
        driver.publish(0);
        queue.pop(&memory).unwrap();
        queue.push_used(&memory, 0, 1).unwrap();
    }
}
