//! The block device with a driver in memory: both ways of carrying out operations, and what a driver can do wrong.

use std::{
    io::{Read, Seek, Write},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    backends::disk::DiskOptions,
    config::BucketConfig,
    virtio::driver_model::{Driver, NEXT, Part, Watched, memory, ring},
};

const SECTORS: u64 = 8;
const DISK: &str = env!("CARGO_MANIFEST_DIR");

struct Fixture {
    memory: GuestMemory,
    driver: Driver,
    queue: [VirtQueue; 1],
    block: Block,
    file: tempfile::NamedTempFile,
    features: u64,
}

/// In memory if the host has a tmpfs where it usually is, else on disk.
fn fixture(read_only: bool) -> Fixture {
    let folder = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { DISK };
    fixture_in(folder, read_only, None)
}

fn fixture_in(folder: &str, read_only: bool, limit: Option<LimitConfig>) -> Fixture {
    let memory = memory();
    let driver = Driver::new(&memory, 0, QUEUE_SIZE);
    let mut file = tempfile::NamedTempFile::new_in(folder).unwrap();
    let content: Vec<u8> = (0..SECTORS * SECTOR_BYTES).map(|index| (index / 7) as u8).collect();
    file.write_all(&content).unwrap();
    let disk = Disk::open(file.path(), DiskOptions { read_only, ..DiskOptions::default() }).unwrap();
    let (block, work) = Block::new(disk, "layer-0", limit).unwrap();
    work.map(thread::spawn);
    Fixture { queue: [driver.queue()], memory, driver, block, file, features: feature::FLUSH }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

impl Fixture {
    fn running(&mut self, work: impl FnOnce(&mut Block, &mut Running) -> Result<Progress, QueueError>) {
        let Self { memory, queue, block, features, .. } = self;
        let poller = &mut Watched::default();
        work(block, &mut Running { queues: queue, features: *features, memory, poller }).unwrap();
    }

    /// Lets time pass on the event loop.
    fn turn(&mut self) {
        thread::sleep(Duration::from_millis(1));
        let mut watched = Watched::default();
        self.block.watch(&mut watched).unwrap();
        let ready = Readiness { readable: true, writable: true };
        for fd in watched.fds {
            self.running(|block, running| block.fd_ready(fd, ready, running));
        }
    }

    fn take_used(&mut self) -> (u16, Vec<u8>, u32) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(used) = self.driver.take_used() {
                return used;
            }
            assert!(Instant::now() < deadline, "a request was never answered");
            self.turn();
        }
    }

    /// Carries out one request; returns what follows its header, and the used length.
    fn request(&mut self, header: &[u8], parts: &[Part]) -> (Vec<u8>, u32) {
        let mut all = vec![Part::Readable(header)];
        all.extend(parts.iter().map(|part| match part {
            Part::Readable(bytes) => Part::Readable(bytes),
            Part::Writable(bytes) => Part::Writable(*bytes),
        }));
        self.driver.add(&all);
        self.running(|block, running| block.queues_ready(running));
        let (_, bytes, written) = self.take_used();
        (bytes[header.len()..].to_vec(), written)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let (bytes, _) = self.request(&header(wire::OUT, sector), &[Part::Readable(data), Part::Writable(1)]);
        bytes[data.len()]
    }

    /// The status of a request with segments.
    fn segments(&mut self, kind: u32, segments: &[Vec<u8>]) -> u8 {
        let data = segments.concat();
        let (bytes, _) = self.request(&header(kind, 0), &[Part::Readable(&data), Part::Writable(1)]);
        bytes[data.len()]
    }

    fn content(&mut self) -> Vec<u8> {
        let mut content = Vec::new();
        self.file.rewind().unwrap();
        self.file.read_to_end(&mut content).unwrap();
        content
    }
}

/// On both kinds of files.
fn on_both(read_only: bool, story: impl Fn(Fixture)) {
    story(fixture(read_only));
    story(fixture_in(DISK, read_only, None));
}

#[test]
fn read_of_sectors_yields_the_files_bytes() {
    on_both(true, |mut fixture| {
        let (bytes, written) = fixture
            .request(&header(wire::IN, 2), &[Part::Writable(512), Part::Writable(1024), Part::Writable(1)]);
        assert_eq!(bytes[..1536], fixture.content()[1024..2560]);
        assert_eq!((bytes[1536], written), (wire::OK, 1537));
    });
}

