//! One region of guest memory: there from the start, or plugged in chunk by chunk while the guest runs.
//!
//! Whoever looks for a buffer of the guest gets none in a chunk that is not there, so that a driver cannot use by a
//! device what its vCPUs cannot reach. The mapping itself stays: what is under way while a chunk is taken away ends in
//! memory that nobody sees any more, and is discarded (`transfer`).

use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionMmap,
    MemoryRegionAddress, VolatileSlice,
};

use crate::config::MEMORY_CHUNK_MIB;

/// Bytes of a chunk, and what its address is a multiple of. Linux adds memory in blocks of this size or of a multiple.
pub const CHUNK_BYTES: u64 = (MEMORY_CHUNK_MIB as u64) << 20;

/// See the module's documentation.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap<()>,
    /// Which chunks are there, if it has chunks.
    chunks: Option<Vec<AtomicBool>>,
    backing: Backing,
}

/// What is behind a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Memory of the host.
    Memory,
    /// A file.
    File {
        /// Whether the guest is kept from writing.
        read_only: bool,
    },
}

/// A part of a region that is there or not as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Where the guest finds it.
    pub start: GuestAddress,
    /// Its place in the region.
    pub offset: usize,
    /// Its size.
    pub bytes: usize,
    /// Whether it is there.
    pub present: bool,
}

impl Region {
    /// A region that is there for ever.
    pub fn fixed(mapping: GuestRegionMmap<()>) -> Self {
        Self { mapping, chunks: None, backing: Backing::Memory }
    }

    /// A region that is a file.
    pub fn file(mapping: GuestRegionMmap<()>, read_only: bool) -> Self {
        Self { mapping, chunks: None, backing: Backing::File { read_only } }
    }

    /// A region of whole chunks, none of which is there.
    pub fn pluggable(mapping: GuestRegionMmap<()>) -> Self {
        let chunks = mapping.len() / CHUNK_BYTES;
        let chunks = (0..chunks).map(|_| AtomicBool::new(false)).collect();
        Self { mapping, chunks: Some(chunks), backing: Backing::Memory }
    }

    /// Whether chunks of it come and go.
    pub fn is_pluggable(&self) -> bool {
        self.chunks.is_some()
    }

    /// What is behind it.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Whether neither the guest nor a device of it may write here.
    pub fn is_read_only(&self) -> bool {
        self.backing == Backing::File { read_only: true }
    }

    /// First byte of the mapping.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    /// Bytes of the mapping.
    pub fn size(&self) -> usize {
        self.mapping.size()
    }

    /// Makes a chunk be there, or not.
    pub fn set_present(&self, chunk: usize, present: bool) {
        if let Some(flag) = self.chunks.as_ref().and_then(|chunks| chunks.get(chunk)) {
            flag.store(present, Ordering::Release);
        }
    }

    /// Its parts, in order.
    pub fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        let whole = self.chunks.is_none().then(|| Part {
            start: self.start_addr(),
            offset: 0,
            bytes: self.size(),
            present: true,
        });
        let chunks = (0u64..).zip(self.chunks.iter().flatten()).map(|(chunk, present)| Part {
            // The whole region fits the address space (`GuestRegionMmap::new`).
            start: GuestAddress(self.start_addr().0 + chunk * CHUNK_BYTES),
            offset: (chunk * CHUNK_BYTES) as usize,
            bytes: CHUNK_BYTES as usize,
            present: present.load(Ordering::Acquire),
        });
        whole.into_iter().chain(chunks)
    }

    /// Bytes, whether they are there or not.
    pub fn raw_slice(&self, offset: usize, bytes: usize) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        self.mapping.get_slice(MemoryRegionAddress(offset as u64), bytes)
    }

    /// Gives back all memory of the chunks that have some of these bytes and are not there.
    pub(super) fn discard_gone(&self, offset: usize, bytes: usize) {
        if self.chunks.is_none() {
            return;
        }
        let end = offset.saturating_add(bytes);
        let touched = |part: &Part| part.offset < end && offset < part.offset.saturating_add(part.bytes);
        for part in self.parts().filter(|part| !part.present && touched(part)) {
            if let Ok(slice) = self.raw_slice(part.offset, part.bytes) {
                super::discard(&slice);
            }
        }
    }

    /// Whether all of these bytes are there.
    pub(super) fn is_there(&self, offset: u64, bytes: usize) -> bool {
        let Some(chunks) = &self.chunks else { return true };
        let Some(last) = offset.checked_add((bytes as u64).saturating_sub(1)) else { return false };
        let range = (offset / CHUNK_BYTES) as usize..=(last / CHUNK_BYTES) as usize;
        chunks.get(range).is_some_and(|chunks| chunks.iter().all(|chunk| chunk.load(Ordering::Acquire)))
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> u64 {
        self.mapping.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn bitmap(&self) {}

    fn get_host_address(&self, address: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        self.mapping.get_host_address(address)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        bytes: usize,
    ) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        if !self.is_there(offset.0, bytes) {
            return Err(GuestMemoryError::HostAddressNotAvailable);
        }
        self.mapping.get_slice(offset, bytes)
    }
}

