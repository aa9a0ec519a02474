//! What the guests do.

mod memory;
mod own_ways;
mod streams;

use std::ops::RangeInclusive;

use crate::{
    assembler::{EXIT_PORT, Width},
    driver::{
        ADDED_MEMORY, ANSWERED, Device, ECHO, GIVEN_PAGE, Guest, INDIRECT, MEMORY_END, NEXT, NOBODY, Packet,
        Queue, REQUESTED_BLOCKS, SERVED, WRITE, register, status,
    },
    machine::{End, Host, Limits, Setting},
};

/// A hostile guest and what is to come of it.
pub struct Case {
    pub name: String,
    program: Box<dyn Fn(&mut Guest) + Send + Sync>,
    pub setting: Setting,
    /// Failed devices that the log tells of.
    pub failures: RangeInclusive<usize>,
    pub end: End,
    pub served_bytes: RangeInclusive<usize>,
}

impl Case {
    pub fn guest(&self) -> Guest {
        let mut guest = Guest::default();
        (self.program)(&mut guest);
        guest.exit(0);
        guest
    }

    fn failures(mut self, failures: RangeInclusive<usize>) -> Self {
        self.failures = failures;
        self
    }

    fn setting(mut self, setting: Setting) -> Self {
        self.setting = setting;
        self
    }
}

fn case(name: impl Into<String>, program: impl Fn(&mut Guest) + Send + Sync + 'static) -> Case {
    Case {
        name: name.into(),
        program: Box::new(program),
        setting: Setting::default(),
        failures: 0..=0,
        end: End::Exit(0),
        served_bytes: 0..=0,
    }
}

/// All of them.
pub fn all() -> Vec<Case> {
    let mut cases = vec![case("every_device_works_for_a_good_driver", |guest| {
        for device in Device::ALL {
            guest.expect(Width::Four, device.at(0), u32::from_le_bytes(*b"virt").into(), "the magic number");
            guest.prove(device);
        }
    })];
    for device in Device::ALL {
        cases.push(
            case(format!("{device:?}_with_broken_chains"), move |guest| broken_chains(guest, device))
                .failures(5..=5),
        );
        cases.push(
            case(format!("{device:?}_with_impossible_rings"), move |guest| impossible_rings(guest, device))
                .failures(1..=5),
        );
        cases.push(
            case(format!("{device:?}_out_of_order"), move |guest| out_of_order(guest, device))
                .failures(5..=5),
        );
        cases
            .push(case(format!("{device:?}_reset_while_busy"), move |guest| reset_while_busy(guest, device)));
    }
    cases.extend([
        case("receive_buffers_that_are_broken", broken_receive_buffers).failures(2..=5),
        case("rings_that_overlap_each_other", overlapping_rings).failures(0..=5),
        case("memory_that_is_not_there_is_no_buffer", memory::absent_memory).failures(5..=5),
        case("memory_requests_of_nonsense", memory::nonsense_memory_requests).failures(2..=2),
        case("memory_plugged_and_unplugged_for_ever", memory::plug_and_unplug),
        case("block_requests_of_odd_sizes", odd_block_requests).failures(1..=5),
        case("mmio_of_every_width_and_alignment", every_width).failures(0..=20),
        case("ports_of_every_number_and_width", every_port),
        case("strings_to_and_from_ports", port_strings),
        case("network_frames_of_odd_sizes", odd_frames).failures(2..=5),
        case("socket_packets_of_nonsense", nonsense_packets),
        case("socket_packet_longer_than_its_chain", torn_packets).failures(2..=2),
        case("socket_streams_opened_and_closed_for_ever", open_and_close).setting(Setting {
            host: Host::TakesAll,
            limits: Limits { heap_bytes: 230 << 10, ..Limits::default() },
            ..Setting::default()
        }),
        case("socket_flooded_with_requests", flood)
            .setting(Setting { limits: Limits { fds: 600, heap_bytes: 2 << 20 }, ..Setting::default() }),
        case("socket_with_forged_credit", forged_credit)
            .setting(Setting { host: Host::ReadsSlowly, ..Setting::default() }),
        case("doorbells_rung_by_four_vcpus", notify_storm)
            .setting(Setting { vcpus: 4, ..Setting::default() }),
    ]);
    let mut last_words = case("last_words_of_a_driver_that_is_gone", last_words).setting(Setting {
        limits: Limits { heap_bytes: 1 << 20, ..Limits::default() },
        host: Host::ReadsSlowly,
        ..Setting::default()
    });
    last_words.served_bytes = LAST_WORDS as usize..=LAST_WORDS as usize;
    cases.push(last_words);
    cases.push(streams::of_the_host());
    cases.extend(own_ways::all());
    let mut fault = case("triple_fault_while_devices_are_busy", |guest| {
        for device in Device::ALL {
            guest.start(device);
            guest.descriptor(device.requests(), 0, device.requests().buffer(), 64, WRITE, 0);
            guest.publish(device.requests(), 0);
        }
        guest.notify(Device::Rng);
        guest.triple_fault();
    });
    fault.end = End::TripleFault;
    // All but the entropy device's are none, if they are looked at in time.
    fault.failures = 0..=8;
    cases.push(fault);
    cases
}

