//! Streams from the host into a guest, through the unix socket of its VMM (`CONNECT <port>`), and what the agent tells
//! there. Nothing that comes is trusted: sizes and time are bounded.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use cloche_protocol::{frame, machine::guest_port, message::Status};
use rustix::fs::{CWD, Mode, OFlags, openat};

/// The socket's name in a VM's directory.
pub(crate) const VSOCK_SOCKET: &str = "vsock.sock";
/// How long a guest may take for each step. Its agent answers at once, if it can at all.
const PATIENCE: Duration = Duration::from_secs(5);
/// `OK 4294967295\n`.
const MAX_ANSWER_BYTES: usize = 14;

/// Asks the agent of the guest in this sandbox's directory how its container is.
pub(crate) fn status(dir: &Path) -> io::Result<Status> {
    let stream = connect(dir, guest_port::STATUS)?;
    let status = frame::read(&stream).map_err(io::Error::other)?;
    status.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// A short name of a directory, since a socket's path is short (unix(7): 108 bytes), for as long as the descriptor lives.
pub(super) fn short(dir: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let held = openat(CWD, dir, flags, Mode::empty())?;
    let path = format!("/proc/self/fd/{}", held.as_raw_fd());
    Ok((held, path.into()))
}

/// A stream to a port of the guest.
pub(crate) fn connect(dir: &Path, port: u32) -> io::Result<UnixStream> {
    let (_held, short) = short(dir)?;
    let mut stream = UnixStream::connect(short.join(VSOCK_SOCKET))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // Byte by byte: what follows the line is the guest's.
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        if answer.len() >= MAX_ANSWER_BYTES || stream.read(&mut byte)? == 0 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        answer.extend(byte);
    }
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
    fn status_of_a_guest_that_refuses_or_babbles_is_an_error() {
        for bytes in ["", "NO\n", "OK 1073741824\n", "OK 1\n\u{1}\0\0\0x", &"x".repeat(100)] {
            assert!(answered(bytes.into()).is_err(), "{bytes:?}");
        }
    }
}
