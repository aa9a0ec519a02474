//! A device driven by a driver that does anything: the fuzzer's bytes are a program of descriptors, ring indices,
//! doorbells, restarts, and what the host's side does.

use std::{cell::RefCell, num::NonZeroU32, os::fd::RawFd, thread};

use cloche_protocol::machine::HOST_CID;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::tempfile::TempFile;

use super::input::Input;
use crate::{
    backends::disk::{Disk, DiskOptions, SECTOR_BYTES},
    config::BalloonConfig,
    guest_memory::{self, GuestMemory},
    virtio::{
        balloon::{Balloon, BalloonHandle},
        block::Block,
        device::{Device, Progress, Readiness, Running},
        driver_model::Watched,
        queue::{QueueSetup, VirtQueue},
        rng::Rng,
        vsock::{
            Connector as _, Vsock,
            packet::{Header, TYPE_STREAM},
            stream_model::ModelConnector,
        },
    },
};

/// End of the first region of memory.
pub const MEMORY_END: u64 = 128 << 10;
/// Start of a second region, which has 64 KiB.
pub const SECOND_REGION: u64 = 1 << 20;
const SECOND_BYTES: u64 = 64 << 10;

/// Where the program's queues lie when it does not say otherwise: 8 KiB for each.
const AREA: u64 = 0x2000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x1800;
/// First byte that no such queue uses.
pub const BUFFERS: u64 = 3 * AREA;

/// VIRTIO_F_EVENT_IDX (virtio 1.2 §6).
const EVENT_IDX: u64 = 1 << 29;

thread_local! {
    static MEMORY: GuestMemory = memory();
}

/// Memory for programs. It stays mapped, so that one is made for each thread only.
pub fn memory() -> GuestMemory {
    guest_memory::map(&[(GuestAddress(0), MEMORY_END), (GuestAddress(SECOND_REGION), SECOND_BYTES)]).unwrap()
}

/// Makes memory as it was in the beginning.
pub fn clear(memory: &GuestMemory) {
    for region in memory.iter().filter(|region| !region.is_pluggable()) {
        let zeros = vec![0; region.len() as usize];
        memory.write_slice(&zeros, region.start_addr()).unwrap();
    }
}

/// Opcodes of a program.
pub mod op {
    pub const DESCRIPTOR: u8 = 0;
    pub const PUBLISH: u8 = 1;
    pub const AVAILABLE_INDEX: u8 = 2;
    pub const USED_EVENT: u8 = 3;
    pub const BYTES: u8 = 4;
    pub const RING: u8 = 5;
    pub const RESTART: u8 = 6;
    pub const REQUEST: u8 = 7;
    pub const HOST: u8 = 8;
    pub const READY: u8 = 9;
    pub const COUNT: u8 = 10;
}

/// What differs between devices.
pub trait Subject {
    type Device: Device;

    fn device(&mut self) -> &mut Self::Device;

    /// A request's first bytes, more or less sensible.
    fn request(&self, input: &mut Input) -> Vec<u8>;

    /// The host does something.
    fn host(&mut self, _input: &mut Input) {}

    /// A file descriptor that the device may watch.
    fn fd(&self, _input: &mut Input) -> RawFd {
        -1
    }

    /// What must hold at any time.
    fn check(&self, _watched: &Watched) {}
}

struct Program<'a, S> {
    subject: S,
    memory: &'a GuestMemory,
    setups: Vec<QueueSetup>,
    available: Vec<u16>,
    /// `None` while the device is stopped or has failed.
    queues: Option<Vec<VirtQueue>>,
    features: u64,
    watched: Watched,
}

impl<'a, S: Subject> Program<'a, S> {
    fn new(mut subject: S, memory: &'a GuestMemory) -> Self {
        let sizes = subject.device().identity().queue_sizes;
        let setups: Vec<QueueSetup> =
            (0..).zip(sizes).map(|(index, size)| default_setup(index, *size)).collect();
        let available = vec![0; setups.len()];
        let watched = Watched::default();
        let mut program = Self { subject, memory, setups, available, queues: None, features: 0, watched };
        program.subject.device().watch(&mut program.watched).unwrap();
        program.start(0);
        program
    }

