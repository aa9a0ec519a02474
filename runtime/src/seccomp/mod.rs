//! Seccomp policies: from the runtime spec's `linux.seccomp` to a BPF program in the kernel.
//!
//! ```text
//!  LinuxSeccomp ──resolve──▶ one Decision for each syscall number ──bpf::assemble──▶ instructions
//! ```
//!
//! Rules of one call are OR'ed, the comparisons within a rule AND'ed. If several matching rules have different
//! actions, the strictest counts, whatever their order: kill process, kill thread, trap, errno, notify, trace, log,
//! allow. That is also how the kernel combines filters (seccomp(2)).
//!
//! Where the default action is an errno, calls newer than any that the policy names fail with ENOSYS, as in runc: programs
//! then fall back to older calls, where EPERM would make them fail.
//!
//! Calls of x86_64 get through, and 32-bit (i386) ones if the policy lists SCMP_ARCH_X86; else these kill the process. An
//! x32 call fails with ENOSYS unless the default action kills or traps. Other architectures that the policy lists are those
//! of other machines.

use std::{borrow::Cow, io, os::fd::OwnedFd};

use cloche_seccomp::{
    bpf::{self, Comparison, Condition, Decision, Policy, Rule},
    i386_table, syscall_table,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};

/// Why a seccomp policy could not be compiled or installed.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// Whoever answers the notifications could not be told of the listener.
    #[error("SCMP_ACT_NOTIFY cannot be used {0}: the process needs it to hand over its listener")]
    Notify(&'static str),
    /// A return value for an action that has none (config-linux.md#seccomp: "the runtime MUST print an error and fail").
    #[error("the seccomp policy gives errnoRet {value} for {action}, which returns no value")]
    NoReturnValue {
        /// The action.
        action: LinuxSeccompAction,
        /// The value.
        value: u32,
    },
    /// None of the policy's architectures is this machine's.
    #[error("the seccomp policy is for {0}, and this machine is SCMP_ARCH_X86_64")]
    ForeignArchitecture(String),
    /// An errno or trace value is out of range.
    #[error("the seccomp policy returns {value} for {what}; at most {max} is possible")]
    ReturnValue {
        /// The action's name.
        what: &'static str,
        /// The value asked for.
        value: u32,
        /// The kernel's limit.
        max: u32,
    },
    /// A comparison is of an argument that system calls do not have.
    #[error("the seccomp policy compares argument {0}; system calls have arguments 0 to 5")]
    Argument(usize),
    /// The program is over the kernel's limit.
    #[error("the seccomp policy needs {0} BPF instructions; the kernel takes {max}", max = bpf::MAX_INSTRUCTIONS)]
    TooLong(usize),
    /// The kernel refused the program.
    #[error("cannot install the seccomp filter of {instructions} instructions")]
    Install {
        /// Its length.
        instructions: usize,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The actions that policies may have.
pub const ACTIONS: [&str; 9] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];

/// A compiled policy.
#[derive(Debug, Clone)]
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: u32,
    notifies: bool,
}

impl Filter {
    /// Compiles a policy. Names of system calls that this architecture does not have are skipped, as runc and libseccomp
    /// do: policies list the calls of all architectures, and what cannot be called needs no rule.
    pub fn compile(seccomp: &LinuxSeccomp) -> Result<Self, SeccompError> {
        let architectures = seccomp.architectures().as_deref().unwrap_or_default();
        check_architectures(architectures)?;
        let default = action_value(seccomp.default_action(), seccomp.default_errno_ret())?;
        if default == libc::SECCOMP_RET_USER_NOTIF {
            return Err(SeccompError::Notify("as the default action"));
        }
        let native = |name: &str, rules: &[Rule], calls: &mut Vec<(u32, Rule)>| {
            let number = syscall_table::number(name);
            calls.extend(number.iter().flat_map(|number| rules.iter().map(|rule| (*number, rule.clone()))));
        };
        let (policy, notifies) = policy(seccomp, default, native)?;
        let compat = if architectures.contains(&Arch::ScmpArchX86) {
            Some(self::policy(seccomp, default, add_i386)?.0)
        } else {
            None
        };
        let program = bpf::assemble_for(&policy, compat.as_ref());
        if program.len() > bpf::MAX_INSTRUCTIONS {
            return Err(SeccompError::TooLong(program.len()));
        }
        let flags = flags(seccomp.flags().as_deref().unwrap_or_default(), notifies);
        Ok(Self { program, flags, notifies })
    }

