//! Directory content: blocks that each start with their entries and end with the entries' names, both sorted, so
//! that a reader can search by halves.

use super::format::{BLOCK, Fields};

const ENTRY_BYTES: usize = 12;

/// One entry to be written.
pub(super) struct DirectoryEntry<'a> {
    pub(super) name: &'a [u8],
    pub(super) node: u64,
    pub(super) file_type: u8,
}

/// The length of a directory's content with these names (in order, `.` and `..` among them).
pub(super) fn content_bytes<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut full_blocks, mut used) = (0, 0);
    for name in names {
        let cost = ENTRY_BYTES + name.len();
        if used + cost > BLOCK as usize {
            full_blocks += 1;
            used = 0;
        }
        used += cost;
    }
    full_blocks * BLOCK + used as u64
}

/// Gives a directory's content block by block to `out`, with a flag at the last; all others are full blocks.
pub(super) fn write_blocks<'a, E>(
    entries: impl Iterator<Item = DirectoryEntry<'a>>,
    mut out: impl FnMut(&[u8], bool) -> Result<(), E>,
) -> Result<(), E> {
    let mut block = Vec::new();
    let mut used = 0;
    for entry in entries {
        let cost = ENTRY_BYTES + entry.name.len();
        if used + cost > BLOCK as usize {
            let mut bytes = encode(&block);
            bytes.resize(BLOCK as usize, 0);
            out(&bytes, false)?;
            block.clear();
            used = 0;
        }
        used += cost;
        block.push(entry);
    }
    out(&encode(&block), true)
}

fn encode(entries: &[DirectoryEntry<'_>]) -> Vec<u8> {
    let mut out = Fields::default();
    let mut name_offset = entries.len() * ENTRY_BYTES;
    for entry in entries {
        out.u64(entry.node);
        // Below the block size, as the callers see to.
        out.u16(name_offset as u16);
        out.bytes(&[entry.file_type, 0]);
        name_offset += entry.name.len();
    }
    for entry in entries {
        out.bytes(entry.name);
    }
    out.0
}
