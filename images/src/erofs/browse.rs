//! Reading what this crate has written: inodes, directories, data and attributes of one file system, without mounting
//! it.
//!
//! It knows the part of the format that [`super::finish`] writes. A blob that was damaged on disk gives errors or
//! wrong data, but every read is bounded by the file.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use super::disk::Disk;
use super::format::{BLOCK, COMPACT_BYTES, EXTENDED_BYTES, MAGIC, NULL_BLOCK, SLOT, SUPERBLOCK_OFFSET};
use super::xattr::PREFIXES;
use crate::tar::{Timestamp, Xattr};

/// A directory's children, by name.
pub(crate) type Children = BTreeMap<Box<[u8]>, u64>;

/// A blob that is open for reading, with the devices on which its files' data lie.
#[derive(Debug)]
pub(crate) struct BlobReader {
    disk: Disk,
    /// Of the blob without its devices.
    bytes: u64,
    /// Where inode 0 would be.
    metadata: u64,
    root: u64,
    build_time: Timestamp,
    directories: Mutex<HashMap<u64, Arc<Children>>>,
}

/// An inode as it is on disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawInode {
    /// Type and permissions, as in `st_mode`.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) size: u64,
    pub(crate) links: u32,
    pub(crate) mtime: Timestamp,
    /// Of a device its number.
    pub(crate) payload: u32,
    layout: u16,
    /// Where the extended attributes start, and how long they are.
    xattrs: (u64, u64),
}

impl BlobReader {
    pub(crate) fn open(file: File, devices: Vec<File>) -> io::Result<BlobReader> {
        let bytes = file.metadata()?.len();
        let mut block = [0; 128];
        file.read_exact_at(&mut block, SUPERBLOCK_OFFSET)?;
        if u32_at(&block, 0) != MAGIC {
            return Err(damaged("it is no EROFS file system"));
        }
        Ok(BlobReader {
            bytes,
            metadata: u64::from(u32_at(&block, 40)) * BLOCK,
            root: u64::from(u16_at(&block, 14)),
            build_time: Timestamp {
                seconds: u64_at(&block, 24).cast_signed(),
                nanoseconds: u32_at(&block, 32),
            },
            directories: Mutex::default(),
            disk: Disk::new(file, devices)?,
        })
    }

    pub(crate) fn root(&self) -> u64 {
        self.root
    }

    pub(crate) fn inode(&self, number: u64) -> io::Result<RawInode> {
        let at = number.checked_mul(SLOT).and_then(|offset| offset.checked_add(self.metadata));
        let at = at.ok_or_else(|| damaged("an inode's number is too large"))?;
        let mut head = [0; EXTENDED_BYTES as usize];
        let (compact, rest) = head.split_at_mut(COMPACT_BYTES as usize);
        self.disk.read_exact_at(compact, at)?;
        let format = u16_at(compact, 0);
        let is_extended = format & 1 == 1;
        let count = u64::from(u16_at(compact, 2));
        if is_extended {
            self.disk.read_exact_at(rest, at + COMPACT_BYTES)?;
        }
        let xattr_bytes = if count == 0 { 0 } else { 12 + 4 * (count - 1) };
        let head_bytes = if is_extended { EXTENDED_BYTES } else { COMPACT_BYTES };
        let common = RawInode {
            mode: u16_at(&head, 4),
            uid: u32::from(u16_at(&head, 24)),
            gid: u32::from(u16_at(&head, 26)),
            size: u64::from(u32_at(&head, 8)),
            links: u32::from(u16_at(&head, 6)),
            mtime: self.build_time,
            payload: u32_at(&head, 16),
            layout: format >> 1 & 7,
            xattrs: (at + head_bytes, xattr_bytes),
        };
        if !is_extended {
            return Ok(common);
        }
        Ok(RawInode {
            size: u64_at(&head, 8),
            uid: u32_at(&head, 24),
            gid: u32_at(&head, 28),
            links: u32_at(&head, 44),
            mtime: Timestamp { seconds: u64_at(&head, 32).cast_signed(), nanoseconds: u32_at(&head, 40) },
            ..common
        })
    }

    /// The children of a directory, without `.` and `..`.
    pub(crate) fn children(&self, number: u64) -> io::Result<Arc<Children>> {
        let known = self.directories.lock().unwrap_or_else(PoisonError::into_inner).get(&number).cloned();
        if let Some(children) = known {
            return Ok(children);
        }
        let content = self.content(&self.inode(number)?)?;
        let mut children = Children::new();
        for block in content.chunks(BLOCK as usize) {
            let first = usize::from(u16_at(block, 8));
            let count = first / 12;
            for index in 0..count {
                let at = index * 12;
                let start = usize::from(u16_at(block, at + 8));
                let end = match index + 1 < count {
                    true => usize::from(u16_at(block, at + 12 + 8)),
                    false => block.len(),
                };
                let name = block.get(start..end).ok_or_else(|| damaged("a directory is malformed"))?;
                let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
                if !matches!(name, b"." | b"..") {
                    children.insert(name.into(), u64_at(block, at));
                }
            }
        }
        let children = Arc::new(children);
        let mut directories = self.directories.lock().unwrap_or_else(PoisonError::into_inner);
        directories.insert(number, Arc::clone(&children));
        Ok(children)
    }

