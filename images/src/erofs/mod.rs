//! Writes EROFS file systems (kernel: `Documentation/filesystems/erofs.rst`, `fs/erofs/erofs_fs.h`), in one pass
//! and with the data first:
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
//! The boundary: this module is told what to store and stores it. It knows nothing of tar or of layers.

mod blob;
mod data;
mod directory;
mod format;
mod metadata;
mod xattr;

pub use blob::BlobError;
pub(crate) use blob::BlobWriter;
pub(crate) use data::{DataWriter, FileData, Stored};
pub(crate) use format::encode_device;
pub(crate) use metadata::finish;
pub(crate) use xattr::{EncodedXattrs, XattrProblem};
