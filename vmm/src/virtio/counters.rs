//! What a device counts for `stats`: written by the thread that works on its queues, read by any.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use super::device::{InterruptStatus, device_type};
use crate::control::api::{DeviceStats, QueueStats};

/// One queue's. They go on over resets of the device.
#[derive(Debug, Default)]
pub struct QueueCounters {
    chains: AtomicU64,
    descriptors: AtomicU64,
    bytes_from_guest: AtomicU64,
    bytes_to_guest: AtomicU64,
}

impl QueueCounters {
    /// A chain was taken.
    pub fn taken(&self, descriptors: u64, readable_bytes: u64) {
        add(&self.chains, 1);
        add(&self.descriptors, descriptors);
        add(&self.bytes_from_guest, readable_bytes);
    }

    /// It was put back.
    pub fn untaken(&self, descriptors: u64, readable_bytes: u64) {
        add(&self.chains, 1u64.wrapping_neg());
        add(&self.descriptors, descriptors.wrapping_neg());
        add(&self.bytes_from_guest, readable_bytes.wrapping_neg());
    }

    /// A chain was returned with so many bytes in it.
    pub fn returned(&self, bytes: u64) {
        add(&self.bytes_to_guest, bytes);
    }

    fn snapshot(&self) -> QueueStats {
        QueueStats {
            chains: self.chains.load(Ordering::Relaxed),
            descriptors: self.descriptors.load(Ordering::Relaxed),
            bytes_from_guest: self.bytes_from_guest.load(Ordering::Relaxed),
            bytes_to_guest: self.bytes_to_guest.load(Ordering::Relaxed),
        }
    }
}

/// One thread writes at a time: no locked instruction is needed.
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

/// One device's.
pub struct DeviceCounters {
    device_type: u32,
    interrupt: Arc<InterruptStatus>,
    queues: Vec<Arc<QueueCounters>>,
}

impl DeviceCounters {
    /// For a device of this type with so many queues.
    pub fn new(device_type: u32, queues: usize, interrupt: Arc<InterruptStatus>) -> Self {
        Self { device_type, interrupt, queues: (0..queues).map(|_| Arc::default()).collect() }
    }

    /// Queue `index`'s; one that nobody reads if the device has no such queue.
    pub fn queue(&self, index: usize) -> Arc<QueueCounters> {
        self.queues.get(index).cloned().unwrap_or_default()
    }

    /// What the device is called.
    pub fn name(&self) -> &'static str {
        device_type::name(self.device_type)
    }

    /// All of it, now.
    pub fn snapshot(&self) -> DeviceStats {
        DeviceStats {
            device: self.name().to_owned(),
            interrupts: self.interrupt.sent(),
            failures: self.interrupt.failures(),
            queues: self.queues.iter().map(|queue| queue.snapshot()).collect(),
        }
    }
}
