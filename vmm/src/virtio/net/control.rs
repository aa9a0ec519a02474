//! The control queue (virtio 1.2 §5.1.6.5): a driver that forwards frames takes no unfinished ones any more.

use super::features;
use crate::{
    backends::link::Link,
    virtio::queue::{Chain, QueueError},
};

const CLASS_GUEST_OFFLOADS: u8 = 5;
const COMMAND_SET: u8 = 0;
/// `ack` (§5.1.6.5): done, or not.
const OK: u8 = 0;
const ERROR: u8 = 1;

/// Carries out a command of a driver that has accepted `accepted`; returns the bytes written.
pub fn serve(mut chain: Chain, accepted: u64, link: &mut dyn Link) -> Result<u32, QueueError> {
    let bad = |problem| QueueError::BadRequest { head: chain.head, problem };
    let Some([class, command]) = chain.readable.read::<2>() else {
        return Err(bad("it is shorter than a command (virtio 1.2 §5.1.6.5)"));
    };
    if chain.writable.is_empty() {
        return Err(bad("it has no room for the answer (virtio 1.2 §5.1.6.5)"));
    }
    let done = match (class, command, chain.readable.read::<8>().map(u64::from_le_bytes)) {
        // §5.1.6.5.6.2: not what was not negotiated.
        (CLASS_GUEST_OFFLOADS, COMMAND_SET, Some(offloads))
            if accepted & features::CTRL_GUEST_OFFLOADS != 0
                && offloads & !(accepted & features::GUEST_OFFLOADS) == 0 =>
        {
            link.set_receive_offloads(features::receive_offloads(offloads)).is_ok()
        }
        _ => false,
    };
    chain.writable.write(&[if done { OK } else { ERROR }]);
    Ok(1)
}
