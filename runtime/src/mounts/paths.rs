//! Paths inside the container's root. The image and, through shared volumes, other containers choose what is
//! there, so a path is resolved once, by the kernel, without leaving the root and without magic links such as
//! `/proc/self/fd/N`; whatever is done then is done to the descriptor, not to the name again.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, mknodat, openat2, readlinkat},
    io::Errno,
};

/// Whether symbolic links may lead to the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Symlinks {
    /// As far as they stay inside the root.
    Follow,
    /// Not at all.
    Refuse,
}

/// What to make where nothing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Make {
    Directory,
    EmptyFile,
}

/// Opens a file of the container, for use as a place only (`O_PATH`).
pub(crate) fn open(root: BorrowedFd<'_>, path: &Path, symlinks: Symlinks) -> Result<OwnedFd, Errno> {
    /// The kernel gives up with EAGAIN if something on the path is renamed meanwhile.
    const ATTEMPTS: u32 = 32;
    let mut resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    if symlinks == Symlinks::Refuse {
        resolve |= ResolveFlags::NO_SYMLINKS;
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    for _ in 1..ATTEMPTS {
        match openat2(root, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN) => {}
            result => return result,
        }
    }
    openat2(root, path, flags, Mode::empty(), resolve)
}

/// Opens a file of the container, and makes it and the directories above it where they are missing; that to which a
/// symbolic link leads, if it is not there.
pub(crate) fn open_or_make(
    root: BorrowedFd<'_>,
    path: &Path,
    symlinks: Symlinks,
    make: Make,
) -> io::Result<OwnedFd> {
    /// As many as the kernel follows (path_resolution(7)).
    const LINKS: u32 = 40;
    let mut path = path.to_owned();
    for _ in 0..=LINKS {
        match open(root, &path, symlinks) {
            Err(Errno::NOENT) => {}
            result => return Ok(result?),
        }
        match make_along(root, &path, symlinks, make)? {
            Reached::End(file) => return Ok(file),
            Reached::Link(onward) => path = onward,
        }
    }
    Err(Errno::LOOP.into())
}

/// How far [`make_along`] came.
enum Reached {
    End(OwnedFd),
    /// To a symbolic link whose target is not there; the path with the target in the link's place.
    Link(PathBuf),
}

fn make_along(root: BorrowedFd<'_>, path: &Path, symlinks: Symlinks, make: Make) -> io::Result<Reached> {
    let mut reached = PathBuf::from("/");
    let mut directory = open(root, &reached, symlinks)?;
    let mut names = path.components();
    while let Some(name) = names.next() {
        if !matches!(name, Component::Normal(_) | Component::ParentDir) {
            continue;
        }
        let above = reached.clone();
        reached.push(name);
        directory = match open(root, &reached, symlinks) {
            Err(Errno::NOENT) => {
                let name: &Path = name.as_ref();
                let is_last = names.as_path().as_os_str().is_empty();
                let made = match make {
                    Make::EmptyFile if is_last => {
                        mknodat(&directory, name, FileType::RegularFile, Mode::from_raw_mode(0o644), 0)
                    }
                    _ => mkdirat(&directory, name, Mode::from_raw_mode(0o755)),
                };
                match made {
                    Ok(()) => open(root, &reached, symlinks)?,
                    // Somebody was faster, or it is a link that leads nowhere.
                    Err(Errno::EXIST) => match readlinkat(&directory, name, Vec::new()) {
                        Ok(target) => {
                            let target = OsString::from_vec(target.into_bytes());
                            return Ok(Reached::Link(above.join(target).join(names.as_path())));
                        }
                        Err(_) => open(root, &reached, symlinks)?,
                    },
                    Err(errno) => return Err(errno.into()),
                }
            }
            result => result?,
        };
    }
    Ok(Reached::End(directory))
}

/// Opens for use a file of which `stat` was taken before: the same file, or nothing.
pub(crate) fn reopen(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    stat: &rustix::fs::Stat,
) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    let file = openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    let opened = fstat(&file)?;
    let is_same = (opened.st_dev, opened.st_ino) == (stat.st_dev, stat.st_ino);
    if is_same { Ok(file) } else { Err(Errno::STALE) }
}

/// Reads a regular file of the container, at most `max_bytes` of it.
pub(crate) fn read(root: BorrowedFd<'_>, path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    // A FIFO must not block, and a terminal must not become ours.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = openat2(root, path, flags, Mode::empty(), resolve)?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    File::from(file).take(max_bytes).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whether the descriptor is of a directory.
pub(crate) fn is_directory(file: impl AsFd) -> Result<bool, Errno> {
    Ok(FileType::from_raw_mode(fstat(file)?.st_mode) == FileType::Directory)
}
