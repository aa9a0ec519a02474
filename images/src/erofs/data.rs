//! The data of regular files: whole blocks as they stream by, and for large files the chunks that are not zero.

use super::blob::{BlobError, BlobWriter};
use super::format::{BLOCK, BLOCK_BITS, MAX_CHUNK_BITS};

/// The smallest chunk. Zeros are looked for in pieces of this size and not in single blocks, since every stored
/// run is one more extent for readers to follow.
const MIN_CHUNK: u64 = 64 << 10;

/// Chunks that a file is divided into at most, so a map has at most 256 KiB: the chunk size grows with the file.
const MAX_FILE_CHUNKS: u64 = 1 << 16;

/// Where a file's data lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FileData {
    /// In consecutive blocks from this one on. (Any number, if the file is empty.)
    Plain { block: u32 },
    /// In chunks of `BLOCK << chunk_bits` bytes. What no run holds is zero.
    Chunks { chunk_bits: u8, runs: Box<[Run]> },
}

/// Where some bytes of a file went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Into the blob, at this offset in bytes.
    At { offset: u64, bytes: u64 },
    /// They are zeros, and may be nowhere.
    Zeros(u64),
}

/// Consecutive chunks in consecutive blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(super) chunk: u32,
    pub(super) count: u32,
    pub(super) block: u32,
}

impl Run {
    /// Whether a chunk in this block goes on where the run ends.
    pub(super) fn is_followed_by(&self, chunk: u32, block: u32, chunk_bits: u8) -> bool {
        let end = u64::from(self.block) + (u64::from(self.count) << chunk_bits);
        self.chunk + self.count == chunk && end == u64::from(block)
    }
}

impl FileData {
    /// What this takes in memory besides its own size.
    pub(crate) fn heap_bytes(&self) -> u64 {
        match self {
            FileData::Plain { .. } => 0,
            FileData::Chunks { runs, .. } => size_of_val::<[Run]>(runs) as u64,
        }
    }

    /// The end of the last block that a file of `size` bytes has, in bytes.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn end(&self, size: u64) -> u64 {
        let runs = |runs: &[Run], chunk_bits: u8| {
            let end = |run: &Run| {
                let rest = size.saturating_sub(u64::from(run.chunk) * (BLOCK << chunk_bits));
                u64::from(run.block) * BLOCK + rest.min(u64::from(run.count) * (BLOCK << chunk_bits))
            };
            runs.iter().map(end).max().unwrap_or(0)
        };
        match self {
            FileData::Plain { .. } if size == 0 => 0,
            FileData::Plain { block } => u64::from(*block) * BLOCK + size,
            FileData::Chunks { chunk_bits, runs: of } => runs(of, *chunk_bits),
        }
    }

    /// Entries of the chunk map, for a file of `size` bytes.
    pub(crate) fn chunks(&self, size: u64) -> u64 {
        match self {
            FileData::Plain { .. } => 0,
            FileData::Chunks { chunk_bits, .. } => size.div_ceil(BLOCK << chunk_bits),
        }
    }
}

/// Takes one file's content, of a size known beforehand, in pieces of any length.
pub(crate) struct DataWriter<'a, 'b> {
    blob: &'a mut BlobWriter<'b>,
    size: u64,
    chunk_bits: u8,
    position: u64,
    /// Whether the chunk at `position` has blocks already.
    stored: bool,
    /// Zeros since the start of the chunk, while it has no blocks.
    zeros: u64,
    runs: Vec<Run>,
}

impl<'a, 'b> DataWriter<'a, 'b> {
    pub(crate) fn new(blob: &'a mut BlobWriter<'b>, size: u64) -> Self {
        let chunk = size.div_ceil(MAX_FILE_CHUNKS).next_power_of_two().max(MIN_CHUNK);
        let chunk_bits = (chunk.trailing_zeros() as u8 - BLOCK_BITS).min(MAX_CHUNK_BITS);
        DataWriter { blob, size, chunk_bits, position: 0, stored: false, zeros: 0, runs: Vec::new() }
    }

    fn chunk_bytes(&self) -> u64 {
        BLOCK << self.chunk_bits
    }

    /// Bytes up to the end of the chunk, or of the file.
    fn left_in_chunk(&self) -> u64 {
        let chunk = self.chunk_bytes();
        (chunk - self.position % chunk).min(self.size - self.position)
    }

    /// The next bytes; `note` is told where they go. More than the file's size are an error of the caller, and are
    /// cut off.
    pub(crate) fn write(&mut self, mut bytes: &[u8], mut note: impl FnMut(Stored)) -> Result<(), BlobError> {
        while !bytes.is_empty() && self.position < self.size {
            let step = self.left_in_chunk().min(bytes.len() as u64);
            let (now, later) = bytes.split_at(step as usize);
            if !self.stored && is_zero(now) {
                self.zeros += step;
                note(Stored::Zeros(step));
            } else {
                self.store_chunk()?;
                note(Stored::At { offset: self.blob.position(), bytes: step });
                self.blob.write(now)?;
            }
            self.advance(step);
            bytes = later;
        }
        Ok(())
    }

