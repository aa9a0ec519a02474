//! What a sandbox's process sees that no busybox applet shows. The suite puts its own (static) binary into an image
//! and runs `cloche-tests probe …` there.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::ExitCode;
use std::thread;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{lgetxattr, llistxattr};
use sha2::{Digest as _, Sha256};

use crate::noise::Noise;
use crate::vsock;

/// Runs one probe and prints what it finds.
pub fn main(arguments: &[String]) -> ExitCode {
    let result = match arguments {
        [what, directory, entries] if what == "files" => entries
            .parse()
            .context("a number of entries")
            .and_then(|entries| crate::file_probe::run(directory, entries)),
        [what, port, streams] if what == "vsock-mirror" => mirror(port, streams),
        [what, paths @ ..] if what == "xattrs" => paths.iter().try_for_each(|path| print_xattrs(path)),
        _ => Err(anyhow::anyhow!(
            "usage: cloche-tests probe files DIRECTORY ENTRIES | vsock-mirror PORT STREAMS | xattrs PATH…"
        )),
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

/// Serves so many streams from the host, all at once. Each is read to its end, which the host gives by closing its half;
/// then back come the length and the hash of what was read, and as many bytes of noise seeded by the length.
fn mirror(port: &str, streams: &str) -> Result<()> {
    let listener = vsock::listen(port.parse()?).context("listen on vsock")?;
    let mut served = Vec::new();
    for _ in 0..streams.parse()? {
        let stream = File::from(rustix::net::accept(&listener).context("accept")?);
        // Small stacks: there are hundreds.
        let thread = thread::Builder::new().stack_size(256 * 1024).spawn(move || mirror_one(stream));
        served.push(thread.context("start a thread")?);
    }
    for thread in served {
        thread.join().map_err(|_| anyhow::anyhow!("a stream's thread panicked"))??;
    }
    println!("mirrored {streams}");
    Ok(())
}

fn mirror_one(mut stream: File) -> Result<()> {
    let (mut hash, mut length, mut chunk) = (Sha256::new(), 0u64, [0; 16 * 1024]);
    loop {
        let count = stream.read(&mut chunk).context("read from the host")?;
        let Some(bytes) = chunk.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
        hash.update(bytes);
        length += count as u64;
    }
    let hash: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    stream.write_all(format!("{length} {hash}\n").as_bytes()).context("write to the host")?;
    stream.write_all(&Noise::new(length).bytes(length as usize)).context("write to the host")
}