    /// The content of a directory or a symbolic link.
    pub(crate) fn content(&self, inode: &RawInode) -> io::Result<Vec<u8>> {
        if inode.size > self.bytes {
            return Err(damaged("a directory or link is longer than the file"));
        }
        let mut content = vec![0; inode.size as usize];
        let whole = match inode.layout {
            2 => inode.size - inode.size % BLOCK,
            _ => inode.size,
        };
        let (outer, inline) = content.split_at_mut(whole as usize);
        self.disk.read_exact_at(outer, u64::from(inode.payload) * BLOCK)?;
        self.disk.read_exact_at(inline, inode.xattrs.0 + inode.xattrs.1)?;
        Ok(content)
    }

    /// All extended attributes, overlayfs' own included.
    pub(crate) fn xattrs(&self, inode: &RawInode) -> io::Result<Vec<Xattr>> {
        let (at, bytes) = inode.xattrs;
        let mut area = vec![0; bytes as usize];
        self.disk.read_exact_at(&mut area, at)?;
        let mut rest = area.get(12..).unwrap_or_default();
        let mut found = Vec::new();
        while let [name_bytes, prefix, low, high, ..] = *rest {
            let (name_bytes, value_bytes) =
                (usize::from(name_bytes), usize::from(u16::from_le_bytes([low, high])));
            let prefix = PREFIXES.iter().find(|(_, number)| *number == prefix).map(|(prefix, _)| *prefix);
            let name = rest.get(4..4 + name_bytes);
            let value = rest.get(4 + name_bytes..4 + name_bytes + value_bytes);
            let (Some(prefix), Some(name), Some(value)) = (prefix, name, value) else {
                return Err(damaged("an extended attribute is malformed"));
            };
            found.push(([prefix, name].concat(), value.to_vec()));
            let next = (4 + name_bytes + value_bytes).next_multiple_of(4);
            rest = rest.get(next..).unwrap_or_default();
        }
        Ok(found)
    }

    /// Where a regular file has data, by offset and length: in order, apart from each other, and with holes between them.
    pub(crate) fn extents(&self, inode: &RawInode) -> io::Result<Vec<(u64, u64)>> {
        if inode.layout != 4 {
            return Ok(vec![(0, inode.size)]);
        }
        let chunk_bytes = BLOCK << (inode.payload & 0x1f);
        let mut extents: Vec<(u64, u64)> = Vec::new();
        for number in 0..inode.size.div_ceil(chunk_bytes) {
            let mut entry = [0; 4];
            self.disk.read_exact_at(&mut entry, inode.xattrs.0 + inode.xattrs.1 + 4 * number)?;
            if u32::from_le_bytes(entry) == NULL_BLOCK {
                continue;
            }
            let start = number * chunk_bytes;
            let length = chunk_bytes.min(inode.size - start);
            match extents.last_mut() {
                Some((before, bytes)) if *before + *bytes == start => *bytes += length,
                _ => extents.push((start, length)),
            }
        }
        Ok(extents)
    }

    /// Reads a regular file's data at an offset into a buffer that ends within the file.
    fn read_at(&self, inode: &RawInode, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if inode.layout != 4 {
            return self.disk.read_exact_at(buffer, u64::from(inode.payload) * BLOCK + offset);
        }
        let chunk_bytes = BLOCK << (inode.payload & 0x1f);
        let map = inode.xattrs.0 + inode.xattrs.1;
        let mut position = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let within = position % chunk_bytes;
            let step = (chunk_bytes - within).min(rest.len() as u64);
            let (now, later) = rest.split_at_mut(step as usize);
            let mut entry = [0; 4];
            self.disk.read_exact_at(&mut entry, map + 4 * (position / chunk_bytes))?;
            match u32::from_le_bytes(entry) {
                NULL_BLOCK => now.fill(0),
                block => self.disk.read_exact_at(now, u64::from(block) * BLOCK + within)?,
            }
            position += step;
            rest = later;
        }
        Ok(())
    }
}

/// A regular file's data, from its start.
pub(crate) struct Data<'a> {
    blob: &'a BlobReader,
    inode: RawInode,
    position: u64,
}

impl<'a> Data<'a> {
    pub(crate) fn new(blob: &'a BlobReader, inode: RawInode) -> Data<'a> {
        Data { blob, inode, position: 0 }
    }

    /// What is at a place in it, and of that length.
    pub(crate) fn part(blob: &'a BlobReader, inode: RawInode, (offset, bytes): (u64, u64)) -> impl Read {
        Data { blob, inode, position: offset }.take(bytes)
    }
}

impl Read for Data<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = (self.inode.size - self.position).min(buffer.len() as u64) as usize;
        let piece = buffer.get_mut(..count).unwrap_or_default();
        self.blob.read_at(&self.inode, piece, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the layer is damaged: {what}"))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}
