//! A descriptor chain as its driver linked it (virtio 1.2 §2.7.5): descriptors of the queue's table, then, if the last
//! of them says so, those of one indirect table.

use vm_memory::{GuestAddress, VolatileMemory, VolatileSlice};

use super::queue::QueueError;
use crate::guest_memory::Finder;

const DESCRIPTOR_BYTES: u64 = 16;

/// Descriptor flags.
mod flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// A buffer of a chain; where it lies is not checked yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Length.
    pub bytes: u32,
    /// Whether the device writes it; else it reads it.
    pub writable: bool,
}

/// Follows a chain. It ends after an error, and in any case after as many descriptors as the queue has entries.
pub struct Walk<'m> {
    head: u16,
    limit: u16,
    /// The table in use; `None` if it is not, or not all, in memory.
    table: Option<VolatileSlice<'m>>,
    entries: u32,
    indirect: bool,
    next: Option<u16>,
    seen: u16,
    bytes: u32,
}

impl<'m> Walk<'m> {
    /// The chain that starts at `head` of a queue of `size` entries with this table.
    pub fn new(finder: &mut Finder<'m>, table: u64, size: u16, head: u16) -> Self {
        Self {
            head,
            limit: size,
            table: table_at(finder, table, size.into()),
            entries: size.into(),
            indirect: false,
            next: Some(head),
            seen: 0,
            bytes: 0,
        }
    }

    fn broken(&self, problem: &'static str) -> QueueError {
        QueueError::BrokenChain { head: self.head, problem }
    }

    /// The next descriptor, if there is one.
    pub fn next(&mut self, finder: &mut Finder<'m>) -> Result<Option<Descriptor>, QueueError> {
        let Some(index) = self.next.take() else { return Ok(None) };
        let (mut address, mut bytes, mut flags, mut next) = self.read(index)?;
        if flags & flag::INDIRECT != 0 {
            self.enter(finder, address, bytes, flags)?;
            (address, bytes, flags, next) = self.read(0)?;
            if flags & flag::INDIRECT != 0 {
                return Err(self.broken("an indirect table in an indirect table (virtio 1.2 §2.7.5.3.1)"));
            }
        }
        self.seen = self.seen.saturating_add(1);
        if self.seen > self.limit {
            return Err(QueueError::LongChain { head: self.head, limit: self.limit });
        }
        self.bytes = self
            .bytes
            .checked_add(bytes)
            .ok_or_else(|| self.broken("it has 4 GiB or more (virtio 1.2 §2.7.5.2)"))?;
        self.next = (flags & flag::NEXT != 0).then_some(next);
        Ok(Some(Descriptor { address, bytes, writable: flags & flag::WRITE != 0 }))
    }

    /// Goes on in an indirect table. The write flag of the descriptor that refers to it says nothing (§2.7.5.3.2).
    fn enter(
        &mut self,
        finder: &mut Finder<'m>,
        address: u64,
        bytes: u32,
        flags: u16,
    ) -> Result<(), QueueError> {
        if self.indirect {
            return Err(self.broken("an indirect table in an indirect table (virtio 1.2 §2.7.5.3.1)"));
        }
        if flags & flag::NEXT != 0 {
            return Err(self.broken("it goes on after an indirect table (virtio 1.2 §2.7.5.3.1)"));
        }
        if bytes == 0 || !u64::from(bytes).is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(
                self.broken("an indirect table of no whole number of descriptors (virtio 1.2 §2.7.5.3)")
            );
        }
        self.indirect = true;
        self.entries = bytes / DESCRIPTOR_BYTES as u32;
        self.table = table_at(finder, address, self.entries);
        Ok(())
    }

    /// Address, length, flags and successor.
    fn read(&self, index: u16) -> Result<(u64, u32, u16, u16), QueueError> {
        if u32::from(index) >= self.entries {
            return Err(self.broken("it goes on outside of its table (virtio 1.2 §2.7.5)"));
        }
        let outside = || self.broken("its table is not in memory (virtio 1.2 §2.7.5)");
        let table = self.table.as_ref().ok_or_else(outside)?;
        let at = usize::from(index) * DESCRIPTOR_BYTES as usize;
        // Each half is read once: the driver may change it at any time, but not under us.
        let half = |at| table.get_ref::<u64>(at).map(|half| u64::from_le(half.load())).map_err(|_| outside());
        let (address, rest) = (half(at)?, half(at + 8)?);
        Ok((address, rest as u32, (rest >> 32) as u16, (rest >> 48) as u16))
    }
}

fn table_at<'m>(finder: &mut Finder<'m>, address: u64, entries: u32) -> Option<VolatileSlice<'m>> {
    let bytes = usize::try_from(u64::from(entries) * DESCRIPTOR_BYTES).ok()?;
    finder.buffer(GuestAddress(address), bytes, false)
}
