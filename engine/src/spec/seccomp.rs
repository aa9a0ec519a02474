//! Docker's default system-call policy, for x86_64.
//!
//! It follows Docker 25 and later, which no longer allow io_uring. Calls that only other architectures have are
//! left out. What needs a capability is allowed when the container has that capability.

use oci_spec::{
    OciSpecError,
    runtime::{
        Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder, LinuxSeccompOperator, LinuxSyscall,
    },
};

/// Allowed with any arguments.
const ALLOWED: &str = "
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 sendfile splice tee vmsplice
    copy_file_range readahead fadvise64 lseek
    open openat openat2 creat close close_range dup dup2 dup3 fcntl flock ioctl name_to_handle_at
    stat lstat fstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents
    getdents64 getcwd chdir fchdir
    chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat umask utime utimes futimesat utimensat truncate
    ftruncate fallocate
    mkdir mkdirat rmdir mknod mknodat link linkat symlink symlinkat unlink unlinkat rename renameat renameat2
    getxattr lgetxattr fgetxattr setxattr lsetxattr fsetxattr listxattr llistxattr flistxattr removexattr
    lremovexattr fremovexattr getxattrat setxattrat listxattrat removexattrat
    sync syncfs fsync fdatasync sync_file_range cachestat
    mmap munmap mremap mprotect madvise msync mincore mlock mlock2 mlockall munlock munlockall brk
    remap_file_pages memfd_create memfd_secret membarrier pkey_alloc pkey_free pkey_mprotect process_mrelease
    map_shadow_stack mseal
    execve execveat fork vfork exit exit_group wait4 waitid kill tkill tgkill pidfd_open pidfd_send_signal
    getpid getppid gettid getpgid getpgrp setpgid getsid setsid set_tid_address restart_syscall
    getuid geteuid getgid getegid getresuid getresgid getgroups setuid setgid setreuid setregid setresuid
    setresgid setfsuid setfsgid setgroups capget capset
    getrlimit setrlimit prlimit64 getrusage times sysinfo uname getcpu getpriority setpriority ioprio_get
    ioprio_set
    sched_yield sched_getaffinity sched_setaffinity sched_getattr sched_setattr sched_getparam sched_setparam
    sched_getscheduler sched_setscheduler sched_get_priority_max sched_get_priority_min sched_rr_get_interval
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_tgsigqueueinfo sigaltstack signalfd signalfd4 pause alarm
    nanosleep clock_nanosleep clock_getres clock_gettime clock_adjtime adjtimex gettimeofday time getitimer
    setitimer timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create
    timerfd_gettime timerfd_settime
    futex futex_waitv futex_wait futex_wake futex_requeue get_robust_list set_robust_list rseq
    pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_wait
    epoll_wait_old epoll_pwait epoll_pwait2 eventfd eventfd2 inotify_init inotify_init1 inotify_add_watch
    inotify_rm_watch fanotify_mark
    io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents
    socketpair bind listen accept accept4 connect getsockname getpeername getsockopt setsockopt shutdown
    sendto sendmsg sendmmsg recvfrom recvmsg recvmmsg
    msgget msgctl msgsnd msgrcv semget semctl semop semtimedop shmget shmat shmctl shmdt
    mq_open mq_unlink mq_getsetattr mq_notify mq_timedsend mq_timedreceive
    prctl arch_prctl seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self getrandom
    get_thread_area set_thread_area modify_ldt
    ptrace process_vm_readv process_vm_writev
";

