//! From a FUSE request to its reply: the dispatch, the session, and what all operations share.
//!
//! The guest's kernel checks permissions (virtio-fs is always mounted with `default_permissions`) and applies the
//! umask; here, whatever it asks for is done with this process's rights, new files belonging to the guest's user. That
//! is what a container's root can do to a bind mount, too. Nothing is cached by the guest: names and attributes are
//! valid for no time at all, and data passes by its page cache, so each side sees the other's changes at once.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    os::fd::OwnedFd,
    sync::Arc,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, Stat, fstat, openat},
    io::Errno,
    path::DecInt,
};

use crate::{
    nodes::{Key, Node, Nodes},
    wire::{self, Arguments, Body, Header, init, opcode},
};

/// The directory that holds the shares, by their number (`FUSE_ROOT_ID`).
const ROOT: u64 = 1;

/// An open file or directory.
#[derive(Debug)]
pub(crate) struct Open {
    /// The descriptor.
    pub(crate) file: OwnedFd,
    /// Number of the share it was reached by.
    share: usize,
}

/// A session with one guest.
#[derive(Debug)]
pub struct Server {
    shares: BTreeMap<usize, OwnedFd>,
    pub(crate) nodes: Nodes,
    pub(crate) open: HashMap<u64, Open>,
    next_handle: u64,
    /// Devices seen, by which inode numbers are told apart: the guest sees one device only.
    devices: Vec<u64>,
}

/// One request while it is answered.
pub(crate) struct Request<'a> {
    pub(crate) header: Header,
    pub(crate) arguments: Arguments<'a>,
}

/// A request that is cut short or holds no name.
pub(crate) fn malformed() -> Errno {
    Errno::INVAL
}

impl Server {
    /// Serves these files and directories.
    pub fn new(shares: Vec<OwnedFd>) -> Self {
        Self {
            shares: shares.into_iter().enumerate().collect(),
            nodes: Nodes::new(ROOT + 1),
            open: HashMap::new(),
            next_handle: 1,
            devices: Vec::new(),
        }
    }

    /// Serves one more.
    pub fn add(&mut self, number: usize, share: OwnedFd) {
        self.shares.insert(number, share);
    }

    /// Serves these no more, and lets go of all that the guest knows or has open in them.
    pub fn take_back(&mut self, numbers: Range<usize>) {
        self.shares.retain(|number, _| !numbers.contains(number));
        self.open.retain(|_, open| !numbers.contains(&open.share));
        self.nodes.forget_shares(&numbers);
    }

    /// Answers a message, whatever it is; false if it gets no reply.
    pub fn answer(&mut self, message: &[u8], reply: &mut Vec<u8>) -> bool {
        reply.clear();
        reply.zeros(wire::REPLY_HEADER_BYTES);
        let Some((header, arguments)) = Header::parse(message) else { return false };
        let mut request = Request { header, arguments };
        match header.opcode {
            opcode::FORGET => {
                if let Some(count) = request.arguments.u64() {
                    self.nodes.forget(header.node, count);
                }
                return false;
            }
            opcode::BATCH_FORGET => {
                self.forget_many(request.arguments);
                return false;
            }
            // Nothing waits for long enough to be interrupted.
            opcode::INTERRUPT => return false,
            _ => {}
        }
        let error = match self.dispatch(&mut request, reply) {
            Ok(()) => 0,
            Err(errno) => {
                reply.truncate(wire::REPLY_HEADER_BYTES);
                -errno.raw_os_error()
            }
        };
        let head = [(reply.len() as u32).to_le_bytes(), error.to_le_bytes()].concat();
        let head = [head, header.unique.to_le_bytes().to_vec()].concat();
        for (to, from) in reply.iter_mut().zip(head) {
            *to = from;
        }
        true
    }

