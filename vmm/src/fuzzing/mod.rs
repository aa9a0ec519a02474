//! Entry points for fuzzing: each runs one part that a guest, or a file, can feed, on bytes that the fuzzer made up.
//! Only compiled with the feature `fuzzing`, for the targets in `fuzz/`, and for this crate's own tests, which run
//! every entry on its seeds and on random bytes.
//!
//! ```text
//!   …_queue                               a Device, its VirtQueues, guest memory and rings     one thread
//!   mmio_bus                              Bus, MmioTransport, Worker, event loop, devices      as in a machine
//!   control_session                       a client of the control socket
//!   kernel_file                           kernel, initramfs and tables into guest memory
//! ```
//! An entry panics where something that must hold does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod boot;
mod bus;
mod control;
mod input;
mod memory;
mod net;
mod queues;
mod share;

pub use boot::kernel_file;
pub use bus::mmio_bus;
pub use control::control_session;
pub use memory::{console_queue, mem_queue, pmem_queue};
pub use net::net_queue;
pub use queues::{balloon_queue, block_queue, rng_queue, vsock_queue};
pub use share::share_queue;

/// Inputs from which a fuzzer should start, for the target of this name.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "balloon_queue" | "block_queue" | "console_queue" | "mem_queue" | "net_queue" | "pmem_queue"
        | "rng_queue" | "share_queue" | "vsock_queue" => queues::seeds(target),
        "mmio_bus" => bus::seeds(),
        "kernel_file" => boot::seeds(),
        "control_session" => control::seeds(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs an entry on its seeds, on damaged seeds, and on noise.
    fn exercise(target: &str, entry: fn(&[u8]), rounds: u32) {
        let seeds = seeds(target);
        assert!(!seeds.is_empty());
        let mut noise = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            noise
        };
        for seed in &seeds {
            entry(seed);
        }
        for round in 0..rounds {
            let mut bytes: Vec<u8> = if round % 4 == 0 {
                (0..next() % 600).map(|_| next() as u8).collect()
            } else {
                seeds[next() as usize % seeds.len()].clone()
            };
            for _ in 0..next() % 8 {
                let at = next() as usize % bytes.len().max(1);
                match (bytes.get_mut(at), next() % 3) {
                    (Some(byte), 0) => *byte = next() as u8,
                    (Some(byte), 1) => *byte ^= 1 << (next() % 8),
                    _ => bytes.truncate(at),
                }
            }
            entry(&bytes);
        }
    }

    #[test]
    fn block_queue_survives_seeds_and_noise() {
        exercise("block_queue", block_queue, 300);
    }

    #[test]
    fn balloon_queue_survives_seeds_and_noise() {
        exercise("balloon_queue", balloon_queue, 300);
    }

    #[test]
    fn net_queue_survives_seeds_and_noise() {
        exercise("net_queue", net_queue, 300);
    }

    #[test]
    fn console_queue_survives_seeds_and_noise() {
        exercise("console_queue", console_queue, 300);
    }

    #[test]
    fn mem_queue_survives_seeds_and_noise() {
        exercise("mem_queue", mem_queue, 300);
    }

    #[test]
    fn pmem_queue_survives_seeds_and_noise() {
        exercise("pmem_queue", pmem_queue, 100);
    }

    #[test]
    fn rng_queue_survives_seeds_and_noise() {
        exercise("rng_queue", rng_queue, 300);
    }

    #[test]
    fn share_queue_survives_seeds_and_noise() {
        exercise("share_queue", share_queue, 300);
    }

    #[test]
    fn vsock_queue_survives_seeds_and_noise() {
        exercise("vsock_queue", vsock_queue, 300);
    }

    #[test]
    fn mmio_bus_survives_seeds_and_noise() {
        exercise("mmio_bus", mmio_bus, 200);
    }

    #[test]
    fn control_session_survives_seeds_and_noise() {
        exercise("control_session", control_session, 300);
    }

    #[test]
    fn kernel_file_survives_seeds_and_noise() {
        exercise("kernel_file", kernel_file, 200);
    }
}