impl GuestMemoryRegionBytes for Region {}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use crate::guest_memory::{self, CHUNK_BYTES};

    use super::*;

    #[test]
    fn file_is_read_in_place_and_written_only_where_it_may_be() {
        use std::{io::Write, os::fd::AsFd};
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let start = GuestAddress(4 << 30);
        let seen = |read_only: bool| {
            let region = guest_memory::map_file(start, file.as_fd(), 5000, 2 << 20, read_only).unwrap();
            let memory = guest_memory::map(&[(GuestAddress(0), 4 << 20)]).unwrap();
            let memory = guest_memory::with_region(&memory, region).unwrap();
            let bytes = [0, 4999, 5000, (2 << 20) - 1]
                .map(|offset| memory.read_obj::<u8>(GuestAddress(start.0 + offset)).unwrap());
            assert_eq!(bytes, [7, 7, 0, 0], "the file, then zeros");
            let to_write = guest_memory::buffer(&memory, start, 1, true);
            if let Some(slice) = &to_write {
                slice.write_obj(9u8, 0).unwrap();
            }
            assert!(guest_memory::buffer(&memory, start, 4096, false).is_some());
            assert_eq!(guest_memory::size_bytes(&memory), 4 << 20);
            assert_eq!(guest_memory::resident_bytes(&memory), 0);
            to_write.is_some()
        };
        let first = || {
            let mut byte = [0];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 0).unwrap();
            byte[0]
        };
        assert_eq!((seen(true), first()), (false, 7));
        assert_eq!((seen(false), first()), (true, 9));
    }

    #[test]
    fn buffers_are_found_in_chunks_that_are_there_only() {
        let high = 4u64 << 30;
        let region = guest_memory::map_pluggable(GuestAddress(high), 3 * CHUNK_BYTES).unwrap();
        let memory = guest_memory::map(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let memory = memory.insert_region(region.clone()).unwrap();
        let found = |offset: u64, bytes| memory.get_slice(GuestAddress(high + offset), bytes).is_ok();
        assert!(!found(0, 1) && !found(0, 0) && memory.write_obj(1u8, GuestAddress(high)).is_err());
        region.set_present(1, true);
        assert!(found(CHUNK_BYTES, CHUNK_BYTES as usize) && found(2 * CHUNK_BYTES - 1, 1));
        assert!(!found(CHUNK_BYTES - 1, 2) && !found(2 * CHUNK_BYTES - 1, 2) && !found(0, usize::MAX));
        region.set_present(2, true);
        assert!(found(2 * CHUNK_BYTES - 1, 2) && !found(CHUNK_BYTES, 3 * CHUNK_BYTES as usize));
        let parts: Vec<_> = memory.iter().flat_map(Region::parts).map(|part| part.present).collect();
        assert_eq!(parts, [true, false, true, true]);
        region.set_present(1, false);
        assert!(!found(CHUNK_BYTES, 1) && found(2 * CHUNK_BYTES, 1));
    }
}
