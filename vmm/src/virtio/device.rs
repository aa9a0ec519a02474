//! What a virtio device is to the transport ([`Identity`]) and to the event loop ([`Device`]).

use std::{
    io,
    os::fd::RawFd,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use tracing::warn;

use super::{
    config_space::ConfigSpace,
    mmio::register,
    queue::{QueueError, VirtQueue},
    registers::RegisterPage,
};
use crate::{devices::Interrupt, guest_memory::GuestMemory};

/// Device types (virtio 1.2 §5).
pub mod device_type {
    /// Network device.
    pub const NETWORK: u32 = 1;
    /// Block device.
    pub const BLOCK: u32 = 2;
    /// Console device.
    pub const CONSOLE: u32 = 3;
    /// Entropy device.
    pub const ENTROPY: u32 = 4;
    /// Traditional memory balloon device.
    pub const BALLOON: u32 = 5;
    /// Socket device.
    pub const SOCKET: u32 = 19;
    /// Memory device.
    pub const MEMORY: u32 = 24;
    /// File system device.
    pub const FILE_SYSTEM: u32 = 26;
    /// Persistent memory device.
    pub const PMEM: u32 = 27;

    /// What a type is called.
    pub fn name(device_type: u32) -> &'static str {
        match device_type {
            NETWORK => "net",
            BLOCK => "block",
            CONSOLE => "console",
            ENTROPY => "rng",
            BALLOON => "balloon",
            9 => "9p",
            SOCKET => "vsock",
            MEMORY => "mem",
            FILE_SYSTEM => "fs",
            PMEM => "pmem",
            _ => "other",
        }
    }
}

/// What never changes about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// One of [`device_type`].
    pub device_type: u32,
    /// Feature bits of this kind of device; the transport adds those of all devices.
    pub features: u64,
    /// Largest size of each queue; powers of two.
    pub queue_sizes: &'static [u16],
    /// How many of the queues, counted from the end, a driver may leave out: those of features that it does not accept.
    pub optional_queues: usize,
    /// The device configuration space as it is at first.
    pub config: Vec<u8>,
}

/// What a file descriptor is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// Reading yields data, end of file or an error.
    pub readable: bool,
    /// Writing is possible, or yields an error.
    pub writable: bool,
}

/// Where a device registers its file descriptors.
pub trait Poller {
    /// Watches `fd` for both directions, edge-triggered: it is reported when it becomes ready, not while it is.
    fn add(&mut self, fd: RawFd) -> io::Result<()>;
    /// Stops watching. Must be called before `fd` is closed.
    fn remove(&mut self, fd: RawFd);
}

/// What a running device works with.
pub struct Running<'a> {
    /// Its queues, without those that the driver left out.
    pub queues: &'a mut [VirtQueue],
    /// The feature bits that the driver accepted.
    pub features: u64,
    /// Where their buffers are.
    pub memory: &'a GuestMemory,
    /// Its event loop.
    pub poller: &'a mut dyn Poller,
}

impl Running<'_> {
    /// Queue `index`; `None` only if the device asks for one that its identity does not have.
    pub fn queue(&mut self, index: usize) -> Option<&mut VirtQueue> {
        self.queues.get_mut(index)
    }
}

/// Whether a device has handled all there was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Until the next doorbell or readiness there is nothing to do.
    Done,
    /// There is more, but other devices must have their turn: a driver that is as fast as its device would otherwise
    /// keep the event loop for ever.
    More,
}

/// What a device does on the event loop's thread. An error fails the device until its driver resets it.
pub trait Device: Send {
    /// What the transport shows to the driver.
    fn identity(&self) -> Identity;

    /// The space that the transport shows, where it changes at run time or the driver writes to it. `None`: it is
    /// [`Identity::config`] for ever.
    fn config_space(&self) -> Option<Arc<ConfigSpace>> {
        None
    }

    /// The driver is ready (DRIVER_OK). Buffers may have come before.
    fn start(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.queues_ready(running)
    }

    /// The driver rang: any of the queues may have new buffers.
    fn queues_ready(&mut self, running: &mut Running) -> Result<Progress, QueueError>;

    /// A file descriptor that the device added to its poller is ready.
    fn fd_ready(
        &mut self,
        _fd: RawFd,
        _ready: Readiness,
        _running: &mut Running,
    ) -> Result<Progress, QueueError> {
        Ok(Progress::Done)
    }

    /// Where the device registers file descriptors that are its own from its first day, whatever its driver does.
    fn watch(&mut self, _poller: &mut dyn Poller) -> io::Result<()> {
        Ok(())
    }

