//! Compiled policies against a model that reads the spec's rules literally.

use oci_spec::runtime::{
    LinuxSeccompArgBuilder, LinuxSeccompBuilder, LinuxSeccompOperator as Op, LinuxSyscall,
    LinuxSyscallBuilder,
};
use proptest::prelude::*;

use cloche_seccomp::{
    bpf::{AUDIT_ARCH_I386, AUDIT_ARCH_X86_64, X32_SYSCALL_BIT},
    interpreter::{Call, run},
};

use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

fn arg(index: usize, op: Op, value: u64, value_two: u64) -> LinuxSeccompArg {
    LinuxSeccompArgBuilder::default().index(index).op(op).value(value).value_two(value_two).build().unwrap()
}

fn rule(names: &[&str], action: LinuxSeccompAction, args: Vec<LinuxSeccompArg>) -> LinuxSyscall {
    let names: Vec<_> = names.iter().map(|name| name.to_string()).collect();
    LinuxSyscallBuilder::default().names(names).action(action).args(args).build().unwrap()
}

fn policy(default: LinuxSeccompAction, rules: Vec<LinuxSyscall>) -> LinuxSeccomp {
    LinuxSeccompBuilder::default().default_action(default).syscalls(rules).build().unwrap()
}

fn call(name: &str, args: [u64; 6]) -> Call {
    Call { number: syscall_table::number(name).unwrap(), architecture: AUDIT_ARCH_X86_64, args }
}

fn answer(policy: &LinuxSeccomp, call: &Call) -> u32 {
    run(&Filter::compile(policy).unwrap().program, call).0
}

use LinuxSeccompAction::{
    ScmpActAllow as Allow, ScmpActErrno as Errno, ScmpActKillProcess as KillProcess, ScmpActLog as Log,
    ScmpActNotify as Notify, ScmpActTrace as Trace, ScmpActTrap as Trap,
};

#[test]
fn call_without_rule_gets_the_default_action() {
    let policy = policy(Errno, vec![rule(&["read", "mseal"], Allow, vec![])]);
    assert_eq!(answer(&policy, &call("read", [0; 6])), ALLOW);
    assert_eq!(answer(&policy, &call("mseal", [0; 6])), ALLOW);
    assert_eq!(answer(&policy, &call("open", [0; 6])), EPERM);
    // `mseal` is the last that the policy knows.
    let newer = Call { number: 400_000, ..call("read", [0; 6]) };
    assert_eq!(answer(&policy, &newer), ENOSYS);
    let of_other_default = self::policy(Log, vec![rule(&["read"], Allow, vec![])]);
    assert_eq!(answer(&of_other_default, &newer), libc::SECCOMP_RET_LOG);
    assert_eq!(answer(&self::policy(Errno, vec![]), &newer), EPERM);
}

#[test]
fn call_of_another_abi_never_gets_through() {
    let policy = policy(Allow, vec![]);
    let native = call("read", [0; 6]);
    assert_eq!(
        answer(&policy, &Call { architecture: AUDIT_ARCH_I386, ..native }),
        libc::SECCOMP_RET_KILL_PROCESS
    );
    assert_eq!(answer(&policy, &Call { number: X32_SYSCALL_BIT, ..native }), ENOSYS);
    assert_eq!(answer(&policy, &Call { number: u32::MAX, ..native }), ENOSYS);
    let x32 = Call { number: X32_SYSCALL_BIT, ..native };
    for (default, action) in
        [(KillProcess, libc::SECCOMP_RET_KILL_PROCESS), (Trap, libc::SECCOMP_RET_TRAP), (Errno, ENOSYS)]
    {
        assert_eq!(answer(&self::policy(default, vec![]), &x32), action);
    }
}

