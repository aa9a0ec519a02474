//! Device policy on cgroup v2: a small eBPF program that the kernel asks before each access.
//!
//! It gets a `struct bpf_cgroup_dev_ctx` (`linux/bpf.h`): access kinds in the upper and device type in the lower
//! half of the first word, then major, then minor. It returns 1 to allow.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::{
    CgroupError,
    device_policy::{DevicePolicy, Exception, Kind, MKNOD, READ, WRITE},
};
use crate::syscalls;

/// Compiles the policy and loads it into the kernel.
pub(super) fn load(policy: &DevicePolicy) -> Result<OwnedFd, CgroupError> {
    let program = compile(policy).ok_or_else(|| CgroupError::Limit {
        limit: format!("linux.resources.devices ({} rules)", policy.exceptions.len()),
        reason: "one program cannot hold that many",
    })?;
    syscalls::bpf_load_cgroup_device(&program)
        .map_err(|source| CgroupError::DeviceProgram { action: "load", source })
}

/// Puts a loaded policy into force for a cgroup. The kernel keeps it until the cgroup is gone.
pub(super) fn attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<(), CgroupError> {
    syscalls::bpf_attach_cgroup_device(cgroup.as_fd(), program.as_fd())
        .map_err(|source| CgroupError::DeviceProgram { action: "attach", source })
}

// Registers: 1 holds the context, 0 the result.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
/// Major and minor in one, as the kernel keeps them.
const NUMBER: u8 = 6;
const SCRATCH: u8 = 7;

// Operation codes (Documentation/bpf/standardization/instruction-set.rst).
const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbf;
const MOVE: u8 = 0xb7;
const AND: u8 = 0x57;
const OR_REGISTER: u8 = 0x4f;
const SHIFT_LEFT: u8 = 0x67;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP: u8 = 0x05;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
const JUMP_IF_EQUAL: u8 = 0x15;
/// Of the lower 32 bits.
const JUMP_IF_EQUAL_WORD: u8 = 0x16;
const EXIT: u8 = 0x95;

const ALL: u32 = READ | WRITE | MKNOD;

/// Major numbers have 12 bits, minor ones 20 (`linux/kdev_t.h`).
const MINOR_BITS: u32 = 20;
const MAJOR_BITS: u32 = 32 - MINOR_BITS;

/// The program, or `None` if it would be longer than jumps reach.
///
/// The kernel goes through all ways that lead through it before it takes it, and at each end of one back to where the
/// result came from. So there are few jumps, and two ends: with three comparisons and an end of its own for each
/// exception, a program for Docker's policy took it 1.1 ms.
fn compile(policy: &DevicePolicy) -> Option<Vec<u64>> {
    let mut code = Code::default();
    code.push(LOAD_WORD, TYPE, CONTEXT, 0, 0);
    code.push(MOVE_REGISTER, ACCESS, TYPE, 0, 0);
    code.push(AND, TYPE, 0, 0, 0xffff);
    code.push(SHIFT_RIGHT, ACCESS, 0, 0, 16);
    code.push(LOAD_WORD, MAJOR, CONTEXT, 4, 0);
    code.push(LOAD_WORD, MINOR, CONTEXT, 8, 0);
    code.push(MOVE_REGISTER, NUMBER, MAJOR, 0, 0);
    code.push(SHIFT_LEFT, NUMBER, 0, 0, MINOR_BITS);
    code.push(OR_REGISTER, NUMBER, MINOR, 0, 0);
    for (kind, number) in [(Kind::Char, 2), (Kind::Block, 1)] {
        let other_kind = code.push(JUMP_IF_NOT_EQUAL, TYPE, 0, 0, number);
        let of_kind = |exception: &&Exception| exception.kind == kind && is_possible(exception);
        for exception in policy.exceptions.iter().filter(of_kind) {
            code.test(exception, policy.allow_by_default);
            // The kernel refuses code that no way leads to.
            if exception.access == ALL && exception.major.is_none() && exception.minor.is_none() {
                break;
            }
        }
        code.land(other_kind)?;
    }
    code.end(policy.allow_by_default);
    for jump in std::mem::take(&mut code.to_exceptions) {
        code.land(jump)?;
    }
    code.end(!policy.allow_by_default);
    Some(code.instructions)
}

/// Whether the kernel knows such numbers at all.
fn is_possible(exception: &Exception) -> bool {
    let fits = |number: Option<u32>, bits| number.is_none_or(|number| number >> bits == 0);
    fits(exception.major, MAJOR_BITS) && fits(exception.minor, MINOR_BITS)
}

