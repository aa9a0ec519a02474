//! What a vCPU is before its first instruction: CPUID, MSRs, local APIC and registers.

use std::ops::RangeInclusive;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_lapic_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vm_memory::GuestAddress;

use crate::boot::{
    EntryPoint, layout,
    long_mode::{self, CODE_SELECTOR, DATA_SELECTOR, TASK_SELECTOR},
};

/// CPUID as the host's KVM offers it, made fit for a machine of `vcpus` single-threaded cores in one socket.
/// [`for_vcpu`] finishes it for each of them.
pub fn machine_cpuid(kvm: &Kvm, vcpus: u8) -> Result<CpuId, kvm_ioctls::Error> {
    let host = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    // KVM emulates the deadline timer in its own local APIC, but leaves it to us to say so
    // (Linux Documentation/virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID).
    Ok(guest_cpuid(host, vcpus, kvm.check_extension(Cap::TscDeadlineTimer)))
}

fn guest_cpuid(mut cpuid: CpuId, vcpus: u8, deadline_timer: bool) -> CpuId {
    cpuid.retain(|entry| GUEST_LEAVES.iter().any(|leaves| leaves.contains(&entry.function)));
    for entry in cpuid.as_mut_slice() {
        hide_host_features(entry);
        set_topology_independent_bits(entry, vcpus, deadline_timer);
    }
    if cpuid.as_slice().iter().any(|entry| entry.function == 0 && entry.eax >= 0xb) {
        for entry in extended_topology(vcpus) {
            // Fails only when the list is at its maximum, and two leaves fewer are then no loss.
            let _ = cpuid.push(entry);
        }
    }
    cpuid
}

/// Leaves that a guest sees; whatever else a KVM knows, now or one day, is the host's own. Left out are those of topology
/// (0xb, 0x1f, 0x8000_0026), of which a guest gets its own, of nested virtualisation (0x8000_000a), performance counters
/// (0x8000_0022), tracing (0x14, 0x1c), enclaves and encryption (0x12, 0x19, 0x8000_001f), and of sharing out caches and
/// bandwidth (0xf, 0x10, 0x8000_0020).
const GUEST_LEAVES: [RangeInclusive<u32>; 11] = [
    0..=2,
    4..=7,
    0xa..=0xa,
    0xd..=0xd,
    0x1d..=0x1e,
    0x24..=0x24,
    0x4000_0000..=0x4000_00ff,
    0x8000_0000..=0x8000_0008,
    0x8000_0019..=0x8000_001a,
    0x8000_001d..=0x8000_001e,
    0x8000_0021..=0x8000_0021,
];

/// Features that a guest is not offered, although KVM would give it some (Intel's and AMD's manuals, CPUID): to run
/// guests of its own, which is much of KVM within a hostile guest's reach; to count, sample and trace, which are channels
/// out of a guest; enclaves; and what only a host administers. AMD's oldest counters have no bit: `builder.rs` leaves
/// them out of the VM.
fn hide_host_features(entry: &mut kvm_cpuid_entry2) {
    let bits = |bits: &[u32]| bits.iter().fold(0, |all, bit| all | 1 << bit);
    match (entry.function, entry.index) {
        // VMX, SMX, PDCM; DS.
        (0x1, _) => {
            entry.ecx &= !bits(&[5, 6, 15]);
            entry.edx &= !bits(&[21]);
        }
        // SGX, PQM, PQE, PT; SGX_LC; PCONFIG, ARCH_LBR.
        (0x7, 0) => {
            entry.ebx &= !bits(&[2, 12, 15, 25]);
            entry.ecx &= !bits(&[30]);
            entry.edx &= !bits(&[18, 19]);
        }
        // SVM, IBS, SKINIT, LWP; counters of cores, of the north bridge, of time, and of caches.
        (0x8000_0001, _) => entry.ecx &= !bits(&[2, 10, 12, 15, 23, 24, 27, 28]),
        _ => {}
    }
}

