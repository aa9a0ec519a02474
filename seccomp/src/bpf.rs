//! From decisions for each system call to a classic BPF program over `struct seccomp_data`.
//!
//! The program is a binary search over ranges of call numbers that are treated alike, so a call costs some ten
//! instructions; a list of comparisons would cost hundreds, both at each call and while the kernel, when the
//! filter is installed, works out which calls are always allowed.
//!
//! ```text
//!  arch? ─no─▶ i386's own search, or kill
//!  ld nr; x32? ─yes─▶ ENOSYS, or what ends the process
//!  nr ≥ 200? ─┬─ nr ≥ 90? ─ … ─▶ return action
//!             └─ nr ≥ 320? ─ … ─▶ compare arguments ─▶ return action
//! ```
//! Each instruction costs the kernel a microsecond when the filter is installed, in every process and every thread that
//! gets one. So returns are shared by all that are near enough, and an argument that is compared with several values is
//! loaded once. Since jumps only lead forward, the program is written from its end, and the target of a jump is known.

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    SECCOMP_RET_ACTION_FULL, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_KILL_THREAD,
    SECCOMP_RET_TRAP, sock_filter,
};

/// The kernel's limit on the length of a program (`BPF_MAXINSNS`).
pub const MAX_INSTRUCTIONS: usize = 4096;

/// `AUDIT_ARCH_X86_64` of `linux/audit.h`.
pub const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// `AUDIT_ARCH_I386`.
pub const AUDIT_ARCH_I386: u32 = 0x4000_0003;
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
    assemble_for(policy, None)
}