#[derive(Default)]
struct Code {
    instructions: Vec<u64>,
    /// Jumps to the end that gives what exceptions get.
    to_exceptions: Vec<usize>,
}

impl Code {
    /// Returns where it is.
    fn push(&mut self, operation: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> usize {
        self.instructions.push(instruction(operation, destination, source, offset, immediate));
        self.instructions.len() - 1
    }

    /// Has the jump at `from` lead to the next instruction.
    fn land(&mut self, from: usize) -> Option<()> {
        let distance = i16::try_from(self.instructions.len() - from - 1).ok()?;
        *self.instructions.get_mut(from)? |= u64::from(distance as u16) << 16;
        Some(())
    }

    /// Goes to the exceptions' end if the exception applies, and else on.
    fn test(&mut self, exception: &Exception, allow_by_default: bool) {
        // All kinds of access must be allowed, but one denied kind is enough.
        let (relevant, applies, applies_not) = if allow_by_default {
            (exception.access, JUMP_IF_NOT_EQUAL, JUMP_IF_EQUAL)
        } else {
            (!exception.access & ALL, JUMP_IF_EQUAL, JUMP_IF_NOT_EQUAL)
        };
        let is_partial = exception.access != ALL;
        if is_partial {
            self.push(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0);
            self.push(AND, SCRATCH, 0, 0, relevant);
        }
        let (operation, register, value) = match (exception.major, exception.minor) {
            (Some(major), Some(minor)) => (JUMP_IF_EQUAL_WORD, NUMBER, major << MINOR_BITS | minor),
            (Some(major), None) => (JUMP_IF_EQUAL, MAJOR, major),
            (None, Some(minor)) => (JUMP_IF_EQUAL, MINOR, minor),
            (None, None) if is_partial => (applies, SCRATCH, 0),
            (None, None) => (JUMP, 0, 0),
        };
        if is_partial && register != SCRATCH {
            // Over the one instruction that follows.
            self.push(applies_not, SCRATCH, 0, 1, 0);
        }
        let jump = self.push(operation, register, 0, 0, value);
        self.to_exceptions.push(jump);
    }

    fn end(&mut self, allow: bool) {
        self.push(MOVE, RESULT, 0, 0, allow.into());
        self.push(EXIT, 0, 0, 0, 0);
    }
}

fn instruction(operation: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> u64 {
    u64::from(operation)
        | u64::from(source << 4 | destination) << 8
        | u64::from(offset as u16) << 16
        | u64::from(immediate) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program of the few operations used here.
    fn run(code: &[u64], kind: u32, access: u32, major: u32, minor: u32) -> u64 {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 10];
        let mut at = 0;
        loop {
            let [operation, nibbles, ..] = code[at].to_le_bytes();
            let (destination, source) = (usize::from(nibbles & 15), usize::from(nibbles >> 4));
            let (offset, immediate) = ((code[at] >> 16) as i16, i64::from((code[at] >> 32) as i32) as u64);
            at += 1;
            let mut jump_if = |condition| at += if condition { offset as usize } else { 0 };
            match operation {
                LOAD_WORD => registers[destination] = context[offset as usize / 4].into(),
                MOVE_REGISTER => registers[destination] = registers[source],
                MOVE => registers[destination] = immediate,
                AND => registers[destination] &= immediate,
                OR_REGISTER => registers[destination] |= registers[source],
                SHIFT_LEFT => registers[destination] <<= immediate,
                SHIFT_RIGHT => registers[destination] >>= immediate,
                JUMP => jump_if(true),
                JUMP_IF_EQUAL_WORD => jump_if(registers[destination] as u32 == immediate as u32),
                JUMP_IF_NOT_EQUAL => jump_if(registers[destination] != immediate),
                JUMP_IF_EQUAL => jump_if(registers[destination] == immediate),
                EXIT => return registers[0],
                other => panic!("operation {other:#x}"),
            }
        }
    }

    const BLOCK: u32 = 1;
    const CHAR: u32 = 2;

    #[test]
    fn program_denying_by_default_allows_only_what_an_exception_covers() {
        let exceptions = vec![
            Exception { kind: Kind::Char, major: Some(1), minor: Some(3), access: READ | WRITE },
            Exception { kind: Kind::Char, major: Some(136), minor: None, access: READ },
            Exception { kind: Kind::Block, major: None, minor: None, access: MKNOD },
            Exception { kind: Kind::Char, major: Some(5), minor: Some(2), access: READ | WRITE | MKNOD },
        ];
        let code = compile(&DevicePolicy { allow_by_default: false, exceptions }).unwrap();
        assert_eq!(run(&code, CHAR, READ | WRITE, 1, 3), 1);
        assert_eq!(run(&code, CHAR, READ | MKNOD, 1, 3), 0);
        assert_eq!(run(&code, BLOCK, READ, 1, 3), 0);
        assert_eq!(run(&code, CHAR, READ, 1, 5), 0);
        assert_eq!(run(&code, CHAR, READ, 136, 7), 1);
        assert_eq!(run(&code, CHAR, WRITE, 136, 7), 0);
        assert_eq!(run(&code, BLOCK, MKNOD, 8, 0), 1);
        assert_eq!(run(&code, CHAR, READ | WRITE | MKNOD, 5, 2), 1);
        assert_eq!(run(&code, BLOCK, READ, 5, 2), 0);
    }

    #[test]
    fn program_allowing_by_default_denies_what_an_exception_touches() {
        let exceptions = vec![Exception { kind: Kind::Block, major: Some(8), minor: None, access: WRITE }];
        let code = compile(&DevicePolicy { allow_by_default: true, exceptions }).unwrap();
        assert_eq!(run(&code, BLOCK, READ | WRITE, 8, 1), 0);
        assert_eq!(run(&code, BLOCK, READ, 8, 1), 1);
        assert_eq!(run(&code, CHAR, WRITE, 8, 1), 1);
    }

    #[test]
    fn program_says_what_the_policy_says_for_every_combination() {
        let numbers = [None, Some(0), Some(1), Some(0xfff)];
        let accesses = [READ, MKNOD | WRITE, READ | WRITE | MKNOD];
        for (allow_by_default, major, minor) in [true, false].into_iter().flat_map(|allow| {
            numbers.into_iter().flat_map(move |major| numbers.map(|minor| (allow, major, minor)))
        }) {
            let exceptions: Vec<_> = accesses
                .into_iter()
                .zip([Kind::Char, Kind::Block, Kind::Char])
                .zip([(major, minor), (major, minor), (Some(7), major)])
                .map(|((access, kind), (major, minor))| Exception { kind, major, minor, access })
                .collect();
            let policy = DevicePolicy { allow_by_default, exceptions };
            let code = compile(&policy).unwrap();
            for kind in [BLOCK, CHAR] {
                for access in 1..8 {
                    for (major, minor) in [(0, 0), (0, 1), (1, 0), (1, 1), (0xfff, 0xfff), (7, 1), (7, 9)] {
                        let applies = policy.exceptions.iter().any(|exception| {
                            let of_kind = (exception.kind == Kind::Char) == (kind == CHAR);
                            let same =
                                |wanted: Option<u32>, found| wanted.is_none_or(|wanted| wanted == found);
                            let covered = if allow_by_default {
                                access & exception.access != 0
                            } else {
                                access & !exception.access == 0
                            };
                            of_kind && same(exception.major, major) && same(exception.minor, minor) && covered
                        });
                        let allowed = run(&code, kind, access, major, minor) == 1;
                        assert_eq!(
                            allowed,
                            allow_by_default != applies,
                            "{policy:?} {kind} {access} {major}:{minor}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn program_ends_where_everything_is_an_exception() {
        let all = Exception { kind: Kind::Char, major: None, minor: None, access: ALL };
        let null = Exception { kind: Kind::Char, major: Some(1), minor: Some(3), access: ALL };
        let length = |exceptions: Vec<Exception>| {
            compile(&DevicePolicy { allow_by_default: false, exceptions }).unwrap().len()
        };
        assert_eq!(length(vec![all.clone(), null]), length(vec![all]));
    }

    #[test]
    fn number_that_no_device_has_matches_none() {
        let beyond = Exception { kind: Kind::Char, major: Some(1 << 12), minor: Some(3), access: READ };
        let minor = Exception { kind: Kind::Char, major: Some(0), minor: Some(1 << 20 | 3), access: READ };
        let code =
            compile(&DevicePolicy { allow_by_default: false, exceptions: vec![beyond, minor] }).unwrap();
        assert_eq!(run(&code, CHAR, READ, 0, 3), 0);
        assert_eq!(run(&code, CHAR, READ, 1, 3), 0);
    }

    #[test]
    fn program_that_jumps_could_not_cross_is_refused() {
        let exceptions = |count| {
            (0..count).map(|minor| Exception {
                kind: Kind::Char,
                major: Some(1),
                minor: Some(minor),
                access: READ,
            })
        };
        let policy =
            |count| DevicePolicy { allow_by_default: false, exceptions: exceptions(count).collect() };
        assert!(compile(&policy(8_000)).is_some());
        assert!(compile(&policy(9_000)).is_none());
    }
}
