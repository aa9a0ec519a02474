//! `cloche run …`, put together word by word.

use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus};

use anyhow::{Context as _, Result, ensure};

use crate::bed::Bed;
use crate::finished::Finished;
use crate::process::{Input, Running};

/// A sandbox about to be started. It is removed at its end (`--rm`) unless [`Sandbox::kept`].
#[derive(Debug, Clone)]
pub struct Sandbox<'a> {
    bed: &'a Bed<'a>,
    image: String,
    options: Vec<String>,
    isolation: Option<&'static str>,
    kept: bool,
    input: Input,
    longest_output: usize,
    command: Vec<String>,
}

impl<'a> Sandbox<'a> {
    pub(crate) fn new(bed: &'a Bed<'a>, image: &str) -> Self {
        Self {
            bed,
            image: image.to_owned(),
            options: Vec::new(),
            isolation: Some(bed.isolation().as_str()),
            kept: false,
            input: Input::Null,
            longest_output: usize::MAX,
            command: Vec::new(),
        }
    }

    /// Passes `--isolation` as given, or leaves it to the default.
    pub fn isolation(mut self, isolation: Option<&'static str>) -> Self {
        self.isolation = isolation;
        self
    }

    /// Adds one word before the image.
    pub fn option(mut self, word: &str) -> Self {
        self.options.push(word.to_owned());
        self
    }

    /// Adds an option and its value.
    pub fn with(self, option: &str, value: &str) -> Self {
        self.option(option).option(value)
    }

    /// Keeps the record after the end, under this name.
    pub fn kept(mut self, name: &str) -> Self {
        self.kept = true;
        self.with("--name", name)
    }

    /// Feeds these bytes to the process's stdin.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self.option("-i")
    }

    /// Holds the process's stdin open.
    pub fn held_input(mut self) -> Self {
        self.input = Input::Held;
        self.option("-i")
    }

    /// Feeds bytes to `cloche run` without `-i`: the process must not get them.
    pub fn input_without_i(mut self, bytes: &[u8]) -> Self {
        self.input = Input::Bytes(bytes.to_vec());
        self
    }

    /// Closes stdout's reading end after this many bytes.
    pub fn output_closed_after(mut self, bytes: usize) -> Self {
        self.longest_output = bytes;
        self
    }

    /// Sets the command.
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Sets a shell script as the command.
    pub fn sh(self, script: &str) -> Self {
        self.command(&["sh", "-c", script])
    }

    /// Starts it and comes back at once.
    pub fn start(self) -> Result<Running> {
        Running::start_reading(self.to_command(), &self.input, self.longest_output, self.bed.deadline())
    }

    /// Runs it to its end.
    pub fn run(self) -> Result<Finished> {
        self.start()?.wait()
    }

    /// Runs these shell scripts one after the other in one sandbox, since a start takes longer than any of them, and
    /// gives what each of them left.
    pub fn each(self, scripts: &[&str]) -> Result<Vec<Finished>> {
        // Behind each script its exit code stands between two separators, and one separator on standard error.
        const EACH: &str = r#"for script; do
            sh -c "$script" </dev/null; printf '\036%s\036' $?; printf '\036' >&2
        done"#;
        let words = [&["sh", "-c", EACH, "sh"], scripts].concat();
        let all = self.command(&words).run()?.succeeds()?;
        let parts = |bytes: &[u8]| -> Vec<Vec<u8>> {
            bytes.split(|byte| *byte == 0o36).map(<[u8]>::to_vec).collect()
        };
        let (stdout, stderr) = (parts(&all.stdout), parts(&all.stderr));
        ensure!(
            stdout.len() == 2 * scripts.len() + 1 && stderr.len() == scripts.len() + 1,
            "not all of {scripts:?} ran to their ends\n{all}"
        );
        let results = scripts.iter().zip(stdout.chunks_exact(2)).zip(stderr);
        results
            .map(|((script, stdout), stderr)| {
                let code: i32 = String::from_utf8_lossy(&stdout[1]).parse().context("an exit code")?;
                let (status, stdout) = (ExitStatus::from_raw(code << 8), stdout[0].clone());
                Ok(Finished { command: format!("`{script}`"), status, stdout, stderr })
            })
            .collect()
    }

    fn to_command(&self) -> Command {
        let mut command = self.bed.cloche();
        command.arg("run");
        if let Some(isolation) = self.isolation {
            command.args(["--isolation", isolation]);
        }
        if !self.kept {
            command.arg("--rm");
        }
        command.args(&self.options).arg(&self.image).args(&self.command);
        command
    }
}
