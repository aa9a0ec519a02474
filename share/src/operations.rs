//! What the guest does to files. Every operation reads its arguments first, finds the file by its number, and acts on
//! that file or on one entry of that directory; no path is ever followed.

use std::{mem::MaybeUninit, os::fd::OwnedFd};

use rustix::{
    buffer::spare_capacity,
    fs::{
        AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Timespec,
        Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags, chmodat, chownat, fallocate, fdatasync, fstatvfs,
        fsync, ftruncate, getxattr, linkat, listxattr, mkdirat, mknodat, openat, readlinkat_raw, removexattr,
        renameat_with, seek, setxattr, symlinkat, unlinkat, utimensat,
    },
    io::{Errno, pread, pwrite},
    thread::{CapabilitySet, capabilities, set_capabilities, set_thread_res_gid, set_thread_res_uid},
};

use crate::{
    nodes::Node,
    server::{Request, Server, malformed, name_of, reopen},
    wire::{self, Body, setattr},
};

/// Longest value of an extended attribute, and longest list of their names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_XATTR_BYTES: usize = 64 << 10;

impl Server {
    pub(crate) fn set_attributes(
        &mut self,
        request: &mut Request<'_>,
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let change = Change::parse(&mut request.arguments).ok_or_else(malformed)?;
        let node = self.node(request.header.node)?;
        if change.has(setattr::MODE) {
            chmodat(CWD, name_of(&node.place), Mode::from_raw_mode(change.mode & 0o7777), AtFlags::empty())?;
        }
        if change.has(setattr::UID | setattr::GID) {
            let owner = change.has(setattr::UID).then(|| user(change.uid)).transpose()?;
            let group = change.has(setattr::GID).then(|| user(change.gid)).transpose()?;
            let (owner, group) = (owner.map(Uid::from_raw), group.map(Gid::from_raw));
            chownat(&node.place, "", owner, group, AtFlags::EMPTY_PATH)?;
        }
        if change.has(setattr::SIZE) {
            self.truncate(&node, &change)?;
        }
        if change.has(setattr::ATIME | setattr::MTIME) {
            utimensat(CWD, name_of(&node.place), &change.times(), AtFlags::empty())?;
        }
        self.get_attributes(request.header.node, reply)
    }

    fn truncate(&self, node: &Node, change: &Change) -> Result<(), Errno> {
        must_be(node, FileType::RegularFile)?;
        let opened;
        let file = match change.handle.filter(|_| change.has(setattr::FH)) {
            Some(handle) => self.opened(Some(handle))?,
            None => {
                opened = reopen(&node.place, OFlags::WRONLY)?;
                &opened
            }
        };
        let act = || ftruncate(file, change.size);
        if change.has(setattr::KILL_SUIDGID) { without_setid(act) } else { act() }
    }

    pub(crate) fn readlink(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let node = self.node(request.header.node)?;
        must_be(&node, FileType::Symlink)?;
        reply.reserve(4096);
        readlinkat_raw(&node.place, "", spare_capacity(reply))?;
        Ok(())
    }

    pub(crate) fn symlink(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let name = request.arguments.name().ok_or_else(malformed)?;
        let target = request.arguments.string().ok_or_else(malformed)?;
        let parent = self.node(request.header.node)?;
        as_caller(request, || symlinkat(target, &parent.place, name))?;
        self.tell_entry(&parent, name, reply)
    }

    pub(crate) fn mknod(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let mode = request.arguments.u32().ok_or_else(malformed)?;
        // Device and umask, which the guest has applied.
        request.arguments.skip(12).ok_or_else(malformed)?;
        let name = request.arguments.name().ok_or_else(malformed)?;
        let kind = FileType::from_raw_mode(mode);
        // A device node would be one of the host's.
        if ![FileType::RegularFile, FileType::Fifo, FileType::Socket].contains(&kind) {
            return Err(Errno::PERM);
        }
        let parent = self.node(request.header.node)?;
        as_caller(request, || mknodat(&parent.place, name, kind, permissions(mode), 0))?;
        self.tell_entry(&parent, name, reply)
    }

    pub(crate) fn mkdir(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let mode = request.arguments.u32().ok_or_else(malformed)?;
        request.arguments.skip(4).ok_or_else(malformed)?;
        let name = request.arguments.name().ok_or_else(malformed)?;
        let parent = self.node(request.header.node)?;
        as_caller(request, || mkdirat(&parent.place, name, permissions(mode)))?;
        self.tell_entry(&parent, name, reply)
    }

