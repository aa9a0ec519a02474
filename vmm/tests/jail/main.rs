//! The VMM's jail, closed around real VMMs and around hostile code, on this host's KVM. Every trial is a process of its
//! own, since no process leaves the jail. Runs as root and as a plain user; guests are a few instructions long, so that
//! any `/dev/kvm` can run them.

mod allocator;
mod conditions;
mod guest;
mod hostile;
mod keeper;
mod workloads;

use std::{fs::OpenOptions, process::ExitCode};

use cloche_seccomp::syscall_table::name;
use cloche_vmm::{
    Event, ExitReason,
    jail::{
        ThreadKind,
        table::{ENTRIES, Entry},
    },
};
use hostile::{Decoys, Probe};
use keeper::{Report, Task, User};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        [_, "keeper", task, folder] => keeper::keeper(task, folder.as_ref()).map_err(Into::into),
        [_, "plain-keeper", task, folder] => keeper::plain_keeper(task, folder.as_ref()).map_err(Into::into),
        [_, "inmate", task, folder, socket, listener] => {
            let fd = |word: &str| word.parse().unwrap_or(-1);
            keeper::inmate(task, folder.as_ref(), fd(socket), fd(listener))
        }
        _ => return tests(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", words[1]);
            ExitCode::FAILURE
        }
    }
}

fn tests() -> ExitCode {
    let no_kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err();
    if no_kvm {
        eprintln!("jail: tests with a VM are ignored, because /dev/kvm cannot be opened");
    }
    let no_taps = !has_taps();
    if no_taps {
        eprintln!("jail: tests with a tap are ignored, because /dev/net/tun cannot be opened");
    }
    let mut trials = Vec::new();
    for workload in workloads::ALL {
        let test = move || ends_as_it_should(workload, &vm(workload, None)?);
        let ignored = no_kvm || (*workload == workloads::TAP && no_taps);
        trials.push(
            Trial::test(format!("workload_{workload}_runs_in_the_jail"), test).with_ignored_flag(ignored),
        );
    }
    for (index, entry) in ENTRIES.iter().enumerate() {
        for kind in entry.threads {
            let call = name(entry.call as u32).unwrap_or("unknown");
            let name = format!("entry_{index}_{call}_is_needed_on_{}", kind.name());
            let test = move || is_needed(index, *kind);
            let ignored = no_kvm || (no_taps && is_of_taps(entry));
            trials.push(Trial::test(name, test).with_ignored_flag(ignored));
        }
    }
    for (name, number, arguments) in FORBIDDEN {
        for kind in ThreadKind::ALL {
            let test = move || is_killed_for(kind, *number, *arguments);
            trials.push(Trial::test(format!("{name}_on_{}_is_reported_by_name", kind.name()), test));
        }
    }
    for kind in ThreadKind::ALL {
        let name = format!("panic_on_{}_ends_the_process_with_its_status", kind.name());
        trials.push(Trial::test(name, move || panic_ends(&probe(User::Own, Probe::Panic, kind, None)?)));
    }
    trials.push(Trial::test("without_a_filter_nothing_of_the_host_is_in_reach", || out_of_reach(User::Own)));
    trials.push(Trial::test("closed_jail_looks_closed_from_outside", || looks_closed(User::Own)));
    // All the above as a plain user, if a plain user does not run this anyway.
    let is_root = rustix::process::geteuid().is_root();
    type Test = fn() -> Result<(), Failed>;
    let plain: [(&str, bool, Test); 4] = [
        ("plain_user_s_machine_runs_in_the_jail", no_kvm, || {
            ends_as_it_should("devices", &vm_of(User::Plain, "devices", None)?)
        }),
        ("plain_user_s_jail_is_out_of_the_hosts_reach", false, || out_of_reach(User::Plain)),
        ("plain_user_s_jail_looks_closed_from_outside", false, || looks_closed(User::Plain)),
        ("plain_user_s_violation_is_reported_by_name", false, || {
            killed_for(User::Plain, ThreadKind::Vcpu, libc::SYS_openat, [0; 6])
        }),
    ];
    for (name, ignored, test) in plain {
        trials.push(Trial::test(name, test).with_ignored_flag(ignored || !is_root));
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn vm(workload: &str, without: Option<(usize, ThreadKind)>) -> Result<Report, Failed> {
    vm_of(User::Own, workload, without)
}

fn vm_of(user: User, workload: &str, without: Option<(usize, ThreadKind)>) -> Result<Report, Failed> {
    Ok(keeper::run(&Task::Vm { workload: workload.into(), without }, user)?)
}

fn probe(
    user: User,
    probe: Probe,
    thread: ThreadKind,
    without: Option<(usize, ThreadKind)>,
) -> Result<Report, Failed> {
    Ok(keeper::run(&Task::Probe { probe, thread, without }, user)?)
}

/// What an attacker would like, or another kind of thread may do.
const FORBIDDEN: &[(&str, i64, [u64; 6])] = &[
    ("open", libc::SYS_open, [0; 6]),
    ("openat", libc::SYS_openat, [0; 6]),
    ("openat2", libc::SYS_openat2, [0; 6]),
    ("execve", libc::SYS_execve, [0; 6]),
    ("execveat", libc::SYS_execveat, [0; 6]),
    ("fork", libc::SYS_fork, [0; 6]),
    ("clone", libc::SYS_clone, [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0]),
    ("clone3", libc::SYS_clone3, [0; 6]),
    ("unshare", libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0]),
    ("setns", libc::SYS_setns, [0; 6]),
    ("socket", libc::SYS_socket, [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0]),
    ("connect", libc::SYS_connect, [0; 6]),
    ("bind", libc::SYS_bind, [0; 6]),
    ("kill", libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
    ("tgkill_of_another_process", libc::SYS_tgkill, [2, 2, 34, 0, 0, 0]),
    ("ptrace", libc::SYS_ptrace, [0; 6]),
    ("process_vm_writev", libc::SYS_process_vm_writev, [0; 6]),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, [0; 6]),
    ("mount", libc::SYS_mount, [0; 6]),
    ("mknod", libc::SYS_mknod, [0; 6]),
    ("chroot", libc::SYS_chroot, [0; 6]),
    ("setuid", libc::SYS_setuid, [0; 6]),
    ("capset", libc::SYS_capset, [0; 6]),
    ("prlimit64", libc::SYS_prlimit64, [0; 6]),
    ("prctl", libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, 0, 0, 0, 0, 0]),
    ("seccomp", libc::SYS_seccomp, [0; 6]),
    ("bpf", libc::SYS_bpf, [0; 6]),
    ("keyctl", libc::SYS_keyctl, [0; 6]),
    ("syslog", libc::SYS_syslog, [3, 0, 0, 0, 0, 0]),
    ("perf_event_open", libc::SYS_perf_event_open, [0; 6]),
    ("open_by_handle_at", libc::SYS_open_by_handle_at, [0; 6]),
    ("open_tree", libc::SYS_open_tree, [0; 6]),
    ("shmget", libc::SYS_shmget, [0; 6]),
    ("memfd_create", libc::SYS_memfd_create, [0; 6]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [0; 6]),
    ("userfaultfd", libc::SYS_userfaultfd, [0; 6]),
    ("terminal_input", libc::SYS_ioctl, [2, libc::TIOCSTI, 0, 0, 0, 0]),
    ("executable_mmap", libc::SYS_mmap, [0, 4096, 7, 0x22, u64::MAX, 0]),
    ("sched_yield", libc::SYS_sched_yield, [0; 6]),
    ("executable_mprotect", libc::SYS_mprotect, [0, 4096, 5, 0, 0, 0]),
    // Through the x32 ABI, which knows the same calls by other numbers.
    ("openat_of_x32", 0x4000_0000 | libc::SYS_openat, [0; 6]),
    // Calls of no known name.
    ("call_1000", 1000, [0; 6]),
];

