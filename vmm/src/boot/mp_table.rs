//! The Intel MultiProcessor table: how a kernel without ACPI learns of CPUs, the IOAPIC and interrupt lines
//! (Intel MultiProcessor Specification 1.4, chapter 4).

use std::collections::BTreeSet;

use super::{WriteError, layout, write as write_bytes};
use crate::guest_memory::GuestMemory;

/// Pins of the IOAPIC that KVM emulates, each wired to the ISA interrupt of the same number.
pub const IOAPIC_PINS: u8 = 24;
/// The line of the interval timer, by which a kernel calibrates where there is no TSC deadline timer.
const TIMER_LINE: u32 = 0;

const SPEC_REVISION: u8 = 4;
const POINTER_BYTES: u32 = 16;
const LOCAL_APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// Every local APIC, in the destination of a local interrupt entry.
const ALL_LOCAL_APICS: u8 = 0xff;
const ISA_BUS: u8 = 0;

/// Entry types, in the order in which they must appear (§4.3).
mod entry {
    pub const PROCESSOR: u8 = 0;
    pub const BUS: u8 = 1;
    pub const IOAPIC: u8 = 2;
    pub const IO_INTERRUPT: u8 = 3;
    pub const LOCAL_INTERRUPT: u8 = 4;
}

/// Interrupt types (§4.3.4).
mod interrupt {
    pub const VECTORED: u8 = 0;
    pub const NMI: u8 = 1;
    pub const EXTERNAL: u8 = 3;
}

/// Writes the floating pointer and the table. `lines` are the interrupt lines that something is wired to: a kernel
/// sets up each that it is told of, at a dozen VM exits.
pub fn write(
    memory: &GuestMemory,
    vcpus: u8,
    lines: impl IntoIterator<Item = u32>,
) -> Result<(), WriteError> {
    write_bytes(memory, "the MP table", layout::MP_TABLE, &build(vcpus, &pins(lines)))
}

/// The lines and the timer's, each once, in order.
fn pins(lines: impl IntoIterator<Item = u32>) -> BTreeSet<u8> {
    let pins = lines.into_iter().chain([TIMER_LINE]).filter_map(|line| u8::try_from(line).ok());
    pins.filter(|pin| *pin < IOAPIC_PINS).collect()
}

/// The floating pointer followed by the table. CPUs have APIC ids `0..vcpus`, the IOAPIC has
/// the next one.
fn build(vcpus: u8, pins: &BTreeSet<u8>) -> Vec<u8> {
    let (entries, count) = entries(vcpus, pins);
    let table = table(&entries, count);
    let mut bytes = pointer(layout::MP_TABLE.0 as u32 + POINTER_BYTES);
    bytes.extend(table);
    bytes
}

fn pointer(table: u32) -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(table.to_le_bytes());
    // Length in paragraphs, revision, checksum, and no default configuration.
    bytes.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes
}

fn table(entries: &[u8], count: u16) -> Vec<u8> {
    const HEADER_BYTES: u16 = 44;
    let mut bytes = b"PCMP".to_vec();
    // At most 32 CPUs, so the table is far below 64 KiB.
    bytes.extend((HEADER_BYTES + entries.len() as u16).to_le_bytes());
    bytes.extend([SPEC_REVISION, 0]);
    bytes.extend(b"CLOCHE  ");
    bytes.extend(b"MICROVM     ");
    // No OEM table: its address (4 bytes) and size (2 bytes) are zero.
    bytes.extend([0; 6]);
    bytes.extend(count.to_le_bytes());
    bytes.extend(layout::LOCAL_APIC.to_le_bytes());
    // No extended table.
    bytes.extend([0; 4]);
    bytes.extend(entries);
    set_checksum(&mut bytes, 7);
    bytes
}

fn entries(vcpus: u8, pins: &BTreeSet<u8>) -> (Vec<u8>, u16) {
    const ENABLED: u8 = 1;
    const BOOT_PROCESSOR: u8 = 2;
    const STEPPING_FAMILY: u32 = 0x600;
    const FEATURES_APIC_FPU: u32 = 0x201;
    let ioapic_id = vcpus;
    let mut bytes = Vec::new();
    let mut count = 0;
    let mut add = |entry: &[u8]| {
        bytes.extend(entry);
        count += 1;
    };
    for apic_id in 0..vcpus {
        let boot = if apic_id == 0 { BOOT_PROCESSOR } else { 0 };
        let mut cpu = vec![entry::PROCESSOR, apic_id, LOCAL_APIC_VERSION, ENABLED | boot];
        cpu.extend(STEPPING_FAMILY.to_le_bytes());
        cpu.extend(FEATURES_APIC_FPU.to_le_bytes());
        cpu.extend([0; 8]);
        add(&cpu);
    }
    let mut bus = vec![entry::BUS, ISA_BUS];
    bus.extend(b"ISA   ");
    add(&bus);
    let mut ioapic = vec![entry::IOAPIC, ioapic_id, IOAPIC_VERSION, ENABLED];
    ioapic.extend(layout::IOAPIC.to_le_bytes());
    add(&ioapic);
    // Flags 0: polarity and trigger mode as usual on ISA, high and edge, which is how lines are pulsed.
    for pin in pins.iter().copied() {
        add(&[entry::IO_INTERRUPT, interrupt::VECTORED, 0, 0, ISA_BUS, pin, ioapic_id, pin]);
    }
    add(&[entry::LOCAL_INTERRUPT, interrupt::EXTERNAL, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[entry::LOCAL_INTERRUPT, interrupt::NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);
    (bytes, count)
}

/// Makes all bytes sum up to zero.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(at) {
        *checksum = checksum.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_VCPUS;

    #[test]
    fn build_for_most_vcpus_fits_the_last_kib_of_base_memory() {
        let bytes = build(MAX_VCPUS, &pins(0..64)).len();
        assert!(bytes <= 1024, "{bytes}");
    }

    #[test]
    fn build_has_valid_checksums_length_and_count() {
        let bytes = build(3, &pins([4, 5, 5, 23, 24]));
        let sum = |part: &[u8]| part.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        let (pointer, table) = bytes.split_at(16);
        assert_eq!((sum(pointer), sum(table)), (0, 0));
        assert_eq!(&pointer[..8], b"_MP_\x10\xfc\x09\x00");
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
        // 3 CPUs, a bus, an IOAPIC, 4 lines (the timer's among them), 2 local interrupts.
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), 3 + 1 + 1 + 4 + 2);
        assert_eq!(table.len(), 44 + 3 * 20 + 8 * 8);
        let lines = &table[44 + 3 * 20 + 2 * 8..];
        assert_eq!([lines[5], lines[13], lines[21], lines[29]], [0, 4, 5, 23]);
    }
}