#[test]
fn request_with_odd_layout_is_the_same_request() {
    let mut fixture = fixture(true);
    let whole = header(wire::IN, 0);
    // Header in two parts, status byte behind the data in one buffer (§2.7.4).
    let (bytes, _) = fixture.request(&whole[..3], &[Part::Readable(&whole[3..]), Part::Writable(513)]);
    assert_eq!(bytes[13..525], fixture.content()[..512]);
    assert_eq!(bytes[525], wire::OK);
}

#[test]
fn write_and_flush_reach_the_file() {
    on_both(false, |mut fixture| {
        // With and without a driver that flushes.
        for features in [feature::FLUSH, 0] {
            fixture.features = features;
            let data = [7 + features as u8; 512];
            assert_eq!(fixture.write(SECTORS - 1, &data), wire::OK);
            let (bytes, written) = fixture.request(&header(wire::FLUSH, 0), &[Part::Writable(1)]);
            assert_eq!((bytes, written), (vec![wire::OK], 1));
            assert_eq!(fixture.content()[7 * 512..], data);
            assert_eq!(fixture.content().len() as u64, SECTORS * SECTOR_BYTES);
        }
    });
}

#[test]
fn request_beyond_the_disk_or_not_of_whole_sectors_fails() {
    on_both(false, |mut fixture| {
        for (sector, bytes) in
            [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 1024), (0, 511)]
        {
            let (result, _) =
                fixture.request(&header(wire::IN, sector), &[Part::Writable(bytes), Part::Writable(1)]);
            assert_eq!(result[bytes], wire::IO_ERROR, "{sector} {bytes}");
            assert_eq!(fixture.write(sector, &vec![1; bytes]), wire::IO_ERROR, "{sector} {bytes}");
        }
        assert_eq!(fixture.content().len() as u64, SECTORS * SECTOR_BYTES);
    });
}

#[test]
fn every_change_of_a_read_only_disk_fails() {
    on_both(true, |mut fixture| {
        let features = fixture.block.identity().features;
        assert_eq!(
            features & (feature::RO | feature::DISCARD | feature::WRITE_ZEROES),
            feature::RO,
            "what cannot be done is not offered"
        );
        let before = fixture.content();
        assert_eq!(fixture.write(0, &[1; 512]), wire::IO_ERROR);
        for kind in [wire::DISCARD, wire::WRITE_ZEROES] {
            assert_eq!(fixture.segments(kind, &[segment(0, 1, 0)]), wire::IO_ERROR);
        }
        assert_eq!(fixture.content(), before);
    });
}

#[test]
fn zeroes_and_discards_change_their_segments_only() {
    on_both(false, |mut fixture| {
        let mut expected = fixture.content();
        let zeroes = [segment(1, 2, 0), segment(7, 1, wire::UNMAP)];
        assert_eq!(fixture.segments(wire::WRITE_ZEROES, &zeroes), wire::OK);
        expected[512..1536].fill(0);
        expected[7 * 512..].fill(0);
        assert_eq!(fixture.content(), expected);
        assert_eq!(fixture.segments(wire::DISCARD, &[segment(0, 8, 0)]), wire::OK);
        assert_eq!(fixture.content().len(), expected.len());
    });
}

#[test]
fn segments_against_the_specification_change_nothing() {
    on_both(false, |mut fixture| {
        let before = fixture.content();
        let too_many = vec![segment(0, 1, 0); MAX_SEGMENTS as usize + 1];
        for kind in [wire::DISCARD, wire::WRITE_ZEROES] {
            for (segments, status) in [
                (vec![], wire::IO_ERROR),
                (vec![segment(0, 1, 0)[1..].to_vec()], wire::IO_ERROR),
                (too_many.clone(), wire::IO_ERROR),
                (vec![segment(0, 0, 0)], wire::IO_ERROR),
                (vec![segment(SECTORS, 1, 0)], wire::IO_ERROR),
                (vec![segment(u64::MAX, 2, 0)], wire::IO_ERROR),
                (vec![segment(0, MAX_SEGMENT_SECTORS + 1, 0)], wire::IO_ERROR),
                (vec![segment(0, u32::MAX, 0)], wire::IO_ERROR),
                (vec![segment(0, 1, 2)], wire::UNSUPPORTED),
                (vec![segment(0, 1, u32::MAX)], wire::UNSUPPORTED),
                // One bad segment spoils all: nothing is done by halves.
                (vec![segment(0, 1, 0), segment(SECTORS, 1, 0)], wire::IO_ERROR),
            ] {
                assert_eq!(fixture.segments(kind, &segments), status, "{kind} {segments:?}");
            }
        }
        assert_eq!(fixture.segments(wire::DISCARD, &[segment(0, 1, wire::UNMAP)]), wire::UNSUPPORTED);
        assert_eq!(fixture.content(), before);
    });
}