    fn dispatch(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        match request.header.opcode {
            opcode::INIT => self.init(request.arguments, reply),
            opcode::DESTROY => {
                self.reset();
                Ok(())
            }
            opcode::LOOKUP => self.lookup(request, reply),
            opcode::GETATTR => self.get_attributes(request.header.node, reply),
            opcode::STATFS => self.statfs(request, reply),
            opcode::SYNCFS => self.sync_all(),
            // The root holds nothing but the shares, and those are nobody's to change.
            _ if request.header.node == ROOT => Err(Errno::PERM),
            opcode::SETATTR => self.set_attributes(request, reply),
            opcode::READLINK => self.readlink(request, reply),
            opcode::SYMLINK => self.symlink(request, reply),
            opcode::MKNOD => self.mknod(request, reply),
            opcode::MKDIR => self.mkdir(request, reply),
            opcode::UNLINK => self.unlink(request, false),
            opcode::RMDIR => self.unlink(request, true),
            opcode::RENAME => self.rename(request, false),
            opcode::RENAME2 => self.rename(request, true),
            opcode::LINK => self.link(request, reply),
            opcode::OPEN => self.open(request, reply),
            opcode::CREATE => self.create(request, reply),
            opcode::READ => self.read(request, reply),
            opcode::WRITE => self.write(request, reply),
            opcode::FLUSH => Ok(()),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(request),
            opcode::FSYNC | opcode::FSYNCDIR => self.fsync(request),
            opcode::OPENDIR => self.open_directory(request, reply),
            opcode::READDIR => self.read_directory(request, reply),
            opcode::FALLOCATE => self.allocate(request),
            opcode::LSEEK => self.seek(request, reply),
            opcode::SETXATTR => self.set_xattr(request),
            opcode::GETXATTR => self.get_xattr(request, reply),
            opcode::LISTXATTR => self.list_xattrs(request, reply),
            opcode::REMOVEXATTR => self.remove_xattr(request),
            _ => Err(Errno::NOSYS),
        }
    }

    /// A new session: what a former one held is given back.
    fn init(&mut self, mut arguments: Arguments<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let fields = || Some((arguments.u32()?, arguments.u32()?, arguments.u32()?, arguments.u32()?));
        let (major, minor, readahead, flags) = { fields }().ok_or_else(malformed)?;
        if major != wire::MAJOR || minor < wire::MIN_MINOR {
            return Err(Errno::PROTO);
        }
        let flags2 = if u64::from(flags) & init::INIT_EXT != 0 { arguments.u32().unwrap_or(0) } else { 0 };
        let offered = u64::from(flags) | u64::from(flags2) << 32;
        let wanted = init::ASYNC_READ
            | init::BIG_WRITES
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::HANDLE_KILLPRIV_V2
            | init::INIT_EXT
            | init::DIRECT_IO_ALLOW_MMAP;
        let agreed = offered & wanted;
        self.reset();
        reply.u32(wire::MAJOR);
        reply.u32(minor.min(wire::MINOR));
        reply.u32(readahead);
        reply.u32(agreed as u32);
        reply.u16(64); // background requests at once, and from how many on the guest holds back
        reply.u16(48);
        reply.u32(wire::MAX_DATA_BYTES as u32);
        reply.u32(1); // granularity of time in nanoseconds
        reply.u16(0); // pages in a request: the default, which is as many as MAX_DATA_BYTES has
        reply.u16(0); // alignment of mappings: there are none
        reply.u32((agreed >> 32) as u32);
        reply.zeros(7 * 4);
        Ok(())
    }

    fn reset(&mut self) {
        self.open.clear();
        self.nodes.clear();
    }

    fn forget_many(&mut self, mut arguments: Arguments<'_>) {
        let Some(count) = arguments.u32() else { return };
        if arguments.skip(4).is_none() {
            return;
        }
        for _ in 0..count {
            let (Some(node), Some(lookups)) = (arguments.u64(), arguments.u64()) else { return };
            self.nodes.forget(node, lookups);
        }
    }

    fn lookup(&mut self, request: &mut Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let name = request.arguments.name().ok_or_else(malformed)?;
        if request.header.node == ROOT {
            let number = std::str::from_utf8(name).ok().and_then(|name| name.parse::<usize>().ok());
            let share = number.ok_or(Errno::NOENT)?;
            let place = self.shares.get(&share).ok_or(Errno::NOENT)?;
            let place = rustix::io::fcntl_dupfd_cloexec(place, 0)?;
            return self.tell(share, place, reply);
        }
        let parent = self.node(request.header.node)?;
        self.tell_entry(&parent, name, reply)
    }

    /// The guest's view of an entry that is there.
    pub(crate) fn tell_entry(
        &mut self,
        parent: &Node,
        name: &[u8],
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let place = place_of(parent, name)?;
        self.tell(parent.key.share, place, reply)
    }

    /// `struct fuse_entry_out`.
    pub(crate) fn tell(&mut self, share: usize, place: OwnedFd, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let stat = fstat(&place)?;
        let key = Key { share, device: stat.st_dev, inode: stat.st_ino };
        let kind = FileType::from_raw_mode(stat.st_mode);
        let id = self.nodes.tell(Node { place, kind, key });
        reply.u64(id);
        // Generation; and how long, in seconds and nanoseconds, entry and attributes are valid: not at all.
        reply.zeros(8 + 8 + 8 + 4 + 4);
        self.attributes(&stat, reply);
        Ok(())
    }

