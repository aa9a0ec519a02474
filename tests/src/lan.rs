//! A network namespace of a test's own, with the host's end of a guest's network in it.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::bed::Bed;
use crate::finished::Finished;
use crate::process::{Input, Running};

/// The namespace. It is gone when this is dropped: a process holds it, and nothing else does.
#[derive(Debug)]
pub struct Lan<'a> {
    bed: &'a Bed<'a>,
    holder: Running,
}

impl<'a> Lan<'a> {
    /// A namespace in which this script, run by `sh -eu`, has set up what is needed.
    pub fn new(bed: &'a Bed<'a>, set_up: &str) -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-euc"]);
        command.arg(format!("ip link set lo up\n{set_up}\necho set up\nexec cat"));
        let holder = Running::start(command, &Input::Held, bed.deadline())?;
        holder.wait_for_stdout("set up")?;
        Ok(Self { bed, holder })
    }

    /// One with the tap `tap0`, 10.0.0.1/24.
    pub fn with_tap(bed: &'a Bed<'a>) -> Result<Self> {
        Self::new(
            bed,
            "ip tuntap add dev tap0 mode tap\n\
             ip address add 10.0.0.1/24 dev tap0\n\
             ip link set tap0 up",
        )
    }

    /// What to put in front of a command that is to run in here.
    pub fn prefix(&self) -> Vec<String> {
        ["nsenter", "--target", &self.holder.pid().as_raw_nonzero().to_string(), "--net", "--"]
            .map(str::to_owned)
            .to_vec()
    }

    /// Starts a command in here.
    pub fn start(&self, words: &[&str], input: &Input) -> Result<Running> {
        let prefix = self.prefix();
        let (program, rest) = prefix.split_first().context("a prefix has a program")?;
        let mut command = Command::new(program);
        command.args(rest).args(words);
        Running::start(command, input, self.bed.deadline())
    }

    /// Runs a script in here.
    pub fn sh(&self, script: &str) -> Result<Finished> {
        self.start(&["sh", "-euc", script], &Input::Null)?.wait()
    }
}
