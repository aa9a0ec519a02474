//! The bed a test works in: a state directory of its own, the shared image store, one isolation, one deadline.
//!
//! The bed also looks after itself: it notes what is on the host before the test and reports what is new after.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::{FileExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::finished::Finished;
use crate::image::Image;
use crate::leftovers::{self, Snapshot};
use crate::plain_user::{self, Ids};
use crate::process::{Input, Running};
use crate::sandbox::Sandbox;
use crate::world::{self, Isolation, Need, World};

/// One test's bed.
#[derive(Debug)]
pub struct Bed<'a> {
    world: &'a World,
    isolation: Isolation,
    /// Whose commands these are, if not root's.
    user: Option<Ids>,
    root: PathBuf,
    state: PathBuf,
    deadline: Cell<Instant>,
    before: Snapshot,
    keeps_records: Cell<bool>,
    scratch: TempDir,
}

impl<'a> Bed<'a> {
    /// Makes a bed.
    pub fn new(world: &'a World, isolation: Isolation) -> Result<Self> {
        // Short names: unix socket paths below the state directory end at 107 bytes.
        let scratch =
            tempfile::Builder::new().prefix("t").tempdir_in(world.scratch()).context("make a bed")?;
        Ok(Self {
            world,
            isolation,
            user: None,
            root: world.root.clone(),
            state: scratch.path().join("state"),
            deadline: Cell::new(Instant::now() + world.time_out),
            before: Snapshot::take(),
            keeps_records: Cell::new(false),
            scratch,
        })
    }

    /// A bed whose commands are a plain user's, with images of its own.
    pub fn of_plain_user(world: &'a World, isolation: Isolation, ids: Ids) -> Result<Self> {
        let user = world.plain_user()?;
        let bed = Self { user: Some(ids), root: user.root.clone(), ..Self::new(world, isolation)? };
        chown(bed.scratch(), Some(plain_user::ID), Some(plain_user::ID))?;
        Ok(bed)
    }

    /// The isolation under test.
    pub fn isolation(&self) -> Isolation {
        self.isolation
    }

    /// The surroundings.
    pub fn world(&self) -> &World {
        self.world
    }

    /// When every process of this test must have ended.
    pub fn deadline(&self) -> Instant {
        self.deadline.get()
    }

