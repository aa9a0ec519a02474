//! `doctor`: what this machine can do, what slows it, and the command that mends what is missing.
//!
//! Whether KVM runs a Linux guest is tried, not guessed: a VM boots the guest kernel with the agent and no work. The
//! agent then gives up by the exit port, which only a booted kernel's first process can reach.

use std::{fs, path::Path};

use cloche_runtime::{as_root_of, cgroup::Layout, is_machine_root};
use cloche_vmm::{
    config::{InitramfsPart, VmConfig},
    event::{Event, ExitReason, Mark},
};
use rustix::event::{PollFd, PollFlags};
use serde::Serialize;

use crate::{
    isolation::vm::{self, kernel, kvm, process::Vmm},
    rootless::IdMaps,
};

/// How a finding is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Works, but slower or with less than elsewhere.
    Slow,
    /// An isolation, or part of it, does not work.
    Missing,
}

/// One thing looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub subject: &'static str,
    /// How it is to be taken.
    pub verdict: Verdict,
    /// What was found.
    pub detail: String,
    /// What to do about it, if anything: a command or a sentence.
    pub remedy: Option<String>,
}

impl Finding {
    fn good(subject: &'static str, detail: impl Into<String>) -> Self {
        Self { subject, verdict: Verdict::Good, detail: detail.into(), remedy: None }
    }

    fn bad(
        subject: &'static str,
        verdict: Verdict,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { subject, verdict, detail: detail.into(), remedy: Some(remedy.into()) }
    }
}

/// The whole report.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether `--isolation container` works here.
    pub container: bool,
    /// Whether `--isolation vm` works here.
    pub vm: bool,
    /// In the order to be read.
    pub findings: Vec<Finding>,
}

/// Looks at everything; takes as long as a VM takes to boot.
pub fn examine() -> Report {
    let container = vec![privileges(), cgroups(), erofs(), filesystem("overlay")];
    let mut vm = vec![match kvm::check() {
        Ok(()) => Finding::good("KVM", "/dev/kvm opens and the CPU shows hardware virtualisation"),
        Err(error) => Finding::bad("KVM", Verdict::Missing, error.to_string(), KVM_REMEDY),
    }];
    vm.push(jail());
    vm.push(vm_cgroups());
    vm.extend(linux_guest());
    let works = |findings: &[Finding]| findings.iter().all(|finding| finding.verdict != Verdict::Missing);
    let (container_works, vm_works) = (works(&container), works(&vm));
    let findings = container.into_iter().chain(vm).chain(slow_starts()).collect();
    Report { container: container_works, vm: vm_works, findings }
}

const KVM_REMEDY: &str = "load it with `modprobe kvm_amd` or `modprobe kvm_intel`; in a cloud, take a machine with nested \
     virtualisation; for tests, `scripts/kvm-host` of Cloche's sources emulates a KVM host";

fn privileges() -> Finding {
    const CAP_SYS_ADMIN: u32 = 21;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or_default();
    if mask >> CAP_SYS_ADMIN & 1 == 1 && is_machine_root() {
        return Finding::good("privileges", "CAP_SYS_ADMIN is there");
    }
    let users = IdMaps::of_caller();
    match as_root_of(&users.uids, &users.gids, || Ok(String::new())) {
        Ok(_) if users.is_single() => Finding::bad(
            "privileges",
            Verdict::Slow,
            "a plain user's containers, with no user but their root: there are no further ids",
            "add a line `NAME:100000:65536` with this user's name to /etc/subuid and /etc/subgid",
        ),
        Ok(_) => Finding::good(
            "privileges",
            "a plain user's containers, with users from /etc/subuid and /etc/subgid",
        ),
        Err(error) => {
            let cause =
                std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
            Finding::bad("privileges", Verdict::Missing, format!("{error}{cause}"), USER_NAMESPACE_REMEDY)
        }
    }
}

const USER_NAMESPACE_REMEDY: &str = "run as root; or see that user.max_user_namespaces is not 0, that \
     kernel.apparmor_restrict_unprivileged_userns and kernel.unprivileged_userns_clone do not forbid it, and that \
     newuidmap is installed (uidmap)";

