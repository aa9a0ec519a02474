//! Messages for people on stderr, and for engines in a file.

use std::{
    cell::RefCell,
    fs::{File, OpenOptions},
    io::Write,
    process::ExitCode,
};

use cloche_oci::Error;
use serde::Serialize;

use super::arguments::{Global, LogFormat};

/// Where messages go.
pub struct Log {
    /// Of this runtime.
    name: &'static str,
    file: Option<RefCell<File>>,
    is_json: bool,
    is_debug: bool,
}

/// A line of the log, with the names that engines look for.
#[derive(Serialize)]
struct Line<'a> {
    level: &'a str,
    msg: &'a str,
    time: String,
}

impl Log {
    /// For the runtime of this name, with no file.
    pub fn of(name: &'static str) -> Self {
        Self { name, file: None, is_json: false, is_debug: false }
    }

    pub fn open(name: &'static str, global: &Global) -> Result<Self, Error> {
        let file = match &global.log {
            None => None,
            Some(path) => {
                let file = OpenOptions::new().append(true).create(true).open(path);
                Some(file.map_err(|source| Error::File {
                    action: "open the log",
                    path: path.clone(),
                    source,
                })?)
            }
        };
        Ok(Self {
            name,
            file: file.map(RefCell::new),
            is_json: global.log_format == LogFormat::Json,
            is_debug: global.debug,
        })
    }

    /// Says why the command failed; its exit code.
    pub fn fail(&self, error: &Error, code: u8) -> ExitCode {
        let message = cloche_oci::chain(error);
        eprintln!("{}: {message}", self.name);
        self.write("error", &message);
        ExitCode::from(code)
    }

    /// With a log, stderr is the container's, as engines call this; its output is not the place for a warning.
    pub fn warn(&self, message: &str) {
        if self.file.is_none() {
            eprintln!("{}: warning: {message}", self.name);
        }
        self.write("warning", message);
    }

    pub fn debug(&self, message: impl FnOnce() -> String) {
        if self.is_debug {
            let message = message();
            if self.file.is_none() {
                eprintln!("{}", self.line("debug", &message));
            }
            self.write("debug", &message);
        }
    }

    fn line(&self, level: &str, message: &str) -> String {
        let line = Line { level, msg: message, time: cloche_oci::time::now() };
        if self.is_json {
            serde_json::to_string(&line).unwrap_or_default()
        } else {
            format!("time={:?} level={level} msg={message:?}", line.time)
        }
    }

    fn write(&self, level: &str, message: &str) {
        if let Some(file) = &self.file {
            // A log that cannot be written to is no reason to fail.
            let _ = writeln!(file.borrow_mut(), "{}", self.line(level, message));
        }
    }
}
