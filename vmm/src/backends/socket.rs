//! Unix stream sockets, for the socket device.

use std::{
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::{Path, PathBuf},
};

use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with,
};
use vm_memory::VolatileSlice;

use crate::guest_memory;

/// Sockets `{prefix}_{port}`.
#[derive(Debug)]
pub struct Sockets {
    prefix: PathBuf,
}

impl Sockets {
    /// With this prefix.
    pub fn new(prefix: &Path) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// Connects to the socket of a port. Never waits: a listener whose backlog is full counts as absent.
    pub fn connect(&self, port: u32) -> io::Result<Socket> {
        let mut path = self.prefix.as_os_str().as_bytes().to_vec();
        path.extend(format!("_{port}").bytes());
        let address = SocketAddrUnix::new(path.as_slice())?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)?;
        Ok(Socket { stream: UnixStream::from(socket) })
    }
}

/// A connected, non-blocking socket.
#[derive(Debug)]
pub struct Socket {
    stream: UnixStream,
}

impl Socket {
    /// Reads into guest memory; 0 is the end.
    pub fn read(&mut self, into: &[VolatileSlice]) -> io::Result<usize> {
        guest_memory::read(self.stream.as_fd(), into)
    }

    /// Writes from guest memory.
    pub fn write_guest(&mut self, from: &[VolatileSlice]) -> io::Result<usize> {
        guest_memory::send(self.stream.as_fd(), from)
    }

    /// Writes from this process's memory.
    pub fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        Ok(send(&self.stream, from, SendFlags::NOSIGNAL)?)
    }

    /// Ends one or both directions. The peer may be gone, which is an end too.
    pub fn shutdown(&mut self, how: Shutdown) {
        let _ = self.stream.shutdown(how);
    }

    /// The file descriptor.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixListener,
    };

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;

    #[test]
    fn connect_to_listening_port_moves_bytes_both_ways() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("vsock_7")).unwrap();
        let sockets = Sockets::new(&folder.path().join("vsock"));
        let mut ours = sockets.connect(7).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        let memory = guest_memory::map(&[(GuestAddress(0), 4096)]).unwrap();
        let buffer = [memory.get_slice(GuestAddress(0), 4).unwrap()];
        assert_eq!(ours.read(&buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        theirs.write_all(b"ping").unwrap();
        assert_eq!(ours.read(&buffer).unwrap(), 4);
        assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(0)).unwrap(), *b"ping");
        assert_eq!(ours.write_guest(&buffer).unwrap(), 4);
        assert_eq!(ours.write(b"pong").unwrap(), 4);
        ours.shutdown(Shutdown::Write);
        let mut seen = String::new();
        theirs.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "pingpong");
        drop(theirs);
        assert_eq!(ours.write_guest(&buffer).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn connect_to_port_without_listener_fails() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Sockets::new(&folder.path().join("vsock")).connect(7).is_err());
        assert!(Sockets::new(Path::new(&"x".repeat(200))).connect(7).is_err());
    }
}
