//! A device configuration space that changes while its driver looks (virtio 1.2 §2.5): the device and the machine's
//! operator change it, some fields are the driver's to write, and a generation tells the driver to read again.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use super::{device::InterruptStatus, mmio::register, registers::RegisterPage};

/// The space, shared by the device, its transport and whoever steers it at run time.
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
    generation: AtomicU32,
    /// What the driver may write.
    writable: Range<usize>,
    interrupt: OnceLock<Arc<InterruptStatus>>,
    /// Where the driver reads it, if it reads it from memory.
    page: OnceLock<RegisterPage>,
    read_whole: bool,
}

impl ConfigSpace {
    /// A space with these bytes, of which the driver may write `writable`.
    pub fn new(bytes: Vec<u8>, writable: Range<usize>) -> Self {
        let (bytes, generation) = (Mutex::new(bytes), AtomicU32::new(0));
        let (interrupt, page) = (OnceLock::new(), OnceLock::new());
        Self { bytes, generation, writable, interrupt, page, read_whole: false }
    }

    /// The same, with fields of more than four bytes that change. A driver cannot read them from memory: between two
    /// reads of one generation it could see half of a change (§2.5.3).
    pub fn with_long_fields(self) -> Self {
        Self { read_whole: true, ..self }
    }

    /// Whether the driver must not read it from memory.
    pub fn is_read_whole(&self) -> bool {
        self.read_whole
    }

    /// From now on, the driver reads it from memory; only the first call counts.
    pub fn show_in(&self, page: RegisterPage) {
        let bytes = self.lock();
        let _ = self.page.set(page);
        self.show(&bytes);
    }

    /// Writes what the driver is to read, word by word, and then the generation.
    fn show(&self, bytes: &[u8]) {
        let Some(page) = self.page.get() else { return };
        for (offset, bytes) in (register::CONFIG..).step_by(4).zip(bytes.chunks(4)) {
            let mut word = [0; 4];
            word.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            if let Some(shown) = page.word(offset) {
                shown.store(u32::from_le_bytes(word), Ordering::Release);
            }
        }
        if let Some(shown) = page.word(register::CONFIG_GENERATION) {
            shown.store(self.generation(), Ordering::Release);
        }
    }

    /// Whom to tell of changes. Only the first call counts: a device has one transport.
    pub fn connect(&self, interrupt: Arc<InterruptStatus>) {
        let _ = self.interrupt.set(interrupt);
    }

    /// The driver reads from `offset` on; what is beyond the space reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let bytes = self.lock();
        let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..));
        for (to, from) in data.iter_mut().zip(from.unwrap_or_default()) {
            *to = *from;
        }
    }

    /// The driver writes at `offset`; ignored unless all of it is the driver's to write.
    pub fn driver_write(&self, offset: u64, data: &[u8]) {
        let Ok(start) = usize::try_from(offset) else { return };
        let Some(end) = start.checked_add(data.len()) else { return };
        if start < self.writable.start || end > self.writable.end {
            return;
        }
        let mut bytes = self.lock();
        if let Some(target) = bytes.get_mut(start..end) {
            target.copy_from_slice(data);
            self.show(&bytes);
        }
    }

    /// A field of `N` bytes; zeros if it is not there.
    pub fn field<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(offset as u64, &mut bytes);
        bytes
    }

    /// Changes a field, and tells the driver if that made a difference.
    pub fn set_field(&self, offset: usize, value: &[u8]) {
        if self.set_quietly(offset, value)
            && let Some(interrupt) = self.interrupt.get()
        {
            interrupt.signal_configuration_change();
        }
    }

    /// Changes a field of which the driver learns in another way. True if that made a difference.
    pub fn set_quietly(&self, offset: usize, value: &[u8]) -> bool {
        let mut bytes = self.lock();
        let Some(target) = offset.checked_add(value.len()).and_then(|end| bytes.get_mut(offset..end)) else {
            return false;
        };
        if target == value {
            return false;
        }
        target.copy_from_slice(value);
        // Under the lock: a driver that reads the new bytes has not read the new generation before (§2.5.3).
        self.generation.fetch_add(1, Ordering::Release);
        self.show(&bytes);
        true
    }

    /// Changes with every change that is not the driver's own (§4.2.2: `ConfigGeneration`).
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver_model::CountingLine;

    #[test]
    fn set_field_of_running_device_changes_generation_and_interrupts_once() {
        let config = ConfigSpace::new(vec![0; 8], 4..8);
        let line = CountingLine::default();
        let interrupt = Arc::new(InterruptStatus::new(Box::new(line.clone())));
        config.connect(interrupt.clone());
        config.set_field(0, &[1]);
        // Nobody is told before DRIVER_OK.
        assert_eq!((config.generation(), line.count()), (1, 0));
        interrupt.set_live();
        config.set_field(0, &[2]);
        config.set_field(0, &[2]);
        assert_eq!((config.generation(), line.count()), (2, 1));
        assert_eq!(interrupt.pending(), 2);
        assert_eq!(config.field::<4>(0), [2, 0, 0, 0]);
    }

    #[test]
    fn driver_write_changes_its_own_fields_only() {
        let config = ConfigSpace::new(vec![0; 8], 4..8);
        config.driver_write(4, &[1, 2, 3, 4]);
        assert_eq!(config.field::<4>(4), [1, 2, 3, 4]);
        for (offset, bytes) in [(0, 4), (3, 2), (6, 4), (8, 1), (u64::MAX, 2)] {
            config.driver_write(offset, &vec![9; bytes]);
        }
        assert_eq!(config.field::<8>(0), [0, 0, 0, 0, 1, 2, 3, 4]);
        assert_eq!(config.generation(), 0);
    }

    #[test]
    fn access_beyond_the_space_reads_zeros_and_changes_nothing() {
        let config = ConfigSpace::new(vec![7; 2], 0..0);
        let mut word = [9; 4];
        config.read(1, &mut word);
        assert_eq!(word, [7, 0, 0, 0]);
        config.read(u64::MAX, &mut word);
        assert_eq!(word, [0; 4]);
        assert!(!config.set_quietly(1, &[1, 1]));
        assert!(!config.set_quietly(usize::MAX, &[1, 1]));
    }
}
