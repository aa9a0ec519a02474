//! Deterministic pseudo-random bytes: content that compresses badly and is the same in every run.

/// A xorshift64* generator (Vigna 2014). Not for secrets.
#[derive(Debug, Clone)]
pub struct Noise(u64);

impl Noise {
    /// A generator whose sequence depends on `seed` only.
    pub fn new(seed: u64) -> Self {
        // A zero state would stay zero.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number in `0..end`; `end` must not be 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// `length` bytes.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_same_seed_are_equal_and_of_other_seed_differ() {
        assert_eq!(Noise::new(1).bytes(1001), Noise::new(1).bytes(1001));
        assert_ne!(Noise::new(1).bytes(1001), Noise::new(2).bytes(1001));
        assert_ne!(Noise::new(0).bytes(64), vec![0; 64]);
    }
}