    /// The one that was compiled before, or the policy's.
    pub(crate) fn of<'a>(
        compiled: Option<&'a Self>,
        policy: Option<&LinuxSeccomp>,
    ) -> Result<Option<Cow<'a, Self>>, SeccompError> {
        match (compiled, policy) {
            (Some(compiled), _) => Ok(Some(Cow::Borrowed(compiled))),
            (None, Some(policy)) if cfg!(feature = "seccomp-policies") => {
                Ok(Some(Cow::Owned(Self::compile(policy)?)))
            }
            // Without the feature, a policy was refused before.
            (None, _) => Ok(None),
        }
    }

    /// As bytes, for a runtime in another kernel of this machine, where nobody listens to a filter: its flags, and then its instructions as the kernel reads
    /// them (`struct sock_filter` of `linux/filter.h`, little-endian).
    pub fn to_bytes(&self) -> Vec<u8> {
        let instructions = self.program.iter().flat_map(|instruction| {
            let [low, high] = instruction.code.to_le_bytes();
            let [a, b, c, d] = instruction.k.to_le_bytes();
            [low, high, instruction.jt, instruction.jf, a, b, c, d]
        });
        self.flags.to_le_bytes().into_iter().chain(instructions).collect()
    }

    /// What [`Filter::to_bytes`] has made; `None` if it cannot have. What the program says is its maker's business, and
    /// whether it is one, the kernel's.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (flags, instructions) = bytes.split_first_chunk()?;
        let (instructions, rest) = instructions.as_chunks();
        let program = instructions.iter().map(|&[low, high, jt, jf, a, b, c, d]| libc::sock_filter {
            code: u16::from_le_bytes([low, high]),
            jt,
            jf,
            k: u32::from_le_bytes([a, b, c, d]),
        });
        let flags = u32::from_le_bytes(*flags);
        rest.is_empty().then(|| Self { program: program.collect(), flags, notifies: false })
    }

    /// Whether somebody has to decide on some calls.
    pub(crate) fn notifies(&self) -> bool {
        self.notifies
    }

    /// Puts the filter into force for this thread and all that it becomes. Needs no_new_privs or CAP_SYS_ADMIN. Returns
    /// the listener, if the policy notifies.
    pub(crate) fn install(&self) -> Result<Option<OwnedFd>, SeccompError> {
        let installed = if self.notifies {
            cloche_seccomp::install_with_listener(&self.program, self.flags).map(Some)
        } else {
            cloche_seccomp::install(&self.program, self.flags).map(|()| None)
        };
        installed.map_err(|source| SeccompError::Install { instructions: self.program.len(), source })
    }
}

/// The decisions for one architecture, whose calls and rules `add` makes of a name and its rules; and whether somebody has
/// to decide on some.
fn policy(
    seccomp: &LinuxSeccomp,
    default: u32,
    add: impl Fn(&str, &[Rule], &mut Vec<(u32, Rule)>),
) -> Result<(Policy, bool), SeccompError> {
    let mut rules: Vec<(u32, Rule)> = Vec::new();
    for entry in seccomp.syscalls().iter().flatten() {
        let action = action_value(entry.action(), entry.errno_ret())?;
        if action == libc::SECCOMP_RET_USER_NOTIF && entry.names().iter().any(|name| name == "write") {
            return Err(SeccompError::Notify("for the write syscall"));
        }
        let entry_rules = rules_of(entry.args().as_deref().unwrap_or_default(), action)?;
        entry.names().iter().for_each(|name| add(name, &entry_rules, &mut rules));
    }
    rules.sort_by_key(|(number, rule)| (*number, strictness(rule.action)));
    let notifies = rules.iter().any(|(_, rule)| rule.action == libc::SECCOMP_RET_USER_NOTIF);
    let of_one_call = rules.chunk_by(|(a, _), (b, _)| a == b);
    let calls: Vec<_> =
        of_one_call.filter_map(|rules| Some((rules.first()?.0, decide(rules, default)))).collect();
    let is_errno = default & libc::SECCOMP_RET_ACTION_FULL == libc::SECCOMP_RET_ERRNO;
    let newer =
        if is_errno && !calls.is_empty() { libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32 } else { default };
    Ok((Policy { calls, default, newer }, notifies))
}

/// As [`policy`] wants it, for 32-bit programs. What another call does, too, is allowed or not there as well; but for rules
/// that look at arguments, which a filter cannot find behind that one's pointer (as in libseccomp).
fn add_i386(name: &str, rules: &[Rule], calls: &mut Vec<(u32, Rule)>) {
    let number = i386_table::number(name);
    calls.extend(number.iter().flat_map(|number| rules.iter().map(|rule| (*number, rule.clone()))));
    let Some((call, comparison)) = i386_table::multiplexed(name) else { return };
    let is_it = Condition { argument: 0, comparison };
    let always = rules.iter().filter(|rule| rule.conditions.is_empty());
    calls.extend(always.map(|rule| (call, Rule { conditions: vec![is_it], action: rule.action })));
}

fn check_architectures(listed: &[Arch]) -> Result<(), SeccompError> {
    // Those that list only its 32-bit kinds mean this one, too: libseccomp always adds the machine's own.
    let is_own = |arch: &Arch| {
        matches!(arch, Arch::ScmpArchX86_64 | Arch::ScmpArchNative | Arch::ScmpArchX86 | Arch::ScmpArchX32)
    };
    if listed.is_empty() || listed.iter().any(is_own) {
        return Ok(());
    }
    let names: Vec<_> = listed.iter().map(Arch::to_string).collect();
    Err(SeccompError::ForeignArchitecture(names.join(", ")))
}

