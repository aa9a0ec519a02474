//! Guest buffers of file I/O that goes on while its device does something else: on another thread, or in the kernel.
//!
//! A [`VolatileSlice`] cannot leave the function that holds guest memory; these hold it themselves. Meanwhile the guest
//! may give a chunk back that a buffer is in. Nothing is moved then; and what was moved before that was seen is
//! discarded, so that buffers in memory that has gone cannot take more of the host's than the guest has.
#![allow(unsafe_code)]

use std::{
    io,
    marker::PhantomData,
    ops::Range,
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
    /// How many of them are moved.
    moved: usize,
    /// Keeps the buffers mapped.
    memory: Arc<GuestMemory>,
}

// SAFETY: the pointers lead into guest memory, which any thread may access at any time, and never as Rust references.
unsafe impl Send for Transfer {}

impl Transfer {
    /// Takes over `slices`; `None` if one of them is not of `memory`.
    pub fn new(memory: &Arc<GuestMemory>, slices: &[VolatileSlice]) -> Option<Self> {
        let mut buffers = Vec::with_capacity(slices.len());
        for slice in slices.iter().filter(|slice| !slice.is_empty()) {
            buffers.push(iovec_in(memory, slice)?);
        }
        Some(Self { buffers, moved: 0, memory: memory.clone() })
    }

    fn rest(&self) -> &[libc::iovec] {
        self.buffers.get(self.moved..).unwrap_or_default()
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.rest().iter().map(|buffer| buffer.iov_len).sum()
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.rest().is_empty()
    }

    /// Whether all buffers begin and end at multiples of `bytes`.
    pub fn is_aligned(&self, bytes: usize) -> bool {
        self.rest().iter().all(|buffer| {
            buffer.iov_base.addr().is_multiple_of(bytes) && buffer.iov_len.is_multiple_of(bytes)
        })
    }

    /// Drops the first `bytes` bytes, which have been moved.
    pub fn advance(&mut self, mut bytes: usize) {
        for buffer in self.buffers.iter_mut().skip(self.moved) {
            if buffer.iov_len > bytes {
                buffer.iov_base = buffer.iov_base.wrapping_byte_add(bytes);
                buffer.iov_len -= bytes;
                return;
            }
            bytes -= buffer.iov_len;
            self.moved += 1;
        }
    }

    /// Reads at most `most` bytes into the buffers from `fd` at `offset`, like `preadv2(2)`. At most 1024 buffers are
    /// filled.
    pub fn read_at(
        &mut self,
        fd: BorrowedFd,
        offset: u64,
        most: u64,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        self.call(offset, most, |buffers, count, offset| {
            // SAFETY: the iovecs lead into writable guest memory (`new`), which tolerates any change and stays mapped
            // as long as `self` lives.
            unsafe { libc::preadv2(fd.as_raw_fd(), buffers, count, offset, flags) }
        })
    }

    /// Writes at most `most` bytes of the buffers to `fd` at `offset`, like `pwritev2(2)`. At most 1024 buffers are
    /// taken.
    pub fn write_at(
        &mut self,
        fd: BorrowedFd,
        offset: u64,
        most: u64,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        self.call(offset, most, |buffers, count, offset| {
            // SAFETY: the iovecs lead into readable guest memory (`new`), which stays mapped as long as `self` lives.
            unsafe { libc::pwritev2(fd.as_raw_fd(), buffers, count, offset, flags) }
        })
    }

