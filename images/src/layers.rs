//! What an image's layers are for: the steps that made them, the files that each adds, changes and hides, and the
//! bytes that travel and are stored but that nobody sees.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::digest::Digest;
use crate::image::Image;
use crate::layer::{LayerError, Summary, summarise};
use crate::store::{ResolveError, Store, StoreError};
use crate::travel::TravelError;

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LayerReport {
    /// The digest of its archive.
    pub diff_id: Digest,
    /// The step that made it, as the image's history has it; nothing if that does not say.
    pub created_by: String,
    /// Bytes of its files.
    pub bytes: u64,
    /// Bytes as it travels, if that is known.
    pub blob_bytes: Option<u64>,
    /// Bytes of its file system.
    pub stored_bytes: u64,
    /// Files that no lower layer has.
    pub added: u64,
    /// Files that take the place of a lower layer's.
    pub changed: u64,
    /// Files of lower layers that it removes.
    pub hidden: u64,
    /// Bytes of this layer's files that upper layers change or remove.
    pub wasted: u64,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayersError {
    /// There is no such image.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// A layer is not kept as it came.
    #[error(transparent)]
    Travel(#[from] TravelError),
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A layer cannot be read.
    #[error("layer {0}")]
    Layer(Digest, #[source] Box<LayerError>),
}

/// One step of an image's history, the latest first as in Docker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HistoryEntry {
    /// When (RFC 3339), if that is known.
    pub created: Option<String>,
    /// The step.
    pub created_by: String,
    /// A remark.
    pub comment: String,
    /// The layer that it made, if any.
    pub layer: Option<Digest>,
    /// Bytes of that layer's file system.
    pub size: u64,
}

impl Image {
    /// How the image was made. Layers that the history says nothing of are there without words.
    pub fn history(&self) -> Vec<HistoryEntry> {
        let mut layers = self.layers.iter();
        let mut entries: Vec<HistoryEntry> = Vec::new();
        for step in self.config.history().iter().flatten() {
            let layer = if step.empty_layer() == Some(true) { None } else { layers.next() };
            entries.push(HistoryEntry {
                created: step.created().clone(),
                created_by: step.created_by().clone().unwrap_or_default(),
                comment: step.comment().clone().unwrap_or_default(),
                layer: layer.map(|layer| layer.diff_id),
                size: layer.map_or(0, |layer| layer.erofs_bytes),
            });
        }
        entries.extend(layers.map(|layer| HistoryEntry {
            created: None,
            created_by: String::new(),
            comment: String::new(),
            layer: Some(layer.diff_id),
            size: layer.erofs_bytes,
        }));
        entries.reverse();
        entries
    }
}

impl Store {
    /// Reads all layers of an image through, and compares each with those below it.
    pub fn layers_of(&self, image: &str) -> Result<Vec<LayerReport>, LayersError> {
        let image = self.resolve(image)?;
        let _hold = self.hold()?;
        let record = self.record(image.id)?;
        let mut steps = image.history().into_iter().rev().filter(|step| step.layer.is_some());
        let mut view = View::default();
        for layer in &record.layers {
            let diff_id = layer.diff_id;
            let blob = layer.blob.filter(|blob| self.has_archive(diff_id, blob));
            let blob = blob.ok_or(TravelError::NotKept(diff_id))?;
            let archive = self.open_archive(diff_id, &blob)?;
            let summary = summarise(archive).map_err(|error| LayersError::Layer(diff_id, Box::new(error)))?;
            view.add(
                summary,
                LayerReport {
                    diff_id,
                    created_by: steps.next().map(|step| step.created_by).unwrap_or_default(),
                    bytes: 0,
                    blob_bytes: Some(blob.bytes),
                    stored_bytes: layer.erofs_bytes,
                    added: 0,
                    changed: 0,
                    hidden: 0,
                    wasted: 0,
                },
            );
        }
        Ok(view.reports)
    }
}

/// What a sandbox would see of the layers so far.
#[derive(Default)]
struct View {
    /// Files, and which layer they are from.
    files: BTreeMap<Vec<u8>, (usize, u64)>,
    reports: Vec<LayerReport>,
}

impl View {
    fn add(&mut self, summary: Summary, mut report: LayerReport) {
        // What a layer removes is always of lower layers (OCI image-spec: layer.md#whiteouts).
        for directory in &summary.opaque {
            report.hidden += self.hide_below(directory);
        }
        for path in &summary.whiteouts {
            report.hidden += self.hide(path) + self.hide_below(path);
        }
        let index = self.reports.len();
        for (path, size) in summary.entries {
            let Some(bytes) = size else {
                // A directory in the place of a file.
                report.hidden += self.hide(&path);
                continue;
            };
            report.bytes += bytes;
            report.hidden += self.hide_below(&path);
            match self.hide(&path) {
                0 => report.added += 1,
                _ => report.changed += 1,
            }
            self.files.insert(path, (index, bytes));
        }
        self.reports.push(report);
    }

    /// Hides one file; tells how many there were.
    fn hide(&mut self, path: &[u8]) -> u64 {
        let Some((layer, bytes)) = self.files.remove(path) else { return 0 };
        if let Some(report) = self.reports.get_mut(layer) {
            report.wasted += bytes;
        }
        1
    }

    /// Hides all files below a directory.
    fn hide_below(&mut self, directory: &[u8]) -> u64 {
        let start = if directory.is_empty() { Vec::new() } else { [directory, b"/"].concat() };
        let below = self.files.range(start.clone()..).map(|(path, _)| path);
        let paths: Vec<Vec<u8>> = below.take_while(|path| path.starts_with(&start)).cloned().collect();
        paths.iter().map(|path| self.hide(path)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> LayerReport {
        LayerReport {
            diff_id: Digest::of(b""),
            created_by: String::new(),
            bytes: 0,
            blob_bytes: None,
            stored_bytes: 0,
            added: 0,
            changed: 0,
            hidden: 0,
            wasted: 0,
        }
    }

    fn summary(entries: &[(&str, Option<u64>)], whiteouts: &[&str], opaque: &[&str]) -> Summary {
        let paths = |paths: &[&str]| paths.iter().map(|path| path.as_bytes().to_vec()).collect();
        Summary {
            entries: entries.iter().map(|(path, size)| (path.as_bytes().to_vec(), *size)).collect(),
            whiteouts: paths(whiteouts),
            opaque: paths(opaque),
        }
    }

    #[test]
    fn bytes_that_nobody_sees_are_counted_where_they_lie() {
        let mut view = View::default();
        let base = [("a", Some(1)), ("d", None), ("d/x", Some(10)), ("d/y", Some(100)), ("dd", Some(1000))];
        view.add(summary(&base, &[], &[]), report());
        // One changed, one removed, and `dd` is not below `d`.
        view.add(summary(&[("a", Some(2)), ("new", Some(5))], &["d"], &[]), report());
        // A directory whose lower content goes, and a file where a directory was.
        view.add(summary(&[("e", None), ("e/z", Some(7))], &[], &[]), report());
        view.add(summary(&[("e", Some(3)), ("dd", None)], &[], &[""]), report());
        let counts = |report: &LayerReport| (report.added, report.changed, report.hidden, report.wasted);
        let seen: Vec<_> = view.reports.iter().map(counts).collect();
        assert_eq!(seen, [(4, 0, 0, 1111), (1, 1, 2, 7), (1, 0, 0, 7), (1, 0, 4, 0)]);
        assert_eq!(view.reports.iter().map(|report| report.bytes).sum::<u64>(), 1111 + 7 + 7 + 3);
    }
}