fn is_killed_for(kind: ThreadKind, number: i64, arguments: [u64; 6]) -> Result<(), Failed> {
    killed_for(User::Own, kind, number, arguments)
}

fn killed_for(user: User, kind: ThreadKind, number: i64, arguments: [u64; 6]) -> Result<(), Failed> {
    let report = probe(user, Probe::Call { number, arguments }, kind, None)?;
    let as_it_should =
        report.violation() == Some((number as u32, kind)) && report.signal == Some(libc::SIGSYS);
    if as_it_should { Ok(()) } else { Err(format!("{report:?}").into()) }
}

fn out_of_reach(user: User) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let decoys = Decoys::new(folder.path())?;
    let report = probe(user, Probe::Everything(decoys.host.clone()), ThreadKind::Main, None)?;
    let (failed, done): (Vec<_>, Vec<_>) =
        report.words.iter().partition(|words| words.contains(": failed: "));
    if failed.len() > 30 && done.is_empty() && report.code == Some(0) {
        Ok(())
    } else {
        Err(format!("in reach: {done:?}; {report:?}").into())
    }
}

fn looks_closed(user: User) -> Result<(), Failed> {
    let report = probe(user, Probe::Wait, ThreadKind::Main, None)?;
    let seen = |start: &str| report.words.iter().filter(|words| words.starts_with(start)).collect::<Vec<_>>();
    let is = |start: &str, ends: &[&str]| {
        let lines = seen(start);
        let all = lines.iter().all(|line| ends.contains(&line[start.len()..].trim()));
        if !lines.is_empty() && all { Ok(()) } else { Err(Failed::from(format!("{start}: {lines:?}"))) }
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        is(set, &["0000000000000000"])?;
    }
    is("NoNewPrivs:", &["1"])?;
    is("Seccomp:", &["2"])?;
    is("Groups:", &[""])?;
    let root = seen("Uid:").iter().any(|line| line.split_whitespace().any(|word| word == "0"));
    // A plain user's keeper is in a user namespace where that user is 0.
    if root && matches!(user, User::Own) {
        return Err("it runs as root".into());
    }
    if rustix::process::geteuid().is_root() && matches!(user, User::Own) {
        // Nobody else's on this host: not even a VMM's with the same process id in another container.
        let namespace = seen("namespace ").first().and_then(|line| line[10..].parse::<u64>().ok());
        let own = (0x7000_0000 + namespace.ok_or("no namespace")? % 0x1000_0000).to_string();
        for line in [seen("Uid:"), seen("Gid:")].concat() {
            if line.split_whitespace().skip(1).any(|id| id != own) {
                return Err(format!("{line}, not {own}").into());
            }
        }
    }
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        is(&format!("{kind} "), &["apart"])?;
    }
    for limit in ["Max core file size", "Max msgqueue size"] {
        let lines = seen(limit);
        if !lines.iter().all(|line| line.split_whitespace().filter(|word| *word == "0").count() == 2) {
            return Err(format!("{lines:?}").into());
        }
    }
    // Standard streams, the two sockets that it was given, and its epoll: not the file that the keeper has forgotten.
    if seen("open ").len() == 6 && report.code == Some(0) {
        Ok(())
    } else {
        Err(format!("{report:?}").into())
    }
}

