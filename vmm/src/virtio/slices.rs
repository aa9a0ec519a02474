//! A list of buffers that needs no heap while it is short, as nearly all are: a device makes several for each request.

use vm_memory::VolatileSlice;

/// Kept in the list itself: header, data and status of a request are one each.
const FEW: usize = 3;

/// The list.
#[derive(Debug)]
pub struct Slices<'m> {
    few: [VolatileSlice<'m>; FEW],
    count: usize,
    /// All of them, if there are more than a few.
    many: Vec<VolatileSlice<'m>>,
}

impl Default for Slices<'_> {
    fn default() -> Self {
        let nothing = || VolatileSlice::from(<&mut [u8]>::default());
        Self { few: [nothing(), nothing(), nothing()], count: 0, many: Vec::new() }
    }
}

impl<'m> Slices<'m> {
    /// Appends one.
    pub fn push(&mut self, slice: VolatileSlice<'m>) {
        if !self.many.is_empty() {
            self.many.push(slice);
        } else if let Some(place) = self.few.get_mut(self.count) {
            *place = slice;
            self.count += 1;
        } else {
            self.many.reserve(4 * FEW);
            self.many.extend(self.few);
            self.many.push(slice);
        }
    }

    /// All of them.
    pub fn as_slice(&self) -> &[VolatileSlice<'m>] {
        if self.many.is_empty() { self.few.get(..self.count).unwrap_or_default() } else { &self.many }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn push_keeps_order_from_few_to_many() {
        let mut bytes = [0u8; 10];
        let all = VolatileSlice::from(bytes.as_mut_slice());
        let mut slices = Slices::default();
        for count in 1..=10 {
            slices.push(all.subslice(0, count).unwrap());
            let lengths: Vec<usize> = slices.as_slice().iter().map(VolatileSlice::len).collect();
            assert_eq!(lengths, (1..=count).collect::<Vec<_>>());
        }
    }
}