    fn start(&mut self, features: u64) {
        self.stop();
        let built: Result<Vec<_>, _> = self
            .setups
            .iter()
            .enumerate()
            .map(|(index, setup)| VirtQueue::new(index, *setup, features & EVENT_IDX != 0, self.memory))
            .collect();
        self.queues = built.ok();
        self.features = features;
        self.available.fill(0);
        self.drive(|device, running| device.start(running));
    }

    fn stop(&mut self) {
        if self.queues.take().is_some() {
            self.subject.device().stop(&mut self.watched);
        }
        self.settle();
    }

    /// Waits for what the device has begun in a thread of its own.
    fn settle(&mut self) {
        let both = Readiness { readable: true, writable: true };
        while !self.subject.device().is_idle() {
            thread::yield_now();
            for fd in self.watched.fds.clone() {
                if self.queues.is_some() {
                    self.drive(|device, running| device.fd_ready(fd, both, running));
                } else {
                    self.subject.device().fd_ready_while_stopped(fd, both, &mut self.watched);
                }
            }
        }
    }

    /// As the worker does it: once, and then by its own doorbell as long as there is more.
    fn drive(
        &mut self,
        mut work: impl FnMut(&mut S::Device, &mut Running) -> Result<Progress, crate::virtio::queue::QueueError>,
    ) {
        let mut rounds = 0;
        loop {
            let Some(queues) = &mut self.queues else { return };
            let poller = &mut self.watched;
            let mut running = Running { queues, features: self.features, memory: self.memory, poller };
            let device = self.subject.device();
            let result =
                if rounds == 0 { work(device, &mut running) } else { device.queues_ready(&mut running) };
            let result = result.and_then(|progress| {
                for queue in queues.iter_mut() {
                    queue.take_notification(self.memory)?;
                }
                Ok(progress)
            });
            match result {
                Ok(Progress::Done) => return,
                Ok(Progress::More) => rounds += 1,
                Err(_) => self.stop(),
            }
            assert!(rounds < 4096, "the device goes on for ever");
        }
    }

    fn run(&mut self, mut input: Input) {
        while !input.is_empty() {
            self.step(&mut input);
            self.settle();
            self.subject.check(&self.watched);
        }
        self.stop();
        self.subject.check(&self.watched);
    }

    fn step(&mut self, input: &mut Input) {
        match input.u8() % op::COUNT {
            op::DESCRIPTOR => {
                let queue = input.below(self.setups.len());
                // Also beyond the table, and into tables elsewhere.
                let at = match input.u8() {
                    index @ 0..=239 => self.setups[queue].descriptors.wrapping_add(u64::from(index) * 16),
                    _ => input.address(),
                };
                let mut bytes = input.address().to_le_bytes().to_vec();
                bytes.extend(input.length().to_le_bytes());
                bytes.extend(u16::from(input.u8()).to_le_bytes());
                bytes.extend(u16::from(input.u8()).to_le_bytes());
                self.write(at, &bytes);
            }
            op::PUBLISH => {
                let queue = input.below(self.setups.len());
                let head = u16::from(input.u8());
                let setup = self.setups[queue];
                let slot = u64::from(self.available[queue] % setup.size.max(1));
                self.write(setup.available.wrapping_add(4 + 2 * slot), &head.to_le_bytes());
                self.available[queue] = self.available[queue].wrapping_add(1);
                self.write(setup.available.wrapping_add(2), &self.available[queue].to_le_bytes());
            }
            op::AVAILABLE_INDEX => {
                let queue = input.below(self.setups.len());
                self.available[queue] = input.u16();
                self.write(
                    self.setups[queue].available.wrapping_add(2),
                    &self.available[queue].to_le_bytes(),
                );
            }
            op::USED_EVENT => {
                let setup = self.setups[input.below(self.setups.len())];
                let at = setup.available.wrapping_add(4 + 2 * u64::from(setup.size));
                self.write(at, &input.u16().to_le_bytes());
            }
            op::BYTES => {
                let at = input.address();
                let count = usize::from(input.u8());
                self.write(at, input.bytes(count));
            }
            op::RING => self.drive(|device, running| device.queues_ready(running)),
            op::RESTART => self.restart(input),
            op::REQUEST => {
                let at = input.address();
                self.write(at, &self.subject.request(input));
            }
            op::HOST => self.subject.host(input),
            _ => {
                let fd = self.subject.fd(input);
                let flags = input.u8();
                let ready = Readiness { readable: flags & 1 != 0, writable: flags & 2 != 0 };
                if self.queues.is_none() {
                    self.subject.device().fd_ready_while_stopped(fd, ready, &mut self.watched);
                }
                self.drive(|device, running| device.fd_ready(fd, ready, running));
            }
        }
    }

