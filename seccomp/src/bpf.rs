//! From decisions for each system call to a classic BPF program over `struct seccomp_data`.
//!
//! The program is a binary search over ranges of call numbers that are treated alike, so a call costs some ten
//! instructions; a list of comparisons would cost hundreds, both at each call and while the kernel, when the
//! filter is installed, works out which calls are always allowed.
//!
//! ```text
//!  arch? ─no─▶ kill          ld nr; x32? ─yes─▶ ENOSYS, or what ends the process
//!  nr ≥ 200? ─┬─ nr ≥ 90? ─ … ─▶ return action
//!             └─ nr ≥ 320? ─ … ─▶ compare arguments ─▶ return action
//! ```

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    SECCOMP_RET_ACTION_FULL, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_KILL_THREAD,
    SECCOMP_RET_TRAP, sock_filter,
};

/// The kernel's limit on the length of a program (`BPF_MAXINSNS`).
pub const MAX_INSTRUCTIONS: usize = 4096;

/// `AUDIT_ARCH_X86_64` of `linux/audit.h`.
pub const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Set in the number of a call made through the x32 ABI.
pub const X32_SYSCALL_BIT: u32 = 0x4000_0000;

// Offsets in `struct seccomp_data`.
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCHITECTURE: u32 = 4;
const OFFSET_ARGUMENTS: u32 = 16;

/// A whole policy. Actions are the filter's return values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// By ascending call number.
    pub calls: Vec<(u32, Decision)>,
    /// For all other calls.
    pub default: u32,
    /// For calls with a higher number than any of `calls`: those that whoever wrote the policy perhaps did not know of.
    pub newer: u32,
}

/// What happens to one system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// This action.
    Always(u32),
    /// The action of the first rule that matches, or else `otherwise`.
    Match {
        /// At least one.
        rules: Vec<Rule>,
        /// The action if none matches.
        otherwise: u32,
    },
}

/// An action taken if all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// At most six.
    pub conditions: Vec<Condition>,
    /// The filter's return value.
    pub action: u32,
}

/// A comparison of one argument, 0 to 5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    /// The argument's index.
    pub argument: u8,
    /// What it is compared with.
    pub comparison: Comparison,
}

/// Comparisons of a whole 64-bit argument, unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// This.
    Equal(u64),
    /// Not this.
    NotEqual(u64),
    /// Below this.
    Less(u64),
    /// This or below.
    LessOrEqual(u64),
    /// Above this.
    Greater(u64),
    /// This or above.
    GreaterOrEqual(u64),
    /// Equal in the bits of the mask.
    MaskedEqual {
        /// The bits that count.
        mask: u64,
        /// What they must be.
        value: u64,
    },
}

/// The program of a policy. It may be longer than [`MAX_INSTRUCTIONS`].
pub fn assemble(policy: &Policy) -> Vec<sock_filter> {
    let ranges = ranges(policy);
    // No policy lists x32 calls. One that ends whoever calls what is not listed ends these callers, too; under others
    // they see what a kernel without x32 answers.
    let x32 = match policy.default & SECCOMP_RET_ACTION_FULL {
        SECCOMP_RET_KILL_PROCESS | SECCOMP_RET_KILL_THREAD | SECCOMP_RET_TRAP => policy.default,
        _ => SECCOMP_RET_ERRNO | libc::ENOSYS as u32,
    };
    let mut program = vec![
        load(OFFSET_ARCHITECTURE),
        jump(BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0),
        ret(SECCOMP_RET_KILL_PROCESS),
        load(OFFSET_NUMBER),
        jump(BPF_JGE, X32_SYSCALL_BIT, 0, 1),
        ret(x32),
    ];
    program.extend(search(&ranges));
    program
}

/// A run of call numbers, from `first` up to the next range, that are treated alike.
#[derive(Debug)]
struct Range {
    first: u32,
    decision: Decision,
}

/// Covers all numbers, from 0.
fn ranges(policy: &Policy) -> Vec<Range> {
    let mut ranges = vec![Range { first: 0, decision: Decision::Always(policy.default) }];
    let mut push = |first: u32, decision: Decision| match ranges.last_mut() {
        Some(last) if last.decision == decision => {}
        Some(last) if last.first == first => last.decision = decision,
        _ => ranges.push(Range { first, decision }),
    };
    let mut next = 0;
    for (number, decision) in &policy.calls {
        if *number > next {
            push(next, Decision::Always(policy.default));
        }
        push(*number, decision.clone());
        next = number + 1;
    }
    push(next, Decision::Always(policy.newer));
    ranges
}