fn cgroups() -> Finding {
    let subject = "cgroups";
    let controllers: Vec<String> = match Layout::detect() {
        Ok(Layout::V2) => fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")
            .unwrap_or_default()
            .split_whitespace()
            .map(Into::into)
            .collect(),
        Ok(_) => fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .flat_map(|name| name.split(',').map(str::to_owned).collect::<Vec<_>>())
            .collect(),
        Err(_) => {
            let remedy = "mount one: `mount -t cgroup2 cgroup2 /sys/fs/cgroup`";
            return Finding::bad(subject, Verdict::Missing, "no cgroup file system is mounted", remedy);
        }
    };
    let layout = match Layout::detect() {
        Ok(Layout::V1) => "v1",
        Ok(Layout::Hybrid) => "hybrid (limits on v1)",
        _ => "v2",
    };
    let lacking: Vec<_> = ["memory", "cpu", "pids"]
        .into_iter()
        .filter(|needed| !controllers.iter().any(|controller| controller == needed))
        .collect();
    if lacking.is_empty() {
        Finding::good(subject, format!("{layout}, with memory, cpu and pids"))
    } else {
        let detail = format!("{layout}, without {}: such limits are refused", lacking.join(", "));
        Finding::bad(subject, Verdict::Slow, detail, "boot the host with `cgroup_enable=memory`")
    }
}

fn erofs() -> Finding {
    let mut finding = filesystem("erofs");
    if finding.verdict == Verdict::Good {
        let (major, minor) = kernel_version();
        if (major, minor) < (6, 12) {
            finding = Finding::bad(
                "erofs",
                Verdict::Slow,
                format!("Linux {major}.{minor} mounts EROFS through loop devices"),
                "Linux 6.12 and later mount EROFS files directly, which starts containers sooner",
            );
        }
    }
    finding
}

fn filesystem(name: &'static str) -> Finding {
    let known = |name: &str| {
        let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        filesystems.split_whitespace().any(|word| word == name)
    };
    // A module is loaded on first use; having it on disk is enough.
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let modules = fs::read_to_string(format!("/lib/modules/{release}/modules.dep")).unwrap_or_default();
    if known(name) || modules.contains(&format!("/{name}.ko")) {
        Finding::good(name, "the kernel has it")
    } else {
        let detail = format!("this kernel has no {name}");
        Finding::bad(
            name,
            Verdict::Missing,
            detail,
            format!("`modprobe {name}`, or use a kernel that has it"),
        )
    }
}

/// What the VMM needs to lock itself in (`cloche_vmm::jail`).
fn jail() -> Finding {
    let subject = "VMM's jail";
    let sysctl = |name: &str| fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap_or_default();
    if !sysctl("kernel/seccomp/actions_avail").split_whitespace().any(|action| action == "trap") {
        let detail = "this kernel has no seccomp filters";
        return Finding::bad(subject, Verdict::Missing, detail, "use one with CONFIG_SECCOMP_FILTER");
    }
    let is_root = rustix::process::geteuid().is_root();
    let in_the_way = [
        ("user/max_user_namespaces", "0", "user.max_user_namespaces=10000", true),
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1", !is_root),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "kernel.apparmor_restrict_unprivileged_userns=0",
            !is_root,
        ),
    ];
    let found = in_the_way.into_iter().find(|(name, bad, _, counts)| *counts && sysctl(name).trim() == *bad);
    match found {
        Some((name, bad, good, _)) => {
            let detail = format!("{} is {bad}: user namespaces are forbidden", name.replace('/', "."));
            Finding::bad(subject, Verdict::Missing, detail, format!("`sysctl {good}`, or run as root"))
        }
        None => Finding::good(subject, "seccomp filters and user namespaces are there"),
    }
}

/// Whether VMs get cgroups (`isolation/vm/cgroup.rs`).
fn vm_cgroups() -> Finding {
    let subject = "VMM's cgroup";
    match vm::probe_cgroup() {
        Ok(true) => Finding::good(subject, "each VM's processes get one, with limits"),
        Ok(false) => Finding::bad(
            subject,
            Verdict::Slow,
            "none: this user may make no cgroups with limits here, so that a VM is bounded by its guest's size only",
            "run as root, on a host whose /sys/fs/cgroup is writable and has the memory controller",
        ),
        Err(error) => Finding::bad(subject, Verdict::Missing, explain(&error), "see the `cgroups` finding"),
    }
}

