//! The system calls that the threads of a closed jail may make, and nothing else: one table for all kinds of threads.
//!
//! Whoever needs one more adds a line, and a trial to `tests/jail` in which the VMM makes the call: a test takes each
//! line away in turn, for each kind of thread, and expects some trial to be killed for want of exactly that call. There
//! are no exceptions.

use cloche_seccomp::bpf::{self, Comparison, Condition, Decision, Policy, Rule};
use kvm_bindings::{
    kvm_cpuid2, kvm_dirty_log, kvm_enable_cap, kvm_ioeventfd, kvm_irq_level, kvm_lapic_state, kvm_msrs,
    kvm_pit_config, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
};
use libc::c_long;

use super::{
    JailError, SECCOMP_HINT,
    ThreadKind::{self, Disk, KvmSetup, Main, Vcpu},
    failed, violation,
};

/// One line of the table: a call that threads of some kinds may make.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Who may make it.
    pub threads: &'static [ThreadKind],
    /// The call's number.
    pub call: c_long,
    /// The values that it may have as arguments; others may be anything. All must hold.
    pub arguments: &'static [Argument],
    /// What for.
    pub purpose: &'static str,
}

/// What one argument, counted from 0, must be.
#[derive(Debug, Clone, Copy)]
pub enum Argument {
    /// This value.
    Is(u8, u64),
    /// Without these bits.
    Without(u8, u64),
}
use Argument::{Is, Without};

impl Argument {
    /// Whether a call with these arguments is within it.
    pub fn allows(&self, arguments: &[u64; 6]) -> bool {
        match *self {
            Is(at, value) => arguments.get(usize::from(at)) == Some(&value),
            Without(at, bits) => arguments.get(usize::from(at)).is_some_and(|argument| argument & bits == 0),
        }
    }
}

const fn any(threads: &'static [ThreadKind], call: c_long, purpose: &'static str) -> Entry {
    Entry { threads, call, arguments: &[], purpose }
}

const fn only(
    threads: &'static [ThreadKind],
    call: c_long,
    arguments: &'static [Argument],
    purpose: &'static str,
) -> Entry {
    Entry { threads, call, arguments, purpose }
}

const ALL: &[ThreadKind] = &[Main, KvmSetup, Vcpu, Disk];

/// A KVM request, as the second argument of ioctl(2) (linux/kvm.h): the direction, a number, and the size of the
/// structure.
const fn request(direction: u64, number: u64, bytes: usize) -> u64 {
    const KVMIO: u64 = 0xae;
    (direction << 30) | ((bytes as u64) << 16) | (KVMIO << 8) | number
}
const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;
const READ_WRITE: u64 = 3;

const NOT_EXECUTABLE: Argument = Without(2, libc::PROT_EXEC as u64);
const DONT_NEED: Argument = Is(2, libc::MADV_DONTNEED as u64);
/// Process id of the VMM in its own PID namespace.
const OWN_PROCESS: Argument = Is(0, 1);
/// The signal that makes a vCPU leave the guest: the first that the C library leaves to programs.
const KICK: Argument = Is(2, 34);

/// linux/if_tun.h: `_IOW('T', 208, unsigned int)`.
const TUNSETOFFLOAD: u64 = 0x4004_54d0;

const fn ioctl(threads: &'static [ThreadKind], request: &'static [Argument], purpose: &'static str) -> Entry {
    only(threads, libc::SYS_ioctl, request, purpose)
}

