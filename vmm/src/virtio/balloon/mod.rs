//! The traditional memory balloon (virtio 1.2 §5.5): the guest gives pages back to the host, takes them again, tells
//! which it does not use, and how its memory fares.
//!
//! ```text
//!   Handle ── target ──▶ configuration space ── interrupt ──▶ driver
//!   driver ── inflate: page numbers ──▶ discarded
//!   driver ── deflate: page numbers ──▶ nothing to do: a touched page comes back by itself
//!   driver ── reporting: free ranges ─▶ discarded
//!   driver ◀─ statistics: a buffer that is returned asks for new ones
//! ```
//! A discarded page reads as zeros or, where memory is a private copy of a file, as the file; a driver must not rely on
//! either (§5.5.6.1: without VIRTIO_BALLOON_F_PAGE_POISON).

mod device;
mod handle;
mod pages;
#[cfg(test)]
mod tests;

pub use device::Balloon;
pub use handle::{BalloonHandle, BalloonStatistics};