/// Another device, which must not notice.
fn neighbour(device: Device) -> Device {
    if device == Device::Rng { Device::Block } else { Device::Rng }
}

/// Makes one bad chain after the other available. Each fails the device, which works again after a reset.
fn broken_chains(guest: &mut Guest, device: Device) {
    type Break = fn(&mut Guest, Queue);
    let breaks: [(&str, Break); 12] = [
        ("a loop", |guest, queue| {
            guest.descriptor(queue, 0, queue.buffer(), 8, NEXT, 1);
            guest.descriptor(queue, 1, queue.buffer(), 8, NEXT, 0);
        }),
        ("a descriptor that is its own successor", |guest, queue| {
            guest.descriptor(queue, 0, queue.buffer(), 8, NEXT, 0);
        }),
        ("a successor outside of the table", |guest, queue| {
            guest.descriptor(queue, 0, queue.buffer(), 8, NEXT, queue.size);
        }),
        ("an indirect table in an indirect table", |guest, queue| {
            guest.descriptor_at(queue.buffer(), queue.buffer(), 16, INDIRECT, 0);
            guest.descriptor(queue, 0, queue.buffer(), 16, INDIRECT, 0);
        }),
        ("an indirect table of half a descriptor", |guest, queue| {
            guest.descriptor(queue, 0, queue.buffer(), 8, INDIRECT, 0);
        }),
        ("an indirect table of 4 GiB", |guest, queue| {
            guest.descriptor(queue, 0, queue.buffer(), 0xffff_fff0, INDIRECT, 0);
        }),
        ("a buffer that leaves memory", |guest, queue| {
            guest.descriptor(queue, 0, MEMORY_END - 8, 16, WRITE, 0);
        }),
        ("a buffer at the devices", |guest, queue| {
            guest.descriptor(queue, 0, 0xd000_0000, 4096, WRITE, 0);
        }),
        ("a buffer that wraps around", |guest, queue| {
            guest.descriptor(queue, 0, u64::MAX - 7, 16, WRITE, 0);
        }),
        ("a buffer of 4 GiB", |guest, queue| {
            guest.descriptor(queue, 0, queue.buffer(), u32::MAX, WRITE, 0);
        }),
        ("a readable buffer after a writable one", |guest, queue| {
            guest.descriptor(queue, 0, queue.buffer(), 8, WRITE | NEXT, 1);
            guest.descriptor(queue, 1, queue.buffer(), 8, 0, 0);
        }),
        ("no byte at all", |guest, queue| {
            guest.descriptor(queue, 0, queue.buffer(), 0, 0, 0);
        }),
    ];
    let queue = device.requests();
    guest.prove(neighbour(device));
    // A balloon does not mind if no page is given.
    let minds = |what: &str| device != Device::Balloon || what != "no byte at all";
    for (what, broken) in breaks.into_iter().filter(|(what, _)| minds(what)) {
        guest.start(device);
        broken(guest, queue);
        guest.publish(queue, 0);
        guest.notify(device);
        guest.wait_for_failure(device, what);
        guest.prove_running(neighbour(device));
    }
    for (what, head, jump) in
        [("a head outside of the table", queue.size, 1), ("an index that jumps", 0, 4000u16)]
    {
        guest.start(device);
        guest.descriptor(queue, 0, queue.buffer(), 64, WRITE, 0);
        guest.store16(queue.available() + 4, head);
        guest.store16(queue.available() + 2, jump);
        guest.notify(device);
        guest.wait_for_failure(device, what);
        guest.prove_running(neighbour(device));
    }
    guest.prove(device);
}

