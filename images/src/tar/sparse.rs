//! Sparse files: which parts of a file have stored data, and the check that a map is consistent.

use super::TarProblem;

/// A part of a file that has stored data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub offset: u64,
    pub length: u64,
}

/// Checks that extents ascend, do not overlap, lie within `size`, and add up to `stored` bytes.
pub(super) fn check(extents: &[Extent], size: u64, stored: u64) -> Result<(), TarProblem> {
    let (mut end, mut total) = (0u64, 0u64);
    for extent in extents {
        if extent.offset < end {
            return Err(TarProblem::SparseMap);
        }
        end = extent.offset.checked_add(extent.length).ok_or(TarProblem::SparseMap)?;
        // No overflow: what ascends without overlap adds up to at most `end`.
        total += extent.length;
    }
    if end > size || total != stored { Err(TarProblem::SparseMap) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extents(pairs: &[(u64, u64)]) -> Vec<Extent> {
        pairs.iter().map(|&(offset, length)| Extent { offset, length }).collect()
    }

    #[test]
    fn map_that_fits_passes() {
        assert!(check(&extents(&[]), 10, 0).is_ok());
        assert!(check(&extents(&[(0, 2), (2, 1), (8, 2), (10, 0)]), 10, 5).is_ok());
    }

    #[test]
    fn map_that_overlaps_exceeds_or_misses_is_refused() {
        for (pairs, size, stored) in [
            (&[(0, 2), (1, 2)][..], 10, 4),
            (&[(4, 2), (0, 2)], 10, 4),
            (&[(8, 3)], 10, 3),
            (&[(0, 2)], 10, 3),
            (&[(u64::MAX, 2)], u64::MAX, 2),
        ] {
            assert!(check(&extents(pairs), size, stored).is_err(), "{pairs:?}");
        }
    }
}
