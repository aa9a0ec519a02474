//! Who is measured, and by which command line.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bundle::Bundle;

/// One way to run busybox.
#[derive(Debug)]
pub struct Contender {
    /// Name in the table and in JSON.
    pub name: &'static str,
    /// Whether the first byte of output is timed, too. The process then prints one line.
    pub prints: bool,
    program: PathBuf,
    arguments: Vec<String>,
    /// Runtimes without a state of their own per run get the run's number as container id.
    numbered: bool,
    runs: u32,
}

impl Contender {
    fn new(name: &'static str, program: &Path, arguments: &[&str]) -> Self {
        Self {
            name,
            prints: false,
            program: program.to_path_buf(),
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            numbered: false,
            runs: 0,
        }
    }

    /// The command of the next run.
    pub fn next_command(&mut self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        if self.numbered {
            command.arg(format!("cloche-bench-{}-{}", std::process::id(), self.runs));
        }
        self.runs += 1;
        command
    }

    /// `cloche run` under an isolation, printing a line.
    pub fn cloche_echo(name: &'static str, cloche: &Path, isolation: &str) -> Self {
        let arguments = ["run", "--isolation", isolation, "--rm", "busybox", "echo", "hi"];
        Self { prints: true, ..Self::new(name, cloche, &arguments) }
    }

    /// `cloche run` under an isolation, with a trace on stderr.
    pub fn cloche_traced(name: &'static str, cloche: &Path, isolation: &str) -> Self {
        let arguments = ["run", "--isolation", isolation, "--rm", "--trace=json", "busybox", "echo", "hi"];
        Self { prints: true, ..Self::new(name, cloche, &arguments) }
    }

    /// `cloche run` under an isolation, silent.
    pub fn cloche_true(name: &'static str, cloche: &Path, isolation: &str) -> Self {
        Self::new(name, cloche, &["run", "--isolation", isolation, "--rm", "busybox", "true"])
    }

    /// Another OCI runtime on the bundle, with its state in `state`.
    pub fn peer(name: &'static str, program: &Path, bundle: &Bundle, state: &Path) -> Self {
        let (state, bundle) = (state.to_string_lossy(), bundle.directory().to_string_lossy());
        let arguments = ["--root", &state, "run", "--bundle", &bundle];
        Self { numbered: true, ..Self::new(name, program, &arguments) }
    }

    /// No isolation at all: spawn and exec.
    pub fn process(name: &'static str, bundle: &Bundle) -> Self {
        Self::new(name, &bundle.busybox(), &["true"])
    }
}

/// The program of that name on `PATH`, or in the directories that root's own programs are in.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}
