//! Reads the host's `/proc` to find the processes behind a sandbox. Knows nothing of sandboxes.

use std::collections::BTreeMap;
use std::fs;

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// A process seen in `/proc`. It may be gone by the time this is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Process id in this PID namespace.
    pub pid: Pid,
    /// Its parent's id.
    pub parent: i32,
    /// State letter of `/proc/PID/stat`, `Z` for a zombie.
    pub state: char,
    /// Arguments; empty for a zombie.
    pub arguments: Vec<String>,
    /// Its ids from this PID namespace inwards.
    pub nested_pids: Vec<i32>,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        // `PID (COMM) STATE PPID …`, and COMM may hold anything, `)` included.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let command_line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let arguments = command_line
            .split(|byte| *byte == 0)
            .filter(|argument| !argument.is_empty())
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let nested_pids = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))
            .map(|ids| ids.split_whitespace().filter_map(|id| id.parse().ok()).collect())
            .unwrap_or_default();
        Some(Self { pid: Pid::from_raw(pid)?, parent, state, arguments, nested_pids })
    }

    /// Whether this is the first process of a PID namespace below ours.
    pub fn is_init_of_namespace(&self) -> bool {
        self.nested_pids.len() > 1 && self.nested_pids.last() == Some(&1)
    }

    /// Whether the process is a VMM. It runs as `/proc/self/exe vmm …`.
    pub fn is_vmm(&self) -> bool {
        self.arguments.get(1).is_some_and(|role| role == "vmm")
    }

    /// Whether the process is a VM's file server. It runs as `/proc/self/exe share …`.
    pub fn is_share(&self) -> bool {
        self.arguments.get(1).is_some_and(|role| role == "share")
    }

    /// Sends SIGKILL; a process that is gone already is fine.
    pub fn kill(&self) {
        let _ = kill_process(self.pid, Signal::KILL);
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} ({}) {:?}", self.pid.as_raw_nonzero(), self.state, self.arguments.join(" "))
    }
}

/// Memory of a process that is resident, in MiB; none if it is gone.
pub fn resident_mib(pid: Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? / 1024)
}

/// Every process below `ancestor`, in no particular order.
pub fn descendants_of(ancestor: Pid) -> Vec<Process> {
    let mut children: BTreeMap<i32, Vec<Process>> = BTreeMap::new();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for process in pids.filter_map(Process::read) {
        children.entry(process.parent).or_default().push(process);
    }
    let mut found = Vec::new();
    let mut pending = vec![ancestor.as_raw_nonzero().get()];
    while let Some(pid) = pending.pop() {
        for child in children.remove(&pid).unwrap_or_default() {
            pending.push(child.pid.as_raw_nonzero().get());
            found.push(child);
        }
    }
    found
}

/// Every live process below this one. Orphans count: this process is their subreaper. Zombies among its own
/// children are reaped, so call this only when no child is being waited for elsewhere.
pub fn live_descendants() -> Vec<Process> {
    let own = rustix::process::getpid();
    let mut live = Vec::new();
    for process in descendants_of(own) {
        let own_zombie = process.state == 'Z' && process.parent == own.as_raw_nonzero().get();
        if own_zombie {
            let _ = waitpid(Some(process.pid), WaitOptions::NOHANG);
        } else {
            live.push(process);
        }
    }
    live
}
