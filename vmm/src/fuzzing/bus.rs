//! Everything a vCPU can reach, as in a machine: bus, registers, workers on an event loop in a thread of its own. They
//! live as long as the process, and every run resets the devices as a guest would.

use std::{
    io,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use super::{
    input::Input,
    queues::{self, BUFFERS, MEMORY_END},
};
use crate::{
    backends::{
        disk::{Disk, DiskOptions},
        socket::Sockets,
    },
    boot::layout::{VIRTIO_MMIO_BYTES, VIRTIO_MMIO_START},
    devices::{Interrupt, console::Console, serial::SerialPort},
    guest_memory::GuestMemory,
    machine::Bus,
    virtio::{
        block::Block,
        device::{Device, InterruptStatus},
        mmio::MmioTransport,
        rng::Rng,
        vsock::Vsock,
        worker::Worker,
    },
};

/// Register offsets that a program uses by name (virtio 1.2 §4.2.2).
mod register {
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
}

const DEVICES: u64 = 3;

#[derive(Clone, Default)]
struct Line(Arc<AtomicU64>);

impl Interrupt for Line {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

struct Machine {
    bus: Bus,
    memory: GuestMemory,
}

/// Runs at one time exclude each other: they share the devices.
fn machine() -> &'static Mutex<Machine> {
    static MACHINE: OnceLock<Mutex<Machine>> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let memory = queues::memory();
        let mut disk = TempFile::new().unwrap();
        disk.as_file().set_len(8192).unwrap();
        let opened = Disk::open(disk.as_path(), DiskOptions::default()).unwrap();
        disk.remove().unwrap();
        let (block, work) = Block::new(opened, "disk", None).unwrap();
        work.map(thread::spawn);
        let devices: [Box<dyn Device>; DEVICES as usize] =
            [Box::new(Rng), Box::new(block), Box::new(Vsock::new(3, Sockets::new(Vec::new())))];
        let mut events = EventManager::<Box<dyn MutEventSubscriber + Send>>::new().unwrap();
        let mut transports = Vec::new();
        for device in devices {
            let interrupt = Arc::new(InterruptStatus::new(Box::new(Line::default())));
            let (worker, handle) = Worker::new(device, memory.clone(), interrupt).unwrap();
            events.add_subscriber(Box::new(worker));
            transports.push(MmioTransport::new(handle));
        }
        thread::spawn(move || {
            loop {
                events.run().unwrap();
            }
        });
        let console = Arc::new(Mutex::new(Console::default()));
        let serial = SerialPort::new(Box::new(Line::default()), console);
        Mutex::new(Machine { bus: Bus::new(serial, transports), memory })
    })
}

/// Opcodes.
mod op {
    pub const WRITE: u8 = 0;
    pub const READ: u8 = 1;
    pub const PORT_WRITE: u8 = 2;
    pub const PORT_READ: u8 = 3;
    pub const MEMORY: u8 = 4;
    pub const SET_UP: u8 = 5;
    pub const REGISTER: u8 = 6;
    pub const COUNT: u8 = 7;
}

/// A vCPU that reads and writes where it likes.
pub fn mmio_bus(bytes: &[u8]) {
    let machine = machine().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    queues::clear(&machine.memory);
    let mut input = Input::new(bytes);
    while !input.is_empty() {
        machine.step(&mut input);
    }
    for device in 0..DEVICES {
        machine.write(device, register::STATUS, 0);
        for register in [register::STATUS, register::INTERRUPT_STATUS, register::QUEUE_READY] {
            assert_eq!(machine.read(device, register), 0, "device {device} after its reset, {register:#x}");
        }
    }
}

impl Machine {
    fn step(&self, input: &mut Input) {
        match input.u8() % op::COUNT {
            op::WRITE => {
                let address = device_address(input);
                let width = usize::from(input.u8() % 9);
                self.bus.memory_write(address, input.bytes(width));
            }
            op::READ => {
                let address = device_address(input);
                let mut data = vec![0xa5; usize::from(input.u8() % 9)];
                self.bus.memory_read(address, &mut data);
            }
            op::PORT_WRITE => {
                let port = port(input);
                let count = usize::from(input.u8());
                let _ = self.bus.port_write(port, input.bytes(count));
            }
            op::PORT_READ => {
                let port = port(input);
                self.bus.port_read(port, &mut vec![0; usize::from(input.u8())]);
            }
            op::MEMORY => {
                let at = input.address();
                let count = usize::from(input.u8());
                let _ = self.memory.write_slice(input.bytes(count), GuestAddress(at));
            }
            op::SET_UP => {
                let device = input.below(DEVICES as usize) as u64;
                self.set_up(device, input.u8());
            }
            _ => {
                // A register at its place and width.
                let device = input.below(DEVICES as usize) as u64;
                self.write(device, 4 * u64::from(input.u8() % 64), input.u32());
            }
        }
    }

