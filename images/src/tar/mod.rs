//! A streaming tar parser for hostile input: entries in, plain data out, nothing allocated by a claimed number.
//!
//! It understands what OCI layers are made of (OCI image-spec: layer.md#change-types): V7, ustar, pax (POSIX.1-2008
//! `pax`, *pax Interchange Format*), GNU long names, large numbers and sparse files in all four encodings, and
//! star's `SCHILY.xattr.*` records. Where archives disagree with each other it does what Go's `archive/tar` does,
//! since that is how Docker, containerd and umoci read the same layer. It says what stands in the archive and no
//! more: what a path or a whiteout *means* is `crate::layer`'s business.
//!
//! Written for this crate, as existing parsers read a pax record block of any claimed size into memory.

mod header;
mod pax;
mod reader;
mod sparse;
#[cfg(test)]
#[allow(dead_code)] // Shared with the integration tests, which use all of it.
#[path = "../../tests/integration/tarball.rs"]
pub(crate) mod tarball;
mod writer;

use std::io;

pub(crate) use reader::{Input, TarReader};
pub(crate) use sparse::Extent;
pub(crate) use writer::TarWriter;

/// One entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The name as written, of any bytes but NUL.
    pub path: Vec<u8>,
    /// Permission, set-id and sticky bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    /// Extended attributes in archive order, full names.
    pub xattrs: Vec<Xattr>,
    pub kind: EntryKind,
}

/// A name and a value.
pub(crate) type Xattr = (Vec<u8>, Vec<u8>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// A regular file of `size` bytes. With `extents`, only those have stored data; the rest are zeros.
    File {
        size: u64,
        extents: Option<Vec<Extent>>,
    },
    HardLink {
        target: Vec<u8>,
    },
    Symlink {
        target: Vec<u8>,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Directory,
    Fifo,
}

/// Seconds and nanoseconds since the epoch; nanoseconds count upwards also before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Timestamp {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// What is wrong with an archive, and where.
#[derive(Debug, thiserror::Error)]
#[error("tar entry {} at byte {offset}", .entry.as_deref().unwrap_or("without a readable header"))]
pub struct TarError {
    /// Where in the (decompressed) archive the entry's header starts.
    pub offset: u64,
    /// The entry's name, if it was known by then.
    pub entry: Option<String>,
    /// What is wrong there.
    #[source]
    pub problem: TarProblem,
}

/// What can be wrong with an archive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TarProblem {
    /// The archive ends inside a header or inside data.
    #[error("the archive is torn: it ends at byte {end}, inside {what}")]
    Torn {
        /// Offset of the end.
        end: u64,
        /// What was cut.
        what: &'static str,
    },
    /// The source could not be read or decompressed.
    #[error("reading or decompressing failed at byte {at}")]
    Read {
        /// Offset reached in the decompressed archive.
        at: u64,
        /// The reader's error.
        #[source]
        source: io::Error,
    },
    /// The header's checksum does not match: not a tar archive, or a damaged one.
    #[error("the header's checksum is wrong: this is not a tar archive, or it is damaged")]
    Checksum,
    /// A numeric field does not hold a number in range.
    #[error("{field} is not a number in range")]
    Number {
        /// The field or pax keyword.
        field: &'static str,
    },
    /// A record block is malformed.
    #[error("malformed pax record block")]
    PaxSyntax,
    /// A special header is larger than any real one.
    #[error("a special header of {bytes} bytes, where at most {limit} are accepted")]
    HeaderTooLarge {
        /// The size it claims.
        bytes: u64,
        /// The bound.
        limit: u64,
    },
    /// Too many special headers before one entry.
    #[error("more than {0} special headers in a row")]
    TooManyHeaders(u32),
    /// A sparse map is inconsistent with itself or with the file's size.
    #[error("the sparse map is malformed or does not fit the file's size")]
    SparseMap,
    /// A sparse map has too many extents.
    #[error("a sparse map of more than {0} extents")]
    SparseTooLong(usize),
    /// A file is larger than this crate stores.
    #[error("a file of {size} bytes, where at most {limit} are accepted")]
    FileTooLarge {
        /// The size it claims.
        size: u64,
        /// The bound.
        limit: u64,
    },
    /// A path or link target holds a NUL byte.
    #[error("a NUL byte in {0}")]
    Nul(&'static str),
    /// An entry without a name.
    #[error("the entry has no name")]
    NoName,
    /// Something that has no place in a layer.
    #[error("{0} is not supported in an image")]
    Unsupported(String),
}

/// A name as error messages show it: quoted, escaped, and never longer than a line or two.
pub(crate) fn shown(name: &[u8]) -> String {
    const MAX_SHOWN: usize = 200;
    match name.get(..MAX_SHOWN) {
        Some(start) if start.len() < name.len() => format!("{:?}…", String::from_utf8_lossy(start)),
        _ => format!("{:?}", String::from_utf8_lossy(name)),
    }
}
