//! What a layer says, without its content: which files it has, and what of lower layers it hides.

use std::collections::BTreeMap;
use std::io::Read;

use super::convert::LayerError;
use super::decode;
use super::path::{Target, target};
use super::recipe::Recorded;
use crate::limits::{MAX_ENTRIES, MAX_TREE_BYTES};
use crate::tar::{EntryKind, TarReader, shown};

/// A path below the root, its components joined by `/`.
pub(crate) type LayerPath = Vec<u8>;

/// What a layer says.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    /// Its files and their sizes; a directory has none.
    pub(crate) entries: BTreeMap<LayerPath, Option<u64>>,
    /// What it removes.
    pub(crate) whiteouts: Vec<LayerPath>,
    /// Directories whose lower content it removes.
    pub(crate) opaque: Vec<LayerPath>,
}

/// Reads a layer through. Links within it are not followed: a name is what stands in the archive.
pub(crate) fn summarise(archive: impl Read + Send) -> Result<Summary, LayerError> {
    let (summary, _) = decode::decode(
        archive,
        |_| {},
        |stream| {
            let mut summary = Summary::default();
            let mut stream = Recorded { stream, recipe: None };
            let mut tar = TarReader::new(&mut stream);
            let (mut count, mut bytes) = (0, 0);
            while let Some(entry) = tar.next()? {
                count += 1;
                bytes += entry.path.len() as u64;
                if count > MAX_ENTRIES {
                    return Err(LayerError::TooManyEntries(MAX_ENTRIES));
                }
                if bytes > MAX_TREE_BYTES {
                    return Err(LayerError::TreeTooLarge(MAX_TREE_BYTES >> 20));
                }
                let bad = |problem: super::PathProblem| LayerError::Entry {
                    entry: shown(&entry.path),
                    reason: problem.to_string(),
                };
                match target(&entry.path).map_err(bad)? {
                    Target::File(components) if components.is_empty() => {}
                    Target::File(components) => {
                        let size = match entry.kind {
                            EntryKind::Directory => None,
                            EntryKind::File { size, .. } => Some(size),
                            _ => Some(0),
                        };
                        summary.entries.insert(components.join(&b'/'), size);
                    }
                    Target::Whiteout(mut components, name) => {
                        components.push(name);
                        summary.whiteouts.push(components.join(&b'/'));
                    }
                    Target::Opaque(components) => summary.opaque.push(components.join(&b'/')),
                    Target::Skip => {}
                }
            }
            Ok::<_, LayerError>(summary)
        },
    )?;
    Ok(summary)
}
