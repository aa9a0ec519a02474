//! The serial port, COM1: output only, into the [`Console`].

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use vm_superio::{Serial, Trigger, serial::NoEvents};

use super::{Interrupt, console::Console};

/// First of its eight I/O ports.
pub const PORT: u16 = 0x3f8;
/// Its interrupt line.
pub const INTERRUPT_LINE: u32 = 4;

struct Line(Box<dyn Interrupt>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

struct Output(Arc<Mutex<Console>>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A 16550A.
pub struct SerialPort {
    registers: Serial<Line, NoEvents, Output>,
}

impl SerialPort {
    /// A port that prints to `console` and interrupts on `line`.
    pub fn new(line: Box<dyn Interrupt>, console: Arc<Mutex<Console>>) -> Self {
        Self { registers: Serial::new(Line(line), Output(console)) }
    }

    /// The guest wrote to register `offset`.
    pub fn write(&mut self, offset: u8, value: u8) {
        // The output cannot fail. A lost interrupt delays the guest's driver, which also polls.
        let _ = self.registers.write(offset, value);
    }

    /// The guest reads register `offset`.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.registers.read(offset)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    struct Counter(Arc<AtomicU32>);

    impl Interrupt for Counter {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    #[test]
    fn write_of_characters_prints_them_and_interrupts_when_asked() {
        let console = Arc::new(Mutex::new(Console::default()));
        let interrupts = Arc::new(AtomicU32::new(0));
        let mut port = SerialPort::new(Box::new(Counter(interrupts.clone())), console.clone());
        port.write(0, b'h');
        assert_eq!(interrupts.load(Ordering::Relaxed), 0);
        // Interrupt enable register: transmitter empty.
        port.write(1, 2);
        port.write(0, b'i');
        assert!(interrupts.load(Ordering::Relaxed) > 0);
        assert_eq!(console.lock().unwrap().contents(), b"hi");
        // Line status register: transmitter empty.
        assert_eq!(port.read(5) & 0x60, 0x60);
    }
}
