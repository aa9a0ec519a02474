//! What a sandbox's process sees that no busybox applet shows. The suite puts its own (static) binary into an image
//! and runs `cloche-tests probe …` there.

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{lgetxattr, llistxattr};

/// Runs one probe and prints what it finds.
pub fn main(arguments: &[String]) -> ExitCode {
    let result = match arguments {
        [what, directory] if what == "files" => crate::file_probe::run(directory),
        [what, paths @ ..] if what == "xattrs" => paths.iter().try_for_each(|path| print_xattrs(path)),
        _ => Err(anyhow::anyhow!("usage: cloche-tests probe files DIRECTORY | xattrs PATH…")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("probe: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One line per extended attribute: `PATH NAME=HEX`.
fn print_xattrs(path: &str) -> Result<()> {
    let mut names = vec![0; 64 * 1024];
    let length = llistxattr(path, &mut names).with_context(|| format!("list the attributes of {path}"))?;
    let Some(names) = names.get(..length) else { bail!("a list of {length} bytes") };
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = String::from_utf8_lossy(name);
        let mut value = vec![0; 64 * 1024];
        let length = lgetxattr(path, &*name, &mut value)
            .with_context(|| format!("read attribute {name} of {path}"))?;
        let hex: String = value.iter().take(length).map(|byte| format!("{byte:02x}")).collect();
        println!("{path} {name}={hex}");
    }
    Ok(())
}
