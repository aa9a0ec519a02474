//! The on-disk structures this crate writes, field by field, little-endian (kernel: `fs/erofs/erofs_fs.h`).

use crate::tar::Timestamp;

pub(super) const BLOCK_BITS: u8 = 12;
pub(super) const BLOCK: u64 = 1 << BLOCK_BITS;
pub(super) const SUPERBLOCK_OFFSET: u64 = 1024;
pub(super) const MAGIC: u32 = 0xE0F5_E1E2;

/// The superblock carries a checksum, and inode times are modification times.
const COMPAT: u32 = 0x1 | 0x2;
const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
const INCOMPAT_DEVICE_TABLE: u32 = 0x8;

/// One entry of the device table; its place is counted in these, too.
pub(super) const DEVICE_BYTES: u64 = 128;
/// Of a device's entry, the bytes that name it.
pub(crate) const DEVICE_TAG_BYTES: usize = 64;

/// Inodes are numbered in units of this many bytes from the start of the metadata.
pub(super) const SLOT: u64 = 32;
pub(super) const COMPACT_BYTES: u64 = 32;
pub(super) const EXTENDED_BYTES: u64 = 64;

/// A block address that stands for zeros.
pub(super) const NULL_BLOCK: u32 = u32::MAX;

/// Chunk size as a multiple of the block size, at most 2 to this power.
pub(super) const MAX_CHUNK_BITS: u8 = 31;

/// How an inode's data are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Layout {
    /// A run of blocks.
    Plain = 0,
    /// A run of blocks, but the last part follows the inode.
    Inline = 2,
    /// A map of block addresses follows the inode.
    Chunks = 4,
}

/// File types in directory entries.
pub(super) const FT_REGULAR: u8 = 1;
pub(super) const FT_DIRECTORY: u8 = 2;
pub(super) const FT_CHAR_DEVICE: u8 = 3;
pub(super) const FT_BLOCK_DEVICE: u8 = 4;
pub(super) const FT_FIFO: u8 = 5;
pub(super) const FT_SYMLINK: u8 = 7;

/// What a superblock says.
pub(super) struct Superblock {
    pub(super) root: u16,
    pub(super) inodes: u64,
    /// The time of compact inodes.
    pub(super) build_time: Timestamp,
    pub(super) blocks: u32,
    pub(super) metadata_block: u32,
    pub(super) uuid: [u8; 16],
    pub(super) has_chunks: bool,
    /// Entries of the device table, which starts at the second block.
    pub(super) devices: u16,
}

impl Superblock {
    /// The part of block 0 that starts at [`SUPERBLOCK_OFFSET`], whole: the checksum covers it all.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Fields::default();
        out.u32(MAGIC);
        out.u32(0); // Checksum, below.
        out.u32(COMPAT);
        out.bytes(&[BLOCK_BITS, 0]);
        out.u16(self.root);
        out.u64(self.inodes);
        out.u64(self.build_time.seconds.cast_unsigned());
        out.u32(self.build_time.nanoseconds);
        out.u32(self.blocks);
        out.u32(self.metadata_block);
        out.u32(0); // No shared extended attributes.
        out.bytes(&self.uuid);
        out.bytes(&[0; 16]); // Volume name.
        let chunks = if self.has_chunks { INCOMPAT_CHUNKED_FILE } else { 0 };
        let table = if self.devices > 0 { INCOMPAT_DEVICE_TABLE } else { 0 };
        out.u32(chunks | table);
        if self.devices > 0 {
            out.u16(0);
            out.u16(self.devices);
            out.u16((BLOCK / DEVICE_BYTES) as u16);
        }
        let mut block = out.0;
        block.resize((BLOCK - SUPERBLOCK_OFFSET) as usize, 0);
        let checksum = crc32c(&block);
        if let Some(field) = block.get_mut(4..8) {
            field.copy_from_slice(&checksum.to_le_bytes());
        }
        block
    }
}

/// What an inode says, whichever of the two forms it is written in.
pub(super) struct Inode {
    pub(super) layout: Layout,
    /// Units as in `i_xattr_icount`: 0, or 1 + the bytes after the 12-byte header / 4.
    pub(super) xattr_count: u16,
    pub(super) mode: u16,
    pub(super) links: u32,
    pub(super) size: u64,
    /// First block, device number or chunk format.
    pub(super) payload: u32,
    pub(super) number: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
}

impl Inode {
    /// Bytes of the shorter form that can say all this, given the file system's build time.
    pub(super) fn encoded_bytes(&self, build_time: Timestamp) -> u64 {
        let compact = self.mtime == build_time
            && u16::try_from(self.uid).is_ok()
            && u16::try_from(self.gid).is_ok()
            && u16::try_from(self.links).is_ok()
            && u32::try_from(self.size).is_ok();
        if compact { COMPACT_BYTES } else { EXTENDED_BYTES }
    }

    pub(super) fn encode(&self, build_time: Timestamp) -> Vec<u8> {
        let mut out = Fields::default();
        let format = (self.layout as u16) << 1;
        if self.encoded_bytes(build_time) == COMPACT_BYTES {
            // `encoded_bytes` has checked that each fits.
            out.u16(format);
            out.u16(self.xattr_count);
            out.u16(self.mode);
            out.u16(self.links as u16);
            out.u32(self.size as u32);
            out.u32(0);
            out.u32(self.payload);
            out.u32(self.number);
            out.u16(self.uid as u16);
            out.u16(self.gid as u16);
            out.u32(0);
        } else {
            out.u16(format | 1);
            out.u16(self.xattr_count);
            out.u16(self.mode);
            out.u16(0);
            out.u64(self.size);
            out.u32(self.payload);
            out.u32(self.number);
            out.u32(self.uid);
            out.u32(self.gid);
            out.u64(self.mtime.seconds.cast_unsigned());
            out.u32(self.mtime.nanoseconds);
            out.u32(self.links);
            out.bytes(&[0; 16]);
        }
        out.0
    }
}

/// A file system whose blocks follow those of this one, in one space of block numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Device {
    /// Names it; nothing that is all zeros.
    pub(crate) tag: [u8; DEVICE_TAG_BYTES],
    pub(crate) blocks: u32,
}

impl Device {
    /// The entry of a device whose blocks start at this number.
    pub(super) fn encode(&self, start: u32) -> Vec<u8> {
        let mut out = Fields::default();
        out.bytes(&self.tag);
        out.u32(self.blocks);
        out.u32(start);
        out.0.resize(DEVICE_BYTES as usize, 0);
        out.0
    }
}

/// Appends little-endian fields.
#[derive(Default)]
pub(super) struct Fields(pub(super) Vec<u8>);

impl Fields {
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }
}

/// CRC-32C with initial value ~0 and no final inversion, as the kernel's `crc32c(~0, …)`.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82F6_3B78 } else { 0 })
    })
}

/// A device number as inodes hold it: the kernel's `new_encode_dev`, 12 bits of major and 20 of minor.
pub(crate) fn encode_device(major: u32, minor: u32) -> Option<u32> {
    if major >> 12 != 0 || minor >> 20 != 0 {
        return None;
    }
    Some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_of_the_standard_check_string_is_the_known_one() {
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn device_number_beyond_its_bits_is_refused() {
        assert_eq!(encode_device(1, 3), Some(0x103));
        assert_eq!(encode_device(0xfff, 0xfffff), Some(u32::MAX));
        assert_eq!(encode_device(0x1000, 0), None);
        assert_eq!(encode_device(0, 0x10_0000), None);
    }
}
