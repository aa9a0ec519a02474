//! Boots a microVM from a JSON configuration, for development of this crate; without a jail:
//!
//! ```text
//! boot '{"vcpus":1,"memory_mib":128,"kernel":"vmlinux","initramfs":["embedded"],"console_log":"/dev/stdout"}' init.cpio
//! ```
//! The second argument is what `embedded` stands for. Set `"events_fd":1` to see the events. The exit status is the
//! guest's exit code, or 125 if the machine ended in any other way.

use std::process::ExitCode;

use cloche_vmm::{ExitReason, Jail, VmConfig};

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match boot() {
        Ok(ExitReason::GuestExit { code }) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        Ok(reason) => {
            eprintln!("boot: {reason}");
            ExitCode::from(125)
        }
        Err(error) => {
            eprintln!("boot: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because {error}");
                cause = error.source();
            }
            ExitCode::from(125)
        }
    }
}

fn boot() -> Result<ExitReason, Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let config: VmConfig = serde_json::from_str(&arguments.next().ok_or("no configuration was given")?)?;
    let embedded = arguments.next().map(std::fs::read).transpose()?.unwrap_or_default();
    Ok(cloche_vmm::run(config, &embedded, Jail::none())?)
}
