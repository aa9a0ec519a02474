//! Asking people for what nobody else should see.

use std::io::{self, BufRead, IsTerminal, stdin};

use anyhow::{Context, ensure};
use rustix::{
    process::{Signal, getpid, kill_process},
    termios::{LocalModes, OptionalActions, SpecialCodeIndex, SpecialCodes, Termios, tcgetattr, tcsetattr},
};

/// Asks for a line without showing it.
pub fn ask_secret(question: &str) -> anyhow::Result<String> {
    ensure!(stdin().is_terminal(), "stdin is no terminal; pipe the password in with --password-stdin");
    let silence = Silence::begin().context("cannot stop the terminal from showing the password")?;
    eprint!("{question}");
    let read = read_line(stdin().lock(), &silence.0.special_codes);
    drop(silence);
    eprint!("\n");
    let Some(line) = read.context("cannot read the password")? else {
        // As the terminal would have done it.
        kill_process(getpid(), Signal::INT)?;
        anyhow::bail!("interrupted");
    };
    String::from_utf8(line).context("the password is not UTF-8")
}

/// Reads a line of a terminal that leaves the keys with a meaning to this; `None` if it was interrupted.
fn read_line(input: impl BufRead, keys: &SpecialCodes) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    for byte in input.bytes() {
        let byte = byte?;
        let is = |key| keys[key] == byte;
        if is(SpecialCodeIndex::VINTR) || is(SpecialCodeIndex::VQUIT) {
            return Ok(None);
        } else if is(SpecialCodeIndex::VERASE) {
            // A letter has further bytes in UTF-8.
            while line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {}
        } else if is(SpecialCodeIndex::VKILL) {
            line.clear();
        } else if byte == b'\n' || (is(SpecialCodeIndex::VEOF) && line.is_empty()) {
            break;
        } else {
            line.push(byte);
        }
    }
    Ok(Some(line))
}

/// While this lives, the terminal shows nothing of what is typed, and a key that interrupts does not end this process,
/// which would leave the terminal so.
struct Silence(Termios);

impl Silence {
    fn begin() -> io::Result<Silence> {
        let before = tcgetattr(stdin())?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG);
        // A read gives what is there, and at least one byte.
        silent.special_codes[SpecialCodeIndex::VMIN] = 1;
        silent.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(stdin(), OptionalActions::Flush, &silent)?;
        Ok(Silence(before))
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        let _ = tcsetattr(stdin(), OptionalActions::Flush, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use rustix::pty::{OpenptFlags, openpt};

    use super::*;

    #[test]
    fn read_line_does_what_keys_mean_on_a_terminal() {
        // A new terminal has Linux's usual keys: ^C, ^\, DEL, ^U and ^D.
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        let keys = tcgetattr(&terminal).unwrap().special_codes;
        for (typed, read) in [
            ("secret\nmore", Some("secret")),
            ("no end", Some("no end")),
            ("pä\x7f\x7f\x7f\x7fab\x7fc\n", Some("ac")),
            ("wrong\x15right\n", Some("right")),
            ("\x04\n", Some("")),
            ("a\x04b\n", Some("a\x04b")),
            ("half\x03\n", None),
            ("half\x1c\n", None),
        ] {
            let line = read_line(typed.as_bytes(), &keys).unwrap();
            assert_eq!(line.as_deref(), read.map(str::as_bytes), "{typed:?}");
        }
    }
}
