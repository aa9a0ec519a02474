//! The guest's memory: its mapping into this process, and vectored file I/O straight into and out of it.
//!
//! Nobody ever holds a Rust reference into guest memory: the guest changes it at any time. Everything goes through
//! vm-memory's volatile slices, or, here, through raw pointers handed to the kernel.
#![allow(unsafe_code)]

mod region;
pub mod transfer;

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
    sync::Arc,
};

use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap, MmapRegion,
    VolatileSlice,
};

pub use self::region::{Backing, CHUNK_BYTES, Part, Region};

/// All memory regions of a guest. Cloning shares the mapping.
pub type GuestMemory = GuestRegionCollection<Region>;

/// Size of the pages that the host is asked to use. A mapping is aligned to it, because KVM can map a huge page only
/// if guest physical and host virtual address agree below it.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Buffers that one vectored read or write takes at most (`IOV_MAX`).
const MAX_BUFFERS: usize = 1024;

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The host refused the mapping.
    #[error("mapping {bytes} bytes of guest memory failed; give the guest less memory")]
    Map {
        /// Size of the region.
        bytes: u64,
        /// `mmap`'s error.
        #[source]
        source: io::Error,
    },
    /// The regions overlap or wrap around: a defect of the memory layout.
    #[error("guest memory at {start:#x} with {bytes} bytes does not fit the address space")]
    Layout {
        /// Guest physical address.
        start: u64,
        /// Size of the region.
        bytes: u64,
    },
}

/// Maps zeroed, private memory for each `(start, bytes)` and asks the host to back it with huge pages. Pages are taken
/// from the host when they are first touched. The mapping lives as long as the process.
pub fn map(regions: &[(GuestAddress, u64)]) -> Result<GuestMemory, MapError> {
    let mut mapped = Vec::with_capacity(regions.len());
    for (start, bytes) in regions {
        mapped.push(Region::fixed(map_region(*start, *bytes)?));
    }
    GuestMemory::from_regions(mapped).map_err(|_| {
        let (start, bytes) = regions.first().copied().unwrap_or_default();
        MapError::Layout { start: start.0, bytes }
    })
}

/// As [`map`], for memory that is plugged in chunk by chunk: whole chunks of [`CHUNK_BYTES`], none of them there yet.
pub fn map_pluggable(start: GuestAddress, bytes: u64) -> Result<Arc<Region>, MapError> {
    Ok(Arc::new(Region::pluggable(map_region(start, bytes)?)))
}

/// `memory` with one more region.
pub fn with_region(memory: &GuestMemory, region: Arc<Region>) -> Result<GuestMemory, MapError> {
    let (start, bytes) = (region.start_addr().0, region.len());
    memory.insert_region(region).map_err(|_| MapError::Layout { start, bytes })
}

/// Maps a file of `bytes` for the guest, in a region of `region_bytes` at `start`, of which what is beyond the file reads
/// as zeros. What is written to a file that may be written is in the file.
pub fn map_file(
    start: GuestAddress,
    file: BorrowedFd,
    bytes: u64,
    region_bytes: u64,
    read_only: bool,
) -> Result<Arc<Region>, MapError> {
    let layout = || MapError::Layout { start: start.0, bytes };
    let region = map_region(start, region_bytes)?;
    if bytes > region_bytes {
        return Err(layout());
    }
    // Nobody writes to a read-only file's mapping (`buffer`, KVM). If somebody did, it would be a private page of this
    // process, and neither the file nor a fault.
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_FIXED | if read_only { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
    let size = usize::try_from(bytes).map_err(|_| layout())?;
    // SAFETY: [start, start + size) lies in the mapping that `map_region` has just made, which nobody knows yet.
    let mapped = unsafe { libc::mmap(region.as_ptr().cast(), size, prot, flags, file.as_raw_fd(), 0) };
    if mapped == libc::MAP_FAILED {
        return Err(MapError::Map { bytes, source: io::Error::last_os_error() });
    }
    Ok(Arc::new(Region::file(region, read_only)))
}

/// A buffer of the guest that a device reads or, if `write`, writes; `None` if it is not, or not all, in memory where
/// that is allowed.
pub fn buffer(
    memory: &GuestMemory,
    address: GuestAddress,
    bytes: usize,
    write: bool,
) -> Option<VolatileSlice<'_>> {
    Finder::new(memory).buffer(address, bytes, write)
}

/// Finds one buffer of a guest after the other. They mostly lie in the same region.
#[derive(Debug)]
pub struct Finder<'m> {
    memory: &'m GuestMemory,
    last: Option<&'m Region>,
}

impl<'m> Finder<'m> {
    /// For this memory.
    pub fn new(memory: &'m GuestMemory) -> Self {
        Self { memory, last: None }
    }

    /// As [`buffer`].
    pub fn buffer(&mut self, address: GuestAddress, bytes: usize, write: bool) -> Option<VolatileSlice<'m>> {
        let known = self.last.and_then(|region| Some((region, region.to_region_addr(address)?)));
        let (region, offset) = match known {
            Some(known) => known,
            None => self.memory.to_region_addr(address)?,
        };
        self.last = Some(region);
        if write && region.is_read_only() {
            return None;
        }
        region.get_slice(offset, bytes).ok()
    }
}

