//! Times of what is built.

use std::time::{SystemTime, UNIX_EPOCH};

/// What SOURCE_DATE_EPOCH says, in seconds since 1970.
pub fn epoch() -> Result<Option<u64>, String> {
    cloche_images::epoch().map_err(|error| error.to_string())
}

/// Now, in seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
