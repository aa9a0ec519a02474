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
