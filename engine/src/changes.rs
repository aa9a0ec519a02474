//! What a sandbox has written to its root file system, as an OCI layer's tar archive, the same under both isolations.
//!
//! ```text
//!              container                           VM
//!   running    its monitor's descriptor of the     the guest's agent sends it
//!              writable layer, by /proc
//!   at its end the monitor reads it the same way, before anything is removed: [`Running::changes`]
//!   ended      `changes.tar` in its directory, for a sandbox that was not to be removed
//! ```
//!
//! What a VM sends is a guest's word, and what a container has written may be as hostile: whoever takes the archive in
//! checks it as a layer that came from anywhere.
//!
//! [`Running::changes`]: crate::isolation::Running::changes

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::AsFd,
    path::Path,
};

use cloche_images::{RootError, Store};
use cloche_vmm::control::api::RunState;

use crate::{
    isolation::vm,
    record::{Record, State},
    sandboxes::{SandboxError, Sandboxes},
    steering::{Activity, Steered, SteeringError},
};

/// The changes of an ended sandbox, in its directory.
pub(crate) const SAVED: &str = "changes.tar";
/// The most that is kept of one sandbox, unless half of what is free is less.
const MOST_SAVED_BYTES: u64 = 1 << 30;
/// Read and written at once.
const PIECE_BYTES: usize = 256 << 10;

/// Why there are no changes to read.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// There is no such sandbox, or its record is in the way.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// It could not be stopped, or asked.
    #[error(transparent)]
    Steering(#[from] SteeringError),
    /// It has just been started.
    #[error("sandbox {0} is starting; try again")]
    Starting(String),
    /// The guest's agent stands still with the rest of it.
    #[error("sandbox {0} is paused, and so is the agent in its guest; `cloche unpause` it first")]
    PausedVm(String),
    /// Nothing was kept when it ended.
    #[error("the changes of sandbox {0} were not kept when it ended")]
    NotKept(String),
    /// Its root is not one of layers.
    #[error("sandbox {0} has no writable layer that can be reached")]
    Unreachable(String),
    /// They cannot be read.
    #[error("cannot read what sandbox {id} has written")]
    Read {
        /// The sandbox.
        id: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A layer's archive, as it is read, and the sandbox that it is of. What was stopped for it goes on once this is dropped.
pub struct Changes {
    /// The sandbox, as it was when this was opened.
    pub record: Record,
    archive: Box<dyn Read + Send>,
    paused: Option<Steered>,
}

impl Read for Changes {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.archive.read(buffer)
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        if let Some(steered) = &self.paused {
            // If it has ended meanwhile, there is nobody to go on.
            let _ = steered.resume();
        }
    }
}

impl Sandboxes {
    /// Opens the changes of a sandbox that runs or has ended. With `pause`, nothing in it moves until they are read.
    pub fn changes(&self, reference: &str, pause: bool) -> Result<Changes, ChangesError> {
        let record = self.find(reference)?.record;
        let id = record.id.clone();
        let dir = self.sandbox_dir(&id);
        let failed = |source| ChangesError::Read { id: id.clone(), source };
        let processes = match record.state {
            State::Starting => return Err(ChangesError::Starting(id)),
            State::Running(processes) => processes,
            State::Exited(_) => {
                let archive = match File::open(dir.join(SAVED)) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        return Err(ChangesError::NotKept(id));
                    }
                    opened => opened.map_err(failed)?,
                };
                return Ok(Changes { record, archive: Box::new(archive), paused: None });
            }
        };
        let steered = self.steer(&id)?;
        if steered.is_vm() {
            let machine = steered.machine()?;
            if matches!(machine.state, RunState::Pausing | RunState::Paused) {
                return Err(ChangesError::PausedVm(id));
            }
            // The agent stops its container only, or it could not answer.
            let most = vm::changes::most_bytes(machine.memory_mib);
            let archive = vm::changes::ask(&dir, pause, most).map_err(failed)?;
            return Ok(Changes { record, archive: Box::new(archive), paused: None });
        }
        let descriptor = processes.writable.ok_or_else(|| ChangesError::Unreachable(id.clone()))?;
        let path = format!("/proc/{}/fd/{descriptor}", record.monitor.pid);
        let base = File::open(path).map_err(failed)?;
        // Looked at after it was opened: a number that belongs to another process now has led elsewhere.
        if !record.monitor.is_alive() {
            return Err(failed(io::Error::other("it has just ended")));
        }
        let was_paused = steered.activity() == Activity::Paused;
        let paused = if pause && !was_paused { steered.pause().map(|()| Some(steered))? } else { None };
        let archive = cloche_runtime::Changes::of_base(base.as_fd());
        let mut changes = Changes { record, archive: Box::new(io::empty()), paused };
        changes.archive = Box::new(archive.map_err(failed)?);
        Ok(changes)
    }
}

/// Why a sandbox is not exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// What it has written cannot be read.
    #[error(transparent)]
    Changes(#[from] ChangesError),
    /// It cannot be put on the sandbox's image.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The archive cannot be made or written.
    #[error("cannot write the sandbox's root")]
    Write(#[source] io::Error),
}

/// Writes a sandbox's whole root file system, without what is mounted on it, as a tar archive.
pub fn export(
    sandboxes: &Sandboxes,
    store: &Store,
    reference: &str,
    pause: bool,
    output: &mut dyn Write,
) -> Result<(), ExportError> {
    let changes = sandboxes.changes(reference, pause)?;
    let image = changes.record.image_id.clone();
    // With the end of its changes, the sandbox goes on.
    let root = store.root_of_sandbox(&image, changes)?;
    root.write_archive(output).map_err(ExportError::Write)?;
    Ok(())
}

/// Keeps a sandbox's changes in its directory, to be read after its end. They must leave as much room as they take, and
/// there may be many such sandboxes, since the directory may lie in memory.
pub(crate) fn save(dir: &Path, archive: &mut dyn Read) -> io::Result<()> {
    let staging = dir.join(format!(".{SAVED}"));
    let saved = File::create(&staging).and_then(|file| {
        let space = rustix::fs::fstatvfs(&file)?;
        let half = space.f_bavail.saturating_mul(space.f_frsize) / 2;
        copy(archive, &file, half.min(MOST_SAVED_BYTES))?;
        std::fs::rename(&staging, dir.join(SAVED))
    });
    if saved.is_err() {
        let _ = std::fs::remove_file(&staging);
    }
    saved
}

fn copy(from: &mut dyn Read, mut to: &File, most_bytes: u64) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut left = most_bytes;
    loop {
        let count = from.read(&mut piece)?;
        if count == 0 {
            return Ok(());
        }
        left = left.checked_sub(count as u64).ok_or_else(|| {
            io::Error::other(format!(
                "they are more than the {} MiB that one sandbox may take here",
                most_bytes >> 20
            ))
        })?;
        to.write_all(piece.get(..count).unwrap_or_default())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_that_leave_no_room_are_not_kept() {
        let file = tempfile::tempfile().unwrap();
        assert!(copy(&mut &b"abc"[..], &file, 3).is_ok());
        let error = copy(&mut io::repeat(0), &file, 1 << 20).unwrap_err();
        assert_eq!(error.to_string(), "they are more than the 1 MiB that one sandbox may take here");
    }

    #[test]
    fn changes_that_cannot_be_read_leave_nothing() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::UnexpectedEof.into())
            }
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(save(dir.path(), &mut Broken).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        save(dir.path(), &mut &b"abc"[..]).unwrap();
        assert_eq!(std::fs::read(dir.path().join(SAVED)).unwrap(), b"abc");
    }
}
