//! The device between a model of a driver and a model of a link.

use std::{
    collections::VecDeque,
    io,
    os::fd::RawFd,
    sync::{Arc, Mutex, MutexGuard},
};

use proptest::prelude::*;
use vm_memory::VolatileSlice;

use super::{Limiter, Net, features};
use crate::{
    backends::{
        frame_socket::scatter,
        link::{HEADER_BYTES, Link, MAX_FRAME_BYTES, Offloads, ReceiveError, SendError},
    },
    config::MacAddress,
    guest_memory::{GuestMemory, transfer::Room},
    virtio::{
        device::{Device, Progress, Readiness, Running},
        driver_model::{Driver, Part, Watched, memory},
        queue::{QueueError, VirtQueue},
    },
};

const FD: RawFd = 99;
const ALL: Offloads = Offloads { checksum: true, tso4: true, tso6: true, ecn: true, uso: true };
const STATUS: usize = 6;

#[derive(Default)]
struct Cable {
    /// Frames with headers on their way to the guest.
    incoming: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    full: bool,
    gone: bool,
    offloads: Option<Offloads>,
}

#[derive(Clone, Default)]
struct ModelLink(Arc<Mutex<Cable>>);

impl ModelLink {
    fn cable(&self) -> MutexGuard<'_, Cable> {
        self.0.lock().unwrap()
    }
}

impl Link for ModelLink {
    fn fd(&self) -> RawFd {
        FD
    }

    fn offloads(&self) -> Offloads {
        ALL
    }

    fn set_receive_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.cable().offloads = Some(offloads);
        Ok(())
    }

    fn receive(&mut self, into: &Room) -> Result<usize, ReceiveError> {
        let mut cable = self.cable();
        if cable.gone {
            return Err(ReceiveError::Gone);
        }
        let frame = cable.incoming.pop_front().ok_or(ReceiveError::Empty)?;
        scatter(&[&frame], into.slices());
        Ok(frame.len())
    }

    fn send(&mut self, frame: &[VolatileSlice]) -> Result<(), SendError> {
        let mut cable = self.cable();
        match () {
            () if cable.gone => return Err(SendError::Gone),
            () if cable.full => return Err(SendError::Full),
            () => {}
        }
        let mut bytes = Vec::new();
        for slice in frame {
            let mut part = vec![0; slice.len()];
            slice.copy_to(&mut part);
            bytes.extend(part);
        }
        // As the kernel does with a header that makes no sense.
        if bytes[0] == 0xff {
            return Err(SendError::Refused);
        }
        cable.sent.push(bytes);
        Ok(())
    }
}

struct Fixture {
    memory: GuestMemory,
    rx: Driver,
    tx: Driver,
    control: Driver,
    queues: Vec<VirtQueue>,
    features: u64,
    net: Net,
    link: ModelLink,
    watched: Watched,
}

impl Fixture {
    /// A device whose driver accepts all features, and has a receive queue of this size.
    fn new(rx_size: u16) -> Self {
        let memory = memory();
        let rx = Driver::new(&memory, 0, rx_size);
        let tx = Driver::new(&memory, 1, 16);
        let control = Driver::new(&memory, 2, 16);
        let link = ModelLink::default();
        let mac = MacAddress([2, 0, 0, 0, 0, 1]);
        let net = Net::new(Box::new(link.clone()), mac, Some(1400), Limiter::default(), Limiter::default());
        Self {
            features: net.identity().features,
            queues: vec![rx.queue(), tx.queue(), control.queue()],
            memory,
            rx,
            tx,
            control,
            net,
            link,
            watched: Watched::default(),
        }
    }

    fn work(
        &mut self,
        work: impl Fn(&mut Net, &mut Running) -> Result<Progress, QueueError>,
    ) -> Result<(), QueueError> {
        let mut running = Running {
            queues: &mut self.queues,
            features: self.features,
            memory: &self.memory,
            poller: &mut self.watched,
        };
        let mut turns = 0;
        while work(&mut self.net, &mut running)? == Progress::More {
            turns += 1;
            assert!(turns < 1000, "the device spins");
        }
        Ok(())
    }

    fn start(&mut self) {
        self.work(|net, running| net.start(running)).unwrap();
    }

    fn ring(&mut self) {
        self.work(|net, running| net.queues_ready(running)).unwrap();
    }

    fn link_ready(&mut self) {
        let both = Readiness { readable: true, writable: true };
        self.work(|net, running| net.fd_ready(FD, both, running)).unwrap();
    }

    fn arrive(&mut self, frame: &[u8]) {
        self.link.cable().incoming.push_back([&[0; HEADER_BYTES], frame].concat());
        self.link_ready();
    }

