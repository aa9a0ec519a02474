//! What the guest printed on its console: the last [`CAPACITY`] bytes, since a guest can print for ever.

use std::{collections::VecDeque, fmt::Write};

use crate::event::PanicCause;

/// Bytes that are kept.
pub const CAPACITY: usize = 64 * 1024;

/// A bounded buffer that forgets its oldest bytes.
#[derive(Debug, Default)]
pub struct Console {
    bytes: VecDeque<u8>,
}

impl Console {
    /// Appends what the guest printed.
    pub fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.bytes.len() == CAPACITY {
                self.bytes.pop_front();
            }
            self.bytes.push_back(*byte);
        }
    }

    /// Everything that is kept.
    pub fn contents(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }

    /// The last `bytes` bytes as text: invalid UTF-8 is replaced, control characters other than newline and tab are
    /// escaped, because the text ends up on a user's terminal.
    pub fn tail(&self, bytes: usize) -> String {
        let skipped = self.bytes.len().saturating_sub(bytes);
        let kept: Vec<u8> = self.bytes.iter().skip(skipped).copied().collect();
        let mut text = String::with_capacity(kept.len());
        for character in String::from_utf8_lossy(&kept).chars() {
            match character {
                '\n' | '\t' => text.push(character),
                '\r' => {}
                control if control.is_control() => {
                    // Writing to a String cannot fail.
                    let _ = write!(text, "{}", control.escape_default());
                }
                other => text.push(other),
            }
        }
        text
    }

    /// What the kernel gave as the reason of its last panic, if it printed one, and what that means.
    pub fn panic(&self) -> Option<(String, PanicCause)> {
        const MARKER: &str = "Kernel panic - not syncing: ";
        let text = self.tail(CAPACITY);
        let (before, message) = text.rsplit_once(MARKER)?;
        let message = message.lines().next().unwrap_or_default().trim();
        Some((message.to_owned(), cause_of(message, before)))
    }
}

/// The words are those of Linux: `init/main.c`, `init/do_mounts.c`, `kernel/exit.c`, `mm/oom_kill.c`,
/// `arch/x86/kernel/dumpstack.c`.
fn cause_of(message: &str, before: &str) -> PanicCause {
    const OF_MESSAGES: [(&str, PanicCause); 6] = [
        ("No working init found", PanicCause::NoInit),
        ("Requested init ", PanicCause::NoInit),
        ("VFS: Unable to mount root fs", PanicCause::NoRoot),
        ("System is deadlocked on memory", PanicCause::OutOfMemory),
        ("Out of memory", PanicCause::OutOfMemory),
        ("Fatal exception", PanicCause::Oops),
    ];
    if message.starts_with("Attempted to kill init") {
        let out_of_memory = before.contains("Out of memory: Killed process 1 ");
        return if out_of_memory { PanicCause::OutOfMemory } else { PanicCause::InitDied };
    }
    let known = OF_MESSAGES.into_iter().find(|(words, _)| message.starts_with(words));
    known.map_or(PanicCause::Other, |(_, cause)| cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn push_over_capacity_forgets_oldest() {
        let mut console = Console::default();
        console.push(b"old");
        console.push(&vec![b'x'; CAPACITY - 1]);
        assert_eq!(console.contents().len(), CAPACITY);
        assert_eq!(console.contents()[0], b'd');
    }

    #[test]
    fn tail_with_control_characters_is_fit_for_a_terminal() {
        let mut console = Console::default();
        console.push(b"dropped\r\n\x1b[31mred\xff\ttab\n");
        assert_eq!(console.tail(14), "\\u{1b}[31mred\u{fffd}\ttab\n");
    }

    #[test]
    fn panic_message_of_panicked_kernel_is_the_rest_of_its_line() {
        let mut console = Console::default();
        assert_eq!(console.panic(), None);
        console.push(b"[ 0.1] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n[ 0.1] CPU: 0\r\n");
        assert_eq!(console.panic().unwrap(), ("VFS: Unable to mount root fs".into(), PanicCause::NoRoot));
    }

    #[test]
    fn panic_causes_are_told_apart() {
        let oom = "Out of memory: Killed process 1 (init) total-vm:1kB\n";
        let killed = "Attempted to kill init! exitcode=0x00000009";
        for (before, message, cause) in [
            ("", "No working init found. Try passing init= option to kernel.", PanicCause::NoInit),
            (oom, killed, PanicCause::OutOfMemory),
            ("Out of memory: Killed process 17 (sh)\n", killed, PanicCause::InitDied),
            ("", "System is deadlocked on memory", PanicCause::OutOfMemory),
            ("BUG: kernel NULL pointer dereference\n", "Fatal exception in interrupt", PanicCause::Oops),
            ("", "sysrq triggered crash", PanicCause::Other),
        ] {
            let mut console = Console::default();
            console.push(format!("{before}[ 1.0] Kernel panic - not syncing: {message}\n").as_bytes());
            assert_eq!(console.panic(), Some((message.to_owned(), cause)));
        }
    }
}