/// The table.
#[rustfmt::skip]
pub const ENTRIES: &[Entry] = &[
    // The allocator and the standard library. Nothing can become executable.
    any(ALL, libc::SYS_futex, "locks, channels, the end of threads"),
    any(ALL, libc::SYS_brk, "the heap, which all threads share"),
    only(&[Main], libc::SYS_mmap, &[NOT_EXECUTABLE], "large buffers"),
    any(&[Main], libc::SYS_mremap, "large buffers that grow"),
    any(ALL, libc::SYS_munmap, "large buffers, stacks of threads, kvm_run pages"),
    only(ALL, libc::SYS_madvise, &[DONT_NEED], "memory that the guest gives back, stacks of threads that end"),
    any(ALL, libc::SYS_sigaltstack, "threads that end"),
    any(ALL, libc::SYS_rt_sigprocmask, "threads that end or are sent a signal"),
    any(&[KvmSetup, Vcpu, Disk], libc::SYS_exit, "the end of a thread"),
    any(ALL, libc::SYS_exit_group, "the end of the process, also by a panic"),
    any(&[Main, KvmSetup, Vcpu], libc::SYS_clock_gettime, "marks where the vDSO has no clock; CPU time"),
    #[cfg(debug_assertions)]
    only(&[Main, Vcpu, Disk], libc::SYS_fcntl, &[Is(1, libc::F_GETFD as u64)], "std of debug builds, before it closes"),

    // Files, pipes, sockets and eventfds that are open. Only they can be read and written.
    any(ALL, libc::SYS_write, "eventfds, events, the console log, a panic's message"),
    any(&[Main], libc::SYS_read, "eventfds, the initramfs, requests of the control socket"),
    any(&[Main, Vcpu, Disk], libc::SYS_close, "what is closed"),
    any(&[Main], libc::SYS_pread64, "the kernel's header, KVM's statistics"),
    any(&[Main], libc::SYS_lseek, "the kernel and the initramfs"),
    any(&[Main, Disk], libc::SYS_preadv2, "disks"),
    any(&[Main, Disk], libc::SYS_pwritev2, "disks"),
    any(&[Main, Disk], libc::SYS_pwrite64, "zeros on disks that cannot make them"),
    any(&[Main, Disk], libc::SYS_fdatasync, "disks"),
    any(&[Main, Disk], libc::SYS_fallocate, "disks that give space back"),
    any(&[Main], libc::SYS_readv, "streams and frames to the guest"),
    any(&[Main], libc::SYS_recvfrom, "frames of a network's socket, replies of a file server"),
    any(&[Main], libc::SYS_recvmsg, "replies of a file server"),
    any(&[Main], libc::SYS_writev, "frames to a tap"),
    ioctl(&[Main], &[Is(1, TUNSETOFFLOAD)], "what a tap may leave undone"),
    any(&[Main], libc::SYS_sendmsg, "streams from the guest"),
    any(&[Main], libc::SYS_sendto, "what the host takes late; answers of the control socket"),
    any(&[Main], libc::SYS_shutdown, "streams that end"),
    any(&[Main], libc::SYS_getrandom, "the entropy device, keys of hash maps"),

    // The event loop and the control socket.
    any(&[Main], libc::SYS_epoll_create1, "the event loop"),
    any(&[Main], libc::SYS_epoll_ctl, "the event loop"),
    any(&[Main], libc::SYS_epoll_wait, "the event loop"),
    any(&[Main], libc::SYS_timerfd_create, "the start's deadline"),
    any(&[Main], libc::SYS_timerfd_settime, "the start's deadline"),
    any(&[Main], libc::SYS_accept4, "clients of the control socket"),
    ioctl(&[Main], &[Is(1, libc::FIONBIO)], "clients of the control socket"),
    any(&[Main], libc::SYS_mincore, "how much of guest memory is in use"),

    // Kicking vCPUs.
    any(&[Main], libc::SYS_getpid, "to kick a vCPU"),
    only(&[Main], libc::SYS_tgkill, &[OWN_PROCESS, KICK], "to kick a vCPU"),
    any(&[Vcpu], libc::SYS_rt_sigreturn, "after a kick"),
    any(&[Vcpu], libc::SYS_gettid, "the clock of a vCPU's CPU time"),

    // KVM.
    only(&[KvmSetup], libc::SYS_mmap, &[NOT_EXECUTABLE], "kvm_run pages"),
    // Those that a running guest needs come first: they are compared in this order.
    ioctl(&[Vcpu], &[Is(1, request(NONE, 0x80, 0))], "KVM_RUN"),
    ioctl(&[Main, Vcpu], &[Is(1, request(WRITE, 0x61, size_of::<kvm_irq_level>()))], "KVM_IRQ_LINE"),
    ioctl(&[KvmSetup], &[Is(1, request(NONE, 0x01, 0))], "KVM_CREATE_VM"),
    ioctl(&[KvmSetup], &[Is(1, request(NONE, 0x03, 0))], "KVM_CHECK_EXTENSION"),
    ioctl(&[KvmSetup], &[Is(1, request(NONE, 0x04, 0))], "KVM_GET_VCPU_MMAP_SIZE"),
    ioctl(&[KvmSetup], &[Is(1, request(READ_WRITE, 0x05, size_of::<kvm_cpuid2>()))], "KVM_GET_SUPPORTED_CPUID"),
    ioctl(&[KvmSetup], &[Is(1, request(NONE, 0x41, 0))], "KVM_CREATE_VCPU"),
    ioctl(&[KvmSetup, Main], &[Is(1, request(WRITE, 0x46, size_of::<kvm_userspace_memory_region>()))], "KVM_SET_USER_MEMORY_REGION, also to log dirty pages and to add memory"),
    ioctl(&[Main], &[Is(1, request(WRITE, 0x42, size_of::<kvm_dirty_log>()))], "KVM_GET_DIRTY_LOG"),
    ioctl(&[KvmSetup], &[Is(1, request(WRITE, 0xa3, size_of::<kvm_enable_cap>()))], "KVM_ENABLE_CAP, to leave out counters"),
    ioctl(&[KvmSetup], &[Is(1, request(NONE, 0x47, 0))], "KVM_SET_TSS_ADDR"),
    ioctl(&[KvmSetup], &[Is(1, request(NONE, 0x60, 0))], "KVM_CREATE_IRQCHIP"),
    ioctl(&[KvmSetup], &[Is(1, request(WRITE, 0x77, size_of::<kvm_pit_config>()))], "KVM_CREATE_PIT2, for hosts without a deadline timer"),
    ioctl(&[KvmSetup], &[Is(1, request(WRITE, 0x79, size_of::<kvm_ioeventfd>()))], "KVM_IOEVENTFD"),
    ioctl(&[KvmSetup], &[Is(1, request(WRITE, 0x89, size_of::<kvm_msrs>()))], "KVM_SET_MSRS"),
    ioctl(&[KvmSetup], &[Is(1, request(READ, 0x8e, size_of::<kvm_lapic_state>()))], "KVM_GET_LAPIC"),
    ioctl(&[KvmSetup], &[Is(1, request(WRITE, 0x8f, size_of::<kvm_lapic_state>()))], "KVM_SET_LAPIC"),
    ioctl(&[KvmSetup], &[Is(1, request(WRITE, 0x90, size_of::<kvm_cpuid2>()))], "KVM_SET_CPUID2"),
    ioctl(&[Main], &[Is(1, request(WRITE, 0x82, size_of::<kvm_regs>()))], "KVM_SET_REGS of the boot vCPU"),
    ioctl(&[Main], &[Is(1, request(READ, 0x83, size_of::<kvm_sregs>()))], "KVM_GET_SREGS of the boot vCPU"),
    ioctl(&[Main], &[Is(1, request(WRITE, 0x84, size_of::<kvm_sregs>()))], "KVM_SET_SREGS of the boot vCPU"),
    ioctl(&[Main, Vcpu], &[Is(1, request(NONE, 0xce, 0))], "KVM_GET_STATS_FD"),
    ioctl(&[Vcpu], &[Is(1, request(READ, 0x81, size_of::<kvm_regs>()))], "KVM_GET_REGS, to say where a vCPU was lost"),
    ioctl(&[Vcpu], &[Is(1, request(NONE, 0xad, 0))], "KVM_KVMCLOCK_CTRL, before a pause"),
];

