//! The device with a model of its driver.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::{Balloon, BalloonHandle};
use crate::{
    config::BalloonConfig,
    guest_memory::{self, GuestMemory},
    virtio::{
        device::{Device, Progress, Readiness, Running},
        driver_model::{Driver, Part, Watched, memory},
        queue::{QueueError, VirtQueue},
    },
};

struct Fixture {
    memory: GuestMemory,
    drivers: Vec<Driver>,
    queues: Vec<VirtQueue>,
    device: Balloon,
    handle: BalloonHandle,
    features: u64,
    watched: Watched,
}

impl Fixture {
    fn new(config: BalloonConfig) -> Self {
        let memory = memory();
        let device = Balloon::new(&config, 16, 4).unwrap();
        let features = device.identity().features;
        let queues = 2 + (features & (1 << 1 | 1 << 5)).count_ones() as usize;
        let drivers: Vec<_> = (0..queues as u64).map(|index| Driver::new(&memory, index, 16)).collect();
        let handle = device.handle();
        let queues = drivers.iter().map(Driver::queue).collect();
        let watched = Watched::default();
        let mut fixture = Self { memory, drivers, queues, device, handle, features, watched };
        fixture.work(|device, running| device.start(running)).unwrap();
        fixture
    }

    fn work(
        &mut self,
        work: impl Fn(&mut Balloon, &mut Running) -> Result<Progress, QueueError>,
    ) -> Result<(), QueueError> {
        let mut running = Running {
            queues: &mut self.queues,
            features: self.features,
            memory: &self.memory,
            poller: &mut self.watched,
        };
        while work(&mut self.device, &mut running)? == Progress::More {}
        Ok(())
    }

    fn ring(&mut self) -> Result<(), QueueError> {
        self.work(|device, running| device.queues_ready(running))
    }

    fn byte(&self, address: u64) -> u8 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }
}

