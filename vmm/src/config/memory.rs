//! Memory beyond what the guest has from the start.

use serde::{Deserialize, Serialize};

use super::{ConfigError, VmConfig};

/// Unit of [`MemoryDeviceConfig::size_mib`]: in such chunks the guest gets to reach memory.
pub const MEMORY_CHUNK_MIB: u32 = 128;
/// Unit of what the guest can be asked to have of it.
pub const MEMORY_BLOCK_MIB: u32 = 4;
/// Each chunk takes a slot of KVM's, of which there are some 32,000.
const MAX_SIZE_MIB: u32 = 512 << 10;

/// The virtio memory device: memory that is added while the guest runs, and given back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryDeviceConfig {
    /// Memory in MiB that the guest can have at most besides `memory_mib`, a multiple of [`MEMORY_CHUNK_MIB`]. It takes
    /// none of the host's until the guest uses it.
    pub size_mib: u32,
    /// Memory in MiB of it that the guest is asked to take from the start, a multiple of [`MEMORY_BLOCK_MIB`].
    #[serde(default)]
    pub requested_mib: u32,
}

impl VmConfig {
    /// Memory in bytes that the guest can have at most.
    pub fn most_memory_bytes(&self) -> u64 {
        let more = self.memory_device.as_ref().map_or(0, |device| u64::from(device.size_mib) << 20);
        self.memory_bytes() + more
    }

    pub(super) fn validate_memory_device(&self) -> Result<(), ConfigError> {
        let Some(MemoryDeviceConfig { size_mib, requested_mib }) = self.memory_device else { return Ok(()) };
        if !(MEMORY_CHUNK_MIB..=MAX_SIZE_MIB).contains(&size_mib)
            || !size_mib.is_multiple_of(MEMORY_CHUNK_MIB)
        {
            let allowed = format!("multiples of {MEMORY_CHUNK_MIB} up to {MAX_SIZE_MIB}");
            return Err(ConfigError::new("memory_device.size_mib", size_mib, allowed));
        }
        if requested_mib > size_mib || !requested_mib.is_multiple_of(MEMORY_BLOCK_MIB) {
            let allowed = format!("0 to {size_mib}, its size_mib, in steps of {MEMORY_BLOCK_MIB}");
            return Err(ConfigError::new("memory_device.requested_mib", requested_mib, allowed));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validate_of_memory_device_wants_whole_chunks_and_blocks() {
        let check = |size_mib, requested_mib| {
            let mut config = VmConfig::new(1, 128, "/vmlinux");
            config.memory_device = Some(MemoryDeviceConfig { size_mib, requested_mib });
            config.validate().map_err(|error| error.to_string())
        };
        assert_eq!(check(256, 256), Ok(()));
        assert_eq!(check(128, 4), Ok(()));
        for size_mib in [0, 64, 192, (512 << 10) + 128, u32::MAX] {
            assert!(check(size_mib, 0).unwrap_err().starts_with("memory_device.size_mib is"), "{size_mib}");
        }
        for requested_mib in [1, 130, 132, u32::MAX] {
            let error = check(128, requested_mib).unwrap_err();
            assert!(error.ends_with("allowed: 0 to 128, its size_mib, in steps of 4"), "{error}");
        }
    }
}
