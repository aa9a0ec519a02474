//! Builds the guest agent for its own profile and packs it as the initramfs that this crate embeds, so that a plain
//! `cargo build` makes a `cloche` that is complete in one file.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

#[path = "src/isolation/vm/cpio.rs"]
mod cpio;

/// Static, as all of ours. At a fixed address, since 230 KB of relocations would be a twelfth of what every start
/// copies; stack and heap are where chance puts them nevertheless.
const AGENT_FLAGS: [&str; 2] = ["-Ctarget-feature=+crt-static", "-Crelocation-model=static"];

fn main() {
    let workspace = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo")).join("..");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    for source in ["guest-agent", "runtime", "protocol", "Cargo.lock", "Cargo.toml", ".cargo/config.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    let agent = fs::read(build_agent(&workspace, &out)).expect("the agent was just built");
    let mut archive = cpio::Archive::default();
    archive.directory("dev");
    // What the kernel opens as stdio of the first process: /dev/null, since opening the serial port is some fifty VM
    // exits. The agent opens the port, under the name below, when it has something to say.
    archive.character_device("dev/console", 1, 3);
    archive.character_device("console", 5, 1);
    archive.file("init", 0o755, &agent);
    fs::write(out.join("initramfs.cpio"), archive.finish()).expect("OUT_DIR is writable");
}

/// Runs cargo with a target directory of its own: the outer cargo holds the lock of the usual one. It is shared by all
/// profiles of the outer build, since the agent has but one: `TARGET/TRIPLE/PROFILE/build/PACKAGE/out` is `out`.
fn build_agent(workspace: &Path, out: &Path) -> PathBuf {
    let target = env::var("TARGET").expect("set by cargo");
    let target_dir = out.ancestors().nth(4).expect("cargo's layout").join("agent-build");
    let status = Command::new(env::var_os("CARGO").expect("set by cargo"))
        .args([
            "build",
            "--package",
            "cloche-guest-agent",
            "--profile",
            "agent",
            "--locked",
            "--target",
            &target,
        ])
        .arg("--target-dir")
        .arg(&target_dir)
        .current_dir(workspace)
        // The outer build's flags (clippy's wrapper, coverage) are not the agent's.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTC_WRAPPER")
        .env("CARGO_ENCODED_RUSTFLAGS", AGENT_FLAGS.join("\x1f"))
        .status()
        .expect("cargo runs");
    assert!(status.success(), "the guest agent does not build");
    target_dir.join(target).join("agent/cloche-guest-agent")
}
