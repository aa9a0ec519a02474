//! Which blocks are plugged, and which requests of a driver are right (virtio 1.2 §5.15.6). Knows no memory.
//!
//! A chunk is within the guest's reach while one of its blocks is plugged. So that a guest cannot reach all memory by
//! plugging one block of each chunk, a new chunk is begun only if less than two chunks' room is then within reach; Linux
//! fills what it has begun first. A guest then never reaches more than the largest size that was requested, and two
//! chunks.

use std::ops::Range;

use crate::{config::MEMORY_BLOCK_MIB, guest_memory::CHUNK_BYTES};

/// Bytes of a block, the unit of requests: what Linux's page allocator can give back at once.
pub const BLOCK_BYTES: u64 = (MEMORY_BLOCK_MIB as u64) << 20;
const CHUNK_BLOCKS: usize = (CHUNK_BYTES / BLOCK_BYTES) as usize;

/// Chunks that one request may plug or unplug, and a turn of one that unplugs all: each is a system call that waits for
/// vCPUs. Linux plugs one memory block at a time, which is one chunk, or 16 in a guest with 64 GiB and more.
const CHUNKS_AT_ONCE: usize = 17;

/// Why a request is not carried out (§5.15.6: response types).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// More than is requested (NACK).
    TooMuch,
    /// Not now (BUSY).
    Busy,
    /// It makes no sense (ERROR).
    Wrong,
}

/// What is plugged in some blocks (§5.15.6: states).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// All.
    Plugged,
    /// None.
    Unplugged,
    /// Some.
    Mixed,
}

/// The blocks of a region.
#[derive(Debug)]
pub struct Blocks {
    start: u64,
    plugged: Vec<bool>,
}

impl Blocks {
    /// Blocks of a region at this guest physical address, all unplugged.
    pub fn new(start: u64, bytes: u64) -> Self {
        Self { start, plugged: vec![false; (bytes / BLOCK_BYTES) as usize] }
    }

    /// Bytes that are plugged.
    pub fn plugged_bytes(&self) -> u64 {
        self.plugged.iter().filter(|plugged| **plugged).count() as u64 * BLOCK_BYTES
    }

    /// The blocks of a request: aligned, at least one, in the region (§5.15.6).
    pub fn range(&self, address: u64, count: u16) -> Result<Range<usize>, Refusal> {
        let offset = address.checked_sub(self.start).ok_or(Refusal::Wrong)?;
        let first = usize::try_from(offset / BLOCK_BYTES).map_err(|_| Refusal::Wrong)?;
        let end = first.checked_add(count.into()).ok_or(Refusal::Wrong)?;
        if count == 0 || !offset.is_multiple_of(BLOCK_BYTES) || end > self.plugged.len() {
            return Err(Refusal::Wrong);
        }
        Ok(first..end)
    }

    /// What is plugged in a range of blocks.
    pub fn state(&self, range: &Range<usize>) -> State {
        let blocks = self.plugged.get(range.clone()).unwrap_or_default();
        match blocks.iter().filter(|plugged| **plugged).count() {
            0 => State::Unplugged,
            count if count == blocks.len() => State::Plugged,
            _ => State::Mixed,
        }
    }

    /// Whether these may be plugged while so many bytes are requested.
    pub fn check_plug(&self, range: &Range<usize>, requested_bytes: u64) -> Result<(), Refusal> {
        if self.state(range) != State::Unplugged {
            return Err(Refusal::Wrong);
        }
        let bytes = range.len() as u64 * BLOCK_BYTES;
        if self.plugged_bytes().saturating_add(bytes) > requested_bytes {
            return Err(Refusal::TooMuch);
        }
        if !is_at_once(range) {
            return Err(Refusal::Busy);
        }
        let begins_chunk = chunks(range).any(|chunk| self.plugged_in_chunk(chunk) == 0);
        if begins_chunk && self.room_after(range) >= 2 * CHUNK_BLOCKS {
            return Err(Refusal::Busy);
        }
        Ok(())
    }

    /// Blocks that will be unplugged in chunks that are begun, once this range, of unplugged blocks, is plugged.
    fn room_after(&self, range: &Range<usize>) -> usize {
        let chunks = 0..self.plugged.len() / CHUNK_BLOCKS;
        let plugged = chunks.map(|chunk| self.plugged_in_chunk(chunk) + overlap(&blocks_of(chunk), range));
        plugged.filter(|plugged| *plugged > 0).map(|plugged| CHUNK_BLOCKS - plugged).sum()
    }

    /// Sets a range of blocks.
    pub fn set(&mut self, range: &Range<usize>, plugged: bool) {
        self.plugged.get_mut(range.clone()).unwrap_or_default().fill(plugged);
    }

