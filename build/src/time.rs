//! Times of what is built.

use std::time::{SystemTime, UNIX_EPOCH};

/// What SOURCE_DATE_EPOCH says, in seconds since 1970 (<https://reproducible-builds.org/specs/source-date-epoch/>).
pub fn epoch() -> Result<Option<u64>, String> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) if text.is_empty() => Ok(None),
        Ok(text) => match text.parse() {
            Ok(seconds) => Ok(Some(seconds)),
            Err(_) => Err(format!("SOURCE_DATE_EPOCH={text:?} is no number of seconds")),
        },
        Err(_) => Ok(None),
    }
}

/// Now, in seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