fn set_topology_independent_bits(entry: &mut kvm_cpuid_entry2, vcpus: u8, deadline_timer: bool) {
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const HYPERTHREADING: u32 = 1 << 28;
    let vcpus = u32::from(vcpus);
    match entry.function {
        0x1 => {
            entry.ecx |= HYPERVISOR | if deadline_timer { TSC_DEADLINE } else { 0 };
            // EBX 23:16, number of logical processors, which counts only with the HTT bit.
            entry.ebx = (entry.ebx & 0x0000_ffff) | (vcpus << 16);
            entry.edx = if vcpus > 1 { entry.edx | HYPERTHREADING } else { entry.edx & !HYPERTHREADING };
        }
        // Caches (Intel): EAX 31:26 cores in the package - 1, EAX 25:14 sharers - 1.
        0x4 if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharers = if level >= 3 { vcpus } else { 1 };
            entry.eax = (entry.eax & 0x3fff) | ((vcpus - 1) << 26) | ((sharers - 1) << 14);
        }
        // Caches (AMD): EAX 25:14 sharers - 1.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 0x7;
            let sharers = if level >= 3 { vcpus } else { 1 };
            entry.eax = (entry.eax & 0xfc00_3fff) | ((sharers - 1) << 14);
        }
        // Performance counters are not offered: they would be a channel out of the guest.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // AMD: ECX 7:0 cores - 1, ECX 15:12 bits of the APIC id that name the core.
        0x8000_0008 => entry.ecx = (vcpus - 1) | (core_id_bits(vcpus) << 12),
        _ => {}
    }
}

/// Leaf 0xb (Intel SDM volume 2, CPUID): one thread a core, `vcpus` cores.
fn extended_topology(vcpus: u8) -> [kvm_cpuid_entry2; 2] {
    const THREAD_LEVEL: u32 = 1;
    const CORE_LEVEL: u32 = 2;
    let level = |index: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: index | (kind << 8),
        ..Default::default()
    };
    let vcpus = u32::from(vcpus);
    [level(0, 0, 1, THREAD_LEVEL), level(1, core_id_bits(vcpus), vcpus, CORE_LEVEL)]
}

fn core_id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// Puts the vCPU's APIC id, which is its index, where CPUID shows it.
pub fn for_vcpu(machine: &CpuId, index: u8) -> CpuId {
    let mut cpuid = machine.clone();
    let apic_id = u32::from(index);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            0x1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | (apic_id << 24),
            0xb => entry.edx = apic_id,
            // AMD: extended APIC id, core id, node id.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id, 0),
            _ => {}
        }
    }
    cpuid
}

/// Sets the MSRs that firmware would have set. One that this host does not know is left out: none is vital.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
    const MTRR_ENABLED_WRITE_BACK: u64 = (1 << 11) | 6;
    for (index, data) in [(MISC_ENABLE, FAST_STRINGS), (MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK)] {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        if let Ok(msrs) = Msrs::from_entries(&[entry]) {
            vcpu.set_msrs(&msrs)?;
        }
    }
    Ok(())
}

/// Wires the local APIC's pins as the MP table says: LINT0 to the PIC, LINT1 to NMI.
pub fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const DELIVER_EXTINT: u32 = 0x700;
    const DELIVER_NMI: u32 = 0x400;
    let mut lapic = vcpu.get_lapic()?;
    set_delivery_mode(&mut lapic, LINT0, DELIVER_EXTINT);
    set_delivery_mode(&mut lapic, LINT1, DELIVER_NMI);
    vcpu.set_lapic(&lapic)
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    const MODE_MASK: u32 = 0x700;
    let Some(bytes) = lapic.regs.get_mut(register..register + 4) else { return };
    let mut word = [0; 4];
    for (to, from) in word.iter_mut().zip(bytes.iter()) {
        *to = *from as u8;
    }
    let value = (u32::from_le_bytes(word) & !MODE_MASK) | mode;
    for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *to = from as _;
    }
}