    /// Has the first buffers moved, of `most` bytes together, the last of them perhaps not whole.
    fn call(
        &mut self,
        offset: u64,
        most: u64,
        mut call: impl FnMut(*const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut room = usize::try_from(most).unwrap_or(usize::MAX);
        let (mut count, mut cut) = (0, 0);
        for buffer in self.rest().iter().take(MAX_BUFFERS) {
            if room == 0 {
                break;
            }
            count += 1;
            cut = buffer.iov_len.saturating_sub(room);
            room = room.saturating_sub(buffer.iov_len);
        }
        let buffers = self.buffers.get_mut(self.moved..self.moved + count).unwrap_or_default();
        if let Some(last) = buffers.last_mut() {
            last.iov_len -= cut;
        }
        let number = libc::c_int::try_from(count).unwrap_or(0);
        let moved = while_there(&self.memory, buffers, || call(buffers.as_ptr(), number, offset));
        if let Some(last) = buffers.last_mut() {
            last.iov_len += cut;
        }
        moved
    }
}

/// Moves bytes if all memory of the buffers is there; EFAULT if it is not, as for memory that is not mapped.
fn while_there(
    memory: &GuestMemory,
    buffers: &[libc::iovec],
    call: impl FnMut() -> libc::ssize_t,
) -> io::Result<usize> {
    if is_fixed(memory) {
        return repeat(call);
    }
    let are_there = || buffers.iter().all(|buffer| is_there(memory, buffer.iov_base.addr(), buffer.iov_len));
    if !are_there() {
        return Err(io::Error::from_raw_os_error(libc::EFAULT));
    }
    let moved = repeat(call);
    if !are_there() {
        // Whoever takes a chunk away says so first and discards it then: it is that one, or this.
        for buffer in buffers {
            discard_gone(memory, buffer.iov_base.addr(), buffer.iov_len);
        }
    }
    moved
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
    /// As the kernel takes them, so that a read needs no list of its own. Those of `held` lie in `memory`, each whole;
    /// before them are some that were dropped, and behind them may be the spare one of a [`Room`] that is no more.
    buffers: Vec<libc::iovec>,
    held: Range<usize>,
    /// Keeps the buffers mapped.
    memory: Arc<GuestMemory>,
}

// SAFETY: as for `Transfer`.
unsafe impl Send for Kept {}

impl Kept {
    /// Without buffers, for those of this guest.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        Self { buffers: Vec::new(), held: 0..0, memory }
    }

    /// Appends one; false, and nothing is kept, if it is not of this guest.
    pub fn push(&mut self, slice: &VolatileSlice) -> bool {
        let Some(buffer) = iovec_in(&self.memory, slice) else { return false };
        self.buffers.truncate(self.held.end);
        self.buffers.push(buffer);
        self.held.end += 1;
        true
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// All of them.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        slices(self.buffers.get(self.held.clone()).unwrap_or_default())
    }

    /// All of them with `spare` behind them, for one read.
    pub fn room<'a>(&'a mut self, spare: &'a mut [u8]) -> Room<'a> {
        self.buffers.truncate(self.held.end);
        self.buffers.push(libc::iovec { iov_base: spare.as_mut_ptr().cast(), iov_len: spare.len() });
        Room { buffers: self.buffers.get(self.held.start..).unwrap_or_default(), _spare: PhantomData }
    }

    /// Drops the first `count` of them, with what was moved into memory that has gone since it was kept.
    pub fn drop_front(&mut self, count: usize) {
        let dropped = self.held.start..self.held.end.min(self.held.start.saturating_add(count));
        self.held.start = dropped.end;
        if !is_fixed(&self.memory) {
            for buffer in self.buffers.get(dropped).unwrap_or_default() {
                discard_gone(&self.memory, buffer.iov_base.addr(), buffer.iov_len);
            }
        }
        // What moves up are no more than were dropped since the last time.
        if self.held.start >= self.held.len() {
            self.buffers.drain(..self.held.start);
            self.held = 0..self.held.len();
        }
    }
}

impl Drop for Kept {
    /// A read may have filled some that were never taken out: the frame was dropped, or the driver left meanwhile.
    fn drop(&mut self) {
        self.drop_front(self.len());
    }
}

/// Where a read goes: buffers that are kept, and a spare one.
#[derive(Debug)]
pub struct Room<'a> {
    /// Each lies in memory that is borrowed for `'a`, or is kept mapped by what is.
    buffers: &'a [libc::iovec],
    _spare: PhantomData<&'a mut [u8]>,
}

impl Room<'_> {
    /// The buffers, the spare one last.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        slices(self.buffers)
    }

    /// Reads from a stream or device, like `readv(2)`. At most 1024 buffers are filled.
    pub fn read(&self, fd: BorrowedFd) -> io::Result<usize> {
        let count = libc::c_int::try_from(self.buffers.len().min(MAX_BUFFERS)).unwrap_or(0);
        repeat(|| {
            // SAFETY: the iovecs lead into writable guest memory (`Kept::push`), which tolerates any change and stays
            // mapped, and into a buffer that nobody else has, all for as long as `self` lives.
            unsafe { libc::readv(fd.as_raw_fd(), self.buffers.as_ptr(), count) }
        })
    }
}

