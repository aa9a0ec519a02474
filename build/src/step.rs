//! A RUN's own process: it is the monitor of the step's sandbox, and so ends whatever becomes of the build.
//!
//! ```text
//!  build ──▶ stdin: a nameless file with the work in it ──▶ step ──▶ the same file: a report, and the changes
//!        ◀── stdout, stderr: what the command says
//! ```
//!
//! The file is both ways in one, since a process gets no other descriptor without code that is not safe.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use cloche_engine::home::Home;
use cloche_engine::mounts::{MountRequest, MountSource};
use cloche_engine::request::{Isolation, RunRequest};
use cloche_engine::run;
use cloche_engine::trace::Trace;
use cloche_images::{Bounded, Store, StoredLayer};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The first argument of such a process; the second is the build's process id.
pub const WORD: &str = "build-step";
/// The sandbox's host name: the same each time, for what a command makes of it.
const HOSTNAME: &str = "build";

/// What is to be run.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) home: Home,
    pub(crate) isolation: Isolation,
    pub(crate) words: Vec<String>,
    pub(crate) env: Vec<String>,
    /// A file with more of it, a list in JSON.
    pub(crate) secrets: Option<PathBuf>,
    pub(crate) config: Value,
    pub(crate) layers: Vec<StoredLayer>,
    pub(crate) mounts: Vec<MountRequest>,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) kernel: Option<PathBuf>,
}

/// How it ended.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The command ended. Its changes follow.
    Exited {
        /// As a shell has it.
        code: u8,
        out_of_memory: bool,
    },
    /// It did not run.
    Failed(String),
}

/// [`Work`], as it is written.
#[derive(Serialize, Deserialize)]
struct Wire {
    images: PathBuf,
    state: PathBuf,
    isolation: Isolation,
    words: Vec<String>,
    env: Vec<String>,
    secrets: Option<PathBuf>,
    config: Value,
    layers: Vec<StoredLayer>,
    mounts: Vec<WireMount>,
    memory_bytes: Option<u64>,
    kernel: Option<PathBuf>,
}

/// A mount: a path of this machine, or options of a tmpfs.
#[derive(Serialize, Deserialize)]
struct WireMount {
    target: String,
    read_only: bool,
    path: Option<PathBuf>,
    options: Vec<String>,
}

pub(crate) fn write_work(mut file: &File, work: &Work) -> io::Result<()> {
    let mounts = work.mounts.iter().map(|mount| {
        let (path, options) = match &mount.source {
            MountSource::Bind { path, .. } => (Some(path.clone()), Vec::new()),
            MountSource::Tmpfs { options } => (None, options.clone()),
            MountSource::Volume { .. } => (None, Vec::new()),
        };
        WireMount { target: mount.target.clone(), read_only: mount.read_only, path, options }
    });
    let wire = Wire {
        images: work.home.images().to_owned(),
        state: work.home.state().to_owned(),
        isolation: work.isolation,
        words: work.words.clone(),
        env: work.env.clone(),
        secrets: work.secrets.clone(),
        config: work.config.clone(),
        layers: work.layers.clone(),
        mounts: mounts.collect(),
        memory_bytes: work.memory_bytes,
        kernel: work.kernel.clone(),
    };
    file.write_all(&serde_json::to_vec(&wire)?)?;
    file.rewind()
}

/// The report; the file stays where the changes start.
pub(crate) fn read_report(file: &File) -> io::Result<Report> {
    let mut file = file.try_clone()?;
    file.rewind()?;
    let mut line = Vec::new();
    let read = BufReader::new((&file).take(64 << 10)).read_until(b'\n', &mut line)?;
    let report = serde_json::from_slice(&line)?;
    // The changes lie behind it: everything is moved to the front.
    let mut rest = file.try_clone()?;
    rest.seek(io::SeekFrom::Start(read as u64))?;
    move_to_front(&rest, read as u64)?;
    Ok(report)
}

/// Takes the first `skip` bytes away from a file.
fn move_to_front(file: &File, skip: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let length = file.metadata()?.len();
    let mut piece = vec![0; 1 << 20];
    let mut at = skip;
    while at < length {
        let count = file.read_at(&mut piece, at)?;
        if count == 0 {
            break;
        }
        file.write_all_at(piece.get(..count).unwrap_or_default(), at - skip)?;
        at += count as u64;
    }
    file.set_len(length - skip)
}

/// The process. Its stdin is the file of the work.
pub fn main() -> ExitCode {
    // Whatever ends the build ends this, and with it the sandbox. It may have ended before this is said.
    let tied = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let parent = std::os::unix::process::parent_id().to_string();
    if tied.is_err() || std::env::args().nth(2) != Some(parent) {
        return ExitCode::FAILURE;
    }
    let Ok(file) = io::stdin().as_fd().try_clone_to_owned().map(File::from) else { return ExitCode::FAILURE };
    let worked = work(&file);
    let written = match worked {
        Ok(()) => Ok(()),
        Err(error) => report(&file, &Report::Failed(cloche_engine::chain(error.as_ref()))).map(|_| ()),
    };
    if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Starts the file anew with a report.
fn report(file: &File, report: &Report) -> io::Result<()> {
    let mut file = file.try_clone()?;
    file.set_len(0)?;
    file.rewind()?;
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    file.write_all(&line)
}

fn work(file: &File) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut text = Vec::new();
    let mut reader = file.try_clone()?;
    reader.read_to_end(&mut text)?;
    let wire: Wire = serde_json::from_slice(&text)?;
    let mut env = wire.env;
    if let Some(path) = wire.secrets {
        env.extend(serde_json::from_slice::<Vec<String>>(&std::fs::read(path)?)?);
    }
    let home = Home::new(Some(wire.images), Some(wire.state))?;
    let store = Store::open(home.images())?;
    let image = store.unnamed_image(&serde_json::to_vec(&wire.config)?, &wire.layers)?;
    let (entrypoint, command) = match wire.words.split_first() {
        Some((first, rest)) => (Some(first.clone()), rest.to_vec()),
        None => (None, Vec::new()),
    };
    let mounts = wire.mounts.into_iter().map(|mount| MountRequest {
        target: mount.target,
        read_only: mount.read_only,
        source: match mount.path {
            Some(path) => MountSource::Bind { path, create: false },
            None => MountSource::Tmpfs { options: mount.options },
        },
    });
    let request = RunRequest {
        image: "the layers so far".into(),
        isolation: wire.isolation,
        require: None,
        command,
        entrypoint,
        env,
        workdir: None,
        user: None,
        hostname: Some(HOSTNAME.into()),
        name: None,
        interactive: false,
        remove: true,
        read_only: false,
        mounts: mounts.collect(),
        memory_bytes: wire.memory_bytes,
        millicpus: None,
        pids: None,
        kernel: wire.kernel,
    };
    let mut changes = |exit: &cloche_engine::run::Exit, changes: &mut (dyn Read + Send)| {
        report(file, &Report::Exited { code: exit.status.shell_code(), out_of_memory: exit.oom_killed })?;
        if exit.status.shell_code() == 0 {
            let mut writer = BufWriter::with_capacity(1 << 20, Bounded::new(file.try_clone()?));
            io::copy(changes, &mut writer)?;
            writer.flush()?;
        }
        Ok(())
    };
    run::run_image_to(&home, &request, Some(&image), &mut Trace::default(), Some(&mut changes))?;
    Ok(())
}
