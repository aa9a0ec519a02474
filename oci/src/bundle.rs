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
    /// The configuration, as it was read.
    pub(crate) text: Vec<u8>,
    pub(crate) spec: Spec,
    /// The root file system's directory, absolute.
    pub(crate) rootfs: PathBuf,
}

impl Bundle {
    /// Reads the bundle at `path`; `config` is the name of its configuration.
    pub(crate) fn read(path: &Path, config: &Path, warn: &dyn Fn(&str)) -> Result<Self, Error> {
        let path = path.canonicalize().map_err(of_file("find the bundle", path))?;
        let (text, mut spec) = read_spec(&path.join(config), warn)?;
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
        Ok(Self { path, text, spec, rootfs })
    }
}

fn read_spec(path: &Path, warn: &dyn Fn(&str)) -> Result<(Vec<u8>, Spec), Error> {
    let text = match fs::read(path) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            return Err(Error::NoConfig { path: path.to_owned(), source });
        }
        result => result.map_err(of_file("read", path))?,
    };
    if is_for_freebsd(&text) {
        return Err(Error::Request("not supported: freebsd; this is a runtime for Linux".into()));
    }
    match parse(&text, warn) {
        Ok(spec) => Ok((text, spec)),
        Err(source) => Err(Error::Config { path: path.to_owned(), source: source.into() }),
    }
}

/// The one section for another platform (config.md#platform-specific-configuration) that the types do not have.
fn is_for_freebsd(text: &[u8]) -> bool {
    std::str::from_utf8(text).is_ok_and(|text| text.contains("\"freebsd\""))
        && serde_json::from_slice::<serde_json::Value>(text).is_ok_and(|spec| spec.get("freebsd").is_some())
}

/// Reads a configuration.
pub fn parse(text: &[u8], warn: &dyn Fn(&str)) -> Result<Spec, serde_json::Error> {
    match serde_json::from_slice(text) {
        Ok(spec) => Ok(spec),
        Err(first) => {
            let mut spec: serde_json::Value = serde_json::from_slice(text)?;
            let is_changed = rename_scheduler_flags(&mut spec) | name_root(&mut spec);
            let unknown = take_out_unknown_capabilities(&mut spec);
            if unknown.is_empty() && !is_changed {
                return Err(first);
            }
            if !unknown.is_empty() {
                warn(&format!("ignored, since they are no capabilities: {}", unknown.join(", ")));
            }
            serde_json::from_value(spec)
        }
    }
}

/// A process without a user is root's (the schema of the specification does not ask for one). Whether there was one.
fn name_root(spec: &mut serde_json::Value) -> bool {
    let process = spec.pointer_mut("/process").and_then(serde_json::Value::as_object_mut);
    let Some(process) = process.filter(|process| process.get("user").is_none_or(serde_json::Value::is_null))
    else {
        return false;
    };
    process.insert("user".into(), serde_json::json!({ "uid": 0, "gid": 0 }));
    true
}

/// Two flags have other names in the types than in config.md#linux-process. Whether there was one.
fn rename_scheduler_flags(spec: &mut serde_json::Value) -> bool {
    let mut is_renamed = false;
    let flags = spec.pointer_mut("/process/scheduler/flags").and_then(serde_json::Value::as_array_mut);
    for flag in flags.into_iter().flatten() {
        let name = match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => "SCHED_RESET_ON_FORK",
            Some("SCHED_FLAG_DL_OVERRUN") => "SCHED_FLAG_D_L_OVERRUN",
            _ => continue,
        };
        *flag = name.into();
        is_renamed = true;
    }
    is_renamed
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

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxSchedulerFlag;
    use serde_json::json;

    use super::*;

    fn parsed(process: serde_json::Value) -> (Result<Spec, serde_json::Error>, Vec<String>) {
        let warnings = std::cell::RefCell::new(Vec::new());
        let text = json!({ "ociVersion": "1.2.0", "process": process }).to_string();
        let spec = parse(text.as_bytes(), &|warning| warnings.borrow_mut().push(warning.to_owned()));
        (spec, warnings.into_inner())
    }

    #[test]
    fn scheduler_flags_have_the_names_of_the_specification() {
        let flags = json!(["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_RECLAIM"]);
        let scheduler = json!({ "policy": "SCHED_OTHER", "flags": flags });
        let (spec, warnings) =
            parsed(json!({ "user": { "uid": 0, "gid": 0 }, "cwd": "/", "scheduler": scheduler }));
        let process = spec.unwrap().process().clone().unwrap();
        let flags = process.scheduler().as_ref().unwrap().flags().clone().unwrap();
        assert_eq!(flags.first(), Some(&LinuxSchedulerFlag::SchedResetOnFork));
        assert_eq!((flags.len(), warnings.len()), (3, 0));
    }

    #[test]
    fn process_without_a_user_is_roots() {
        for process in [json!({ "cwd": "/" }), json!({ "user": null, "cwd": "/" })] {
            let (spec, _) = parsed(process);
            let process = spec.unwrap().process().clone().unwrap();
            assert_eq!((process.user().uid(), process.user().gid()), (0, 0));
        }
    }

    #[test]
    fn unknown_capability_is_warned_of_and_other_nonsense_an_error() {
        let user = json!({ "uid": 0, "gid": 0 });
        let (spec, warnings) = parsed(
            json!({ "user": user, "cwd": "/", "capabilities": { "bounding": ["CAP_KILL", "CAP_X"] } }),
        );
        assert!(spec.is_ok() && warnings == ["ignored, since they are no capabilities: \"CAP_X\""]);
        assert!(parsed(json!({ "user": user, "cwd": 5 })).0.is_err());
    }
}