    /// The next frame that the driver got, with the number of buffers that it is in.
    fn received(&mut self) -> Option<(Vec<u8>, u16)> {
        let (_, bytes, written) = self.rx.take_used()?;
        let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        let mut frame = bytes[..written as usize].to_vec();
        for _ in 1..buffers {
            let (_, bytes, written) = self.rx.take_used().expect("all buffers of a frame come together");
            frame.extend(&bytes[..written as usize]);
        }
        Some((frame[HEADER_BYTES..].to_vec(), buffers))
    }

    fn received_dropped(&self) -> u64 {
        self.net.dropped.received
    }
}

fn frame(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| (index * 7 / 3) as u8).collect()
}

#[test]
fn identity_offers_what_the_link_can() {
    let fixture = Fixture::new(16);
    let identity = fixture.net.identity();
    assert_eq!(identity.config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x78, 0x05]);
    assert_ne!(identity.features & features::HOST_USO, 0);
    assert_eq!(features::of_link(Offloads::default()), 0);
    let checksum = Offloads { checksum: true, ..Offloads::default() };
    let without = features::HOST_TSO4 | features::GUEST_TSO6 | features::HOST_USO;
    assert_eq!(features::of_link(checksum) & without, 0);
}

#[test]
fn sent_frame_reaches_the_link_with_its_header() {
    let mut fixture = Fixture::new(16);
    fixture.start();
    assert_eq!(fixture.link.cable().offloads, Some(ALL));
    assert_eq!(fixture.watched.fds, [FD]);
    let header = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    let data = frame(100);
    // The division into descriptors carries no meaning (§2.7.4).
    fixture.tx.add(&[Part::Readable(&header[..5]), Part::Readable(&header[5..]), Part::Readable(&data)]);
    fixture.ring();
    assert_eq!(fixture.link.cable().sent, [[&header[..], &data].concat()]);
    assert_eq!(fixture.tx.take_used().unwrap().2, 0);
}

#[test]
fn refused_or_giant_frame_is_dropped_and_the_next_is_sent() {
    let mut fixture = Fixture::new(16);
    fixture.start();
    fixture.tx.add(&[Part::Readable(&[0xff; 60])]);
    fixture.tx.add(&[Part::Readable(&vec![0; HEADER_BYTES + MAX_FRAME_BYTES + 1])]);
    fixture.tx.add(&[Part::Readable(&[1; 60])]);
    fixture.ring();
    assert_eq!(fixture.link.cable().sent, [[1; 60]]);
    assert_eq!(std::iter::from_fn(|| fixture.tx.take_used()).count(), 3);
    assert_eq!(fixture.net.dropped.sent, 2);
}

#[test]
fn full_link_keeps_frames_in_the_queue_until_it_is_writable() {
    let mut fixture = Fixture::new(16);
    fixture.start();
    fixture.link.cable().full = true;
    for index in 0..3 {
        fixture.tx.add(&[Part::Readable(&[index; 60])]);
        fixture.ring();
    }
    assert!(fixture.tx.take_used().is_none());
    fixture.link.cable().full = false;
    fixture.link_ready();
    assert_eq!(fixture.link.cable().sent, [[0; 60], [1; 60], [2; 60]]);
}

#[test]
fn small_frame_takes_one_buffer_and_leaves_the_others() {
    let mut fixture = Fixture::new(16);
    for _ in 0..8 {
        fixture.rx.add(&[Part::Writable(1536)]);
    }
    fixture.start();
    fixture.arrive(&frame(60));
    assert_eq!(fixture.received(), Some((frame(60), 1)));
    assert_eq!(fixture.received(), None);
    fixture.arrive(&frame(61));
    assert_eq!(fixture.received(), Some((frame(61), 1)));
}

#[test]
fn large_frame_takes_several_buffers() {
    let mut fixture = Fixture::new(64);
    for _ in 0..64 {
        fixture.rx.add(&[Part::Writable(1536)]);
    }
    fixture.start();
    fixture.arrive(&frame(MAX_FRAME_BYTES));
    fixture.arrive(&frame(1524));
    fixture.arrive(&frame(1525));
    assert_eq!(fixture.received(), Some((frame(MAX_FRAME_BYTES), 43)));
    assert_eq!(fixture.received(), Some((frame(1524), 1)));
    assert_eq!(fixture.received(), Some((frame(1525), 2)));
}

#[test]
fn frame_without_buffers_waits_for_the_doorbell() {
    let mut fixture = Fixture::new(16);
    fixture.start();
    fixture.arrive(&frame(60));
    assert_eq!(fixture.link.cable().incoming.len(), 1);
    fixture.rx.add(&[Part::Writable(1536)]);
    fixture.ring();
    assert_eq!(fixture.received(), Some((frame(60), 1)));
    assert_eq!(fixture.received_dropped(), 0);
}

