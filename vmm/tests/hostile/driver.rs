//! A driver of virtio-mmio devices in the guest, good or bad, on top of [`Program`].

use std::ops::{Deref, DerefMut};

use crate::assembler::{Program, Width};

/// Registers (virtio 1.2 §4.2.2).
pub mod register {
    pub const DEVICE_ID: u64 = 0x008;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const CONFIG: u64 = 0x100;
}

/// Status bits (§2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 3;
    pub const FEATURES_OK: u32 = 11;
    pub const DRIVER_OK: u32 = 15;
    pub const NEEDS_RESET: u32 = 64;
}

/// Descriptor flags (§2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// First address that is no memory.
pub const MEMORY_END: u64 = 32 << 20;

/// The devices of every guest, by their place on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Block = 0,
    Pmem = 1,
    Net = 2,
    Balloon = 3,
    Memory = 4,
    Console = 5,
    Vsock = 6,
    Rng = 7,
    Share = 8,
}

impl Device {
    pub const ALL: [Self; 9] = [
        Self::Block,
        Self::Pmem,
        Self::Net,
        Self::Balloon,
        Self::Memory,
        Self::Console,
        Self::Vsock,
        Self::Rng,
        Self::Share,
    ];

    /// Features of its own that a driver accepts: those of the balloon's queues for statistics and free pages (§5.5.3).
    fn features(self) -> u32 {
        if self == Self::Balloon { 1 << 1 | 1 << 5 } else { 0 }
    }

    /// Address of a register.
    pub fn at(self, register: u64) -> u64 {
        0xd000_0000 + self as u64 * 0x1000 + register
    }

    /// Queues; the socket and network devices' are for receiving, sending, events or commands, the balloon's for pages
    /// that go, pages that come, statistics and free pages, the file system's for urgent and for other requests.
    pub fn queues(self) -> Vec<Queue> {
        let sizes: &[u16] = match self {
            Self::Block => &[16],
            Self::Vsock | Self::Net => &[16, 16, 16],
            Self::Balloon => &[16, 16, 16, 16],
            Self::Console | Self::Share => &[16, 16],
            Self::Pmem | Self::Memory | Self::Rng => &[16],
        };
        (0..).zip(sizes).map(|(index, size)| Queue { device: self, index, size: *size }).collect()
    }

    /// The queue into which a driver puts requests.
    pub fn requests(self) -> Queue {
        self.queues()[usize::from(matches!(self, Self::Vsock | Self::Net | Self::Console | Self::Share))]
    }
}

/// A queue at its own place in memory.
#[derive(Debug, Clone, Copy)]
pub struct Queue {
    pub device: Device,
    pub index: u64,
    pub size: u16,
}

impl Queue {
    pub fn descriptors(self) -> u64 {
        0x30_0000 + (self.device as u64 * 4 + self.index) * 0x4000
    }

    pub fn available(self) -> u64 {
        self.descriptors() + 0x1000
    }

    pub fn used(self) -> u64 {
        self.descriptors() + 0x2000
    }

    /// A page for buffers.
    pub fn buffer(self) -> u64 {
        self.descriptors() + 0x3000
    }
}

/// A guest that drives devices.
#[derive(Default)]
pub struct Guest(Program);

impl Deref for Guest {
    type Target = Program;

    fn deref(&self) -> &Program {
        &self.0
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Program {
        &mut self.0
    }
}

impl Guest {
    /// Does `body` so many times; at most three deep.
    pub fn repeat(&mut self, times: u32, body: impl FnOnce(&mut Self)) {
        self.start_loop(times);
        body(self);
        self.end_loop();
    }

    pub fn register(&mut self, device: Device, register: u64, value: u32) {
        self.store32(device.at(register), value);
    }

    pub fn status(&mut self, device: Device, status: u32) {
        self.register(device, register::STATUS, status);
    }

    pub fn reset(&mut self, device: Device) {
        self.status(device, 0);
        self.expect(Width::Four, device.at(register::STATUS), 0, "a device that was reset");
    }

    /// From reset to FEATURES_OK, with version 1 and what the device's queues need.
    pub fn negotiate(&mut self, device: Device) {
        self.negotiate_with(device, 0);
    }

