//! The memory device, persistent memory and the console, driven like the other devices ([`super::queues`]).

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex},
};

use vm_memory::GuestAddress;
use vmm_sys_util::tempfile::TempFile;

use super::{
    input::Input,
    queues::{self, Subject},
};
use crate::{
    backends::disk::{Disk, DiskOptions},
    guest_memory::{self, CHUNK_BYTES, GuestMemory, Region},
    virtio::{
        console::Terminal,
        driver_model::Watched,
        mem::{ChunkSlots, MemoryDevice, MemoryHandle},
        pmem::Pmem,
    },
};

const ADDED: u64 = 4 << 30;
const CHUNKS: u64 = 3;
const BLOCK_BYTES: u64 = 4 << 20;

thread_local! {
    /// It stays mapped, so that one is made for each thread only.
    static PLACE: (GuestMemory, Arc<Region>) = {
        let region = guest_memory::map_pluggable(GuestAddress(ADDED), CHUNKS * CHUNK_BYTES).unwrap();
        (guest_memory::with_region(&queues::memory(), region.clone()).unwrap(), region)
    };
}

/// Slots that take note.
#[derive(Clone, Default)]
struct Reach(Arc<Mutex<BTreeSet<u64>>>);

impl ChunkSlots for Reach {
    fn insert(&self, start: GuestAddress) -> io::Result<()> {
        assert!(self.0.lock().unwrap().insert(start.0), "a chunk is inserted twice");
        Ok(())
    }

    fn remove(&self, start: GuestAddress) -> io::Result<()> {
        assert!(self.0.lock().unwrap().remove(&start.0), "a chunk is removed that is not there");
        Ok(())
    }
}

struct MemorySubject {
    device: MemoryDevice,
    handle: MemoryHandle,
    region: Arc<Region>,
    reach: Reach,
    most_mib: u32,
}

/// The memory device, and an operator who asks for more and less.
pub fn mem_queue(bytes: &[u8]) {
    PLACE.with(|(memory, region)| {
        (0..CHUNKS as usize).for_each(|chunk| region.set_present(chunk, false));
        let reach = Reach::default();
        let device = MemoryDevice::new(region.clone(), Box::new(reach.clone()), 0);
        let handle = device.handle();
        let subject = MemorySubject { device, handle, region: region.clone(), reach, most_mib: 0 };
        queues::run_in(memory, subject, bytes);
    });
}

impl Subject for MemorySubject {
    type Device = MemoryDevice;

    fn device(&mut self) -> &mut MemoryDevice {
        &mut self.device
    }

    fn request(&self, input: &mut Input) -> Vec<u8> {
        let kind = u16::from(input.u8() % 5);
        let odd = input.u8();
        let address = if odd < 0xf0 { ADDED + u64::from(odd) % 97 * BLOCK_BYTES } else { input.address() };
        let count = u16::from(input.u8() % 80);
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 6]);
        bytes.extend(address.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend([0; 6]);
        bytes
    }

    fn host(&mut self, input: &mut Input) {
        self.handle.set_requested_mib(u32::from(input.u8()) * 2);
        self.most_mib = self.most_mib.max(self.handle.statistics().requested_mib);
    }

    fn check(&self, _watched: &Watched) {
        let present = self.region.parts().filter(|part| part.present).map(|part| part.start.0);
        let reach = self.reach.0.lock().unwrap();
        assert_eq!(present.collect::<BTreeSet<_>>(), *reach, "devices reach other memory than vCPUs");
        let reached_mib = reach.len() as u32 * 128;
        let plugged_mib = self.handle.statistics().plugged_mib;
        assert!(plugged_mib <= reached_mib && plugged_mib <= self.most_mib);
        assert!(reached_mib <= self.most_mib + 256, "{reached_mib} of {} MiB", self.most_mib);
    }
}

struct PmemSubject(Pmem);

/// Persistent memory, of a file on a disk, so that there is a thread.
pub fn pmem_queue(bytes: &[u8]) {
    let file = TempFile::new_in("/var/tmp".as_ref()).unwrap();
    file.as_file().set_len(4096).unwrap();
    let disk = Disk::open(file.as_path(), DiskOptions::default()).unwrap();
    let (pmem, work) = Pmem::new(disk, ADDED, 2 << 20).unwrap();
    work.map(std::thread::spawn);
    queues::run(PmemSubject(pmem), bytes);
}

impl Subject for PmemSubject {
    type Device = Pmem;

    fn device(&mut self) -> &mut Pmem {
        &mut self.0
    }

    fn request(&self, input: &mut Input) -> Vec<u8> {
        u32::from(input.u8() % 3).to_le_bytes().to_vec()
    }
}

struct ConsoleSubject {
    device: Terminal,
    socket: RawFd,
    terminal: UnixStream,
}

/// The console, and a terminal that reads, types and leaves as it likes.
pub fn console_queue(bytes: &[u8]) {
    let (terminal, socket) = UnixStream::pair().unwrap();
    terminal.set_nonblocking(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    let fd = socket.as_raw_fd();
    let device = Terminal::new(Arc::default(), Some(socket));
    queues::run(ConsoleSubject { device, socket: fd, terminal }, bytes);
}

impl Subject for ConsoleSubject {
    type Device = Terminal;

    fn device(&mut self) -> &mut Terminal {
        &mut self.device
    }

    fn request(&self, input: &mut Input) -> Vec<u8> {
        let count = usize::from(input.u8());
        input.bytes(count).to_vec()
    }

    fn host(&mut self, input: &mut Input) {
        let count = usize::from(input.u16());
        let _ = match input.u8() % 8 {
            0 => self.terminal.shutdown(std::net::Shutdown::Both),
            1..4 => self.terminal.write(&vec![7; count]).map(drop),
            _ => self.terminal.read(&mut vec![0; count]).map(drop),
        };
    }

    fn fd(&self, _input: &mut Input) -> RawFd {
        self.socket
    }
}
