//! Guest buffers of file I/O that goes on while its device does something else: on another thread, or in the kernel.
//!
//! A [`VolatileSlice`] cannot leave the function that holds guest memory; these hold it themselves. Meanwhile the guest
//! may give a chunk back that a buffer is in. Nothing is moved then; and what was moved before that was seen is
//! discarded, so that buffers in memory that has gone cannot take more of the host's than the guest has.
#![allow(unsafe_code)]

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
    sync::Arc,
};

use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::{GuestMemory, MAX_BUFFERS, Region, is_fixed};

/// Buffers of one guest, one after the other.
#[derive(Debug)]
pub struct Transfer {
    /// Each lies in `memory`, whole.
    buffers: Vec<libc::iovec>,
    /// Keeps the buffers mapped.
    memory: Arc<GuestMemory>,
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
        Some(Self { buffers, memory: memory.clone() })
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
        self.while_there(|| {
            // SAFETY: the iovecs lead into writable guest memory (`new`), which tolerates any change and stays mapped
            // as long as `self` lives.
            unsafe { libc::preadv2(fd.as_raw_fd(), buffers, count, offset, flags) }
        })
    }

    /// As [`Transfer::read_at`], but no more than `most` bytes.
    pub fn read_at_most(
        &mut self,
        fd: BorrowedFd,
        offset: u64,
        most: u64,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        let mut most = usize::try_from(most).unwrap_or(usize::MAX);
        if self.len() <= most {
            return self.read_at(fd, offset, flags);
        }
        let mut buffers = Vec::new();
        for buffer in &self.buffers {
            let iov_len = buffer.iov_len.min(most);
            if iov_len == 0 {
                break;
            }
            most -= iov_len;
            buffers.push(libc::iovec { iov_base: buffer.iov_base, iov_len });
        }
        Self { buffers, memory: self.memory.clone() }.read_at(fd, offset, flags)
    }

    /// Writes the buffers to `fd` at `offset`, like `pwritev2(2)`. At most 1024 buffers are taken.
    pub fn write_at(&mut self, fd: BorrowedFd, offset: u64, flags: libc::c_int) -> io::Result<usize> {
        let (buffers, count, offset) = self.arguments(offset)?;
        self.while_there(|| {
            // SAFETY: the iovecs lead into readable guest memory (`new`), which stays mapped as long as `self` lives.
            unsafe { libc::pwritev2(fd.as_raw_fd(), buffers, count, offset, flags) }
        })
    }

    /// Moves bytes if all memory of the buffers is there; EFAULT if it is not, as for memory that is not mapped.
    fn while_there(&self, call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
        if is_fixed(&self.memory) {
            return repeat(call);
        }
        let are_there = || {
            self.buffers.iter().all(|buffer| is_there(&self.memory, buffer.iov_base.addr(), buffer.iov_len))
        };
        if !are_there() {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        let moved = repeat(call);
        if !are_there() {
            // Whoever takes a chunk away says so first and discards it then: it is that one, or this.
            for buffer in &self.buffers {
                discard_gone(&self.memory, buffer.iov_base.addr(), buffer.iov_len);
            }
        }
        moved
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

    /// Drops the first `count` of them, with what was moved into memory that has gone since it was kept.
    pub fn drop_front(&mut self, count: usize) {
        let dropped = self.buffers.drain(..count.min(self.buffers.len()));
        if is_fixed(&self.memory) {
            return;
        }
        for buffer in dropped {
            discard_gone(&self.memory, buffer.iov_base.addr(), buffer.iov_len);
        }
    }
}

/// One byte of a guest, to be written later.
#[derive(Debug)]
pub struct GuestByte {
    at: *mut u8,
    memory: Arc<GuestMemory>,
}

// SAFETY: as for `Transfer`.
unsafe impl Send for GuestByte {}

impl GuestByte {
    /// The first byte of `slices`; `None` if there is none, or none of `memory`.
    pub fn new(memory: &Arc<GuestMemory>, slices: &[VolatileSlice]) -> Option<Self> {
        let first = slices.iter().find(|slice| !slice.is_empty())?;
        Some(Self { at: iovec_in(memory, first)?.iov_base.cast(), memory: memory.clone() })
    }

    /// Writes it, if its memory is there.
    pub fn write(&self, value: u8) {
        if !is_there(&self.memory, self.at.addr(), 1) {
            return;
        }
        // SAFETY: it lies in writable guest memory (`new`), which stays mapped as long as `self` lives; a volatile
        // write makes no claim on what else happens there.
        unsafe { ptr::write_volatile(self.at, value) }
        discard_gone(&self.memory, self.at.addr(), 1);
    }
}

/// A slice as the kernel takes it, if it lies in one of the regions of `memory`.
fn iovec_in(memory: &GuestMemory, slice: &VolatileSlice) -> Option<libc::iovec> {
    let guard = slice.ptr_guard_mut();
    let (start, bytes) = (guard.as_ptr(), guard.len());
    region_of(memory, start.addr(), bytes)?;
    Some(libc::iovec { iov_base: start.cast(), iov_len: bytes })
}

/// The region that these bytes of this process are in, and where in it.
fn region_of(memory: &GuestMemory, address: usize, bytes: usize) -> Option<(&Region, usize)> {
    memory.iter().find_map(|region| {
        let offset = address.checked_sub(region.as_ptr().addr())?;
        (bytes <= region.size().checked_sub(offset)?).then_some((region, offset))
    })
}

fn is_there(memory: &GuestMemory, address: usize, bytes: usize) -> bool {
    region_of(memory, address, bytes).is_some_and(|(region, offset)| region.is_there(offset as u64, bytes))
}

fn discard_gone(memory: &GuestMemory, address: usize, bytes: usize) {
    if let Some((region, offset)) = region_of(memory, address, bytes) {
        region.discard_gone(offset, bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::fd::AsFd};

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::guest_memory::{self, CHUNK_BYTES};

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
    fn memory_that_went_away_is_not_filled_and_what_was_under_way_is_discarded() {
        let region = guest_memory::map_pluggable(GuestAddress(4 << 30), 2 * CHUNK_BYTES).unwrap();
        let memory = Arc::new(guest_memory::with_region(&memory(), region.clone()).unwrap());
        let resident = || {
            (0..2).for_each(|chunk| region.set_present(chunk, true));
            guest_memory::resident_bytes(&memory)
        };
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        let before = resident();
        // Over the border of two chunks, and not of whole pages.
        let slices = [memory.get_slice(GuestAddress((4 << 30) + CHUNK_BYTES - 5000), 9999).unwrap()];
        let mut transfer = Transfer::new(&memory, &slices).unwrap();
        let byte = GuestByte::new(&memory, &slices).unwrap();

        region.set_present(1, false);
        let error = transfer.read_at(file.as_fd(), 0, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        let error = transfer.write_at(file.as_fd(), 0, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        region.set_present(0, false);
        byte.write(7);
        assert_eq!(resident(), before);

        let (buffers, count, offset) = transfer.arguments(0).unwrap();
        let moved = transfer.while_there(|| {
            // SAFETY: as in `read_at`.
            let moved = unsafe { libc::preadv2(file.as_raw_fd(), buffers, count, offset, 0) };
            (0..2).for_each(|chunk| region.set_present(chunk, false));
            moved
        });
        assert_eq!(moved.unwrap(), 9999);
        assert_eq!(resident(), before);

        let mut kept = Kept::new(memory.clone());
        assert!(kept.push(&slices[0]));
        (0..2).for_each(|chunk| region.set_present(chunk, false));
        kept.slices(1).for_each(|slice| slice.copy_from(&[1u8; 9999]));
        kept.drop_front(1);
        assert_eq!(resident(), before);
        assert_eq!(transfer.read_at(file.as_fd(), 0, 0).unwrap(), 9999);
        byte.write(9);
        assert!(resident() > before);
        assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress((4 << 30) + CHUNK_BYTES - 5000)).unwrap(), [9, 7]);
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
