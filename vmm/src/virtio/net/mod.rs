//! The network device (virtio 1.2 §5.1): one pair of queues, and a control queue for offloads that change.
//!
//! ```text
//!   driver ── transmit queue ──▶ transmit ──▶ Link: tap or socket      Full: wait until it is writable
//!   driver ◀── receive queue ─── receive  ◀── Link                     no buffers: wait for the doorbell
//! ```
//! A frame goes straight between guest memory and the link, with the header in front of it that both sides know. What
//! a header says is the host kernel's to check, which does it for any user of a tap; here, only lengths count.

mod control;
mod device;
mod features;
mod receive;
#[cfg(test)]
mod tests;

use super::limiter::Limiter;
pub use device::Net;
