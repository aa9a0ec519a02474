//! What Linux's own drivers find in a guest's devices: one file for each kind of device. See [`crate::guest`].

mod balloon;
mod block;
mod console;
mod cpu;
mod kernel;
mod memory;
mod net;
mod pmem;
mod rng;
mod vsock;

use crate::suite::Body;

/// Every body of this theme.
pub fn all() -> Vec<Body> {
    [
        balloon::BODIES,
        block::BODIES,
        console::BODIES,
        cpu::BODIES,
        kernel::BODIES,
        memory::BODIES,
        net::BODIES,
        pmem::BODIES,
        rng::BODIES,
        vsock::BODIES,
    ]
    .concat()
}
