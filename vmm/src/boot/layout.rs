//! Where things are in guest physical memory.
//!
//! ```text
//!  0x0000_1000  PVH start info, or zero page of the Linux boot protocol
//!  0x0000_2000  PVH module list and memory map; GDT
//!  0x0000_3000  page tables (64-bit entry of a bzImage only)
//!  0x0002_0000  kernel command line
//!  0x0009_fc00  MP table: the last KiB of base memory
//!  0x0010_0000  kernel, where its file says
//!       …       initramfs, page-aligned, as high as it goes below 3 GiB
//!  0xc000_0000  hole for devices; memory that does not fit below goes on at 4 GiB
//!  0xd000_0000  virtio-mmio devices, 4 KiB apart
//!  0xfec0_0000  IOAPIC, 0xfee0_0000 local APICs
//!  0xfffb_c000  KVM's identity map and task state segment (Intel)
//!       …       from 4 GiB or the end of memory on, at a multiple of 2 GiB: memory that is added later,
//!               then files that are in the guest's memory, at multiples of 128 MiB
//! ```

use vm_memory::GuestAddress;

/// The PVH start info or the zero page.
pub const START_INFO: GuestAddress = GuestAddress(0x1000);
/// The PVH module list; one entry.
pub const MODULE_LIST: GuestAddress = GuestAddress(0x2000);
/// The PVH memory map.
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x2100);
/// The global descriptor table.
pub const GDT: GuestAddress = GuestAddress(0x2800);
/// Six pages: PML4, PDPT, and four page directories.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x3000);
/// The kernel command line, NUL-terminated.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// The MP floating pointer and configuration table.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// End of base memory as the guest is told: the MP table above stays untouched.
pub const BASE_MEMORY_END: u64 = MP_TABLE.0;
/// Where memory starts again above the legacy hole.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
/// Start of the hole below 4 GiB.
pub const DEVICE_HOLE_START: u64 = 0xc000_0000;
/// End of the hole.
pub const DEVICE_HOLE_END: u64 = 1 << 32;
/// First virtio-mmio device.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Distance of virtio-mmio devices, and size of each.
pub const VIRTIO_MMIO_BYTES: u64 = 0x1000;
/// The IOAPIC that KVM emulates.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs that KVM emulates.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages for KVM on Intel processors.
pub const KVM_TSS: usize = 0xfffb_d000;

/// Guest memory of `bytes` as regions: one below the device hole and, if need be, one from 4 GiB.
pub fn memory_regions(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(DEVICE_HOLE_START);
    let mut regions = vec![(GuestAddress(0), low)];
    if bytes > low {
        regions.push((GuestAddress(DEVICE_HOLE_END), bytes - low));
    }
    regions
}

/// Where memory that is added later starts, in a guest with these regions: above them with a gap, so that no buffer is
/// in both, at a multiple of the largest block in which Linux adds memory on x86.
pub fn added_memory_start(regions: &[(GuestAddress, u64)]) -> GuestAddress {
    const LARGEST_BLOCK: u64 = 2 << 30;
    let beyond = regions.iter().map(|(start, bytes)| start.0.saturating_add(*bytes).saturating_add(1));
    GuestAddress(beyond.fold(DEVICE_HOLE_END, u64::max).next_multiple_of(LARGEST_BLOCK))
}

/// Where the next file goes that is in the guest's memory, if all else ends at `end`: in a section of its own, so that
/// Linux does not take it for memory that it can give away, and with a gap.
pub fn next_file_start(end: u64) -> GuestAddress {
    const SECTION: u64 = 128 << 20;
    GuestAddress(end.saturating_add(1).max(DEVICE_HOLE_END).next_multiple_of(SECTION))
}

/// What of that memory the guest's kernel may use, as `(start, bytes)`.
pub fn usable_ranges(regions: &[(GuestAddress, u64)]) -> Vec<(u64, u64)> {
    let mut usable = vec![(0, BASE_MEMORY_END)];
    for (start, bytes) in regions {
        let from = start.0.max(HIGH_MEMORY_START);
        let end = start.0.saturating_add(*bytes);
        if end > from {
            usable.push((from, end - from));
        }
    }
    usable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_regions_below_hole_are_one() {
        let regions = memory_regions(128 << 20);
        assert_eq!(regions, [(GuestAddress(0), 128 << 20)]);
        assert_eq!(usable_ranges(&regions), [(0, 0x9fc00), (0x10_0000, 127 << 20)]);
    }

    #[test]
    fn memory_regions_over_hole_go_on_at_4_gib() {
        let regions = memory_regions(5 << 30);
        assert_eq!(regions, [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
        assert_eq!(usable_ranges(&regions)[2], (4 << 30, 2 << 30));
        assert_eq!(memory_regions(3 << 30).len(), 1);
        assert_eq!(added_memory_start(&memory_regions(3 << 30)), GuestAddress(4 << 30));
        assert_eq!(added_memory_start(&regions), GuestAddress(8 << 30));
        assert_eq!(added_memory_start(&memory_regions((7 << 30) + 1)), GuestAddress(10 << 30));
        assert_eq!(next_file_start(1), GuestAddress(4 << 30));
        assert_eq!(next_file_start(4 << 30), GuestAddress((4 << 30) + (128 << 20)));
        assert_eq!(next_file_start((4 << 30) + 1), GuestAddress((4 << 30) + (128 << 20)));
    }
}
