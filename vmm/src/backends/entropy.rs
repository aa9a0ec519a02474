//! Random bytes from the host's kernel.

use rustix::rand::{GetRandomFlags, getrandom};

/// `count` random bytes, or fewer where the kernel gives up half-way; empty if it has no randomness yet.
pub fn bytes(count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let filled = getrandom(&mut bytes, GetRandomFlags::NONBLOCK).unwrap_or(0);
    bytes.truncate(filled);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_two_calls_differ() {
        assert_eq!(bytes(64).len(), 64);
        assert_ne!(bytes(64), bytes(64));
    }
}