    /// As [`Guest::negotiate`], with these of the first 32 features too.
    pub fn negotiate_with(&mut self, device: Device, features: u32) {
        self.reset(device);
        self.status(device, status::ACKNOWLEDGE);
        self.status(device, status::DRIVER);
        self.register(device, register::DRIVER_FEATURES_SELECT, 0);
        self.register(device, register::DRIVER_FEATURES, features | device.features());
        self.register(device, register::DRIVER_FEATURES_SELECT, 1);
        self.register(device, register::DRIVER_FEATURES, 1);
        self.status(device, status::FEATURES_OK);
        self.expect(
            Width::Four,
            device.at(register::STATUS),
            status::FEATURES_OK.into(),
            "a device that was offered version 1",
        );
    }

    /// Sets up a queue at the addresses that it is given.
    pub fn set_up_at(&mut self, queue: Queue, descriptors: u64, available: u64, used: u64) {
        let device = queue.device;
        self.register(device, register::QUEUE_SELECT, queue.index as u32);
        self.register(device, register::QUEUE_SIZE, queue.size.into());
        for (low, address) in [
            (register::QUEUE_DESC_LOW, descriptors),
            (register::QUEUE_DRIVER_LOW, available),
            (register::QUEUE_DEVICE_LOW, used),
        ] {
            self.register(device, low, address as u32);
            self.register(device, low + 4, (address >> 32) as u32);
        }
        self.register(device, register::QUEUE_READY, 1);
    }

    /// Sets up a queue at its own place, empty.
    pub fn set_up(&mut self, queue: Queue) {
        self.store32(queue.available(), 0);
        self.store32(queue.used(), 0);
        self.set_up_at(queue, queue.descriptors(), queue.available(), queue.used());
    }

    /// From reset to a running device.
    pub fn start(&mut self, device: Device) {
        self.start_with(device, 0);
    }

    /// As [`Guest::start`], with these of the first 32 features too.
    pub fn start_with(&mut self, device: Device, features: u32) {
        self.negotiate_with(device, features);
        for queue in device.queues() {
            self.set_up(queue);
        }
        self.status(device, status::DRIVER_OK);
        self.expect(
            Width::Four,
            device.at(register::STATUS),
            status::DRIVER_OK.into(),
            &format!("{device:?} that was started"),
        );
    }

    pub fn descriptor(&mut self, queue: Queue, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        self.descriptor_at(queue.descriptors() + u64::from(index) * 16, address, bytes, flags, next);
    }

    pub fn descriptor_at(&mut self, at: u64, address: u64, bytes: u32, flags: u16, next: u16) {
        self.store64(at, address);
        self.store64(at + 8, u64::from(bytes) | u64::from(flags) << 32 | u64::from(next) << 48);
    }

    /// Makes a chain available.
    pub fn publish(&mut self, queue: Queue, head: u16) {
        self.store16_indexed(queue.available() + 4, queue.available() + 2, queue.size, head);
        self.increment16(queue.available() + 2);
    }

    pub fn notify(&mut self, device: Device) {
        self.register(device, register::QUEUE_NOTIFY, 0);
    }

    /// Makes a chain available and waits until it is used.
    pub fn request(&mut self, queue: Queue, head: u16) {
        self.publish(queue, head);
        self.notify(queue.device);
        self.wait_for_all_used(queue);
    }

    pub fn wait_for_all_used(&mut self, queue: Queue) {
        let what = format!("queue {} of {:?}", queue.index, queue.device);
        self.wait_for_equal16(queue.available() + 2, queue.used() + 2, &what);
    }

    pub fn wait_for_failure(&mut self, device: Device, what: &str) {
        self.wait_for_bits(device.at(register::STATUS), status::NEEDS_RESET, what);
    }

    /// The device must do its work, from reset on.
    pub fn prove(&mut self, device: Device) {
        self.start(device);
        self.prove_running(device);
    }

