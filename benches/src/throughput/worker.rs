//! The side that does the work and times it: `/init` of the guest, or a process of the host.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount};
use rustix::net::acceptfrom;
use rustix::system::{RebootCommand, reboot};

use super::phases::{Carrier, DISK_BYTES, PHASES, Work};
use super::{GUEST, GUEST_PORT, HOST, HOST_PORT};
use crate::vsock;

/// Bytes that it reads and writes of a stream at a time.
const PIECE_BYTES: usize = 128 * 1024;
/// For buffers and places: what any disk takes past the page cache.
const ALIGNMENT: usize = 4096;

/// Whether this program is the first process of a guest.
pub fn is_guest() -> bool {
    std::process::id() == 1
}

/// `/init`: sets the guest up, works, and resets the machine.
pub fn guest() {
    if let Err(error) = in_guest() {
        println!("\ncloche-bench: {error:#}");
    }
    // Waits until the serial port has sent it.
    let _ = rustix::termios::tcdrain(std::io::stdout());
    let _ = reboot(RebootCommand::Restart);
}

fn in_guest() -> Result<()> {
    mount("dev", "/dev", "devtmpfs", MountFlags::empty(), None).context("mount /dev")?;
    for arguments in [&["lo", "up"][..], &["eth0", GUEST, "netmask", "255.255.255.0", "up"]] {
        let status = Command::new("/bin/busybox").arg("ifconfig").args(arguments).status();
        ensure!(status.context("start busybox")?.success(), "busybox ifconfig {arguments:?} failed");
    }
    let listener = vsock::listen(GUEST_PORT);
    work(Path::new("/dev/vda"), HOST, || {
        let listener = listener.context("listen on vsock")?;
        // Reading and writing is the same for all streams.
        acceptfrom(&listener).context("accept on vsock").map(|(stream, _)| UnixStream::from(stream))
    })
}

/// The same work without a guest.
pub fn process(disk: &Path, sockets: &PathBuf) -> Result<()> {
    let listener = UnixListener::bind(sockets).context("listen")?;
    work(disk, "127.0.0.1", || Ok(listener.accept().context("accept")?.0))
}

fn work(disk: &Path, host: &str, accept: impl FnOnce() -> Result<UnixStream>) -> Result<()> {
    let connect = || -> Result<TcpStream> {
        let stream = TcpStream::connect((host, HOST_PORT)).context("connect to the host")?;
        stream.set_nodelay(true)?;
        Ok(stream)
    };
    let (mut control, mut network) = (connect()?, connect()?);
    let mut has_sockets = [0];
    control.read_exact(&mut has_sockets).context("hear from the host")?;
    let mut sockets = if has_sockets == [1] { Some(accept()?) } else { None };
    let mut buffer = vec![0; PIECE_BYTES];
    for phase in PHASES {
        control.write_all(&[1])?;
        let mut go = [0];
        control.read_exact(&mut go).context("wait for the host")?;
        if go == [0] {
            continue;
        }
        let began = Instant::now();
        let done = match phase.carrier() {
            None => use_disk(disk, &phase.work),
            Some(Carrier::Network) => stream(&mut network, &phase.work, &mut buffer).map(|()| began),
            Some(Carrier::Sockets) => match &mut sockets {
                Some(sockets) => stream(sockets, &phase.work, &mut buffer).map(|()| began),
                None => Ok(began),
            },
        };
        let began = done.with_context(|| phase.name)?;
        let ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        control.write_all(&ns.to_le_bytes())?;
    }
    Ok(())
}

/// Returns when the operations began.
fn use_disk(disk: &Path, work: &Work) -> Result<Instant> {
    let Work::Disk { write, bytes, random, operations, threads } = *work else { return Ok(Instant::now()) };
    let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap_or_default();
    let file = File::options()
        .read(true)
        .write(write)
        .custom_flags(direct)
        .open(disk)
        .with_context(|| format!("open {}", disk.display()))?;
    let one_thread = |file: &File, seed: u64, buffer: &mut [u8]| -> Result<()> {
        let mut places =
            Places { random, bytes: bytes as u64, state: 0x9e37_79b9_7f4a_7c15 ^ (seed << 32), at: 0 };
        for _ in 0..operations {
            let place = places.next();
            if write {
                file.write_all_at(buffer, place)
                    .with_context(|| format!("write {bytes} bytes at {place}"))?;
            } else {
                file.read_exact_at(buffer, place)
                    .with_context(|| format!("read {bytes} bytes at {place}"))?;
            }
        }
        Ok(())
    };
    let mut buffers: Vec<Vec<u8>> = (0..threads).map(|_| vec![1; bytes + ALIGNMENT]).collect();
    let began = Instant::now();
    thread::scope(|scope| {
        let mut workers = Vec::new();
        for (seed, buffer) in (0..).zip(&mut buffers) {
            let lead = buffer.as_ptr().align_offset(ALIGNMENT);
            let aligned = buffer.get_mut(lead..lead + bytes).context("align a buffer")?;
            if threads == 1 {
                return one_thread(&file, seed, aligned);
            }
            let file = &file;
            workers.push(scope.spawn(move || one_thread(file, seed, aligned)));
        }
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(result) => result,
            Err(_) => anyhow::bail!("a thread panicked"),
        })
    })?;
    Ok(began)
}

/// Where operations go.
struct Places {
    random: bool,
    bytes: u64,
    state: u64,
    at: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        let there = DISK_BYTES / self.bytes;
        if self.random {
            // xorshift64 (Marsaglia 2003): the same places every time.
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            self.state % there * self.bytes
        } else {
            self.at += 1;
            (self.at - 1) % there * self.bytes
        }
    }
}

fn stream<S: Read + Write>(stream: &mut S, work: &Work, buffer: &mut [u8]) -> Result<()> {
    match *work {
        Work::Send { bytes, .. } => {
            give(stream, bytes, buffer)?;
            let mut answer = [0];
            stream.read_exact(&mut answer).context("wait for the host's answer")
        }
        Work::Receive { bytes, .. } => {
            stream.write_all(&[1]).context("ask for a stream")?;
            take(stream, bytes, buffer)
        }
        Work::Disk { .. } => Ok(()),
    }
}

/// Writes so many bytes.
pub fn give<S: Write>(stream: &mut S, bytes: u64, buffer: &[u8]) -> Result<()> {
    let mut left = bytes;
    while left > 0 {
        let here = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        stream.write_all(&buffer[..here]).with_context(|| format!("write, with {left} bytes to go"))?;
        left -= here as u64;
    }
    Ok(())
}

/// Reads so many bytes.
pub fn take<S: Read>(stream: &mut S, bytes: u64, buffer: &mut [u8]) -> Result<()> {
    let mut left = bytes;
    while left > 0 {
        let here = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count =
            stream.read(&mut buffer[..here]).with_context(|| format!("read, with {left} bytes to go"))?;
        ensure!(count > 0, "the stream ended with {left} bytes to go");
        left -= count as u64;
    }
    Ok(())
}