/// Code that finds the range of the call number in the accumulator and acts on it. Never falls through.
fn search(ranges: &[Range]) -> Vec<sock_filter> {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let Some(middle) = high.first() else { return Vec::new() };
    if low.is_empty() {
        return decide(&middle.decision);
    }
    let (low, high) = (search(low), search(high));
    // A conditional jump reaches 255 instructions; an unconditional one, any.
    let mut code = match u8::try_from(low.len()) {
        Ok(distance) => vec![jump(BPF_JGE, middle.first, distance, 0)],
        Err(_) => vec![jump(BPF_JGE, middle.first, 0, 1), jump(BPF_JA, low.len() as u32, 0, 0)],
    };
    code.extend(low);
    code.extend(high);
    code
}

fn decide(decision: &Decision) -> Vec<sock_filter> {
    match decision {
        Decision::Always(action) => vec![ret(*action)],
        Decision::Match { rules, otherwise } => {
            rules.iter().flat_map(match_rule).chain([ret(*otherwise)]).collect()
        }
    }
}

/// Code that returns the rule's action if all its conditions hold, and else falls through.
fn match_rule(rule: &Rule) -> Vec<sock_filter> {
    let mut code = vec![ret(rule.action)];
    for condition in rule.conditions.iter().rev() {
        // At most six conditions of at most seven instructions follow, so the distance fits a conditional jump.
        let mut test = condition_test(condition, code.len() as u8);
        test.append(&mut code);
        code = test;
    }
    code
}

/// Code that falls through if the condition holds, and else skips the `rest` instructions behind it.
fn condition_test(condition: &Condition, rest: u8) -> Vec<sock_filter> {
    let low_word = OFFSET_ARGUMENTS + 8 * u32::from(condition.argument);
    let high_word = low_word + 4;
    // `then` and `otherwise`: how far to jump from the end of the test.
    let order = |low_operator, value: u64, then: u8, otherwise: u8| {
        let (high, low) = split(value);
        vec![
            load(high_word),
            jump(BPF_JGT, high, 3 + then, 0),
            jump(BPF_JEQ, high, 0, 2 + otherwise),
            load(low_word),
            jump(low_operator, low, then, otherwise),
        ]
    };
    let equal = |mask: Option<u64>, value: u64, then: u8, otherwise: u8| {
        let (high, low) = split(value);
        let and = |mask: u32| sock_filter { code: (BPF_ALU | BPF_AND | BPF_K) as u16, jt: 0, jf: 0, k: mask };
        let masks = mask.map(split);
        let low_length = if masks.is_some() { 3 } else { 2 };
        let mut code = vec![load(high_word)];
        code.extend(masks.map(|(high, _)| and(high)));
        code.push(jump(BPF_JEQ, high, 0, low_length + otherwise));
        code.push(load(low_word));
        code.extend(masks.map(|(_, low)| and(low)));
        code.push(jump(BPF_JEQ, low, then, otherwise));
        code
    };
    match condition.comparison {
        Comparison::Equal(value) => equal(None, value, 0, rest),
        Comparison::NotEqual(value) => equal(None, value, rest, 0),
        Comparison::MaskedEqual { mask, value } => equal(Some(mask), value, 0, rest),
        Comparison::Greater(value) => order(BPF_JGT, value, 0, rest),
        Comparison::GreaterOrEqual(value) => order(BPF_JGE, value, 0, rest),
        Comparison::Less(value) => order(BPF_JGE, value, rest, 0),
        Comparison::LessOrEqual(value) => order(BPF_JGT, value, rest, 0),
    }
}

fn split(value: u64) -> (u32, u32) {
    ((value >> 32) as u32, value as u32)
}

fn load(offset: u32) -> sock_filter {
    sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

fn jump(operator: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | operator | BPF_K) as u16, jt, jf, k }
}

fn ret(action: u32) -> sock_filter {
    sock_filter { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: action }
}
