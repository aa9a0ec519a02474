//! `cloche kernel`. The recipe, a shell script, the configuration and the patches travel in this
//! binary.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    process::{Command, ExitCode},
};

use anyhow::{Context, bail};
use cloche_engine::isolation::vm::kernel::{find, kernels_dir};
use serde::Serialize;

use super::print_json;
use crate::{arguments::Kernel, render};

const RECIPE: &str = include_str!("../../../images/guest/build-kernel");
const FRAGMENT: &str = include_str!("../../../images/guest/kernel.config");

macro_rules! patches {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("../../../images/guest/patches/", $name)))),+]
    };
}

/// Name and content of each.
const PATCHES: &[(&str, &str)] = patches![
    "0001-cheap-alternatives.patch",
    "0002-pvh-untouched-machine.patch",
    "0003-less-sysfs.patch",
    "0004-cpuid-once.patch",
    "0005-empty-page-table-entries.patch",
    "0006-free-init-memory.patch",
    "0007-clear-less.patch",
    "0008-bpf-pack-size.patch",
    "0009-parameters-by-first-letter.patch",
    "0010-jump-label-sort.patch",
];

/// Carries out the verb.
pub fn kernel(verb: Kernel) -> anyhow::Result<ExitCode> {
    match verb {
        Kernel::Build { profile } => build(&profile),
        Kernel::Ls { json } => list(json),
        Kernel::Path => {
            println!("{}", find(None)?.display());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Runs the recipe from a directory of its own.
fn build(profile: &str) -> anyhow::Result<ExitCode> {
    let dir = tempfile::tempdir().context("cannot make a temporary directory for the kernel's recipe")?;
    let recipe = dir.path().join("build-kernel");
    let fragment = dir.path().join("kernel.config");
    fs::write(&fragment, FRAGMENT).with_context(|| format!("cannot write {}", fragment.display()))?;
    let patches = dir.path().join("patches");
    fs::create_dir(&patches).with_context(|| format!("cannot make {}", patches.display()))?;
    for (name, content) in PATCHES {
        let patch = patches.join(name);
        fs::write(&patch, content).with_context(|| format!("cannot write {}", patch.display()))?;
    }
    fs::File::create(&recipe)
        .and_then(|mut file| {
            file.write_all(RECIPE.as_bytes())?;
            file.set_permissions(fs::Permissions::from_mode(0o700))
        })
        .with_context(|| format!("cannot write {}", recipe.display()))?;
    let status = Command::new("bash")
        .arg(&recipe)
        .args(["--profile", profile, "--fragment"])
        .arg(&fragment)
        .arg("--patches")
        .arg(&patches)
        .arg("--cache")
        .arg(kernels_dir())
        .status()
        .context("cannot run bash, which the kernel's recipe needs")?;
    if !status.success() {
        bail!("the guest kernel was not built ({status}); its messages above say why");
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Built {
    hash: String,
    /// Links that lead here, such as `default`.
    names: Vec<String>,
    vmlinux_bytes: u64,
    info: serde_json::Value,
}

fn list(json: bool) -> anyhow::Result<ExitCode> {
    let built = built();
    if json {
        print_json(&built)?;
        return Ok(ExitCode::SUCCESS);
    }
    let head = ["HASH", "NAMES", "VERSION", "SIZE"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(built.iter().map(|kernel| {
        let version = kernel.info["version"].as_str().unwrap_or("?").to_owned();
        let hash = kernel.hash.chars().take(12).collect();
        vec![hash, kernel.names.join(","), version, render::bytes(kernel.vmlinux_bytes)]
    }));
    print!("{}", render::table(&rows, &[3]));
    Ok(ExitCode::SUCCESS)
}

/// What the cache holds: directories that hold a kernel; links are names.
fn built() -> Vec<Built> {
    let mut built: Vec<Built> = Vec::new();
    let mut links = Vec::new();
    for entry in fs::read_dir(kernels_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Ok(target) = fs::read_link(entry.path()) {
            links.push((name, target));
        } else if let Ok(vmlinux) = fs::metadata(entry.path().join("vmlinux")) {
            let info = fs::read(entry.path().join("info.json")).unwrap_or_default();
            let info = serde_json::from_slice(&info).unwrap_or_default();
            built.push(Built { hash: name, names: Vec::new(), vmlinux_bytes: vmlinux.len(), info });
        }
    }
    for (name, target) in links {
        let hash = target.file_name().map(|name| name.to_string_lossy().into_owned());
        if let Some(kernel) = built.iter_mut().find(|kernel| Some(&kernel.hash) == hash.as_ref()) {
            kernel.names.push(name);
        }
    }
    built.sort_by(|a, b| a.hash.cmp(&b.hash));
    built
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is not embedded would make `cloche kernel build` build another kernel than the recipe in the tree does.
    #[test]
    fn patches_embedded_are_all_there_are() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../images/guest/patches");
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, PATCHES.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    }
}