/// Rings where none can be. The device fails when it is started.
fn impossible_rings(guest: &mut Guest, device: Device) {
    let good = device.requests();
    let places = [
        ("a descriptor table beyond memory", MEMORY_END, good.available(), good.used()),
        ("a descriptor table at the devices", 0xd000_0000, good.available(), good.used()),
        ("a descriptor table at the end of all addresses", u64::MAX - 15, good.available(), good.used()),
        ("an available ring across the end of memory", good.descriptors(), MEMORY_END - 4, good.used()),
        ("a used ring on a device's registers", good.descriptors(), good.available(), 0xd000_0100),
        ("a used ring on the local APIC", good.descriptors(), good.available(), 0xfee0_0000),
        ("a used ring that wraps around", good.descriptors(), good.available(), u64::MAX - 3),
        ("rings at odd addresses", good.descriptors() + 1, good.available() + 1, good.used() + 1),
    ];
    guest.prove(neighbour(device));
    for (what, descriptors, available, used) in places {
        guest.negotiate(device);
        for queue in device.queues() {
            if queue.index == good.index {
                guest.set_up_at(queue, descriptors, available, used);
            } else {
                guest.set_up(queue);
            }
        }
        guest.status(device, status::DRIVER_OK);
        guest.wait_for_failure(device, what);
        guest.prove_running(neighbour(device));
    }
    guest.prove(device);
}

/// Steps of the start-up in the wrong order or with wrong values.
fn out_of_order(guest: &mut Guest, device: Device) {
    let needs_reset = |guest: &mut Guest, what: &str| {
        guest.wait_for_failure(device, what);
        // Nothing but a reset helps.
        guest.status(device, status::DRIVER_OK);
        guest.wait_for_failure(device, what);
        guest.reset(device);
    };
    guest.prove(neighbour(device));
    guest.reset(device);
    for (what, first) in [
        ("DRIVER_OK at once", status::DRIVER_OK),
        ("DRIVER before ACKNOWLEDGE", 2),
        ("a status bit that is none", 0x20),
        ("all status bits", 0xffff_ffff),
    ] {
        guest.status(device, first);
        needs_reset(guest, what);
    }
    guest.register(device, register::DRIVER_FEATURES, 1);
    needs_reset(guest, "features before DRIVER");
    guest.register(device, register::QUEUE_SIZE, 16);
    needs_reset(guest, "a queue before FEATURES_OK");
    guest.negotiate(device);
    guest.status(device, status::ACKNOWLEDGE);
    needs_reset(guest, "a status bit that was cleared");
    guest.negotiate(device);
    guest.register(device, register::DRIVER_FEATURES, u32::MAX);
    needs_reset(guest, "features after FEATURES_OK");
    guest.negotiate(device);
    guest.status(device, status::DRIVER_OK);
    needs_reset(guest, "DRIVER_OK without queues");
    for size in [0, 3, 0x8000, 0x1_0000, u32::MAX] {
        guest.negotiate(device);
        guest.register(device, register::QUEUE_SIZE, size);
        needs_reset(guest, "an impossible queue size");
    }
    guest.negotiate(device);
    guest.register(device, register::QUEUE_SELECT, 1000);
    guest.register(device, register::QUEUE_READY, 1);
    needs_reset(guest, "a queue that is none");
    // A queue that runs is left alone.
    for (what, register, value) in [
        ("a size changed while live", register::QUEUE_SIZE, 8),
        ("an address changed while live", register::QUEUE_DEVICE_LOW, 0),
        ("a queue taken away while live", register::QUEUE_READY, 0),
    ] {
        guest.start(device);
        guest.register(device, register, value);
        needs_reset(guest, what);
    }
    // A feature that nobody offered is refused by leaving FEATURES_OK off.
    guest.status(device, status::ACKNOWLEDGE);
    guest.status(device, status::DRIVER);
    for select in [0, 1] {
        guest.register(device, register::DRIVER_FEATURES_SELECT, select);
        guest.register(device, register::DRIVER_FEATURES, u32::MAX);
    }
    guest.status(device, status::FEATURES_OK);
    guest.expect(Width::Four, device.at(register::STATUS), status::DRIVER.into(), "features of nobody");
    guest.prove_running(neighbour(device));
    guest.prove(device);
}

