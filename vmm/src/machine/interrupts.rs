//! Interrupt lines of a machine, pulsed at once by the thread that has something to tell.
//!
//! An irqfd would be one system call instead of two, but what it does to a pin of an interrupt controller, KVM leaves to
//! a worker thread of the host's kernel: only message-signalled interrupts can be delivered where an eventfd is
//! signalled. Two switches of threads for each interrupt cost more (`docs/decisions/0028-the-way-of-an-interrupt.md`).

use std::{
    io,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use kvm_ioctls::VmFd;

use crate::devices::Interrupt;

/// Pins of the interrupt controller.
const LINES: usize = 24;

/// All lines of a machine.
#[derive(Default)]
pub struct Lines {
    /// From the moment that the machine can run.
    vm: OnceLock<Arc<VmFd>>,
    /// A pulse is two requests: two pulses of different threads, one in the other, would be one.
    pulses: [Mutex<()>; LINES],
}

/// One line.
pub struct Line {
    lines: Arc<Lines>,
    number: u32,
}

impl Lines {
    /// The machine that has them; only the first call counts.
    pub fn attach(&self, vm: Arc<VmFd>) {
        let _ = self.vm.set(vm);
    }

    /// The line with this number.
    pub fn line(self: &Arc<Self>, number: u32) -> Line {
        Line { lines: self.clone(), number }
    }
}

impl Interrupt for Line {
    fn trigger(&self) -> io::Result<()> {
        // Before that there is no guest that could be told.
        let Some(vm) = self.lines.vm.get() else { return Ok(()) };
        let pulse = usize::try_from(self.number).ok().and_then(|number| self.lines.pulses.get(number));
        let pulse = pulse.ok_or(io::ErrorKind::InvalidInput)?;
        let _pulse = pulse.lock().unwrap_or_else(PoisonError::into_inner);
        let set = |level| {
            vm.set_irq_line(self.number, level).map_err(|error| io::Error::from_raw_os_error(error.errno()))
        };
        set(true)?;
        set(false)
    }
}
