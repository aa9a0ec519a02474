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
    syscalls::bpf_load_cgroup_device(&compile(policy))
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
const SCRATCH: u8 = 6;

// Operation codes (Documentation/bpf/standardization/instruction-set.rst).
const LOAD_WORD: u8 = 0x61;
const MOVE_REGISTER: u8 = 0xbf;
const MOVE: u8 = 0xb7;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_IF_NOT_EQUAL: u8 = 0x55;
const JUMP_IF_EQUAL: u8 = 0x15;
const EXIT: u8 = 0x95;

fn compile(policy: &DevicePolicy) -> Vec<u64> {
    let mut code = vec![
        instruction(LOAD_WORD, TYPE, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, ACCESS, TYPE, 0, 0),
        instruction(AND, TYPE, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for exception in &policy.exceptions {
        code.extend(test(exception, policy.allow_by_default));
    }
    code.extend(result(policy.allow_by_default));
    code
}

/// Code that decides if the exception applies, and else falls through.
fn test(exception: &Exception, allow_by_default: bool) -> Vec<u64> {
    let kind = match exception.kind {
        Kind::Block => 1,
        Kind::Char => 2,
    };
    // Built backwards, because each test jumps over what comes behind it.
    let mut code: Vec<u64> = result(!allow_by_default).into_iter().rev().collect();
    let mut skip_unless = |operation, register, value: u32| {
        code.push(instruction(operation, register, 0, code.len() as i16, value));
    };
    if let Some(minor) = exception.minor {
        skip_unless(JUMP_IF_NOT_EQUAL, MINOR, minor);
    }
    if let Some(major) = exception.major {
        skip_unless(JUMP_IF_NOT_EQUAL, MAJOR, major);
    }
    skip_unless(JUMP_IF_NOT_EQUAL, TYPE, kind);
    if exception.access != READ | WRITE | MKNOD {
        // All kinds of access must be allowed, but one denied kind is enough.
        let (relevant, operation) = if allow_by_default {
            (exception.access, JUMP_IF_EQUAL)
        } else {
            (!exception.access, JUMP_IF_NOT_EQUAL)
        };
        skip_unless(operation, SCRATCH, 0);
        code.push(instruction(AND, SCRATCH, 0, 0, relevant));
        code.push(instruction(MOVE_REGISTER, SCRATCH, ACCESS, 0, 0));
    }
    code.reverse();
    code
}

fn result(allow: bool) -> [u64; 2] {
    [instruction(MOVE, RESULT, 0, 0, allow.into()), instruction(EXIT, 0, 0, 0, 0)]
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
                SHIFT_RIGHT => registers[destination] >>= immediate,
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
        let code = compile(&DevicePolicy { allow_by_default: false, exceptions });
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
        let code = compile(&DevicePolicy { allow_by_default: true, exceptions });
        assert_eq!(run(&code, BLOCK, READ | WRITE, 8, 1), 0);
        assert_eq!(run(&code, BLOCK, READ, 8, 1), 1);
        assert_eq!(run(&code, CHAR, WRITE, 8, 1), 1);
    }
}
