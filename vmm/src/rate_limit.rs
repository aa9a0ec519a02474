//! Token buckets: how much a device may do in a span of time. Plain arithmetic on a clock that the caller reads, so
//! that tests need no waiting.
//!
//! ```text
//!   per_second ──▶ ┌────────┐
//!                  │ burst  │ ──▶ charge(cost)      work may start while something is in the bucket;
//!                  └────────┘                       its cost may leave a debt, which later work waits for
//! ```
//!
//! Because of the debt, work larger than the bucket passes too, and nothing has to be known of it before it starts.
//! Within `t` seconds at most `burst + per_second · t`, and one piece of work beyond, gets through.

use std::num::NonZeroU64;

/// Tokens are counted in billionths: one token a second is one of these in a nanosecond.
const SCALE: i128 = 1_000_000_000;

/// One bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBucket {
    per_second: NonZeroU64,
    burst: NonZeroU64,
    /// In units of 1/[`SCALE`] token; at most `burst`, and less than nothing after work larger than what was there.
    balance: i128,
    filled_ns: u64,
}

impl TokenBucket {
    /// A full bucket that refills with `per_second` tokens a second and holds at most `burst`.
    pub fn new(per_second: NonZeroU64, burst: NonZeroU64, now_ns: u64) -> Self {
        Self { per_second, burst, balance: i128::from(burst.get()) * SCALE, filled_ns: now_ns }
    }

    /// How long work has to wait from now, in nanoseconds; 0 is not at all. A clock that goes back adds nothing.
    pub fn wait_ns(&mut self, now_ns: u64) -> u64 {
        let passed = now_ns.saturating_sub(self.filled_ns);
        self.filled_ns = self.filled_ns.max(now_ns);
        let rate = i128::from(self.per_second.get());
        let most = i128::from(self.burst.get()) * SCALE;
        // Two factors below 2^64 each cannot overflow 127 bits together with a balance within ±2^94.
        self.balance = most.min(self.balance.saturating_add(i128::from(passed).saturating_mul(rate)));
        if self.balance > 0 {
            return 0;
        }
        // The first nanosecond after which something is in the bucket.
        u64::try_from(-self.balance / rate + 1).unwrap_or(u64::MAX)
    }

    /// Takes what work costs, whether it is there or not.
    pub fn charge(&mut self, tokens: u64) {
        self.balance = self.balance.saturating_sub(i128::from(tokens) * SCALE);
    }
}

/// Limits on operations and on bytes; either may be absent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// One token is an operation.
    pub ops: Option<TokenBucket>,
    /// One token is a byte.
    pub bytes: Option<TokenBucket>,
}

impl RateLimit {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        self.ops.is_none() && self.bytes.is_none()
    }

    /// How long the next operation has to wait from now, in nanoseconds; 0 is not at all.
    pub fn wait_ns(&mut self, now_ns: u64) -> u64 {
        let waits =
            [&mut self.ops, &mut self.bytes].map(|bucket| bucket.as_mut().map_or(0, |b| b.wait_ns(now_ns)));
        waits.into_iter().max().unwrap_or(0)
    }

    /// Takes one operation of so many bytes.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(ops) = &mut self.ops {
            ops.charge(1);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.charge(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn bucket(per_second: u64, burst: u64) -> TokenBucket {
        TokenBucket::new(NonZeroU64::new(per_second).unwrap(), NonZeroU64::new(burst).unwrap(), 0)
    }

    #[test]
    fn full_bucket_lets_its_burst_through_and_then_the_rate() {
        let mut bucket = bucket(10, 3);
        for _ in 0..3 {
            assert_eq!(bucket.wait_ns(0), 0);
            bucket.charge(1);
        }
        // Anything in the bucket is enough, and that is there a nanosecond later; the debt then is a token.
        assert_eq!(bucket.wait_ns(0), 1);
        assert_eq!(bucket.wait_ns(1), 0);
        bucket.charge(1);
        assert_eq!(bucket.wait_ns(1), SECOND / 10);
        assert_eq!(bucket.wait_ns(SECOND / 10), 1);
        assert_eq!(bucket.wait_ns(SECOND / 10 + 1), 0);
    }

    #[test]
    fn work_larger_than_the_bucket_passes_and_is_paid_for() {
        let mut bucket = bucket(1000, 1);
        assert_eq!(bucket.wait_ns(0), 0);
        bucket.charge(5001);
        assert_eq!(bucket.wait_ns(0), 5 * SECOND + 1);
        assert_eq!(bucket.wait_ns(5 * SECOND + 1), 0);
    }

    #[test]
    fn idle_time_fills_no_more_than_the_burst() {
        let mut bucket = bucket(u64::MAX, 2);
        bucket.charge(1);
        assert_eq!(bucket.wait_ns(u64::MAX), 0);
        bucket.charge(2);
        assert_ne!(bucket.wait_ns(u64::MAX), 0);
        // A clock that goes back neither fills nor breaks it.
        assert_ne!(bucket.wait_ns(0), 0);
    }

    #[test]
    fn limits_wait_for_the_slower_of_the_two() {
        let mut limit = RateLimit { ops: Some(bucket(1, 1)), bytes: Some(bucket(100, 100)) };
        assert!(!limit.is_none() && RateLimit::default().is_none());
        assert_eq!(limit.wait_ns(0), 0);
        limit.charge(1100);
        assert_eq!(limit.wait_ns(0), 10 * SECOND + 1);
        let mut none = RateLimit::default();
        none.charge(u64::MAX);
        assert_eq!(none.wait_ns(0), 0);
    }

    proptest! {
        /// Whatever is asked for and when: within the time that has passed, no more gets through than the burst, the
        /// rate, and one piece of work; and who always asks as soon as it may gets no less than the rate.
        #[test]
        fn rate_holds(
            per_second in 1u64..1_000_000_000_000,
            burst in 1u64..1_000_000_000_000,
            work in prop::collection::vec((0u64..1_000_000_000, 0u64..10_000_000_000), 1..100),
        ) {
            let mut bucket = bucket(per_second, burst);
            let (mut now, mut through, mut idle, mut last) = (0, 0u128, 0, 0);
            for (pause, cost) in work {
                now += pause;
                idle += pause;
                let wait = bucket.wait_ns(now);
                now += wait;
                prop_assert_eq!(bucket.wait_ns(now), 0);
                bucket.charge(cost);
                through += u128::from(cost);
                last = cost;
            }
            let earned = u128::from(per_second) * u128::from(now) / u128::from(SECOND);
            prop_assert!(through <= u128::from(burst) + earned + u128::from(last));
            let busy = u128::from(per_second) * u128::from(now - idle) / u128::from(SECOND);
            // A nanosecond of each wait is for something to be in the bucket at all.
            prop_assert!(through + u128::from(per_second) * 100 / u128::from(SECOND) + 1 >= busy);
        }
    }
}