    fn restart(&mut self, input: &mut Input) {
        let flags = input.u8();
        let sizes = self.subject.device().identity().queue_sizes;
        for (index, size) in sizes.iter().enumerate() {
            self.setups[index] = default_setup(index as u64, *size >> (flags >> 2 & 3));
            if flags & 2 != 0 {
                self.setups[index] = QueueSetup {
                    size: input.u16(),
                    descriptors: input.address(),
                    available: input.address(),
                    used: input.address(),
                };
            }
        }
        // Whatever the device offers, taken or not.
        let offered = self.subject.device().identity().features;
        let features = if flags & 16 == 0 { offered } else { offered & input.u64() };
        self.start(features | if flags & 1 != 0 { EVENT_IDX } else { 0 });
    }

    /// Where it does not fit memory, nothing happens.
    fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
    }
}

fn default_setup(index: u64, size: u16) -> QueueSetup {
    let base = index * AREA;
    QueueSetup { size, descriptors: base, available: base + AVAILABLE, used: base + USED }
}

pub fn run<S: Subject>(subject: S, bytes: &[u8]) {
    MEMORY.with(|memory| run_in(memory, subject, bytes));
}

pub fn run_in<S: Subject>(memory: &GuestMemory, subject: S, bytes: &[u8]) {
    clear(memory);
    Program::new(subject, memory).run(Input::new(bytes));
}

/// Programs that do a little of what a good driver does.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    let request: &[u8] = match target {
        // Kind, sector; then kind and port and so on: see `Subject::request`.
        "block_queue" => &[1, 2, 0],
        "vsock_queue" => &[0, 1, 5, 0, 200],
        "net_queue" => &[5, 0, 3],
        // Four page numbers.
        "balloon_queue" => &[4, 0, 9, 0, 0, 0, 0, 10, 0, 0, 0, 0, 1, 0, 0, 0, 0, 255, 255, 255, 255],
        // Plugs blocks.
        "mem_queue" => &[0, 0, 20],
        "pmem_queue" => &[0],
        "console_queue" => &[9, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        // A length that is not believed, an opcode, a number.
        "share_queue" => &[255, 1, 2, 3, 4, 26, 1, 2, 3, 4, 5, 6, 7, 8],
        _ => &[],
    };
    // The guest's sending queue is the second of a socket, network, console or file system device, the only one of the
    // others.
    let queue = u8::from(matches!(target, "vsock_queue" | "net_queue" | "console_queue" | "share_queue"));
    let address = |at: u16| [&[0][..], &at.to_le_bytes()].concat();
    let descriptor = |queue: u8, index: u8, at: u16, length: u8, flags: u8, next: u8| {
        [&[op::DESCRIPTOR, queue, index][..], &address(at), &[0, length, flags, next]].concat()
    };
    let ask = [&[op::REQUEST][..], &address(0x8000), request].concat();
    let chain = [
        ask.clone(),
        descriptor(queue, 0, 0x8000, 64, 1, 1),
        [&[op::DESCRIPTOR, queue, 1][..], &address(0x9000), &[224, 1, 3, 2]].concat(),
        descriptor(queue, 2, 0xa000, 1, 2, 0),
        vec![op::PUBLISH, queue, 0, op::RING],
    ]
    .concat();
    let simple = [
        descriptor(0, 0, 0x9000, 200, 2, 0),
        vec![op::PUBLISH, 0, 0, op::RING],
        ask,
        descriptor(queue, 1, 0x8000, 44, 0, 0),
        vec![op::PUBLISH, queue, 1, op::RING, op::HOST, 0, 0, 9, op::READY, 0, 3],
    ]
    .concat();
    let indirect = [
        [&[op::DESCRIPTOR, 0, 255][..], &address(0xb000), &address(0x9000), &[0, 64, 2, 0]].concat(),
        descriptor(0, 0, 0xb000, 16, 4, 0),
        vec![op::PUBLISH, 0, 0, op::RING, op::RESTART, 1, op::RING],
    ]
    .concat();
    vec![
        chain.clone(),
        simple.clone(),
        indirect.clone(),
        [chain, vec![op::RESTART, 5], simple, indirect].concat(),
    ]
}