/// Resets while requests are under way, again and again.
fn reset_while_busy(guest: &mut Guest, device: Device) {
    let queue = device.requests();
    guest.repeat(60, |guest| {
        guest.start(device);
        let buffer = queue.buffer();
        match device {
            Device::Block => {
                guest.store64(buffer, 0);
                guest.store64(buffer + 8, 0);
                guest.descriptor(queue, 0, buffer, 16, NEXT, 1);
                guest.descriptor(queue, 1, buffer + 0x100, 0x10000 - 0x200 + 513, WRITE, 0);
            }
            Device::Vsock => {
                guest.packet(buffer, &Packet { op: 1, ..Packet::default() });
                guest.descriptor(queue, 0, buffer, 44, 0, 0);
            }
            Device::Net | Device::Console => guest.descriptor(queue, 0, buffer, 1000, 0, 0),
            Device::Pmem => {
                guest.store32(buffer, 0);
                guest.descriptor(queue, 0, buffer, 4, NEXT, 1);
                guest.descriptor(queue, 1, buffer + 8, 4, WRITE, 0);
            }
            Device::Balloon => {
                guest.store32(buffer, (GIVEN_PAGE >> 12) as u32);
                guest.descriptor(queue, 0, buffer, 4, 0, 0);
            }
            Device::Share => {
                guest.file_header(ANSWERED);
                guest.descriptor(queue, 0, buffer + 0x800, 40, NEXT, 1);
                guest.descriptor(queue, 1, buffer + 0x900, 16, WRITE, 0);
            }
            Device::Memory => {
                // All that is asked for; it stays plugged over the reset.
                guest.store64(buffer, 0);
                guest.store64(buffer + 8, ADDED_MEMORY);
                guest.store64(buffer + 16, REQUESTED_BLOCKS.into());
                guest.descriptor(queue, 0, buffer, 24, NEXT, 1);
                guest.descriptor(queue, 1, buffer + 64, 10, WRITE, 0);
            }
            Device::Rng => guest.descriptor(queue, 0, buffer, 4096, WRITE, 0),
        }
        for _ in 0..4 {
            guest.publish(queue, 0);
            guest.notify(device);
        }
    });
    guest.prove(neighbour(device));
    guest.prove(device);
}

/// Receive buffers of the socket device without room for a header, and read-only ones.
fn broken_receive_buffers(guest: &mut Guest) {
    let receive = Device::Vsock.queues()[0];
    for (bytes, flags) in [(43, WRITE), (4096, 0)] {
        guest.start(Device::Vsock);
        guest.descriptor(receive, 0, receive.buffer(), bytes, flags, 0);
        guest.publish(receive, 0);
        guest.send(&Packet { op: 1, port: NOBODY, ..Packet::default() });
        guest.wait_for_failure(Device::Vsock, "a receive buffer without room");
    }
    guest.prove(Device::Rng);
    guest.prove(Device::Vsock);
}

/// Used rings on descriptors, on available rings, on another device's queue, on the program itself. What comes of it
/// is the guest's problem; the other devices and the VMM are none of it.
fn overlapping_rings(guest: &mut Guest) {
    let queue = Device::Rng.requests();
    let victim = Device::Block.requests();
    // The last is the start of the program's file in memory, which has run already.
    for used in [queue.descriptors(), queue.available(), victim.descriptors(), victim.used(), 0x10_0000] {
        guest.negotiate(Device::Rng);
        guest.store32(queue.available(), 0);
        guest.set_up_at(queue, queue.descriptors(), queue.available(), used);
        guest.status(Device::Rng, status::DRIVER_OK);
        guest.descriptor(queue, 0, queue.buffer(), 64, WRITE, 0);
        guest.repeat(20, |guest| {
            guest.publish(queue, 0);
            guest.notify(Device::Rng);
        });
        guest.reset(Device::Rng);
        guest.prove(Device::Block);
    }
    guest.prove(Device::Rng);
}