#[test]
fn calls_of_32_bit_programs_have_rules_of_their_own_numbers() {
    let listed = |rules| {
        let mut policy = policy(Errno, rules);
        policy.set_architectures(Some(vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86]));
        policy
    };
    let wrong = arg(0, Op::ScmpCmpEq, 3, 0);
    let policy = listed(vec![
        rule(&["write", "socket", "chown32"], Allow, vec![]),
        rule(&["personality"], Allow, vec![wrong]),
        rule(&["connect"], Log, vec![]),
    ]);
    let compat = |number: u32, first: u64| Call {
        number,
        architecture: AUDIT_ARCH_I386,
        args: [first, 0, 0, 0, 0, 0],
    };
    // write, chown32, socket; and socketcall as socket, connect and bind.
    let cases = [
        (4, 0, ALLOW),
        (212, 0, ALLOW),
        (359, 0, ALLOW),
        (102, 1, ALLOW),
        (102, 3, libc::SECCOMP_RET_LOG),
        (102, 2, EPERM),
    ];
    for (number, first, expected) in cases {
        assert_eq!(answer(&policy, &compat(number, first)), expected, "{number} {first}");
    }
    assert_eq!(answer(&policy, &compat(136, 3)), ALLOW);
    assert_eq!(answer(&policy, &compat(136, 4)), EPERM);
    // x86_64's write is i386's exit, and not the other way round.
    assert_eq!(answer(&policy, &compat(1, 0)), EPERM);
    assert_eq!(answer(&policy, &call("write", [0; 6])), ALLOW);
    assert_eq!(answer(&policy, &call("stat", [0; 6])), EPERM);
    assert_eq!(answer(&policy, &compat(400_000, 0)), ENOSYS);
    let x32 = Call { number: X32_SYSCALL_BIT, ..call("write", [0; 6]) };
    assert_eq!(answer(&policy, &x32), ENOSYS);
    let denied = listed(vec![rule(&["socketcall"], Allow, vec![]), rule(&["socket"], Trap, vec![])]);
    assert_eq!(answer(&denied, &compat(102, 1)), libc::SECCOMP_RET_TRAP);
    assert_eq!(answer(&denied, &compat(102, 2)), ALLOW);
    let mut denied = self::policy(Allow, vec![rule(&["shmget"], Trap, vec![])]);
    denied.set_architectures(Some(vec![Arch::ScmpArchX86]));
    assert_eq!(answer(&denied, &compat(117, 0x1_0017)), libc::SECCOMP_RET_TRAP);
    assert_eq!(answer(&denied, &compat(117, 24)), ALLOW);
}

#[test]
fn actions_carry_their_errno_or_trace_value() {
    let errno = LinuxSyscallBuilder::default()
        .names(vec!["clone3".to_owned()])
        .action(Errno)
        .errno_ret(libc::ENOSYS as u32)
        .build()
        .unwrap();
    let policy = policy(Allow, vec![errno, rule(&["ptrace"], Trace, vec![]), rule(&["mount"], Trap, vec![])]);
    assert_eq!(answer(&policy, &call("clone3", [0; 6])), ENOSYS);
    assert_eq!(answer(&policy, &call("ptrace", [0; 6])), libc::SECCOMP_RET_TRACE | 1);
    assert_eq!(answer(&policy, &call("mount", [0; 6])), libc::SECCOMP_RET_TRAP);
}

#[test]
fn strictest_of_matching_rules_counts_whatever_their_order() {
    let allow = rule(&["clone"], Allow, vec![]);
    let refuse = rule(&["clone"], Errno, vec![arg(0, Op::ScmpCmpMaskedEq, 0x1000_0000, 0x1000_0000)]);
    for rules in [vec![allow.clone(), refuse.clone()], vec![refuse, allow]] {
        let policy = policy(Log, rules);
        assert_eq!(answer(&policy, &call("clone", [0x1000_0011, 0, 0, 0, 0, 0])), EPERM);
        assert_eq!(answer(&policy, &call("clone", [0x11, 0, 0, 0, 0, 0])), ALLOW);
    }
}

#[test]
fn comparisons_of_one_argument_are_alternatives_and_of_several_conjunctions() {
    let either =
        rule(&["personality"], Allow, vec![arg(0, Op::ScmpCmpEq, 0, 0), arg(0, Op::ScmpCmpEq, 8, 0)]);
    let both = rule(&["socket"], Allow, vec![arg(0, Op::ScmpCmpEq, 1, 0), arg(1, Op::ScmpCmpEq, 2, 0)]);
    let policy = policy(Errno, vec![either, both]);
    let personality = |persona| answer(&policy, &call("personality", [persona, 0, 0, 0, 0, 0]));
    assert_eq!([personality(0), personality(8), personality(4)], [ALLOW, ALLOW, EPERM]);
    let socket = |domain, kind| answer(&policy, &call("socket", [domain, kind, 0, 0, 0, 0]));
    assert_eq!([socket(1, 2), socket(1, 1), socket(2, 2)], [ALLOW, EPERM, EPERM]);
}

