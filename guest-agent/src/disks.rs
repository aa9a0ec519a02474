//! How the layers' disks are read. Each request costs the guest two or three VM exits and the host as many switches
//! between threads, as much as copying some hundred KiB; so few large ones are better than many small ones.

use std::{
    fs::File,
    io,
    num::NonZeroU64,
    os::{fd::AsFd, unix::fs::FileExt},
};

use rustix::fs::{Advice, fadvise};

use crate::syscalls;

/// What the kernel reads around a page that is missing; its own value is 128 KiB.
const READ_AHEAD_BYTES: u32 = 512 << 10;
/// The first of a layer's inodes and directories; the kernel itself reads them block by block.
const METADATA_BYTES: u64 = 64 << 10;

/// Prepares one disk. That fails on nothing that a start needs.
pub fn prepare(path: &str) {
    let _ = File::open(path).and_then(|disk| {
        syscalls::set_read_ahead(disk.as_fd(), READ_AHEAD_BYTES)?;
        let mut superblock = [0; 1152];
        disk.read_exact_at(&mut superblock, 0)?;
        if let Some(start) = metadata_start(&superblock) {
            fadvise(&disk, start, NonZeroU64::new(METADATA_BYTES), Advice::WillNeed)?;
        }
        io::Result::Ok(())
    });
}

/// Where the inodes start on a disk that begins like this, if it is EROFS (Linux `fs/erofs/erofs_fs.h`,
/// `struct erofs_super_block` at byte 1024).
fn metadata_start(disk: &[u8]) -> Option<u64> {
    const MAGIC: u32 = 0xe0f5_e1e2;
    let superblock = disk.get(1024..)?;
    let word = |at: usize| superblock.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let block_bits = u32::from(*superblock.get(12)?);
    let start = u64::from(word(40)?).checked_shl(block_bits)?;
    (word(0)? == MAGIC).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_of_other_disks_is_not_looked_for() {
        let mut disk = [0; 1152];
        assert_eq!(metadata_start(&disk), None);
        assert_eq!(metadata_start(&disk[..1030]), None);
        disk[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        disk[1036] = 12;
        disk[1064] = 3;
        assert_eq!(metadata_start(&disk), Some(3 << 12));
        disk[1036] = 64;
        assert_eq!(metadata_start(&disk), None);
    }
}
