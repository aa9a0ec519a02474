//! Segment descriptors, and the page tables with which the 64-bit entry of a bzImage expects to be called.

use vm_memory::GuestAddress;

use super::{WriteError, layout, write};
use crate::guest_memory::GuestMemory;

/// Selector of the flat code segment (`__BOOT_CS` of Linux's boot protocol).
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the flat data segment (`__BOOT_DS`).
pub const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment.
pub const TASK_SELECTOR: u16 = 0x20;

/// Descriptors of the flat segments: base 0, limit 4 GiB.
pub mod descriptor {
    /// 64-bit code, readable, accessed.
    pub const CODE_64: u64 = 0x00af_9b00_0000_ffff;
    /// 32-bit code, readable, accessed.
    pub const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
    /// Data, writable, accessed.
    pub const DATA: u64 = 0x00cf_9300_0000_ffff;
    /// Busy task state segment, limit 0x67.
    pub const TASK: u64 = 0x0000_8b00_0000_0067;
}

/// Bytes of the table that [`write_gdt`] writes.
pub const GDT_BYTES: u16 = 5 * 8;

/// Writes the descriptor table with this code segment.
pub fn write_gdt(memory: &GuestMemory, code: u64) -> Result<(), WriteError> {
    let table = [0, 0, code, descriptor::DATA, descriptor::TASK];
    write(memory, "the descriptor table", layout::GDT, &words(&table))
}

/// Writes page tables that map the low 4 GiB onto themselves in pages of 2 MiB; returns the value for `cr3`.
pub fn write_page_tables(memory: &GuestMemory) -> Result<GuestAddress, WriteError> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const LARGE: u64 = 0x80;
    const PAGE: u64 = 0x1000;
    let pml4 = layout::PAGE_TABLES;
    let pdpt = pml4.0 + PAGE;
    let directories = pdpt + PAGE;
    write(memory, "a page table", pml4, &words(&[pdpt | PRESENT_WRITABLE]))?;
    let pdpt_entries: Vec<u64> =
        (0..4).map(|index| (directories + index * PAGE) | PRESENT_WRITABLE).collect();
    write(memory, "a page table", GuestAddress(pdpt), &words(&pdpt_entries))?;
    let pages: Vec<u64> = (0..4 * 512).map(|index| (index << 21) | LARGE | PRESENT_WRITABLE).collect();
    write(memory, "a page table", GuestAddress(directories), &words(&pages))?;
    Ok(pml4)
}

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::guest_memory;

    #[test]
    fn page_tables_map_last_page_below_4_gib_onto_itself() {
        let memory = guest_memory::map(&layout::memory_regions(2 << 20)).unwrap();
        let cr3 = write_page_tables(&memory).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            memory.read_obj(GuestAddress((table & !0xfff) + index * 8)).unwrap()
        };
        let directory = entry(entry(cr3.0, 0), 3);
        assert_eq!(entry(directory, 511), 0xffe0_0083);
    }
}