    /// A device that runs must do its work.
    pub fn prove_running(&mut self, device: Device) {
        let queue = device.requests();
        let buffer = queue.buffer() + 0x800;
        match device {
            Device::Block => {
                self.block_request(0, 0, buffer + 0x100, 512);
                self.expect(Width::One, buffer + 0x80, 0, "the status of a good read");
                self.expect(Width::Eight, buffer + 0x100, SECTOR_ZERO, "sector 0");
            }
            Device::Rng => {
                self.store64(buffer, 0);
                self.descriptor(queue, 0, buffer, 64, WRITE, 0);
                self.request(queue, 0);
                self.expect_not(Width::Eight, buffer, 0, "random bytes");
            }
            Device::Pmem => {
                // A flush, and its answer.
                self.store32(buffer, 0);
                self.store32(buffer + 8, 0xffff);
                self.descriptor(queue, 0, buffer, 4, NEXT, 1);
                self.descriptor(queue, 1, buffer + 8, 4, WRITE, 0);
                self.request(queue, 0);
                self.expect(Width::Four, buffer + 8, 0, "the answer to a flush");
            }
            Device::Console => {
                self.descriptor(queue, 0, buffer, 64, 0, 0);
                self.request(queue, 0);
            }
            Device::Balloon => {
                // A page that is given away is empty when it is touched again.
                self.store64(GIVEN_PAGE, 1);
                self.store32(buffer, (GIVEN_PAGE >> 12) as u32);
                self.descriptor(queue, 0, buffer, 4, 0, 0);
                self.request(queue, 0);
                self.expect(Width::Eight, GIVEN_PAGE, 0, "a page that was given away");
            }
            Device::Share => {
                self.file_request(40, ANSWERED, 16);
                self.expect(Width::Eight, buffer + 0x100, 16, "a reply's length and error");
                self.expect(Width::Eight, buffer + 0x108, FILE_REQUEST, "a reply's number");
            }
            Device::Memory => self.memory_request(3, ADDED_MEMORY + ADDED_BYTES - BLOCK_BYTES, 1, 0),
            Device::Net => {
                // The host sends the frame back.
                let receive = Device::Net.queues()[0];
                self.descriptor(receive, 0, receive.buffer(), 2048, WRITE, 0);
                self.publish(receive, 0);
                self.notify(Device::Net);
                self.store64(buffer, 0);
                self.store64(buffer + 8, u64::from(ECHO) << 32);
                self.store64(buffer + 16, 0x9abc_def0);
                self.descriptor(queue, 0, buffer, 12 + 60, 0, 0);
                self.request(queue, 0);
                self.wait_for_all_used(receive);
                self.expect(Width::Four, receive.buffer() + 12, ECHO.into(), "a frame that came back");
                self.expect(Width::Two, receive.buffer() + 10, 1, "the buffers of a frame");
            }
            Device::Vsock => {
                // A port that nobody serves: the answer is a reset.
                let receive = Device::Vsock.queues()[0];
                self.descriptor(receive, 0, receive.buffer(), 512, WRITE, 0);
                self.publish(receive, 0);
                self.packet(buffer, &Packet { op: 1, port: NOBODY, ..Packet::default() });
                self.descriptor(queue, 0, buffer, 44, 0, 0);
                self.request(queue, 0);
                self.wait_for_all_used(receive);
                self.expect(Width::Two, receive.buffer() + 30, 3, "the answer to a request for no port");
            }
        }
    }

    /// Asks the memory device about blocks: 0 plugs, 1 unplugs, 2 unplugs all, 3 asks for the state; the answer must be
    /// of this type.
    pub fn memory_request(&mut self, kind: u16, address: u64, blocks: u16, answer: u64) {
        let queue = Device::Memory.requests();
        let buffer = queue.buffer() + 0x800;
        self.store64(buffer, kind.into());
        self.store64(buffer + 8, address);
        self.store64(buffer + 16, blocks.into());
        self.store64(buffer + 64, u64::MAX);
        self.descriptor(queue, 0, buffer, 24, NEXT, 1);
        self.descriptor(queue, 1, buffer + 64, 10, WRITE, 0);
        self.request(queue, 0);
        let what = format!("the answer to memory request {kind} of {blocks} blocks at {address:#x}");
        self.expect(Width::Two, buffer + 64, answer, &what);
    }

    /// Asks the file server, by a request of so many bytes with this opcode and room for a reply of so many, which comes
    /// to `buffer + 0x900`.
    pub fn file_request(&mut self, bytes: u32, opcode: u32, room: u32) {
        let queue = Device::Share.requests();
        self.file_header(opcode);
        let buffer = queue.buffer() + 0x800;
        self.descriptor(queue, 0, buffer, bytes, if room > 0 { NEXT } else { 0 }, 1);
        self.descriptor(queue, 1, buffer + 0x100, room, WRITE, 0);
        self.request(queue, 0);
    }