/// Boots the guest kernel with the agent.
fn linux_guest() -> Option<Finding> {
    let subject = "Linux guest";
    if !Path::new("/dev/kvm").exists() {
        return None;
    }
    let kernel = match kernel::find(None) {
        Ok(kernel) => kernel,
        Err(error) => {
            return Some(Finding::bad(subject, Verdict::Missing, error.to_string(), "`cloche kernel build`"));
        }
    };
    let mut config = VmConfig::new(1, 128, kernel);
    config.initramfs = vec![InitramfsPart::Embedded];
    config.start_timeout_ms = Some(20_000);
    config.events_fd = Some(1);
    Some(match boot(&config) {
        Ok(Some(ns)) => Finding::good(
            subject,
            format!("boots: {:.1} ms from the first guest instruction to /init", ns as f64 / 1e6),
        ),
        Ok(None) => Finding::good(subject, "boots"),
        Err(reason) => {
            Finding::bad(subject, Verdict::Missing, format!("does not boot: {reason}"), KVM_REMEDY)
        }
    })
}

/// Runs a VM to its end; the time from the first guest instruction to `/init` if the guest got there.
fn boot(config: &VmConfig) -> Result<Option<u64>, String> {
    let mut vmm = Vmm::spawn(config, &[]).map_err(|error| explain(&error))?;
    let (mut first, mut init) = (None, None);
    let mut result = None;
    loop {
        let mut ready = [PollFd::from_borrowed_fd(vmm.events(), PollFlags::IN)];
        match rustix::event::poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(format!("the VMM cannot be watched: {errno}")),
        }
        let (events, closed) = vmm.take_events();
        for event in events {
            match event {
                Event::Mark { name: Mark::FirstInstruction, ns } => first = Some(ns),
                Event::Mark { name: Mark::Init, ns } => init = Some(ns),
                Event::Mark { .. } => {}
                Event::Exited { reason: ExitReason::GuestExit { .. }, .. } => {
                    result = Some(Ok(init.zip(first).map(|(init, first)| init - first)));
                }
                Event::Exited { reason, .. } => result = Some(Err(reason.to_string())),
                Event::Failed { step, message, .. } => result = Some(Err(format!("{step}: {message}"))),
                Event::Seccomp { call, thread } => result = Some(Err(vm::seccomp_kill(call, thread))),
            }
        }
        if closed {
            return result.unwrap_or_else(|| Err(format!("the VMM ended unexpectedly: {}", vmm.obituary())));
        }
    }
}

/// An error with its causes.
fn explain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What is known to make starts slower.
fn slow_starts() -> Vec<Finding> {
    let mut findings = Vec::new();
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    if matches!(read("/sys/module/kvm/parameters/nx_huge_pages").as_str(), "Y" | "1") {
        findings.push(Finding::bad(
            "KVM huge pages",
            Verdict::Slow,
            "nx_huge_pages is on: each VM starts a kernel thread, and guest code runs on 4 KiB pages",
            "on a CPU without the iTLB multihit erratum: `echo never > /sys/module/kvm/parameters/nx_huge_pages`",
        ));
    }
    let thp = read("/sys/kernel/mm/transparent_hugepage/enabled");
    if thp.contains("[never]") {
        findings.push(Finding::bad(
            "transparent huge pages",
            Verdict::Slow,
            "never: guest memory is backed by 4 KiB pages, some 7,000 faults for a start",
            "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`",
        ));
    } else if !thp.is_empty() {
        findings.push(Finding::good("transparent huge pages", thp));
    }
    if matches!(Layout::detect(), Ok(Layout::V2)) && !read("/proc/self/mountinfo").contains("favordynmods") {
        findings.push(Finding::bad(
            "cgroup migration",
            Verdict::Slow,
            "the cgroup file system lacks favordynmods: moving a process between cgroups waits for RCU",
            "`mount -o remount,favordynmods /sys/fs/cgroup`",
        ));
    }
    findings
}

/// Major and minor of the running kernel.
fn kernel_version() -> (u32, u32) {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}
