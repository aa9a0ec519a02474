//! The memory balloon.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use super::{ConfigError, MIN_MEMORY_MIB, VmConfig};

/// The virtio balloon device: memory that the guest gives back to the host while it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Memory in MiB that the guest is asked to give back from the start; what is left to it is at least
    /// [`MIN_MEMORY_MIB`].
    #[serde(default)]
    pub target_mib: u32,
    /// Whether the guest may take memory back rather than kill a process for want of it.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest tells which memory it does not use, so that the host takes it back at once.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// How often the guest is asked for its memory statistics, in seconds; never if there is none.
    #[serde(default)]
    pub statistics_interval_s: Option<NonZeroU32>,
}

impl VmConfig {
    pub(super) fn validate_balloon(&self) -> Result<(), ConfigError> {
        let Some(balloon) = &self.balloon else { return Ok(()) };
        let most = self.memory_mib.saturating_sub(MIN_MEMORY_MIB);
        if balloon.target_mib > most {
            let allowed = format!("0 to {most}, memory_mib less {MIN_MEMORY_MIB}");
            return Err(ConfigError::new("balloon.target_mib", balloon.target_mib, allowed));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validate_of_balloon_leaves_the_guest_its_least_memory() {
        let mut config = VmConfig::new(1, 128, "/vmlinux");
        config.balloon = Some(BalloonConfig { target_mib: 96, ..BalloonConfig::default() });
        assert_eq!(config.validate(), Ok(()));
        config.memory_mib = 127;
        let error = config.validate().unwrap_err().to_string();
        assert_eq!(error, "balloon.target_mib is 96; allowed: 0 to 95, memory_mib less 32");
    }
}
