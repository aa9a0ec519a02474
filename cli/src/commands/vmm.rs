//! `cloche vmm`: the process of one microVM. Its configuration comes as JSON on stdin, its events go out on the
//! descriptor that the configuration names. It locks itself in (`cloche_vmm::jail`), for which it must be the first
//! process of a PID namespace, as the engine starts it.
//!
//! To debug a VMM, start it by hand with `--no-jail`; nothing else passes that.

use std::{
    ffi::OsString,
    io::{self, Read},
    process::ExitCode,
};

use anyhow::Context;
use cloche_vmm::{Jail, VmConfig, jail};

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
    let mut jail = Jail::new();
    for word in words {
        anyhow::ensure!(word == "--no-jail", "unknown argument {word:?}; it takes --no-jail, for debugging");
        jail = Jail::none();
    }
    jail::exit_on_panic("cloche vmm");
    let mut json = Vec::new();
    io::stdin()
        .take(MAX_CONFIG_BYTES)
        .read_to_end(&mut json)
        .context("cannot read the configuration from stdin")?;
    let config: VmConfig =
        serde_json::from_slice(&json).context("the configuration on stdin is not valid")?;
    let told = config.events_fd.is_some();
    match cloche_vmm::run(config, cloche_engine::INITRAMFS, jail) {
        Ok(_) => Ok(ExitCode::SUCCESS),
        // Whoever reads events knows why, and says it better.
        Err(_) if told => Ok(ExitCode::FAILURE),
        Err(error) => Err(error).context("the VM failed"),
    }
}