fn odd_block_requests(guest: &mut Guest) {
    let queue = Device::Block.requests();
    let (data, result) = (0x60_0000, queue.buffer() + 0x880);
    guest.start(Device::Block);
    let answered = |guest: &mut Guest, kind, sector, bytes, status: u64, what: &str| {
        guest.block_request(kind, sector, data, bytes);
        guest.expect(Width::One, result, status, what);
    };
    answered(guest, 0, 0, 0, 0, "a read of nothing");
    answered(guest, 1, 0, 0, 0, "a write of nothing");
    answered(guest, 0, 0, 511, 1, "a read of part of a sector");
    answered(guest, 0, 128, 512, 1, "a read beyond the end");
    answered(guest, 0, 127, 1024, 1, "a read across the end");
    answered(guest, 0, u64::MAX, 512, 1, "a read of the last sector of all");
    answered(guest, 0, u64::MAX / 512 + 1, 512, 1, "a sector whose place wraps around to 0");
    answered(guest, 1, 1 << 55, 512, 1, "a write whose place wraps around to 0");
    answered(guest, 0, 0, 16 << 20, 1, "a read of more than the disk");
    answered(guest, 0xdead, 0, 512, 2, "a request of no type");
    guest.expect(Width::Eight, data, 0, "memory that no request has filled");
    // Segments to discard (11) or to fill with zeros (13): first sector; sectors, flags.
    for kind in [11, 13] {
        for (sector, sectors_and_flags, status, what) in [
            (u64::MAX, 1, 1, "a segment at the end of all sectors"),
            (u64::MAX / 512 + 1, 1, 1, "a segment whose place wraps around to 0"),
            (127, 2, 1, "a segment across the end"),
            (0, 0, 1, "a segment of nothing"),
            (0, 0xffff_ffff, 1, "a segment of 2 TiB"),
            (1, 0x8000_0000 << 32 | 1, 2, "a segment with an unknown flag"),
            (1, 1, 0, "a segment"),
        ] {
            guest.store64(data, sector);
            guest.store64(data + 8, sectors_and_flags);
            answered(guest, kind, 0, 16, status, what);
        }
        answered(guest, kind, 0, 0, 1, "no segment");
        answered(guest, kind, 0, 15, 1, "part of a segment");
        answered(guest, kind, 0, 17 * 16, 1, "too many segments");
        answered(guest, kind, 0, 16 << 20, 1, "a million segments");
    }
    // A chain that says the same data three times.
    guest.descriptor(queue, 1, data, 512, NEXT | WRITE, 2);
    guest.descriptor(queue, 2, data, 512, NEXT | WRITE, 3);
    guest.descriptor(queue, 3, data, 512, NEXT | WRITE, 4);
    guest.descriptor(queue, 4, result, 1, WRITE, 0);
    guest.store64(queue.buffer() + 0x800, 0);
    guest.store64(queue.buffer() + 0x808, 0);
    guest.request(queue, 0);
    guest.expect(Width::One, result, 0, "a read of three sectors into one place");
    guest.prove_running(Device::Block);
    // The status byte is nowhere to be written.
    guest.descriptor(queue, 0, queue.buffer() + 0x800, 16, NEXT, 1);
    guest.descriptor(queue, 1, result, 1, 0, 0);
    guest.publish(queue, 0);
    guest.notify(Device::Block);
    guest.wait_for_failure(Device::Block, "a status byte that cannot be written");
    guest.prove(Device::Rng);
    guest.prove(Device::Block);
}

