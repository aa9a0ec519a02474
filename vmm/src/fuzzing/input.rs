//! A fuzzer's bytes as numbers. Past their end everything is zero.

use super::queues::{MEMORY_END, SECOND_REGION};

/// Bytes that are taken from the front.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        front
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.u8()) % bound
    }

    /// Mostly an address in the first 64 KiB of memory; else one at an edge, or anything.
    pub fn address(&mut self) -> u64 {
        match self.u8() {
            0..=223 => self.u16().into(),
            224..=239 => SECOND_REGION + u64::from(self.u16()),
            240 => MEMORY_END - 1,
            241 => MEMORY_END,
            242 => u64::MAX,
            243 => u64::MAX - 15,
            244 => 1 << 63,
            245 => SECOND_REGION - 1,
            246 => 0xd000_0000,
            247 => 0xffff_fff0,
            _ => self.u64(),
        }
    }

    /// Mostly small; else at an edge, or anything.
    pub fn length(&mut self) -> u32 {
        match self.u8() {
            0..=159 => self.u8().into(),
            160..=223 => self.u16().into(),
            224..=231 => 512 * u32::from(self.u8()),
            232 => u32::MAX,
            233 => 1 << 31,
            234 => MEMORY_END as u32,
            _ => self.u32(),
        }
    }
}