/// As [`assemble`], with a policy for 32-bit calls, whose numbers are i386's; without one they kill the process.
pub fn assemble_for(policy: &Policy, i386: Option<&Policy>) -> Vec<sock_filter> {
    // No policy lists x32 calls. One that ends whoever calls what is not listed ends these callers, too; under others
    // they see what a kernel without x32 answers.
    let x32 = match policy.default & SECCOMP_RET_ACTION_FULL {
        SECCOMP_RET_KILL_PROCESS | SECCOMP_RET_KILL_THREAD | SECCOMP_RET_TRAP => policy.default,
        _ => SECCOMP_RET_ERRNO | libc::ENOSYS as u32,
    };
    let mut code = Code::default();
    let compat = i386.map(|policy| {
        code.search(&ranges(policy));
        code.push(load(OFFSET_NUMBER))
    });
    let search = code.search(&ranges(policy));
    let x32 = code.ret(x32);
    code.jump(BPF_JGE, X32_SYSCALL_BIT, x32, search);
    let native = code.push(load(OFFSET_NUMBER));
    let kill = code.ret(SECCOMP_RET_KILL_PROCESS);
    let foreign = match compat {
        Some(compat) => code.jump(BPF_JEQ, AUDIT_ARCH_I386, compat, kill),
        None => kill,
    };
    code.jump(BPF_JEQ, AUDIT_ARCH_X86_64, native, foreign);
    code.push(load(OFFSET_ARCHITECTURE));
    code.reversed.reverse();
    code.reversed
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

/// A program that is written from its end.
#[derive(Default)]
struct Code {
    reversed: Vec<sock_filter>,
}

/// An instruction of it, by its distance from the program's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place(usize);

/// A conditional jump reaches 255 instructions; some may come between choosing a target and writing the jump.
const REACH: usize = 240;

impl Code {
    /// Writes an instruction in front of all others.
    fn push(&mut self, instruction: sock_filter) -> Place {
        self.reversed.push(instruction);
        Place(self.reversed.len() - 1)
    }

    /// Instructions between one that is written next, and this.
    fn distance(&self, to: Place) -> usize {
        self.reversed.len() - 1 - to.0
    }

    /// Where this action is returned: the nearest place, or a new one.
    fn ret(&mut self, action: u32) -> Place {
        let is_it = |other: &&sock_filter| other.code == RET && other.k == action;
        let near = self.reversed.iter().rev().take(REACH).position(|other| is_it(&other));
        match near {
            Some(distance) => Place(self.reversed.len() - 1 - distance),
            None => self.push(sock_filter { code: RET, jt: 0, jf: 0, k: action }),
        }
    }

    /// A place within a conditional jump's reach from where the same happens as at `place`.
    fn near(&mut self, place: Place) -> Place {
        let distance = self.distance(place);
        if distance < REACH {
            return place;
        }
        match self.reversed.get(place.0) {
            Some(found) if found.code == RET => {
                let action = found.k;
                self.ret(action)
            }
            _ => self.push(sock_filter {
                code: (BPF_JMP | BPF_JA | BPF_K) as u16,
                jt: 0,
                jf: 0,
                k: distance as u32,
            }),
        }
    }

    /// Goes on at `then` if the comparison holds, else at `otherwise`.
    fn jump(&mut self, operator: u32, k: u32, then: Place, otherwise: Place) -> Place {
        let (then, otherwise) = (self.near(then), self.near(otherwise));
        // Two instructions at most were written since they were found near.
        let (jt, jf) = (self.distance(then) as u8, self.distance(otherwise) as u8);
        self.push(sock_filter { code: (BPF_JMP | operator | BPF_K) as u16, jt, jf, k })
    }

    /// Finds the range of the call number in the accumulator and acts on it.
    fn search(&mut self, ranges: &[Range]) -> Place {
        let (low, high) = ranges.split_at(ranges.len() / 2);
        let middle = high.first().map_or(0, |range| range.first);
        match ranges {
            // There is always one.
            [] => self.ret(SECCOMP_RET_KILL_PROCESS),
            [one] => self.decide(&one.decision),
            _ => {
                let (high, low) = (self.search(high), self.search(low));
                self.jump(BPF_JGE, middle, high, low)
            }
        }
    }

    fn decide(&mut self, decision: &Decision) -> Place {
        match decision {
            Decision::Always(action) => self.ret(*action),
            Decision::Match { rules, otherwise } => {
                let mut next = self.ret(*otherwise);
                let mut rest = rules.as_slice();
                while let Some((last, before)) = rest.split_last() {
                    rest = before;
                    let Some((argument, value)) = equality(last) else {
                        next = self.rule(last, next);
                        continue;
                    };
                    // As many as are about the same argument, with the same high word: those before come first.
                    let (high, _) = split(value);
                    let same = |rule: &Rule| {
                        equality(rule).filter(|(at, value)| *at == argument && split(*value).0 == high)
                    };
                    let unlike = next;
                    next = self.low_word_equals(value, last.action, next);
                    while let Some((rule, before)) = rest.split_last()
                        && let Some((_, value)) = same(rule)
                    {
                        next = self.low_word_equals(value, rule.action, next);
                        rest = before;
                    }
                    next = self.push(load(low_word(argument)));
                    self.jump(BPF_JEQ, high, next, unlike);
                    next = self.push(load(high_word(argument)));
                }
                next
            }
        }
    }

    /// For an argument whose low word is in the accumulator.
    fn low_word_equals(&mut self, value: u64, action: u32, next: Place) -> Place {
        let action = self.ret(action);
        self.jump(BPF_JEQ, split(value).1, action, next)
    }

    /// Returns the rule's action if all its conditions hold, and else goes on at `next`.
    fn rule(&mut self, rule: &Rule, next: Place) -> Place {
        let mut place = self.ret(rule.action);
        for condition in rule.conditions.iter().rev() {
            place = self.test(condition, place, next);
        }
        place
    }

    /// Goes on at `then` if the condition holds, else at `otherwise`.
    fn test(&mut self, condition: &Condition, then: Place, otherwise: Place) -> Place {
        let argument = condition.argument;
        match condition.comparison {
            Comparison::Equal(value) => self.equal(argument, None, value, then, otherwise),
            Comparison::NotEqual(value) => self.equal(argument, None, value, otherwise, then),
            Comparison::MaskedEqual { mask, value } => {
                self.equal(argument, Some(mask), value, then, otherwise)
            }
            Comparison::Greater(value) => self.above(argument, BPF_JGT, value, then, otherwise),
            Comparison::GreaterOrEqual(value) => self.above(argument, BPF_JGE, value, then, otherwise),
            Comparison::Less(value) => self.above(argument, BPF_JGE, value, otherwise, then),
            Comparison::LessOrEqual(value) => self.above(argument, BPF_JGT, value, otherwise, then),
        }
    }

    fn equal(&mut self, argument: u8, mask: Option<u64>, value: u64, then: Place, otherwise: Place) -> Place {
        let (high, low) = split(value);
        let masks = mask.map(split);
        self.jump(BPF_JEQ, low, then, otherwise);
        masks.map(|(_, mask)| self.push(and(mask)));
        let low_part = self.push(load(low_word(argument)));
        self.jump(BPF_JEQ, high, low_part, otherwise);
        masks.map(|(mask, _)| self.push(and(mask)));
        self.push(load(high_word(argument)))
    }

    fn above(&mut self, argument: u8, operator: u32, value: u64, then: Place, otherwise: Place) -> Place {
        let (high, low) = split(value);
        self.jump(operator, low, then, otherwise);
        let low_part = self.push(load(low_word(argument)));
        let is_equal = self.jump(BPF_JEQ, high, low_part, otherwise);
        self.jump(BPF_JGT, high, then, is_equal);
        self.push(load(high_word(argument)))
    }
}

/// The argument and the value, for a rule that is nothing but their equality.
fn equality(rule: &Rule) -> Option<(u8, u64)> {
    match rule.conditions.as_slice() {
        [Condition { argument, comparison: Comparison::Equal(value) }] => Some((*argument, *value)),
        _ => None,
    }
}

fn low_word(argument: u8) -> u32 {
    OFFSET_ARGUMENTS + 8 * u32::from(argument)
}

fn high_word(argument: u8) -> u32 {
    low_word(argument) + 4
}

const RET: u16 = (BPF_RET | BPF_K) as u16;

fn and(mask: u32) -> sock_filter {
    sock_filter { code: (BPF_ALU | BPF_AND | BPF_K) as u16, jt: 0, jf: 0, k: mask }
}

fn split(value: u64) -> (u32, u32) {
    ((value >> 32) as u32, value as u32)
}

fn load(offset: u32) -> sock_filter {
    sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}
