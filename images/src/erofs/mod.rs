//! Writes EROFS file systems (kernel: `Documentation/filesystems/erofs.rst`, `fs/erofs/erofs_fs.h`), in one pass and with
//! the data first, and reads its own:
//!
//! ```text
//!  block 0      superblock at byte 1024, written last; zeros around it
//!  block 1 …    data of regular files, each starting on a block, in archive order, as they stream by
//!  meta_blkaddr inodes: slot 0 stays empty, slot 1 is the root, then the rest, breadth first; behind each inode its
//!               extended attributes, then a small directory's or link's content or a sparse file's chunk map
//!  …            directory blocks and link targets that did not fit behind their inode
//! ```
//!
//! Blocks are 4 KiB. Regular files are never packed into metadata blocks, so that every file's data are a run of
//! whole blocks, which another file system can refer to through a device table. A file with long runs of zeros is
//! stored in chunks, and chunks of zeros are not stored. Nothing depends on time, place or buffering: the same tree
//! and data give the same bytes.
//!
//! A file system whose files' data are all in others is written without data of its own. A table names those others,
//! and their blocks are numbered as if they followed, one after the other:
//!
//! ```text
//!  block 0      superblock
//!  block 1 …    device table: each device's name, its number of blocks, and the number of its first one
//!  meta_blkaddr inodes, directory blocks and link targets, as above
//!  …            (the blocks of the first device) (of the second) …
//! ```
//!
//! So it can be mounted with the devices beside it, or as one disk on which all lie one behind the other.
//!
//! The boundary: this module is told what to store and stores it. It knows nothing of tar or of layers.

mod blob;
mod browse;
mod data;
mod directory;
mod disk;
mod format;
mod metadata;
mod reader;
mod xattr;

pub use blob::BlobError;
pub(crate) use blob::BlobWriter;
pub(crate) use browse::{BlobReader, Data, RawInode};
pub(crate) use data::{DataWriter, FileData, Stored};
pub(crate) use disk::Disk;
pub(crate) use format::{DEVICE_TAG_BYTES, Device, encode_device};
pub(crate) use metadata::finish;
pub(crate) use reader::{ReadInode, Reader};
pub(crate) use xattr::{EncodedXattrs, XattrProblem};
