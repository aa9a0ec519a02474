//! The balloon from the operator's side.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::virtio::config_space::ConfigSpace;

/// Fields of the configuration space (§5.5.4): the target and what the driver says it has given, in pages of 4 KiB.
pub(super) const TARGET: usize = 0;
pub(super) const ACTUAL: usize = 4;
pub(super) const CONFIG_BYTES: usize = 8;

const PAGES_PER_MIB: u32 = 256;

/// Names of statistics by their tags (§5.5.6.4).
const TAGS: [&str; 10] = [
    "swap-in-bytes",
    "swap-out-bytes",
    "major-faults",
    "minor-faults",
    "free-bytes",
    "total-bytes",
    "available-bytes",
    "disk-caches-bytes",
    "hugetlb-allocations",
    "hugetlb-failures",
];

/// How the balloon and the guest's memory fare.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BalloonStatistics {
    /// What the guest is asked to give back, in MiB.
    pub target_mib: u32,
    /// What it has given back, in MiB, as it says.
    pub actual_mib: u32,
    /// What the guest tells of its memory, by name. Empty until it has told something.
    pub guest: BTreeMap<&'static str, u64>,
}

/// Steers a balloon at run time.
#[derive(Clone)]
pub struct BalloonHandle {
    config: Arc<ConfigSpace>,
    guest: Arc<Mutex<BTreeMap<&'static str, u64>>>,
    most_mib: u32,
}

impl BalloonHandle {
    /// For a new device, whose target may become `most_mib` at most.
    pub(super) fn new(target_mib: u32, most_mib: u32) -> Self {
        let config = Arc::new(ConfigSpace::new(vec![0; CONFIG_BYTES], ACTUAL..ACTUAL + 4));
        let handle = Self { config, guest: Arc::default(), most_mib };
        handle.set_target_mib(target_mib);
        handle
    }

    pub(super) fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    /// The largest target.
    pub fn most_mib(&self) -> u32 {
        self.most_mib
    }

    /// Asks the guest to have given back this much memory, in MiB; more than [`BalloonHandle::most_mib`] counts as
    /// that.
    pub fn set_target_mib(&self, target_mib: u32) {
        let pages = target_mib.min(self.most_mib).saturating_mul(PAGES_PER_MIB);
        self.config.set_field(TARGET, &pages.to_le_bytes());
    }

    /// Where it stands.
    pub fn statistics(&self) -> BalloonStatistics {
        let mib = |field| u32::from_le_bytes(self.config.field(field)) / PAGES_PER_MIB;
        BalloonStatistics { target_mib: mib(TARGET), actual_mib: mib(ACTUAL), guest: self.guest().clone() }
    }

    /// The driver has told this of its memory; tags that nobody knows are left out.
    pub(super) fn guest_tells(&self, entries: impl Iterator<Item = (u16, u64)>) {
        let mut guest = self.guest();
        for (tag, value) in entries {
            if let Some(name) = TAGS.get(usize::from(tag)) {
                guest.insert(name, value);
            }
        }
    }

    /// The driver is gone, and with it what it had given.
    pub(super) fn driver_gone(&self) {
        self.config.set_quietly(ACTUAL, &[0; 4]);
        self.guest().clear();
    }

    fn guest(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
