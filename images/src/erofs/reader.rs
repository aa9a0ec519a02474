//! Reads back what this module has written: inodes by number, directories' entries, extended attributes, and where a
//! file's data lie. Blobs are our own, but a disk may have damaged them: then an error is the answer, never a panic, a
//! loop, or an allocation by a claimed number alone.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::data::{FileData, Run};
use super::format::{
    BLOCK, BLOCK_BITS, COMPACT_BYTES, DEVICE_BYTES, DEVICE_TAG_BYTES, EXTENDED_BYTES, MAGIC, MAX_CHUNK_BITS,
    NULL_BLOCK, SLOT, SUPERBLOCK_OFFSET,
};
use super::xattr;
use crate::limits::MAX_LAYERS;
use crate::tar::{Timestamp, Xattr};

/// Bytes that are read at once. What is read together was written together.
const WINDOW_BYTES: u64 = 64 << 10;
/// Windows that are kept: of inodes, of directories, and of what both lead to.
const WINDOWS: usize = 4;

/// An EROFS file system of this crate's making.
pub(crate) struct Reader<'a> {
    blob: &'a File,
    bytes: u64,
    blocks: u32,
    root: u64,
    metadata: u64,
    build_time: Timestamp,
    devices: u16,
    devices_at: u64,
    /// Pieces of the blob with where they start, the one used last in front.
    windows: RefCell<Vec<(u64, Vec<u8>)>>,
}

/// An inode, with its position.
pub(crate) struct ReadInode {
    /// Type and permissions, as in `st_mode`.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) links: u32,
    pub(crate) size: u64,
    /// First block, device number or chunk format.
    payload: u32,
    layout: u16,
    xattr_count: u16,
    /// Where the inode ends, and its attributes start.
    end: u64,
}

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the layer's file system is damaged: {what}"))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or_else(|| damaged("it is cut off"))
}

fn u16_at(bytes: &[u8], at: usize) -> io::Result<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> io::Result<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

impl<'a> Reader<'a> {
    pub(crate) fn open(blob: &'a File) -> io::Result<Self> {
        let bytes = blob.metadata()?.len();
        let mut superblock = [0; 128];
        blob.read_exact_at(&mut superblock, SUPERBLOCK_OFFSET)?;
        if u32_at(&superblock, 0)? != MAGIC || superblock.get(12) != Some(&BLOCK_BITS) {
            return Err(damaged("it has no superblock of ours"));
        }
        let blocks = u32_at(&superblock, 36)?;
        if u64::from(blocks) << BLOCK_BITS != bytes {
            return Err(damaged("it is not as long as it says"));
        }
        Ok(Self {
            blob,
            blocks,
            bytes,
            root: u16_at(&superblock, 14)?.into(),
            build_time: Timestamp {
                seconds: u64_at(&superblock, 24)?.cast_signed(),
                nanoseconds: u32_at(&superblock, 32)?,
            },
            metadata: u64::from(u32_at(&superblock, 40)?) << BLOCK_BITS,
            devices: u16_at(&superblock, 86)?,
            devices_at: u64::from(u16_at(&superblock, 88)?) * DEVICE_BYTES,
            windows: RefCell::default(),
        })
    }

    /// How many blocks it has.
    pub(crate) fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Whether any file of it may have blocks: data are between the superblock and the metadata.
    pub(crate) fn has_data(&self) -> bool {
        self.metadata > BLOCK
    }

    /// What its devices are called, in order.
    pub(crate) fn devices(&self) -> io::Result<Vec<[u8; DEVICE_TAG_BYTES]>> {
        if usize::from(self.devices) > MAX_LAYERS {
            return Err(damaged("it has too many devices"));
        }
        let table = self.read(self.devices_at, u64::from(self.devices) * DEVICE_BYTES)?;
        table.chunks(DEVICE_BYTES as usize).map(|entry| array(entry, 0)).collect()
    }

    /// The root directory's number.
    pub(crate) fn root(&self) -> u64 {
        self.root
    }

