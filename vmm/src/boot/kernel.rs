//! Telling kernel files apart and loading them.

use std::{fs::File, os::unix::fs::FileExt};

use linux_loader::loader::{
    BzImage, Elf, KernelLoader, KernelLoaderResult, bootparam::setup_header, elf::PvhBootCapability,
};
use vm_memory::GuestAddress;

use super::{EntryPoint, bzimage, layout};
use crate::guest_memory::GuestMemory;

/// Why a kernel file cannot be booted. The caller adds the file's name.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file could not be read.
    #[error("reading its header failed")]
    Read(#[source] std::io::Error),
    /// Neither ELF nor bzImage.
    #[error("it is neither an ELF file nor a bzImage{hint}; use an uncompressed vmlinux or a bzImage")]
    Unknown {
        /// What it seems to be.
        hint: &'static str,
    },
    /// An ELF file for something else.
    #[error("it is an ELF file, but not for x86-64; use an x86-64 kernel")]
    ForeignElf,
    /// An ELF file for x86-64 that is no kernel.
    #[error(
        "it is an ELF file without a PVH entry and not linked as a kernel is; use a vmlinux or a bzImage"
    )]
    Program,
    /// No 64-bit entry.
    #[error("it is a bzImage without a 64-bit entry; use an x86-64 kernel")]
    No64BitEntry,
    /// linux-loader refused it, or it does not fit.
    #[error(
        "loading it into {memory_mib} MiB of guest memory failed ({cause}); check the file, or give the guest more memory"
    )]
    Load {
        /// Guest memory below the device hole.
        memory_mib: u64,
        /// Why. Not a `source`: its text carries its own sources'.
        cause: linux_loader::loader::Error,
    },
    /// A bzImage that unpacks to more than there is.
    #[error(
        "it unpacks up to address {end:#x}, and guest memory ends at {limit:#x}; give the guest more memory"
    )]
    TooLarge {
        /// First address after the unpacked kernel.
        end: u64,
        /// End of low memory.
        limit: u64,
    },
}

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct LoadedKernel {
    /// Where and how it is entered.
    pub entry: EntryPoint,
    /// First address of the memory that it needs before it knows of any other.
    pub start: u64,
    /// First address after that memory.
    pub end: u64,
    /// Highest address, exclusive, at which it accepts an initramfs.
    pub initramfs_limit: u64,
    /// The setup header of a kernel that is entered by Linux's own boot protocol.
    pub setup_header: Option<setup_header>,
}

/// What kind of file a kernel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// ELF for x86-64.
    Elf,
    /// bzImage.
    BzImage,
}

/// Bytes that [`Format::of`] needs.
const HEADER_BYTES: usize = 0x210;

impl Format {
    /// Tells the format from the first bytes of a file.
    fn of(header: &[u8]) -> Result<Self, KernelError> {
        let at = |offset: usize, magic: &[u8]| header.get(offset..offset + magic.len()) == Some(magic);
        if at(0, b"\x7fELF") {
            const CLASS_64_LITTLE_ENDIAN: &[u8] = &[2, 1];
            const MACHINE_X86_64: &[u8] = &[62, 0];
            let ours = at(4, CLASS_64_LITTLE_ENDIAN) && at(18, MACHINE_X86_64);
            return if ours { Ok(Self::Elf) } else { Err(KernelError::ForeignElf) };
        }
        // boot.rst: `boot_flag` and `header`.
        if at(0x1fe, &[0x55, 0xaa]) && at(0x202, b"HdrS") {
            return Ok(Self::BzImage);
        }
        let hint = match header {
            [] => " (it is empty)",
            [0x1f, 0x8b, ..] => " (it is gzip-compressed)",
            [0x28, 0xb5, 0x2f, 0xfd, ..] => " (it is zstd-compressed)",
            [0xfd, b'7', b'z', b'X', b'Z', ..] => " (it is xz-compressed)",
            [0x04, 0x22, 0x4d, 0x18, ..] | [0x02, 0x21, 0x4c, 0x18, ..] => " (it is lz4-compressed)",
            [b'M', b'Z', ..] => " (it is an EFI program)",
            _ => "",
        };
        Err(KernelError::Unknown { hint })
    }
}

