//! A bundle: a directory with a configuration and a root file system (bundle.md).

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Capability, Spec};

use crate::error::{Error, of_file};

/// A bundle that was read.
#[derive(Debug)]
pub(crate) struct Bundle {
    pub(crate) path: PathBuf,
    pub(crate) spec: Spec,
    /// The root file system's directory, absolute.
    pub(crate) rootfs: PathBuf,
}

impl Bundle {
    /// Reads the bundle at `path`; `config` is the name of its configuration.
    pub(crate) fn read(path: &Path, config: &Path, warn: &dyn Fn(&str)) -> Result<Self, Error> {
        let path = path.canonicalize().map_err(of_file("find the bundle", path))?;
        let mut spec = read_spec(&path.join(config), warn)?;
        let root =
            spec.root().as_ref().ok_or_else(|| Error::Request("the configuration has no root".into()))?;
        let rootfs = path.join(root.path());
        let rootfs = match rootfs.canonicalize() {
            Ok(rootfs) if rootfs.is_dir() => rootfs,
            Ok(rootfs) => {
                return Err(of_file("use the rootfs", rootfs)(io::Error::from(io::ErrorKind::NotADirectory)));
            }
            Err(error) => return Err(of_file("find the rootfs", rootfs)(error)),
        };
        // config.md#mounts: the source of a bind mount may be relative to the bundle.
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for mount in &mut mounts {
            let options = mount.options().as_deref().unwrap_or_default();
            let is_bind = mount.typ().as_deref() == Some("bind")
                || options.iter().any(|option| matches!(option.as_str(), "bind" | "rbind"));
            if let Some(source) = mount.source().clone().filter(|source| is_bind && source.is_relative()) {
                mount.set_source(Some(path.join(source)));
            }
        }
        if !mounts.is_empty() {
            spec.set_mounts(Some(mounts));
        }
        Ok(Self { path, spec, rootfs })
    }
}

fn read_spec(path: &Path, warn: &dyn Fn(&str)) -> Result<Spec, Error> {
    let text = match fs::read(path) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            return Err(Error::NoConfig { path: path.to_owned(), source });
        }
        result => result.map_err(of_file("read", path))?,
    };
    let unusable = |source: serde_json::Error| Error::Config { path: path.to_owned(), source: source.into() };
    match serde_json::from_slice(&text) {
        Ok(spec) => Ok(spec),
        Err(first) => {
            let mut spec: serde_json::Value = serde_json::from_slice(&text).map_err(unusable)?;
            let unknown = take_out_unknown_capabilities(&mut spec);
            if unknown.is_empty() {
                return Err(unusable(first));
            }
            warn(&format!("ignored, since they are no capabilities: {}", unknown.join(", ")));
            serde_json::from_value(spec).map_err(unusable)
        }
    }
}

/// config.md#linux-process: a capability that the runtime does not know is worth a warning only.
fn take_out_unknown_capabilities(spec: &mut serde_json::Value) -> Vec<String> {
    let mut unknown = Vec::new();
    let sets = spec.pointer_mut("/process/capabilities").and_then(serde_json::Value::as_object_mut);
    for set in sets.into_iter().flat_map(|sets| sets.values_mut()).filter_map(serde_json::Value::as_array_mut)
    {
        set.retain(|name| {
            let is_known = serde_json::from_value::<Capability>(name.clone()).is_ok();
            if !is_known && !unknown.contains(&name.to_string()) {
                unknown.push(name.to_string());
            }
            is_known
        });
    }
    unknown
}
