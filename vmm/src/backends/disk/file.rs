//! The file behind a disk, or the files that follow each other on it: opening them, their sizes, and carrying out
//! operations on them.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::fd::{AsFd, BorrowedFd},
    os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fs::{AtFlags, FallocateFlags, StatxFlags, fallocate, fstatfs, ioctl_blkpbszget, ioctl_blksszget, statx},
    io::Errno,
};

use super::operation::{Extent, Operation};
use crate::guest_memory::transfer::Transfer;

/// Bytes of a sector, the unit of a disk's size and of positions on it.
pub const SECTOR_BYTES: u64 = 512;
/// Largest block size that this VMM shows to a guest: Linux's drivers take no more than a page.
const MAX_BLOCK_BYTES: u32 = 4096;
/// Blocks of file systems, and of all but old disks.
const USUAL_BLOCK_BYTES: u32 = 4096;
/// What is written to the page cache at a time. Before it copies a page, Linux looks at all memory that a write still
/// has to take, if the file could have large pages (`generic_perform_write`): 1 MiB at once takes a third longer.
const CACHED_WRITE_BYTES: u64 = 64 * 1024;
/// Bytes that are moved at once on the event loop, where others wait meanwhile. A guest can ask for gigabytes.
const TURN_BYTES: u64 = 4 << 20;
/// What is written at a time where a file system cannot make zeros by itself.
const ZEROS: &[u8] = &[0; 64 * 1024];

/// How a disk is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// Nothing writes to it.
    pub read_only: bool,
    /// Past the host's page cache.
    pub direct: bool,
    /// Flushes are answered and not carried out.
    pub never_flush: bool,
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    /// With O_DIRECT, if that was asked for.
    file: File,
    /// The same file through the page cache, for what O_DIRECT does not take, and what that does not take.
    unaligned: Option<(File, Alignment)>,
    /// Files that follow, each with the position on the disk where it starts. Then nothing writes, nor past the cache.
    more: Vec<(u64, File)>,
    sectors: u64,
    block_bytes: u32,
    physical_block_bytes: u32,
    options: DiskOptions,
    /// A file in memory: no operation waits for a device.
    in_memory: bool,
    /// Whether the file system can tell that a read would wait.
    can_try: AtomicBool,
}

/// The rest of one of a disk's files.
struct Part<'a> {
    file: BorrowedFd<'a>,
    offset: u64,
    bytes: u64,
}

/// What O_DIRECT demands.
#[derive(Debug, Clone, Copy)]
struct Alignment {
    memory: usize,
    offset: u64,
}

