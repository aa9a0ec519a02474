//! When images are made.

use std::time::{SystemTime, UNIX_EPOCH};

/// SOURCE_DATE_EPOCH is no time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("SOURCE_DATE_EPOCH={0:?} is no number of seconds since 1970; correct or unset it")]
pub struct EpochError(String);

/// What SOURCE_DATE_EPOCH says, in seconds since 1970 (<https://reproducible-builds.org/specs/source-date-epoch/>). Empty
/// is as good as unset.
pub fn epoch() -> Result<Option<u64>, EpochError> {
    match std::env::var_os("SOURCE_DATE_EPOCH") {
        Some(text) if !text.is_empty() => seconds(&text.to_string_lossy()).map(Some),
        _ => Ok(None),
    }
}

fn seconds(text: &str) -> Result<u64, EpochError> {
    text.parse().map_err(|_| EpochError(text.chars().take(100).collect()))
}

/// Now, in seconds since 1970, or what SOURCE_DATE_EPOCH says.
pub(crate) fn build_time() -> Result<u64, EpochError> {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Ok(epoch()?.unwrap_or_else(now))
}

/// RFC 3339, in UTC. The calendar's rule of 400 years is counted from 1 March of year 0, where leap days come last.
pub fn timestamp(seconds: u64) -> String {
    let (days, time) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epoch_that_is_no_time_is_refused() {
        assert_eq!(seconds("17"), Ok(17));
        for bad in ["abc", "-1", "1.5", " 1"] {
            assert!(seconds(bad).unwrap_err().to_string().contains(bad), "{bad}");
        }
    }

    #[test]
    fn time_is_written_as_the_calendar_has_it() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(timestamp(seconds), expected);
        }
    }
}
