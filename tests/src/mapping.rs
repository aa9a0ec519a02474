//! Memory that is a file's, which no safe wrapper offers.
#![allow(unsafe_code)]

use std::fs::File;

use anyhow::{Result, ensure};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

/// Maps the first `length` bytes of a file, shared, and writes `bytes` at `offset` through the mapping.
pub fn change(file: &File, length: usize, offset: usize, bytes: &[u8]) -> Result<()> {
    ensure!(offset + bytes.len() <= length, "outside of the mapping");
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
    let mapped = unsafe { mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, file, 0) }?;
    // SAFETY: offset and bytes lie inside of the mapping, as checked above.
    let target = unsafe { mapped.cast::<u8>().add(offset) };
    // SAFETY: `target` is writable for these bytes, which lie elsewhere.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    // SAFETY: the range is the mapping's.
    unsafe { msync(mapped, length, MsyncFlags::SYNC) }?;
    // SAFETY: nothing refers to the mapping any more.
    unsafe { munmap(mapped, length) }?;
    Ok(())
}