/// The filter's return value for an action (`linux/seccomp.h`).
fn action_value(action: LinuxSeccompAction, data: Option<u32>) -> Result<u32, SeccompError> {
    let with_data = |what, base, max| match data.unwrap_or(libc::EPERM as u32) {
        value if value <= max => Ok(base | value),
        value => Err(SeccompError::ReturnValue { what, value, max }),
    };
    if let Some(value) = data
        && !matches!(action, LinuxSeccompAction::ScmpActErrno | LinuxSeccompAction::ScmpActTrace)
    {
        return Err(SeccompError::NoReturnValue { action, value });
    }
    match action {
        LinuxSeccompAction::ScmpActKillProcess => Ok(libc::SECCOMP_RET_KILL_PROCESS),
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            Ok(libc::SECCOMP_RET_KILL_THREAD)
        }
        LinuxSeccompAction::ScmpActTrap => Ok(libc::SECCOMP_RET_TRAP),
        // The kernel caps errno values at MAX_ERRNO.
        LinuxSeccompAction::ScmpActErrno => with_data("SCMP_ACT_ERRNO", libc::SECCOMP_RET_ERRNO, 4095),
        LinuxSeccompAction::ScmpActTrace => with_data("SCMP_ACT_TRACE", libc::SECCOMP_RET_TRACE, 0xffff),
        LinuxSeccompAction::ScmpActLog => Ok(libc::SECCOMP_RET_LOG),
        LinuxSeccompAction::ScmpActAllow => Ok(libc::SECCOMP_RET_ALLOW),
        LinuxSeccompAction::ScmpActNotify => Ok(libc::SECCOMP_RET_USER_NOTIF),
    }
}

fn flags(listed: &[LinuxSeccompFilterFlag], notifies: bool) -> u32 {
    let flag = |flag: &LinuxSeccompFilterFlag| match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG as u32,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW as u32,
        // Asks that all threads get the filter, and there is one.
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
        // How to wait for an answer; without notifications nobody does, and the kernel refuses it.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if notifies => {
            libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV as u32
        }
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    };
    listed.iter().map(flag).fold(0, |flags, flag| flags | flag)
}

/// The rules that one entry of the policy means. Comparisons of different arguments must all hold; if one
/// argument is compared twice, each comparison is a rule of its own, as in runc.
fn rules_of(args: &[LinuxSeccompArg], action: u32) -> Result<Vec<Rule>, SeccompError> {
    let conditions = args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    let repeated = conditions.iter().enumerate().any(|(at, condition)| {
        conditions.iter().skip(at + 1).any(|other| other.argument == condition.argument)
    });
    if repeated {
        Ok(conditions.into_iter().map(|condition| Rule { conditions: vec![condition], action }).collect())
    } else {
        Ok(vec![Rule { conditions, action }])
    }
}

fn condition(arg: &LinuxSeccompArg) -> Result<Condition, SeccompError> {
    let argument = u8::try_from(arg.index())
        .ok()
        .filter(|&argument| argument < 6)
        .ok_or(SeccompError::Argument(arg.index()))?;
    let value = arg.value();
    let comparison = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => Comparison::NotEqual(value),
        LinuxSeccompOperator::ScmpCmpLt => Comparison::Less(value),
        LinuxSeccompOperator::ScmpCmpLe => Comparison::LessOrEqual(value),
        LinuxSeccompOperator::ScmpCmpEq => Comparison::Equal(value),
        LinuxSeccompOperator::ScmpCmpGe => Comparison::GreaterOrEqual(value),
        LinuxSeccompOperator::ScmpCmpGt => Comparison::Greater(value),
        // config-linux.md#seccomp: `value` is the mask, `valueTwo` what must be left under it.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            Comparison::MaskedEqual { mask: value, value: arg.value_two().unwrap_or(0) }
        }
    };
    Ok(Condition { argument, comparison })
}

/// What happens to one call, given its rules, strictest first: they count up to the first that always matches.
fn decide(rules: &[(u32, Rule)], default: u32) -> Decision {
    let rules = rules.iter().map(|(_, rule)| rule);
    let always = rules.clone().find(|rule| rule.conditions.is_empty());
    let otherwise = always.map_or(default, |rule| rule.action);
    let mut rules: Vec<_> = rules.take_while(|rule| !rule.conditions.is_empty()).cloned().collect();
    // Rules at the end that do what happens anyway need no code.
    while rules.last().is_some_and(|rule| rule.action == otherwise) {
        rules.pop();
    }
    if rules.is_empty() { Decision::Always(otherwise) } else { Decision::Match { rules, otherwise } }
}

/// The kernel's order: smaller, as a signed number, is stricter (`linux/seccomp.h`).
fn strictness(action: u32) -> i32 {
    (action & libc::SECCOMP_RET_ACTION_FULL) as i32
}

#[cfg(test)]
mod tests;
