//! The block device (virtio 1.2 §5.2): one request queue, served in order on the event loop.
//!
//! Requests are parsed into [`Request`] values before anything is done, so that another executor (io_uring, a worker
//! thread) can take the place of the call in [`Block::execute`].

use std::io;

use super::{
    device::{Device, Identity, Progress, Running, device_type},
    queue::{Buffers, Chain, QueueError},
};
use crate::{
    backends::disk::{Disk, SECTOR_BYTES},
    config::MAX_DISK_ID_BYTES,
};

const QUEUE_SIZE: u16 = 128;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];

/// Feature bits (§5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const FLUSH: u64 = 1 << 9;
}

/// Request types and status values (§5.2.6).
mod wire {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const OK: u8 = 0;
    pub const IO_ERROR: u8 = 1;
    pub const UNSUPPORTED: u8 = 2;
}

/// The device.
pub struct Block {
    disk: Disk,
    id: [u8; MAX_DISK_ID_BYTES],
}

/// A request, checked for everything that does not depend on the disk.
struct Request<'m> {
    kind: u32,
    sector: u64,
    /// What is written to the disk.
    source: Buffers<'m>,
    /// Where what was read goes.
    target: Buffers<'m>,
    /// One byte for the result.
    status: Buffers<'m>,
}

impl<'m> Request<'m> {
    /// §5.2.6: a 16-byte header, data, and a status byte that is the last of the writable bytes. §2.7.4: the division
    /// into descriptors carries no meaning.
    fn parse(mut chain: Chain<'m>) -> Result<Self, QueueError> {
        let head = chain.head;
        let bad = |problem| QueueError::BadRequest { head, problem };
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = chain
            .readable
            .read::<16>()
            .ok_or_else(|| bad("its header is shorter than 16 bytes (virtio 1.2 §5.2.6)"))?;
        let target = chain
            .writable
            .len()
            .checked_sub(1)
            .and_then(|bytes| chain.writable.take(bytes))
            .ok_or_else(|| bad("it has no room for a status byte (virtio 1.2 §5.2.6)"))?;
        Ok(Self {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            sector: u64::from_le_bytes(sector),
            source: chain.readable,
            target,
            status: chain.writable,
        })
    }
}

impl Block {
    /// A device for this disk, which its driver knows by `id` (shortened to [`MAX_DISK_ID_BYTES`] bytes).
    pub fn new(disk: Disk, id: &str) -> Self {
        let mut padded = [0; MAX_DISK_ID_BYTES];
        for (to, from) in padded.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self { disk, id: padded }
    }

    /// Carries out a request; returns its status and how many bytes were written to `target`.
    fn execute(&self, request: &mut Request) -> (u8, usize) {
        let wanted = request.target.len();
        let done = match request.kind {
            wire::IN => self
                .position(request.sector, wanted)
                .and_then(|offset| self.disk.read(request.target.slices(), offset))
                .map(|()| wanted),
            wire::OUT if self.disk.read_only() => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
            wire::OUT => self
                .position(request.sector, request.source.len())
                .and_then(|offset| self.disk.write(request.source.slices(), offset))
                .map(|()| 0),
            wire::FLUSH => self.disk.flush().map(|()| 0),
            wire::GET_ID if request.target.write(&self.id) => Ok(self.id.len()),
            wire::GET_ID => Err(io::ErrorKind::InvalidInput.into()),
            _ => return (wire::UNSUPPORTED, 0),
        };
        done.map_or((wire::IO_ERROR, 0), |written| (wire::OK, written))
    }

    /// Where `bytes` from `sector` on lie, if they are whole sectors within the disk (§5.2.6.1).
    fn position(&self, sector: u64, bytes: usize) -> io::Result<u64> {
        let bytes = bytes as u64;
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let end = sector.checked_add(bytes / SECTOR_BYTES).ok_or_else(outside)?;
        if bytes.is_multiple_of(SECTOR_BYTES) && end <= self.disk.sectors() {
            sector.checked_mul(SECTOR_BYTES).ok_or_else(outside)
        } else {
            Err(outside())
        }
    }
}

impl Device for Block {
    fn identity(&self) -> Identity {
        let read_only = if self.disk.read_only() { feature::RO } else { 0 };
        // §5.2.4: capacity in sectors, size_max (unused), seg_max: a request also needs header and status.
        let mut config = self.disk.sectors().to_le_bytes().to_vec();
        config.extend(0u32.to_le_bytes());
        config.extend(u32::from(QUEUE_SIZE - 2).to_le_bytes());
        Identity {
            device_type: device_type::BLOCK,
            features: feature::SEG_MAX | feature::FLUSH | read_only,
            queue_sizes: QUEUE_SIZES,
            optional_queues: 0,
            config,
        }
    }

