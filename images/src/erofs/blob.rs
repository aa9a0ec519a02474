//! The output file: sequential writes in large pieces, holes instead of long zeros, and a check that the disk does
//! not run full.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::format::BLOCK;
use crate::limits::RESERVED_DISK_BYTES;

/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 20;
/// Zeros from this many on become a hole in the file.
const MIN_HOLE: u64 = 64 << 10;
/// Bytes between two looks at the free space. Smaller layers may fill the disk, and then fail by themselves.
const SPACE_CHECK: u64 = 64 << 20;

/// Why a blob could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlobError {
    /// The file system under the store failed, or is full.
    #[error("writing the converted layer failed at byte {at}")]
    Write {
        /// Offset in the blob.
        at: u64,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Going on would fill the disk.
    #[error(
        "only {free_mib} MiB are left on the store's file system; free some space, or remove images with `cloche image rm`"
    )]
    NoSpace {
        /// What is left, in MiB.
        free_mib: u64,
    },
    /// EROFS counts blocks in 32 bits.
    #[error("the layer needs more than 16 TiB")]
    TooLarge,
}

/// Writes a blob from front to back.
pub(crate) struct BlobWriter<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    /// Offset of the buffer's first byte.
    start: u64,
    next_space_check: u64,
}

impl<'a> BlobWriter<'a> {
    /// Starts an empty blob; block 0 is left for the superblock.
    pub(crate) fn new(file: &'a File) -> Self {
        BlobWriter { file, buffer: Vec::with_capacity(BUFFER), start: BLOCK, next_space_check: SPACE_CHECK }
    }

    /// Where the next byte goes.
    pub(super) fn position(&self) -> u64 {
        self.start + self.buffer.len() as u64
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<(), BlobError> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BUFFER - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            if self.buffer.len() == BUFFER {
                self.flush()?;
            }
            bytes = later;
        }
        Ok(())
    }

    /// Writes `count` zeros.
    pub(super) fn zeros(&mut self, count: u64) -> Result<(), BlobError> {
        if count >= MIN_HOLE {
            self.flush()?;
            self.start = self.start.checked_add(count).ok_or(BlobError::TooLarge)?;
            return Ok(());
        }
        static ZEROS: [u8; MIN_HOLE as usize] = [0; MIN_HOLE as usize];
        self.write(ZEROS.get(..count as usize).unwrap_or(&ZEROS))
    }

    /// Goes on to the next multiple of `unit`.
    pub(super) fn align(&mut self, unit: u64) -> Result<(), BlobError> {
        let position = self.position();
        self.zeros(position.next_multiple_of(unit) - position)
    }

    /// Goes on to the next block and gives its number.
    pub(super) fn next_block(&mut self) -> Result<u32, BlobError> {
        self.align(BLOCK)?;
        match u32::try_from(self.position() / BLOCK) {
            // The top number means "no block".
            Ok(u32::MAX) | Err(_) => Err(BlobError::TooLarge),
            Ok(block) => Ok(block),
        }
    }

    /// Writes the superblock. All else has been written, up to a block's end.
    pub(super) fn finish(mut self, superblock: &[u8]) -> Result<u64, BlobError> {
        self.align(BLOCK)?;
        self.flush()?;
        // A hole at the end would be missing from the file.
        self.file.set_len(self.start).map_err(|source| BlobError::Write { at: self.start, source })?;
        let at = super::format::SUPERBLOCK_OFFSET;
        self.file.write_all_at(superblock, at).map_err(|source| BlobError::Write { at, source })?;
        Ok(self.start)
    }

    fn flush(&mut self) -> Result<(), BlobError> {
        if self.start >= self.next_space_check {
            self.check_space()?;
            self.next_space_check = self.start + SPACE_CHECK;
        }
        let at = self.start;
        self.file.write_all_at(&self.buffer, at).map_err(|source| BlobError::Write { at, source })?;
        self.start += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn check_space(&self) -> Result<(), BlobError> {
        let stat = rustix::fs::fstatvfs(self.file)
            .map_err(|source| BlobError::Write { at: self.start, source: source.into() })?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < RESERVED_DISK_BYTES {
            return Err(BlobError::NoSpace { free_mib: free >> 20 });
        }
        Ok(())
    }
}