    pub(crate) fn unlink(&mut self, request: &mut Request<'_>, directory: bool) -> Result<(), Errno> {
        let name = request.arguments.name().ok_or_else(malformed)?;
        let parent = self.node(request.header.node)?;
        unlinkat(&parent.place, name, if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() })
    }

    pub(crate) fn rename(&mut self, request: &mut Request<'_>, with_flags: bool) -> Result<(), Errno> {
        let new_parent = request.arguments.u64().ok_or_else(malformed)?;
        let mut flags = RenameFlags::empty();
        if with_flags {
            let bits = request.arguments.u32().ok_or_else(malformed)?;
            flags = RenameFlags::from_bits(bits).ok_or_else(malformed)?;
            request.arguments.skip(4).ok_or_else(malformed)?;
        }
        // RENAME_WHITEOUT would leave a device node.
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(malformed());
        }
        let old_name = request.arguments.name().ok_or_else(malformed)?;
        let new_name = request.arguments.name().ok_or_else(malformed)?;
        let (old, new) = (self.node(request.header.node)?, self.node(new_parent)?);
        renameat_with(&old.place, old_name, &new.place, new_name, flags)
    }

    pub(crate) fn link(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let file = request.arguments.u64().ok_or_else(malformed)?;
        let name = request.arguments.name().ok_or_else(malformed)?;
        let (file, parent) = (self.node(file)?, self.node(request.header.node)?);
        // AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH.
        linkat(CWD, name_of(&file.place), &parent.place, name, AtFlags::SYMLINK_FOLLOW)?;
        self.tell_entry(&parent, name, reply)
    }

    pub(crate) fn open(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let flags = request.arguments.u32().ok_or_else(malformed)?;
        let node = self.node(request.header.node)?;
        // The guest's kernel opens anything else by itself; here, a FIFO would block.
        must_be(&node, FileType::RegularFile)?;
        let file = reopen(&node.place, open_flags(flags))?;
        self.tell_open(file, node.key.share, wire::OPEN_DIRECT_IO, reply);
        Ok(())
    }

    pub(crate) fn create(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let flags = request.arguments.u32().ok_or_else(malformed)?;
        let mode = request.arguments.u32().ok_or_else(malformed)?;
        // Umask, which the guest has applied, and flags for an existing file's set-user-ID bit.
        request.arguments.skip(8).ok_or_else(malformed)?;
        let name = request.arguments.name().ok_or_else(malformed)?;
        let parent = self.node(request.header.node)?;
        let new = open_flags(flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match as_caller(request, || openat(&parent.place, name, new, permissions(mode))) {
            Ok(file) => {
                self.tell_entry(&parent, name, reply)?;
                self.tell_open(file, parent.key.share, wire::OPEN_DIRECT_IO, reply);
                Ok(())
            }
            // Somebody on the host was faster. The guest looks again, and opens what is there.
            Err(Errno::EXIST) if flags & libc::O_EXCL as u32 == 0 => Err(Errno::STALE),
            Err(errno) => Err(errno),
        }
    }

    pub(crate) fn read(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let handle = request.arguments.u64();
        let offset = request.arguments.u64().ok_or_else(malformed)?;
        let size = request.arguments.u32().ok_or_else(malformed)? as usize;
        let file = self.opened(handle)?;
        read_exactly(file, offset, size.min(wire::MAX_DATA_BYTES), reply)
    }

    pub(crate) fn write(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let handle = request.arguments.u64();
        let offset = request.arguments.u64().ok_or_else(malformed)?;
        let size = request.arguments.u32().ok_or_else(malformed)? as usize;
        let flags = request.arguments.u32().ok_or_else(malformed)?;
        request.arguments.skip(16).ok_or_else(malformed)?;
        let data = request.arguments.0.get(..size).ok_or_else(malformed)?;
        let file = self.opened(handle)?;
        let act = || pwrite(file, data, offset);
        let written = if flags & wire::WRITE_KILL_SUIDGID != 0 { without_setid(act)? } else { act()? };
        reply.u32(written as u32);
        reply.u32(0);
        Ok(())
    }

    pub(crate) fn fsync(&mut self, request: &mut Request<'_>) -> Result<(), Errno> {
        let handle = request.arguments.u64();
        let flags = request.arguments.u32().ok_or_else(malformed)?;
        let file = self.opened(handle)?;
        if flags & wire::FSYNC_DATA_ONLY != 0 { fdatasync(file) } else { fsync(file) }
    }

    pub(crate) fn open_directory(
        &mut self,
        request: &mut Request<'_>,
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let node = self.node(request.header.node)?;
        must_be(&node, FileType::Directory)?;
        let file = reopen(&node.place, OFlags::RDONLY | OFlags::DIRECTORY)?;
        self.tell_open(file, node.key.share, 0, reply);
        Ok(())
    }

    pub(crate) fn read_directory(
        &mut self,
        request: &mut Request<'_>,
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        /// `struct fuse_dirent` without the name.
        const ENTRY_BYTES: usize = 24;
        let handle = request.arguments.u64();
        let offset = request.arguments.u64().ok_or_else(malformed)?;
        let size = request.arguments.u32().ok_or_else(malformed)? as usize;
        let device = self.node(request.header.node)?.key.device;
        let end = reply.len() + size.min(wire::MAX_DATA_BYTES);
        let mut found = Vec::new();
        {
            let directory = self.opened(handle)?;
            seek(directory, SeekFrom::Start(offset))?;
            let mut buffer = [MaybeUninit::uninit(); 8192];
            let mut entries = RawDir::new(directory, &mut buffer);
            let mut length = reply.len();
            while let Some(entry) = entries.next() {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                length += (ENTRY_BYTES + name.len()).next_multiple_of(8);
                if length > end {
                    break;
                }
                let kind = entry.file_type().as_raw_mode() >> 12;
                found.push((entry.ino(), entry.next_entry_cookie(), kind, name.to_owned()));
            }
        }
        for (inode, next, kind, name) in found {
            reply.u64(self.inode_number(device, inode));
            reply.u64(next);
            reply.u32(name.len() as u32);
            reply.u32(kind);
            reply.extend_from_slice(&name);
            reply.zeros(reply.len().next_multiple_of(8) - reply.len());
        }
        Ok(())
    }

    pub(crate) fn statfs(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let statistics = fstatvfs(self.place_for_statfs(request.header.node)?)?;
        for count in [
            statistics.f_blocks,
            statistics.f_bfree,
            statistics.f_bavail,
            statistics.f_files,
            statistics.f_ffree,
        ] {
            reply.u64(count);
        }
        for size in [statistics.f_bsize, statistics.f_namemax, statistics.f_frsize] {
            reply.u32(size as u32);
        }
        reply.zeros(4 + 6 * 4);
        Ok(())
    }

    pub(crate) fn allocate(&mut self, request: &mut Request<'_>) -> Result<(), Errno> {
        let handle = request.arguments.u64();
        let offset = request.arguments.u64().ok_or_else(malformed)?;
        let length = request.arguments.u64().ok_or_else(malformed)?;
        let mode = request.arguments.u32().ok_or_else(malformed)?;
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        fallocate(self.opened(handle)?, mode, offset, length)
    }

    pub(crate) fn seek(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let handle = request.arguments.u64();
        let offset = request.arguments.u64().ok_or_else(malformed)?;
        let to = match request.arguments.u32().map(|whence| whence as i32) {
            Some(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Some(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            // The guest's kernel knows the rest.
            _ => return Err(malformed()),
        };
        reply.u64(seek(self.opened(handle)?, to)?);
        Ok(())
    }

    pub(crate) fn set_xattr(&mut self, request: &mut Request<'_>) -> Result<(), Errno> {
        let size = request.arguments.u32().ok_or_else(malformed)? as usize;
        let flags = request.arguments.u32().ok_or_else(malformed)?;
        let name = request.arguments.string().ok_or_else(malformed)?;
        let value = request.arguments.0.get(..size).ok_or_else(malformed)?;
        let flags = XattrFlags::from_bits(flags).ok_or_else(malformed)?;
        setxattr(name_of(&self.node(request.header.node)?.place), name, value, flags)
    }

    pub(crate) fn get_xattr(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let size = request.arguments.u32().ok_or_else(malformed)? as usize;
        request.arguments.skip(4).ok_or_else(malformed)?;
        let name = request.arguments.string().ok_or_else(malformed)?;
        let node = self.node(request.header.node)?;
        let mut value = vec![0; MAX_XATTR_BYTES];
        let length = getxattr(name_of(&node.place), name, value.as_mut_slice())?;
        tell_xattr(value.get(..length).unwrap_or_default(), size, reply)
    }

    pub(crate) fn list_xattrs(
        &mut self,
        request: &mut Request<'_>,
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let size = request.arguments.u32().ok_or_else(malformed)? as usize;
        let node = self.node(request.header.node)?;
        let mut names = vec![0; MAX_XATTR_BYTES];
        let length = listxattr(name_of(&node.place), names.as_mut_slice())?;
        tell_xattr(names.get(..length).unwrap_or_default(), size, reply)
    }

    pub(crate) fn remove_xattr(&mut self, request: &mut Request<'_>) -> Result<(), Errno> {
        let name = request.arguments.string().ok_or_else(malformed)?;
        removexattr(name_of(&self.node(request.header.node)?.place), name)
    }
}

/// With no room, the guest asks for the length only.
fn tell_xattr(value: &[u8], room: usize, reply: &mut Vec<u8>) -> Result<(), Errno> {
    if room == 0 {
        reply.u32(value.len() as u32);
        reply.u32(0);
    } else if value.len() <= room {
        reply.extend_from_slice(value);
    } else {
        return Err(Errno::RANGE);
    }
    Ok(())
}

/// Appends up to `size` bytes of the file, and fewer only at its end.
fn read_exactly(file: &OwnedFd, offset: u64, size: usize, reply: &mut Vec<u8>) -> Result<(), Errno> {
    let start = reply.len();
    reply.zeros(size);
    let mut filled = 0;
    while filled < size {
        let Some(room) = reply.get_mut(start + filled..start + size) else { break };
        match pread(file, room, offset.saturating_add(filled as u64)) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(_) if filled > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    reply.truncate(start + filled);
    Ok(())
}

fn must_be(node: &Node, kind: FileType) -> Result<(), Errno> {
    if node.kind == kind {
        return Ok(());
    }
    Err(if kind == FileType::Directory { Errno::NOTDIR } else { Errno::INVAL })
}

/// Permission bits, set-ID bits and the sticky bit.
fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

/// Of the guest's flags, those that mean something here. O_DIRECT would demand alignment of this process's buffers.
fn open_flags(flags: u32) -> OFlags {
    let known = OFlags::RWMODE | OFlags::APPEND | OFlags::SYNC | OFlags::DSYNC;
    OFlags::from_bits_retain(flags) & known
}

/// A user or group that a file can belong to; all ones mean "leave it" to the kernel.
fn user(id: u32) -> Result<u32, Errno> {
    if id == u32::MAX { Err(malformed()) } else { Ok(id) }
}

/// Makes a file that belongs to the guest's user. The effective capabilities stay (`SECBIT_NO_SETUID_FIXUP`): whether
/// this user may do it, the guest's kernel has decided, by groups that are not known here.
fn as_caller<T>(request: &Request<'_>, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let (uid, gid) = (user(request.header.uid)?, user(request.header.gid)?);
    if (uid, gid) == (0, 0) {
        return act();
    }
    // In a plain user's namespace there are no others, and no file of theirs can be made.
    let absent = |errno| if errno == Errno::INVAL { Errno::PERM } else { errno };
    set_thread_res_gid(Gid::ROOT, Gid::from_raw(gid), Gid::ROOT).map_err(absent)?;
    let made = match set_thread_res_uid(Uid::ROOT, Uid::from_raw(uid), Uid::ROOT) {
        Ok(()) => act(),
        Err(errno) => Err(absent(errno)),
    };
    let restored = set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
        .and_then(|()| set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT));
    if restored.is_err() {
        // As somebody else, this process would do the wrong things.
        std::process::abort();
    }
    made
}

/// Does what makes the kernel clear set-ID bits, unless the process may keep them.
fn without_setid<T>(act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let all = capabilities(None)?;
    let mut fewer = all;
    fewer.effective.remove(CapabilitySet::FSETID);
    set_capabilities(None, fewer)?;
    let done = act();
    if set_capabilities(None, all).is_err() {
        std::process::abort();
    }
    done
}

/// `struct fuse_setattr_in`.
struct Change {
    valid: u32,
    handle: Option<u64>,
    size: u64,
    atime: (u64, u32),
    mtime: (u64, u32),
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Change {
    fn parse(arguments: &mut wire::Arguments<'_>) -> Option<Self> {
        let valid = arguments.u32()?;
        arguments.skip(4)?;
        let handle = arguments.u64();
        let size = arguments.u64()?;
        arguments.skip(8)?;
        let (atime, mtime) = (arguments.u64()?, arguments.u64()?);
        arguments.skip(8)?;
        let (atime_ns, mtime_ns) = (arguments.u32()?, arguments.u32()?);
        arguments.skip(4)?;
        let mode = arguments.u32()?;
        arguments.skip(4)?;
        let (uid, gid) = (arguments.u32()?, arguments.u32()?);
        Some(Self { valid, handle, size, atime: (atime, atime_ns), mtime: (mtime, mtime_ns), mode, uid, gid })
    }

    fn has(&self, bits: u32) -> bool {
        self.valid & bits != 0
    }

    fn times(&self) -> Timestamps {
        let time = |set, now, (seconds, nanoseconds): (u64, u32)| match (self.has(set), self.has(now)) {
            (false, _) => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            (true, true) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
            (true, false) => Timespec { tv_sec: seconds as i64, tv_nsec: nanoseconds.into() },
        };
        Timestamps {
            last_access: time(setattr::ATIME, setattr::ATIME_NOW, self.atime),
            last_modification: time(setattr::MTIME, setattr::MTIME_NOW, self.mtime),
        }
    }
}
