//! A file or block device as a disk.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::fd::AsFd,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
};

use rustix::io::Errno;
use vm_memory::VolatileSlice;

use crate::guest_memory;

/// Bytes of a sector, the unit of a disk's size and of positions on it.
pub const SECTOR_BYTES: u64 = 512;

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
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
    /// A directory, a pipe, …
    #[error("it is neither a regular file nor a block device")]
    Kind,
    /// No sector at all.
    #[error("it has {bytes} bytes, and a disk has at least {SECTOR_BYTES}")]
    Empty {
        /// Its size.
        bytes: u64,
    },
}

impl Disk {
    /// Opens a disk. A last, partial sector is not part of it.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Open { read_only, source };
        // Without O_NONBLOCK, opening a pipe would wait for a writer.
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind);
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let sectors = bytes / SECTOR_BYTES;
        if sectors == 0 {
            return Err(DiskError::Empty { bytes });
        }
        Ok(Self { file, sectors, read_only })
    }

    /// Size in sectors; at least 1.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether writing fails.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Fills all of `buffers` from the position `offset` in bytes.
    pub fn read(&self, buffers: &[VolatileSlice], offset: u64) -> io::Result<()> {
        complete(buffers, offset, |rest, at| guest_memory::read_at(self.file.as_fd(), rest, at))
    }

    /// Writes all of `buffers` to the position `offset` in bytes.
    pub fn write(&self, buffers: &[VolatileSlice], offset: u64) -> io::Result<()> {
        complete(buffers, offset, |rest, at| guest_memory::write_at(self.file.as_fd(), rest, at))
    }

    /// Makes what was written durable.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }
}

/// Repeats `transfer` until it has moved all bytes of `buffers`.
fn complete(
    buffers: &[VolatileSlice],
    mut offset: u64,
    transfer: impl Fn(&[VolatileSlice], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let mut rest = buffers.to_vec();
    while !rest.is_empty() {
        let mut moved = transfer(&rest, offset)?;
        if moved == 0 {
            // The file became shorter than the disk that it was.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        offset = offset.saturating_add(moved as u64);
        let mut left = Vec::new();
        for slice in rest {
            let skipped = moved.min(slice.len());
            moved -= skipped;
            if skipped < slice.len() {
                left.push(slice.offset(skipped).map_err(|_| Errno::FAULT)?);
            }
        }
        rest = left;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;

    fn file(bytes: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..bytes).map(|index| index as u8).collect();
        file.write_all(&content).unwrap();
        file
    }

    #[test]
    fn open_of_file_rounds_size_down_to_sectors() {
        assert_eq!(Disk::open(file(1500).path(), true).unwrap().sectors(), 2);
    }

    #[test]
    fn open_of_what_is_no_disk_fails() {
        assert!(matches!(Disk::open(file(511).path(), true), Err(DiskError::Empty { bytes: 511 })));
        assert!(matches!(Disk::open(Path::new("/dev/null"), true), Err(DiskError::Kind)));
        assert!(matches!(Disk::open(Path::new("/"), true), Err(DiskError::Kind)));
        assert!(matches!(Disk::open(Path::new("/no/such"), true), Err(DiskError::Open { .. })));
    }

    #[test]
    fn read_past_a_truncated_file_fails_without_spinning() {
        let file = file(1024);
        let disk = Disk::open(file.path(), false).unwrap();
        let memory = guest_memory::map(&[(GuestAddress(0), 4096)]).unwrap();
        let buffer = [memory.get_slice(GuestAddress(0), 1024).unwrap()];
        disk.read(&buffer, 0).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(700)).unwrap(), 700u16 as u8);
        disk.write(&buffer, 0).unwrap();
        disk.flush().unwrap();
        file.as_file().set_len(600).unwrap();
        assert_eq!(disk.read(&buffer, 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
