//! An image's file system as a directory tree, for who may not mount it: a plain user, as root of a user namespace of
//! its own. What is unpacked is what the layers are merged to, so that they mean here what they mean everywhere; the
//! tree is the one lower directory of an overlay.
//!
//! What such a user cannot make is not made, and counted:
//!
//! * Device nodes. (A container could not open them anyway: it gets the devices of its spec, whatever the image has.)
//! * Attributes `trusted.*`, which nobody in a user namespace can see, and `security.*` but capabilities.
//! * Access control lists, where no owners are kept: the users and groups in them are none of this user's either.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat,
    fchmod, fchown, fsetxattr, ftruncate, futimens, linkat, mkdirat, mknodat, openat, symlinkat, utimensat,
};
use rustix::io::Errno;

use crate::erofs::{Disk, ReadInode, Reader};
use crate::rootfs::RootFs;
use crate::tar::shown;

/// Why an image could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// A file of the image's cannot be read.
    #[error("cannot read the image's file {path}")]
    Read {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A user or group of the image is not one of this user's.
    #[error(
        "cannot give {file} to user {uid} and group {gid} of the image, which are beyond this user's ids; \
         give this user more in /etc/subuid and /etc/subgid"
    )]
    Owner {
        /// The file, quoted.
        file: String,
        /// Its owner in the image.
        uid: u32,
        /// Its group in the image.
        gid: u32,
    },
    /// The system refused.
    #[error("cannot {action} {file}")]
    Make {
        /// What was attempted.
        action: &'static str,
        /// The file, quoted.
        file: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// Whose the files become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owners {
    /// Whose they are in the image.
    Kept,
    /// All are this process's: it has no other users.
    Own,
}

/// What was not made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Device nodes.
    pub devices: u64,
    /// Extended attributes.
    pub xattrs: u64,
}

/// Unpacks a root file system into the empty directory `into`, which becomes its root. It may not be on disk yet when
/// this returns.
pub fn unpack(image: &RootFs, into: &Path, owners: Owners) -> Result<LeftOut, UnpackError> {
    let open =
        |path: &PathBuf| File::open(path).map_err(|source| UnpackError::Read { path: path.clone(), source });
    let read = |source| UnpackError::Read { path: image.metadata.clone(), source };
    let metadata = open(&image.metadata)?;
    let reader = Reader::open(&metadata).map_err(read)?;
    let layers = image.layers.iter().map(open).collect::<Result<_, _>>()?;
    let disk = metadata.try_clone().and_then(|metadata| Disk::new(metadata, layers)).map_err(read)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = openat(CWD, into, flags, Mode::empty()).map_err(made("open", into.as_os_str().as_bytes()))?;
    let mut unpacking = Unpacking {
        reader,
        disk,
        read: &read,
        owners,
        root: root.as_fd(),
        links: HashMap::new(),
        left_out: LeftOut::default(),
    };
    unpacking.tree()?;
    Ok(unpacking.left_out)
}

fn made<E: Into<io::Error>>(action: &'static str, file: &[u8]) -> impl FnOnce(E) -> UnpackError {
    let file = shown(file);
    move |source| UnpackError::Make { action, file, source: source.into() }
}

struct Unpacking<'a> {
    reader: Reader<'a>,
    disk: Disk,
    read: &'a dyn Fn(io::Error) -> UnpackError,
    owners: Owners,
    root: rustix::fd::BorrowedFd<'a>,
    /// The first names of inodes that have several.
    links: HashMap<u64, Vec<u8>>,
    left_out: LeftOut,
}

/// A directory that is being filled.
struct Level {
    inode: ReadInode,
    /// Those still to be made, last first.
    entries: Vec<(Vec<u8>, u64)>,
    /// Length of the path above it.
    parent_path: usize,
}

