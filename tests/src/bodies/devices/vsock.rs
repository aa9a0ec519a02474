//! The socket device: streams that programs of the host open into the guest.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::bed::Bed;
use crate::guest::{Guest, RunningGuest};
use crate::noise::Noise;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(hundreds_of_host_streams_carry_every_byte_at_once).only(Isolation::Vm),
    body!(host_stream_to_a_port_without_listener_ends).only(Isolation::Vm),
];

const PORT: u32 = 700;

/// A guest with a socket device that host programs reach by the returned path.
fn start(bed: &Bed, script: &str) -> Result<(RunningGuest, PathBuf)> {
    let path = bed.scratch().join("v.sock");
    let listener = UnixListener::bind(&path)?;
    fcntl_setfd(&listener, FdFlags::empty())?;
    let vsock = json!({ "guest_cid": 3, "listen_fd": listener.as_raw_fd() });
    let guest = Guest::new(bed)?.with_probes()?.with(json!({ "vsock": vsock })).start(script)?;
    Ok((guest, path))
}

/// Asks for a stream. `None` if the guest refuses.
fn dial(path: &Path, port: u32, deadline: Instant) -> Result<Option<UnixStream>> {
    let mut stream = UnixStream::connect(path)?;
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) => line.extend(byte),
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
            Err(error) => return Err(error).context("wait for the guest's answer"),
        }
    }
    ensure!(line.starts_with(b"OK "), "the answer is {:?}", String::from_utf8_lossy(&line));
    Ok(Some(stream))
}

/// As [`dial`], until somebody listens in the guest.
fn dial_patiently(path: &Path, port: u32, deadline: Instant) -> Result<UnixStream> {
    loop {
        if let Some(stream) = dial(path, port, deadline)? {
            return Ok(stream);
        }
        ensure!(Instant::now() < deadline, "nobody ever listened on port {port} of the guest");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Sends noise, closes that half, and checks what the mirror says and sends.
fn talk(mut stream: UnixStream, seed: u64, length: usize) -> Story {
    let sent = Noise::new(seed).bytes(length);
    stream.write_all(&sent).context("send")?;
    stream.shutdown(Shutdown::Write)?;
    let mut received = Vec::new();
    stream.read_to_end(&mut received).context("receive")?;
    let hash: String = Sha256::digest(&sent).iter().map(|byte| format!("{byte:02x}")).collect();
    let head = format!("{length} {hash}\n");
    ensure!(received.starts_with(head.as_bytes()), "stream {seed}: the guest read something else");
    let noise = Noise::new(length as u64).bytes(length);
    ensure!(received.get(head.len()..) == Some(&noise), "stream {seed}: what came back is not what was sent");
    Ok(())
}

fn hundreds_of_host_streams_carry_every_byte_at_once(bed: &Bed) -> Story {
    const STREAMS: u64 = 300;
    let (guest, path) = start(bed, &format!("cloche-tests probe vsock-mirror {PORT} {STREAMS}"))?;
    let deadline = bed.deadline() - Duration::from_secs(10);
    // All are open before the first is used. The first waits for the guest to listen.
    let mut streams = vec![dial_patiently(&path, PORT, deadline)?];
    for _ in 1..STREAMS {
        streams.push(dial(&path, PORT, deadline)?.context("the guest refused a stream")?);
    }
    // Most are short; a few are longer than all that device and guest buffer.
    let length = |seed: u64| if seed.is_multiple_of(50) { 1 << 20 } else { 3000 + 17 * seed as usize };
    let talks: Vec<_> = (0..)
        .zip(streams)
        .map(|(seed, stream)| thread::spawn(move || talk(stream, seed, length(seed))))
        .collect();
    for talk in talks {
        talk.join().map_err(|_| anyhow::anyhow!("a stream's thread panicked"))??;
    }
    let ran = guest.wait()?.passes()?;
    ensure!(ran.value("mirrored")? == "300", "not all were mirrored\n{}", ran.describe());
    Ok(())
}

fn host_stream_to_a_port_without_listener_ends(bed: &Bed) -> Story {
    let (guest, path) = start(bed, &format!("cloche-tests probe vsock-mirror {PORT} 1"))?;
    let deadline = bed.deadline() - Duration::from_secs(10);
    let first = dial_patiently(&path, PORT, deadline)?;
    ensure!(dial(&path, PORT + 1, deadline)?.is_none(), "nobody listens there, but somebody answered");
    // What is no request is not passed on, and disturbs nobody.
    let mut rude = UnixStream::connect(&path)?;
    rude.write_all(b"GET / HTTP/1.1\r\n")?;
    rude.set_read_timeout(Some(Duration::from_secs(10)))?;
    ensure!(rude.read(&mut [0; 16]).unwrap_or(0) == 0, "nonsense was answered");
    talk(first, 1, 100_000)?;
    guest.wait()?.passes()?;
    Ok(())
}