/// Reads and writes of every width at every byte of the registers, over a page's end, and beside the devices.
fn every_width(guest: &mut Guest) {
    for device in Device::ALL {
        let edges = (0xff0..0x1000).chain([0x200, 0x800, 0x801]);
        let registers: Vec<u64> = (0..0x118).chain(edges).collect();
        for width in Width::ALL {
            for offset in &registers {
                guest.load(width, device.at(*offset));
            }
        }
        for offset in registers.iter().filter(|offset| **offset % 3 == 0) {
            for width in Width::ALL {
                guest.store(width, device.at(*offset), 0x0101_0101_0101_0101 * (offset % 256));
            }
        }
    }
    for width in Width::ALL {
        let behind = [Device::Share.at(0x1000), Device::Share.at(0x2fff)];
        for address in [0xcfff_fff9, 0xdfff_fffc, 0xc000_0000].into_iter().chain(behind) {
            guest.load(width, address);
            guest.store(width, address, u64::MAX);
        }
        guest.load(width, Device::Block.at(register::CONFIG));
    }
    // A driver may read registers in whole, aligned words only (§4.2.2.2). What else it finds, bytes of them or zeros,
    // depends on whether this host's KVM has read-only memory.
    guest.expect(Width::Four, Device::Share.at(0x1000), u32::MAX.into(), "where no device is");
    // The configuration space can be read by bytes (§4.2.2.2).
    guest.expect(Width::One, Device::Block.at(register::CONFIG), 128, "the disk's capacity");
    guest.expect(Width::Four, Device::Rng.at(register::DEVICE_ID), 4, "the entropy device's kind");
    for device in Device::ALL {
        guest.prove(device);
    }
}

fn every_port(guest: &mut Guest) {
    for (width, bytes) in [(Width::One, 1), (Width::Two, 2), (Width::Four, 4)] {
        // All below the exit port, and all after it. The value is nothing that a port acts upon: writing it to the
        // interrupt controllers masks lines that nobody listens to.
        guest.sweep_ports(width, 0, 0x3f7, 0xffff_ffff);
        guest.sweep_ports(width, 0x3f8, 0x3ff, 0);
        guest.sweep_ports(width, 0x400, EXIT_PORT - 1, 0xffff_ffff);
        guest.sweep_ports(width, EXIT_PORT + bytes, 0x800, 0xffff_ffff);
        guest.sweep_ports(width, 0xcf8, 0xcff, 0x8000_0000);
        guest.sweep_ports(width, 0xfff0, 0xffff, 0xffff_ffff);
        guest.port_in(width, EXIT_PORT);
    }
    guest.port_out(Width::One, EXIT_PORT, 0);
    guest.port_out(Width::Two, EXIT_PORT, 0);
    for device in Device::ALL {
        guest.prove(device);
    }
}

fn port_strings(guest: &mut Guest) {
    let memory = 0x40_0000;
    for width in [Width::One, Width::Two, Width::Four] {
        for port in [0x3f8, 0x3fd, 0x5c0, 0x5c8, 0x64, 0x71, 0x9999] {
            guest.port_out_string(width, port, memory, 400);
            guest.port_in_string(width, port, memory + 0x10_0000, 400);
        }
    }
    // Much more than the console keeps, in loopback mode too.
    guest.repeat(18, |guest| guest.port_out_string(Width::One, 0x3f8, memory, 4096));
    guest.port_out(Width::One, 0x3fc, 0x10);
    guest.port_out_string(Width::One, 0x3f8, memory, 1000);
    for device in Device::ALL {
        guest.prove(device);
    }
}