const SECTORS: u64 = 16;

struct BlockSubject {
    block: Block,
    file: TempFile,
}

/// A block device.
pub fn block_queue(bytes: &[u8]) {
    thread_local! {
        static DISK: RefCell<Option<BlockSubject>> = const { RefCell::new(None) };
    }
    let subject = DISK.take().unwrap_or_else(|| {
        let file = TempFile::new().unwrap();
        file.as_file().set_len(SECTORS * SECTOR_BYTES).unwrap();
        let disk = Disk::open(file.as_path(), DiskOptions::default()).unwrap();
        let (block, work) = Block::new(disk, "disk", None).unwrap();
        work.map(std::thread::spawn);
        BlockSubject { block, file }
    });
    // It is kept for the next run; only its content differs then, which no run depends on.
    DISK.set(MEMORY.with(|memory| {
        clear(memory);
        let mut program = Program::new(subject, memory);
        program.run(Input::new(bytes));
        Some(program.subject)
    }));
}

impl Subject for BlockSubject {
    type Device = Block;

    fn device(&mut self) -> &mut Block {
        &mut self.block
    }

    fn request(&self, input: &mut Input) -> Vec<u8> {
        let kind = u32::from(input.u8() % 16);
        let sector = match input.u8() {
            sector @ 0..=199 => sector.into(),
            200..=219 => u64::MAX / 512 + u64::from(input.u8()),
            _ => input.u64(),
        };
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        bytes
    }

    fn check(&self, _watched: &Watched) {
        assert_eq!(self.file.as_file().metadata().unwrap().len(), SECTORS * SECTOR_BYTES, "the disk grew");
    }
}

struct RngSubject(Rng);

/// The entropy device.
pub fn rng_queue(bytes: &[u8]) {
    run(RngSubject(Rng), bytes);
}

impl Subject for RngSubject {
    type Device = Rng;

    fn device(&mut self) -> &mut Rng {
        &mut self.0
    }

    fn request(&self, input: &mut Input) -> Vec<u8> {
        input.bytes(16).to_vec()
    }
}

const BALLOON_MEMORY_MIB: u32 = 64;
const BALLOON_LEAST_MIB: u32 = 32;

struct BalloonSubject {
    balloon: Balloon,
    handle: BalloonHandle,
}

/// The balloon: inflated, deflated, free pages, statistics, and an operator who changes the target.
pub fn balloon_queue(bytes: &[u8]) {
    let config = BalloonConfig {
        target_mib: 8,
        deflate_on_oom: true,
        free_page_reporting: true,
        statistics_interval_s: NonZeroU32::new(1),
    };
    let balloon = Balloon::new(&config, BALLOON_MEMORY_MIB, BALLOON_LEAST_MIB).unwrap();
    let handle = balloon.handle();
    run(BalloonSubject { balloon, handle }, bytes);
}

