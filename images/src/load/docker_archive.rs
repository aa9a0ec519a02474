//! The form that `docker save`, `podman save`, `buildah push docker-archive:` and others write: a `manifest.json`
//! that lists images with their configuration, names, and layers (Docker image-spec v1.2, *Combined Image JSON +
//! Filesystem Changeset Format*). The older files beside it (`repositories`, a `json` for each layer) say nothing
//! more and are not looked at. Layers have no digest of their own here; the configuration's diffIDs verify them.

use serde::Deserialize;

use super::source::Source;
use super::{LoadError, Metadata, PlannedImage, PlannedLayer, parse_config, parse_json};
use crate::digest::Digest;
use crate::layer::ExpectedLayer;
use crate::limits::{MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, MAX_MANIFESTS};
use crate::reference::Reference;

pub(super) const MANIFEST: &str = "manifest.json";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ManifestEntry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

pub(super) fn plan(source: &Source) -> Result<Vec<PlannedImage>, LoadError> {
    let content = source.read(MANIFEST, "docker save's format", MAX_MANIFEST_BYTES)?;
    let entries: Vec<ManifestEntry> = parse_json(MANIFEST, &content)?;
    if entries.len() > MAX_MANIFESTS {
        return Err(invalid(format!("{} images, where at most {MAX_MANIFESTS} are accepted", entries.len())));
    }
    let mut metadata = Metadata::default();
    entries.into_iter().map(|entry| metadata.count(MANIFEST, plan_image(source, entry)?)).collect()
}

fn plan_image(source: &Source, entry: ManifestEntry) -> Result<PlannedImage, LoadError> {
    let config = source.read(&entry.config, MANIFEST, MAX_CONFIG_BYTES)?;
    verify_by_name(&entry.config, &config)?;
    let diff_ids = parse_config(&entry.config, &config)?;
    let members = entry.layers.unwrap_or_default();
    if members.len() != diff_ids.len() {
        let (there, named) = (members.len(), diff_ids.len());
        return Err(invalid(format!("{there} layers, while {} names {named}", entry.config)));
    }
    let layers = members
        .into_iter()
        .zip(diff_ids)
        .map(|(member, diff_id)| PlannedLayer { member, expected: ExpectedLayer { blob: None, diff_id } });
    let names = entry.repo_tags.unwrap_or_default();
    let names =
        names.iter().map(|name| name.parse::<Reference>().map_err(|error| invalid(error.to_string())));
    Ok(PlannedImage {
        names: names.collect::<Result<_, _>>()?,
        config,
        manifest: None,
        layers: layers.collect(),
    })
}

/// The configuration's file is named by its digest, `HEX.json` or `blobs/sha256/HEX`.
fn verify_by_name(member: &str, content: &[u8]) -> Result<(), LoadError> {
    let file = member.rsplit('/').next().unwrap_or(member);
    let Some(expected) = Digest::from_hex(file.strip_suffix(".json").unwrap_or(file)) else { return Ok(()) };
    let actual = Digest::of(content);
    if actual != expected {
        return Err(LoadError::Digest { member: member.to_owned(), expected, actual });
    }
    Ok(())
}

fn invalid(problem: String) -> LoadError {
    LoadError::Invalid { member: MANIFEST.to_owned(), problem }
}
