//! Guest buffers of file I/O that goes on while its device does something else: on another thread, or in the kernel.
//!
//! A [`VolatileSlice`] cannot leave the function that holds guest memory; these hold it themselves.
#![allow(unsafe_code)]

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
    sync::Arc,
};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

use super::{GuestMemory, MAX_BUFFERS};

/// Buffers of one guest, one after the other.
#[derive(Debug)]
pub struct Transfer {
    /// Each lies in `memory`, whole.
    buffers: Vec<libc::iovec>,
    /// Keeps the buffers mapped.
    _memory: Arc<GuestMemory>,
}

// SAFETY: the pointers lead into guest memory, which any thread may access at any time, and never as Rust references.
unsafe impl Send for Transfer {}

impl Transfer {
    /// Takes over `slices`; `None` if one of them is not of `memory`.
    pub fn new(memory: &Arc<GuestMemory>, slices: &[VolatileSlice]) -> Option<Self> {
        let mut buffers = Vec::with_capacity(slices.len());
        for slice in slices {
            buffers.push(iovec_in(memory, slice)?);
        }
        Some(Self { buffers, _memory: memory.clone() })
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.iov_len).sum()
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    /// Whether all buffers begin and end at multiples of `bytes`.
    pub fn is_aligned(&self, bytes: usize) -> bool {
        self.buffers.iter().all(|buffer| {
            buffer.iov_base.addr().is_multiple_of(bytes) && buffer.iov_len.is_multiple_of(bytes)
        })
    }

    /// Drops the first `bytes` bytes, which have been moved.
    pub fn advance(&mut self, mut bytes: usize) {
        self.buffers.retain_mut(|buffer| {
            let moved = bytes.min(buffer.iov_len);
            bytes -= moved;
            buffer.iov_base = buffer.iov_base.wrapping_byte_add(moved);
            buffer.iov_len -= moved;
            buffer.iov_len > 0
        });
    }

    /// Reads into the buffers from `fd` at `offset`, like `preadv2(2)`. At most 1024 buffers are filled.
    pub fn read_at(&mut self, fd: BorrowedFd, offset: u64, flags: libc::c_int) -> io::Result<usize> {
        let (buffers, count, offset) = self.arguments(offset)?;
        repeat(|| {
            // SAFETY: the iovecs lead into writable guest memory (`new`), which tolerates any change and stays mapped
            // as long as `self` lives.
            unsafe { libc::preadv2(fd.as_raw_fd(), buffers, count, offset, flags) }
        })
    }

    /// Writes the buffers to `fd` at `offset`, like `pwritev2(2)`. At most 1024 buffers are taken.
    pub fn write_at(&mut self, fd: BorrowedFd, offset: u64, flags: libc::c_int) -> io::Result<usize> {
        let (buffers, count, offset) = self.arguments(offset)?;
        repeat(|| {
            // SAFETY: the iovecs lead into readable guest memory (`new`), which stays mapped as long as `self` lives.
            unsafe { libc::pwritev2(fd.as_raw_fd(), buffers, count, offset, flags) }
        })
    }

    fn arguments(&self, offset: u64) -> io::Result<(*const libc::iovec, libc::c_int, libc::off_t)> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let count = libc::c_int::try_from(self.buffers.len().min(MAX_BUFFERS)).unwrap_or(0);
        Ok((self.buffers.as_ptr(), count, offset))
    }
}

