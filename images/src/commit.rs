//! Committing: what a sandbox has written becomes the top layer of a new image, whose configuration is that of the
//! sandbox's image with what the sandbox was run with, as Docker has it.

use std::io::Read;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::change::{Change, set_env};
use crate::clock::{EpochError, build_time, timestamp};
use crate::digest::Digest;
use crate::layer::{self, LayerError};
use crate::limits::MAX_LAYERS;
use crate::merge::MergeError;
use crate::reference::Reference;
use crate::store::{BlobRecord, ImageRecord, LayerRecord, ResolveError, Store, StoreError};

/// The end of a tar archive, and so all of one without entries.
const EMPTY_ARCHIVE: [u8; 1024] = [0; 1024];

/// What a sandbox was run with, in place of what its image says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// An entry point, which replaces the image's command, too. An empty one is none.
    pub entrypoint: Option<String>,
    /// A command; empty keeps the image's.
    pub command: Vec<String>,
    /// `NAME=VALUE`, over the image's.
    pub env: Vec<String>,
    /// A working directory.
    pub workdir: Option<String>,
    /// A user, `USER[:GROUP]`.
    pub user: Option<String>,
}

/// What to commit.
#[derive(Debug, Clone)]
pub struct Commit<'a> {
    /// Id of the image that the sandbox runs.
    pub image: &'a str,
    /// The sandbox's id.
    pub sandbox: &'a str,
    /// What it was run with.
    pub settings: &'a Settings,
    /// The new image's name; none if it has only an id.
    pub name: Option<&'a Reference>,
    /// Further changes to the configuration.
    pub changes: &'a [Change],
    /// Who made it.
    pub author: &'a str,
    /// A remark.
    pub message: &'a str,
}

