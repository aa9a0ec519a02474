//! What only some devices can be asked: pages and free ranges of a balloon, requests to a file server; and rings with the
//! features that all devices have.

use super::{Case, case};
use crate::{
    assembler::Width,
    driver::{
        ADDED_MEMORY, ANSWERED, BABBLED, Device, GIVEN_PAGE, Guest, IGNORED, INDIRECT, INSULT, MEMORY_END,
        NEXT, READ_ONLY_FILE, SECTOR_ZERO, WRITE,
    },
};

/// VIRTIO_F_INDIRECT_DESC and VIRTIO_F_EVENT_IDX (§6).
const RING_FEATURES: u32 = 1 << 28 | 1 << 29;

/// The cases.
pub fn all() -> Vec<Case> {
    vec![
        case("rings_with_event_indices_of_nonsense", event_indices),
        case("balloon_with_pages_of_nobody", pages_of_nobody).failures(5..=5),
        case("balloon_statistics_of_nonsense", nonsense_statistics),
        case("file_requests_of_odd_sizes", odd_file_requests).failures(3..=3),
        case("file_server_that_babbles", babbling_file_server),
        case("file_server_that_hangs_up", insulted_file_server),
    ]
}

/// The driver asks to be told at every index that there is, or at none; a device that decides so still works.
fn event_indices(guest: &mut Guest) {
    for device in Device::ALL {
        guest.start_with(device, RING_FEATURES);
        for event in [0, 1, 2, 0x7fff, 0x8000, u16::MAX] {
            for queue in device.queues() {
                guest.store16(queue.available() + 4 + 2 * u64::from(queue.size), event);
            }
            guest.prove_running(device);
        }
    }
    // A whole request in an indirect table.
    let queue = Device::Block.requests();
    let (header, data, table) = (queue.buffer() + 0x800, 0x60_0000, queue.buffer());
    guest.store64(header, 0);
    guest.store64(header + 8, 0);
    guest.store(Width::One, header + 0x80, 0xee);
    guest.descriptor_at(table, header, 16, NEXT, 1);
    guest.descriptor_at(table + 16, data, 512, NEXT | WRITE, 2);
    guest.descriptor_at(table + 32, header + 0x80, 1, WRITE, 0);
    guest.descriptor(queue, 0, table, 48, INDIRECT, 0);
    guest.request(queue, 0);
    guest.expect(Width::One, header + 0x80, 0, "the status of a read by an indirect table");
    guest.expect(Width::Eight, data, SECTOR_ZERO, "what it has read");
}

fn pages_of_nobody(guest: &mut Guest) {
    let [inflate, deflate, _, free] = Device::Balloon.queues()[..] else { return };
    let numbers = 0x60_0000;
    guest.start(Device::Balloon);
    guest.store64(GIVEN_PAGE + 4096, 7);
    // The last page of all, those of devices, of the local APIC, behind memory, not plugged, of a file, and one's own.
    let pages = [0xffff_ffff_u64 << 12, 0xd000_0000, 0xfee0_0000, MEMORY_END, ADDED_MEMORY, READ_ONLY_FILE];
    for queue in [inflate, deflate] {
        for (index, page) in (0..).zip(pages.into_iter().chain([GIVEN_PAGE, GIVEN_PAGE])) {
            guest.store32(numbers + 4 * index, (page >> 12) as u32);
        }
        guest.descriptor(queue, 0, numbers, 32, 0, 0);
        guest.request(queue, 0);
        // Half a number, none at all, and room for an answer that does not come.
        for (bytes, flags) in [(3, 0), (0, 0), (64, WRITE)] {
            guest.descriptor(queue, 0, numbers, bytes, flags, 0);
            guest.request(queue, 0);
        }
    }
    guest.expect(Width::Eight, GIVEN_PAGE + 4096, 7, "a page that was never given away");
    guest.expect(Width::Eight, GIVEN_PAGE, 0, "a page that was given away twice");
    // Free ranges: odd ones give only the whole pages in them.
    guest.store64(GIVEN_PAGE, 5);
    guest.store64(GIVEN_PAGE + 4096 + 8, 6);
    guest.descriptor(free, 0, GIVEN_PAGE + 1, 4095 + 4096 + 4096 + 100, WRITE, 0);
    guest.request(free, 0);
    guest.expect(Width::Eight, GIVEN_PAGE, 5, "a page of which a part was reported as free");
    guest.expect(Width::Eight, GIVEN_PAGE + 4096 + 8, 0, "a page in a free range");
    for (bytes, flags) in [(4096, 0), (0, WRITE)] {
        guest.descriptor(free, 0, GIVEN_PAGE, bytes, flags, 0);
        guest.request(free, 0);
    }
    guest.expect(Width::Eight, GIVEN_PAGE, 5, "a page that was not offered to be written");
    let fails = |guest: &mut Guest, queue, address, bytes, flags, what: &str| {
        guest.start(Device::Balloon);
        guest.descriptor(queue, 0, address, bytes, flags, 0);
        guest.publish(queue, 0);
        guest.notify(Device::Balloon);
        guest.wait_for_failure(Device::Balloon, what);
    };
    fails(guest, inflate, numbers, 4100, 0, "more page numbers than there may be");
    fails(guest, inflate, numbers, 16 << 20, 0, "four million page numbers");
    fails(guest, free, MEMORY_END - 4096, 8192, WRITE, "a free range that leaves memory");
    fails(guest, free, READ_ONLY_FILE, 4096, WRITE, "a free range in a file that nobody may write");
    fails(guest, free, ADDED_MEMORY, 4096, WRITE, "a free range in memory that was never plugged");
    guest.prove(Device::Rng);
    guest.prove(Device::Balloon);
}

