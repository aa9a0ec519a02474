//! A small reader of EROFS blobs, written from the format's description and not from the writer under test. It reads
//! whole trees and trusts nothing to be consistent: what is not as it should be is an error.

use std::collections::BTreeMap;

use crate::bed::Failure;

const BLOCK: usize = 4096;

/// What is read of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub links: u32,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub inode: u64,
    pub content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    Directory,
    Bytes(Vec<u8>),
    Device(u32),
    Nothing,
}

/// Reads all files of a blob by their paths; the root is the empty path.
pub fn read(blob: &[u8]) -> Result<BTreeMap<Vec<u8>, File>, Failure> {
    let blob = Blob(blob);
    let superblock = blob.at(1024, 128)?;
    let fields = Blob(superblock);
    if fields.u32(0)? != 0xE0F5_E1E2 || fields.u8(12)? != 12 {
        return Err("not an EROFS of 4 KiB blocks".into());
    }
    let mut blocks = fields.u32(36)? as usize;
    // The table of devices, whose blocks follow in the same order.
    for index in 0..usize::from(fields.u16(86)?) {
        let device = Blob(blob.at((usize::from(fields.u16(88)?) + index) * 128, 128)?);
        if device.u32(68)? as usize != blocks {
            return Err("a device does not start where the one before it ends".into());
        }
        blocks += device.u32(64)? as usize;
    }
    if blob.0.len() != blocks * BLOCK {
        return Err("the length is not what the superblock says".into());
    }
    let reader = Reader {
        blob,
        metadata: fields.u32(40)? as usize * BLOCK,
        build_time: (fields.u64(24)?.cast_signed(), fields.u32(32)?),
    };
    let root = u64::from(fields.u16(14)?);
    let mut files = BTreeMap::new();
    let mut pending = vec![(Vec::new(), root, root)];
    let mut inodes = std::collections::BTreeSet::new();
    while let Some((path, number, parent)) = pending.pop() {
        let inode = reader.inode(number)?;
        inodes.insert(number);
        if inode.file.content == Content::Directory {
            for (name, child) in reader.directory(&inode, number, parent)? {
                let path = if path.is_empty() { name } else { [path.as_slice(), b"/", &name].concat() };
                pending.push((path, child, number));
            }
        }
        files.insert(path, inode.file);
    }
    if inodes.len() as u64 != fields.u64(16)? {
        return Err("the number of inodes is not what the superblock says".into());
    }
    Ok(files)
}

/// Checked access to bytes.
struct Blob<'a>(&'a [u8]);

impl<'a> Blob<'a> {
    fn at(&self, offset: usize, length: usize) -> Result<&'a [u8], Failure> {
        self.0
            .get(offset..offset + length)
            .ok_or_else(|| format!("{length} bytes at {offset}: beyond the end").into())
    }

    fn u8(&self, offset: usize) -> Result<u8, Failure> {
        Ok(self.at(offset, 1)?[0])
    }

    fn u16(&self, offset: usize) -> Result<u16, Failure> {
        Ok(u16::from_le_bytes(self.at(offset, 2)?.try_into()?))
    }

    fn u32(&self, offset: usize) -> Result<u32, Failure> {
        Ok(u32::from_le_bytes(self.at(offset, 4)?.try_into()?))
    }

    fn u64(&self, offset: usize) -> Result<u64, Failure> {
        Ok(u64::from_le_bytes(self.at(offset, 8)?.try_into()?))
    }
}

struct Reader<'a> {
    blob: Blob<'a>,
    metadata: usize,
    build_time: (i64, u32),
}

/// A file, and the content of a directory as it is stored.
struct Inode {
    file: File,
    stored: Vec<u8>,
}

