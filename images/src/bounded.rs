//! Files of the store that hostile input decides the size of.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

use crate::limits::{MAX_LAYER_BYTES, RESERVED_DISK_BYTES};

/// Bytes between two looks at how much space is left.
const SPACE_CHECK: u64 = RESERVED_DISK_BYTES / 4;

/// Writes to a file at most what a layer may have, and leaves the file system some space.
#[derive(Debug)]
pub struct Bounded {
    file: File,
    left: u64,
    until_check: u64,
}

impl Bounded {
    /// Writes from where the file is.
    pub fn new(file: File) -> Bounded {
        Bounded { file, left: MAX_LAYER_BYTES, until_check: 0 }
    }

    /// The file.
    pub fn into_inner(self) -> File {
        self.file
    }
}

impl Write for Bounded {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let piece = piece.get(..SPACE_CHECK as usize).unwrap_or(piece);
        let bytes = piece.len() as u64;
        self.left = self.left.checked_sub(bytes).ok_or_else(too_large)?;
        if self.until_check < bytes {
            let stat = rustix::fs::fstatvfs(&self.file)?;
            if stat.f_bavail.saturating_mul(stat.f_frsize) < RESERVED_DISK_BYTES {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.until_check = SPACE_CHECK;
        }
        self.until_check -= bytes;
        let written = self.file.write(piece)?;
        self.left += bytes - written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Bounded {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Counts the sizes of files, which may be sparse and so say nothing of what is on a disk.
#[derive(Debug)]
pub struct Sizes(u64);

impl Default for Sizes {
    fn default() -> Self {
        Sizes(MAX_LAYER_BYTES)
    }
}

impl Sizes {
    /// One more file; fails once they are more than a layer may have.
    pub fn add(&mut self, bytes: u64) -> io::Result<()> {
        self.0 = self.0.checked_sub(bytes).ok_or_else(too_large)?;
        Ok(())
    }
}

pub(crate) fn too_large() -> io::Error {
    let limit = MAX_LAYER_BYTES >> 30;
    let text =
        format!("the files have more than {limit} GiB together, holes included; a layer can have no more");
    io::Error::new(io::ErrorKind::FileTooLarge, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_written_than_a_layer_may_have() {
        let mut bounded = Bounded::new(tempfile::tempfile().unwrap());
        bounded.write_all(&[1; 1000]).unwrap();
        assert_eq!(bounded.left, MAX_LAYER_BYTES - 1000);
        bounded.left = 10;
        assert_eq!(bounded.write_all(&[1; 11]).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        bounded.write_all(&[1; 10]).unwrap();
        assert_eq!(bounded.into_inner().metadata().unwrap().len(), 1010);
        let mut sizes = Sizes::default();
        sizes.add(MAX_LAYER_BYTES).unwrap();
        assert!(sizes.add(1).is_err());
    }
}
