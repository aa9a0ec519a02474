//! The MMIO transport's registers (virtio 1.2 §4.2.2) and the negotiation that they carry (§3.1.1).
//!
//! ```text
//!  0 ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ FEATURES_OK ─▶ DRIVER_OK          any ─▶ FAILED      any ─ write 0 ─▶ 0
//!                      features   queues         device runs
//! ```
//! A write out of this order sets DEVICE_NEEDS_RESET; the device then does nothing until it is reset.

use std::sync::atomic::Ordering;

use tracing::warn;

use super::{
    device::InterruptStatus,
    queue::QueueSetup,
    registers::RegisterPage,
    worker::{MAX_LOGGED_FAILURES, WorkerHandle},
};

/// Offset of the register that a driver writes to ring; the machine gives it an eventfd.
pub const QUEUE_NOTIFY: u64 = 0x050;

/// Register offsets (virtio 1.2 table 4.1).
pub mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Device status bits (virtio 1.2 §2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub use crate::virtio::device::DEVICE_NEEDS_RESET;
    pub const FAILED: u32 = 128;
}

/// Features that this implementation of queues and transport has, whatever the device (virtio 1.2 §6).
mod feature {
    pub use crate::virtio::queue::FEATURE_EVENT_IDX as EVENT_IDX;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Registers that read as something, but for those that others keep.
const SHOWN: &[u64] = &[
    register::MAGIC,
    register::VERSION,
    register::DEVICE_ID,
    register::VENDOR_ID,
    register::DEVICE_FEATURES,
    register::QUEUE_SIZE_MAX,
    register::QUEUE_READY,
    register::SHM_LEN_LOW,
    register::SHM_LEN_LOW + 4,
    register::SHM_LEN_LOW + 8,
    register::SHM_BASE_HIGH,
];

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"CLCH");

/// A queue's registers.
#[derive(Debug, Clone, Copy, Default)]
struct QueueRegisters {
    setup: QueueSetup,
    ready: bool,
}

/// A device's registers.
pub struct MmioTransport {
    worker: WorkerHandle,
    status: u32,
    offered: u64,
    accepted: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    violations: u32,
    /// Where the driver reads, if it reads from memory.
    page: Option<RegisterPage>,
}

impl MmioTransport {
    /// The registers of a device after power-on.
    pub fn new(worker: WorkerHandle) -> Self {
        let offered =
            worker.identity().features | feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
        let queues = vec![QueueRegisters::default(); worker.identity().queue_sizes.len()];
        Self {
            worker,
            status: 0,
            offered,
            accepted: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues,
            violations: 0,
            page: None,
        }
    }

    /// Whether the driver may read its registers from memory.
    pub fn can_be_shown(&self) -> bool {
        !self.worker.config().is_read_whole()
    }

    /// Keeps `page` as the driver is to read it. Only the first call counts.
    pub fn show_in(&mut self, page: RegisterPage) {
        self.interrupt().show_in(page.clone());
        self.worker.config().show_in(page.clone());
        self.page = Some(page);
        self.show();
    }