#[test]
fn get_id_yields_the_padded_id_and_other_types_are_unsupported() {
    let mut fixture = fixture(true);
    let (bytes, _) = fixture.request(&header(wire::GET_ID, 0), &[Part::Writable(20), Part::Writable(1)]);
    assert_eq!(bytes, b"layer-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    for kind in [2, 10, 14, u32::MAX] {
        let (bytes, _) = fixture.request(&header(kind, 0), &[Part::Writable(1)]);
        assert_eq!(bytes, [wire::UNSUPPORTED]);
    }
}

#[test]
fn request_without_header_or_status_fails_the_queue() {
    for parts in [
        vec![Part::Readable(&[0; 15]), Part::Writable(1)],
        vec![Part::Readable(&[0; 16])],
        vec![Part::Writable(17)],
    ] {
        let mut fixture = fixture(true);
        fixture.driver.add(&parts);
        let error = ring(&mut fixture.block, &mut fixture.queue, &fixture.memory).unwrap_err();
        assert!(matches!(error, QueueError::BadRequest { .. }), "{error}");
    }
}

#[test]
fn file_that_shrank_fails_reads_and_lives_on() {
    on_both(false, |mut fixture| {
        fixture.file.as_file().set_len(1024).unwrap();
        let read = |sector| header(wire::IN, sector);
        let (bytes, _) = fixture.request(&read(6), &[Part::Writable(512), Part::Writable(1)]);
        assert_eq!(bytes[512], wire::IO_ERROR);
        let (bytes, _) = fixture.request(&read(1), &[Part::Writable(512), Part::Writable(1)]);
        assert_eq!(bytes[512], wire::OK);
    });
}

#[test]
fn requests_under_way_are_bounded_whatever_is_published() {
    let mut fixture = fixture_in(DISK, false, None);
    let data = [3; 512];
    let head = fixture.driver.add(&[
        Part::Readable(&header(wire::OUT, 0)),
        Part::Readable(&data),
        Part::Writable(1),
    ]);
    // The same chain again and again, more often than the queue has entries.
    let mut most = 0;
    for _ in 0..20 {
        for _ in 0..QUEUE_SIZE / 2 {
            fixture.driver.publish(head);
        }
        fixture.running(|block, running| block.queues_ready(running));
        most = most.max(fixture.block.requests.count());
        // Room for the next half.
        while fixture.block.requests.count() > usize::from(QUEUE_SIZE / 2) {
            fixture.turn();
        }
    }
    assert!(most <= usize::from(QUEUE_SIZE));
    while !fixture.block.is_idle() {
        fixture.turn();
    }
}

#[test]
fn stop_with_requests_under_way_ends_idle_and_leaves_whole_sectors() {
    for _ in 0..8 {
        let mut fixture = fixture_in(DISK, false, None);
        let before = fixture.content();
        for sector in 0..SECTORS {
            let data = [200; 512];
            fixture.driver.add(&[
                Part::Readable(&header(wire::OUT, sector)),
                Part::Readable(&data),
                Part::Writable(1),
            ]);
        }
        fixture.running(|block, running| block.queues_ready(running));
        fixture.block.stop(&mut Watched::default());
        let mut watched = Watched::default();
        fixture.block.watch(&mut watched).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !fixture.block.is_idle() {
            assert!(Instant::now() < deadline, "it never became idle");
            thread::sleep(Duration::from_millis(1));
            let ready = Readiness { readable: true, writable: true };
            for fd in watched.fds.clone() {
                fixture.block.fd_ready_while_stopped(fd, ready, &mut Watched::default());
            }
        }
        // Each sector is the old or the new one, and stays what it is; nobody was told of any.
        let content = fixture.content();
        for (sector, (new, old)) in content.chunks(512).zip(before.chunks(512)).enumerate() {
            assert!(new == old || new == [200; 512], "sector {sector} is torn");
        }
        thread::sleep(Duration::from_millis(2));
        assert_eq!(fixture.content(), content);
        assert!(fixture.driver.take_used().is_none());
        // A new driver finds the device as on its first day.
        fixture.driver = Driver::new(&fixture.memory, 1, QUEUE_SIZE);
        fixture.queue = [fixture.driver.queue()];
        fixture.running(|block, running| block.start(running));
        assert_eq!(fixture.write(0, &[9; 512]), wire::OK);
        assert_eq!(fixture.content()[..512], [9; 512]);
    }
}