    fn queues_ready(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let memory = running.memory;
        let Some(queue) = running.queue(0) else { return Ok(Progress::Done) };
        let mut budget = QUEUE_SIZE;
        loop {
            queue.disable_doorbell(memory)?;
            while let Some(chain) = queue.pop(memory)? {
                let head = chain.head;
                let mut request = Request::parse(chain)?;
                let (status, written) = self.execute(&mut request);
                request.status.write(&[status]);
                // §2.7.8.2 counts bytes from the front, so the status byte only counts if all before it was written.
                let written = if status == wire::OK { written + 1 } else { 0 };
                queue.push_used(memory, head, written as u32)?;
                budget -= 1;
                if budget == 0 {
                    return Ok(Progress::More);
                }
            }
            if !queue.enable_doorbell(memory)? {
                return Ok(Progress::Done);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        guest_memory::GuestMemory,
        virtio::driver_model::{Driver, NEXT, Part, memory, ring},
    };

    const SECTORS: u64 = 8;

    struct Fixture {
        memory: GuestMemory,
        driver: Driver,
        queue: [crate::virtio::queue::VirtQueue; 1],
        block: Block,
        file: tempfile::NamedTempFile,
    }

    fn fixture(read_only: bool) -> Fixture {
        let memory = memory();
        let driver = Driver::new(&memory, 0, QUEUE_SIZE);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..SECTORS * SECTOR_BYTES).map(|index| (index / 7) as u8).collect();
        file.write_all(&content).unwrap();
        let block = Block::new(Disk::open(file.path(), read_only).unwrap(), "layer-0");
        Fixture { queue: [driver.queue()], memory, driver, block, file }
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        bytes
    }

    impl Fixture {
        /// Carries out one request; returns what follows its header, and the used length.
        fn request(&mut self, header: &[u8], parts: &[Part]) -> (Vec<u8>, u32) {
            let mut all = vec![Part::Readable(header)];
            all.extend(parts.iter().map(|part| match part {
                Part::Readable(bytes) => Part::Readable(bytes),
                Part::Writable(bytes) => Part::Writable(*bytes),
            }));
            self.driver.add(&all);
            ring(&mut self.block, &mut self.queue, &self.memory).unwrap();
            let (_, bytes, written) = self.driver.take_used().unwrap();
            (bytes[header.len()..].to_vec(), written)
        }

        fn content(&mut self) -> Vec<u8> {
            let mut content = Vec::new();
            self.file.rewind().unwrap();
            self.file.read_to_end(&mut content).unwrap();
            content
        }
    }

    #[test]
    fn read_of_sectors_yields_the_files_bytes() {
        let mut fixture = fixture(true);
        let (bytes, written) = fixture
            .request(&header(wire::IN, 2), &[Part::Writable(512), Part::Writable(1024), Part::Writable(1)]);
        assert_eq!(bytes[..1536], fixture.content()[1024..2560]);
        assert_eq!((bytes[1536], written), (wire::OK, 1537));
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
        let mut fixture = fixture(false);
        let data = [7; 512];
        let (bytes, written) =
            fixture.request(&header(wire::OUT, SECTORS - 1), &[Part::Readable(&data), Part::Writable(1)]);
        assert_eq!((bytes[512], written), (wire::OK, 1));
        let (bytes, _) = fixture.request(&header(wire::FLUSH, 0), &[Part::Writable(1)]);
        assert_eq!(bytes, [wire::OK]);
        assert_eq!(fixture.content()[7 * 512..], data);
        assert_eq!(fixture.content().len() as u64, SECTORS * SECTOR_BYTES);
    }

    #[test]
    fn request_beyond_the_disk_or_not_of_whole_sectors_fails() {
        let mut fixture = fixture(false);
        for (sector, bytes) in
            [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 1024), (0, 511)]
        {
            let (result, _) =
                fixture.request(&header(wire::IN, sector), &[Part::Writable(bytes), Part::Writable(1)]);
            assert_eq!(result[bytes], wire::IO_ERROR, "{sector} {bytes}");
            let data = vec![1; bytes];
            let (result, _) =
                fixture.request(&header(wire::OUT, sector), &[Part::Readable(&data), Part::Writable(1)]);
            assert_eq!(result[bytes], wire::IO_ERROR, "{sector} {bytes}");
        }
        assert_eq!(fixture.content().len() as u64, SECTORS * SECTOR_BYTES);
    }

    #[test]
    fn write_to_read_only_disk_fails() {
        let mut fixture = fixture(true);
        assert_eq!(fixture.block.identity().features & feature::RO, feature::RO);
        let before = fixture.content();
        let (bytes, _) =
            fixture.request(&header(wire::OUT, 0), &[Part::Readable(&[1; 512]), Part::Writable(1)]);
        assert_eq!(bytes[512], wire::IO_ERROR);
        assert_eq!(fixture.content(), before);
    }

    #[test]
    fn get_id_yields_the_padded_id_and_other_types_are_unsupported() {
        let mut fixture = fixture(true);
        let (bytes, _) = fixture.request(&header(wire::GET_ID, 0), &[Part::Writable(20), Part::Writable(1)]);
        assert_eq!(bytes, b"layer-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        let (bytes, _) = fixture.request(&header(11, 0), &[Part::Writable(1)]);
        assert_eq!(bytes, [wire::UNSUPPORTED]);
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
    fn identity_tells_capacity_and_segments() {
        let config = fixture(false).block.identity().config;
        assert_eq!(config[..8], SECTORS.to_le_bytes());
        assert_eq!(config[12..16], 126u32.to_le_bytes());
    }

    proptest! {
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
    }
}