    pub(crate) fn node(&self, id: u64) -> Result<Arc<Node>, Errno> {
        self.nodes.get(id).ok_or(Errno::STALE)
    }

    /// `struct fuse_attr_out`.
    pub(crate) fn get_attributes(&mut self, id: u64, reply: &mut Vec<u8>) -> Result<(), Errno> {
        reply.zeros(8 + 4 + 4);
        if id == ROOT {
            reply.u64(ROOT);
            // Size, blocks, times, and their nanoseconds.
            reply.zeros(5 * 8 + 3 * 4);
            reply.u32(0o040_555);
            reply.u32(2);
            // Owner, group and device.
            reply.zeros(3 * 4);
            reply.u32(4096);
            reply.u32(0);
            return Ok(());
        }
        let node = self.node(id)?;
        let stat = fstat(&node.place)?;
        self.attributes(&stat, reply);
        Ok(())
    }

    /// `struct fuse_attr`.
    fn attributes(&mut self, stat: &Stat, reply: &mut Vec<u8>) {
        reply.u64(self.inode_number(stat.st_dev, stat.st_ino));
        reply.u64(stat.st_size as u64);
        reply.u64(stat.st_blocks as u64);
        for seconds in [stat.st_atime, stat.st_mtime, stat.st_ctime] {
            reply.u64(seconds as u64);
        }
        for nanoseconds in [stat.st_atime_nsec, stat.st_mtime_nsec, stat.st_ctime_nsec] {
            reply.u32(nanoseconds as u32);
        }
        reply.u32(stat.st_mode);
        reply.u32(u32::try_from(stat.st_nlink).unwrap_or(u32::MAX));
        reply.u32(stat.st_uid);
        reply.u32(stat.st_gid);
        reply.u32(encoded_device(stat.st_rdev));
        reply.u32(stat.st_blksize as u32);
        reply.u32(0);
    }

    /// Inode numbers as on the host, but apart by device: files of two file systems must not look like one.
    pub(crate) fn inode_number(&mut self, device: u64, inode: u64) -> u64 {
        const DEVICE_SHIFT: u32 = 48;
        let index = match self.devices.iter().position(|known| *known == device) {
            Some(index) => index,
            None => {
                self.devices.push(device);
                self.devices.len() - 1
            }
        };
        inode ^ (index as u64) << DEVICE_SHIFT
    }

    /// `struct fuse_open_out`.
    pub(crate) fn tell_open(&mut self, file: OwnedFd, share: usize, flags: u32, reply: &mut Vec<u8>) {
        let handle = self.next_handle;
        self.next_handle += 1;
        self.open.insert(handle, Open { file, share });
        reply.u64(handle);
        reply.u32(flags);
        reply.u32(0);
    }

    pub(crate) fn opened(&self, handle: Option<u64>) -> Result<&OwnedFd, Errno> {
        let handle = handle.ok_or_else(malformed)?;
        self.open.get(&handle).map(|open| &open.file).ok_or(Errno::BADF)
    }

    fn release(&mut self, request: &mut Request<'_>) -> Result<(), Errno> {
        let handle = request.arguments.u64().ok_or_else(malformed)?;
        self.open.remove(&handle).map(drop).ok_or(Errno::BADF)
    }

    fn sync_all(&self) -> Result<(), Errno> {
        for share in self.shares.values() {
            let kind = FileType::from_raw_mode(fstat(share)?.st_mode);
            if kind == FileType::Directory || kind == FileType::RegularFile {
                rustix::fs::syncfs(reopen(share, OFlags::RDONLY)?)?;
            }
        }
        Ok(())
    }

    /// The first share stands for the root.
    pub(crate) fn place_for_statfs(&self, id: u64) -> Result<OwnedFd, Errno> {
        let root = (id == ROOT).then(|| self.shares.values().next().ok_or(Errno::NOENT)).transpose()?;
        match root {
            Some(share) => rustix::io::fcntl_dupfd_cloexec(share, 0),
            None => rustix::io::fcntl_dupfd_cloexec(&self.node(id)?.place, 0),
        }
    }
}

/// An entry of a directory as a place; a symbolic link itself, not where it leads.
pub(crate) fn place_of(parent: &Node, name: &[u8]) -> Result<OwnedFd, Errno> {
    openat(&parent.place, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// The number of a descriptor, which is its name in this process's working directory, `/proc/self/fd`.
pub(crate) fn name_of(place: &OwnedFd) -> DecInt {
    DecInt::from_fd(place)
}

/// Opens the very file that a place stands for.
pub(crate) fn reopen(place: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    openat(CWD, name_of(place), flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
}

/// As the kernel's `new_encode_dev`.
fn encoded_device(device: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}
