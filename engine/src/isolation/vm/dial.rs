//! Streams from the host into a guest, through the unix socket of its VMM (`CONNECT <port>`), and what the agent tells
//! there. Nothing that comes is trusted: sizes and time are bounded.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use cloche_protocol::{frame, machine::guest_port, message::Status};
use rustix::fs::{CWD, Mode, OFlags, openat};

/// The socket's name in a VM's directory.
pub(crate) const VSOCK_SOCKET: &str = "vsock.sock";
/// How long a guest may take for all of an answer. Its agent answers at once, if it can at all.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// `OK 4294967295\n`.
const MAX_ANSWER_BYTES: usize = 14;

/// Asks the agent of the guest in this sandbox's directory how its container is.
pub(crate) fn status(dir: &Path) -> io::Result<Status> {
    status_within(dir, PATIENCE)
}

fn status_within(dir: &Path, patience: Duration) -> io::Result<Status> {
    let until = Instant::now() + patience;
    let stream = connect_until(dir, guest_port::STATUS, until)?;
    let status = frame::read(Until { stream: &stream, until }).map_err(io::Error::other)?;
    status.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// A short name of a directory, since a socket's path is short (unix(7): 108 bytes), for as long as the descriptor lives.
pub(super) fn short(dir: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let held = openat(CWD, dir, flags, Mode::empty())?;
    let path = format!("/proc/self/fd/{}", held.as_raw_fd());
    Ok((held, path.into()))
}

/// A stream that is read up to a point in time, into however small pieces a guest cuts what it says.
pub(super) struct Until<'a> {
    pub stream: &'a UnixStream,
    pub until: Instant,
}

/// What the agent answers next, all of which must come within its usual time.
pub(super) fn answer(stream: &UnixStream) -> Until<'_> {
    Until { stream, until: Instant::now() + PATIENCE }
}

impl Read for Until<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        })
    }
}

/// A stream to a port of the guest. Who wants more of it than one read says how long that may take.
pub(crate) fn connect(dir: &Path, port: u32) -> io::Result<UnixStream> {
    connect_until(dir, port, Instant::now() + PATIENCE)
}

fn connect_until(dir: &Path, port: u32, until: Instant) -> io::Result<UnixStream> {
    let (_held, short) = short(dir)?;
    let mut stream = UnixStream::connect(short.join(VSOCK_SOCKET))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // Byte by byte: what follows the line is the guest's.
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        if answer.len() >= MAX_ANSWER_BYTES || (Until { stream: &stream, until }).read(&mut byte)? == 0 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        answer.extend(byte);
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    if answer.starts_with(b"OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A VMM that answers with these bytes.
    fn answered(bytes: Vec<u8>) -> io::Result<Status> {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(VSOCK_SOCKET)).unwrap();
        let vmm = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut line = [0; 13];
            client.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"CONNECT 1030\n");
            client.write_all(&bytes).unwrap();
        });
        let status = status(dir.path());
        vmm.join().unwrap();
        status
    }

    #[test]
    fn status_of_a_guest_that_answers_is_its_word() {
        let status = Status { pids: Some(3), memory_bytes: None };
        let mut bytes = b"OK 1073741824\n".to_vec();
        frame::write(&mut bytes, &status).unwrap();
        assert_eq!(answered(bytes).unwrap(), status);
    }

    #[test]
    fn status_of_a_guest_that_drips_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(VSOCK_SOCKET)).unwrap();
        let vmm = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            client.write_all(b"OK 1\n\x00\x01\0\0").unwrap();
            // 256 bytes; each comes long before a read of its own would end.
            while client.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let started = Instant::now();
        assert!(status_within(dir.path(), Duration::from_millis(200)).is_err());
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
        vmm.join().unwrap();
    }

    #[test]
    fn status_of_a_guest_that_refuses_or_babbles_is_an_error() {
        for bytes in ["", "NO\n", "OK 1073741824\n", "OK 1\n\u{1}\0\0\0x", &"x".repeat(100)] {
            assert!(answered(bytes.into()).is_err(), "{bytes:?}");
        }
    }
}
