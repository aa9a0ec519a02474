//! virtio 1.2 devices behind the MMIO transport. They know no KVM: an interrupt is a trait, a doorbell an eventfd.
//!
//! ```text
//!   vCPU thread                                  event loop thread
//!   MmioTransport ── start(queues) / stop ─────▶ Worker ──▶ a Device: block, net, vsock, …
//!     registers, negotiation                       ▲  owns queues while they run
//!        ▲                                         │
//!        └── interrupt status (atomic) ◀───────────┘   doorbell: eventfd, without a vCPU exit to this process
//! ```
//! What a driver reads of registers, it reads from memory (`registers.rs`), without an exit at all.
//!
//! Whatever a driver does wrong is a [`queue::QueueError`]: the device stops, sets DEVICE_NEEDS_RESET once, and waits
//! for the driver to reset it.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod balloon;
pub mod block;
pub mod chain;
pub mod config_space;
pub mod console;
pub mod counters;
pub mod device;
#[cfg(any(test, feature = "fuzzing"))]
pub mod driver_model;
pub mod file_system;
pub mod limiter;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod registers;
pub mod rng;
mod slices;
pub mod under_way;
pub mod vsock;
pub mod worker;
