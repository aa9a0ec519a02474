//! Importing: a file system in a tar archive becomes an image of one layer, with a configuration from nothing but the
//! changes that are asked for.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::change::Change;
use crate::clock::{EpochError, build_time, timestamp};
use crate::commit::AddError;
use crate::digest::Digest;
use crate::load::{LoadError, unpack_file};
use crate::merge::MergeError;
use crate::reference::Reference;
use crate::store::{ImageRecord, Store, StoreError};

/// Why nothing was imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The archive cannot be read.
    #[error(transparent)]
    Source(#[from] LoadError),
    /// The image would have no time.
    #[error(transparent)]
    Epoch(#[from] EpochError),
    /// It is no file system.
    #[error("cannot import it as a layer")]
    Layer(#[from] AddError),
    /// It has a hard link to a file that it has not.
    #[error("cannot import it as a file system")]
    Merge(#[from] MergeError),
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Makes an image of the file system in a tar archive (plain, gzip or zstd; a pipe too).
    pub fn import(
        &self,
        archive: &Path,
        name: Option<&Reference>,
        changes: &[Change],
        message: &str,
    ) -> Result<Digest, ImportError> {
        let result = self.import_held(archive, name, changes, message);
        let swept = self.sweep();
        let id = result?;
        swept?;
        Ok(id)
    }

    fn import_held(
        &self,
        archive: &Path,
        name: Option<&Reference>,
        changes: &[Change],
        message: &str,
    ) -> Result<Digest, ImportError> {
        let created = timestamp(build_time()?);
        let _hold = self.hold()?;
        let read = |source| LoadError::Read { path: archive.to_owned(), source };
        let file = File::open(archive).map_err(read)?;
        let kind = file.metadata().map_err(read)?.file_type();
        if kind.is_char_device() || kind.is_block_device() {
            return Err(read(io::Error::other("it is a device, which has no end")).into());
        }
        let mut file = unpack_file(archive, file, self)?;
        io::Seek::rewind(&mut file).map_err(read)?;
        let layer = self.add_archive(file)?;
        let config = config(changes, layer.diff_id, message, &created).to_string();
        let id = self.put_blob(config.as_bytes())?;
        let names = name.iter().map(ToString::to_string).collect();
        let records =
            vec![ImageRecord { id, manifest: None, digests: Vec::new(), names, layers: vec![layer] }];
        self.merge_records(&records)?;
        self.commit(records)?;
        Ok(id)
    }
}

fn config(changes: &[Change], diff_id: Digest, message: &str, created: &str) -> Value {
    let mut config = Map::from_iter([("Env".to_owned(), json!([]))]);
    Change::apply_all(changes, &mut config);
    json!({
        "architecture": "amd64",
        "os": "linux",
        "created": created,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": created, "created_by": "cloche import", "comment": message}],
    })
}
