//! Filling an empty volume with what the image has where the volume is mounted: files, directories, symbolic links,
//! FIFOs and sockets with their owners, modes, times and extended attributes. Device nodes are left out, and hard links
//! become files of their own.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, chownat,
        fchmod, fgetxattr, flistxattr, fsetxattr, fstat, mkdirat, mknodat, openat, readlinkat, statat,
        symlinkat, utimensat,
    },
    io::{Errno, read, retry_on_intr, write},
};

use super::paths;
use crate::procfs;

/// Copies what is in `place` into `volume`, if both are directories and that is empty. What the kernel tells there, to
/// where a link of the image may lead, is no data of the image's.
pub(super) fn fill(place: BorrowedFd<'_>, volume: BorrowedFd<'_>) -> io::Result<()> {
    if !paths::is_directory(place)? {
        return Ok(());
    }
    if procfs::is_kernels(place)? {
        return Err(io::Error::other(
            "it leads into files of the kernel's, which are not the image's to copy",
        ));
    }
    let (from, to) = (open_directory(place, c".")?, open_directory(volume, c".")?);
    if !names(&to)?.is_empty() {
        return Ok(());
    }
    let device = fstat(&from)?.st_dev;
    copy_directory(&from, &to, device)
}

fn open_directory(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

fn names(directory: &OwnedFd) -> io::Result<Vec<std::ffi::CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

/// Of what is mounted in there, only that there is a directory: `device` is that of the image's directories (overlayfs.rst).
fn copy_directory(from: &OwnedFd, to: &OwnedFd, device: u64) -> io::Result<()> {
    for name in names(from)? {
        let stat = statat(from, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(to, &name, Mode::RWXU)?;
                let (from, to) = (open_directory(from.as_fd(), &name)?, open_directory(to.as_fd(), &name)?);
                if fstat(&from)?.st_dev == device {
                    copy_directory(&from, &to, device)?;
                }
                continue;
            }
            FileType::RegularFile => copy_file(from, to, &name, &stat)?,
            FileType::Symlink => {
                symlinkat(readlinkat(from, &name, Vec::new())?, to, &name)?;
                own(to, &name, &stat)?;
            }
            kind @ (FileType::Fifo | FileType::Socket) => {
                mknodat(to, &name, kind, Mode::from_raw_mode(stat.st_mode & 0o7777), 0)?;
                own(to, &name, &stat)?;
            }
            _ => continue,
        }
        utimensat(to, &name, &times(&stat), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    let stat = fstat(from)?;
    own(to, c".", &stat)?;
    fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    copy_attributes(from, to)?;
    Ok(utimensat(to, c".", &times(&stat), AtFlags::empty())?)
}

fn copy_file(from: &OwnedFd, to: &OwnedFd, name: &CStr, stat: &Stat) -> io::Result<()> {
    const CHUNK_BYTES: usize = 128 << 10;
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Whoever shares the directory may have put something else there, and a FIFO must not block.
    let source = openat(from, name, OFlags::RDONLY | OFlags::NONBLOCK | flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&source)?.st_mode) != FileType::RegularFile {
        return Err(Errno::STALE.into());
    }
    let target = openat(to, name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | flags, Mode::RUSR)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let length = retry_on_intr(|| read(&source, chunk.as_mut_slice()))?;
        let mut rest = chunk.get(..length).unwrap_or_default();
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            let written = retry_on_intr(|| write(&target, rest))?;
            rest = rest.get(written..).unwrap_or_default();
        }
    }
    own(to, name, stat)?;
    fchmod(&target, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    copy_attributes(&source, &target)
}

fn own(parent: &OwnedFd, name: &CStr, stat: &Stat) -> Result<(), Errno> {
    let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(parent, name, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)
}

fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    }
}

/// Those that the other file system knows.
fn copy_attributes(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    const MAX_BYTES: usize = 64 << 10;
    let mut list = vec![0; MAX_BYTES];
    let length = match flistxattr(from, list.as_mut_slice()) {
        Err(Errno::NOTSUP) => return Ok(()),
        result => result?,
    };
    let list = list.get(..length).unwrap_or_default();
    for name in list.split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
        let mut value = vec![0; MAX_BYTES];
        let length = fgetxattr(from, name, value.as_mut_slice())?;
        match fsetxattr(to, name, value.get(..length).unwrap_or_default(), XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