/// Why a disk cannot be opened. The caller adds its path.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// `open` or finding the size failed.
    #[error("opening it {} failed", if *read_only { "for reading" } else { "for reading and writing" })]
    Open {
        /// How it was to be opened.
        read_only: bool,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file system has no O_DIRECT.
    #[error("its file system does not take `direct` (O_DIRECT); leave it out")]
    Direct(#[source] io::Error),
    /// A directory, a pipe, …
    #[error("it is neither a regular file nor a block device")]
    Kind,
    /// Only what is read can be in several files.
    #[error("a disk of several files must be `read_only`, and not `direct`")]
    Several,
    /// What follows would not start at a sector.
    #[error("it is one of a disk's files, and its {bytes} bytes are no multiple of {SECTOR_BYTES}")]
    Ragged {
        /// Its size.
        bytes: u64,
    },
    /// No block at all.
    #[error("it has {bytes} bytes, and a disk has at least {block}")]
    Empty {
        /// Its size.
        bytes: u64,
        /// One block.
        block: u64,
    },
}

impl Disk {
    /// Opens a disk. A last, partial block is not part of it.
    pub fn open(path: &Path, options: DiskOptions) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Open { read_only: options.read_only, source };
        // Without O_NONBLOCK, opening a pipe would wait for a writer.
        let open = |flags| {
            OpenOptions::new()
                .read(true)
                .write(!options.read_only)
                .custom_flags(libc::O_NONBLOCK | flags)
                .open(path)
        };
        let mut file = open(0).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind);
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let mut block_bytes = SECTOR_BYTES as u32;
        let mut physical_block_bytes = USUAL_BLOCK_BYTES;
        if kind.is_block_device() {
            block_bytes = ioctl_blksszget(&file).map_err(|error| failed(error.into()))?;
            physical_block_bytes = ioctl_blkpbszget(&file).map_err(|error| failed(error.into()))?;
        }
        let mut unaligned = None;
        if options.direct {
            let alignment = alignment(file.as_fd(), block_bytes);
            let direct = open(libc::O_DIRECT).map_err(DiskError::Direct)?;
            unaligned = Some((std::mem::replace(&mut file, direct), alignment));
            block_bytes = block_bytes.max(u32::try_from(alignment.offset).unwrap_or(MAX_BLOCK_BYTES));
        }
        block_bytes = block_bytes.clamp(SECTOR_BYTES as u32, MAX_BLOCK_BYTES);
        let block = u64::from(block_bytes);
        let sectors = bytes / block * (block / SECTOR_BYTES);
        if sectors == 0 {
            return Err(DiskError::Empty { bytes, block });
        }
        // Who asks for O_DIRECT there gets what others get elsewhere.
        let in_memory = kind.is_file() && !options.direct && is_in_memory(file.as_fd());
        Ok(Self {
            file,
            unaligned,
            more: Vec::new(),
            sectors,
            block_bytes,
            physical_block_bytes: physical_block_bytes.max(block_bytes),
            options,
            in_memory,
            can_try: AtomicBool::new(!options.direct),
        })
    }

    /// Puts another file behind what the disk has.
    pub fn append(&mut self, path: &Path) -> Result<(), DiskError> {
        if !self.options.read_only || self.options.direct {
            return Err(DiskError::Several);
        }
        let next = Self::open(path, self.options)?;
        let start = self.sectors.saturating_mul(SECTOR_BYTES);
        let failed = |source| DiskError::Open { read_only: true, source };
        let last = self.more.last().map_or((0, &self.file), |(start, file)| (*start, file));
        for (file, bytes) in
            [(last.1, start.saturating_sub(last.0)), (&next.file, next.sectors * SECTOR_BYTES)]
        {
            let whole = (&*file).seek(SeekFrom::End(0)).map_err(failed)?;
            if whole != bytes {
                return Err(DiskError::Ragged { bytes: whole });
            }
        }
        self.sectors = self.sectors.saturating_add(next.sectors);
        self.block_bytes = self.block_bytes.max(next.block_bytes);
        self.physical_block_bytes = self.physical_block_bytes.max(next.physical_block_bytes);
        self.in_memory &= next.in_memory;
        self.more.push((start, next.file));
        Ok(())
    }

    /// The first file, for its mapping.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Size in sectors; at least 1.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The smallest unit that the disk reads and writes without effort: 512 to 4096, a power of two.
    pub fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// The smallest unit that it writes without reading; at least [`Disk::block_bytes`].
    pub fn physical_block_bytes(&self) -> u32 {
        self.physical_block_bytes
    }

    /// Whether writing fails.
    pub fn read_only(&self) -> bool {
        self.options.read_only
    }

    /// Whether every operation can be tried at once, so that no thread is needed.
    pub fn never_waits(&self) -> bool {
        self.in_memory
    }

    /// Carries out an operation if that needs no waiting and is done soon. `None` leaves the rest of it to
    /// [`Disk::perform`], or, for a disk that never waits, to another call.
    pub fn try_now(&self, operation: &mut Operation) -> Option<io::Result<()>> {
        if self.in_memory {
            return self.perform_some(operation).transpose();
        }
        match operation {
            Operation::Flush if self.flushes_are_free() => Some(Ok(())),
            Operation::Read { into, .. } if into.len() as u64 > TURN_BYTES => None,
            Operation::Read { offset, into } if self.can_try.load(Ordering::Relaxed) => loop {
                let part = self.part_at(*offset);
                match into.read_at(part.file, part.offset, part.bytes, libc::RWF_NOWAIT) {
                    Ok(moved) => {
                        into.advance(moved);
                        *offset = offset.saturating_add(moved as u64);
                        if into.is_empty() {
                            return Some(Ok(()));
                        }
                        if (moved as u64) < part.bytes {
                            return None;
                        }
                    }
                    Err(error) => {
                        if error.raw_os_error() != Some(libc::EAGAIN) {
                            // Not every file system can, and what else is wrong the next read tells again.
                            self.can_try.store(false, Ordering::Relaxed);
                        }
                        return None;
                    }
                }
            },
            _ => None,
        }
    }

    /// Carries out as much of an operation as one turn of the event loop has time for; something if that was all.
    fn perform_some(&self, operation: &mut Operation) -> io::Result<Option<()>> {
        match operation {
            Operation::Read { offset, into } if into.len() as u64 > TURN_BYTES => {
                let part = self.part_at(*offset);
                let moved = into.read_at(part.file, part.offset, part.bytes.min(TURN_BYTES), 0)?;
                pass(into, offset, moved)
            }
            Operation::Write { offset, from, .. } if from.len() as u64 > TURN_BYTES => {
                let moved = from.write_at(self.file.as_fd(), *offset, TURN_BYTES, 0)?;
                pass(from, offset, moved)
            }
            Operation::WriteZeroes { extents, durable } => {
                let mut left = TURN_BYTES;
                while let Some(extent) = extents.last_mut() {
                    if left == 0 {
                        return Ok(None);
                    }
                    let piece = Extent { bytes: extent.bytes.min(left), ..*extent };
                    self.zero(&piece)?;
                    left = left.saturating_sub(piece.bytes);
                    extent.offset = extent.offset.saturating_add(piece.bytes);
                    extent.bytes = extent.bytes.saturating_sub(piece.bytes);
                    if extent.bytes == 0 {
                        extents.pop();
                    }
                }
                if *durable { self.flush().map(Some) } else { Ok(Some(())) }
            }
            _ => self.perform(operation).map(Some),
        }
    }

    /// Carries out an operation, however long it takes.
    pub fn perform(&self, operation: &mut Operation) -> io::Result<()> {
        match operation {
            Operation::Read { offset, into } if self.more.is_empty() => {
                let fd = self.file_for(into, *offset);
                complete(into, *offset, |rest, at| rest.read_at(fd, at, u64::MAX, 0))
            }
            Operation::Read { offset, into } => complete(into, *offset, |rest, at| {
                let part = self.part_at(at);
                rest.read_at(part.file, part.offset, part.bytes, 0)
            }),
            Operation::Write { offset, from, durable } => {
                let fd = self.file_for(from, *offset);
                let sync = *durable && !self.options.never_flush;
                let flags = if sync { libc::RWF_DSYNC } else { 0 };
                // What goes to a device itself goes in as few requests as can be.
                let most = if sync || self.options.direct { u64::MAX } else { CACHED_WRITE_BYTES };
                complete(from, *offset, |rest, at| rest.write_at(fd, at, most, flags))
            }
            Operation::Flush => self.flush(),
            Operation::Discard(extents) => extents.iter().try_for_each(|extent| {
                self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, extent)
            }),
            Operation::WriteZeroes { extents, durable } => {
                extents.iter().try_for_each(|extent| self.zero(extent))?;
                if *durable { self.flush() } else { Ok(()) }
            }
        }
    }

    /// The file that has this position of the disk, and what of it is from there on.
    fn part_at(&self, offset: u64) -> Part<'_> {
        let after = self.more.partition_point(|(start, _)| *start <= offset);
        let (start, file) = match after.checked_sub(1).and_then(|index| self.more.get(index)) {
            Some((start, file)) => (*start, file),
            None => (0, &self.file),
        };
        let end = self.more.get(after).map_or(u64::MAX, |(start, _)| *start);
        Part { file: file.as_fd(), offset: offset - start, bytes: end - offset }
    }

    fn flushes_are_free(&self) -> bool {
        self.options.read_only || self.options.never_flush
    }

    fn flush(&self) -> io::Result<()> {
        if self.flushes_are_free() { Ok(()) } else { self.file.sync_data() }
    }

    fn fallocate(&self, how: FallocateFlags, extent: &Extent) -> io::Result<()> {
        loop {
            match fallocate(&self.file, how, extent.offset, extent.bytes) {
                Err(Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    /// A hole reads as zeros on files and block devices alike; where it may not be made, the space is kept.
    fn zero(&self, extent: &Extent) -> io::Result<()> {
        let how = if extent.may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.fallocate(how | FallocateFlags::KEEP_SIZE, extent) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => self.write_zeros(extent),
            other => other,
        }
    }

    fn write_zeros(&self, extent: &Extent) -> io::Result<()> {
        // Through the page cache: `ZEROS` need not be aligned.
        let file = self.unaligned.as_ref().map_or(&self.file, |(file, _)| file);
        let (mut offset, mut left) = (extent.offset, extent.bytes);
        while left > 0 {
            let piece = ZEROS.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let piece = ZEROS.get(..piece).unwrap_or(ZEROS);
            file.write_all_at(piece, offset)?;
            offset = offset.saturating_add(piece.len() as u64);
            left = left.saturating_sub(piece.len() as u64);
        }
        Ok(())
    }

    /// Past the page cache where alignment allows; the kernel keeps the two ways coherent.
    fn file_for(&self, transfer: &Transfer, offset: u64) -> BorrowedFd<'_> {
        match &self.unaligned {
            Some((cached, alignment))
                if !offset.is_multiple_of(alignment.offset) || !transfer.is_aligned(alignment.memory) =>
            {
                cached.as_fd()
            }
            _ => self.file.as_fd(),
        }
    }
}

/// Goes on behind what was moved, which there must have been some of.
fn pass(rest: &mut Transfer, offset: &mut u64, moved: usize) -> io::Result<Option<()>> {
    if moved == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    rest.advance(moved);
    *offset = offset.saturating_add(moved as u64);
    Ok(None)
}

/// Repeats `transfer` until it has moved all bytes of `rest`.
fn complete(
    rest: &mut Transfer,
    mut offset: u64,
    transfer: impl Fn(&mut Transfer, u64) -> io::Result<usize>,
) -> io::Result<()> {
    while !rest.is_empty() {
        let moved = transfer(rest, offset)?;
        if moved == 0 {
            // The file became shorter than the disk that it was.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        offset = offset.saturating_add(moved as u64);
        rest.advance(moved);
    }
    Ok(())
}

/// What O_DIRECT demands of this file; Linux tells it since 6.1 (statx(2), STATX_DIOALIGN), and a page is always enough.
fn alignment(file: BorrowedFd, block_bytes: u32) -> Alignment {
    let told = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let told =
        told.filter(|told| told.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && told.stx_dio_offset_align > 0);
    let unknown = block_bytes.max(USUAL_BLOCK_BYTES);
    let (memory, offset) =
        told.map_or((unknown, unknown), |told| (told.stx_dio_mem_align, told.stx_dio_offset_align));
    // A buffer's length has to fit the offset's alignment as well.
    Alignment { memory: memory.max(offset) as usize, offset: offset.into() }
}

/// tmpfs: reading and writing waits for no device, swapping aside.
fn is_in_memory(file: BorrowedFd) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    fstatfs(file).is_ok_and(|file_system| file_system.f_type == TMPFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::MetadataExt, sync::Arc};

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::guest_memory::{self, GuestMemory};

    const WRITABLE: DiskOptions = DiskOptions { read_only: false, direct: false, never_flush: false };
    const READ_ONLY: DiskOptions = DiskOptions { read_only: true, direct: false, never_flush: false };

    /// A file on disk, where the checkout is: /tmp may be a tmpfs.
    fn file(bytes: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let content: Vec<u8> = (0..bytes).map(|index| (index / 3) as u8 | 1).collect();
        file.write_all(&content).unwrap();
        file
    }

    fn memory() -> Arc<GuestMemory> {
        Arc::new(guest_memory::map(&[(GuestAddress(0), 1 << 20)]).unwrap())
    }

    fn transfer(memory: &Arc<GuestMemory>, address: u64, bytes: usize) -> Transfer {
        Transfer::new(memory, &[memory.get_slice(GuestAddress(address), bytes).unwrap()]).unwrap()
    }

    #[test]
    fn open_of_file_rounds_size_down_to_sectors() {
        assert_eq!(Disk::open(file(1500).path(), READ_ONLY).unwrap().sectors(), 2);
    }

    #[test]
    fn open_of_what_is_no_disk_fails() {
        let open = |path: &str| Disk::open(Path::new(path), READ_ONLY);
        assert!(matches!(Disk::open(file(511).path(), READ_ONLY), Err(DiskError::Empty { bytes: 511, .. })));
        assert!(matches!(open("/dev/null"), Err(DiskError::Kind)));
        assert!(matches!(open("/"), Err(DiskError::Kind)));
        assert!(matches!(open("/no/such"), Err(DiskError::Open { .. })));
    }

    #[test]
    fn read_past_a_truncated_file_fails_without_spinning() {
        let file = file(1024);
        let disk = Disk::open(file.path(), WRITABLE).unwrap();
        let memory = memory();
        let read = || Operation::Read { offset: 0, into: transfer(&memory, 0, 1024) };
        disk.perform(&mut read()).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(700)).unwrap(), 233);
        disk.perform(&mut Operation::Flush).unwrap();
        file.as_file().set_len(600).unwrap();
        assert_eq!(disk.perform(&mut read()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        // What is cached was read at once, and the rest is left to the other way, which fails.
        let mut half = read();
        if disk.try_now(&mut half).is_none() {
            assert_eq!(disk.perform(&mut half).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn disk_of_several_files_reads_across_their_ends() {
        let files = [file(1024), file(512), file(4096), file(1536)];
        let [first, more @ ..] = &files;
        let mut disk = Disk::open(first.path(), READ_ONLY).unwrap();
        more.iter().for_each(|file| disk.append(file.path()).unwrap());
        assert_eq!(disk.sectors() * SECTOR_BYTES, 7168);
        let whole: Vec<u8> = files.iter().flat_map(|file| std::fs::read(file.path()).unwrap()).collect();
        let memory = memory();
        for (offset, bytes) in [(0, 7168), (512, 512), (512, 1024), (1024, 512), (1536, 4096), (1000, 4700)] {
            let read = || {
                // Two buffers, of which one may lie across an end.
                let slices = [(0x1000, bytes / 3), (0x8000, bytes - bytes / 3)];
                let slices = slices.map(|(at, bytes)| memory.get_slice(GuestAddress(at), bytes).unwrap());
                Operation::Read { offset: offset as u64, into: Transfer::new(&memory, &slices).unwrap() }
            };
            let seen = || {
                let mut seen = vec![0; bytes];
                let (one, two) = seen.split_at_mut(bytes / 3);
                memory.read_slice(one, GuestAddress(0x1000)).unwrap();
                memory.read_slice(two, GuestAddress(0x8000)).unwrap();
                seen
            };
            disk.perform(&mut read()).unwrap();
            assert_eq!(seen(), whole[offset..offset + bytes], "{offset} {bytes}");
            memory.write_slice(&[0; 0x9000], GuestAddress(0x1000)).unwrap();
            let mut operation = read();
            if disk.try_now(&mut operation).is_none() {
                disk.perform(&mut operation).unwrap();
            }
            assert_eq!(seen(), whole[offset..offset + bytes], "at once: {offset} {bytes}");
        }
        // One that grows later does not move what follows; one that shrinks is an error.
        first.as_file().set_len(2048).unwrap();
        disk.perform(&mut Operation::Read { offset: 512, into: transfer(&memory, 0, 1024) }).unwrap();
        let mut seen = vec![0; 1024];
        memory.read_slice(&mut seen, GuestAddress(0)).unwrap();
        assert_eq!(seen, whole[512..1536]);
        more[0].as_file().set_len(100).unwrap();
        let mut read = Operation::Read { offset: 512, into: transfer(&memory, 0, 1024) };
        assert_eq!(disk.perform(&mut read).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn append_of_what_cannot_follow_is_refused() {
        let whole = file(1024);
        let mut disk = Disk::open(whole.path(), READ_ONLY).unwrap();
        assert!(matches!(disk.append(file(1500).path()), Err(DiskError::Ragged { bytes: 1500 })));
        assert!(matches!(disk.append(Path::new("/dev/null")), Err(DiskError::Kind)));
        let mut ragged = Disk::open(file(1500).path(), READ_ONLY).unwrap();
        assert!(matches!(ragged.append(whole.path()), Err(DiskError::Ragged { bytes: 1500 })));
        let mut writable = Disk::open(whole.path(), WRITABLE).unwrap();
        assert!(matches!(writable.append(whole.path()), Err(DiskError::Several)));
    }

    #[test]
    fn zeroes_and_discards_touch_their_extents_only() {
        let file = file(256 * 1024);
        let disk = Disk::open(file.path(), WRITABLE).unwrap();
        let before = std::fs::read(file.path()).unwrap();
        let extent = |offset, bytes, may_unmap| Extent { offset, bytes, may_unmap };
        let extents = vec![extent(512, 1024, false), extent(65536, 65536, true)];
        disk.perform(&mut Operation::WriteZeroes { extents, durable: true }).unwrap();
        disk.perform(&mut Operation::Discard(vec![extent(196_608, 4096, true)])).unwrap();
        let mut expected = before;
        for range in [512..1536, 65536..131_072, 196_608..200_704] {
            expected[range].fill(0);
        }
        assert_eq!(std::fs::read(file.path()).unwrap(), expected);
        assert!(file.as_file().metadata().unwrap().blocks() * 512 <= 256 * 1024 - 65536, "no hole was made");
        // Where the file system cannot, zeros are written.
        disk.write_zeros(&extent(1, 140_000, false)).unwrap();
        expected[1..140_001].fill(0);
        assert_eq!(std::fs::read(file.path()).unwrap(), expected);
    }

    #[test]
    fn direct_disk_takes_aligned_and_unaligned_requests() {
        let file = file(64 * 1024);
        let options = DiskOptions { direct: true, ..WRITABLE };
        let disk = match Disk::open(file.path(), options) {
            Ok(disk) => disk,
            Err(DiskError::Direct(_)) => return,
            Err(error) => panic!("{error}"),
        };
        let memory = memory();
        let content = std::fs::read(file.path()).unwrap();
        for (address, offset, bytes) in [(0x1000, 4096, 8192), (0x1234, 4096, 4096), (0x1000, 512, 1536)] {
            let mut read = Operation::Read { offset, into: transfer(&memory, address, bytes) };
            assert!(disk.try_now(&mut read).is_none());
            disk.perform(&mut read).unwrap();
            let mut seen = vec![0; bytes];
            memory.read_slice(&mut seen, GuestAddress(address)).unwrap();
            let offset = offset as usize;
            assert_eq!(seen, content[offset..offset + bytes]);
            let mut write =
                Operation::Write { offset: 32768, from: transfer(&memory, address, bytes), durable: true };
            disk.perform(&mut write).unwrap();
            assert_eq!(std::fs::read(file.path()).unwrap()[32768..32768 + bytes], seen);
        }
    }

    #[test]
    fn large_write_arrives_whole_however_it_is_made() {
        let memory = memory();
        let bytes = 3 * CACHED_WRITE_BYTES as usize + 512;
        let content: Vec<u8> = (0..bytes).map(|index| (index / 5) as u8).collect();
        memory.write_slice(&content, GuestAddress(4096)).unwrap();
        for durable in [false, true] {
            let file = file(bytes + 1024);
            let before = std::fs::read(file.path()).unwrap();
            let disk = Disk::open(file.path(), WRITABLE).unwrap();
            let from = transfer(&memory, 4096, bytes);
            disk.perform(&mut Operation::Write { offset: 512, from, durable }).unwrap();
            let expected = [&before[..512], &content, &before[512 + bytes..]].concat();
            assert!(std::fs::read(file.path()).unwrap() == expected);
        }
    }

    #[test]
    fn file_without_room_fails_the_write() {
        // Any write to /dev/full fails, but it is no disk: a file that may not grow does as well.
        let file = file(8192);
        let disk = Disk::open(file.path(), READ_ONLY).unwrap();
        let memory = memory();
        let mut write = Operation::Write { offset: 0, from: transfer(&memory, 0, 512), durable: false };
        assert!(disk.perform(&mut write).is_err());
        assert!(disk.perform(&mut Operation::Flush).is_ok());
    }
}