    /// Writes what reads return, but for what others keep: the interrupt's status, whether the device needs a reset, and
    /// the configuration space.
    fn show(&self) {
        let Some(page) = &self.page else { return };
        for offset in SHOWN {
            if let Some(word) = page.word(*offset) {
                word.store(self.read_register(*offset), Ordering::Release);
            }
        }
        if let Some(word) = page.word(register::STATUS) {
            // It never fails.
            let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |shown| {
                Some(shown & status::DEVICE_NEEDS_RESET | self.status)
            });
        }
    }

    fn interrupt(&self) -> &InterruptStatus {
        self.worker.interrupt()
    }

    /// The driver reads `data.len()` bytes at `offset`. What is not there reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(config_offset) = offset.checked_sub(register::CONFIG) {
            self.worker.config().read(config_offset, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            // §4.2.2.2: registers are accessed by aligned 32-bit reads and writes.
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.worker.identity().device_type,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.offered, self.device_features_select),
            register::QUEUE_SIZE_MAX => self.queue_size_max().into(),
            register::QUEUE_READY => self.selected().is_some_and(|queue| queue.ready).into(),
            register::INTERRUPT_STATUS => self.interrupt().pending(),
            register::STATUS => self.status(),
            // There are no shared memory regions: length and base read as all ones (§4.2.2.1).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.worker.config().generation(),
            _ => 0,
        }
    }

    fn status(&self) -> u32 {
        let needs_reset = if self.interrupt().needs_reset() { status::DEVICE_NEEDS_RESET } else { 0 };
        self.status | needs_reset
    }

    /// The driver writes `data` at `offset`. What is not there is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(config_offset) = offset.checked_sub(register::CONFIG) {
            // §4.2.2.2: not before the driver has been recognised.
            if self.status & status::DRIVER != 0 {
                self.worker.config().driver_write(config_offset, data);
            }
            return;
        }
        let Ok(word) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(word);
        match offset {
            // These change nothing else that is shown.
            register::INTERRUPT_ACK => return self.interrupt().acknowledge(value),
            QUEUE_NOTIFY => return self.worker.ring(),
            register::DEVICE_FEATURES_SELECT => self.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            register::QUEUE_SELECT => self.queue_select = value,
            register::STATUS => self.write_status(value),
            register::DRIVER_FEATURES => self.write_features(value),
            register::QUEUE_READY if value == 0 && self.status & status::DRIVER_OK == 0 => {
                // Also part of tearing down after a reset.
                if let Some(queue) = self.selected_mut() {
                    queue.ready = false;
                }
            }
            register::QUEUE_SIZE..=register::QUEUE_READY
            | register::QUEUE_DESC_LOW..=register::QUEUE_DEVICE_HIGH => self.write_queue(offset, value),
            _ => {}
        }
        self.show();
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let steps = [
            status::ACKNOWLEDGE,
            status::ACKNOWLEDGE | status::DRIVER,
            status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK,
            status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK,
        ];
        let progress = value & !(status::FAILED | status::DEVICE_NEEDS_RESET);
        let current = self.status & !status::FAILED;
        let position = |bits: u32| steps.iter().position(|step| *step == bits);
        let legal = match (position(current), position(progress)) {
            // §2.1.1: the driver must not clear a bit, and §3.1.1 gives the order.
            (None, Some(0)) => current == 0,
            (Some(from), Some(to)) => to == from || to == from + 1,
            // FAILED may come at any time, even first.
            (_, None) => progress == current && value & status::FAILED != 0,
            (None, Some(_)) => false,
        };
        if !legal {
            self.violation("a step of its status out of order (virtio 1.2 §3.1.1)");
            return;
        }
        self.status |= value & status::FAILED;
        if progress == current || self.interrupt().needs_reset() {
            return;
        }
        let gained = progress & !current;
        if gained == status::FEATURES_OK && !self.features_acceptable() {
            // §2.2.2: the device refuses by leaving FEATURES_OK off, and the driver reads it back.
            return;
        }
        if gained == status::DRIVER_OK {
            let Some(setups) = self.ready_queues() else {
                self.violation("DRIVER_OK before its queues are ready (virtio 1.2 §3.1.1)");
                return;
            };
            self.interrupt().set_live();
            self.worker.start(setups, self.accepted);
        }
        self.status |= gained;
    }

    /// The queues that the driver set up: all, but for optional ones at the end. `None` if one is missing.
    fn ready_queues(&self) -> Option<Vec<QueueSetup>> {
        let ready: Vec<_> =
            self.queues.iter().take_while(|queue| queue.ready).map(|queue| queue.setup).collect();
        let complete = ready.len() + self.worker.identity().optional_queues >= self.queues.len()
            && self.queues.iter().skip(ready.len()).all(|queue| !queue.ready);
        complete.then_some(ready)
    }

    fn features_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & feature::VERSION_1 != 0
    }

    fn write_features(&mut self, value: u32) {
        // §3.1.1: between DRIVER and FEATURES_OK.
        if self.status & (status::DRIVER | status::FEATURES_OK) != status::DRIVER {
            self.violation("features at the wrong time (virtio 1.2 §3.1.1)");
            return;
        }
        self.accepted = match self.driver_features_select {
            0 => (self.accepted & !0xffff_ffff) | u64::from(value),
            1 => (self.accepted & 0xffff_ffff) | (u64::from(value) << 32),
            // There are no feature bits beyond 63, so that accepting one is accepting what was not offered.
            _ if value != 0 => return self.violation("features that were not offered (virtio 1.2 §2.2)"),
            _ => self.accepted,
        };
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        // §3.1.1: between FEATURES_OK and DRIVER_OK; §4.2.2.2: not while the queue is ready.
        let negotiated = self.status & (status::FEATURES_OK | status::DRIVER_OK) == status::FEATURES_OK;
        if !negotiated || self.interrupt().needs_reset() {
            self.violation("a queue's registers at the wrong time (virtio 1.2 §3.1.1)");
            return;
        }
        let size_max = u32::from(self.queue_size_max());
        let Some(queue) = self.selected_mut().filter(|queue| !queue.ready) else {
            self.violation("registers of no queue, or of one that is ready (virtio 1.2 §4.2.2.2)");
            return;
        };
        let setup = &mut queue.setup;
        match offset {
            register::QUEUE_SIZE if value.is_power_of_two() && value <= size_max => setup.size = value as u16,
            register::QUEUE_SIZE => self.violation("an impossible queue size (virtio 1.2 §2.7)"),
            register::QUEUE_READY => queue.ready = value == 1,
            register::QUEUE_DESC_LOW => set_low(&mut setup.descriptors, value),
            register::QUEUE_DESC_HIGH => set_high(&mut setup.descriptors, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut setup.available, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut setup.available, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut setup.used, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut setup.used, value),
            _ => {}
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_select as usize)
    }

    fn selected_mut(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(self.queue_select as usize)
    }

    fn queue_size_max(&self) -> u16 {
        self.worker.identity().queue_sizes.get(self.queue_select as usize).copied().unwrap_or(0)
    }

    /// The driver did `what` it must not do.
    fn violation(&mut self, what: &'static str) {
        if !self.interrupt().needs_reset() {
            self.violations = self.violations.saturating_add(1);
            if self.violations <= MAX_LOGGED_FAILURES {
                let device_type = self.worker.identity().device_type;
                warn!(device_type, what, "the guest's driver broke a virtio device's protocol");
            }
            if self.status & status::DRIVER_OK != 0 {
                self.worker.stop();
            }
            let _ = self.interrupt().signal_needs_reset();
        }
    }

    fn reset(&mut self) {
        if self.status & status::DRIVER_OK != 0 {
            self.worker.stop();
        }
        self.interrupt().clear();
        self.status = 0;
        self.accepted = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.queues.fill(QueueRegisters::default());
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !0xffff_ffff) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff) | (u64::from(value) << 32);
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        thread::{self, JoinHandle},
        time::{Duration, Instant},
    };

    use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
    use proptest::prelude::*;

    use super::*;
    use crate::config::BalloonConfig;
    use crate::virtio::{
        balloon::{Balloon, BalloonHandle},
        device::{Device, device_type},
        driver_model::{CountingLine, Driver, Part, memory},
        registers::RegisterPages,
        rng::Rng,
        worker::Worker,
    };

    const ALL_OK: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;

    /// An entropy device with its event loop in a thread.
    struct Fixture {
        transport: MmioTransport,
        driver: Driver,
        line: CountingLine,
        stop: Arc<AtomicBool>,
        event_loop: Option<JoinHandle<()>>,
    }

    impl Fixture {
        fn new() -> Self {
            Self::with(Box::new(Rng))
        }

        /// The first register whose word in `page` is not what a read returns.
        fn differs_from(&self, page: &RegisterPage) -> Option<(u64, u32, u32)> {
            let words = (0..0x140).step_by(4).map(|offset| {
                let mut read = [0; 4];
                self.transport.read(offset, &mut read);
                (offset, u32::from_le_bytes(read), page.word(offset).unwrap().load(Ordering::Acquire))
            });
            words.into_iter().find(|(_, read, shown)| read != shown)
        }

        fn with(device: Box<dyn Device>) -> Self {
            let memory = memory();
            let line = CountingLine::default();
            let interrupt = Arc::new(InterruptStatus::new(Box::new(line.clone())));
            let (worker, handle) = Worker::new(device, memory.clone(), interrupt).unwrap();
            let stop = Arc::new(AtomicBool::new(false));
            let stopping = stop.clone();
            let event_loop = thread::spawn(move || {
                let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
                events.add_subscriber(Box::new(worker));
                while !stopping.load(Ordering::Relaxed) {
                    events.run_with_timeout(1).unwrap();
                }
            });
            Self {
                transport: MmioTransport::new(handle),
                driver: Driver::new(&memory, 0, 16),
                line,
                stop,
                event_loop: Some(event_loop),
            }
        }

        fn read(&self, register: u64) -> u32 {
            let mut word = [0; 4];
            self.transport.read(register, &mut word);
            u32::from_le_bytes(word)
        }

        fn write(&mut self, register: u64, value: u32) {
            self.transport.write(register, &value.to_le_bytes());
        }

        fn status(&self) -> u32 {
            self.read(register::STATUS)
        }

        fn accept_features(&mut self, features: u64) {
            self.write(register::STATUS, status::ACKNOWLEDGE);
            self.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
            for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
                self.write(register::DRIVER_FEATURES_SELECT, select);
                self.write(register::DRIVER_FEATURES, half);
            }
            let with_features = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
            self.write(register::STATUS, with_features);
        }

        fn set_up_queue(&mut self) {
            self.set_up_queue_number(0);
        }

        /// All of them at the same place, as nothing is sent on them.
        fn set_up_queue_number(&mut self, number: u32) {
            let setup = self.driver.setup();
            self.write(register::QUEUE_SELECT, number);
            self.write(register::QUEUE_SIZE, setup.size.into());
            self.write(register::QUEUE_DESC_LOW, setup.descriptors as u32);
            self.write(register::QUEUE_DESC_HIGH, 0);
            self.write(register::QUEUE_DRIVER_LOW, setup.available as u32);
            self.write(register::QUEUE_DEVICE_LOW, setup.used as u32);
            self.write(register::QUEUE_READY, 1);
        }

        fn start(&mut self) {
            self.accept_features(feature::VERSION_1);
            self.set_up_queue();
            self.write(register::STATUS, ALL_OK);
        }

        fn wait(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
            let deadline = Instant::now() + Duration::from_secs(10);
            while !done(self) {
                assert!(Instant::now() < deadline, "nothing happened");
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            self.stop.store(true, Ordering::Relaxed);
            self.event_loop.take().unwrap().join().unwrap();
        }
    }

    #[test]
    fn registers_of_fresh_device_identify_it() {
        let fixture = Fixture::new();
        assert_eq!(fixture.read(register::MAGIC), 0x7472_6976);
        assert_eq!(fixture.read(register::VERSION), 2);
        assert_eq!(fixture.read(register::DEVICE_ID), device_type::ENTROPY);
        assert_eq!(fixture.read(register::QUEUE_SIZE_MAX), 16);
        assert_eq!(fixture.read(register::SHM_LEN_LOW), u32::MAX);
        assert_eq!((fixture.status(), fixture.read(register::QUEUE_READY)), (0, 0));
    }

    #[test]
    fn access_that_is_no_aligned_word_has_no_effect() {
        let mut fixture = Fixture::new();
        let mut bytes = [9; 2];
        fixture.transport.read(register::MAGIC, &mut bytes);
        assert_eq!(bytes, [0, 0]);
        fixture.transport.write(register::STATUS, &[1]);
        assert_eq!(fixture.status(), 0);
        let mut word = [9; 4];
        fixture.transport.read(register::MAGIC + 1, &mut word);
        fixture.transport.read(register::CONFIG + 100, &mut word);
        assert_eq!(word, [0; 4]);
    }

    #[test]
    fn negotiated_device_serves_its_queue_and_interrupts() {
        let mut fixture = Fixture::new();
        fixture.start();
        assert_eq!(fixture.status(), ALL_OK);
        fixture.driver.add(&[Part::Writable(32)]);
        fixture.write(QUEUE_NOTIFY, 0);
        fixture.wait(|fixture| fixture.line.count() == 1);
        assert_eq!(fixture.driver.take_used().unwrap().2, 32);
        assert_eq!(fixture.read(register::INTERRUPT_STATUS), 1);
        fixture.write(register::INTERRUPT_ACK, 1);
        assert_eq!(fixture.read(register::INTERRUPT_STATUS), 0);
    }

    #[test]
    fn buffers_made_available_before_driver_ok_are_served() {
        let mut fixture = Fixture::new();
        fixture.driver.add(&[Part::Writable(1)]);
        fixture.start();
        fixture.wait(|fixture| fixture.driver.take_used().is_some());
    }

    #[test]
    fn features_that_were_not_offered_or_legacy_are_refused() {
        for features in [0, feature::EVENT_IDX, feature::VERSION_1 | 1, feature::VERSION_1 | 1 << 63] {
            let mut fixture = Fixture::new();
            fixture.accept_features(features);
            assert_eq!(fixture.status(), status::ACKNOWLEDGE | status::DRIVER, "{features:#x}");
        }
    }

    #[test]
    fn step_out_of_order_needs_a_reset() {
        let steps: [&dyn Fn(&mut Fixture); 8] = [
            &|fixture| fixture.write(register::STATUS, status::DRIVER_OK),
            &|fixture| fixture.write(register::STATUS, ALL_OK),
            &|fixture| fixture.write(register::DRIVER_FEATURES, 1),
            &|fixture| fixture.set_up_queue(),
            &|fixture| {
                // Queue not ready.
                fixture.accept_features(feature::VERSION_1);
                fixture.write(register::STATUS, ALL_OK);
            },
            &|fixture| {
                // A cleared bit.
                fixture.accept_features(feature::VERSION_1);
                fixture.write(register::STATUS, status::ACKNOWLEDGE);
            },
            &|fixture| {
                fixture.accept_features(feature::VERSION_1);
                fixture.write(register::QUEUE_SIZE, 12);
            },
            &|fixture| {
                fixture.start();
                fixture.write(register::QUEUE_DESC_LOW, 0);
            },
        ];
        for (index, step) in steps.iter().enumerate() {
            let mut fixture = Fixture::new();
            step(&mut fixture);
            assert_ne!(fixture.status() & status::DEVICE_NEEDS_RESET, 0, "step {index}");
            // Once, however often it goes on.
            step(&mut fixture);
            assert_eq!(fixture.line.count(), 1, "step {index}");
            fixture.write(register::STATUS, 0);
            assert_eq!(fixture.status(), 0);
            fixture.start();
            assert_eq!(fixture.status(), ALL_OK, "step {index}");
        }
    }

    #[test]
    fn broken_chain_needs_a_reset_after_which_the_device_works() {
        let mut fixture = Fixture::new();
        fixture.start();
        fixture.driver.add(&[Part::Readable(b"no room")]);
        fixture.write(QUEUE_NOTIFY, 0);
        fixture.wait(|fixture| fixture.status() & status::DEVICE_NEEDS_RESET != 0);
        fixture.wait(|fixture| fixture.read(register::INTERRUPT_STATUS) == 2);
        fixture.driver.add(&[Part::Writable(1)]);
        fixture.write(QUEUE_NOTIFY, 0);
        thread::sleep(Duration::from_millis(10));
        assert_eq!(fixture.driver.take_used(), None);

        fixture.write(register::STATUS, 0);
        fixture.driver = Driver::new(&fixture.driver.memory.clone(), 3, 16);
        fixture.start();
        fixture.driver.add(&[Part::Writable(1)]);
        fixture.write(QUEUE_NOTIFY, 0);
        fixture.wait(|fixture| fixture.driver.take_used().is_some());
    }

    #[test]
    fn queue_outside_of_memory_needs_a_reset() {
        let mut fixture = Fixture::new();
        fixture.accept_features(feature::VERSION_1);
        fixture.set_up_queue();
        fixture.write(register::QUEUE_READY, 0);
        fixture.write(register::QUEUE_DESC_HIGH, 0xffff);
        fixture.write(register::QUEUE_READY, 1);
        fixture.write(register::STATUS, ALL_OK);
        fixture.wait(|fixture| fixture.status() & status::DEVICE_NEEDS_RESET != 0);
    }

    /// A balloon: two queues that it must have, and two that depend on features.
    fn balloon() -> (Fixture, BalloonHandle) {
        let config = BalloonConfig { free_page_reporting: true, ..BalloonConfig::default() };
        let device = Balloon::new(&config, 16, 4).unwrap();
        let handle = device.handle();
        (Fixture::with(Box::new(device)), handle)
    }

    #[test]
    fn driver_leaves_out_optional_queues_at_the_end_only() {
        for (queues, good) in [
            (&[0, 1, 2, 3][..], true),
            (&[0, 1, 2], true),
            (&[0, 1], true),
            (&[0], false),
            (&[0, 2], false),
            (&[0, 1, 3], false),
        ] {
            let (mut fixture, _) = balloon();
            fixture.accept_features(feature::VERSION_1);
            for queue in queues {
                fixture.set_up_queue_number(*queue);
            }
            fixture.write(register::STATUS, ALL_OK);
            assert_eq!(fixture.status() & status::DEVICE_NEEDS_RESET == 0, good, "{queues:?}");
        }
    }

    #[test]
    fn changed_configuration_interrupts_a_running_driver() {
        let (mut fixture, handle) = balloon();
        let target = register::CONFIG;
        handle.set_target_mib(1);
        fixture.accept_features(feature::VERSION_1);
        fixture.set_up_queue_number(0);
        fixture.set_up_queue_number(1);
        fixture.write(register::STATUS, ALL_OK);
        assert_eq!((fixture.read(target), fixture.line.count()), (256, 0));
        let generation = fixture.read(register::CONFIG_GENERATION);
        handle.set_target_mib(2);
        assert_eq!((fixture.read(target), fixture.line.count()), (512, 1));
        assert_ne!(fixture.read(register::CONFIG_GENERATION), generation);
        assert_eq!(fixture.read(register::INTERRUPT_STATUS), 2);
        // The target is not the driver's to write, what it has given is.
        fixture.write(target, 7);
        fixture.write(target + 4, 256);
        assert_eq!((fixture.read(target), fixture.read(target + 4)), (512, 256));
        assert_eq!(handle.statistics().actual_mib, 1);
        fixture.write(register::STATUS, 0);
        handle.set_target_mib(3);
        assert_eq!(fixture.line.count(), 1, "a driver that is gone is not told");
        assert_eq!(fixture.read(target + 4), 0);
    }

    #[test]
    fn reset_of_running_device_stops_it() {
        let mut fixture = Fixture::new();
        fixture.start();
        fixture.write(register::STATUS, 0);
        fixture.driver.add(&[Part::Writable(1)]);
        fixture.write(QUEUE_NOTIFY, 0);
        thread::sleep(Duration::from_millis(10));
        assert_eq!(fixture.driver.take_used(), None);
        assert_eq!(fixture.read(register::QUEUE_READY), 0);
    }

    #[test]
    fn page_of_a_device_shows_interrupts_configuration_and_failures() {
        let config = BalloonConfig { target_mib: 3, ..BalloonConfig::default() };
        let balloon = Balloon::new(&config, 128, 32).unwrap();
        let handle: BalloonHandle = balloon.handle();
        let mut fixture = Fixture::with(Box::new(balloon));
        let page = RegisterPages::new(1).unwrap().page(0);
        assert!(fixture.transport.can_be_shown());
        fixture.transport.show_in(page.clone());
        let shown = |offset| page.word(offset).unwrap().load(Ordering::Acquire);
        assert_eq!((fixture.differs_from(&page), shown(register::CONFIG)), (None, 3 << 8));
        handle.set_target_mib(5);
        assert_eq!((fixture.differs_from(&page), shown(register::CONFIG)), (None, 5 << 8));
        let interrupt = fixture.transport.interrupt();
        interrupt.signal_used().unwrap();
        assert_eq!((fixture.differs_from(&page), shown(register::INTERRUPT_STATUS)), (None, 1));
        fixture.write(register::INTERRUPT_ACK, 1);
        assert_eq!((fixture.differs_from(&page), shown(register::INTERRUPT_STATUS)), (None, 0));
        fixture.write(register::STATUS, status::ACKNOWLEDGE);
        fixture.write(register::CONFIG + 4, 7);
        fixture.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        fixture.write(register::CONFIG + 4, 8);
        assert_eq!((fixture.differs_from(&page), shown(register::CONFIG + 4)), (None, 8));
        fixture.transport.interrupt().signal_needs_reset().unwrap();
        assert_eq!(
            shown(register::STATUS),
            status::ACKNOWLEDGE | status::DRIVER | status::DEVICE_NEEDS_RESET
        );
        assert_eq!(fixture.differs_from(&page), None);
        fixture.write(register::STATUS, 0);
        assert_eq!((fixture.differs_from(&page), shown(register::STATUS)), (None, 0));
        // Nothing beyond the page, nor between its words.
        assert!(page.word(4096).is_none() && page.word(u64::MAX).is_none() && page.word(2).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Registers survive any writes, and the device never runs without having been negotiated.
        #[test]
        fn any_writes_keep_the_order(
            writes in prop::collection::vec((0u64..0x44, prop_oneof![0u32..16, Just(0x8000), any::<u32>()]), 0..60),
        ) {
            let mut fixture = Fixture::new();
            let page = RegisterPages::new(2).unwrap().page(1);
            fixture.transport.show_in(page.clone());
            for (register, value) in writes {
                fixture.write(register * 4, value);
                prop_assert_eq!(fixture.differs_from(&page), None);
                let status = fixture.transport.status;
                if status & status::DRIVER_OK != 0 {
                    prop_assert_eq!(status & ALL_OK, ALL_OK);
                    prop_assert!(fixture.transport.features_acceptable());
                }
                let mut bytes = [0; 4];
                fixture.transport.read(register * 4, &mut bytes);
            }
        }
    }
}
