//! A list of buffers that needs no heap while it is short, as nearly all are: a device makes several for each request.
//! What is taken from its front costs nothing for the rest.

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
    /// How many at the front are gone.
    gone: usize,
}

impl Default for Slices<'_> {
    fn default() -> Self {
        let nothing = || VolatileSlice::from(<&mut [u8]>::default());
        Self { few: [nothing(), nothing(), nothing()], count: 0, many: Vec::new(), gone: 0 }
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
        let all =
            if self.many.is_empty() { self.few.get(..self.count).unwrap_or_default() } else { &self.many };
        all.get(self.gone..).unwrap_or_default()
    }

    /// Drops the first `bytes` bytes.
    pub fn drop_front(&mut self, mut bytes: usize) {
        let all = if self.many.is_empty() {
            self.few.get_mut(..self.count).unwrap_or_default()
        } else {
            &mut self.many
        };
        for slice in all.iter_mut().skip(self.gone) {
            if slice.len() > bytes {
                if let Ok(rest) = slice.offset(bytes) {
                    *slice = rest;
                }
                return;
            }
            bytes -= slice.len();
            self.gone += 1;
        }
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

    #[test]
    fn drop_front_leaves_the_rest_of_few_and_of_many() {
        let mut bytes = [0u8; 10];
        let all = VolatileSlice::from(bytes.as_mut_slice());
        for (count, left) in [(2, vec![1, 10]), (5, vec![1, 10, 10, 10, 10])] {
            let mut slices = Slices::default();
            (0..count).for_each(|_| slices.push(all));
            let lengths =
                |slices: &Slices| slices.as_slice().iter().map(VolatileSlice::len).collect::<Vec<_>>();
            slices.drop_front(0);
            slices.drop_front(4);
            slices.drop_front(5);
            assert_eq!(lengths(&slices), left);
            slices.drop_front(1);
            assert_eq!(lengths(&slices), left[1..]);
            slices.drop_front(1000);
            assert!(slices.as_slice().is_empty());
        }
    }
}