#[test]
fn limit_on_operations_holds_and_all_is_served() {
    let bucket = |per_second: u64, burst: u64| {
        Some(BucketConfig { per_second: per_second.try_into().unwrap(), burst: burst.try_into().ok() })
    };
    for limit in [
        LimitConfig { ops: bucket(1000, 5), bytes: None },
        LimitConfig { ops: None, bytes: bucket(512_000, 5 * 512) },
    ] {
        let mut fixture = fixture_in("/dev/shm", true, Some(limit));
        let started = Instant::now();
        for _ in 0..25 {
            fixture.driver.add(&[
                Part::Readable(&header(wire::IN, 0)),
                Part::Writable(512),
                Part::Writable(1),
            ]);
        }
        fixture.running(|block, running| block.queues_ready(running));
        for _ in 0..25 {
            fixture.take_used();
        }
        // Five at once, one on credit, and nineteen at one in a millisecond.
        let took = started.elapsed();
        assert!(took >= Duration::from_millis(19), "25 requests passed in {took:?}");
    }
}

/// A guest cannot have more written than it may by asking for zeros.
#[test]
fn limit_on_bytes_counts_zeros() {
    let bytes = BucketConfig { per_second: 512_000.try_into().unwrap(), burst: 512.try_into().ok() };
    let limit = LimitConfig { ops: None, bytes: Some(bytes) };
    let mut fixture = fixture_in("/dev/shm", false, Some(limit));
    let started = Instant::now();
    // Also where the space may be given up: not every file system can, and then they are written after all.
    for flags in [0, wire::UNMAP].repeat(5) {
        assert_eq!(fixture.segments(wire::WRITE_ZEROES, &[segment(0, 2, flags)]), wire::OK);
    }
    // Each has two sectors, of which one was in the bucket at the beginning: the others came at one in a millisecond.
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(15), "ten requests passed in {took:?}");
}

#[test]
fn large_request_in_memory_takes_several_turns() {
    const BYTES: u64 = 32 << 20;
    let mut fixture = fixture(false);
    fixture.file.as_file().set_len(BYTES).unwrap();
    let disk = Disk::open(fixture.file.path(), DiskOptions::default()).unwrap();
    let (block, work) = Block::new(disk, "large", None).unwrap();
    if work.is_some() {
        // There is no tmpfs here, and its thread does it.
        return;
    }
    fixture.block = block;
    // Header, data and status, in descriptors 0 to 2.
    let (head, data, status) = (2 << 20, 4 << 20, 3 << 20);
    let publish = |fixture: &mut Fixture, header: &[u8], bytes: u32| {
        fixture.memory.write_slice(header, GuestAddress(head)).unwrap();
        fixture.memory.write_obj(9_u8, GuestAddress(status)).unwrap();
        fixture.driver.descriptor(0, head, 16, NEXT, 1);
        fixture.driver.descriptor(1, data, bytes, NEXT, 2);
        fixture.driver.descriptor(2, status, 1, 2, 0);
        fixture.driver.publish(0);
    };
    let turns = |fixture: &mut Fixture| {
        let mut turns = 0;
        loop {
            turns += 1;
            let mut progress = Progress::Done;
            fixture.running(|block, running| block.queues_ready(running).inspect(|made| progress = *made));
            if progress == Progress::Done {
                assert_eq!(fixture.memory.read_obj::<u8>(GuestAddress(status)).unwrap(), wire::OK);
                assert!(fixture.driver.take_used().is_some());
                return turns;
            }
            assert!(fixture.driver.take_used().is_none());
        }
    };
    let sectors: Vec<u64> = (0..BYTES / SECTOR_BYTES).step_by(MAX_SEGMENT_SECTORS as usize).collect();
    let segments: Vec<u8> = sectors.iter().flat_map(|at| segment(*at, MAX_SEGMENT_SECTORS, 0)).collect();
    fixture.memory.write_slice(&segments, GuestAddress(data)).unwrap();
    publish(&mut fixture, &header(wire::WRITE_ZEROES, 0), segments.len() as u32);
    assert!(turns(&mut fixture) >= 8);
    assert_eq!(fixture.content(), vec![0; BYTES as usize]);

    let written = vec![7; 9 << 20];
    fixture.memory.write_slice(&written, GuestAddress(data)).unwrap();
    publish(&mut fixture, &header(wire::OUT, 3), written.len() as u32);
    assert!(turns(&mut fixture) >= 3);
    let content = fixture.content();
    assert!(content[3 * 512..].starts_with(&written) && content[3 * 512 + written.len()] == 0);
    // A driver that resets the device meanwhile hears nothing of it.
    publish(&mut fixture, &header(wire::OUT, 3), written.len() as u32);
    fixture.running(|block, running| block.queues_ready(running));
    fixture.block.stop(&mut Watched::default());
    assert!(fixture.block.is_idle());
    fixture.running(|block, running| block.start(running));
    assert!(fixture.driver.take_used().is_none());
}