    /// The next `count` bytes are zero.
    pub(crate) fn skip(&mut self, mut count: u64) -> Result<(), BlobError> {
        while count > 0 && self.position < self.size {
            let step = self.left_in_chunk().min(count);
            if self.stored {
                self.blob.zeros(step)?;
            } else {
                self.zeros += step;
            }
            self.advance(step);
            count -= step;
        }
        Ok(())
    }

    fn advance(&mut self, step: u64) {
        self.position += step;
        if self.position.is_multiple_of(self.chunk_bytes()) {
            self.stored = false;
            self.zeros = 0;
        }
    }

    /// Gives the current chunk blocks, if it has none, and fills them up to the current position.
    fn store_chunk(&mut self) -> Result<(), BlobError> {
        if self.stored {
            return Ok(());
        }
        let block = self.blob.next_block()?;
        // At most `MAX_FILE_CHUNKS`, or 2^50 >> 43 of the largest chunks.
        let chunk = (self.position / self.chunk_bytes()) as u32;
        match self.runs.last_mut() {
            Some(run) if run.is_followed_by(chunk, block, self.chunk_bits) => run.count += 1,
            _ => self.runs.push(Run { chunk, count: 1, block }),
        }
        self.blob.zeros(self.zeros)?;
        self.stored = true;
        self.zeros = 0;
        Ok(())
    }

    /// All bytes were given.
    pub(crate) fn finish(mut self) -> Result<FileData, BlobError> {
        debug_assert_eq!(self.position, self.size);
        let chunks = self.size.div_ceil(self.chunk_bytes());
        // A file of one chunk is not worth a map, whatever is in it.
        if chunks == 1 && self.size < MIN_CHUNK && self.runs.is_empty() {
            self.position = 0;
            self.zeros = self.size;
            self.stored = false;
            self.store_chunk()?;
        }
        match self.runs.as_slice() {
            [] if self.size == 0 => Ok(FileData::Plain { block: 0 }),
            [run] if run.chunk == 0 && u64::from(run.count) == chunks => {
                Ok(FileData::Plain { block: run.block })
            }
            _ => Ok(FileData::Chunks { chunk_bits: self.chunk_bits, runs: self.runs.into() }),
        }
    }
}

/// Whether all bytes are zero; stops early, and is otherwise as fast as memory.
fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// Stores one file, given in pieces, and returns where its data lie and what the blob then holds.
    fn store(content: &[u8], piece: usize) -> (FileData, Vec<u8>) {
        let file = tempfile::tempfile().unwrap();
        let mut blob = BlobWriter::new(&file);
        let mut writer = DataWriter::new(&mut blob, content.len() as u64);
        for piece in content.chunks(piece) {
            writer.write(piece, |_| ()).unwrap();
        }
        let data = writer.finish().unwrap();
        blob.finish(&[]).unwrap();
        let mut stored = Vec::new();
        (&file).read_to_end(&mut stored).unwrap();
        (data, stored)
    }

    #[test]
    fn file_without_zeros_is_plain_and_starts_on_a_block() {
        let content = vec![7; 200_000];
        let (data, blob) = store(&content, 1000);
        assert_eq!(data, FileData::Plain { block: 1 });
        assert_eq!(blob[4096..4096 + content.len()], content);
    }

    #[test]
    fn small_file_of_zeros_is_plain_and_an_empty_one_has_no_blocks() {
        assert_eq!(store(&[0; 5000], 5000).0, FileData::Plain { block: 1 });
        let (data, blob) = store(&[], 1);
        assert_eq!((data, blob.len()), (FileData::Plain { block: 0 }, 4096));
    }

    #[test]
    fn chunk_of_zeros_is_not_stored_whatever_the_pieces() {
        let mut content = vec![1; 5 * MIN_CHUNK as usize + 10];
        content[MIN_CHUNK as usize..3 * MIN_CHUNK as usize].fill(0);
        let runs = [Run { chunk: 0, count: 1, block: 1 }, Run { chunk: 3, count: 3, block: 17 }];
        let expected = FileData::Chunks { chunk_bits: 4, runs: runs.into() };
        for piece in [1, 4096, 65_537, content.len()] {
            assert_eq!(store(&content, piece).0, expected, "{piece}");
        }
    }

    #[test]
    fn chunks_grow_with_the_file_and_stay_few() {
        let file = tempfile::tempfile().unwrap();
        let mut blob = BlobWriter::new(&file);
        for size in [0, 1, 1 << 32, (1 << 32) + 1, 1 << 40, crate::limits::MAX_FILE_BYTES] {
            let mut writer = DataWriter::new(&mut blob, size);
            writer.skip(size).unwrap();
            let data = writer.finish().unwrap();
            assert!(data.chunks(size) <= MAX_FILE_CHUNKS, "{size}: {data:?}");
        }
    }
}