/// Whether all of this memory is there for ever.
pub fn is_fixed(memory: &GuestMemory) -> bool {
    memory.iter().all(|region| !region.is_pluggable())
}

fn map_region(start: GuestAddress, bytes: u64) -> Result<GuestRegionMmap<()>, MapError> {
    let layout = || MapError::Layout { start: start.0, bytes };
    let size = usize::try_from(bytes).map_err(|_| layout())?;
    let region = map_aligned(size).map_err(|source| MapError::Map { bytes, source })?;
    GuestRegionMmap::new(region, start).ok_or_else(layout)
}

fn map_aligned(size: usize) -> io::Result<MmapRegion> {
    let reserved =
        size.checked_add(HUGE_PAGE_BYTES).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
    let base = unsafe { libc::mmap(ptr::null_mut(), reserved, prot, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let lead = base.align_offset(HUGE_PAGE_BYTES);
    // SAFETY: `lead` is below HUGE_PAGE_BYTES, hence inside the mapping of `reserved` bytes.
    let start = unsafe { base.byte_add(lead) };
    // The rest on either side is address space only, but it would let neighbours grow into each other.
    if lead > 0 {
        // SAFETY: [base, base + lead) is the unused head of the mapping made above.
        unsafe { libc::munmap(base, lead) };
    }
    let tail = HUGE_PAGE_BYTES - lead;
    if tail > 0 {
        // SAFETY: start + size = base + lead + size, and `tail` more bytes end at base + reserved.
        let end = unsafe { start.byte_add(size) };
        // SAFETY: [end, end + tail) is the unused tail of the mapping made above; `size` is page-aligned.
        unsafe { libc::munmap(end, tail) };
    }
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP] {
        // A host without transparent huge pages refuses the advice, and the guest is slower but right.
        // SAFETY: [start, start + size) is ours; neither advice changes its content.
        unsafe { libc::madvise(start, size, advice) };
    }
    // SAFETY: the mapping has `size` bytes with this protection, and nothing unmaps it before the process ends.
    unsafe { MmapRegion::build_raw(start.cast(), size, prot, flags) }.map_err(io::Error::other)
}

/// Reads from a stream into `buffers`, like `readv(2)`. At most 1024 buffers are filled.
pub fn read(fd: BorrowedFd, buffers: &[VolatileSlice]) -> io::Result<usize> {
    with_iovecs(buffers, |iovecs, count| {
        // SAFETY: the iovecs describe live, writable guest memory (`with_iovecs`), which tolerates any change.
        unsafe { libc::readv(fd.as_raw_fd(), iovecs, count) }
    })
}

/// Writes `buffers` to a stream or device, like `writev(2)`. At most 1024 buffers are taken.
pub fn write(fd: BorrowedFd, buffers: &[VolatileSlice]) -> io::Result<usize> {
    with_iovecs(buffers, |iovecs, count| {
        // SAFETY: the iovecs describe live, readable guest memory (`with_iovecs`).
        unsafe { libc::writev(fd.as_raw_fd(), iovecs, count) }
    })
}

/// Sends `buffers` to a connected socket without raising SIGPIPE. At most 1024 buffers are taken.
pub fn send(fd: BorrowedFd, buffers: &[VolatileSlice]) -> io::Result<usize> {
    with_iovecs(buffers, |iovecs, count| {
        // SAFETY: an all-zero msghdr is a valid one without address, buffers and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.cast_mut();
        message.msg_iovlen = usize::try_from(count).unwrap_or(0);
        // SAFETY: the iovecs describe live, readable guest memory (`with_iovecs`); the rest of `message` is empty.
        unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
    })
}

/// Gives the whole pages inside `slice` back to the host. They are then as they were at first: zeros, or what the file
/// has of which they are a private copy. Those of a file that is mapped to be written to (`pmems`) stay as they are.
pub fn discard(slice: &VolatileSlice) {
    const PAGE_BYTES: usize = 4096;
    let guard = slice.ptr_guard_mut();
    let lead = guard.as_ptr().align_offset(PAGE_BYTES);
    let bytes = guard.len().saturating_sub(lead) / PAGE_BYTES * PAGE_BYTES;
    if bytes > 0 {
        // SAFETY: `lead` is below the slice's length, as `bytes` is more than 0.
        let start = unsafe { guard.as_ptr().byte_add(lead) };
        // SAFETY: [start, start + bytes) is inside the slice, that is in guest memory, which tolerates any change and
        // stays mapped: privately, or shared with a file, whose own content this leaves alone.
        unsafe { libc::madvise(start.cast(), bytes, libc::MADV_DONTNEED) };
    }
}

/// Bytes of guest memory that is there from the start, files left out.
pub fn size_bytes(memory: &GuestMemory) -> u64 {
    let fixed = memory.iter().filter(|region| !region.is_pluggable() && region.backing() == Backing::Memory);
    fixed.map(|region| region.size() as u64).sum()
}

/// Bytes of guest memory that take memory of the host, files left out: their pages are the host's page cache.
pub fn resident_bytes(memory: &GuestMemory) -> u64 {
    const PAGE_BYTES: usize = 4096;
    /// 256 MiB at a time.
    const PAGES_AT_ONCE: usize = 64 * 1024;
    let mut present = vec![0u8; PAGES_AT_ONCE];
    let mut pages = 0u64;
    let regions = memory.iter().filter(|region| region.backing() == Backing::Memory);
    let present_parts = regions.flat_map(|region| {
        region.parts().filter(|part| part.present).map(|part| (region.as_ptr(), part.offset, part.bytes))
    });
    for (start, first, size) in present_parts {
        for offset in (first..first + size).step_by(PAGES_AT_ONCE * PAGE_BYTES) {
            let bytes = (first + size - offset).min(PAGES_AT_ONCE * PAGE_BYTES);
            // SAFETY: `offset` is below the end of the part, and that is inside the region's mapping.
            let address = unsafe { start.byte_add(offset) };
            // SAFETY: [address, address + bytes) is inside the region, which stays mapped until the process ends, and
            // `present` has a byte for each of its pages.
            let result = unsafe { libc::mincore(address.cast(), bytes, present.as_mut_ptr()) };
            if result == 0 {
                let seen = present.iter().take(bytes.div_ceil(PAGE_BYTES));
                pages += seen.filter(|page| **page & 1 != 0).count() as u64;
            }
        }
    }
    pages * PAGE_BYTES as u64
}

/// Receives one message of a socket, without waiting. How many bytes it had: if that is more than `buffers` hold, the
/// rest is lost.
pub fn receive(fd: BorrowedFd, buffers: &[VolatileSlice]) -> io::Result<usize> {
    with_iovecs(buffers, |iovecs, count| {
        // SAFETY: an all-zero msghdr is a valid one without address, buffers and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.cast_mut();
        message.msg_iovlen = usize::try_from(count).unwrap_or(0);
        // SAFETY: the iovecs describe live, writable guest memory (`with_iovecs`); the rest of `message` is empty.
        unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT | libc::MSG_TRUNC) }
    })
}