    /// Writes the header of a request to the file server, which claims to be 4 GiB long (§5.11.6.1).
    pub fn file_header(&mut self, opcode: u32) {
        let buffer = Device::Share.requests().buffer() + 0x800;
        self.store64(buffer, u64::from(u32::MAX) | u64::from(opcode) << 32);
        self.store64(buffer + 8, FILE_REQUEST);
    }

    /// A block request that is well-formed; its status byte is at `buffer + 0x880`.
    pub fn block_request(&mut self, kind: u32, sector: u64, data: u64, bytes: u32) {
        let queue = Device::Block.requests();
        let header = queue.buffer() + 0x800;
        self.store64(header, kind.into());
        self.store64(header + 8, sector);
        self.store(Width::One, header + 0x80, 0xee);
        let direction = if kind == 0 { WRITE } else { 0 };
        self.descriptor(queue, 0, header, 16, NEXT, 1);
        self.descriptor(queue, 1, data, bytes, NEXT | direction, 2);
        self.descriptor(queue, 2, header + 0x80, 1, WRITE, 0);
        self.request(queue, 0);
    }

    /// Writes a packet's header to memory.
    pub fn packet(&mut self, at: u64, packet: &Packet) {
        self.store64(at, packet.from);
        self.store64(at + 8, packet.to);
        self.store64(at + 16, u64::from(packet.guest_port) | u64::from(packet.port) << 32);
        self.store64(
            at + 24,
            u64::from(packet.bytes) | u64::from(packet.kind) << 32 | u64::from(packet.op) << 48,
        );
        self.store64(at + 32, u64::from(packet.flags) | u64::from(packet.room) << 32);
        self.store32(at + 40, packet.forwarded);
    }

    /// Sends a packet, with what lies behind its header as data.
    pub fn send(&mut self, packet: &Packet) {
        let queue = Device::Vsock.requests();
        self.packet(queue.buffer(), packet);
        self.descriptor(queue, 0, queue.buffer(), 44 + packet.bytes, 0, 0);
        self.request(queue, 0);
    }
}

/// The first bytes of the disk.
pub const SECTOR_ZERO: u64 = u64::from_le_bytes(*b"SECTOR00");

/// Memory that can be added: where, how much, in which units, and how much of it is asked for. After it, and
/// a gap, is a file that nobody may write.
pub const ADDED_MEMORY: u64 = 4 << 30;
pub const ADDED_BYTES: u64 = 384 << 20;
pub const BLOCK_BYTES: u64 = 4 << 20;
pub const REQUESTED_BLOCKS: u16 = 40;
pub const READ_ONLY_FILE: u64 = ADDED_MEMORY + ADDED_BYTES + (128 << 20);

/// A page that a driver gives away.
pub const GIVEN_PAGE: u64 = 0x70_0000;

/// The number of requests to the file server, and opcodes of those that it answers well, with much that nobody has asked
/// for, or never. It hangs up on [`INSULT`].
pub const FILE_REQUEST: u64 = 0x0102_0304_0506_0708;
pub const ANSWERED: u32 = 26;
pub const BABBLED: u32 = 27;
pub const IGNORED: u32 = 28;
pub const INSULT: u32 = 29;

/// How a frame starts that the host sends back.
pub const ECHO: u32 = 0x1234_5678;

/// Ports of the host: one that is served, one that is not.
pub const SERVED: u32 = 7;
pub const NOBODY: u32 = 8;

/// The port that the first stream of the host comes from; each further one comes from the next.
pub const FIRST_HOST_PORT: u32 = 1 << 30;

/// A socket packet's header (§5.10.6).
#[derive(Debug, Clone)]
pub struct Packet {
    pub from: u64,
    pub to: u64,
    pub guest_port: u32,
    pub port: u32,
    pub bytes: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub room: u32,
    pub forwarded: u32,
}

impl Default for Packet {
    fn default() -> Self {
        Self {
            from: 3,
            to: 2,
            guest_port: 1000,
            port: SERVED,
            bytes: 0,
            kind: 1,
            op: 0,
            flags: 0,
            room: 1 << 16,
            forwarded: 0,
        }
    }
}
