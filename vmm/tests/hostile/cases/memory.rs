//! Memory that can be added, and a file that nobody may write: what devices reach of them, and what a driver can ask for.

use crate::{
    assembler::Width,
    driver::{
        ADDED_BYTES, ADDED_MEMORY, BLOCK_BYTES, Device, Guest, NEXT, READ_ONLY_FILE, REQUESTED_BLOCKS,
        SECTOR_ZERO, WRITE, status,
    },
};

/// Buffers in memory that is not plugged, or where nobody may write.
pub fn absent_memory(guest: &mut Guest) {
    let fails = |guest: &mut Guest, address: u64, what: &str| {
        let queue = Device::Block.requests();
        guest.start(Device::Block);
        guest.store64(queue.buffer() + 0x800, 0);
        guest.store64(queue.buffer() + 0x808, 0);
        guest.descriptor(queue, 0, queue.buffer() + 0x800, 16, NEXT, 1);
        guest.descriptor(queue, 1, address, 512, NEXT | WRITE, 2);
        guest.descriptor(queue, 2, queue.buffer() + 0x880, 1, WRITE, 0);
        guest.publish(queue, 0);
        guest.notify(Device::Block);
        guest.wait_for_failure(Device::Block, what);
    };
    let result = Device::Block.requests().buffer() + 0x880;
    guest.start(Device::Memory);
    fails(guest, ADDED_MEMORY, "a buffer in memory that was never plugged");
    guest.memory_request(0, ADDED_MEMORY, 1, 0);
    guest.start(Device::Block);
    guest.block_request(0, 0, ADDED_MEMORY + 512, 512);
    guest.expect(Width::One, result, 0, "a read into memory that was added");
    guest.block_request(1, 1, ADDED_MEMORY + 512, 512);
    guest.block_request(0, 1, 0x60_0000, 512);
    guest.expect(Width::Eight, 0x60_0000, SECTOR_ZERO, "what was read into memory that was added");
    fails(guest, ADDED_MEMORY + (128 << 20) - 256, "a buffer that leaves what is plugged");
    guest.memory_request(1, ADDED_MEMORY, 1, 0);
    fails(guest, ADDED_MEMORY + 512, "a buffer in memory that was unplugged");
    fails(guest, READ_ONLY_FILE, "a buffer in a file that nobody may write");
    guest.start(Device::Block);
    guest.block_request(1, 1, READ_ONLY_FILE + 4096, 512);
    guest.expect(Width::One, result, 0, "a write from a file in memory");
    // Nor may the device's own ring be there.
    let rng = Device::Rng.requests();
    guest.negotiate(Device::Rng);
    guest.store32(rng.available(), 0);
    guest.set_up_at(rng, rng.descriptors(), rng.available(), READ_ONLY_FILE);
    guest.status(Device::Rng, status::DRIVER_OK);
    guest.wait_for_failure(Device::Rng, "a used ring in a file that nobody may write");
    Device::ALL.into_iter().for_each(|device| guest.prove(device));
}

pub fn nonsense_memory_requests(guest: &mut Guest) {
    const ACK: u64 = 0;
    const NACK: u64 = 1;
    const BUSY: u64 = 2;
    const ERROR: u64 = 3;
    guest.start(Device::Memory);
    for kind in [0, 1, 3] {
        for (address, blocks) in [
            (0, 1),
            (ADDED_MEMORY, 0),
            (ADDED_MEMORY + 4096, 1),
            (ADDED_MEMORY - BLOCK_BYTES, 2),
            (READ_ONLY_FILE, 1),
            (READ_ONLY_FILE - BLOCK_BYTES, 2),
            (ADDED_MEMORY + ADDED_BYTES - BLOCK_BYTES, 2),
            (ADDED_MEMORY, u16::MAX),
            (u64::MAX, 1),
            (u64::MAX - BLOCK_BYTES + 1, u16::MAX),
        ] {
            guest.memory_request(kind, address, blocks, ERROR);
        }
    }
    guest.memory_request(4, ADDED_MEMORY, 1, ERROR);
    guest.memory_request(u16::MAX, ADDED_MEMORY, 1, ERROR);
    guest.memory_request(0, ADDED_MEMORY, REQUESTED_BLOCKS + 1, NACK);
    guest.memory_request(1, ADDED_MEMORY, 1, ERROR);
    // One block of each chunk: the third is refused, as the others have room.
    for (chunk, answer) in [(0, ACK), (1, ACK), (2, BUSY)] {
        guest.memory_request(0, ADDED_MEMORY + (chunk << 27), 1, answer);
    }
    guest.memory_request(0, ADDED_MEMORY, 1, ERROR);
    guest.memory_request(2, u64::MAX, 0, ACK);
    for (request, room) in [(23, 10), (24, 9)] {
        let queue = Device::Memory.requests();
        guest.start(Device::Memory);
        guest.descriptor(queue, 0, queue.buffer(), request, NEXT, 1);
        guest.descriptor(queue, 1, queue.buffer() + 64, room, WRITE, 0);
        guest.publish(queue, 0);
        guest.notify(Device::Memory);
        guest.wait_for_failure(Device::Memory, "a request or its room that is too short");
    }
    guest.prove(Device::Memory);
}

/// Chunks that come and go, filled by a device each time: nothing piles up.
pub fn plug_and_unplug(guest: &mut Guest) {
    guest.start(Device::Memory);
    guest.start(Device::Block);
    guest.repeat(300, |guest| {
        guest.memory_request(0, ADDED_MEMORY, REQUESTED_BLOCKS, 0);
        guest.block_request(0, 0, ADDED_MEMORY + (128 << 20) - 256, 512);
        guest.memory_request(2, 0, 0, 0);
    });
    Device::ALL.into_iter().for_each(|device| guest.prove(device));
}
