//! The keyboard controller's reset line: the one thing of an i8042 that a guest without a keyboard uses.

/// Command and status port.
pub const PORT: u16 = 0x64;
/// Command: pulse the CPU's reset line.
const PULSE_RESET: u8 = 0xfe;

/// Whether this command resets the machine. All others are ignored.
pub fn resets(command: u8) -> bool {
    command == PULSE_RESET
}

/// The status register: nothing to read, ready for a command.
pub const STATUS: u8 = 0;
