//! Devices on I/O ports. Register logic only: they know no KVM, no thread and no file. An interrupt is a trait, what
//! they produce is returned or put in a buffer that they are given.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod console;
pub mod control;
pub mod keyboard;
pub mod serial;

use std::io;

/// An interrupt line that a device can pulse.
pub trait Interrupt: Send + Sync {
    /// Raises and lowers the line.
    fn trigger(&self) -> io::Result<()>;
}