#[test]
fn frame_with_too_few_buffers_waits_for_more() {
    let mut fixture = Fixture::new(16);
    fixture.rx.add(&[Part::Writable(1536)]);
    fixture.start();
    fixture.arrive(&frame(4000));
    assert_eq!(fixture.received(), None);
    fixture.rx.add(&[Part::Writable(1536)]);
    fixture.ring();
    assert_eq!(fixture.received(), None);
    fixture.rx.add(&[Part::Writable(1536)]);
    fixture.ring();
    assert_eq!(fixture.received(), Some((frame(4000), 3)));
    assert_eq!(fixture.received_dropped(), 0);
}

#[test]
fn frame_that_no_queue_could_hold_is_dropped() {
    let mut fixture = Fixture::new(4);
    for _ in 0..4 {
        fixture.rx.add(&[Part::Writable(100)]);
    }
    fixture.start();
    fixture.arrive(&frame(1000));
    fixture.arrive(&frame(60));
    assert_eq!(fixture.received(), Some((frame(60), 1)));
    assert_eq!(fixture.received_dropped(), 1);
}

#[test]
fn frame_is_dropped_if_its_one_buffer_is_too_small() {
    let mut fixture = Fixture::new(16);
    fixture.features &= !features::MRG_RXBUF;
    fixture.rx.add(&[Part::Writable(100), Part::Writable(30)]);
    fixture.start();
    fixture.arrive(&frame(119));
    fixture.arrive(&frame(118));
    assert_eq!(fixture.received(), Some((frame(118), 1)));
    assert_eq!(fixture.received_dropped(), 1);
}

#[test]
fn frame_beyond_the_largest_is_dropped() {
    let mut fixture = Fixture::new(64);
    for _ in 0..64 {
        fixture.rx.add(&[Part::Writable(1536)]);
    }
    fixture.start();
    fixture.arrive(&frame(MAX_FRAME_BYTES + 1));
    assert_eq!((fixture.received(), fixture.received_dropped()), (None, 1));
}

#[test]
fn chain_that_is_no_buffer_or_frame_fails_the_device() {
    let cases: [&dyn Fn(&mut Fixture); 4] = [
        &|fixture| _ = fixture.tx.add(&[Part::Readable(&[0; HEADER_BYTES - 1])]),
        &|fixture| _ = fixture.rx.add(&[Part::Writable(HEADER_BYTES - 1)]),
        &|fixture| _ = fixture.rx.add(&[Part::Readable(b"x"), Part::Writable(1536)]),
        &|fixture| _ = fixture.control.add(&[Part::Readable(&[5]), Part::Writable(1)]),
    ];
    for (index, case) in cases.iter().enumerate() {
        let mut fixture = Fixture::new(16);
        case(&mut fixture);
        let error = fixture.work(|net, running| net.start(running)).unwrap_err();
        assert!(matches!(error, QueueError::BadRequest { .. }), "{index}: {error}");
    }
}

#[test]
fn lost_link_is_told_and_takes_no_frames() {
    let mut fixture = Fixture::new(16);
    fixture.rx.add(&[Part::Writable(1536)]);
    fixture.start();
    let config = fixture.net.config_space().unwrap();
    assert_eq!(config.field::<2>(STATUS), [1, 0]);
    fixture.link.cable().gone = true;
    fixture.link_ready();
    assert_eq!((config.field::<2>(STATUS), config.generation()), ([0, 0], 1));
    fixture.tx.add(&[Part::Readable(&[0; 60])]);
    fixture.ring();
    assert!(fixture.tx.take_used().is_some());
}

#[test]
fn driver_switches_the_offloads_that_it_accepted() {
    let mut fixture = Fixture::new(16);
    fixture.features &= !features::GUEST_TSO6;
    fixture.start();
    let mut set = |offloads: u64| {
        let bytes = [&[5, 0][..], &offloads.to_le_bytes()].concat();
        fixture.control.add(&[Part::Readable(&bytes), Part::Writable(1)]);
        fixture.ring();
        let (_, bytes, written) = fixture.control.take_used().unwrap();
        assert_eq!(written, 1);
        let offloads = fixture.link.cable().offloads;
        (bytes[10], offloads.unwrap())
    };
    assert_eq!(set(0), (0, Offloads::default()));
    let tso4 = features::GUEST_CSUM | features::GUEST_TSO4;
    let expected = Offloads { checksum: true, tso4: true, ..Offloads::default() };
    assert_eq!(set(tso4), (0, expected));
    assert_eq!(set(tso4 | features::GUEST_TSO6), (1, expected));
    assert_eq!(set(features::HOST_TSO4), (1, expected));
}