#[test]
fn comparison_sees_all_64_bits() {
    let policy = policy(Errno, vec![rule(&["read"], Allow, vec![arg(2, Op::ScmpCmpEq, 5, 0)])]);
    assert_eq!(answer(&policy, &call("read", [0, 0, 5, 0, 0, 0])), ALLOW);
    assert_eq!(answer(&policy, &call("read", [0, 0, 5 | 1 << 32, 0, 0, 0])), EPERM);
}

#[test]
fn unknown_names_are_skipped_and_impossible_policies_refused() {
    assert!(Filter::compile(&policy(Errno, vec![rule(&["chown32", "no such call"], Allow, vec![])])).is_ok());
    let refused = |policy: &LinuxSeccomp| Filter::compile(policy).unwrap_err().to_string();
    assert!(
        refused(&policy(Notify, vec![])).contains("SCMP_ACT_NOTIFY cannot be used as the default action")
    );
    let of_write = policy(Allow, vec![rule(&["read", "write"], Notify, vec![])]);
    assert!(refused(&of_write).contains("SCMP_ACT_NOTIFY cannot be used for the write syscall"));
    let seventh = policy(Errno, vec![rule(&["read"], Allow, vec![arg(6, Op::ScmpCmpEq, 0, 0)])]);
    assert!(refused(&seventh).contains("argument 6"));
    let foreign = |arch| {
        let default = LinuxSeccompBuilder::default().default_action(Errno);
        default.architectures(vec![arch]).build().unwrap()
    };
    assert!(refused(&foreign(Arch::ScmpArchAarch64)).contains("SCMP_ARCH_AARCH64"));
    assert!(Filter::compile(&foreign(Arch::ScmpArchX86_64)).is_ok());
    let errno =
        LinuxSeccompBuilder::default().default_action(Errno).default_errno_ret(5000u32).build().unwrap();
    assert!(refused(&errno).contains("5000"));
}

#[test]
fn any_call_of_a_policy_of_hundreds_costs_few_instructions() {
    // Every other call allowed: more ranges than any real policy has, further apart than a conditional jump reaches.
    let names: Vec<_> = (0..460).step_by(2).filter_map(name_of).collect();
    let policy = policy(Errno, vec![rule(&names, Allow, vec![])]);
    let program = Filter::compile(&policy).unwrap().program;
    for number in 0..500 {
        let call = Call { number, ..call("read", [0; 6]) };
        let (answer, steps) = run(&program, &call);
        assert_eq!(answer, model(&policy, &call), "call {number}");
        assert!(steps < 20, "{steps}");
    }
}

fn name_of(number: u32) -> Option<&'static str> {
    syscall_table::name(number)
}

/// Reads the rules as `config-linux.md#seccomp` and the module's own documentation say.
fn model(policy: &LinuxSeccomp, call: &Call) -> u32 {
    let holds = |arg: &LinuxSeccompArg| {
        let (given, value) = (call.args[arg.index()], arg.value());
        match arg.op() {
            Op::ScmpCmpNe => given != value,
            Op::ScmpCmpLt => given < value,
            Op::ScmpCmpLe => given <= value,
            Op::ScmpCmpEq => given == value,
            Op::ScmpCmpGe => given >= value,
            Op::ScmpCmpGt => given > value,
            Op::ScmpCmpMaskedEq => given & value == arg.value_two().unwrap(),
        }
    };
    let matches = |rule: &&LinuxSyscall| {
        let args = rule.args().as_deref().unwrap();
        let mut indices: Vec<_> = args.iter().map(LinuxSeccompArg::index).collect();
        indices.sort_unstable();
        let repeated = indices.windows(2).any(|pair| pair[0] == pair[1]);
        let named = rule.names().iter().any(|name| syscall_table::number(name) == Some(call.number));
        named && if repeated { args.iter().any(holds) } else { args.iter().all(holds) }
    };
    let order = [KillProcess, Trap, Errno, Notify, Trace, Log, Allow];
    let rank = |action| order.iter().position(|listed| *listed == action).unwrap();
    let matching = policy.syscalls().iter().flatten().filter(matches).map(LinuxSyscall::action);
    let last = policy.syscalls().iter().flatten().flat_map(|rule| rule.names());
    let last = last.filter_map(|name| syscall_table::number(name)).max();
    if policy.default_action() == Errno && last.is_some_and(|last| call.number > last) {
        return ENOSYS;
    }
    let action = matching.min_by_key(|action| rank(*action)).unwrap_or(policy.default_action());
    action_value(action, None).unwrap()
}