/// Loads a kernel; its segments are read straight into guest memory.
pub fn load(
    memory: &GuestMemory,
    file: &mut File,
    low_memory_bytes: u64,
) -> Result<LoadedKernel, KernelError> {
    let load_error = |cause| KernelError::Load { memory_mib: low_memory_bytes >> 20, cause };
    let header = read_header(file)?;
    match Format::of(&header)? {
        Format::Elf => {
            let high = GuestAddress(layout::HIGH_MEMORY_START);
            let loaded = Elf::load(memory, None, file, Some(high)).map_err(load_error)?;
            let (entry, setup_header) = match loaded.pvh_boot_cap {
                PvhBootCapability::PvhEntryPresent(entry) => (EntryPoint::Pvh { entry }, None),
                _ if !is_linked_as_a_kernel(&header) => return Err(KernelError::Program),
                // Built without CONFIG_PVH: its ELF entry is the 64-bit one.
                _ => (EntryPoint::Linux64 { entry: loaded.kernel_load }, Some(bzimage::header_of_elf())),
            };
            Ok(LoadedKernel {
                entry,
                start: lowest_segment(&header).unwrap_or(layout::HIGH_MEMORY_START),
                end: fitting(loaded.kernel_end, low_memory_bytes)?,
                initramfs_limit: low_memory_bytes,
                setup_header,
            })
        }
        Format::BzImage => {
            let loaded = BzImage::load(memory, None, file, None).map_err(load_error)?;
            unpacked(&loaded, low_memory_bytes)
        }
    }
}

fn unpacked(loaded: &KernelLoaderResult, low_memory_bytes: u64) -> Result<LoadedKernel, KernelError> {
    // boot.rst: `xloadflags` bit 0, and the offset of the 64-bit entry from the start of the loaded part.
    const XLF_KERNEL_64: u16 = 1;
    const ENTRY_64_OFFSET: u64 = 0x200;
    let header = loaded.setup_header.ok_or(KernelError::No64BitEntry)?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64BitEntry);
    }
    // The kernel unpacks itself at its preferred address (or where it lies, if that is higher), `init_size` bytes.
    let start = loaded.kernel_load.0.max(header.pref_address);
    let end = loaded.kernel_end.max(start.saturating_add(u64::from(header.init_size)));
    Ok(LoadedKernel {
        entry: EntryPoint::Linux64 { entry: GuestAddress(loaded.kernel_load.0 + ENTRY_64_OFFSET) },
        start: loaded.kernel_load.0,
        end: fitting(end, low_memory_bytes)?,
        initramfs_limit: low_memory_bytes.min(u64::from(header.initrd_addr_max).saturating_add(1)),
        setup_header: Some(header),
    })
}

/// Where an ELF file's lowest segment goes in physical memory; `None` if its program headers are not all in the first
/// bytes of the file (elf(5)), which are given.
fn lowest_segment(file: &[u8]) -> Option<u64> {
    segments(file)?.into_iter().map(|segment| segment.physical).min()
}

/// Whether code of an ELF file runs in the upper half of addresses, where a program's never does.
fn is_linked_as_a_kernel(file: &[u8]) -> bool {
    const UPPER_HALF: u64 = 1 << 63;
    segments(file).is_some_and(|segments| segments.iter().any(|segment| segment.virtual_ >= UPPER_HALF))
}

/// Addresses of an ELF file's loaded segment.
struct Segment {
    virtual_: u64,
    physical: u64,
}

