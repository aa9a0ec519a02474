//! The archive of `docker save` before Docker 25, which is all that some tools read (Docker image-spec v1.2, *Combined
//! Image JSON + Filesystem Changeset Format*):
//!
//! ```text
//! HEX.tar         a layer, not compressed; HEX is its diffID
//! HEX.json        a configuration; HEX is its digest, and the image's ID
//! manifest.json   which of them are an image, and its names
//! repositories    the same for tools of before 2016: a name's topmost layer
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, Write};

use super::{DockerEntry, SaveError, Sink, copy, end, json, put};
use crate::layer::{DecodeError, LayerError, decompressor, detect};
use crate::reference::Reference;
use crate::store::{BlobRecord, LayerRecord, Store};
use crate::travel::TravelError;

impl Store {
    pub(super) fn save_docker_to(&self, images: &[String], sink: &mut dyn Sink) -> Result<(), SaveError> {
        let _hold = self.hold()?;
        let mut written = BTreeSet::new();
        let mut entries = Vec::new();
        let mut repositories: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for (id, names) in self.choose(images)? {
            let record = self.record(id)?;
            let mut layers = Vec::new();
            for layer in &record.layers {
                let name = format!("{}.tar", layer.diff_id.hex());
                if written.insert(layer.diff_id) {
                    self.put_plain_layer(sink, &name, layer)?;
                }
                layers.push(name);
            }
            let config = format!("{}.json", id.hex());
            put(sink, &config, &self.read_blob(id)?)?;
            if let Some(top) = record.layers.last() {
                for name in &names {
                    let tags = repositories.entry(name.short_repository()).or_default();
                    tags.extend(name.tag().map(|tag| (tag.to_owned(), top.diff_id.hex())));
                }
            }
            let repo_tags = names.iter().map(Reference::short).collect();
            entries.push(DockerEntry { config, repo_tags, layers });
        }
        put(sink, "manifest.json", &json(&entries)?)?;
        put(sink, "repositories", &json(&repositories)?)?;
        end(sink)
    }

    /// A header tells the length before the content, so a layer that came compressed goes to a nameless file first.
    fn put_plain_layer(&self, sink: &mut dyn Sink, name: &str, layer: &LayerRecord) -> Result<(), SaveError> {
        let diff_id = layer.diff_id;
        let blob = layer.blob.filter(|blob| self.has_archive(diff_id, blob));
        let blob = blob.ok_or(TravelError::NotKept(diff_id))?;
        let mut archive = self.open_archive(diff_id, &blob)?;
        if blob.digest == diff_id {
            return copy(sink, name, blob, &mut archive);
        }
        let mut plain = self.scratch()?;
        let unpacked = unpack(archive, &mut plain);
        let bytes = unpacked
            .map_err(|error| SaveError::Layer { diff_id, source: Box::new(LayerError::Decode(error)) })?;
        copy(sink, name, BlobRecord { digest: diff_id, bytes }, &mut plain)
    }
}

/// Decompresses, and leaves the file at its start. Returns its length.
fn unpack(archive: impl Read, plain: &mut File) -> Result<u64, DecodeError> {
    let (encoding, archive) = detect(archive)?;
    let mut archive = decompressor(encoding, BufReader::with_capacity(256 << 10, archive))?;
    let bytes = std::io::copy(&mut archive, plain)?;
    plain.flush()?;
    plain.rewind()?;
    Ok(bytes)
}