/// Allowed only with a capability.
const ALLOWED_WITH: &[(&str, &str)] = &[
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "CAP_SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr
         move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount2
         unshare listmount statmount",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module init_module finit_module"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("CAP_SYS_RAWIO", "iopl ioperm"),
    ("CAP_SYS_TIME", "settimeofday clock_settime"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("CAP_SYSLOG", "syslog"),
    ("CAP_BPF", "bpf"),
    ("CAP_PERFMON", "perf_event_open"),
];

/// `CLONE_NEW*` flags of clone(2) that make a namespace.
const CLONE_NEW_NAMESPACE: u64 = 0x7e02_0000;
/// Address family of vsock: a container must not talk to a hypervisor.
const AF_VSOCK: u64 = 40;
/// personality(2) values that change nothing dangerous: Linux, Linux with 26-style uname, 32-bit, both, query.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The policy as the runtime-spec's `linux.seccomp` (OCI runtime-spec config-linux.md#seccomp) for a container
/// with these capabilities. It is most of a spec, and by way of JSON values it would take a millisecond of each start.
pub fn default_policy(capabilities: &[&str]) -> Result<LinuxSeccomp, OciSpecError> {
    let mut rules = vec![allow(ALLOWED)];
    for (capability, names) in ALLOWED_WITH {
        if capabilities.contains(capability) {
            rules.push(allow(names));
        }
    }
    rules.push(allow_when("socket", AF_VSOCK, None, LinuxSeccompOperator::ScmpCmpNe)?);
    for value in PERSONALITIES {
        rules.push(allow_when("personality", value, None, LinuxSeccompOperator::ScmpCmpEq)?);
    }
    if !capabilities.contains(&"CAP_SYS_ADMIN") {
        let masked = LinuxSeccompOperator::ScmpCmpMaskedEq;
        rules.push(allow_when("clone", CLONE_NEW_NAMESPACE, Some(0), masked)?);
        // The flags of clone3 are behind a pointer, out of a filter's sight; ENOSYS makes libcs fall back to clone.
        let mut clone3 = rule("clone3", LinuxSeccompAction::ScmpActErrno);
        clone3.set_errno_ret(Some(ENOSYS));
        rules.push(clone3);
    }
    let mut policy = LinuxSeccomp::default();
    policy
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(EPERM))
        .set_architectures(Some(vec![Arch::ScmpArchX86_64]))
        .set_syscalls(Some(rules));
    Ok(policy)
}

/// What is done about the calls with these names, whatever their arguments.
fn rule(names: &str, action: LinuxSeccompAction) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.split_whitespace().map(Into::into).collect()).set_action(action);
    rule
}

fn allow(names: &str) -> LinuxSyscall {
    rule(names, LinuxSeccompAction::ScmpActAllow)
}

/// Allows `name` when its first argument satisfies `operator`.
fn allow_when(
    name: &str,
    value: u64,
    value_two: Option<u64>,
    operator: LinuxSeccompOperator,
) -> Result<LinuxSyscall, OciSpecError> {
    let mut argument = LinuxSeccompArgBuilder::default().index(0_usize).value(value).op(operator);
    if let Some(value_two) = value_two {
        argument = argument.value_two(value_two);
    }
    let mut rule = allow(name);
    rule.set_args(Some(vec![argument.build()?]));
    Ok(rule)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn allows(policy: &LinuxSeccomp, name: &str) -> bool {
        policy.syscalls().as_ref().unwrap().iter().any(|rule| {
            rule.action() == LinuxSeccompAction::ScmpActAllow && rule.names().iter().any(|n| n == name)
        })
    }

    #[test]
    fn policy_as_json_is_spelled_as_in_the_specification() {
        let policy = serde_json::to_value(default_policy(&[]).unwrap()).unwrap();
        assert_eq!(policy["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(policy["defaultErrnoRet"], EPERM);
        assert_eq!(policy["architectures"], json!(["SCMP_ARCH_X86_64"]));
        let rules = policy["syscalls"].as_array().unwrap();
        let of = |name: &str| rules.iter().find(|rule| rule["names"][0] == name).unwrap();
        assert_eq!(
            *of("clone"),
            json!({"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [
                {"index": 0, "value": CLONE_NEW_NAMESPACE, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]})
        );
        assert_eq!(
            *of("clone3"),
            json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS})
        );
        assert_eq!(of("read")["action"], "SCMP_ACT_ALLOW");
    }

    #[test]
    fn policy_without_sys_admin_refuses_namespaces_and_mounts() {
        let policy = default_policy(&["CAP_SYS_CHROOT"]).unwrap();
        for refused in ["mount", "unshare", "setns", "bpf", "clone3", "io_uring_setup", "kexec_load"] {
            assert!(!allows(&policy, refused), "{refused}");
        }
        assert!(allows(&policy, "chroot"));
        assert!(allows(&policy, "clone"));
    }

    #[test]
    fn policy_with_sys_admin_allows_mounts() {
        assert!(allows(&default_policy(&["CAP_SYS_ADMIN"]).unwrap(), "mount"));
    }

    #[test]
    fn allowed_calls_are_listed_once() {
        let mut names: Vec<_> = ALLOWED.split_whitespace().collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
