//! What a running sandbox uses, the same figures under either isolation. A figure that cannot be known says why.

use std::fs;

use cloche_runtime::cgroup::Usage;
use cloche_vmm::control::api::{DeviceStats, MachineStats};
use serde::Serialize;

use crate::{
    record::State,
    request::{Isolation, host_memory_bytes},
    steering::{Activity, Steered, SteeringError},
    trace,
};

/// A figure, or why there is none.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Known<T> {
    /// The figure.
    Value(T),
    /// Why it is not known.
    Unknown(String),
}

impl<T: Copy> Known<T> {
    /// The figure, if it is known.
    pub fn value(&self) -> Option<T> {
        match self {
            Self::Value(value) => Some(*value),
            Self::Unknown(_) => None,
        }
    }
}

impl<T> From<Result<T, &'static str>> for Known<T> {
    fn from(reading: Result<T, &'static str>) -> Self {
        reading.map_or_else(|reason| Self::Unknown(reason.into()), Self::Value)
    }
}

/// One sandbox at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    /// Id of the sandbox.
    pub id: String,
    /// Its name.
    pub name: Option<String>,
    /// The isolation that was asked for.
    pub isolation: Isolation,
    /// What it is seen to do.
    pub status: Activity,
    /// CLOCK_MONOTONIC, in nanoseconds.
    pub at_ns: u64,
    /// CPU time on the host so far, in nanoseconds: of the container, or of the whole VMM process.
    pub cpu_ns: Known<u64>,
    /// Of one host CPU, since the sample before; unknown in the first.
    pub cpu_percent: Known<f64>,
    /// Memory of the host in bytes, without idle file cache: of the container, or of the VM's processes with the guest.
    pub memory_bytes: Known<u64>,
    /// What it may use at most, in bytes: the limit or all of the host's, or the guest's memory.
    pub memory_limit_bytes: Known<u64>,
    /// Bytes received from its network.
    pub net_received_bytes: Known<u64>,
    /// Bytes sent to its network.
    pub net_sent_bytes: Known<u64>,
    /// Bytes read from disks.
    pub block_read_bytes: Known<u64>,
    /// Bytes written to disks.
    pub block_written_bytes: Known<u64>,
    /// Processes and threads in it.
    pub pids: Known<u64>,
    /// All that a VM tells of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm: Option<MachineStats>,
}

impl Sample {
    /// Measures a sandbox; `before` is its previous sample.
    pub fn take(sandbox: &Steered, before: Option<&Self>) -> Result<Self, SteeringError> {
        let record = &sandbox.record;
        let mut sample = if record.isolation == Isolation::Vm {
            Self::of_vm(sandbox, sandbox.machine_stats()?)
        } else {
            Self::of_container(sandbox, sandbox.measured_cgroup()?.usage())
        };
        sample.cpu_percent = match (before.map(|before| (before, before.cpu_ns.value())), &sample.cpu_ns) {
            (_, Known::Unknown(reason)) => Known::Unknown(reason.clone()),
            (Some((before, Some(used_before))), Known::Value(used)) if sample.at_ns > before.at_ns => {
                let used = used.saturating_sub(used_before) as f64;
                Known::Value(100.0 * used / (sample.at_ns - before.at_ns) as f64)
            }
            _ => Known::Unknown("it takes two samples".into()),
        };
        Ok(sample)
    }

    fn of_container(sandbox: &Steered, usage: Usage) -> Self {
        let record = &sandbox.record;
        let network = match &record.state {
            State::Running(processes) => network_of(processes.leader.pid),
            _ => Err("it is not running"),
        };
        Self {
            id: record.id.clone(),
            name: record.name.clone(),
            isolation: record.isolation,
            status: sandbox.activity(),
            at_ns: trace::now_ns(),
            cpu_ns: usage.cpu_ns.into(),
            cpu_percent: Known::Unknown(String::new()),
            memory_bytes: usage.memory_bytes.into(),
            memory_limit_bytes: Known::Value(usage.memory_limit_bytes.unwrap_or_else(host_memory_bytes)),
            net_received_bytes: network.map(|(received, _)| received).into(),
            net_sent_bytes: network.map(|(_, sent)| sent).into(),
            block_read_bytes: usage.block_read_bytes.into(),
            block_written_bytes: usage.block_written_bytes.into(),
            pids: usage.pids.into(),
            vm: None,
        }
    }