    /// How many blocks of a chunk are plugged.
    pub fn plugged_in_chunk(&self, chunk: usize) -> usize {
        let blocks = self.plugged.get(blocks_of(chunk)).unwrap_or_default();
        blocks.iter().filter(|plugged| **plugged).count()
    }

    /// The blocks of the first chunks that have plugged ones, as many as one turn may touch; `None` if there is none.
    pub fn first_plugged(&self) -> Option<Range<usize>> {
        let first = self.plugged.iter().position(|plugged| *plugged)? / CHUNK_BLOCKS;
        Some(first * CHUNK_BLOCKS..((first + CHUNKS_AT_ONCE) * CHUNK_BLOCKS).min(self.plugged.len()))
    }
}

fn blocks_of(chunk: usize) -> Range<usize> {
    chunk * CHUNK_BLOCKS..(chunk + 1) * CHUNK_BLOCKS
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> usize {
    a.end.min(b.end).saturating_sub(a.start.max(b.start))
}

/// Whether one request may touch so many chunks.
pub fn is_at_once(range: &Range<usize>) -> bool {
    chunks(range).count() <= CHUNKS_AT_ONCE
}

/// Chunks that a range of blocks touches.
pub fn chunks(range: &Range<usize>) -> impl Iterator<Item = usize> + use<> {
    range.start / CHUNK_BLOCKS..range.end.div_ceil(CHUNK_BLOCKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 4 << 30;

    fn blocks(chunks: u64) -> Blocks {
        Blocks::new(START, chunks * CHUNK_BYTES)
    }

    #[test]
    fn range_that_is_not_of_whole_blocks_of_the_region_is_wrong() {
        let blocks = blocks(2);
        assert_eq!(blocks.range(START, 64), Ok(0..64));
        assert_eq!(blocks.range(START + BLOCK_BYTES, 1), Ok(1..2));
        for (address, count) in [
            (START, 0),
            (START, 65),
            (START + 63 * BLOCK_BYTES, 2),
            (START + 1, 1),
            (START - BLOCK_BYTES, 2),
            (0, 1),
            (u64::MAX, u16::MAX),
            (u64::MAX - BLOCK_BYTES + 1, 1),
        ] {
            assert_eq!(blocks.range(address, count), Err(Refusal::Wrong), "{address:#x} {count}");
        }
    }

    #[test]
    fn plug_is_refused_over_what_is_requested_and_over_plugged_blocks() {
        let mut blocks = blocks(2);
        assert_eq!(blocks.check_plug(&(0..2), BLOCK_BYTES), Err(Refusal::TooMuch));
        assert_eq!(blocks.check_plug(&(0..2), 2 * BLOCK_BYTES), Ok(()));
        blocks.set(&(0..2), true);
        assert_eq!(blocks.check_plug(&(1..3), 64 * BLOCK_BYTES), Err(Refusal::Wrong));
        assert_eq!(
            (blocks.state(&(0..2)), blocks.state(&(1..3)), blocks.state(&(2..9))),
            (State::Plugged, State::Mixed, State::Unplugged)
        );
        assert_eq!(blocks.plugged_bytes(), 2 * BLOCK_BYTES);
    }

    #[test]
    fn new_chunk_is_begun_only_when_the_others_have_little_room() {
        let mut blocks = blocks(4);
        let all = 4 * CHUNK_BYTES;
        for chunk in [0, 1] {
            let first = chunk * CHUNK_BLOCKS..chunk * CHUNK_BLOCKS + 1;
            assert_eq!(blocks.check_plug(&first, all), Ok(()), "{chunk}");
            blocks.set(&first, true);
        }
        // Sixty-two blocks are within reach and not plugged.
        let third = 2 * CHUNK_BLOCKS..2 * CHUNK_BLOCKS + 1;
        assert_eq!(blocks.check_plug(&third, all), Err(Refusal::Busy));
        // What fills the others on the way is no more room.
        assert_eq!(blocks.check_plug(&(CHUNK_BLOCKS + 1..third.end), all), Ok(()));
        blocks.set(&(1..CHUNK_BLOCKS), true);
        assert_eq!(blocks.check_plug(&third, all), Ok(()));
    }

    #[test]
    fn request_that_begins_two_chunks_is_refused_for_the_room_of_both() {
        let mut blocks = blocks(4);
        let requested = 3 * BLOCK_BYTES;
        assert_eq!(blocks.check_plug(&(0..1), requested), Ok(()));
        blocks.set(&(0..1), true);
        // Three chunks would be within reach for three blocks.
        assert_eq!(
            blocks.check_plug(&(2 * CHUNK_BLOCKS - 1..2 * CHUNK_BLOCKS + 1), requested),
            Err(Refusal::Busy)
        );
        assert_eq!(blocks.check_plug(&(CHUNK_BLOCKS - 1..CHUNK_BLOCKS + 1), requested), Ok(()));
    }
}
