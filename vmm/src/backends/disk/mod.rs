//! A file or block device as a disk.
//!
//! ```text
//!   virtio block ── Operation ──▶ Disk::try_now     what needs no waiting: at once, on the event loop
//!                        │              │ it may have to wait
//!                        │              ▼
//!                        └───────▶ IoThread ── Done ──▶ eventfd      one thread for each such disk
//! ```
//! Whoever builds the machine starts the threads, since the jail lets none be made later.
//!
//! System calls after the disk was opened, in the jail's table: `preadv2`, `pwritev2`, `pwrite64`, `fdatasync`,
//! `fallocate` on the event loop and on the disk's thread, which also waits by `futex` and reports by `write` to its
//! eventfd. Nothing is opened.

mod file;
mod operation;
mod thread;

pub use self::{
    file::{Disk, DiskError, DiskOptions, SECTOR_BYTES},
    operation::{Extent, Operation},
    thread::{IoThread, Work},
};
