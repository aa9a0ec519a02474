//! Where the initramfs goes, and how its parts get there.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    ops::Range,
    path::{Path, PathBuf},
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::{guest_memory::GuestMemory, syscalls};

/// Each archive starts at a multiple of this; the kernel skips zeros between archives
/// (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
const PART_ALIGNMENT: u64 = 4;
const PAGE: u64 = 4096;

/// A cpio archive that was opened but not yet read.
#[derive(Debug)]
pub enum Part<'a> {
    /// In this process's memory.
    Bytes(&'a [u8]),
    /// A file of this size; read straight into guest memory.
    File {
        /// For messages.
        path: PathBuf,
        /// The open file, at the part's beginning.
        file: File,
        /// The part's size when it was opened.
        bytes: u64,
    },
}

impl<'a> Part<'a> {
    /// Opens a file as a part.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let bytes = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        Ok(Self::File { path: path.to_owned(), file, bytes })
    }

    /// A constant of this program. It is read from the program's file like any other part: to map it, copy it and give
    /// its pages back would take twice as long.
    pub fn embedded(constant: &'a [u8]) -> Self {
        Self::of_executable(constant).unwrap_or(Self::Bytes(constant))
    }

    fn of_executable(constant: &[u8]) -> Option<Self> {
        let offset = syscalls::offset_in_executable(constant)?;
        let path = PathBuf::from("/proc/self/exe");
        let mut file = File::open(&path).ok()?;
        file.seek(SeekFrom::Start(offset)).ok()?;
        Some(Self::File { path, file, bytes: constant.len() as u64 })
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { bytes, .. } => *bytes,
        }
    }
}

/// Where the initramfs is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initramfs {
    /// Page-aligned guest physical address.
    pub address: GuestAddress,
    /// Size of all parts with the padding between them.
    pub bytes: u64,
}

/// Why the initramfs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// It does not fit between the kernel and the end of low memory, nor below the kernel.
    #[error(
        "an initramfs of {bytes} bytes does not fit: the kernel needs memory from {:#x} up to {:#x} and memory \
         ends at {limit:#x}; give the guest more memory", kernel.start, kernel.end
    )]
    TooLarge {
        /// Size of all parts.
        bytes: u64,
        /// Addresses of the kernel.
        kernel: Range<u64>,
        /// First address that the initramfs cannot use.
        limit: u64,
    },
    /// A file failed, or became shorter since it was opened.
    #[error("reading initramfs part {path:?} into guest memory failed")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<GuestMemoryError>,
    },
}

/// Loads all parts as high as possible below `limit`, or, where that is too little, below the kernel, which takes this
/// range of addresses; `None` if there is nothing to load.
pub fn load(
    memory: &GuestMemory,
    parts: Vec<Part>,
    kernel: Range<u64>,
    limit: u64,
) -> Result<Option<Initramfs>, InitramfsError> {
    let bytes = parts
        .iter()
        .try_fold(0u64, |sum, part| sum.checked_next_multiple_of(PART_ALIGNMENT)?.checked_add(part.bytes()));
    let too_large =
        || InitramfsError::TooLarge { bytes: bytes.unwrap_or(u64::MAX), kernel: kernel.clone(), limit };
    let size = bytes.ok_or_else(too_large)?;
    if size == 0 {
        return Ok(None);
    }
    let address = place(size, kernel.end, limit)
        .or_else(|| place(size, layout::HIGH_MEMORY_START, limit.min(kernel.start / PAGE * PAGE)))
        .ok_or_else(too_large)?;
    let mut at = address;
    for part in parts {
        // Guest memory is zeroed, so that skipping is padding.
        at = at.next_multiple_of(PART_ALIGNMENT);
        let end = at + part.bytes();
        let written = match part {
            Part::Bytes(part) => {
                memory.write_slice(part, GuestAddress(at)).map_err(|source| (PathBuf::new(), source))
            }
            Part::File { path, mut file, bytes } => memory
                .read_exact_volatile_from(GuestAddress(at), &mut file, bytes as usize)
                .map_err(|source| (path, source)),
        };
        written.map_err(|(path, source)| InitramfsError::Read { path, source: Box::new(source) })?;
        at = end;
    }
    Ok(Some(Initramfs { address: GuestAddress(address), bytes: size }))
}

fn place(bytes: u64, from: u64, limit: u64) -> Option<u64> {
    let limit = limit.min(layout::DEVICE_HOLE_START);
    let address = limit.checked_sub(bytes)? / PAGE * PAGE;
    (address >= from).then_some(address)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::guest_memory;

    const END: u64 = 4 << 20;

    fn memory() -> GuestMemory {
        guest_memory::map(&layout::memory_regions(END)).unwrap()
    }

    #[test]
    fn embedded_part_is_read_from_the_executable() {
        static CONSTANT: [u8; 4] = *b"moon";
        let memory = memory();
        let part = Part::embedded(&CONSTANT);
        assert!(matches!(part, Part::File { bytes: 4, .. }), "{part:?}");
        let loaded = load(&memory, vec![part, Part::Bytes(b"sun")], 0..0, END).unwrap().unwrap();
        let mut read = [0; 7];
        memory.read_slice(&mut read, loaded.address).unwrap();
        assert_eq!(read, *b"moonsun");
    }

    #[test]
    fn load_of_bytes_and_file_puts_them_high_and_aligned() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"world").unwrap();
        let memory = memory();
        let parts = vec![Part::Bytes(b"hello"), Part::open(file.path()).unwrap()];
        let initramfs = load(&memory, parts, 1 << 20..1 << 20, END).unwrap().unwrap();
        assert_eq!(initramfs, Initramfs { address: GuestAddress(END - 4096), bytes: 8 + 5 });
        let mut seen = [0; 13];
        memory.read_slice(&mut seen, initramfs.address).unwrap();
        assert_eq!(&seen, b"hello\0\0\0world");
    }

    #[test]
    fn load_of_nothing_is_none() {
        assert_eq!(load(&memory(), vec![], 0..0, END).unwrap(), None);
        assert_eq!(load(&memory(), vec![Part::Bytes(b"")], 0..0, END).unwrap(), None);
    }

    #[test]
    fn load_over_kernel_fails() {
        let kernel = layout::HIGH_MEMORY_START + 4095..END - 4095;
        let error = load(&memory(), vec![Part::Bytes(b"x")], kernel, END).unwrap_err();
        assert!(error.to_string().contains("an initramfs of 1 bytes does not fit"), "{error}");
    }

    #[test]
    fn load_without_room_above_the_kernel_goes_below_it() {
        let kernel = layout::HIGH_MEMORY_START + 4096..END;
        let loaded = load(&memory(), vec![Part::Bytes(b"x")], kernel, END).unwrap().unwrap();
        assert_eq!(loaded.address.0, layout::HIGH_MEMORY_START);
    }

    #[test]
    fn load_of_file_that_shrank_fails() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"world").unwrap();
        let part = Part::open(file.path()).unwrap();
        file.as_file().set_len(2).unwrap();
        assert!(matches!(load(&memory(), vec![part], 0..0, END), Err(InitramfsError::Read { .. })));
    }
}