    fn write(&self, device: u64, register: u64, value: u32) {
        self.bus
            .memory_write(VIRTIO_MMIO_START + device * VIRTIO_MMIO_BYTES + register, &value.to_le_bytes());
    }

    fn read(&self, device: u64, register: u64) -> u32 {
        let mut word = [0; 4];
        self.bus.memory_read(VIRTIO_MMIO_START + device * VIRTIO_MMIO_BYTES + register, &mut word);
        u32::from_le_bytes(word)
    }

    /// What a good driver does, up to a step.
    fn set_up(&self, device: u64, steps: u8) {
        self.write(device, register::STATUS, 0);
        for status in [1, 3] {
            self.write(device, register::STATUS, status);
        }
        // Feature bits 28 and 29 or none, and 32.
        for (select, features) in [(0, u32::from(steps >> 4 & 3) << 28), (1, 1)] {
            self.write(device, register::DRIVER_FEATURES_SELECT, select);
            self.write(device, register::DRIVER_FEATURES, features);
        }
        self.write(device, register::STATUS, 11);
        if steps & 1 != 0 {
            return;
        }
        for queue in 0..4u32 {
            self.write(device, register::QUEUE_SELECT, queue);
            let size = self.read(device, register::QUEUE_SIZE_MAX);
            if size == 0 {
                break;
            }
            let base = queue * 0x2000;
            for (register, value) in [
                (register::QUEUE_SIZE, size >> (steps >> 6)),
                (register::QUEUE_DESC_LOW, base),
                (register::QUEUE_DRIVER_LOW, base + 0x1000),
                (register::QUEUE_DEVICE_LOW, base + 0x1800),
                (register::QUEUE_READY, 1),
            ] {
                self.write(device, register, value);
            }
        }
        if steps & 2 == 0 {
            self.write(device, register::STATUS, 15);
            self.write(device, register::QUEUE_NOTIFY, 0);
        }
    }
}

fn device_address(input: &mut Input) -> u64 {
    match input.u8() {
        // A device, also one that is not there, and the bytes before and after its page.
        selector @ 0..=247 => {
            let device = u64::from(selector % 4);
            (VIRTIO_MMIO_START + device * VIRTIO_MMIO_BYTES)
                .wrapping_add(u64::from(input.u16() % 0x1200))
                .wrapping_sub(u64::from(selector >> 7) * 8)
        }
        248 => MEMORY_END,
        249 => u64::MAX - 3,
        _ => input.u64(),
    }
}

fn port(input: &mut Input) -> u16 {
    match input.u8() {
        selector @ 0..=127 => 0x3f8 + u16::from(selector % 9),
        128..=159 => 0x5c0 + u16::from(input.u8() % 8),
        160..=175 => 0x60 + u16::from(input.u8() % 32),
        _ => input.u16(),
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let buffer = (BUFFERS as u16).to_le_bytes();
    let started: Vec<u8> = (0..DEVICES as u8).flat_map(|device| [op::SET_UP, device, 0x10]).collect();
    let descriptor = [&[op::MEMORY, 0, 0, 0, 16][..], &buffer, &[0; 6], &[64, 0, 0, 0, 2, 0, 0, 0]].concat();
    let publish = [op::MEMORY, 0, 0x02, 0x10, 4, 1, 0, 0, 0];
    let notify = [op::REGISTER, 0, 0x14, 0, 0, 0, 0];
    let talk = [op::PORT_WRITE, 0, 5, b'h', b'e', b'l', b'l', b'o', op::PORT_READ, 5, 1];
    let odd = [op::WRITE, 0, 0x70, 0, 2, 1, 0, op::READ, 0, 0xfc, 0x0f, 8, op::READ, 1, 0x00, 0x01, 8];
    vec![
        [started.as_slice(), &descriptor, &publish, &notify].concat(),
        talk.to_vec(),
        [started.as_slice(), &odd, &[op::SET_UP, 1, 2]].concat(),
    ]
}