    /// A directory of this test alone.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// This span, stretched to the host's slowness.
    pub fn span(&self, milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds) * self.world.slowness
    }

    /// This many, or some that show the same, where an emulated processor takes minutes for them.
    pub fn many(&self, ordinarily: usize, emulated: usize) -> usize {
        if self.world.lacks(Need::RealProcessor) { emulated } else { ordinarily }
    }

    /// The same bed under the other isolation, for comparing the two.
    pub fn under(&self, isolation: Isolation) -> Result<Bed<'a>> {
        let bed = match self.user {
            Some(ids) => Bed::of_plain_user(self.world, isolation, ids)?,
            None => Bed::new(self.world, isolation)?,
        };
        bed.deadline.set(self.deadline());
        Ok(bed)
    }

    /// A bed with an empty image store in `root`.
    pub fn with_store(&self, root: &Path) -> Result<Bed<'a>> {
        let mut bed = self.under(self.isolation)?;
        bed.root = root.to_path_buf();
        Ok(bed)
    }

    /// A bed with its state in `state`.
    pub fn with_state(&self, state: &Path) -> Result<Bed<'a>> {
        let mut bed = self.under(self.isolation)?;
        bed.state = state.to_path_buf();
        Ok(bed)
    }

    /// A bed with an empty image store of its own.
    pub fn with_empty_store(&self) -> Result<Bed<'a>> {
        self.with_store(&self.scratch().join("store"))
    }

    /// `cloche` with this bed's directories, ready for a subcommand.
    pub fn cloche(&self) -> Command {
        let mut command = Command::new(&self.world.cloche);
        // The user's are there since the bed was made.
        if let Some(user) = self.user.and_then(|ids| self.world.plain_user().ok()?.command(ids).ok()) {
            command = user;
            command.env("HOME", self.scratch());
        }
        command.arg("--root").arg(&self.root).arg("--state").arg(&self.state);
        // A misspelt name is no reason to ask anybody outside.
        command.env("CLOCHE_PULL", "never");
        command
    }

    /// Runs any `cloche` command to its end.
    pub fn run(&self, words: &[&str]) -> Result<Finished> {
        self.start(words, &Input::Null)?.wait()
    }

    /// Starts any `cloche` command.
    pub fn start(&self, words: &[&str], input: &Input) -> Result<Running> {
        let mut command = self.cloche();
        command.args(words);
        Running::start(command, input, self.deadline())
    }

    /// A sandbox of a named image under this bed's isolation.
    pub fn sandbox(&'a self, image: &str) -> Sandbox<'a> {
        Sandbox::new(self, image)
    }

    /// A sandbox of the busybox image.
    pub fn busybox(&'a self) -> Sandbox<'a> {
        self.sandbox("busybox")
    }

    /// What a successful command prints as JSON.
    pub fn json(&self, words: &[&str]) -> Result<Value> {
        let finished = self.run(words)?.succeeds()?;
        serde_json::from_slice(&finished.stdout).with_context(|| format!("not JSON\n{finished}"))
    }

    /// The records of `cloche ps -a`.
    pub fn records(&self) -> Result<Vec<Record>> {
        let printed = self.json(&["ps", "-a", "--json"])?;
        let records =
            printed.as_array().with_context(|| format!("`ps -a --json` is not an array: {printed}"))?;
        records.iter().map(Record::read).collect()
    }

    /// The record of that name, if there is one.
    pub fn record(&self, name: &str) -> Result<Option<Record>> {
        Ok(self.records()?.into_iter().find(|record| record.name.as_deref() == Some(name)))
    }

    /// Says that this test leaves records on purpose; they are removed, and that is checked.
    pub fn keeps_records(&self) {
        self.keeps_records.set(true);
    }

    /// Writes a file into the bed's directory.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.scratch().join(name);
        fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// Loads a file or directory as an image.
    pub fn load(&self, name: &str, from: &Path) -> Result<Finished> {
        self.run(&["image", "load", "--name", name, &from.to_string_lossy()])
    }

    /// The names in the image store.
    pub fn image_names(&self) -> Result<Vec<String>> {
        world::names_in(&self.json(&["image", "ls", "--json"])?)
    }

    /// Loads a generated image for the time of the test.
    pub fn generate(&'a self, name: &str, image: &Image) -> Result<Loaded<'a>> {
        let archive = self.write(&format!("{name}.tar"), &image.to_docker_archive(name))?;
        self.load(name, &archive)?.succeeds()?;
        fs::remove_file(archive)?;
        Ok(Loaded { bed: self, name: name.to_owned() })
    }

    /// The static busybox of the `busybox` image, fetched once per run through a container.
    pub fn busybox_binary(&'a self) -> Result<&'static [u8]> {
        static BINARY: OnceLock<Vec<u8>> = OnceLock::new();
        if let Some(binary) = BINARY.get() {
            return Ok(binary);
        }
        let container = self.busybox().isolation(Some(Isolation::Container.as_str()));
        let fetched = container.command(&["cat", "/bin/busybox"]).run()?.succeeds()?.stdout;
        ensure!(fetched.starts_with(b"\x7fELF"), "/bin/busybox of the busybox image is not a program");
        Ok(BINARY.get_or_init(|| fetched))
    }

    /// Where the image store is.
    pub fn store_root(&self) -> &Path {
        &self.root
    }

    /// Every file of the image store with its size, lock files aside.
    pub fn store_listing(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let mut pending = vec![self.root.clone()];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten() {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    pending.push(entry.path());
                } else if !entry.file_name().to_string_lossy().ends_with("lock") {
                    found.push(format!("{} {}", entry.path().display(), entry.metadata()?.len()));
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// The largest layer in the image store: an EROFS file, as a VM gets it.
    pub fn largest_layer(&self) -> Result<PathBuf> {
        // Linux `fs/erofs/erofs_fs.h`.
        const MAGIC: [u8; 4] = 0xe0f5_e1e2u32.to_le_bytes();
        let listing = self.store_listing()?;
        let files = listing.iter().filter_map(|line| Some(PathBuf::from(line.rsplit_once(' ')?.0)));
        let layers = files.filter(|path| {
            let mut magic = [0; 4];
            let read = fs::File::open(path).and_then(|file| file.read_exact_at(&mut magic, 1024));
            read.is_ok() && magic == MAGIC
        });
        let size = |path: &PathBuf| fs::metadata(path).map_or(0, |metadata| metadata.len());
        layers.max_by_key(size).context("the store has no layer")
    }

    /// Every file in the state directory.
    pub fn state_files(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut pending = vec![self.state.clone()];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten() {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    pending.push(entry.path())
                } else {
                    found.push(entry.path())
                }
            }
        }
        Ok(found)
    }

    /// What is new on the host since the bed was made.
    pub fn leftovers(&self) -> Vec<String> {
        self.before.new_since(self.span(2000), "")
    }

    /// The new processes among them, and no wait for what else may be there.
    pub fn processes_left(&self) -> Vec<String> {
        self.before.new_since(self.span(2000), "process")
    }

    /// Expects nothing new on the host.
    pub fn is_clean(&self) -> Result<()> {
        let left = self.leftovers();
        ensure!(left.is_empty(), "left on the host:\n  {}", left.join("\n  "));
        Ok(())
    }

    /// Looks for leftovers after the test, removes kept records, looks again.
    pub fn check_out(&self) -> Result<()> {
        // A story that ran out of time does not take the time for this as well.
        self.deadline.set(Instant::now() + self.world.time_out);
        let left = self.leftovers();
        if !left.is_empty() {
            leftovers::kill_processes();
        }
        ensure!(left.is_empty(), "left on the host:\n  {}", left.join("\n  "));
        if !self.state.exists() {
            return Ok(());
        }
        let records = self.records()?;
        ensure!(
            records.is_empty() || self.keeps_records.get(),
            "records left though the sandboxes were to be removed: {records:?}"
        );
        for record in &records {
            self.run(&["rm", "-f", &record.id])?.succeeds()?;
        }
        let files = leftovers::in_state_directory(&self.state);
        ensure!(files.is_empty(), "left in the state directory:\n  {}", files.join("\n  "));
        self.is_clean()
    }
}

/// What `cloche ps --json` says about one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The sandbox's id.
    pub id: String,
    /// Its name, if it was given one.
    pub name: Option<String>,
    /// What it was seen to be.
    pub isolation: Option<String>,
    /// `starting`, `running`, `exited`, …
    pub status: String,
    /// How it ended, once it has.
    pub exit_code: Option<i64>,
}

impl Record {
    fn read(value: &Value) -> Result<Self> {
        let text = |field: &str| value[field].as_str().map(str::to_owned);
        Ok(Self {
            id: text("id").with_context(|| format!("a record without id: {value}"))?,
            name: text("name"),
            isolation: text("isolation"),
            status: text("status").with_context(|| format!("a record without status: {value}"))?,
            exit_code: value["exit_code"].as_i64(),
        })
    }
}

/// A generated image, removed from the store when this is dropped.
#[derive(Debug)]
pub struct Loaded<'a> {
    bed: &'a Bed<'a>,
    name: String,
}

impl Loaded<'_> {
    /// A sandbox of this image.
    pub fn sandbox(&self) -> Sandbox<'_> {
        self.bed.sandbox(&self.name)
    }
}

impl Drop for Loaded<'_> {
    fn drop(&mut self) {
        let _ = self.bed.run(&["image", "rm", &self.name]);
    }
}
