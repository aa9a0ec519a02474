//! The memory device from the operator's side.

use std::sync::Arc;

use super::blocks::BLOCK_BYTES;
use crate::virtio::config_space::ConfigSpace;

/// Fields of the configuration space (§5.15.4), in bytes where nothing else is said.
mod field {
    pub const BLOCK: usize = 0;
    pub const START: usize = 16;
    pub const REGION: usize = 24;
    pub const USABLE_REGION: usize = 32;
    pub const PLUGGED: usize = 40;
    pub const REQUESTED: usize = 48;
    pub const END: usize = 56;
}

/// How the device fares.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryStatistics {
    /// What the guest may get at most, in MiB.
    pub size_mib: u32,
    /// What it is asked to have plugged, in MiB.
    pub requested_mib: u32,
    /// What it has plugged, in MiB.
    pub plugged_mib: u32,
}

/// Steers the device at run time.
#[derive(Clone)]
pub struct MemoryHandle {
    config: Arc<ConfigSpace>,
}

impl MemoryHandle {
    /// For a device with a region of memory at this guest physical address.
    pub(super) fn new(start: u64, bytes: u64, requested_mib: u32) -> Self {
        let config = Arc::new(ConfigSpace::new(vec![0; field::END], 0..0).with_long_fields());
        for (field, value) in [
            (field::BLOCK, BLOCK_BYTES),
            (field::START, start),
            (field::REGION, bytes),
            (field::USABLE_REGION, bytes),
        ] {
            config.set_quietly(field, &value.to_le_bytes());
        }
        let handle = Self { config };
        handle.set_requested_mib(requested_mib);
        handle
    }

    pub(super) fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn bytes(&self, field: usize) -> u64 {
        u64::from_le_bytes(self.config.field(field))
    }

    /// Asks the guest to have this much plugged, in MiB: a multiple of [`BLOCK_BYTES`], and no more than there is.
    pub fn set_requested_mib(&self, requested_mib: u32) {
        let bytes = (u64::from(requested_mib) << 20).min(self.bytes(field::REGION));
        let whole_blocks = bytes / BLOCK_BYTES * BLOCK_BYTES;
        self.config.set_field(field::REQUESTED, &whole_blocks.to_le_bytes());
    }

    pub(super) fn requested_bytes(&self) -> u64 {
        self.bytes(field::REQUESTED)
    }

    /// The driver learns it from the answer to its request.
    pub(super) fn set_plugged_bytes(&self, bytes: u64) {
        self.config.set_quietly(field::PLUGGED, &bytes.to_le_bytes());
    }

    /// Where it stands.
    pub fn statistics(&self) -> MemoryStatistics {
        let mib = |field| u32::try_from(self.bytes(field) >> 20).unwrap_or(u32::MAX);
        MemoryStatistics {
            size_mib: mib(field::REGION),
            requested_mib: mib(field::REQUESTED),
            plugged_mib: mib(field::PLUGGED),
        }
    }
}