/// Makes the boot vCPU start at `entry`. The other vCPUs wait for the guest's SIPI as they are.
pub fn set_registers(
    vcpu: &VcpuFd,
    entry: EntryPoint,
    page_tables: Option<GuestAddress>,
) -> Result<(), kvm_ioctls::Error> {
    let start_info = layout::START_INFO.0;
    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    match entry {
        EntryPoint::Pvh { entry } => (regs.rip, regs.rbx) = (entry.0, start_info),
        EntryPoint::Linux64 { entry } => (regs.rip, regs.rsi) = (entry.0, start_info),
    }
    vcpu.set_regs(&regs)?;
    let mut sregs = vcpu.get_sregs()?;
    set_segments_and_mode(&mut sregs, page_tables);
    vcpu.set_sregs(&sregs)
}

/// Flat segments; 64-bit mode if there are page tables, else 32-bit protected mode.
fn set_segments_and_mode(sregs: &mut kvm_sregs, page_tables: Option<GuestAddress>) {
    const CR0_PROTECTED: u64 = 1;
    const CR0_PAGING: u64 = 1 << 31;
    const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
    const EFER_LONG_MODE_ENABLED_ACTIVE: u64 = (1 << 8) | (1 << 10);
    let long = page_tables.is_some();
    let code = if long { long_mode::descriptor::CODE_64 } else { long_mode::descriptor::CODE_32 };
    let data = segment(long_mode::descriptor::DATA, DATA_SELECTOR);
    sregs.cs = segment(code, CODE_SELECTOR);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(long_mode::descriptor::TASK, TASK_SELECTOR);
    sregs.gdt.base = layout::GDT.0;
    sregs.gdt.limit = long_mode::GDT_BYTES - 1;
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr0 |= CR0_PROTECTED;
    if let Some(tables) = page_tables {
        sregs.cr3 = tables.0;
        sregs.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION;
        sregs.cr0 |= CR0_PAGING;
        sregs.efer |= EFER_LONG_MODE_ENABLED_ACTIVE;
    }
}

