//! Limits on what a device may do in a span of time.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use crate::rate_limit::{RateLimit, TokenBucket};

/// Limits on operations and on bytes; either may be absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitConfig {
    /// Operations: requests, frames.
    #[serde(default)]
    pub ops: Option<BucketConfig>,
    /// Bytes of their data; of a disk, those that are made zeros included.
    #[serde(default)]
    pub bytes: Option<BucketConfig>,
}

/// One token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketConfig {
    /// What is allowed in the long run.
    pub per_second: NonZeroU64,
    /// What is allowed at once after a rest; `None` is what a second allows.
    #[serde(default)]
    pub burst: Option<NonZeroU64>,
}

impl LimitConfig {
    /// Full buckets.
    pub(crate) fn to_rate_limit(self, now_ns: u64) -> RateLimit {
        let bucket = |config: BucketConfig| {
            TokenBucket::new(config.per_second, config.burst.unwrap_or(config.per_second), now_ns)
        };
        RateLimit { ops: self.ops.map(bucket), bytes: self.bytes.map(bucket) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_as_json_refuses_nothing_a_second() {
        let limit: LimitConfig = serde_json::from_str(r#"{"bytes":{"per_second":1000}}"#).unwrap();
        let mut limit = limit.to_rate_limit(0);
        assert!(limit.ops.is_none());
        limit.charge(1000);
        assert_eq!(limit.wait_ns(0), 1);
        for json in [r#"{"ops":{"per_second":0}}"#, r#"{"ops":{"burst":1}}"#, r#"{"op":null}"#] {
            assert!(serde_json::from_str::<LimitConfig>(json).is_err(), "{json}");
        }
    }
}
