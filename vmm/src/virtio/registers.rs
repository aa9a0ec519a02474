//! Registers that a driver reads from memory: a page for each device, which its guest may read and not write.
//!
//! ```text
//!   driver reads  ──────────▶ page ◀── what a read returns ── transport, configuration space, interrupt status
//!   driver writes ── exit ──▶ transport
//! ```
//! Transport and device keep the page as reads would have it, so that no read makes a vCPU leave the guest: one such read
//! comes with each interrupt (`InterruptStatus`), and most of a driver's start is reads. Where the host's KVM has no
//! read-only memory, reads come to the transport, and find the same.

use std::sync::{Arc, atomic::AtomicU32};

use vm_memory::{MmapRegion, VolatileMemory, mmap::MmapRegionError};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;

/// Pages of a machine's devices, one after the other.
#[derive(Debug, Clone)]
pub struct RegisterPages {
    mapping: Arc<MmapRegion>,
}

/// One device's.
#[derive(Debug, Clone)]
pub struct RegisterPage {
    pages: RegisterPages,
    start: usize,
}

impl RegisterPages {
    /// Zeros, for so many devices.
    pub fn new(devices: usize) -> Result<Self, MmapRegionError> {
        let bytes = devices.max(1).saturating_mul(PAGE_BYTES);
        Ok(Self { mapping: Arc::new(MmapRegion::new(bytes)?) })
    }

    /// Device `index`'s.
    pub fn page(&self, index: usize) -> RegisterPage {
        RegisterPage { pages: self.clone(), start: index.saturating_mul(PAGE_BYTES) }
    }

    /// First byte of the mapping.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }
}

impl RegisterPage {
    /// The register at `offset`, little-endian as all of virtio; `None` if it is not an aligned one of the page.
    pub fn word(&self, offset: u64) -> Option<&AtomicU32> {
        let offset = usize::try_from(offset).ok().filter(|offset| *offset < PAGE_BYTES)?;
        self.pages.mapping.get_atomic_ref(self.start.checked_add(offset)?).ok()
    }
}
