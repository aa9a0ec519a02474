//! Median and range of a handful of durations.

use serde::Serialize;

/// Summary of a series, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// The middle value, or the mean of the two middle ones.
    pub median_ns: u64,
    /// The smallest value.
    pub min_ns: u64,
    /// The largest value.
    pub max_ns: u64,
}

impl Summary {
    /// Summarises a series; `None` if it is empty.
    pub fn of(series: &[u64]) -> Option<Self> {
        let mut sorted = series.to_vec();
        sorted.sort_unstable();
        let (min_ns, max_ns) = (*sorted.first()?, *sorted.last()?);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Self { median_ns: low.midpoint(high), min_ns, max_ns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_of_even_series_halves_between_the_middle_two() {
        let summary = Summary::of(&[40, 10, 20, 30]).unwrap();
        assert_eq!(summary, Summary { median_ns: 25, min_ns: 10, max_ns: 40 });
    }

    #[test]
    fn summary_of_empty_series_is_none() {
        assert_eq!(Summary::of(&[]), None);
    }
}