/// Frames without a byte, of a megabyte, in sixteen parts; no header; receive buffers of odd sizes; wrong commands.
fn odd_frames(guest: &mut Guest) {
    let (receive, queue, commands) =
        (Device::Net.queues()[0], Device::Net.requests(), Device::Net.queues()[2]);
    guest.start(Device::Net);
    guest.store32(0x60_0000 + 12, ECHO);
    for bytes in [12, 13, 12 + 65_535 + 18, 12 + 65_535 + 19, 1 << 20, 16 << 20] {
        guest.descriptor(queue, 0, 0x60_0000, bytes, 0, 0);
        guest.request(queue, 0);
    }
    for index in 0..16 {
        guest.descriptor(queue, index, 0x60_0000, 5, if index < 15 { NEXT } else { 0 }, index + 1);
    }
    guest.request(queue, 0);
    // Commands: of no class, and for what was not negotiated.
    for command in [0u64, 5, 0xffff] {
        guest.store64(commands.buffer(), command);
        guest.descriptor(commands, 0, commands.buffer(), 10, NEXT, 1);
        guest.descriptor(commands, 1, commands.buffer() + 64, 1, WRITE, 0);
        guest.request(commands, 0);
        guest.expect(Width::One, commands.buffer() + 64, 1, "a command's answer");
    }
    // Whatever came back meanwhile goes into buffers that are too small.
    guest.descriptor(receive, 0, receive.buffer(), 12, WRITE, 0);
    for _ in 0..4 {
        guest.publish(receive, 0);
    }
    guest.notify(Device::Net);
    guest.prove(Device::Rng);
    for (what, broken, bytes, flags) in [
        ("a frame without a header", queue, 11, 0),
        ("a receive buffer without room for a header", receive, 11, WRITE),
        ("a receive buffer to read", receive, 100, 0),
        ("half a command", commands, 1, 0),
    ] {
        guest.start(Device::Net);
        guest.descriptor(broken, 0, broken.buffer(), bytes, flags, 0);
        guest.publish(broken, 0);
        guest.notify(Device::Net);
        guest.wait_for_failure(Device::Net, what);
        guest.prove_running(Device::Rng);
    }
}

fn nonsense_packets(guest: &mut Guest) {
    guest.start(Device::Vsock);
    let good = Packet { op: 1, port: NOBODY, ..Packet::default() };
    for op in (0..=9).chain([255, 256, 0x8000, u16::MAX]) {
        guest.send(&Packet { op, ..good.clone() });
        guest.send(&Packet { op, port: u32::MAX, guest_port: u32::MAX, ..good.clone() });
    }
    for kind in [0, 2, 3, u16::MAX] {
        guest.send(&Packet { kind, ..good.clone() });
    }
    for cid in [0, 1, 2, 4, 0xffff_ffff, 1 << 32 | 3, u64::MAX] {
        guest.send(&Packet { from: cid, ..good.clone() });
        guest.send(&Packet { to: cid, ..good.clone() });
    }
    // Data, shutdowns and credit of no stream; a stream's whole life in the wrong order.
    for op in [5, 4, 6, 7, 3, 2, 1, 1, 5, 2, 4, 5, 7, 1] {
        guest.send(&Packet { op, bytes: 100, flags: 3, ..Packet::default() });
    }
    guest.prove(Device::Rng);
    guest.prove_running(Device::Vsock);
}

/// A header that announces more than there is, and half a header.
fn torn_packets(guest: &mut Guest) {
    let queue = Device::Vsock.requests();
    for (announced, bytes) in [(u32::MAX, 100), (0, 43)] {
        guest.start(Device::Vsock);
        guest.packet(queue.buffer(), &Packet { op: 5, bytes: announced, ..Packet::default() });
        guest.descriptor(queue, 0, queue.buffer(), bytes, 0, 0);
        guest.publish(queue, 0);
        guest.notify(Device::Vsock);
        guest.wait_for_failure(Device::Vsock, "a torn packet");
    }
    guest.prove(Device::Rng);
    guest.prove(Device::Vsock);
}

/// No receive buffer is ever offered, so that nothing may wait for one.
fn open_and_close(guest: &mut Guest) {
    guest.start(Device::Vsock);
    guest.repeat(5000, |guest| {
        for op in [1, 3] {
            guest.send(&Packet { op, ..Packet::default() });
        }
    });
    guest.prove(Device::Rng);
    guest.prove(Device::Vsock);
}

/// Thousands of streams, to a port that is served and to one that is not.
fn flood(guest: &mut Guest) {
    let queue = Device::Vsock.requests();
    for port in [SERVED, NOBODY] {
        guest.start(Device::Vsock);
        guest.packet(queue.buffer(), &Packet { op: 1, port, ..Packet::default() });
        guest.descriptor(queue, 0, queue.buffer(), 44, 0, 0);
        guest.repeat(1500, |guest| {
            // Every packet from a port of its own.
            guest.increment16(queue.buffer() + 16);
            guest.request(queue, 0);
        });
        guest.prove(Device::Rng);
    }
    guest.prove(Device::Vsock);
}