impl Subject for BalloonSubject {
    type Device = Balloon;

    fn device(&mut self) -> &mut Balloon {
        &mut self.balloon
    }

    /// Page numbers, or statistics.
    fn request(&self, input: &mut Input) -> Vec<u8> {
        let count = input.u8();
        let mut bytes = Vec::new();
        for _ in 0..count % 64 {
            if count < 128 {
                let usual = input.u8() < 0xe0;
                let number = input.u32();
                bytes.extend(if usual { number % 48 } else { number }.to_le_bytes());
            } else {
                bytes.extend(u16::from(input.u8() % 12).to_le_bytes());
                bytes.extend(input.u64().to_le_bytes());
            }
        }
        bytes
    }

    fn host(&mut self, input: &mut Input) {
        self.handle.set_target_mib(u32::from(input.u16()));
    }

    fn fd(&self, _input: &mut Input) -> RawFd {
        // Its timer is the only one; a device with one descriptor does not look which it is.
        0
    }

    fn check(&self, watched: &Watched) {
        let told = self.handle.statistics();
        assert!(told.target_mib <= BALLOON_MEMORY_MIB - BALLOON_LEAST_MIB);
        assert!(told.guest.len() <= 10 && watched.fds.len() <= 1, "{told:?} {:?}", watched.fds);
    }
}

const GUEST_CID: u32 = 3;

struct VsockSubject {
    device: Vsock<ModelConnector>,
    connector: ModelConnector,
}

/// The socket device, its streams, and hosts that read, write, refuse and leave as they like.
pub fn vsock_queue(bytes: &[u8]) {
    let connector = ModelConnector::default();
    run(VsockSubject { device: Vsock::new(GUEST_CID, connector.clone()), connector }, bytes);
}

impl Subject for VsockSubject {
    type Device = Vsock<ModelConnector>;

    fn device(&mut self) -> &mut Vsock<ModelConnector> {
        &mut self.device
    }

    fn request(&self, input: &mut Input) -> Vec<u8> {
        let odd = input.u8();
        let any = |bit: u8, usual: u64, input: &mut Input| {
            if odd >= 0xe0 && odd & bit != 0 { input.u64() } else { usual }
        };
        let header = Header {
            src_cid: any(1, GUEST_CID.into(), input),
            dst_cid: any(2, HOST_CID.into(), input),
            op: u16::from(input.u8() % 9),
            src_port: u32::from(input.u8() % 4),
            dst_port: if odd & 7 == 7 { 404 } else { u32::from(input.u8() % 2) },
            len: input.length(),
            socket_type: any(4, TYPE_STREAM.into(), input) as u16,
            flags: u32::from(odd >> 3 & 3),
            buf_alloc: any(8, 4096, input) as u32,
            fwd_cnt: any(16, 0, input) as u32,
        };
        header.encode().to_vec()
    }

    fn host(&mut self, input: &mut Input) {
        let what = input.u8() % 6;
        if what == 5 {
            self.connector.dial();
        }
        let Some(peer) = self.connector.any_peer(input.below(256)) else { return };
        match what {
            4 => peer.send(format!("CONNECT {}\n", input.u8() % 4).as_bytes()),
            5 => {}
            0 => peer.send(&vec![7; usize::from(input.u16())]),
            1 => peer.accept(input.u16().into()),
            2 => peer.refuse(),
            _ => peer.end(),
        }
    }

    fn fd(&self, input: &mut Input) -> RawFd {
        let index = input.below(256);
        if index.is_multiple_of(8) {
            return self.connector.listener().unwrap_or(-1);
        }
        self.connector.any_peer(index).map_or(-1, |peer| peer.fd())
    }

    fn check(&self, watched: &Watched) {
        self.device.check(&watched.fds);
    }
}
