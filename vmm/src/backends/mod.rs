//! What is behind a device on the host's side: files and sockets. They know nothing of virtio.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod disk;
pub mod entropy;
pub mod frame_socket;
pub mod link;
pub mod share;
pub mod socket;
pub mod tap;
mod tap_ioctls;
