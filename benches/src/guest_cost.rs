//! What a running VM costs besides time: KVM's exit counts, and the memory of its VMM.

use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde::Serialize;

/// Where KVM shows its counters for all VMs together.
const COUNTERS: &str = "/sys/kernel/debug/kvm";
const SHOWN: &[&str] = &[
    "exits",
    "io_exits",
    "mmio_exits",
    "insn_emulation",
    "halt_exits",
    "irq_exits",
    "irq_injections",
    "pf_taken",
];

/// Costs of one VM from its start to a moment.
#[derive(Debug, Clone, Serialize)]
pub struct GuestCost {
    /// KVM's counters by name; empty if the kernel does not show them.
    pub kvm_counters: Vec<(String, u64)>,
    /// Resident guest memory in KiB.
    pub guest_resident_kib: u64,
    /// What the VMM's process has resident besides, in KiB.
    pub vmm_resident_kib: u64,
}

/// KVM's counters as they were at a moment. A VM's counts leave the sum when it ends.
pub struct Counters {
    _debugfs: DebugFs,
    before: Vec<(String, u64)>,
}

impl Counters {
    /// As they are now. They can be read as long as this lives.
    pub fn open() -> Self {
        let debugfs = DebugFs::mount_if_missing();
        Self { _debugfs: debugfs, before: counters() }
    }

    /// How much each has grown since.
    pub fn grown(&self) -> Vec<(String, u64)> {
        let grown =
            |((name, now), (_, before)): ((String, u64), &(String, u64))| (name, now.saturating_sub(*before));
        counters().into_iter().zip(&self.before).map(grown).collect()
    }

    /// What a VM has cost that has been the only one since then, and whose VMM is this process.
    pub fn look_at(&self, vmm: u32) -> Result<GuestCost> {
        let kvm_counters = self.grown();
        let (guest_resident_kib, vmm_resident_kib) = resident_kib(vmm)?;
        Ok(GuestCost { kvm_counters, guest_resident_kib, vmm_resident_kib })
    }
}

/// All exits of all VMs that run, if the kernel tells.
pub fn kvm_exits() -> Option<u64> {
    fs::read_to_string(format!("{COUNTERS}/exits")).ok()?.trim().parse().ok()
}

/// Starts a VM that prints a line and then waits, and looks at it.
pub fn take(cloche: &Path) -> Result<GuestCost> {
    let counters = Counters::open();
    let mut child = Command::new(cloche)
        .args(["run", "--isolation", "vm", "--rm", "-i", "busybox", "sh", "-c", "echo hi; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("start a VM to look at")?;
    let cost = look_below(&mut child, &counters);
    drop(child.stdin.take());
    let _ = child.wait();
    cost
}

fn look_below(child: &mut Child, counters: &Counters) -> Result<GuestCost> {
    let mut byte = [0];
    let stdout = child.stdout.as_mut().context("stdout is piped")?;
    ensure!(stdout.read(&mut byte)? == 1, "the VM to look at printed nothing");
    let vmm = vmm_below(child.id()).context("the VMM's process is not to be found")?;
    counters.look_at(vmm)
}

fn counters() -> Vec<(String, u64)> {
    let read = |name: &&str| {
        let text = fs::read_to_string(format!("{COUNTERS}/{name}")).ok()?;
        Some(((*name).to_owned(), text.trim().parse().ok()?))
    };
    SHOWN.iter().filter_map(read).collect()
}

/// The nearest process below `ancestor` that runs as a VMM.
fn vmm_below(ancestor: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{ancestor}/task/{ancestor}/children")).ok()?;
    let children: Vec<u32> = children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
    let is_vmm = |pid: &u32| {
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).take(2).any(|word| word.ends_with(b"vmm"))
    };
    children.iter().copied().find(is_vmm).or_else(|| children.iter().copied().find_map(vmm_below))
}

/// Resident KiB of the largest mapping, which is the guest's memory, and of all others.
fn resident_kib(pid: u32) -> Result<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).context("read the VMM's mappings")?;
    let mut mappings: Vec<(u64, u64)> = Vec::new();
    for line in maps.lines() {
        let kib = |rest: &str| rest.trim().trim_end_matches(" kB").parse().unwrap_or(0);
        if let Some(rest) = line.strip_prefix("Size:") {
            mappings.push((kib(rest), 0));
        } else if let (Some(rest), Some(last)) = (line.strip_prefix("Rss:"), mappings.last_mut()) {
            last.1 = kib(rest);
        }
    }
    let (_, guest) = mappings.iter().max().copied().context("the VMM has no mappings")?;
    Ok((guest, mappings.iter().map(|(_, resident)| resident).sum::<u64>() - guest))
}

/// debugfs, mounted for as long as this lives if it was not there.
struct DebugFs {
    mounted: bool,
}

impl DebugFs {
    fn mount_if_missing() -> Self {
        let point = "/sys/kernel/debug";
        let missing = !Path::new(COUNTERS).exists();
        // Without it there are no counters, which the report says.
        Self { mounted: missing && mount("debugfs", point, "debugfs", MountFlags::empty(), None).is_ok() }
    }
}

impl Drop for DebugFs {
    fn drop(&mut self) {
        if self.mounted {
            let _ = unmount("/sys/kernel/debug", UnmountFlags::DETACH);
        }
    }
}