fn repeat(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        if let Ok(moved) = usize::try_from(call()) {
            return Ok(moved);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Buffers of one guest that a device keeps until it has use for them; first in, first out.
#[derive(Debug)]
pub struct Kept {
    /// Each lies in `memory`, whole.
    buffers: VecDeque<libc::iovec>,
    /// Keeps the buffers mapped.
    memory: Arc<GuestMemory>,
}

// SAFETY: as for `Transfer`.
unsafe impl Send for Kept {}

impl Kept {
    /// Without buffers, for those of this guest.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self { buffers: VecDeque::new(), memory }
    }

    /// Appends one; false, and nothing is kept, if it is not of this guest.
    pub fn push(&mut self, slice: &VolatileSlice) -> bool {
        let buffer = iovec_in(&self.memory, slice);
        self.buffers.extend(buffer);
        buffer.is_some()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    /// The first `count` of them.
    pub fn slices(&self, count: usize) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.buffers.iter().take(count).map(|buffer| {
            // SAFETY: it lies in guest memory (`push`), which is mapped for as long as `self` is borrowed.
            unsafe { VolatileSlice::new(buffer.iov_base.cast(), buffer.iov_len) }
        })
    }

    /// Drops the first `count` of them.
    pub fn drop_front(&mut self, count: usize) {
        self.buffers.drain(..count.min(self.buffers.len()));
    }
}

/// One byte of a guest, to be written later.
#[derive(Debug)]
pub struct GuestByte {
    at: *mut u8,
    _memory: Arc<GuestMemory>,
}

// SAFETY: as for `Transfer`.
unsafe impl Send for GuestByte {}

impl GuestByte {
    /// The first byte of `slices`; `None` if there is none, or none of `memory`.
    pub fn new(memory: &Arc<GuestMemory>, slices: &[VolatileSlice]) -> Option<Self> {
        let first = slices.iter().find(|slice| !slice.is_empty())?;
        Some(Self { at: iovec_in(memory, first)?.iov_base.cast(), _memory: memory.clone() })
    }

    /// Writes it.
    pub fn write(&self, value: u8) {
        // SAFETY: it lies in writable guest memory (`new`), which stays mapped as long as `self` lives; a volatile
        // write makes no claim on what else happens there.
        unsafe { ptr::write_volatile(self.at, value) }
    }
}

/// A slice as the kernel takes it, if it lies in one of the regions of `memory`.
fn iovec_in(memory: &GuestMemory, slice: &VolatileSlice) -> Option<libc::iovec> {
    let guard = slice.ptr_guard_mut();
    let (start, bytes) = (guard.as_ptr(), guard.len());
    let inside = memory.iter().any(|region| {
        let region_start = region.as_ptr().addr();
        let offset = start.addr().checked_sub(region_start);
        let left = offset.and_then(|offset| usize::try_from(region.len()).ok()?.checked_sub(offset));
        left.is_some_and(|left| bytes <= left)
    });
    inside.then_some(libc::iovec { iov_base: start.cast(), iov_len: bytes })
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd};

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::guest_memory;

    fn memory() -> Arc<GuestMemory> {
        Arc::new(guest_memory::map(&[(GuestAddress(0), 2 << 20)]).unwrap())
    }

    #[test]
    fn transfer_that_is_advanced_goes_on_behind_what_was_moved() {
        let memory = memory();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let slices = [
            memory.get_slice(GuestAddress(100), 3).unwrap(),
            memory.get_slice(GuestAddress(200), 4).unwrap(),
        ];
        let mut transfer = Transfer::new(&memory, &slices).unwrap();
        assert_eq!(transfer.len(), 7);
        transfer.advance(4);
        assert_eq!(transfer.read_at(file.as_fd(), 0, 0).unwrap(), 3);
        let mut seen = [0; 5];
        memory.read_slice(&mut seen, GuestAddress(200)).unwrap();
        assert_eq!(&seen, b"\x00012\x00");
        transfer.advance(3);
        assert!(transfer.is_empty());
    }

    #[test]
    fn transfer_knows_alignment_of_addresses_and_lengths() {
        let memory = memory();
        let aligned = |address, bytes| {
            let slice = [memory.get_slice(GuestAddress(address), bytes).unwrap()];
            Transfer::new(&memory, &slice).unwrap().is_aligned(512)
        };
        assert!(aligned(512, 1024) && !aligned(513, 512) && !aligned(512, 513));
    }

    #[test]
    fn kept_buffers_come_out_in_order_and_are_the_guests() {
        let memory = memory();
        let mut kept = Kept::new(memory.clone());
        for address in [100, 300, 200] {
            assert!(kept.push(&memory.get_slice(GuestAddress(address), 4).unwrap()));
        }
        kept.drop_front(1);
        assert_eq!(kept.len(), 2);
        for (slice, byte) in kept.slices(5).zip([3u8, 2]) {
            slice.copy_from(&[byte; 4]);
        }
        let seen = [100, 300, 200].map(|address| memory.read_obj::<u32>(GuestAddress(address)).unwrap());
        assert_eq!(seen, [0, 0x0303_0303, 0x0202_0202]);
        kept.drop_front(9);
        assert_eq!(kept.slices(1).count(), 0);
    }

    #[test]
    fn buffers_of_other_memory_are_refused() {
        let (memory, other) = (memory(), memory());
        let slice = [other.get_slice(GuestAddress(0), 1).unwrap()];
        assert!(Transfer::new(&memory, &slice).is_none());
        assert!(!Kept::new(memory.clone()).push(&slice[0]));
        assert!(GuestByte::new(&memory, &slice).is_none());
        assert!(GuestByte::new(&memory, &[]).is_none());
        GuestByte::new(&other, &slice).unwrap().write(7);
        assert_eq!(other.read_obj::<u8>(GuestAddress(0)).unwrap(), 7);
    }
}
