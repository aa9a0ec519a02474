//! `cloche vmm`: the process of one microVM. Its configuration comes as JSON on stdin, its events go out on the
//! descriptor that the configuration names.

use std::{
    ffi::OsString,
    io::{self, Read},
    process::ExitCode,
};

use anyhow::Context;
use cloche_vmm::config::VmConfig;

/// Longest configuration accepted, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Runs the VM to its end. `words` are the arguments after `vmm`.
pub fn main(words: impl Iterator<Item = OsString>) -> ExitCode {
    match run(words) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cloche vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: impl Iterator<Item = OsString>) -> anyhow::Result<ExitCode> {
    for word in words {
        let word = word.to_string_lossy().into_owned();
        let parent = word.strip_prefix("--die-with=").and_then(|pid| pid.parse::<u32>().ok());
        let parent = parent.with_context(|| format!("unknown argument `{word}`; it takes --die-with=PID"))?;
        cloche_engine::syscalls::die_with_parent().context("cannot tie this process to its parent")?;
        // It may have died before the line above.
        anyhow::ensure!(
            std::os::unix::process::parent_id() == parent,
            "process {parent}, its parent, is gone"
        );
    }
    let mut json = Vec::new();
    io::stdin()
        .take(MAX_CONFIG_BYTES)
        .read_to_end(&mut json)
        .context("cannot read the configuration from stdin")?;
    let config: VmConfig =
        serde_json::from_slice(&json).context("the configuration on stdin is not valid")?;
    let told = config.events_fd.is_some();
    match cloche_vmm::run(config, cloche_engine::INITRAMFS) {
        Ok(_) => Ok(ExitCode::SUCCESS),
        // Whoever reads events knows why, and says it better.
        Err(_) if told => Ok(ExitCode::FAILURE),
        Err(error) => Err(error).context("the VM failed"),
    }
}