fn full() -> BalloonConfig {
    serde_json::from_str(
        r#"{"target_mib":2,"deflate_on_oom":true,"free_page_reporting":true,"statistics_interval_s":1}"#,
    )
    .unwrap()
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

#[test]
fn inflated_pages_are_discarded_and_their_neighbours_are_not() {
    let mut fixture = Fixture::new(BalloonConfig::default());
    for page in 0xa00..0xa06u64 {
        fixture.memory.write_obj(7u8, GuestAddress(page << 12 | 0xfff)).unwrap();
    }
    // Out of order, one twice, one far beyond memory.
    fixture.drivers[0].add(&[Part::Readable(&numbers(&[0xa04, 0xa01, 0xa02, 0xa01, u32::MAX]))]);
    fixture.ring().unwrap();
    assert!(fixture.drivers[0].take_used().is_some());
    let seen: Vec<u8> = (0xa00..0xa06).map(|page| fixture.byte(page << 12 | 0xfff)).collect();
    assert_eq!(seen, [7, 0, 0, 7, 0, 7]);
    fixture.drivers[1].add(&[Part::Readable(&numbers(&[0xa01]))]);
    fixture.ring().unwrap();
    assert!(fixture.drivers[1].take_used().is_some());
}

#[test]
fn inflating_gives_the_hosts_memory_back() {
    let mut fixture = Fixture::new(BalloonConfig::default());
    let before = guest_memory::resident_bytes(&fixture.memory);
    fixture.memory.write_slice(&vec![1; 4 << 20], GuestAddress(8 << 20)).unwrap();
    let touched = guest_memory::resident_bytes(&fixture.memory);
    assert!(touched >= before + (4 << 20), "{before} {touched}");
    for chunk in (0x800..0xc00u32).collect::<Vec<_>>().chunks(256) {
        fixture.drivers[0].add(&[Part::Readable(&numbers(chunk))]);
    }
    fixture.ring().unwrap();
    let given = guest_memory::resident_bytes(&fixture.memory);
    assert!(given + (4 << 20) <= touched, "{touched} {given}");
}

#[test]
fn reported_ranges_are_discarded_in_whole_pages() {
    let mut fixture = Fixture::new(full());
    let reporting = &fixture.drivers[3];
    fixture.memory.write_slice(&[7; 4 << 12], GuestAddress(0xa0_0000)).unwrap();
    reporting.descriptor(0, 0xa0_0010, 3 << 12, 2, 0);
    fixture.drivers[3].publish(0);
    fixture.ring().unwrap();
    assert!(fixture.drivers[3].take_used().is_some());
    let seen: Vec<u8> =
        [0, 0xfff, 0x1000, 0x2fff, 0x3000].map(|offset| fixture.byte(0xa0_0000 + offset)).into();
    assert_eq!(seen, [7, 7, 0, 0, 7]);
}

#[test]
fn target_is_in_the_configuration_space_within_its_bounds() {
    let fixture = Fixture::new(full());
    let config = fixture.device.config_space().unwrap();
    assert_eq!(config.field::<4>(0), 512u32.to_le_bytes());
    fixture.handle.set_target_mib(100);
    assert_eq!(fixture.handle.most_mib(), 12);
    assert_eq!(config.field::<4>(0), (12 * 256u32).to_le_bytes());
    config.driver_write(0, &[0; 4]);
    config.driver_write(4, &512u32.to_le_bytes());
    let statistics = fixture.handle.statistics();
    assert_eq!((statistics.target_mib, statistics.actual_mib), (12, 2));
}

#[test]
fn statistics_are_asked_for_by_the_timer() {
    let mut fixture = Fixture::new(full());
    let mut told = Vec::new();
    for (tag, value) in [(4u16, 1000u64), (5, 2000), (999, 1)] {
        told.extend(tag.to_le_bytes());
        told.extend(value.to_le_bytes());
    }
    fixture.drivers[2].add(&[Part::Readable(&told)]);
    fixture.ring().unwrap();
    assert!(fixture.drivers[2].take_used().is_none(), "the buffer is kept until the device asks");
    let guest = fixture.handle.statistics().guest;
    assert_eq!(guest.into_iter().collect::<Vec<_>>(), [("free-bytes", 1000), ("total-bytes", 2000)]);
    let [timer] = fixture.watched.fds[..] else { panic!("one timer is watched") };
    let ready = Readiness { readable: true, writable: false };
    fixture.work(|device, running| device.fd_ready(timer, ready, running)).unwrap();
    assert!(fixture.drivers[2].take_used().is_some());
    // Nothing to return a second time.
    fixture.work(|device, running| device.fd_ready(timer, ready, running)).unwrap();
    assert!(fixture.drivers[2].take_used().is_none());
    fixture.device.stop(&mut fixture.watched);
    assert!(fixture.watched.fds.is_empty());
    assert!(fixture.handle.statistics().guest.is_empty());
}

#[test]
fn driver_without_statistics_reports_on_the_third_queue() {
    let mut fixture = Fixture::new(full());
    fixture.features &= !(1 << 1);
    fixture.memory.write_obj(7u8, GuestAddress(0xa0_0000)).unwrap();
    fixture.drivers[2].descriptor(0, 0xa0_0000, 4096, 2, 0);
    fixture.drivers[2].publish(0);
    fixture.ring().unwrap();
    assert_eq!(fixture.byte(0xa0_0000), 0);
}

#[test]
fn giant_list_of_pages_fails_the_device() {
    let mut fixture = Fixture::new(BalloonConfig::default());
    fixture.drivers[0].add(&[Part::Readable(&vec![0xff; (64 << 10) + 4])]);
    assert!(matches!(fixture.ring(), Err(QueueError::BadRequest { .. })));
}

proptest! {
    /// Any chains on any queue: served or refused.
    #[test]
    fn any_chain_ends(queue in 0usize..4, first: (u64, u32), second: (u64, u32), flags in 0u16..4) {
        let mut fixture = Fixture::new(full());
        let driver = &mut fixture.drivers[queue];
        // Not over the rings themselves, which would end this test's driver, not the device.
        driver.descriptor(0, (8 << 20) + first.0 % (9 << 20), first.1 % (1 << 20), flags | 1, 1);
        driver.descriptor(1, (8 << 20) + second.0 % (9 << 20), second.1 % (1 << 20), flags & 2, 0);
        driver.publish(0);
        let _ = fixture.ring();
    }
}