    fn of_vm(sandbox: &Steered, stats: MachineStats) -> Self {
        let record = &sandbox.record;
        let resident = || match &record.state {
            State::Running(processes) => resident_bytes(processes.leader.pid).ok_or("its VMM has ended"),
            _ => Err("it is not running"),
        };
        // Without a cgroup of its own, the VMM's share of it is all that can be told.
        let memory = sandbox.measured_cgroup().ok().and_then(|cgroup| cgroup.usage().memory_bytes.ok());
        let status = sandbox.activity();
        let pids = match status {
            Activity::Paused => Err("only the guest's own kernel knows, and it is paused".to_owned()),
            _ => sandbox.guest_status().and_then(|status| {
                status.pids.ok_or_else(|| "the guest's kernel does not count them".to_owned())
            }),
        };
        let pids = pids.map_or_else(Known::Unknown, Known::Value);
        let (received, sent) = network_of_vm(&stats.devices);
        let (read, written) = blocks_of_vm(&stats.devices);
        Self {
            id: record.id.clone(),
            name: record.name.clone(),
            isolation: record.isolation,
            status,
            at_ns: trace::now_ns(),
            cpu_ns: Known::Value(stats.cpu_ns),
            cpu_percent: Known::Unknown(String::new()),
            memory_bytes: memory.map_or_else(resident, Ok).into(),
            memory_limit_bytes: Known::Value(stats.memory.size_bytes),
            net_received_bytes: Known::Value(received),
            net_sent_bytes: Known::Value(sent),
            block_read_bytes: Known::Value(read),
            block_written_bytes: Known::Value(written),
            pids,
            vm: Some(stats),
        }
    }
}

/// Bytes received and sent on all interfaces but `lo` in the network namespace of a process (proc(5), `net/dev`).
fn network_of(pid: i32) -> Result<(u64, u64), &'static str> {
    let text =
        fs::read_to_string(format!("/proc/{pid}/net/dev")).map_err(|_| "its first process has ended")?;
    Ok(sum_interfaces(&text))
}

fn sum_interfaces(text: &str) -> (u64, u64) {
    let interfaces = text.lines().skip(2).filter_map(|line| line.split_once(':'));
    let others = interfaces.filter(|(name, _)| name.trim() != "lo");
    others.fold((0, 0), |(received, sent), (_, numbers)| {
        let mut numbers = numbers.split_whitespace().map(|number| number.parse().unwrap_or(0u64));
        let (its_received, its_sent) = (numbers.next().unwrap_or(0), numbers.nth(7).unwrap_or(0));
        (received.saturating_add(its_received), sent.saturating_add(its_sent))
    })
}

/// Bytes of frames without the header that the devices put before each (virtio 1.2 §5.1.6: 12 bytes).
fn network_of_vm(devices: &[DeviceStats]) -> (u64, u64) {
    const HEADER_BYTES: u64 = 12;
    let queues = devices.iter().filter(|device| device.device == "net").map(|device| &device.queues);
    queues.fold((0, 0), |(received, sent), queues| {
        let get = |index: usize| queues.get(index).copied().unwrap_or_default();
        let (rx, tx) = (get(0), get(1));
        let its_received = rx.bytes_to_guest.saturating_sub(HEADER_BYTES * rx.chains);
        let its_sent = tx.bytes_from_guest.saturating_sub(HEADER_BYTES * tx.chains);
        (received + its_received, sent + its_sent)
    })
}

/// Bytes of data without each request's header and status (virtio 1.2 §5.2.6: 16 bytes and 1).
fn blocks_of_vm(devices: &[DeviceStats]) -> (u64, u64) {
    let queues = devices.iter().filter(|device| device.device == "block").flat_map(|device| &device.queues);
    queues.fold((0, 0), |(read, written), queue| {
        let its_read = queue.bytes_to_guest.saturating_sub(queue.chains);
        let its_written = queue.bytes_from_guest.saturating_sub(16 * queue.chains);
        (read + its_read, written + its_written)
    })
}

/// Resident memory of a process (proc(5), `statm` field 2).
fn resident_bytes(pid: i32) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    /// Of x86-64.
    const PAGE_BYTES: u64 = 4096;
    Some(pages * PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use cloche_vmm::control::api::QueueStats;

    use super::*;

    #[test]
    fn sum_interfaces_leaves_out_loopback() {
        let text = "Inter-|   Receive                            |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets\n    \
                    lo:  500       5    0    0    0     0          0         0      500       5    0\n  \
                    eth0: 1000      10    0    0    0     0          0         0     2000      20    0\n  \
                    eth1:1      1    0    0    0     0          0         0     2      1    0\n";
        assert_eq!(sum_interfaces(text), (1001, 2002));
        assert_eq!(sum_interfaces(""), (0, 0));
    }

    #[test]
    fn bytes_of_a_vms_devices_are_those_of_data() {
        let queue = |chains, bytes_from_guest, bytes_to_guest| QueueStats {
            chains,
            descriptors: 3 * chains,
            bytes_from_guest,
            bytes_to_guest,
        };
        let device =
            |device: &str, queues| DeviceStats { device: device.into(), queues, ..Default::default() };
        let devices = [
            device("block", vec![queue(2, 2 * 16 + 512, 2 + 4096)]),
            device("net", vec![queue(1, 0, 112), queue(2, 24 + 60, 0)]),
            device("rng", vec![queue(1, 0, 64)]),
        ];
        assert_eq!(blocks_of_vm(&devices), (4096, 512));
        assert_eq!(network_of_vm(&devices), (100, 60));
    }
}
