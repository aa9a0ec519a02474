//! Which device an access of a vCPU is for. Shared by all vCPU threads; each device has its own lock.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{
    boot::layout,
    devices::{control, keyboard, serial, serial::SerialPort},
    virtio::mmio::MmioTransport,
};

/// What an access asks of the machine as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// See [`control::Request`].
    Control(control::Request),
    /// Reset the machine.
    Reset,
}

/// All devices that a vCPU reaches through this process.
pub struct Bus {
    serial: Mutex<SerialPort>,
    virtio: Vec<Mutex<MmioTransport>>,
}

const SERIAL_PORTS: std::ops::Range<u16> = serial::PORT..serial::PORT + 8;
/// The real-time clock's data port. Zero says that no update is under way, so that nobody waits for its end.
const CMOS_DATA_PORT: u16 = 0x71;

impl Bus {
    /// A bus with these devices; virtio devices in the order of their addresses.
    pub fn new(serial: SerialPort, virtio: Vec<MmioTransport>) -> Self {
        Self { serial: Mutex::new(serial), virtio: virtio.into_iter().map(Mutex::new).collect() }
    }

    /// A vCPU writes to an I/O port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<Request> {
        if let Some(request) = control::decode(port, data) {
            return Some(Request::Control(request));
        }
        if SERIAL_PORTS.contains(&port) {
            let mut serial = lock(&self.serial);
            for byte in data {
                serial.write((port - serial::PORT) as u8, *byte);
            }
        } else if port == keyboard::PORT && data.iter().any(|command| keyboard::resets(*command)) {
            return Some(Request::Reset);
        }
        None
    }

    /// A vCPU reads from an I/O port. Where nothing is, all bits are set.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        if SERIAL_PORTS.contains(&port) {
            let mut serial = lock(&self.serial);
            for byte in data {
                *byte = serial.read((port - serial::PORT) as u8);
            }
        } else {
            data.fill(match port {
                keyboard::PORT => keyboard::STATUS,
                CMOS_DATA_PORT => 0,
                _ => 0xff,
            });
        }
    }

    /// A vCPU writes to an address that is not memory.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((mut device, offset)) = self.virtio_at(address) {
            device.write(offset, data);
        }
    }

    /// A vCPU reads from an address that is not memory.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        match self.virtio_at(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn virtio_at(&self, address: u64) -> Option<(MutexGuard<'_, MmioTransport>, u64)> {
        let from_start = address.checked_sub(layout::VIRTIO_MMIO_START)?;
        let index = usize::try_from(from_start / layout::VIRTIO_MMIO_BYTES).ok()?;
        Some((lock(self.virtio.get(index)?), from_start % layout::VIRTIO_MMIO_BYTES))
    }
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc};

    use super::*;
    use crate::devices::{Interrupt, console::Console};

    struct NoLine;

    impl Interrupt for NoLine {
        fn trigger(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn bus() -> (Bus, Arc<Mutex<Console>>) {
        let console = Arc::new(Mutex::new(Console::default()));
        (Bus::new(SerialPort::new(Box::new(NoLine), console.clone()), vec![]), console)
    }

    #[test]
    fn port_write_to_serial_port_prints() {
        let (bus, console) = bus();
        assert_eq!(bus.port_write(serial::PORT, b"ab"), None);
        assert_eq!(lock(&console).contents(), b"ab");
    }

    #[test]
    fn port_write_that_resets_or_exits_is_a_request() {
        let (bus, _) = bus();
        assert_eq!(bus.port_write(0x64, &[0xfe]), Some(Request::Reset));
        assert_eq!(bus.port_write(0x64, &[0xd1]), None);
        assert_eq!(bus.port_write(0x5c4, &[1, 0, 0, 0]), Some(Request::Control(control::Request::Exit(1))));
    }

    #[test]
    fn access_to_nothing_reads_ones_and_writes_nowhere() {
        let (bus, _) = bus();
        for address in [0, layout::VIRTIO_MMIO_START - 1, layout::VIRTIO_MMIO_START, u64::MAX] {
            let mut data = [0; 8];
            bus.memory_write(address, &data);
            bus.memory_read(address, &mut data);
            assert_eq!(data, [0xff; 8]);
        }
        let mut data = [0; 4];
        bus.port_read(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.port_read(0x71, &mut data[..1]);
        assert_eq!(data[0], 0);
    }
}
