//! What steps of builds have made, so that the next build need not make it again.
//!
//! A record's name is the step's key: a digest of all that its result depends on. A record that is torn, or whose layer
//! is gone, is none. Its file's time is when it was last of use.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::files::NewFile;
use super::{LayerRecord, Store, StoreError, io_error, read_bounded};
use crate::digest::Digest;

/// Bytes of one record, of which there are some 300.
const MAX_RECORD_BYTES: u64 = 64 << 10;

/// The result of one step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StepRecord {
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// What it made, if it made files.
    pub(crate) layer: Option<LayerRecord>,
}

/// What the records and their layers take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct StepUsage {
    /// Records.
    pub steps: usize,
    /// Bytes of layers that no image has.
    pub bytes: u64,
}

impl Store {
    fn steps(&self) -> PathBuf {
        self.root.join("steps")
    }

    /// The result of the step with this key, if it is known and all of it is there.
    pub(crate) fn read_step(&self, key: Digest) -> Option<StepRecord> {
        let path = self.steps().join(key.hex());
        let record: StepRecord = serde_json::from_slice(&read_bounded(&path, MAX_RECORD_BYTES).ok()?).ok()?;
        if let Some(layer) = &record.layer {
            let metadata = fs::metadata(self.layer_path(layer.diff_id)).ok()?;
            if metadata.len() != layer.erofs_bytes {
                return None;
            }
            layer.blob.filter(|blob| self.has_archive(layer.diff_id, blob))?;
        }
        // For a prune that keeps what is in use; if it fails, the record only looks older.
        let _ = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        Some(record)
    }

    /// Writes a result down, in the place of an older one. Not brought to disk: what is lost is made again.
    pub(crate) fn write_step(&self, key: Digest, record: &StepRecord) -> Result<(), StoreError> {
        let path = self.steps().join(key.hex());
        let written = || {
            fs::create_dir_all(self.steps())?;
            let new = NewFile::create(&self.steps())?;
            new.file().write_all(&serde_json::to_vec(record)?)?;
            new.put(&key.hex())
        };
        written().map_err(io_error("write", &path))
    }

    /// The layers of all results.
    pub(super) fn step_layers(&self) -> Result<Vec<LayerRecord>, StoreError> {
        let mut layers = Vec::new();
        for path in self.step_files()? {
            let record = read_bounded(&path, MAX_RECORD_BYTES)
                .ok()
                .and_then(|content| serde_json::from_slice::<StepRecord>(&content).ok());
            layers.extend(record.and_then(|record| record.layer));
        }
        Ok(layers)
    }

    fn step_files(&self) -> Result<Vec<PathBuf>, StoreError> {
        let directory = self.steps();
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            result => result.map_err(io_error("list", &directory))?,
        };
        let paths = entries.map(|entry| entry.map(|entry| entry.path()));
        paths.collect::<Result<_, _>>().map_err(io_error("list", &directory))
    }

    /// What the results take.
    pub fn step_usage(&self) -> Result<StepUsage, StoreError> {
        let layers = self.step_layers()?;
        let images = self.records()?;
        let mut seen: HashSet<Digest> =
            images.iter().flat_map(|image| &image.layers).map(|layer| layer.diff_id).collect();
        let own = layers.iter().filter(|layer| seen.insert(layer.diff_id));
        let bytes = own.map(|layer| layer.erofs_bytes).sum();
        Ok(StepUsage { steps: self.step_files()?.len(), bytes })
    }

    /// Forgets all results. Their layers go with the next sweep, which this tries.
    pub fn prune_steps(&self) -> Result<StepUsage, StoreError> {
        let usage = self.step_usage()?;
        for path in self.step_files()? {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("delete", &path)(error));
                }
                _ => {}
            }
        }
        self.sweep()?;
        Ok(usage)
    }
}
