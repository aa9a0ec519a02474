//! What can be done to a disk, as data.

use std::fmt;

use crate::guest_memory::transfer::Transfer;

/// One operation. The caller has checked that it stays on the disk.
pub enum Operation {
    /// Fills guest memory from a position in bytes.
    Read {
        /// Where from.
        offset: u64,
        /// Where to.
        into: Transfer,
    },
    /// Writes guest memory to a position in bytes.
    Write {
        /// Where to.
        offset: u64,
        /// Where from.
        from: Transfer,
        /// Whether it must be durable when it is done.
        durable: bool,
    },
    /// Makes durable what was written before.
    Flush,
    /// Gives up what is on these parts of the disk.
    Discard(Vec<Extent>),
    /// Makes these parts of the disk read as zeros.
    WriteZeroes {
        /// Which.
        extents: Vec<Extent>,
        /// Whether it must be durable when it is done.
        durable: bool,
    },
}

impl Operation {
    /// Bytes that it moves, for limits. What is made zeros counts as what is written, as that is what it can come to;
    /// what is given up moves nothing.
    pub fn moved_bytes(&self) -> u64 {
        match self {
            Self::Read { into: data, .. } | Self::Write { from: data, .. } => data.len() as u64,
            Self::WriteZeroes { extents, .. } => {
                extents.iter().fold(0, |sum: u64, extent| sum.saturating_add(extent.bytes))
            }
            Self::Flush | Self::Discard(_) => 0,
        }
    }
}

/// A part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its start in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Whether the space behind it may be given back.
    pub may_unmap: bool,
}

impl fmt::Debug for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { offset, into } => write!(f, "read {} bytes at {offset}", into.len()),
            Self::Write { offset, from, .. } => write!(f, "write {} bytes at {offset}", from.len()),
            Self::Flush => f.write_str("flush"),
            Self::Discard(extents) => write!(f, "discard {extents:?}"),
            Self::WriteZeroes { extents, .. } => write!(f, "zero {extents:?}"),
        }
    }
}