/// A stream whose guest says that it has taken more than it got, has no room, or has all the room in the world.
fn forged_credit(guest: &mut Guest) {
    guest.start(Device::Vsock);
    let stream = Packet { op: 1, room: 0, ..Packet::default() };
    guest.send(&stream);
    for (room, forwarded) in [(0, u32::MAX), (u32::MAX, u32::MAX), (u32::MAX, 1 << 31), (1, 0), (u32::MAX, 0)]
    {
        for op in [6, 7, 5] {
            guest.send(&Packet { op, room, forwarded, ..stream.clone() });
        }
    }
    guest.send(&Packet { op: 3, ..stream });
    guest.prove(Device::Rng);
    guest.prove(Device::Vsock);
}

const LAST_WORDS: u32 = 12 * CHUNK;
const CHUNK: u32 = 0x8000;

/// More than a socket holds for a host that does not read yet; then the stream's end, the device's reset, and the end.
fn last_words(guest: &mut Guest) {
    let queue = Device::Vsock.requests();
    guest.start(Device::Vsock);
    guest.send(&Packet { op: 1, ..Packet::default() });
    guest.repeat(LAST_WORDS / CHUNK, |guest| {
        guest.packet(queue.buffer(), &Packet { op: 5, bytes: CHUNK, ..Packet::default() });
        guest.descriptor(queue, 0, queue.buffer(), 44, NEXT, 1);
        guest.descriptor(queue, 1, 0x60_0000, CHUNK, 0, 0);
        guest.request(queue, 0);
    });
    guest.send(&Packet { op: 4, flags: 3, ..Packet::default() });
    guest.reset(Device::Vsock);
    guest.prove(Device::Rng);
}

/// The boot processor lets three others ring, rings itself, and works on meanwhile.
fn notify_storm(guest: &mut Guest) {
    const RINGS: u32 = 3000;
    const COUNTER: u64 = 0x7000;
    for device in Device::ALL {
        guest.start(device);
    }
    guest.store64(COUNTER, 0);
    // At 0x8000 in real mode: cli; lgdt [0x8100]; cr0.pe = 1; jmp 8:0x8200.
    guest.store_bytes(
        0x8000,
        &[
            0xfa, 0x66, 0x0f, 0x01, 0x16, 0x00, 0x81, 0x0f, 0x20, 0xc0, 0x66, 0x83, 0xc8, 0x01, 0x0f, 0x22,
            0xc0, 0x66, 0xea, 0x00, 0x82, 0x00, 0x00, 0x08, 0x00,
        ],
    );
    // Limit and base of a table with flat code and data.
    guest.store_bytes(0x8100, &[0x17, 0x00, 0x10, 0x81, 0x00, 0x00]);
    guest.store64(0x8110, 0);
    guest.store64(0x8118, 0x00cf_9b00_0000_ffff);
    guest.store64(0x8120, 0x00cf_9300_0000_ffff);
    // In 32-bit mode: ds = 0x10; ecx = RINGS; ring every device; loop; lock inc [COUNTER]; hlt for ever.
    let mut code = vec![0x66, 0xb8, 0x10, 0x00, 0x8e, 0xd8, 0xb9];
    code.extend(RINGS.to_le_bytes());
    let again = code.len();
    for device in Device::ALL {
        code.extend([0xc7, 0x05]);
        code.extend((device.at(register::QUEUE_NOTIFY) as u32).to_le_bytes());
        code.extend([0; 4]);
    }
    code.extend([0x49, 0x75, (again as i32 - code.len() as i32 - 3) as u8]);
    code.extend([0xf0, 0xff, 0x05]);
    code.extend((COUNTER as u32).to_le_bytes());
    code.extend([0xf4, 0xeb, 0xfd]);
    guest.store_bytes(0x8200, &code);
    // INIT and two start-ups at page 8, to all but this one (Intel SDM 3A §11.4.4).
    for command in [0x000c_4500, 0x000c_4608, 0x000c_4608] {
        guest.store32(0xfee0_0300, command);
    }
    guest.repeat(20, |guest| {
        guest.prove_running(Device::Rng);
        guest.prove_running(Device::Block);
    });
    guest.wait_for_value(COUNTER, 3, "processors that have rung");
    for device in Device::ALL {
        guest.prove_running(device);
    }
}