/// The device keeps one chain, and returns it when it asks again.
fn nonsense_statistics(guest: &mut Guest) {
    let statistics = Device::Balloon.queues()[2];
    for (bytes, flags) in [(0, 0), (9, 0), (11, 0), (16 << 20, 0), (4096, WRITE)] {
        guest.start(Device::Balloon);
        // Tags that are none, and one that is.
        for (entry, tag) in (0..).zip([0xffff, 10, 4]) {
            guest.store64(0x60_0000 + 10 * entry, tag);
        }
        guest.descriptor(statistics, 0, 0x60_0000, bytes, flags, 0);
        // One after the other, before anybody has asked.
        for _ in 0..4 {
            guest.publish(statistics, 0);
            guest.notify(Device::Balloon);
        }
        guest.prove_running(Device::Balloon);
        guest.prove_running(Device::Balloon);
    }
    // The last ones are asked for again, one each second.
    guest.wait_for_value(statistics.used() + 2, 1, "statistics that were returned");
    guest.prove(Device::Rng);
    guest.prove(Device::Balloon);
}

fn odd_file_requests(guest: &mut Guest) {
    let queue = Device::Share.requests();
    let reply = queue.buffer() + 0x900;
    guest.start(Device::Share);
    // No room for a reply, none for its header, and more than the reply has.
    for room in [0, 1, 15, 17, 1500] {
        guest.file_request(40, ANSWERED, room);
    }
    guest.file_request(1000, ANSWERED, 16);
    // The longest, of many parts; then much that nobody answers, and a reset.
    guest.file_header(ANSWERED);
    guest.descriptor(queue, 0, queue.buffer() + 0x800, 40, NEXT, 1);
    guest.descriptor(queue, 1, 0x60_0000, (128 << 10) + 4096 - 40, NEXT, 2);
    guest.descriptor(queue, 2, reply, 16, WRITE, 0);
    guest.request(queue, 0);
    guest.expect(Width::Eight, reply, 16, "the reply to the longest request");
    guest.file_header(IGNORED);
    for _ in 0..16 {
        guest.publish(queue, 0);
        guest.notify(Device::Share);
    }
    guest.prove(Device::Rng);
    for (bytes, what) in [
        (39, "a request without a header"),
        ((128 << 10) + 4097, "a request that is too long"),
        (16 << 20, "a request of 16 MiB"),
    ] {
        guest.start(Device::Share);
        guest.descriptor(queue, 0, 0x60_0000, bytes, NEXT, 1);
        guest.descriptor(queue, 1, reply, 16, WRITE, 0);
        guest.publish(queue, 0);
        guest.notify(Device::Share);
        guest.wait_for_failure(Device::Share, what);
        guest.prove_running(Device::Rng);
    }
    guest.prove(Device::Share);
}

/// Replies to nobody, replies that do not fit, and second ones: the guest gets an I/O error, once.
fn babbling_file_server(guest: &mut Guest) {
    let reply = Device::Share.requests().buffer() + 0x900;
    guest.start(Device::Share);
    guest.repeat(50, |guest| guest.file_request(40, BABBLED, 16));
    guest.expect(Width::Eight, reply, 0xffff_fffb_0000_0010, "an I/O error for a reply that does not fit");
    guest.prove_running(Device::Share);
    guest.prove(Device::Rng);
    guest.prove(Device::Share);
}

/// After half a header nothing of the server is believed any more: all requests come back with an error, for ever.
fn insulted_file_server(guest: &mut Guest) {
    let reply = Device::Share.requests().buffer() + 0x900;
    for opcode in [INSULT, ANSWERED, IGNORED] {
        guest.start(Device::Share);
        guest.store64(reply, 0);
        guest.file_request(40, opcode, 16);
        guest.expect(Width::Eight, reply, 0xffff_fffb_0000_0010, "an I/O error of a server that is gone");
    }
    guest.prove(Device::Rng);
    guest.prove(Device::Block);
}