impl Reader<'_> {
    fn inode(&self, number: u64) -> Result<Inode, Failure> {
        let blob = &self.blob;
        let at = self.metadata + number as usize * 32;
        let format = blob.u16(at)?;
        let xattr_units = usize::from(blob.u16(at + 2)?);
        let mode = blob.u16(at + 4)?;
        let payload = blob.u32(at + 16)?;
        let extended = format & 1 == 1;
        let (size, uid, gid, mtime, links, inode_bytes) = if extended {
            let mtime = (blob.u64(at + 32)?.cast_signed(), blob.u32(at + 40)?);
            (blob.u64(at + 8)?, blob.u32(at + 24)?, blob.u32(at + 28)?, mtime, blob.u32(at + 44)?, 64)
        } else {
            let (uid, gid) = (blob.u16(at + 24)?, blob.u16(at + 26)?);
            let links = u32::from(blob.u16(at + 6)?);
            (u64::from(blob.u32(at + 8)?), u32::from(uid), u32::from(gid), self.build_time, links, 32)
        };
        let xattr_bytes = if xattr_units == 0 { 0 } else { 12 + (xattr_units - 1) * 4 };
        let xattrs = self.xattrs(at + inode_bytes, xattr_bytes)?;
        let size = usize::try_from(size)?;
        let behind = at + inode_bytes + xattr_bytes;
        let (content, stored) = match mode & 0o170_000 {
            0o100_000 => (Content::Bytes(self.data(format >> 1, payload, size, behind)?), Vec::new()),
            0o120_000 => (Content::Bytes(self.data(format >> 1, payload, size, behind)?), Vec::new()),
            0o040_000 => (Content::Directory, self.data(format >> 1, payload, size, behind)?),
            0o020_000 | 0o060_000 => (Content::Device(payload), Vec::new()),
            0o010_000 => (Content::Nothing, Vec::new()),
            other => return Err(format!("inode {number} has type {other:o}").into()),
        };
        let file = File { mode, uid, gid, mtime, links, xattrs, inode: number, content };
        Ok(Inode { file, stored })
    }

    fn data(&self, layout: u16, payload: u32, size: usize, behind: usize) -> Result<Vec<u8>, Failure> {
        match layout {
            0 if size == 0 => Ok(Vec::new()),
            0 => Ok(self.blob.at(payload as usize * BLOCK, size)?.to_vec()),
            2 => {
                let tail = size % BLOCK;
                if behind / BLOCK != (behind + tail - 1) / BLOCK {
                    return Err("inline data cross a block's end".into());
                }
                let mut data = self.blob.at(payload as usize * BLOCK, size - tail)?.to_vec();
                data.extend(self.blob.at(behind, tail)?);
                Ok(data)
            }
            4 => {
                let chunk = BLOCK << (payload & 0x1f);
                let mut data = vec![0; size];
                for (index, part) in data.chunks_mut(chunk).enumerate() {
                    let block = self.blob.u32(behind + index * 4)?;
                    if block != u32::MAX {
                        part.copy_from_slice(self.blob.at(block as usize * BLOCK, part.len())?);
                    }
                }
                Ok(data)
            }
            other => Err(format!("layout {other}").into()),
        }
    }

    fn xattrs(&self, at: usize, length: usize) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Failure> {
        let mut xattrs = BTreeMap::new();
        let end = at + length;
        let mut next = at + 12;
        while length > 0 && next < end {
            let (name_length, value_length) = (self.blob.u8(next)?, self.blob.u16(next + 2)?);
            let prefix: &[u8] = match self.blob.u8(next + 1)? {
                1 => b"user.",
                2 => b"system.posix_acl_access",
                3 => b"system.posix_acl_default",
                4 => b"trusted.",
                6 => b"security.",
                other => return Err(format!("attribute prefix {other}").into()),
            };
            let name = self.blob.at(next + 4, name_length.into())?;
            let value = self.blob.at(next + 4 + usize::from(name_length), value_length.into())?;
            xattrs.insert([prefix, name].concat(), value.to_vec());
            next = (next + 4 + usize::from(name_length) + usize::from(value_length)).next_multiple_of(4);
        }
        Ok(xattrs)
    }

    /// Names and inodes of a directory, without the dots, which must be right; and all must be in order.
    fn directory(&self, inode: &Inode, number: u64, parent: u64) -> Result<Vec<(Vec<u8>, u64)>, Failure> {
        let mut entries = Vec::new();
        for block in inode.stored.chunks(BLOCK) {
            let block = Blob(block);
            let count = usize::from(block.u16(8)?) / 12;
            for index in 0..count {
                let start = usize::from(block.u16(index * 12 + 8)?);
                let end = if index + 1 < count { block.u16(index * 12 + 20)?.into() } else { block.0.len() };
                let name = block.at(start, end - start)?;
                // Only the last name of a full block is padded.
                let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
                entries.push((name.to_vec(), block.u64(index * 12)?, block.u8(index * 12 + 10)?));
            }
        }
        if !entries.is_sorted_by(|one, two| one.0 < two.0) {
            return Err("a directory is not in order".into());
        }
        let mut children = Vec::new();
        for (name, child, file_type) in entries {
            let expected = match name.as_slice() {
                b"." => number,
                b".." => parent,
                _ => child,
            };
            let mode = self.inode(child)?.file.mode;
            let type_of_mode = [0, 5, 3, 0, 2, 0, 4, 0, 1, 0, 7][usize::from(mode >> 12)];
            if child != expected || file_type != type_of_mode {
                return Err(format!("a wrong entry {:?}", String::from_utf8_lossy(&name)).into());
            }
            if name != b"." && name != b".." {
                children.push((name, child));
            }
        }
        Ok(children)
    }
}
