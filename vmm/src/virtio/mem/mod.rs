//! The memory device (virtio 1.2 §5.15): memory that is added while the guest runs, and given back.
//!
//! ```text
//!   Handle ── requested size ──▶ configuration space ── interrupt ──▶ driver
//!   driver ── plug blocks ───▶ Blocks ── the first of a chunk ──▶ ChunkSlots: the guest can reach it
//!   driver ── unplug blocks ─▶ Blocks ── discarded ── the last of a chunk ──▶ ChunkSlots: it cannot any more
//! ```
//! The address space of all of it is reserved from the start, and takes no memory. A guest can reach whole chunks, of
//! which some blocks may be unplugged; [`blocks`] bounds what a hostile one gains by that.

mod blocks;
mod device;
mod handle;
#[cfg(test)]
mod tests;

use std::{io, sync::Arc};

use vm_memory::GuestAddress;

#[cfg(test)]
use self::blocks::BLOCK_BYTES;
pub use self::{
    device::MemoryDevice,
    handle::{MemoryHandle, MemoryStatistics},
};

/// Where chunks of guest memory come within reach of the guest's vCPUs, and leave it.
pub trait ChunkSlots: Send + Sync {
    /// Lets vCPUs reach the chunk that starts here.
    fn insert(&self, start: GuestAddress) -> io::Result<()>;
    /// Keeps vCPUs from it. When it returns, none reaches it any more.
    fn remove(&self, start: GuestAddress) -> io::Result<()>;
}

impl<S: ChunkSlots + ?Sized> ChunkSlots for Arc<S> {
    fn insert(&self, start: GuestAddress) -> io::Result<()> {
        self.as_ref().insert(start)
    }

    fn remove(&self, start: GuestAddress) -> io::Result<()> {
        self.as_ref().remove(start)
    }
}