#[test]
fn limited_directions_wait_for_their_timers() {
    let once_a_minute = || {
        let config = serde_json::from_str(r#"{"bytes":{"per_second":1}}"#).unwrap();
        Limiter::new(Some(config)).unwrap()
    };
    let mut fixture = Fixture::new(16);
    let link = Box::new(fixture.link.clone());
    fixture.net = Net::new(link, MacAddress([2; 6]), None, once_a_minute(), once_a_minute());
    fixture.rx.add(&[Part::Writable(1536)]);
    fixture.rx.add(&[Part::Writable(1536)]);
    fixture.start();
    assert_eq!(fixture.watched.fds.len(), 3);
    for index in 0..2 {
        fixture.tx.add(&[Part::Readable(&[index; 12 + 60])]);
        fixture.ring();
        fixture.arrive(&[index; 60]);
    }
    assert_eq!(fixture.link.cable().sent, [[0; 12 + 60]]);
    assert_eq!(fixture.received(), Some((vec![0; 60], 1)));
    assert_eq!(fixture.received(), None);
    assert_eq!(fixture.link.cable().incoming.len(), 1);
    fixture.net.stop(&mut fixture.watched);
    assert!(fixture.watched.fds.is_empty());
}

#[test]
fn stopped_device_forgets_its_driver() {
    let mut fixture = Fixture::new(16);
    fixture.rx.add(&[Part::Writable(1536)]);
    fixture.start();
    fixture.arrive(&frame(4000));
    fixture.net.stop(&mut fixture.watched);
    assert!(fixture.watched.fds.is_empty());
    fixture.rx = Driver::new(&fixture.memory, 4, 16);
    fixture.queues[0] = fixture.rx.queue();
    fixture.rx.add(&[Part::Writable(1536)]);
    fixture.start();
    fixture.arrive(&frame(60));
    assert_eq!(fixture.received(), Some((frame(60), 1)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever buffers a driver gives and when: the frames that it gets are those that came, whole and in order, and
    /// the others are counted.
    #[test]
    fn any_buffers_get_whole_frames_in_order(
        steps in prop::collection::vec(
            prop_oneof![
                (1usize..5000).prop_map(|bytes| (true, bytes)),
                (HEADER_BYTES..4000).prop_map(|bytes| (false, bytes)),
            ],
            1..60,
        ),
        merge: bool,
        size in prop_oneof![Just(1u16), Just(4), Just(16)],
    ) {
        let mut fixture = Fixture::new(size);
        if !merge {
            fixture.features &= !features::MRG_RXBUF;
        }
        fixture.start();
        let mut came = VecDeque::new();
        let mut given = 0;
        let (mut got, mut arrived) = (0, 0);
        for (is_frame, bytes) in steps {
            if is_frame {
                came.push_back(frame(bytes));
                arrived += 1;
                fixture.arrive(&frame(bytes));
            } else if given < size {
                given += 1;
                fixture.rx.add(&[Part::Writable(bytes)]);
                fixture.ring();
            }
            while let Some((seen, buffers)) = fixture.received() {
                got += 1;
                given -= buffers;
                let skipped = came.iter().position(|frame| *frame == seen);
                prop_assert!(skipped.is_some(), "a frame that never came");
                came.drain(..=skipped.unwrap());
            }
        }
        let left = fixture.link.cable().incoming.len() as u64;
        let total = got + fixture.received_dropped() + left;
        // One frame at most is neither here nor there: it waits for more buffers.
        prop_assert!(came.len() as u64 >= left && total <= arrived && total + 1 >= arrived);
    }

    /// Any bytes as a frame, any descriptors: sent, dropped or refused, and never more than that.
    #[test]
    fn any_chain_ends(queue in 0usize..3, first: (u64, u32), second: (u64, u32), flags in 0u16..8) {
        let mut fixture = Fixture::new(16);
        fixture.start();
        let driver = [&mut fixture.rx, &mut fixture.tx, &mut fixture.control];
        let driver = driver.into_iter().nth(queue).unwrap();
        driver.descriptor(0, first.0 % (17 << 20), first.1 % 100_000, flags | 1, 1);
        driver.descriptor(1, second.0 % (17 << 20), second.1 % 100_000, flags & 2, 0);
        driver.publish(0);
        fixture.link.cable().incoming.push_back(vec![0; 5000]);
        let both = Readiness { readable: true, writable: true };
        let _ = fixture.work(|net, running| net.fd_ready(FD, both, running));
    }
}
