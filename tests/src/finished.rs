//! A finished child's exit status and outputs, and what a story may expect of them.

use std::fmt;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use anyhow::{Result, ensure};

/// Everything a finished child left.
#[derive(Debug)]
pub struct Finished {
    /// The command line, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// The exit code, or 128 + the signal, as a shell has it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Expects this exit code.
    pub fn exits_with(self, code: i32) -> Result<Self> {
        ensure!(self.code() == code, "expected exit code {code}\n{self}");
        Ok(self)
    }

    /// Expects exit code 0.
    pub fn succeeds(self) -> Result<Self> {
        self.exits_with(0)
    }

    /// Expects exactly this on standard output.
    pub fn prints(self, text: &str) -> Result<Self> {
        ensure!(self.out() == text, "expected {text:?} on stdout\n{self}");
        Ok(self)
    }

    /// Expects this somewhere on standard output.
    pub fn prints_some(self, text: &str) -> Result<Self> {
        ensure!(self.out().contains(text), "expected {text:?} in stdout\n{self}");
        Ok(self)
    }

    /// Expects this somewhere on standard error, in any case of letters.
    pub fn says(self, text: &str) -> Result<Self> {
        ensure!(
            self.err().to_lowercase().contains(&text.to_lowercase()),
            "expected {text:?} in stderr\n{self}"
        );
        Ok(self)
    }

    /// Expects nothing on standard error.
    pub fn says_nothing(self) -> Result<Self> {
        ensure!(self.stderr.is_empty(), "expected nothing on stderr\n{self}");
        Ok(self)
    }

    /// Expects a failure of cloche itself, in words, whatever the exit code's number.
    pub fn refused(self) -> Result<Self> {
        let code = self.code();
        ensure!([1, 2, 125].contains(&code), "expected to be refused\n{self}");
        self.refused_with(code)
    }

    /// Expects a failure of cloche itself: this exit code and a message of its own, without a panic's traces.
    pub fn refused_with(self, code: i32) -> Result<Self> {
        let finished = self.exits_with(code)?;
        let own_words = finished.err().lines().any(|line| line.starts_with("cloche: "));
        // Usage errors (2) are worded by the argument parser.
        ensure!(own_words || code == 2, "expected a line that starts with \"cloche: \"\n{finished}");
        for trace in ["panicked at", "RUST_BACKTRACE"] {
            ensure!(!finished.err().contains(trace), "the error is a panic\n{finished}");
        }
        Ok(finished)
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}\n{}", self.command, self.status, show_outputs(&self.stdout, &self.stderr))
    }
}

/// Both outputs as text, cut to what helps in a message.
pub fn show_outputs(stdout: &[u8], stderr: &[u8]) -> String {
    format!("--- stdout {}\n--- stderr {}", excerpt(stdout), excerpt(stderr))
}

/// At most 4 KiB: the beginning and the end.
fn excerpt(bytes: &[u8]) -> String {
    const HALF: usize = 2048;
    let text = |part: &[u8]| String::from_utf8_lossy(part).into_owned();
    if bytes.len() <= 2 * HALF {
        return format!("({} bytes)\n{}", bytes.len(), text(bytes));
    }
    let (head, tail) = (&bytes[..HALF], &bytes[bytes.len() - HALF..]);
    format!("({} bytes)\n{}\n[…]\n{}", bytes.len(), text(head), text(tail))
}
