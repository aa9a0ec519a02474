//! Unix stream sockets, for the socket device.

use std::{
    collections::HashMap,
    io,
    net::Shutdown,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{Mutex, PoisonError},
};

use rustix::net::{RecvFlags, SendFlags, send};
use vm_memory::VolatileSlice;

use crate::guest_memory;

/// One connected socket for each port. A port can be taken once: whoever is at the other end waits for one stream.
#[derive(Debug)]
pub struct Sockets {
    ports: Mutex<HashMap<u32, OwnedFd>>,
    listener: Option<UnixListener>,
}

impl Sockets {
    /// With these ports.
    pub fn new(ports: Vec<(u32, OwnedFd)>) -> Self {
        Self { ports: Mutex::new(ports.into_iter().collect()), listener: None }
    }

    /// The same, also taking host programs that connect here; the listener is non-blocking.
    pub fn listening(self, listener: Option<UnixListener>) -> Self {
        Self { listener, ..self }
    }

    /// Where host programs connect.
    pub fn listener(&self) -> Option<RawFd> {
        self.listener.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The next host program that has connected.
    pub fn accept(&self) -> io::Result<Socket> {
        let listener = self.listener.as_ref().ok_or(io::ErrorKind::WouldBlock)?;
        let (stream, _) = listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(Socket { stream })
    }

    /// Takes the socket of a port.
    pub fn connect(&self, port: u32) -> io::Result<Socket> {
        let taken = self.ports.lock().unwrap_or_else(PoisonError::into_inner).remove(&port);
        taken.map(|fd| Socket { stream: fd.into() }).ok_or_else(|| io::ErrorKind::ConnectionRefused.into())
    }
}

/// A connected, non-blocking socket.
#[derive(Debug)]
pub struct Socket {
    stream: UnixStream,
}

impl Socket {
    /// Reads into this process's memory; 0 is the end.
    pub fn read_own(&mut self, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::net::recv(&self.stream, into, RecvFlags::empty())?.0)
    }

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
    use std::io::{Read, Write};

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;

    #[test]
    fn connect_to_a_port_moves_bytes_both_ways() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut ours = Sockets::new(vec![(7, ours.into())]).connect(7).unwrap();
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
    fn accept_of_host_program_takes_it_and_does_not_wait() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("vsock")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let sockets = Sockets::new(Vec::new()).listening(Some(listener));
        assert!(sockets.listener().is_some());
        assert_eq!(sockets.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut theirs = UnixStream::connect(folder.path().join("vsock")).unwrap();
        let mut ours = sockets.accept().unwrap();
        theirs.write_all(b"hi").unwrap();
        let mut byte = [0];
        assert_eq!(ours.read_own(&mut byte).unwrap(), 1);
        assert_eq!(byte, *b"h");
    }

    #[test]
    fn connect_to_unknown_or_taken_port_is_refused() {
        let sockets = Sockets::new(vec![(7, UnixStream::pair().unwrap().0.into())]);
        assert_eq!(sockets.connect(8).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        sockets.connect(7).unwrap();
        assert_eq!(sockets.connect(7).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
