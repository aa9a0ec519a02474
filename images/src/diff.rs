//! What a sandbox has changed of its image's files, by name: `diff`; and its whole root file system: `export`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};

use crate::commit::AddError;
use crate::layer::{self, LayerError, LayerPath, Summary, summarise};
use crate::layers::LayersError;
use crate::store::{ResolveError, Store, StoreError};
use crate::travel::TravelError;
use crate::view::View;

/// How a path differs from the image's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// The image has no such file.
    Added,
    /// The image has it otherwise, or has something else in it.
    Changed,
    /// Only the image has it.
    Deleted,
}

/// Why there is no comparison.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// The image cannot be read.
    #[error("cannot read the image of the sandbox")]
    Image(#[from] LayersError),
    /// What the sandbox has written is no layer.
    #[error("cannot read what the sandbox has written")]
    Changes(#[source] LayerError),
}

/// Why there is nothing to export.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootError {
    /// The sandbox's image is not there any more.
    #[error("the image of the sandbox is gone")]
    Image(#[from] ResolveError),
    /// What the sandbox has written cannot be a layer.
    #[error("cannot make a layer of what the sandbox has written")]
    Layer(#[from] AddError),
    /// It does not go with the image.
    #[error("cannot merge what the sandbox has written with its image")]
    Merge(#[source] io::Error),
    /// The store cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Compares what a sandbox has written, a tar archive that nobody has checked yet, with its image. In order of paths.
    pub fn diff_sandbox(
        &self,
        image: &str,
        archive: impl Read + Send,
    ) -> Result<Vec<(LayerPath, Difference)>, DiffError> {
        // First, as a sandbox may wait for it.
        let changes = summarise(archive).map_err(DiffError::Changes)?;
        Ok(self.paths(image)?.compare(changes))
    }

    /// All paths of an image.
    fn paths(&self, image: &str) -> Result<Paths, LayersError> {
        let image = self.resolve(image)?;
        let _hold = self.hold()?;
        let mut paths = Paths::default();
        for layer in self.record(image.id)?.layers {
            let diff_id = layer.diff_id;
            let blob = layer.blob.filter(|blob| self.has_archive(diff_id, blob));
            let archive = self.open_archive(diff_id, &blob.ok_or(TravelError::NotKept(diff_id))?)?;
            let summary = summarise(archive).map_err(|error| LayersError::Layer(diff_id, Box::new(error)))?;
            paths.apply(summary);
        }
        Ok(paths)
    }

    /// The root of a sandbox: its image's files, and on top what it has written, a tar archive that nobody has checked
    /// yet. No store has that.
    pub fn root_of_sandbox(&self, image: &str, archive: impl Read + Send) -> Result<View, RootError> {
        let _hold = self.hold()?;
        let image = self.resolve(image)?;
        let (changes, recipe) = (self.scratch()?, self.scratch()?);
        layer::adopt(archive, &changes, &recipe).map_err(AddError::from)?;
        let mut layers = Vec::new();
        for path in image.layers.into_iter().map(|layer| layer.erofs) {
            match File::open(&path) {
                Ok(layer) => layers.push(layer),
                Err(source) => return Err(StoreError::Io { action: "open", path, source }.into()),
            }
        }
        layers.push(changes);
        View::new(layers).map_err(RootError::Merge)
    }
}

/// Paths, and whether they are directories'.
#[derive(Debug, Default)]
struct Paths(BTreeMap<LayerPath, bool>);

impl Paths {
    fn apply(&mut self, layer: Summary) {
        // What a layer removes is always of lower layers (OCI image-spec: layer.md#whiteouts).
        for directory in &layer.opaque {
            self.remove_below(directory);
        }
        for path in &layer.whiteouts {
            self.remove_below(path);
            self.0.remove(path);
        }
        for (path, size) in layer.entries {
            let is_directory = size.is_none();
            if !is_directory {
                self.remove_below(&path);
            }
            for parent in parents(&path) {
                self.0.entry(parent.to_vec()).or_insert(true);
            }
            self.0.insert(path, is_directory);
        }
    }

    fn below(&self, directory: &[u8]) -> impl Iterator<Item = &LayerPath> {
        let start = if directory.is_empty() { Vec::new() } else { [directory, b"/"].concat() };
        let range = self.0.range(start.clone()..).map(|(path, _)| path);
        range.take_while(move |path| path.starts_with(&start))
    }

    fn remove_below(&mut self, directory: &[u8]) {
        let gone: Vec<LayerPath> = self.below(directory).cloned().collect();
        for path in gone {
            self.0.remove(&path);
        }
    }

    fn compare(&self, changes: Summary) -> Vec<(LayerPath, Difference)> {
        let mut differences = BTreeMap::new();
        for path in changes.whiteouts {
            differences.insert(path, Difference::Deleted);
        }
        for directory in &changes.opaque {
            for path in self.below(directory) {
                let is_there = |path: &[u8]| changes.entries.contains_key(path);
                // A directory that is gone says it for all that was in it.
                let mut within = parents(path).filter(|parent| parent.len() > directory.len());
                if !is_there(path) && within.all(is_there) {
                    differences.insert(path.clone(), Difference::Deleted);
                }
            }
        }
        for path in changes.entries.into_keys() {
            let is_known = self.0.contains_key(&path);
            let difference = if is_known { Difference::Changed } else { Difference::Added };
            differences.insert(path, difference);
        }
        differences.into_iter().collect()
    }
}

/// The directories that a path leads through, without the root.
fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    ends.map(|end| path.get(..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(entries: &[&str], whiteouts: &[&str], opaque: &[&str]) -> Summary {
        let paths = |names: &[&str]| names.iter().map(|name| name.as_bytes().to_vec()).collect::<Vec<_>>();
        let entry = |name: &&str| match name.strip_suffix('/') {
            Some(name) => (name.as_bytes().to_vec(), None),
            None => (name.as_bytes().to_vec(), Some(1)),
        };
        Summary {
            entries: entries.iter().map(entry).collect(),
            whiteouts: paths(whiteouts),
            opaque: paths(opaque),
        }
    }

    fn compare(lower: &[Summary], changes: Summary) -> Vec<String> {
        let mut paths = Paths::default();
        for summary in lower {
            paths.apply(Summary {
                entries: summary.entries.clone(),
                whiteouts: summary.whiteouts.clone(),
                opaque: summary.opaque.clone(),
            });
        }
        let letter = |difference| match difference {
            Difference::Added => 'A',
            Difference::Changed => 'C',
            Difference::Deleted => 'D',
        };
        let lines = paths.compare(changes).into_iter();
        lines
            .map(|(path, difference)| format!("{} {}", letter(difference), String::from_utf8_lossy(&path)))
            .collect()
    }

    #[test]
    fn changes_are_told_from_what_is_new() {
        let lower =
            [layer(&["etc/", "etc/a", "etc/b", "old/x"], &[], &[]), layer(&["etc/c"], &["etc/b"], &[])];
        let changes = layer(&["etc/", "etc/a", "etc/b", "new/", "new/f"], &["etc/c", "old"], &[]);
        let expected = ["C etc", "C etc/a", "A etc/b", "D etc/c", "A new", "A new/f", "D old"];
        assert_eq!(compare(&lower, changes), expected);
    }

    #[test]
    fn opaque_directory_deletes_what_it_does_not_have() {
        let lower = [layer(&["d/", "d/a", "d/s/", "d/s/x", "d/s/y", "d-not"], &[], &[])];
        let changes = layer(&["d/", "d/new"], &[], &["d"]);
        assert_eq!(compare(&lower, changes), ["C d", "D d/a", "A d/new", "D d/s"]);
        assert_eq!(compare(&[], layer(&["d/", "d/new"], &[], &["d"])), ["A d", "A d/new"]);
    }
}
