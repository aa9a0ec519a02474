//! What `docker image inspect` says of an image, under Docker's field names.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::digest::Digest;
use crate::image::Image;
use crate::reference::Reference;

/// An image as `docker image inspect` shows it. Serialise it for JSON; Docker wraps it in an array.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Inspect {
    /// The image's ID.
    pub id: Digest,
    /// Names with their tags, in short form.
    pub repo_tags: Vec<String>,
    /// Repositories with the manifest's digest.
    pub repo_digests: Vec<String>,
    /// When the image was built (RFC 3339), or nothing.
    pub created: String,
    /// Who built it, or nothing.
    pub author: String,
    /// The processor it is for, in Go's words.
    pub architecture: String,
    /// The operating system it is for.
    pub os: String,
    /// Bytes of all layers as they are stored.
    pub size: u64,
    /// How to run it.
    pub config: InspectConfig,
    /// What its file system is made of.
    #[serde(rename = "RootFS")]
    pub root_fs: InspectRootFs,
}

/// The execution parameters, as the image's configuration holds them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[allow(missing_docs)] // The names are Docker's and OCI's own (image-spec: config.md#properties).
pub struct InspectConfig {
    #[serde(deserialize_with = "null_is_default")]
    pub user: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exposed_ports: Option<BTreeMap<String, Value>>,
    pub env: Option<Vec<String>>,
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    pub volumes: Option<BTreeMap<String, Value>>,
    #[serde(deserialize_with = "null_is_default")]
    pub working_dir: String,
    pub labels: Option<BTreeMap<String, String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthcheck: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shell: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_build: Option<Vec<String>>,
}

/// The layers by their diffIDs.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct InspectRootFs {
    /// Always `layers`.
    pub r#type: &'static str,
    /// Bottom first.
    pub layers: Vec<Digest>,
}

fn null_is_default<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Option::<String>::deserialize(deserializer).map(Option::unwrap_or_default)
}

pub(crate) fn of(image: &Image) -> Inspect {
    // The typed configuration drops what OCI does not specify; this reads Docker's own fields too. Fields of the
    // wrong type were refused when the image was loaded, or are Docker's own, which then show as absent.
    #[derive(Deserialize)]
    struct Outer {
        #[serde(default)]
        config: Option<InspectConfig>,
    }
    let outer = serde_json::from_slice::<Outer>(image.raw_config()).ok();
    // Repositories from which the image came, and those of names under which an archive had it.
    let pulled = image.repo_digests.iter().map(Reference::short);
    let is_pulled =
        |name: &Reference| image.repo_digests.iter().any(|digest| digest.repository() == name.repository());
    let loaded = image
        .names
        .iter()
        .filter(|name| !is_pulled(name))
        .filter_map(|name| image.manifest.map(|digest| format!("{}@{digest}", name.short_repository())));
    let digests: std::collections::BTreeSet<String> = pulled.chain(loaded).collect();
    Inspect {
        id: image.id,
        repo_tags: image.names.iter().map(|name| name.short()).collect(),
        repo_digests: digests.into_iter().collect(),
        created: image.created.clone().unwrap_or_default(),
        author: image.config.author().clone().unwrap_or_default(),
        architecture: image.config.architecture().to_string(),
        os: image.config.os().to_string(),
        size: image.size,
        config: outer.and_then(|outer| outer.config).unwrap_or_default(),
        root_fs: InspectRootFs {
            r#type: "layers",
            layers: image.layers.iter().map(|layer| layer.diff_id).collect(),
        },
    }
}
