//! A file system in several files, one behind the other as on one disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The superblock's file, and then its devices in order.
#[derive(Debug)]
pub(crate) struct Disk {
    /// With where each starts.
    files: Vec<(u64, File)>,
}

impl Disk {
    pub(crate) fn new(first: File, devices: Vec<File>) -> io::Result<Disk> {
        let mut start = 0;
        let mut files = Vec::new();
        for file in std::iter::once(first).chain(devices) {
            let bytes = file.metadata()?.len();
            files.push((start, file));
            start += bytes;
        }
        Ok(Disk { files })
    }

    /// The file in which an offset is, and where in it. What is written together is in one file.
    pub(crate) fn place(&self, offset: u64) -> io::Result<(&File, u64)> {
        let place = self.files.iter().rev().find(|(start, _)| *start <= offset);
        place.map(|(start, file)| (file, offset - start)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    pub(super) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let (file, at) = self.place(offset)?;
        file.read_exact_at(buffer, at)
    }
}