/// Calls that are made while all signals are blocked, so that nobody can name them: on the way out of a thread, while a
/// signal is sent or handled. And without `write` nothing can be told at all.
const UNNAMED: &[i64] = &[
    libc::SYS_exit,
    libc::SYS_madvise,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_rt_sigreturn,
    libc::SYS_write,
];

fn panic_ends(report: &Report) -> Result<(), Failed> {
    let told = report.words.iter().any(|words| words.contains("as was asked for"));
    if told && report.code == Some(101) { Ok(()) } else { Err(format!("{report:?}").into()) }
}

fn ends_as_it_should(workload: &str, report: &Report) -> Result<(), Failed> {
    let as_it_should = match (workload, report.events.last()) {
        (
            "exit"
            | "devices"
            | "network"
            | "slow-reader"
            | "broken-queue"
            | "balloon"
            | "share"
            | "full-heap"
            | "clock-of-the-kernel"
            | "lesser-host"
            | workloads::TAP,
            Some(Event::Exited { reason, .. }),
        ) => *reason == ExitReason::GuestExit { code: 0 },
        ("controlled" | "talkative", last) => {
            return if report.code == Some(137) && last.is_some_and(|last| matches!(last, Event::Mark { .. }))
            {
                Ok(())
            } else {
                Err(format!("{report:?}").into())
            };
        }
        ("spinning-vcpus", Some(Event::Exited { reason, .. })) => {
            *reason == ExitReason::StartTimeout { timeout_ms: 100 }
        }
        ("stopped", Some(Event::Exited { reason, .. })) => *reason == ExitReason::Stopped,
        ("triple-fault", Some(Event::Exited { reason, .. })) => *reason == ExitReason::TripleFault,
        ("lost-vcpu", Some(Event::Failed { step, message, .. })) => {
            step == "run" && message.contains("0xd0000000")
        }
        ("unusable-kernel", Some(Event::Failed { step, .. })) => step == "load-kernel",
        _ => false,
    };
    if as_it_should && report.code == Some(0) { Ok(()) } else { Err(format!("{report:?}").into()) }
}

fn is_unnamed(entry: &Entry, report: &Report) -> bool {
    UNNAMED.contains(&entry.call) && report.violation().is_none() && report.signal == Some(libc::SIGSYS)
}

fn has_taps() -> bool {
    OpenOptions::new().read(true).write(true).open("/dev/net/tun").is_ok()
}

/// Whether only the workload with a tap makes this call.
fn is_of_taps(entry: &Entry) -> bool {
    entry.call == libc::SYS_writev || entry.purpose.contains("a tap")
}

/// Without this allowance, some trial must end in a kill for want of this very call.
fn is_needed(index: usize, kind: ThreadKind) -> Result<(), Failed> {
    let entry = ENTRIES.get(index).ok_or("no such entry")?;
    let without = Some((index, kind));
    let probes = [Probe::Late, Probe::Panic].into_iter().map(|what| probe(User::Own, what, kind, without));
    let workloads = workloads::ALL.iter().filter(|name| **name != workloads::TAP || has_taps());
    for report in workloads.map(|workload| vm(workload, without)).chain(probes) {
        let report = report?;
        if is_unnamed(entry, &report) {
            return Ok(());
        }
        if report.violation() == Some((entry.call as u32, kind)) {
            let killed = report.signal == Some(libc::SIGSYS);
            return if killed { Ok(()) } else { Err(format!("reported, but not killed: {report:?}").into()) };
        }
    }
    Err(format!("no workload needs it: {}", entry.purpose).into())
}
