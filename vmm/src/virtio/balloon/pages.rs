//! Page numbers into few, large ranges.

use vm_memory::GuestAddress;

/// log2 of the size of a balloon's pages, whatever the guest's own are (§5.5.6).
const PAGE_SHIFT: u32 = 12;

/// Ranges of memory that these pages make up: sorted, disjoint, as large as possible.
pub fn ranges(mut page_numbers: Vec<u32>) -> Vec<(GuestAddress, usize)> {
    page_numbers.sort_unstable();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for number in page_numbers {
        let start = u64::from(number) << PAGE_SHIFT;
        let end = start + (1 << PAGE_SHIFT);
        match ranges.last_mut() {
            Some((_, last_end)) if start <= *last_end => *last_end = end.max(*last_end),
            _ => ranges.push((start, end)),
        }
    }
    ranges.into_iter().map(|(start, end)| (GuestAddress(start), (end - start) as usize)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_of_scattered_pages_are_joined() {
        let found = ranges(vec![7, 5, 6, 5, u32::MAX, 9]);
        let expected = [(0x5000, 0x3000), (0x9000, 0x1000), (0xfff_ffff_f000, 0x1000)];
        assert_eq!(found, expected.map(|(start, bytes)| (GuestAddress(start), bytes)));
    }

    proptest! {
        #[test]
        fn ranges_have_the_same_pages_and_never_touch(pages in prop::collection::vec(0u32..300, 0..200)) {
            let found = ranges(pages.clone());
            let covered: Vec<u32> = found
                .iter()
                .flat_map(|(start, bytes)| (start.0 >> 12) as u32..((start.0 + *bytes as u64) >> 12) as u32)
                .collect();
            let expected: Vec<u32> = pages.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
            prop_assert_eq!(covered, expected);
            for pair in found.windows(2) {
                prop_assert!(pair[0].0.0 + (pair[0].1 as u64) < pair[1].0.0);
            }
        }
    }
}