impl Unpacking<'_> {
    /// Depth first, with one descriptor: however deep the tree, it is the directory that is being filled, and `..` leads
    /// back. Nobody else is in this tree.
    fn tree(&mut self) -> Result<(), UnpackError> {
        let mut seen = HashSet::new();
        let mut path = Vec::new();
        let mut levels = vec![self.level(self.reader.root(), 0, &mut seen)?];
        let mut current = self.root.try_clone_to_owned().map_err(made("open", b"/"))?;
        while let Some(level) = levels.last_mut() {
            let Some((name, number)) = level.entries.pop() else {
                self.finish(current.as_fd(), &level.inode, &path)?;
                path.truncate(level.parent_path);
                levels.pop();
                if !levels.is_empty() {
                    current = open_directory(&current, b"..").map_err(made("leave", &path))?;
                }
                continue;
            };
            let parent_path = path.len();
            path.push(b'/');
            path.extend_from_slice(&name);
            let inode = self.reader.inode(number).map_err(self.read)?;
            if FileType::from_raw_mode(inode.mode.into()) == FileType::Directory {
                mkdirat(&current, name.as_slice(), Mode::from_raw_mode(0o700))
                    .map_err(made("make", &path))?;
                current = open_directory(&current, &name).map_err(made("open", &path))?;
                levels.push(self.level(number, parent_path, &mut seen)?);
            } else {
                self.file(&current, &name, number, &inode, &path)?;
                path.truncate(parent_path);
            }
        }
        Ok(())
    }

    fn level(&self, number: u64, parent_path: usize, seen: &mut HashSet<u64>) -> Result<Level, UnpackError> {
        if !seen.insert(number) {
            // Only a damaged one has a directory in two places, or in itself.
            return Err((self.read)(io::Error::from(io::ErrorKind::InvalidData)));
        }
        let inode = self.reader.inode(number).map_err(self.read)?;
        let mut entries = self.reader.entries(&inode).map_err(self.read)?;
        entries.reverse();
        Ok(Level { inode, entries, parent_path })
    }

    fn file(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        number: u64,
        inode: &ReadInode,
        path: &[u8],
    ) -> Result<(), UnpackError> {
        let relative = path.get(1..).unwrap_or_default();
        if let Some(first) = self.links.get(&number) {
            return linkat(self.root, first.as_slice(), directory, name, AtFlags::empty())
                .map_err(made("link", path));
        }
        match FileType::from_raw_mode(inode.mode.into()) {
            FileType::RegularFile => self.regular(directory, name, inode, path)?,
            FileType::Symlink => {
                let target = self.reader.link_target(inode).map_err(self.read)?;
                symlinkat(target.as_slice(), directory, name).map_err(made("make", path))?;
                self.own_by_name(directory, name, inode, path)?;
                self.skip_xattrs(inode)?;
            }
            FileType::Fifo => {
                mknodat(directory, name, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
                    .map_err(made("make", path))?;
                self.own_by_name(directory, name, inode, path)?;
                let mode = Mode::from_raw_mode(u32::from(inode.mode) & 0o7777);
                chmodat(directory, name, mode, AtFlags::empty()).map_err(made("set the mode of", path))?;
                self.skip_xattrs(inode)?;
            }
            _ => {
                self.left_out.devices += 1;
                return Ok(());
            }
        }
        utimensat(directory, name, &times(inode), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(made("set the time of", path))?;
        if inode.links > 1 {
            self.links.insert(number, relative.to_vec());
        }
        Ok(())
    }

    fn regular(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        inode: &ReadInode,
        path: &[u8],
    ) -> Result<(), UnpackError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(directory, name, flags, Mode::from_raw_mode(0o600)).map_err(made("make", path))?;
        ftruncate(&file, inode.size).map_err(made("size", path))?;
        let file = File::from(file);
        let data = self.reader.data(inode, 0).map_err(self.read)?;
        for (in_file, in_blob, bytes) in data.pieces(inode.size) {
            let (blob, in_blob) = self.disk.place(in_blob).map_err(self.read)?;
            copy(blob, in_blob, &file, in_file, bytes).map_err(made("write", path))?;
        }
        self.finish(file.as_fd(), inode, path)
    }

    /// Owner before mode, which a change of owner clears bits of; both before attributes, of which it clears some; and
    /// the time last.
    fn finish(
        &mut self,
        file: rustix::fd::BorrowedFd<'_>,
        inode: &ReadInode,
        path: &[u8],
    ) -> Result<(), UnpackError> {
        if self.owners == Owners::Kept {
            let (uid, gid) = (Uid::from_raw(inode.uid), Gid::from_raw(inode.gid));
            fchown(file, Some(uid), Some(gid)).map_err(|errno| owner_failed(errno, inode, path))?;
        }
        let mode = Mode::from_raw_mode(u32::from(inode.mode) & 0o7777);
        fchmod(file, mode).map_err(made("set the mode of", path))?;
        for (name, value) in self.reader.xattrs(inode).map_err(self.read)? {
            if !is_kept(&name, self.owners) {
                self.left_out.xattrs += 1;
                continue;
            }
            let set = fsetxattr(file, name.as_slice(), &value, XattrFlags::empty());
            set.map_err(made("set an attribute of", path))?;
        }
        futimens(file, &times(inode)).map_err(made("set the time of", path))
    }

    fn own_by_name(
        &self,
        directory: &OwnedFd,
        name: &[u8],
        inode: &ReadInode,
        path: &[u8],
    ) -> Result<(), UnpackError> {
        if self.owners == Owners::Own {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(inode.uid), Gid::from_raw(inode.gid));
        chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| owner_failed(errno, inode, path))
    }

    /// Links and FIFOs can have `trusted.*` and `security.*` only.
    fn skip_xattrs(&mut self, inode: &ReadInode) -> Result<(), UnpackError> {
        self.left_out.xattrs += self.reader.xattrs(inode).map_err(self.read)?.len() as u64;
        Ok(())
    }
}