/// Where in the guest's memory these slices of it are. One that is not of it is left out.
pub fn places(memory: &GuestMemory, slices: &[VolatileSlice]) -> Vec<(GuestAddress, usize)> {
    let place = |slice: &VolatileSlice| {
        let at = slice.ptr_guard().as_ptr().addr();
        memory.iter().find_map(|region| {
            let offset = at.checked_sub(region.as_ptr().addr())?;
            let address = region.start_addr().0.checked_add(offset as u64)?;
            (offset < region.size()).then_some((GuestAddress(address), slice.len()))
        })
    };
    slices.iter().filter_map(place).collect()
}

fn with_iovecs(
    buffers: &[VolatileSlice],
    call: impl Fn(*const libc::iovec, libc::c_int) -> libc::ssize_t,
) -> io::Result<usize> {
    // A slice's pointer is valid as long as its mapping, which outlives `buffers`; a guard only matters under Xen.
    let iovecs: Vec<libc::iovec> = buffers
        .iter()
        .take(MAX_BUFFERS)
        .map(|slice| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() })
        .collect();
    let count = libc::c_int::try_from(iovecs.len()).unwrap_or(0);
    loop {
        let done = call(iovecs.as_ptr(), count);
        if let Ok(done) = usize::try_from(done) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn map_of_two_regions_is_zeroed_and_huge_page_aligned() {
        let high = GuestAddress(4 << 30);
        let memory = map(&[(GuestAddress(0), 4 << 20), (high, 2 << 20)]).unwrap();
        for region in [GuestAddress(0), high] {
            assert_eq!(memory.get_host_address(region).unwrap().align_offset(HUGE_PAGE_BYTES), 0);
        }
        assert_eq!(memory.read_obj::<u64>(GuestAddress((4 << 30) + (2 << 20) - 8)).unwrap(), 0);
        assert!(memory.get_slice(GuestAddress((4 << 20) - 1), 2).is_err());
    }

    #[test]
    fn resident_bytes_of_touched_pages_are_theirs() {
        let memory = map(&[(GuestAddress(0), 300 << 20), (GuestAddress(4 << 30), 4 << 20)]).unwrap();
        assert_eq!(resident_bytes(&memory), 0);
        memory.write_obj(1u8, GuestAddress(299 << 20)).unwrap();
        memory.write_obj(1u8, GuestAddress(4 << 30)).unwrap();
        let resident = resident_bytes(&memory);
        // Two small pages or two huge ones, as the host likes.
        assert!((8192..=4 << 20).contains(&resident), "{resident}");
    }

    #[test]
    fn map_of_absurd_size_fails() {
        assert!(matches!(map(&[(GuestAddress(0), 1 << 62)]), Err(MapError::Map { .. })));
    }
}
