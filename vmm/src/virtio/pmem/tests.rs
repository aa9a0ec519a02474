//! The device with a model of its driver.

use std::{io::Write, thread, time::Duration};

use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::{Pmem, QUEUE_SIZE};
use crate::{
    backends::disk::{Disk, DiskOptions},
    guest_memory::GuestMemory,
    virtio::{
        device::{Device, Progress, Readiness, Running},
        driver_model::{Driver, Part, Watched, memory},
        queue::{QueueError, VirtQueue},
    },
};

struct Fixture {
    memory: GuestMemory,
    driver: Driver,
    queues: [VirtQueue; 1],
    device: Pmem,
    watched: Watched,
}

impl Fixture {
    fn new(read_only: bool) -> Self {
        // Not in memory, so that there is a thread.
        let mut file = NamedTempFile::new_in("/var/tmp").unwrap();
        file.write_all(&[0; 8192]).unwrap();
        let disk = Disk::open(file.path(), DiskOptions { read_only, ..DiskOptions::default() }).unwrap();
        let (device, work) = Pmem::new(disk, 4 << 30, 8192).unwrap();
        work.map(thread::spawn);
        let memory = memory();
        let driver = Driver::new(&memory, 0, QUEUE_SIZE);
        let queues = [driver.queue()];
        let mut fixture = Self { memory, driver, queues, device, watched: Watched::default() };
        fixture.device.watch(&mut fixture.watched).unwrap();
        fixture.work(|device, running| device.start(running)).unwrap();
        fixture
    }

    fn work(
        &mut self,
        work: impl Fn(&mut Pmem, &mut Running) -> Result<Progress, QueueError>,
    ) -> Result<(), QueueError> {
        let mut running = Running {
            queues: &mut self.queues,
            features: 0,
            memory: &self.memory,
            poller: &mut self.watched,
        };
        while work(&mut self.device, &mut running)? == Progress::More {}
        Ok(())
    }

    /// Rings, and waits for the thread.
    fn ring(&mut self) -> Result<(), QueueError> {
        self.work(|device, running| device.queues_ready(running))?;
        while !self.device.is_idle() {
            thread::sleep(Duration::from_millis(1));
            self.thread_is_ready()?;
        }
        Ok(())
    }

    fn thread_is_ready(&mut self) -> Result<(), QueueError> {
        let fd = *self.watched.fds.first().unwrap();
        let ready = Readiness { readable: true, writable: false };
        self.work(|device, running| device.fd_ready(fd, ready, running))
    }

    fn ask(&mut self, kind: u32) -> u32 {
        self.driver.add(&[Part::Readable(&kind.to_le_bytes()), Part::Writable(1), Part::Writable(9)]);
        self.ring().unwrap();
        let (_, bytes, written) = self.driver.take_used().unwrap();
        assert_eq!(written, 4);
        u32::from_le_bytes(bytes[4..8].try_into().unwrap())
    }
}

#[test]
fn flush_is_answered_and_any_other_request_is_refused() {
    for read_only in [false, true] {
        let mut fixture = Fixture::new(read_only);
        assert_eq!([0, 1, u32::MAX, 0].map(|kind| fixture.ask(kind)), [0, u32::MAX, u32::MAX, 0]);
        assert_eq!(
            fixture.watched.fds.len(),
            usize::from(!read_only),
            "a thread where there is work for one"
        );
    }
}

#[test]
fn configuration_says_where_the_file_is() {
    let config = Fixture::new(true).device.identity().config;
    assert_eq!(config, [(4u64 << 30).to_le_bytes(), 8192u64.to_le_bytes()].concat());
}

#[test]
fn flushes_of_a_driver_that_is_gone_are_nobodys() {
    let mut fixture = Fixture::new(false);
    for _ in 0..4 {
        fixture.driver.add(&[Part::Readable(&[0; 4]), Part::Writable(4)]);
    }
    fixture.work(|device, running| device.queues_ready(running)).unwrap();
    fixture.device.stop(&mut fixture.watched);
    let fd = fixture.watched.fds[0];
    let ready = Readiness { readable: true, writable: false };
    while !fixture.device.is_idle() {
        fixture.device.fd_ready_while_stopped(fd, ready, &mut fixture.watched);
        thread::sleep(Duration::from_millis(1));
    }
    assert!(fixture.driver.take_used().is_none());
    fixture.driver = Driver::new(&fixture.memory, 1, QUEUE_SIZE);
    fixture.queues = [fixture.driver.queue()];
    fixture.work(|device, running| device.start(running)).unwrap();
    assert_eq!(fixture.ask(0), 0);
}

#[test]
fn request_without_type_or_room_fails_the_queue() {
    for (request, room) in [(3, 4), (0, 4), (4, 3), (4, 0)] {
        let mut fixture = Fixture::new(false);
        fixture.driver.add(&[Part::Readable(&vec![0; request]), Part::Writable(room)]);
        assert!(matches!(fixture.ring(), Err(QueueError::BadRequest { .. })), "{request} {room}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any chain: answered or refused.
    #[test]
    fn any_chain_ends(first: (u64, u32), second: (u64, u32), flags in 0u16..4) {
        let mut fixture = Fixture::new(false);
        fixture.driver.descriptor(0, (8 << 20) + first.0 % (9 << 20), first.1 % 4096, flags | 1, 1);
        fixture.driver.descriptor(1, (8 << 20) + second.0 % (9 << 20), second.1 % 4096, flags & 2, 0);
        fixture.driver.publish(0);
        let _ = fixture.ring();
        prop_assert!(fixture.device.is_idle());
    }
}
