//! Printing for people and scripts that may stop listening: `cloche ps | head -n 1` is no reason to crash.
//!
//! The standard library's macros panic where a write fails, and a panic here aborts. These have their names and take
//! their place in the whole crate: a reader that is gone is ignored, and whatever else goes wrong on stdout (a full
//! disk, say) is an error.

use std::{
    fmt,
    io::{self, Write},
    process,
    sync::atomic::{AtomicBool, Ordering},
};

/// Nobody reads stdout any more.
static IS_UNREAD: AtomicBool = AtomicBool::new(false);

/// Whether what goes to stdout still has a reader, as far as writing there has shown. What prints without end asks.
pub fn has_reader() -> bool {
    !IS_UNREAD.load(Ordering::Relaxed)
}

/// Writes to stdout.
pub fn print(text: fmt::Arguments) {
    let mut stdout = io::stdout().lock();
    // Flushed at once, so that the error is not lost at the process's end.
    let written = stdout.write_fmt(text).and_then(|()| stdout.flush());
    match written {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => IS_UNREAD.store(true, Ordering::Relaxed),
        Err(error) => {
            complain(format_args!("cloche: cannot write to stdout: {error}\n"));
            process::exit(1);
        }
    }
}

/// Writes to stderr. There is nobody to tell if that fails.
///
/// Messages quote registries, archives and guests. Nothing in them may steer the terminal.
pub fn complain(text: fmt::Arguments) {
    let _ = io::stderr().write_all(tame(&text.to_string(), &['\n', '\t']).as_bytes());
}

/// A text in which control characters (C0, DEL and C1) but those allowed are shown as escapes.
pub fn tame(text: &str, allowed: &[char]) -> String {
    let mut tamed = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter.is_control() && !allowed.contains(&letter) {
            true => tamed.extend(letter.escape_default()),
            false => tamed.push(letter),
        }
    }
    tamed
}

macro_rules! print {
    ($($words:tt)*) => { $crate::output::print(format_args!($($words)*)) };
}

macro_rules! println {
    () => { print!("\n") };
    ($($words:tt)*) => { $crate::output::print(format_args!("{}\n", format_args!($($words)*))) };
}

macro_rules! eprint {
    ($($words:tt)*) => { $crate::output::complain(format_args!($($words)*)) };
}

macro_rules! eprintln {
    ($($words:tt)*) => { $crate::output::complain(format_args!("{}\n", format_args!($($words)*))) };
}

#[cfg(test)]
mod tests {
    use super::tame;

    #[test]
    fn control_characters_are_shown_and_do_nothing() {
        let hostile = "a\u{1b}]0;title\u{7}\u{9b}2J\u{7f}\rb\nü";
        let tamed = r"a\u{1b}]0;title\u{7}\u{9b}2J\u{7f}\rb";
        assert_eq!(tame(hostile, &['\n']), format!("{tamed}\nü"));
        assert_eq!(tame(hostile, &[]), format!("{tamed}\\nü"));
    }
}
