//! Bytes that wait for a slow host, in hardly more memory than they are: there may be hundreds of these, and what each
//! could hold in memory that was once needed would be more than what all of them may hold.

use std::collections::VecDeque;

/// Below this, memory is not worth counting.
const STEP_BYTES: usize = 4096;

/// See the module's documentation.
#[derive(Default)]
pub struct Backlog(VecDeque<u8>);

impl Backlog {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none wait.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first of them.
    pub fn front(&self) -> &[u8] {
        self.0.as_slices().0
    }

    /// Takes more. It grows by a quarter, where a vector would double.
    pub fn push(&mut self, bytes: &[u8]) {
        let needed = self.0.len() + bytes.len();
        if needed > self.0.capacity() {
            self.0.reserve_exact(needed + needed / 4 + STEP_BYTES - self.0.len());
        }
        self.0.extend(bytes);
    }

    /// The first are gone; their memory is given back once it is as much as what is left.
    pub fn drop_front(&mut self, count: usize) {
        self.0.drain(..count.min(self.0.len()));
        if self.0.is_empty() {
            self.0 = VecDeque::new();
        } else if self.0.capacity() > 2 * self.0.len() + 2 * STEP_BYTES {
            self.0.shrink_to_fit();
        }
    }

    /// All are gone.
    pub fn clear(&mut self) {
        self.0 = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn backlog_keeps_order_in_bounded_memory(
            steps in prop::collection::vec(prop_oneof![
                (1usize..40_000).prop_map(Ok),
                (1usize..40_000).prop_map(Err),
            ], 1..60),
        ) {
            let (mut backlog, mut next_in, mut next_out) = (Backlog::default(), 0u8, 0u8);
            for step in steps {
                match step {
                    Ok(count) => {
                        let bytes: Vec<u8> = (0..count).map(|at| next_in.wrapping_add(at as u8)).collect();
                        next_in = next_in.wrapping_add(count as u8);
                        backlog.push(&bytes);
                    }
                    Err(count) => {
                        let count = count.min(backlog.front().len());
                        for byte in &backlog.front()[..count] {
                            prop_assert_eq!(*byte, next_out);
                            next_out = next_out.wrapping_add(1);
                        }
                        backlog.drop_front(count);
                    }
                }
                prop_assert_eq!(next_out.wrapping_add(backlog.len() as u8), next_in);
                prop_assert!(backlog.0.capacity() <= 2 * backlog.len() + 2 * STEP_BYTES);
            }
        }
    }
}