#[test]
fn identity_tells_capacity_segments_and_block_sizes() {
    let config = fixture(false).block.identity().config;
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!((word(12), word(20)), (126, 512));
    // Eight blocks of 512 bytes make a physical one.
    assert_eq!((config[24], config[26], config[34]), (3, 8, 1));
    assert_eq!((word(36), word(40), word(44)), (MAX_SEGMENT_SECTORS, MAX_SEGMENTS, 1));
    assert_eq!((word(48), word(52), word(56)), (MAX_SEGMENT_SECTORS, MAX_SEGMENTS, 1));
    assert_eq!(config.len(), 60);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No header makes the device do anything but answer, and a read-only disk never changes.
    #[test]
    fn any_header_is_answered(kind in 0u32..16, sector: u64, data in 0usize..2048) {
        let mut fixture = fixture(true);
        let before = fixture.content();
        let (bytes, written) =
            fixture.request(&header(kind, sector), &[Part::Writable(data), Part::Writable(1)]);
        prop_assert!(bytes[data] <= wire::UNSUPPORTED);
        prop_assert!(written as usize <= data + 1);
        prop_assert_eq!(fixture.content(), before);
    }

    /// Any chain of any two descriptors is served or refused.
    #[test]
    fn any_chain_ends(first: (u64, u32), second: (u64, u32), flags in 0u16..4) {
        let mut fixture = fixture(false);
        fixture.driver.descriptor(0, first.0 % (17 << 20), first.1 % 4096, flags | NEXT, 1);
        fixture.driver.descriptor(1, second.0 % (17 << 20), second.1 % 4096, 2, 0);
        fixture.driver.publish(0);
        let _ = ring(&mut fixture.block, &mut fixture.queue, &fixture.memory);
    }

    /// A disk is an array of sectors: whatever is written, zeroed and read, in any order, on both kinds of files.
    #[test]
    fn disk_is_an_array_of_sectors(
        on_disk: bool,
        steps in prop::collection::vec((0u32..4, 0..SECTORS, 1u64..4, any::<u8>()), 1..16),
    ) {
        let mut fixture = if on_disk { fixture_in(DISK, false, None) } else { fixture(false) };
        let mut model = fixture.content();
        for (step, sector, sectors, byte) in steps {
            let sectors = sectors.min(SECTORS - sector);
            let range = (sector * 512) as usize..((sector + sectors) * 512) as usize;
            match step {
                0 => {
                    model[range.clone()].fill(byte);
                    prop_assert_eq!(fixture.write(sector, &model[range]), wire::OK);
                }
                1 => {
                    model[range].fill(0);
                    let flags = u32::from(byte % 2);
                    let zeroed = fixture.segments(wire::WRITE_ZEROES, &[segment(sector, sectors as u32, flags)]);
                    prop_assert_eq!(zeroed, wire::OK);
                }
                2 => {
                    let parts = [Part::Writable(range.len()), Part::Writable(1)];
                    let (bytes, _) = fixture.request(&header(wire::IN, sector), &parts);
                    prop_assert_eq!(bytes[range.len()], wire::OK);
                    prop_assert_eq!(&bytes[..range.len()], &model[range]);
                }
                _ => {
                    let (bytes, _) = fixture.request(&header(wire::FLUSH, 0), &[Part::Writable(1)]);
                    prop_assert_eq!(bytes, vec![wire::OK]);
                }
            }
        }
        prop_assert_eq!(fixture.content(), model);
    }
}