/// The loaded segments of an ELF file of 64 bits, if these bytes of it have all headers.
fn segments(file: &[u8]) -> Option<Vec<Segment>> {
    const LOAD: u32 = 1;
    let half = |at: usize| Some(u16::from_le_bytes(file.get(at..at.checked_add(2)?)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(file.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_le_bytes(file.get(at..at.checked_add(8)?)?.try_into().ok()?));
    let (first, bytes, count) = (usize::try_from(long(32)?).ok()?, usize::from(half(54)?), half(56)?);
    let mut segments = Vec::new();
    for index in 0..usize::from(count) {
        let header = first.checked_add(index.checked_mul(bytes)?)?;
        let (virtual_, physical) = (long(header.checked_add(16)?)?, long(header.checked_add(24)?)?);
        if word(header)? == LOAD {
            segments.push(Segment { virtual_, physical });
        }
    }
    Some(segments)
}

fn fitting(end: u64, limit: u64) -> Result<u64, KernelError> {
    if end > limit { Err(KernelError::TooLarge { end, limit }) } else { Ok(end) }
}

fn read_header(file: &File) -> Result<Vec<u8>, KernelError> {
    let mut header = vec![0; HEADER_BYTES];
    let mut filled = 0;
    while let Some(rest) = header.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, filled as u64).map_err(KernelError::Read)? {
            0 => break,
            count => filled += count,
        }
    }
    header.truncate(filled);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::guest_memory;

    fn load_bytes(bytes: &[u8]) -> KernelError {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let memory = guest_memory::map(&layout::memory_regions(4 << 20)).unwrap();
        load(&memory, &mut file, 4 << 20).unwrap_err()
    }

    fn elf_header(class: u8, machine: u8) -> Vec<u8> {
        let mut header = vec![0; 64];
        header[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1]);
        header[18] = machine;
        header
    }

    fn bzimage_header() -> Vec<u8> {
        let mut header = vec![0; 0x400];
        header[0x1f1] = 1;
        header[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        header[0x202..0x206].copy_from_slice(b"HdrS");
        header[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        header[0x211] = 1;
        header[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        header
    }

    #[test]
    fn load_of_other_file_says_what_it_seems_to_be() {
        for (bytes, hint) in [
            (&b""[..], "empty"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"\x28\xb5\x2f\xfd", "zstd"),
            (b"MZ", "EFI"),
            (b"#!/bin/sh", "bzImage; use"),
        ] {
            let error = load_bytes(bytes).to_string();
            assert!(error.contains(hint), "{error}");
        }
        assert!(matches!(load_bytes(&elf_header(1, 3)), KernelError::ForeignElf));
        assert!(matches!(load_bytes(&elf_header(2, 183)), KernelError::ForeignElf));
    }

    #[test]
    fn lowest_segment_is_found_only_in_headers_that_are_there() {
        let mut header = elf_header(2, 62);
        header[32] = 64;
        header[54] = 56;
        header[56] = 3;
        for (kind, address) in [(1u32, 0x200_0000u64), (1, 0x100_0000), (4, 0)] {
            let at = header.len();
            header.resize(at + 56, 0);
            header[at..at + 4].copy_from_slice(&kind.to_le_bytes());
            header[at + 24..at + 32].copy_from_slice(&address.to_le_bytes());
        }
        assert_eq!(lowest_segment(&header), Some(0x100_0000));
        assert_eq!(lowest_segment(&header[..200]), None);
        assert!(!is_linked_as_a_kernel(&header));
        header[64 + 16..64 + 24].copy_from_slice(&0xffff_ffff_8200_0000_u64.to_le_bytes());
        assert!(is_linked_as_a_kernel(&header));
        header[32..40].fill(0xff);
        assert_eq!(lowest_segment(&header), None);
    }

    #[test]
    fn load_of_torn_elf_fails() {
        assert!(matches!(load_bytes(&elf_header(2, 62)), KernelError::Load { .. }));
        assert!(matches!(load_bytes(&elf_header(2, 62)[..20]), KernelError::Load { .. }));
    }

    #[test]
    fn load_of_bzimage_checks_entry_and_size() {
        assert!(matches!(load_bytes(&bzimage_header()), KernelError::No64BitEntry));
        let mut large = bzimage_header();
        large[0x236] = 1;
        large[0x260..0x264].copy_from_slice(&(64u32 << 20).to_le_bytes());
        assert!(matches!(load_bytes(&large), KernelError::TooLarge { limit: 0x40_0000, .. }));
    }
}