fn is_kept(name: &[u8], owners: Owners) -> bool {
    if owners == Owners::Own && name.starts_with(b"system.posix_acl_") {
        return false;
    }
    name == b"security.capability" || !name.starts_with(b"trusted.") && !name.starts_with(b"security.")
}

fn owner_failed(errno: Errno, inode: &ReadInode, path: &[u8]) -> UnpackError {
    match errno {
        // chown(2): an id without a mapping.
        Errno::INVAL => UnpackError::Owner { file: shown(path), uid: inode.uid, gid: inode.gid },
        errno => made("set the owner of", path)(errno),
    }
}

fn open_directory(at: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(at, name, flags, Mode::empty())
}

fn times(inode: &ReadInode) -> Timestamps {
    let time = Timespec { tv_sec: inode.mtime.seconds, tv_nsec: inode.mtime.nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

/// Copies by the kernel, which shares the blocks where the file system can: data in layers start on blocks.
fn copy(from: &File, mut from_at: u64, to: &File, mut to_at: u64, mut bytes: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    while bytes > 0 {
        let most = usize::try_from(bytes).unwrap_or(usize::MAX).min(1 << 30);
        match rustix::fs::copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), most) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => bytes -= count as u64,
            Err(Errno::INTR) => {}
            // Between some file systems the kernel does not.
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    let mut buffer = vec![0; usize::try_from(bytes.min(1 << 20)).unwrap_or_default()];
    while bytes > 0 {
        let piece = (buffer.len() as u64).min(bytes) as usize;
        let piece = buffer.get_mut(..piece).unwrap_or_default();
        from.read_exact_at(piece, from_at)?;
        to.write_all_at(piece, to_at)?;
        let count = piece.len() as u64;
        (from_at, to_at, bytes) = (from_at + count, to_at + count, bytes - count);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_users_are_kept_where_owners_are() {
        for (name, kept, own) in [
            (&b"system.posix_acl_access"[..], true, false),
            (b"system.posix_acl_default", true, false),
            (b"user.x", true, true),
            (b"security.capability", true, true),
            (b"security.ima", false, false),
            (b"trusted.x", false, false),
        ] {
            assert_eq!((is_kept(name, Owners::Kept), is_kept(name, Owners::Own)), (kept, own));
        }
    }
}
