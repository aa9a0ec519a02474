//! Runs compiled filters in tests as the kernel would: classic BPF over `struct seccomp_data`, with the kernel's
//! checks that jumps stay inside and only the allowed operations are used.

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    sock_filter,
};

/// A system call as a filter sees it.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its number.
    pub number: u32,
    /// `AUDIT_ARCH_…`.
    pub architecture: u32,
    /// Its arguments.
    pub args: [u64; 6],
}

/// The filter's return value and how many instructions it took.
pub fn run(program: &[sock_filter], call: &Call) -> (u32, usize) {
    let mut data = Vec::new();
    data.extend(call.number.to_le_bytes());
    data.extend(call.architecture.to_le_bytes());
    data.extend(0u64.to_le_bytes()); // instruction pointer
    call.args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
    let (mut accumulator, mut at, mut steps) = (0u32, 0, 0);
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        steps += 1;
        let code = u32::from(code);
        let condition = match code {
            _ if code == BPF_LD | BPF_W | BPF_ABS => {
                assert!(k.is_multiple_of(4), "unaligned load");
                let word = &data[k as usize..][..4];
                accumulator = u32::from_le_bytes(word.try_into().unwrap());
                continue;
            }
            _ if code == BPF_ALU | BPF_AND | BPF_K => {
                accumulator &= k;
                continue;
            }
            _ if code == BPF_JMP | BPF_JA | BPF_K => {
                at += k as usize;
                continue;
            }
            _ if code == BPF_RET | BPF_K => return (k, steps),
            _ if code == BPF_JMP | BPF_JEQ | BPF_K => accumulator == k,
            _ if code == BPF_JMP | BPF_JGT | BPF_K => accumulator > k,
            _ if code == BPF_JMP | BPF_JGE | BPF_K => accumulator >= k,
            other => panic!("instruction {other:#x}"),
        };
        at += usize::from(if condition { jt } else { jf });
    }
}
