//! CPU templates: what a guest sees of the host's processor is cut down to a level that many hosts have, so that it
//! behaves the same on each of them. A level is one of the x86-64 psABI's (section "Micro-Architecture Levels").
//!
//! What a level does not have is hidden from CPUID, not forbidden: a guest that uses an instruction without asking may
//! find it. Levels differ in instructions that programs use, so those are what is hidden; what the kernel uses
//! (virtualised timers, page sizes, mitigations) stays, as do KVM's own leaves.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::config::CpuTemplate;

/// Registers of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}
use Register::{Ebx, Ecx, Edx};

/// A feature bit.
struct Feature {
    name: &'static str,
    leaf: (u32, u32),
    register: Register,
    bit: u32,
    /// The first level that has it; 5 is above all.
    level: u8,
}

const fn feature(name: &'static str, leaf: (u32, u32), register: Register, bit: u32, level: u8) -> Feature {
    Feature { name, leaf, register, bit, level }
}

/// Instructions by level (x86-64 psABI, table "Micro-Architecture Levels"), and those of no level (5). Positions are
/// those of Intel's and AMD's manuals (CPUID).
#[rustfmt::skip]
const FEATURES: &[Feature] = &[
    feature("sse3", (1, 0), Ecx, 0, 2),
    feature("ssse3", (1, 0), Ecx, 9, 2),
    feature("cx16", (1, 0), Ecx, 13, 2),
    feature("sse4.1", (1, 0), Ecx, 19, 2),
    feature("sse4.2", (1, 0), Ecx, 20, 2),
    feature("popcnt", (1, 0), Ecx, 23, 2),
    feature("lahf", (0x8000_0001, 0), Ecx, 0, 2),
    feature("fma", (1, 0), Ecx, 12, 3),
    feature("movbe", (1, 0), Ecx, 22, 3),
    feature("xsave", (1, 0), Ecx, 26, 3),
    feature("avx", (1, 0), Ecx, 28, 3),
    feature("f16c", (1, 0), Ecx, 29, 3),
    feature("bmi1", (7, 0), Ebx, 3, 3),
    feature("avx2", (7, 0), Ebx, 5, 3),
    feature("bmi2", (7, 0), Ebx, 8, 3),
    feature("lzcnt", (0x8000_0001, 0), Ecx, 5, 3),
    feature("avx512f", (7, 0), Ebx, 16, 4),
    feature("avx512dq", (7, 0), Ebx, 17, 4),
    feature("avx512cd", (7, 0), Ebx, 28, 4),
    feature("avx512bw", (7, 0), Ebx, 30, 4),
    feature("avx512vl", (7, 0), Ebx, 31, 4),
    feature("pclmulqdq", (1, 0), Ecx, 1, 5),
    feature("aes", (1, 0), Ecx, 25, 5),
    feature("rdrand", (1, 0), Ecx, 30, 5),
    feature("hle", (7, 0), Ebx, 4, 5),
    feature("rtm", (7, 0), Ebx, 11, 5),
    feature("rdseed", (7, 0), Ebx, 18, 5),
    feature("adx", (7, 0), Ebx, 19, 5),
    feature("avx512ifma", (7, 0), Ebx, 21, 5),
    feature("clwb", (7, 0), Ebx, 24, 5),
    feature("avx512pf", (7, 0), Ebx, 26, 5),
    feature("avx512er", (7, 0), Ebx, 27, 5),
    feature("sha", (7, 0), Ebx, 29, 5),
    feature("avx512vbmi", (7, 0), Ecx, 1, 5),
    // Their state is not there either (`STATE`); KVM sets OSPKE by CR4, which the guest cannot set without PKU.
    feature("pku", (7, 0), Ecx, 3, 5),
    feature("ospke", (7, 0), Ecx, 4, 5),
    feature("waitpkg", (7, 0), Ecx, 5, 5),
    feature("avx512vbmi2", (7, 0), Ecx, 6, 5),
    feature("gfni", (7, 0), Ecx, 8, 5),
    feature("vaes", (7, 0), Ecx, 9, 5),
    feature("vpclmulqdq", (7, 0), Ecx, 10, 5),
    feature("avx512vnni", (7, 0), Ecx, 11, 5),
    feature("avx512bitalg", (7, 0), Ecx, 12, 5),
    feature("avx512vpopcntdq", (7, 0), Ecx, 14, 5),
    feature("cldemote", (7, 0), Ecx, 25, 5),
    feature("movdiri", (7, 0), Ecx, 27, 5),
    feature("movdir64b", (7, 0), Ecx, 28, 5),
    feature("avx5124vnniw", (7, 0), Edx, 2, 5),
    feature("avx5124fmaps", (7, 0), Edx, 3, 5),
    feature("avx512vp2intersect", (7, 0), Edx, 8, 5),
    feature("serialize", (7, 0), Edx, 14, 5),
    feature("amx-bf16", (7, 0), Edx, 22, 5),
    feature("avx512fp16", (7, 0), Edx, 23, 5),
    feature("amx-tile", (7, 0), Edx, 24, 5),
    feature("amx-int8", (7, 0), Edx, 25, 5),
    feature("sse4a", (0x8000_0001, 0), Ecx, 6, 5),
    feature("3dnowprefetch", (0x8000_0001, 0), Ecx, 8, 5),
    feature("xop", (0x8000_0001, 0), Ecx, 11, 5),
    feature("fma4", (0x8000_0001, 0), Ecx, 16, 5),
    feature("tbm", (0x8000_0001, 0), Ecx, 21, 5),
    feature("3dnowext", (0x8000_0001, 0), Edx, 30, 5),
    feature("3dnow", (0x8000_0001, 0), Edx, 31, 5),
];

