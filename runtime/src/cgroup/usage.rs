//! What a cgroup's processes use, from whichever hierarchy tells.

use std::path::Path;

use super::{Cgroup, Layout, files, v1};

/// A number, or why it is not known.
type Reading = Result<u64, &'static str>;

/// What a cgroup's processes use and have used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in nanoseconds.
    pub cpu_ns: Reading,
    /// Memory in bytes, without cached file content that was not used lately: what would be missed.
    pub memory_bytes: Reading,
    /// The memory limit in bytes; `None` if there is none.
    pub memory_limit_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Reading,
    /// Bytes read from block devices.
    pub block_read_bytes: Reading,
    /// Bytes written to block devices.
    pub block_written_bytes: Reading,
}

impl Usage {
    pub(super) fn read(cgroup: &Cgroup) -> Self {
        let unified = cgroup.unified.as_deref();
        let controlled = unified.filter(|_| cgroup.layout == Layout::V2);
        let memory = v1::of(&cgroup.v1, "memory");
        let (memory_bytes, memory_limit_bytes) = match (controlled, memory) {
            (Some(unified), _) => memory_v2(unified),
            (_, Some(memory)) => memory_v1(memory),
            _ => (Err("it has no cgroup with the memory controller"), None),
        };
        let pids = controlled.or(v1::of(&cgroup.v1, "pids"));
        let pids = pids.and_then(|directory| files::read_number(directory, "pids.current"));
        let (block_read_bytes, block_written_bytes) = block(controlled);
        Self {
            cpu_ns: cpu(unified, v1::of(&cgroup.v1, "cpuacct")),
            memory_bytes,
            memory_limit_bytes,
            pids: pids.ok_or("it has no cgroup with the pids controller"),
            block_read_bytes,
            block_written_bytes,
        }
    }
}

/// Every v2 cgroup counts CPU time, whether the controller is enabled or not.
fn cpu(unified: Option<&Path>, cpuacct: Option<&Path>) -> Reading {
    let unified = unified.and_then(|unified| files::read_field(unified, "cpu.stat", "usage_usec"));
    let cpuacct = || cpuacct.and_then(|cpuacct| files::read_number(cpuacct, "cpuacct.usage"));
    unified
        .map(|us| us.saturating_mul(1000))
        .or_else(cpuacct)
        .ok_or("it has neither a v2 cgroup nor one with the cpuacct controller")
}

fn memory_v2(unified: &Path) -> (Reading, Option<u64>) {
    let used = files::read_number(unified, "memory.current").map(|used| {
        let cached = files::read_field(unified, "memory.stat", "inactive_file").unwrap_or(0);
        used.saturating_sub(cached)
    });
    // `max` is no number.
    let limit = files::read_number(unified, "memory.max");
    (used.ok_or("it has no cgroup with the memory controller"), limit)
}

fn memory_v1(memory: &Path) -> (Reading, Option<u64>) {
    /// "No limit" is the largest multiple of the page size; nothing near it is one.
    const UNLIMITED: u64 = 1 << 62;
    let used = files::read_number(memory, "memory.usage_in_bytes").map(|used| {
        let cached = files::read_field(memory, "memory.stat", "total_inactive_file").unwrap_or(0);
        used.saturating_sub(cached)
    });
    let limit = files::read_number(memory, "memory.limit_in_bytes").filter(|limit| *limit < UNLIMITED);
    (used.ok_or("its memory cgroup cannot be read"), limit)
}

fn block(unified: Option<&Path>) -> (Reading, Reading) {
    let Some(unified) = unified else {
        // A blkio directory for each container would cost every start.
        let unknown = Err("on cgroup v1 a sandbox has no blkio cgroup");
        return (unknown, unknown);
    };
    match files::read(unified, "io.stat") {
        Ok(text) => {
            let (read, written) = sum_io(&text);
            (Ok(read), Ok(written))
        }
        Err(_) => {
            let unknown = Err("the io controller is not enabled for its cgroup");
            (unknown, unknown)
        }
    }
}

/// Sums lines such as `8:0 rbytes=1 wbytes=2 rios=3 …`, one for each device.
fn sum_io(text: &str) -> (u64, u64) {
    let sum = |key: &str| {
        let fields = text.split_whitespace().filter_map(|field| field.strip_prefix(key)?.strip_prefix('='));
        fields.filter_map(|number| number.parse::<u64>().ok()).fold(0, u64::saturating_add)
    };
    (sum("rbytes"), sum("wbytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_io_adds_up_all_devices() {
        let text = "8:0 rbytes=100 wbytes=7 rios=1 wios=1 dbytes=5 dios=0\n7:3 rbytes=11 wbytes=0 rios=1\n";
        assert_eq!(sum_io(text), (111, 7));
        assert_eq!(sum_io(""), (0, 0));
    }
}