    fn read(&self, at: u64, bytes: u64) -> io::Result<Vec<u8>> {
        // Nothing is larger than the blob, so that a damaged length cannot take more memory.
        if at.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(damaged("something lies beyond its end"));
        }
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let start = at - at % WINDOW_BYTES;
        if at + bytes > start + WINDOW_BYTES {
            let mut buffer = vec![0; bytes as usize];
            self.blob.read_exact_at(&mut buffer, at)?;
            return Ok(buffer);
        }
        let mut windows = self.windows.borrow_mut();
        let window = match windows.iter().position(|(at, _)| *at == start) {
            Some(position) => windows.remove(position),
            None => {
                let spare = if windows.len() < WINDOWS { None } else { windows.pop() };
                let mut buffer = spare.map_or_else(Vec::new, |(_, buffer)| buffer);
                buffer.resize(WINDOW_BYTES.min(self.bytes - start) as usize, 0);
                self.blob.read_exact_at(&mut buffer, start)?;
                (start, buffer)
            }
        };
        let from = (at - start) as usize;
        let found = window.1.get(from..from + bytes as usize).map(<[u8]>::to_vec);
        windows.insert(0, window);
        found.ok_or_else(|| damaged("it has become shorter"))
    }

    /// The inode of this number.
    pub(crate) fn inode(&self, number: u64) -> io::Result<ReadInode> {
        let at = number.checked_mul(SLOT).and_then(|offset| offset.checked_add(self.metadata));
        let at = at.ok_or_else(|| damaged("an inode number is out of range"))?;
        let start = self.read(at, COMPACT_BYTES)?;
        let format = u16_at(&start, 0)?;
        let (xattr_count, mode) = (u16_at(&start, 2)?, u16_at(&start, 4)?);
        let layout = format >> 1 & 7;
        if format & 1 == 0 {
            return Ok(ReadInode {
                mode,
                uid: u16_at(&start, 24)?.into(),
                gid: u16_at(&start, 26)?.into(),
                mtime: self.build_time,
                links: u16_at(&start, 6)?.into(),
                size: u32_at(&start, 8)?.into(),
                payload: u32_at(&start, 16)?,
                layout,
                xattr_count,
                end: at + COMPACT_BYTES,
            });
        }
        let whole = self.read(at, EXTENDED_BYTES)?;
        Ok(ReadInode {
            mode,
            size: u64_at(&whole, 8)?,
            payload: u32_at(&whole, 16)?,
            uid: u32_at(&whole, 24)?,
            gid: u32_at(&whole, 28)?,
            mtime: Timestamp { seconds: u64_at(&whole, 32)?.cast_signed(), nanoseconds: u32_at(&whole, 40)? },
            links: u32_at(&whole, 44)?,
            layout,
            xattr_count,
            end: at + EXTENDED_BYTES,
        })
    }

    /// Its extended attributes, full names.
    pub(crate) fn xattrs(&self, inode: &ReadInode) -> io::Result<Vec<Xattr>> {
        let bytes = self.read(inode.end, inode.xattr_bytes())?;
        let mut found = Vec::new();
        // Behind a header of 12 bytes, of which only shared attributes use any.
        let mut rest = bytes.get(12..).unwrap_or_default();
        while !rest.is_empty() {
            let [name_bytes, prefix] = array(rest, 0)?;
            let (name_bytes, value_bytes) = (usize::from(name_bytes), usize::from(u16_at(rest, 2)?));
            let parts =
                rest.get(4..4 + name_bytes).zip(rest.get(4 + name_bytes..4 + name_bytes + value_bytes));
            let (name, value) = parts.ok_or_else(|| damaged("an attribute is cut off"))?;
            let full = xattr::full_name(prefix, name).ok_or_else(|| damaged("an attribute has no name"))?;
            found.push((full, value.to_vec()));
            let entry = (4 + name_bytes + value_bytes).next_multiple_of(4);
            rest = rest.get(entry..).unwrap_or_default();
        }
        Ok(found)
    }

    /// The content of a directory or symbolic link: whole blocks, then what is packed behind the inode.
    fn content(&self, inode: &ReadInode) -> io::Result<Vec<u8>> {
        let blocks_at = u64::from(inode.payload) << BLOCK_BITS;
        match inode.layout {
            0 => self.read(blocks_at, inode.size),
            2 => {
                let (outer, tail) = (inode.size & !(BLOCK - 1), inode.size % BLOCK);
                let mut content = if outer > 0 { self.read(blocks_at, outer)? } else { Vec::new() };
                content.extend(self.read(inode.end + inode.xattr_bytes(), tail)?);
                Ok(content)
            }
            _ => Err(damaged("a directory or link is stored as no writer of ours does")),
        }
    }

    /// Where a link leads.
    pub(crate) fn link_target(&self, inode: &ReadInode) -> io::Result<Vec<u8>> {
        self.content(inode)
    }

    /// A directory's names, less the two dots, with inode numbers.
    pub(crate) fn entries(&self, inode: &ReadInode) -> io::Result<Vec<(Vec<u8>, u64)>> {
        let content = self.content(inode)?;
        let mut found = Vec::new();
        for block in content.chunks(BLOCK as usize) {
            // The first name starts where the entries end.
            let count = usize::from(u16_at(block, 8)?) / 12;
            for index in 0..count {
                let start = usize::from(u16_at(block, 12 * index + 8)?);
                let end = match index + 1 {
                    next if next < count => usize::from(u16_at(block, 12 * next + 8)?),
                    _ => block.len(),
                };
                let name = block.get(start..end).ok_or_else(|| damaged("a name is cut off"))?;
                // The last name of a block ends at its first zero.
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                match name {
                    b"." | b".." => {}
                    _ if name.is_empty() || name.contains(&b'/') => {
                        return Err(damaged("a file has a name that no file can have"));
                    }
                    _ => found.push((name.to_vec(), u64_at(block, 12 * index)?)),
                }
            }
        }
        Ok(found)
    }

    /// Where a regular file's data lie, with each block's number moved up by `base`.
    pub(crate) fn data(&self, inode: &ReadInode, base: u32) -> io::Result<FileData> {
        let too_large = || damaged("a block's number is out of range");
        match inode.layout {
            _ if inode.size == 0 => Ok(FileData::Plain { block: 0 }),
            0 => Ok(FileData::Plain { block: inode.payload.checked_add(base).ok_or_else(too_large)? }),
            4 => {
                let chunk_bits = (inode.payload & 0x1f) as u8;
                if chunk_bits > MAX_CHUNK_BITS {
                    return Err(too_large());
                }
                let chunk = BLOCK << chunk_bits;
                let map_at = inode.end + inode.xattr_bytes();
                let map = self.read(map_at, inode.size.div_ceil(chunk).saturating_mul(4))?;
                let mut runs: Vec<Run> = Vec::new();
                for (index, entry) in map.as_chunks::<4>().0.iter().enumerate() {
                    let block = u32::from_le_bytes(*entry);
                    if block == NULL_BLOCK {
                        continue;
                    }
                    let (chunk, block) = (index as u32, block.checked_add(base).ok_or_else(too_large)?);
                    match runs.last_mut() {
                        Some(run) if run.is_followed_by(chunk, block, chunk_bits) => run.count += 1,
                        _ => runs.push(Run { chunk, count: 1, block }),
                    }
                }
                Ok(FileData::Chunks { chunk_bits, runs: runs.into() })
            }
            _ => Err(damaged("a file is stored as no writer of ours does")),
        }
    }
}

impl FileData {
    /// Runs of bytes of a file of `size`, which are somewhere: place in the file, place in the blob, and how many. What no
    /// run has is zeros.
    pub(crate) fn pieces(&self, size: u64) -> Vec<(u64, u64, u64)> {
        let place = |block: u32| u64::from(block) << BLOCK_BITS;
        match self {
            FileData::Plain { block } => vec![(0, place(*block), size)],
            FileData::Chunks { chunk_bits, runs } => {
                let chunk = BLOCK << chunk_bits;
                let piece = |run: &Run| {
                    let start = u64::from(run.chunk) * chunk;
                    (start, place(run.block), (u64::from(run.count) * chunk).min(size.saturating_sub(start)))
                };
                runs.iter().map(piece).collect()
            }
        }
    }
}

impl ReadInode {
    /// Of a device node, its number as it is stored.
    pub(crate) fn device_number(&self) -> u32 {
        self.payload
    }

    fn xattr_bytes(&self) -> u64 {
        match self.xattr_count {
            0 => 0,
            count => 12 + 4 * (u64::from(count) - 1),
        }
    }
}