/// Extended state (XCR0, Intel SDM volume 1 §13.3): x87, SSE; then AVX; then AVX-512's three.
const STATE: [(u8, u32); 3] = [(1, 0b11), (3, 0b100), (4, 0b1110_0000)];
const XSAVE_LEAF: u32 = 0xd;

/// The host lacks what a template promises.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "this host's processor lacks {lacking}, which cpu_template {template} has; take a lower level or host"
)]
pub struct LackingFeatures {
    template: CpuTemplate,
    lacking: String,
}

/// The level of a template; `None` is the host's processor as it is.
fn level(template: CpuTemplate) -> Option<u8> {
    match template {
        CpuTemplate::Host => None,
        CpuTemplate::X8664V2 => Some(2),
        CpuTemplate::X8664V3 => Some(3),
        CpuTemplate::X8664V4 => Some(4),
    }
}

/// Hides what is above the template, and checks that all of it is there.
pub fn apply(cpuid: &mut CpuId, template: CpuTemplate) -> Result<(), LackingFeatures> {
    let Some(level) = level(template) else { return Ok(()) };
    let lacking: Vec<_> = FEATURES
        .iter()
        .filter(|feature| feature.level <= level && !has(cpuid, feature))
        .map(|feature| feature.name)
        .collect();
    if !lacking.is_empty() {
        return Err(LackingFeatures { template, lacking: lacking.join(", ") });
    }
    for entry in cpuid.as_mut_slice() {
        let leaf = (entry.function, entry.index);
        for feature in FEATURES.iter().filter(|feature| feature.level > level && feature.leaf == leaf) {
            *register(entry, feature.register) &= !(1 << feature.bit);
        }
        match leaf {
            // Further instructions, AVX-VNNI and later ones among them.
            (7, 1..) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            (XSAVE_LEAF, 0) => (entry.eax, entry.edx) = (entry.eax & state(level), 0),
            // Sizes and places of states that are not there.
            (XSAVE_LEAF, index @ 2..=31) if state(level) & 1 << index == 0 => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            // AMX, AVX10.
            (0x1d | 0x1e | 0x24, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    Ok(())
}

fn state(level: u8) -> u32 {
    STATE.iter().filter(|(first, _)| *first <= level).fold(0, |all, (_, bits)| all | bits)
}

fn has(cpuid: &CpuId, feature: &Feature) -> bool {
    let entry = cpuid.as_slice().iter().find(|entry| (entry.function, entry.index) == feature.leaf);
    entry.is_some_and(|entry| *register(&mut entry.clone(), feature.register) & 1 << feature.bit != 0)
}

fn register(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Ebx => &mut entry.ebx,
        Ecx => &mut entry.ecx,
        Edx => &mut entry.edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor that has every bit of every leaf.
    fn everything() -> CpuId {
        let leaves =
            [(1, 0), (7, 0), (7, 1), (0xd, 0), (0xd, 1), (0xd, 2), (0xd, 5), (0x1d, 0), (0x8000_0001, 0)];
        let entries = leaves.map(|(function, index)| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        });
        CpuId::from_entries(&entries).unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> [u32; 4] {
        let mut entries = cpuid.as_slice().iter();
        let entry = entries.find(|entry| (entry.function, entry.index) == (function, index)).unwrap();
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    #[test]
    fn host_is_left_as_it_is() {
        let mut cpuid = everything();
        apply(&mut cpuid, CpuTemplate::Host).unwrap();
        assert_eq!(cpuid, everything());
        apply(&mut CpuId::new(0).unwrap(), CpuTemplate::Host).unwrap();
    }

    #[test]
    fn level_has_its_features_and_none_above() {
        for (template, level) in
            [(CpuTemplate::X8664V2, 2), (CpuTemplate::X8664V3, 3), (CpuTemplate::X8664V4, 4)]
        {
            let mut cpuid = everything();
            apply(&mut cpuid, template).unwrap();
            for feature in FEATURES {
                assert_eq!(has(&cpuid, feature), feature.level <= level, "{} at level {level}", feature.name);
            }
            assert_eq!(leaf(&cpuid, 7, 1), [0; 4]);
            assert_eq!(leaf(&cpuid, 0x1d, 0), [0; 4]);
            assert_eq!(leaf(&cpuid, 7, 0)[2] & 0b11000, 0, "protection keys without their state in XCR0");
            // APIC, TSC deadline timer, x2APIC, hypervisor: nothing of the machine is taken away.
            assert_eq!(leaf(&cpuid, 1, 0)[3], u32::MAX);
            assert_eq!(leaf(&cpuid, 1, 0)[2] & (1 << 21 | 1 << 24 | 1 << 31), 1 << 21 | 1 << 24 | 1 << 31);
        }
    }

    #[test]
    fn extended_state_is_that_of_the_level() {
        for (template, state, [avx, avx512]) in [
            (CpuTemplate::X8664V2, 0b11, [false, false]),
            (CpuTemplate::X8664V3, 0b111, [true, false]),
            (CpuTemplate::X8664V4, 0b1110_0111, [true, true]),
        ] {
            let mut cpuid = everything();
            apply(&mut cpuid, template).unwrap();
            let [low, _, _, high] = leaf(&cpuid, 0xd, 0);
            assert_eq!((low, high), (state, 0), "{template}");
            assert_eq!(leaf(&cpuid, 0xd, 2) != [0; 4], avx);
            assert_eq!(leaf(&cpuid, 0xd, 5) != [0; 4], avx512);
            assert_eq!(leaf(&cpuid, 0xd, 1), [u32::MAX; 4]);
        }
    }

    #[test]
    fn host_without_a_feature_of_the_level_is_told_by_name() {
        let mut cpuid = everything();
        for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 7) {
            entry.ebx &= !(1 << 5 | 1 << 16);
        }
        let error = apply(&mut cpuid.clone(), CpuTemplate::X8664V3).unwrap_err().to_string();
        assert!(
            error.starts_with("this host's processor lacks avx2, which cpu_template x86-64-v3 has"),
            "{error}"
        );
        let error = apply(&mut cpuid.clone(), CpuTemplate::X8664V4).unwrap_err().to_string();
        assert!(error.contains("lacks avx2, avx512f,"), "{error}");
        apply(&mut cpuid, CpuTemplate::X8664V2).unwrap();
    }
}