/// A segment register with base 0 as if it had been loaded from this descriptor.
fn segment(descriptor: u64, selector: u16) -> kvm_segment {
    let bit = |position: u32| ((descriptor >> position) & 1) as u8;
    let limit = ((descriptor & 0xffff) | ((descriptor >> 32) & 0xf_0000)) as u32;
    kvm_segment {
        base: 0,
        // With the granularity bit the limit counts pages.
        limit: if bit(55) == 1 { (limit << 12) | 0xfff } else { limit },
        selector,
        type_: ((descriptor >> 40) & 0xf) as u8,
        present: bit(47),
        dpl: ((descriptor >> 45) & 3) as u8,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        avl: bit(52),
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ..Default::default() }
    }

    #[test]
    fn segment_of_flat_code_descriptors_has_their_mode_and_4_gib() {
        let code64 = segment(long_mode::descriptor::CODE_64, CODE_SELECTOR);
        assert_eq!((code64.l, code64.db, code64.limit, code64.type_, code64.s), (1, 0, u32::MAX, 0xb, 1));
        let code32 = segment(long_mode::descriptor::CODE_32, CODE_SELECTOR);
        assert_eq!((code32.l, code32.db, code32.present), (0, 1, 1));
        let task = segment(long_mode::descriptor::TASK, TASK_SELECTOR);
        assert_eq!((task.type_, task.s, task.limit), (0xb, 0, 0x67));
    }

    #[test]
    fn cpuid_for_vcpu_shows_its_apic_id_everywhere() {
        let mut leaf1 = entry(1, 0);
        set_topology_independent_bits(&mut leaf1, 4, true);
        assert_eq!((leaf1.ecx >> 24) & 1, 1);
        let [_, cores] = extended_topology(4);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (2, 4, 0x201));
        let machine = CpuId::from_entries(&[leaf1, cores, entry(0x8000_001e, 9)]).unwrap();
        let cpuid = for_vcpu(&machine, 3);
        let leaves = cpuid.as_slice();
        assert_eq!((leaves[0].ebx >> 24, (leaves[0].ebx >> 16) & 0xff), (3, 4));
        assert_eq!((leaves[1].edx, leaves[2].eax), (3, 3));
    }

    /// On a host whose KVM offers each bit of each leaf.
    #[test]
    fn cpuid_has_nothing_that_is_only_the_host_s() {
        let leaves = (0..0x30).chain(0x8000_0000..0x8000_0030).chain([0x4000_0000, 0x4000_0001, 0xc000_0002]);
        let everything = leaves.map(|function| {
            let ones = u32::MAX;
            let index = 0;
            kvm_cpuid_entry2 { function, index, eax: ones, ebx: ones, ecx: ones, edx: ones, ..entry(0, 0) }
        });
        let host = CpuId::from_entries(&everything.collect::<Vec<_>>()).unwrap();
        let cpuid = for_vcpu(&guest_cpuid(host, 2, false), 1);
        let find = |function| cpuid.as_slice().iter().find(|entry| entry.function == function);
        for function in [
            3,
            8,
            9,
            0xc,
            0xf,
            0x10,
            0x12,
            0x14,
            0x19,
            0x1a,
            0x1b,
            0x1c,
            0x1f,
            0x23,
            0x8000_000a,
            0x8000_001b,
        ]
        .into_iter()
        .chain([0x8000_001c, 0x8000_001f, 0x8000_0020, 0x8000_0022, 0x8000_0026, 0xc000_0002])
        {
            assert_eq!(find(function), None, "{function:#x}");
        }
        let counters = find(0xa).unwrap();
        assert_eq!((counters.eax, counters.ebx, counters.ecx, counters.edx), (0, 0, 0, 0));
        // VMX, SMX, PDCM; SGX, PQM, PQE, PT; SVM, IBS, counters. What programs use stays.
        let hidden = |value: u32, bits: &[u32]| bits.iter().all(|bit| value & 1 << bit == 0);
        assert!(hidden(find(1).unwrap().ecx, &[5, 6, 15]));
        assert!(hidden(find(7).unwrap().ebx, &[2, 12, 15, 25]));
        assert!(hidden(find(0x8000_0001).unwrap().ecx, &[2, 10, 12, 15, 23, 24, 27, 28]));
        assert_eq!(find(7).unwrap().ebx & 1 << 5, 1 << 5);
        // Its places in the machine are its own, not those of the processor that asked KVM.
        assert_eq!(find(1).unwrap().ebx >> 16, 0x0102);
        let topology = find(0xb).unwrap();
        assert_eq!((topology.eax, topology.ebx, topology.ecx, topology.edx), (0, 1, 0x100, 1));
        assert_eq!(find(0x8000_001e).unwrap().eax, 1);
    }

    #[test]
    fn cache_leaf_of_private_level_has_one_sharer() {
        let mut l2 = entry(4, (2 << 5) | 3 | (7 << 14) | (15 << 26));
        let mut l3 = entry(4, (3 << 5) | 3);
        for leaf in [&mut l2, &mut l3] {
            set_topology_independent_bits(leaf, 4, false);
        }
        assert_eq!(((l2.eax >> 14) & 0xfff, l2.eax >> 26), (0, 3));
        assert_eq!((l3.eax >> 14) & 0xfff, 3);
    }

    #[test]
    fn delivery_mode_set_keeps_the_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[0x352] = 1;
        set_delivery_mode(&mut lapic, 0x350, 0x700);
        assert_eq!((lapic.regs[0x351], lapic.regs[0x352]), (7, 1));
    }
}