/// The table in use, with or without lines taken away.
#[derive(Debug, Clone)]
pub struct Table {
    entries: Vec<Entry>,
}

impl Default for Table {
    fn default() -> Self {
        Self { entries: ENTRIES.to_vec() }
    }
}

impl Table {
    /// Without what one line allows to one kind of thread.
    pub fn without(index: usize, kind: ThreadKind) -> Self {
        let allowed = |(at, entry): &(usize, &Entry)| *at != index || !entry.threads.contains(&kind);
        let kept = ENTRIES.iter().enumerate().filter(allowed).map(|(_, entry)| *entry);
        // What the line allows to others stays.
        let rest = ENTRIES.get(index).into_iter().flat_map(|entry| {
            entry.threads.iter().filter(move |other| **other != kind).map(|other| Entry {
                threads: match other {
                    Main => &[Main],
                    KvmSetup => &[KvmSetup],
                    Vcpu => &[Vcpu],
                    Disk => &[Disk],
                },
                ..*entry
            })
        });
        Self { entries: kept.chain(rest).collect() }
    }

    /// The filter for one kind of thread.
    fn policy(&self, kind: ThreadKind) -> Policy {
        let denied = violation::action(kind);
        let mut rules: Vec<(u32, Rule)> = self
            .entries
            .iter()
            .filter(|entry| entry.threads.contains(&kind))
            .map(|entry| (entry.call as u32, rule(entry)))
            .collect();
        rules.sort_by_key(|(call, _)| *call);
        let of_one_call = rules.chunk_by(|(a, _), (b, _)| a == b);
        let calls = of_one_call.filter_map(|rules| {
            let decision = if rules.iter().any(|(_, rule)| rule.conditions.is_empty()) {
                Decision::Always(libc::SECCOMP_RET_ALLOW)
            } else {
                let rules = rules.iter().map(|(_, rule)| rule.clone()).collect();
                Decision::Match { rules, otherwise: denied }
            };
            Some((rules.first()?.0, decision))
        });
        Policy { calls: calls.collect(), default: denied, newer: denied }
    }

    /// Puts this thread into the filter of its kind.
    pub(super) fn install(&self, kind: ThreadKind) -> Result<(), JailError> {
        let program = bpf::assemble(&self.policy(kind));
        cloche_seccomp::install(&program, 0).map_err(failed("install a seccomp filter", SECCOMP_HINT))
    }
}

fn rule(entry: &Entry) -> Rule {
    let condition = |argument: &Argument| match *argument {
        Is(argument, value) => Condition { argument, comparison: Comparison::Equal(value) },
        Without(argument, bits) => {
            Condition { argument, comparison: Comparison::MaskedEqual { mask: bits, value: 0 } }
        }
    };
    Rule { conditions: entry.arguments.iter().map(condition).collect(), action: libc::SECCOMP_RET_ALLOW }
}
