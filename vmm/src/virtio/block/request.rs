//! Requests as they lie in a chain (virtio 1.2 §5.2.6), and the operations that they stand for.

use std::{io, sync::Arc};

use crate::{
    backends::disk::{Disk, Extent, Operation, SECTOR_BYTES},
    guest_memory::{
        GuestMemory,
        transfer::{GuestByte, Transfer},
    },
    virtio::queue::{Buffers, Chain, QueueError},
};

/// Request types and status values.
pub mod wire {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const OK: u8 = 0;
    pub const IO_ERROR: u8 = 1;
    pub const UNSUPPORTED: u8 = 2;
    /// Flag of a segment: the space may be given back.
    pub const UNMAP: u32 = 1;
}

/// Bytes of a segment of DISCARD and WRITE_ZEROES.
const SEGMENT_BYTES: usize = 16;
/// Segments that one such request may have.
pub const MAX_SEGMENTS: u32 = 16;
/// Sectors of one segment: 4 MiB. A file system that has no zeros to give has them written, in memory some in each turn
/// of the event loop; what is given up is so at once.
pub const MAX_SEGMENT_SECTORS: u32 = 4 << 11;

/// A request, checked for everything that does not depend on the disk.
pub struct Request<'m> {
    /// One of [`wire`], or anything else.
    pub kind: u32,
    sector: u64,
    /// What is written to the disk.
    source: Buffers<'m>,
    /// Where what was read goes.
    target: Buffers<'m>,
    /// One byte for the result.
    status: Buffers<'m>,
}

/// What a request comes to.
pub enum Meaning {
    /// Its status is known already, and how many bytes of data the device has written for it.
    Answer {
        /// The status.
        status: u8,
        /// Bytes of data.
        written: usize,
    },
    /// The disk decides.
    Operation(Operation),
}

impl Meaning {
    fn status(status: u8) -> Self {
        Self::Answer { status, written: 0 }
    }
}

impl<'m> Request<'m> {
    /// §5.2.6: a 16-byte header, data, and a status byte that is the last of the writable bytes. §2.7.4: the division
    /// into descriptors carries no meaning.
    pub fn parse(mut chain: Chain<'m>) -> Result<Self, QueueError> {
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

    /// Bytes of data that are written for it if it is carried out.
    pub fn read_bytes(&self) -> usize {
        if self.kind == wire::IN { self.target.len() } else { 0 }
    }

    /// The status byte, to be written later.
    pub fn status_byte(&self, memory: &Arc<GuestMemory>) -> Option<GuestByte> {
        GuestByte::new(memory, self.status.slices())
    }

    /// Writes the status byte.
    pub fn answer(&mut self, status: u8) {
        self.status.write(&[status]);
    }

    /// What is to be done. `durable`: its driver knows of no flushes, so that what it writes must last by itself.
    pub fn meaning(&mut self, disk: &Disk, id: &[u8], memory: &Arc<GuestMemory>, durable: bool) -> Meaning {
        let operation =
            match self.kind {
                wire::GET_ID if self.target.write(id) => {
                    return Meaning::Answer { status: wire::OK, written: id.len() };
                }
                wire::GET_ID => Err(wire::IO_ERROR),
                wire::FLUSH => Ok(Operation::Flush),
                wire::IN => self
                    .transfer(disk, &self.target, memory)
                    .map(|(offset, into)| Operation::Read { offset, into }),
                // §5.2.6.2: with an I/O error, and nothing is written.
                wire::OUT | wire::DISCARD | wire::WRITE_ZEROES if disk.read_only() => Err(wire::IO_ERROR),
                wire::OUT => self
                    .transfer(disk, &self.source, memory)
                    .map(|(offset, from)| Operation::Write { offset, from, durable }),
                wire::DISCARD => self.extents(disk, 0).map(Operation::Discard),
                wire::WRITE_ZEROES => {
                    self.extents(disk, wire::UNMAP).map(|extents| Operation::WriteZeroes { extents, durable })
                }
                _ => Err(wire::UNSUPPORTED),
            };
        operation.map_or_else(Meaning::status, Meaning::Operation)
    }

    fn transfer(
        &self,
        disk: &Disk,
        buffers: &Buffers,
        memory: &Arc<GuestMemory>,
    ) -> Result<(u64, Transfer), u8> {
        let bytes = buffers.len() as u64;
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(wire::IO_ERROR);
        }
        let offset = position(disk, self.sector, bytes / SECTOR_BYTES).ok_or(wire::IO_ERROR)?;
        Ok((offset, Transfer::new(memory, buffers.slices()).ok_or(wire::IO_ERROR)?))
    }

    /// The segments of DISCARD and WRITE_ZEROES, of which `flags` are known (§5.2.6.2).
    fn extents(&mut self, disk: &Disk, flags: u32) -> Result<Vec<Extent>, u8> {
        let bytes = self.source.len();
        if bytes == 0 || !bytes.is_multiple_of(SEGMENT_BYTES) || bytes / SEGMENT_BYTES > MAX_SEGMENTS as usize
        {
            return Err(wire::IO_ERROR);
        }
        let mut extents = Vec::with_capacity(bytes / SEGMENT_BYTES);
        while let Some(segment) = self.source.read::<SEGMENT_BYTES>() {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flag @ ..] = segment;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flag = u32::from_le_bytes(flag);
            // §5.2.6.2: unknown flags, and UNMAP where it has no meaning, are unsupported.
            if flag & !flags != 0 {
                return Err(wire::UNSUPPORTED);
            }
            if sectors == 0 || sectors > MAX_SEGMENT_SECTORS {
                return Err(wire::IO_ERROR);
            }
            let offset = position(disk, sector, sectors.into()).ok_or(wire::IO_ERROR)?;
            let may_unmap = flag & wire::UNMAP != 0;
            extents.push(Extent { offset, bytes: u64::from(sectors) * SECTOR_BYTES, may_unmap });
        }
        Ok(extents)
    }
}

/// Where `sectors` from `sector` on lie in bytes, if they are within the disk (§5.2.6.1).
fn position(disk: &Disk, sector: u64, sectors: u64) -> Option<u64> {
    let end = sector.checked_add(sectors)?;
    if end > disk.sectors() { None } else { sector.checked_mul(SECTOR_BYTES) }
}

/// The status that tells how an operation ended.
pub fn status_of(result: &io::Result<()>) -> u8 {
    match result {
        Ok(()) => wire::OK,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => wire::UNSUPPORTED,
        Err(_) => wire::IO_ERROR,
    }
}