/// Why an archive is not in the store as a layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// It cannot be one.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// It is compressed, where that has no place.
    #[error("it is compressed")]
    Compressed,
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why nothing was committed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// The sandbox's image is not there any more.
    #[error("the image of the sandbox is gone")]
    Image(#[from] ResolveError),
    /// The image would have no time.
    #[error(transparent)]
    Epoch(#[from] EpochError),
    /// Its configuration is not what it was when it came.
    #[error("the configuration of image {0} is no object")]
    Config(Digest),
    /// It has as many layers as an image can have.
    #[error("image {0} has {MAX_LAYERS} layers, which is the most that an image can have")]
    TooManyLayers(Digest),
    /// What the sandbox has written cannot be a layer.
    #[error("cannot make a layer of what the sandbox has written")]
    Layer(#[from] AddError),
    /// It does not go with the image's layers.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Store {
    /// Makes an image of a sandbox's image and its changes, a tar archive that nobody has checked yet.
    pub fn commit_sandbox(
        &self,
        archive: impl Read + Send,
        commit: &Commit<'_>,
    ) -> Result<Digest, CommitError> {
        let result = self.commit_held(archive, commit);
        let swept = self.sweep();
        let id = result?;
        swept?;
        Ok(id)
    }

    fn commit_held(&self, archive: impl Read + Send, commit: &Commit<'_>) -> Result<Digest, CommitError> {
        let created = timestamp(build_time()?);
        let _hold = self.hold()?;
        let base = self.resolve(commit.image)?;
        let mut layers = self.record(base.id)?.layers;
        let new = self.add_archive(archive)?;
        let new = Some(new).filter(|layer| layer.diff_id != Digest::of(&EMPTY_ARCHIVE));
        if layers.len() >= MAX_LAYERS && new.is_some() {
            return Err(CommitError::TooManyLayers(base.id));
        }
        layers.extend(new.clone());
        let parsed = serde_json::from_slice::<Value>(base.raw_config());
        let Ok(Value::Object(config)) = parsed else { return Err(CommitError::Config(base.id)) };
        let config = Value::Object(configured(config, commit, new.map(|layer| layer.diff_id), &created));
        let id = self.put_blob(config.to_string().as_bytes())?;
        let names = commit.name.iter().map(ToString::to_string).collect();
        let records = vec![ImageRecord { id, manifest: None, digests: Vec::new(), names, layers }];
        self.merge_records(&records)?;
        self.commit(records)?;
        Ok(id)
    }

    /// Takes an archive in as a layer, of which nothing is known yet. The caller holds a [`crate::Hold`].
    pub(crate) fn add_archive(&self, archive: impl Read + Send) -> Result<LayerRecord, AddError> {
        let new = self.new_layer()?;
        let (erofs_bytes, digests) = layer::adopt(archive, new.blob(), new.recipe())?;
        let diff_id = digests.diff_id;
        // Only of a plain one is there a recipe by which it can be had again.
        if digests.blob != diff_id {
            return Err(AddError::Compressed);
        }
        let blob = BlobRecord { digest: digests.blob, bytes: digests.blob_bytes };
        new.publish(diff_id, true)?;
        Ok(LayerRecord { diff_id, erofs_bytes, blob: Some(blob) })
    }
}

/// The new image's configuration (OCI image-spec: config.md; `container` and `container_config` are Docker's).
fn configured(
    mut image: Map<String, Value>,
    commit: &Commit<'_>,
    layer: Option<Digest>,
    created: &str,
) -> Map<String, Value> {
    let mut config = match image.remove("config") {
        Some(Value::Object(config)) => config,
        _ => Map::new(),
    };
    commit.settings.apply(&mut config);
    let command = config.get("Cmd").and_then(Value::as_array).cloned().unwrap_or_default();
    let words: Vec<&str> = command.iter().filter_map(Value::as_str).collect();
    let said = [("author", commit.author), ("comment", commit.message)];
    let said =
        said.into_iter().filter(|(_, value)| !value.is_empty()).map(|(key, value)| (key, json!(value)));
    let empty = layer.is_none().then_some(("empty_layer", json!(true)));
    let made = [("created", json!(created)), ("created_by", json!(words.join(" ")))];
    let step: Map<String, Value> =
        made.into_iter().chain(said).chain(empty).map(|(key, value)| (key.to_owned(), value)).collect();
    image.insert("container".to_owned(), json!(commit.sandbox));
    image.insert("container_config".to_owned(), Value::Object(config.clone()));
    Change::apply_all(commit.changes, &mut config);
    image.insert("config".to_owned(), Value::Object(config));
    image.insert("created".to_owned(), json!(created));
    image.insert("author".to_owned(), json!(commit.author));
    push(&mut image, "history", Value::Object(step));
    if let (Some(layer), Some(Value::Object(rootfs))) = (layer, image.get_mut("rootfs")) {
        push(rootfs, "diff_ids", json!(layer));
    }
    image
}

fn push(object: &mut Map<String, Value>, key: &str, value: Value) {
    match object.get_mut(key) {
        Some(Value::Array(array)) => array.push(value),
        _ => drop(object.insert(key.to_owned(), json!([value]))),
    }
}

impl Settings {
    fn apply(&self, config: &mut Map<String, Value>) {
        if let Some(entrypoint) = &self.entrypoint {
            config.remove("Cmd");
            let words = Some(entrypoint).filter(|entrypoint| !entrypoint.is_empty());
            config.insert("Entrypoint".to_owned(), words.map_or(Value::Null, |word| json!([word])));
        }
        if !self.command.is_empty() {
            config.insert("Cmd".to_owned(), json!(self.command));
        }
        self.env.iter().for_each(|variable| set_env(config, variable));
        for (key, value) in [("WorkingDir", &self.workdir), ("User", &self.user)] {
            if let Some(value) = value {
                config.insert(key.to_owned(), json!(value));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn configuration_is_the_images_with_what_the_sandbox_was_run_with() {
        let image = object(json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["sh"], "Entrypoint": ["/init"], "Env": ["A=1"], "Healthcheck": {"Test": ["NONE"]}},
            "rootfs": {"type": "layers", "diff_ids": ["sha256:0"]},
            "history": [{"created_by": "first"}],
        }));
        let settings = Settings {
            command: vec!["run".into(), "it".into()],
            env: vec!["A=2".into(), "B=3".into()],
            workdir: Some("/w".into()),
            ..Settings::default()
        };
        let changes = ["USER me".parse().unwrap()];
        let commit = Commit {
            image: "i",
            sandbox: "0123",
            settings: &settings,
            name: None,
            changes: &changes,
            author: "Me",
            message: "",
        };
        let layer = Digest::of(b"layer");
        let new = configured(image.clone(), &commit, Some(layer), "t");
        let run = json!({
            "Cmd": ["run", "it"], "Entrypoint": ["/init"], "Env": ["A=2", "B=3"], "WorkingDir": "/w",
            "Healthcheck": {"Test": ["NONE"]},
        });
        assert_eq!(new["container_config"], run);
        let mut config = run;
        config["User"] = json!("me");
        assert_eq!(new["config"], config);
        assert_eq!(new["rootfs"]["diff_ids"], json!(["sha256:0", layer]));
        assert_eq!(new["history"][1]["created_by"], "run it");
        assert_eq!(
            (&new["history"][1]["author"], &new["history"][1]["comment"]),
            (&json!("Me"), &Value::Null)
        );
        assert_eq!((&new["architecture"], &new["container"]), (&json!("amd64"), &json!("0123")));

        let without = configured(image, &commit, None, "t");
        assert_eq!(without["history"][1]["empty_layer"], true);
        assert_eq!(without["rootfs"]["diff_ids"], json!(["sha256:0"]));
    }

    #[test]
    fn entry_point_replaces_the_images_command() {
        let mut config = object(json!({"Cmd": ["sh"], "Entrypoint": ["/init"]}));
        Settings { entrypoint: Some("/other".into()), ..Settings::default() }.apply(&mut config);
        assert_eq!(Value::Object(config.clone()), json!({"Entrypoint": ["/other"]}));
        Settings { entrypoint: Some(String::new()), ..Settings::default() }.apply(&mut config);
        assert_eq!(Value::Object(config), json!({"Entrypoint": null}));
    }
}