/// What a rule's action may be; any but one of the default's.
fn some_action_of_a_rule() -> impl Strategy<Value = LinuxSeccompAction> {
    prop_oneof![some_action(), Just(Notify)]
}

fn some_action() -> impl Strategy<Value = LinuxSeccompAction> {
    prop::sample::select(vec![KillProcess, Trap, Errno, Trace, Log, Allow])
}

/// Values where a comparison by halves could go wrong.
fn some_value() -> impl Strategy<Value = u64> {
    let halves = prop::sample::select(vec![0, 1, 2, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, 0xffff_ffff]);
    (halves.clone(), halves).prop_map(|(high, low)| high << 32 | low)
}

fn some_arg() -> impl Strategy<Value = LinuxSeccompArg> {
    let op = prop::sample::select(vec![
        Op::ScmpCmpNe,
        Op::ScmpCmpLt,
        Op::ScmpCmpLe,
        Op::ScmpCmpEq,
        Op::ScmpCmpGe,
        Op::ScmpCmpGt,
        Op::ScmpCmpMaskedEq,
    ]);
    (0..3usize, op, some_value(), some_value())
        .prop_map(|(index, op, value, under)| arg(index, op, value, under & value))
}

const NAMES: [&str; 8] = ["read", "pread64", "open", "close", "clone", "socket", "openat2", "mseal"];

fn some_policy() -> impl Strategy<Value = LinuxSeccomp> {
    let names = prop::sample::subsequence(NAMES.to_vec(), 1..4);
    let rule = (names, some_action_of_a_rule(), prop::collection::vec(some_arg(), 0..4))
        .prop_map(|(names, action, args)| rule(&names, action, args));
    (some_action(), prop::collection::vec(rule, 0..12)).prop_map(|(default, rules)| policy(default, rules))
}

proptest! {
    #[test]
    fn filter_answers_like_the_model(
        policy in some_policy(),
        number in prop_oneof![
            prop::sample::select(NAMES.to_vec()).prop_map(|name| syscall_table::number(name).unwrap()),
            0..600u32,
        ],
        args in prop::array::uniform6(some_value()),
    ) {
        let call = Call { number, architecture: AUDIT_ARCH_X86_64, args };
        prop_assert_eq!(answer(&policy, &call), model(&policy, &call));
    }
}

#[test]
fn filter_survives_the_way_through_bytes() {
    let mut made = policy(
        LinuxSeccompAction::ScmpActErrno,
        vec![
            rule(&["read", "write"], LinuxSeccompAction::ScmpActAllow, Vec::new()),
            rule(&["socket"], LinuxSeccompAction::ScmpActAllow, vec![arg(0, Op::ScmpCmpNe, 40, 0)]),
        ],
    );
    made.set_flags(Some(vec![LinuxSeccompFilterFlag::SeccompFilterFlagLog]));
    let filter = Filter::compile(&made).unwrap();
    let bytes = filter.to_bytes();
    let read = Filter::from_bytes(&bytes).unwrap();
    assert_eq!((read.flags, read.to_bytes()), (libc::SECCOMP_FILTER_FLAG_LOG as u32, bytes.clone()));
    assert_eq!(run(&read.program, &call("socket", [40, 0, 0, 0, 0, 0])).0, EPERM);
    assert_eq!(run(&read.program, &call("socket", [1, 0, 0, 0, 0, 0])).0, ALLOW);
    assert!(Filter::from_bytes(&bytes[..bytes.len() - 1]).is_none());
    assert!(Filter::from_bytes(&[0; 3]).is_none());
}