    /// As [`Device::fd_ready`], for what the device still watches after [`Device::stop`].
    fn fd_ready_while_stopped(&mut self, _fd: RawFd, _ready: Readiness, _poller: &mut dyn Poller) {}

    /// Whether the device, after [`Device::stop`], touches nothing of its driver's any more. Until then its driver's
    /// reset waits, and the device has something in [`Device::watch`] that tells of the change.
    fn is_idle(&self) -> bool {
        true
    }

    /// The queues are gone: forget everything that belongs to this driver.
    fn stop(&mut self, _poller: &mut dyn Poller) {}
}

/// DEVICE_NEEDS_RESET of a device's status (virtio 1.2 §2.1).
pub const DEVICE_NEEDS_RESET: u32 = 64;

/// A device's interrupt with the status that its driver reads (virtio 1.2 §4.2.2: `InterruptStatus`).
pub struct InterruptStatus {
    pending: AtomicU32,
    needs_reset: AtomicBool,
    /// Whether the driver is ready to be told of a changed configuration.
    live: AtomicBool,
    line: Box<dyn Interrupt>,
    /// Where the driver reads the status, if it reads it from memory.
    page: OnceLock<RegisterPage>,
    sent: AtomicU64,
    failures: AtomicU64,
}

impl InterruptStatus {
    const USED_BUFFER: u32 = 1;
    const CONFIGURATION_CHANGE: u32 = 2;

    /// With nothing pending.
    pub fn new(line: Box<dyn Interrupt>) -> Self {
        let (needs_reset, live) = (AtomicBool::new(false), AtomicBool::new(false));
        let (sent, failures) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { pending: AtomicU32::new(0), needs_reset, live, line, page: OnceLock::new(), sent, failures }
    }

    /// From now on, the driver reads the status from memory. Nothing must be pending yet; only the first call counts.
    pub fn show_in(&self, page: RegisterPage) {
        let _ = self.page.set(page);
    }

    /// What the driver reads as `InterruptStatus`.
    fn status(&self) -> &AtomicU32 {
        let shown = self.page.get().and_then(|page| page.word(register::INTERRUPT_STATUS));
        shown.unwrap_or(&self.pending)
    }

    /// Has the driver's next read of the device's status say whether the device gave up.
    fn show_needs_reset(&self, needs_reset: bool) {
        if let Some(status) = self.page.get().and_then(|page| page.word(register::STATUS)) {
            if needs_reset {
                status.fetch_or(DEVICE_NEEDS_RESET, Ordering::Release);
            } else {
                status.fetch_and(!DEVICE_NEEDS_RESET, Ordering::Release);
            }
        }
    }

    /// The driver has set DRIVER_OK.
    pub fn set_live(&self) {
        self.live.store(true, Ordering::Release);
    }

    /// Tells the driver, if it is there, to read the configuration space again (virtio 1.2 §2.5).
    pub fn signal_configuration_change(&self) {
        if self.live.load(Ordering::Acquire)
            && let Err(error) = self.signal(Self::CONFIGURATION_CHANGE)
        {
            warn!(%error, "a virtio interrupt was lost");
        }
    }

    /// Tells the driver that buffers came back.
    pub fn signal_used(&self) -> io::Result<()> {
        self.signal(Self::USED_BUFFER)
    }

    /// Tells the driver that the device gave up (virtio 1.2 §2.1.2: DEVICE_NEEDS_RESET).
    pub fn signal_needs_reset(&self) -> io::Result<()> {
        self.needs_reset.store(true, Ordering::Release);
        self.show_needs_reset(true);
        self.failures.fetch_add(1, Ordering::Relaxed);
        self.signal(Self::CONFIGURATION_CHANGE)
    }

    fn signal(&self, cause: u32) -> io::Result<()> {
        self.status().fetch_or(cause, Ordering::Release);
        self.sent.fetch_add(1, Ordering::Relaxed);
        self.line.trigger()
    }

    /// How often the driver was interrupted.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// How often the device gave up.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// The register that the driver reads.
    pub fn pending(&self) -> u32 {
        self.status().load(Ordering::Acquire)
    }

    /// The driver has handled these.
    pub fn acknowledge(&self, handled: u32) {
        self.status().fetch_and(!handled, Ordering::AcqRel);
    }

    /// Whether the device gave up.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The driver has reset the device.
    pub fn clear(&self) {
        self.live.store(false, Ordering::Release);
        self.status().store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
        self.show_needs_reset(false);
    }
}
