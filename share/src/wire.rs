//! FUSE's messages (Linux `include/uapi/linux/fuse.h`, protocol 7.38), as bytes: what is used of them.
//!
//! ```text
//!  request: header (40 bytes) ▸ arguments of the opcode ▸ names or data
//!  reply:   length u32, error i32 (negative), unique u64 ▸ body, if there was no error
//! ```

/// Protocol version.
pub const MAJOR: u32 = 7;
/// The newest minor version whose messages are known here; a guest with an older one gets its own.
pub const MINOR: u32 = 38;
/// The oldest minor version with `flags2`, which is Linux 5.17.
pub const MIN_MINOR: u32 = 36;

/// Bytes of a request's header.
pub const HEADER_BYTES: usize = 40;
/// Bytes of a reply's header.
pub const REPLY_HEADER_BYTES: usize = 16;
/// Data in one read or write at most: what a message of a unix socket holds with its default buffer.
pub const MAX_DATA_BYTES: usize = 128 << 10;
/// A write with its data; and two names of a path's length.
pub const MAX_REQUEST_BYTES: usize = MAX_DATA_BYTES + 4096;
/// A read's data.
pub const MAX_REPLY_BYTES: usize = MAX_DATA_BYTES + 4096;

/// What is asked.
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const SYNCFS: u32 = 50;
}

/// `FUSE_…` bits of INIT's `flags` (low half) and `flags2` (high half).
pub mod init {
    pub const ASYNC_READ: u64 = 1;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
}

/// `FATTR_…`.
pub mod setattr {
    pub const MODE: u32 = 1;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `FOPEN_DIRECT_IO`: reads and writes pass by the guest's page cache.
pub const OPEN_DIRECT_IO: u32 = 1;
/// `FUSE_WRITE_KILL_SUIDGID`.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FUSE_FSYNC_FDATASYNC`.
pub const FSYNC_DATA_ONLY: u32 = 1;

/// A request's header.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    /// One of [`opcode`].
    pub opcode: u32,
    /// Returned with the reply.
    pub unique: u64,
    /// The file that is meant.
    pub node: u64,
    /// User of the guest's process.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// What is left of a request; taking more than there is yields `None`.
#[derive(Debug, Clone, Copy)]
pub struct Arguments<'a>(pub &'a [u8]);

impl<'a> Arguments<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*front)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// Passes over bytes that mean nothing here.
    pub fn skip(&mut self, bytes: usize) -> Option<()> {
        self.0 = self.0.get(bytes..)?;
        Some(())
    }

    /// Bytes up to a NUL.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let end = self.0.iter().position(|byte| *byte == 0)?;
        let (string, rest) = self.0.split_at_checked(end)?;
        self.0 = rest.get(1..)?;
        Some(string)
    }

    /// The name of a directory's entry: never a path, and never a way up.
    pub fn name(&mut self) -> Option<&'a [u8]> {
        let name = self.string()?;
        let is_entry = !name.is_empty() && !name.contains(&b'/') && name != b"." && name != b"..";
        is_entry.then_some(name)
    }
}

impl Header {
    /// Splits a request.
    pub fn parse(request: &[u8]) -> Option<(Self, Arguments<'_>)> {
        let mut fields = Arguments(request.get(..HEADER_BYTES)?);
        fields.skip(4)?;
        let header = Self {
            opcode: fields.u32()?,
            unique: fields.u64()?,
            node: fields.u64()?,
            uid: fields.u32()?,
            gid: fields.u32()?,
        };
        Some((header, Arguments(request.get(HEADER_BYTES..)?)))
    }
}

/// A reply's body being written, little-endian.
pub trait Body {
    fn u16(&mut self, value: u16);
    fn u32(&mut self, value: u32);
    fn u64(&mut self, value: u64);
    fn zeros(&mut self, bytes: usize);
}

impl Body for Vec<u8> {
    fn u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn zeros(&mut self, bytes: usize) {
        self.resize(self.len() + bytes, 0);
    }
}