/// For the buffers of a [`Kept`] or a [`Room`], which keep what they lead to for as long as they are borrowed.
fn slices(buffers: &[libc::iovec]) -> impl Iterator<Item = VolatileSlice<'_>> {
    buffers.iter().map(|buffer| {
        // SAFETY: guest memory that stays mapped (`Kept::push`), or a spare buffer that is borrowed with its room.
        unsafe { VolatileSlice::new(buffer.iov_base.cast(), buffer.iov_len) }
    })
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
        assert_eq!(transfer.read_at(file.as_fd(), 0, u64::MAX, 0).unwrap(), 3);
        let mut seen = [0; 5];
        memory.read_slice(&mut seen, GuestAddress(200)).unwrap();
        assert_eq!(&seen, b"\x00012\x00");
        transfer.advance(3);
        assert!(transfer.is_empty());
    }

    #[test]
    fn transfer_moves_no_more_than_it_is_told() {
        let memory = memory();
        let slice = |address, bytes| memory.get_slice(GuestAddress(address), bytes).unwrap();
        memory.write_slice(b"0123456789", GuestAddress(0)).unwrap();
        let slices = [slice(0, 3), slice(3, 0), slice(3, 4), slice(7, 3)];
        for most in 1..=11 {
            let file = tempfile::tempfile().unwrap();
            let mut from = Transfer::new(&memory, &slices).unwrap();
            let mut into = Transfer::new(&memory, &[slice(100, 4), slice(104, 6)]).unwrap();
            memory.write_slice(&[0; 10], GuestAddress(100)).unwrap();
            for at in (0..10).step_by(most) {
                let piece = most.min(10 - at);
                assert_eq!(from.write_at(file.as_fd(), at as u64, most as u64, 0).unwrap(), piece);
                from.advance(piece);
                assert_eq!(from.len(), 10 - at - piece);
                assert_eq!(into.read_at(file.as_fd(), at as u64, most as u64, 0).unwrap(), piece);
                into.advance(piece);
            }
            assert!(from.is_empty() && into.is_empty());
            assert_eq!(&memory.read_obj::<[u8; 10]>(GuestAddress(100)).unwrap(), b"0123456789");
        }
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
        for (slice, byte) in kept.slices().zip([3u8, 2]) {
            slice.copy_from(&[byte; 4]);
        }
        let seen = [100, 300, 200].map(|address| memory.read_obj::<u32>(GuestAddress(address)).unwrap());
        assert_eq!(seen, [0, 0x0303_0303, 0x0202_0202]);
        kept.drop_front(9);
        assert_eq!(kept.slices().count(), 0);
    }

    #[test]
    fn room_is_filled_in_order_and_its_spare_buffer_is_not_kept() {
        let memory = memory();
        let mut kept = Kept::new(memory.clone());
        for address in (0..50).map(|index| index * 8) {
            assert!(kept.push(&memory.get_slice(GuestAddress(address), 4).unwrap()));
        }
        let mut spare = [0; 4];
        for left in (0..50).rev() {
            let (mut theirs, ours) = std::os::unix::net::UnixStream::pair().unwrap();
            let bytes: Vec<u8> = (0..left * 4 + 6).map(|index| index as u8 ^ left as u8).collect();
            theirs.write_all(&bytes).unwrap();
            kept.drop_front(1);
            let room = kept.room(&mut spare);
            assert_eq!(room.slices().count(), left + 1);
            assert_eq!(room.read(ours.as_fd()).unwrap(), left * 4 + 4);
            let mut seen = vec![0; left * 4];
            assert_eq!(kept.len(), left);
            for (slice, seen) in kept.slices().zip(seen.chunks_mut(4)) {
                slice.copy_to(seen);
            }
            assert_eq!([&seen, &spare[..]].concat(), bytes[..left * 4 + 4]);
        }
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
        let error = transfer.read_at(file.as_fd(), 0, u64::MAX, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        let error = transfer.write_at(file.as_fd(), 0, u64::MAX, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        region.set_present(0, false);
        byte.write(7);
        assert_eq!(resident(), before);

        let moved = transfer.call(0, u64::MAX, |buffers, count, offset| {
            // SAFETY: as in `read_at`.
            let moved = unsafe { libc::preadv2(file.as_raw_fd(), buffers, count, offset, 0) };
            (0..2).for_each(|chunk| region.set_present(chunk, false));
            moved
        });
        assert_eq!(moved.unwrap(), 9999);
        assert_eq!(resident(), before);

        // Whether they are taken out, or what keeps them goes.
        for taken_out in [1, 0] {
            let mut kept = Kept::new(memory.clone());
            assert!(kept.push(&slices[0]));
            (0..2).for_each(|chunk| region.set_present(chunk, false));
            kept.slices().for_each(|slice| slice.copy_from(&[1u8; 9999]));
            kept.drop_front(taken_out);
            drop(kept);
            assert_eq!(resident(), before);
        }
        assert_eq!(transfer.read_at(file.as_fd(), 0, u64::MAX, 0).unwrap(), 9999);
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
