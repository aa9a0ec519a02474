//! Persistent memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, MAX_DISKS, VmConfig};

/// Persistent memory devices that a VM can have at most.
pub const MAX_PMEMS: usize = 8;

/// One virtio persistent memory device: a file that the guest finds in its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// A regular file. One that the guest may write has 16 MiB or a larger multiple of 2 MiB, and no holes. One that it
    /// may only read is followed by zeros up to that.
    pub path: PathBuf,
    /// Whether the guest is kept from writing. The file is then opened read-only too.
    #[serde(default)]
    pub read_only: bool,
}

impl VmConfig {
    pub(super) fn validate_pmems(&self) -> Result<(), ConfigError> {
        let most = MAX_PMEMS.min(MAX_DISKS.saturating_sub(self.disks.len()));
        if self.pmems.len() > most {
            let allowed = format!("at most {MAX_PMEMS}, and {MAX_DISKS} with all disks");
            return Err(ConfigError::new("pmems", self.pmems.len(), allowed));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validate_of_pmems_bounds_their_number() {
        let mut config = VmConfig::new(1, 128, "/vmlinux");
        let pmem = PmemConfig { path: "/p".into(), read_only: true };
        config.pmems = vec![pmem.clone(); MAX_PMEMS];
        assert_eq!(config.validate(), Ok(()));
        config.pmems.push(pmem);
        assert_eq!(
            config.validate().unwrap_err().to_string(),
            "pmems is 9; allowed: at most 8, and 40 with all disks"
        );
    }
}
