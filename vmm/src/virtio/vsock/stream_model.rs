//! A host's end of a stream for tests: how much it takes and what it sends is up to the test.
#![allow(missing_docs, dead_code, clippy::unwrap_used, clippy::indexing_slicing)]

use std::{
    collections::VecDeque,
    io,
    net::Shutdown,
    os::fd::RawFd,
    sync::{Arc, Mutex},
};

use vm_memory::VolatileSlice;

use super::{Connector, Stream};

#[derive(Debug)]
struct State {
    to_guest: VecDeque<u8>,
    ended: bool,
    received: Vec<u8>,
    accepts: usize,
    refuses: bool,
    read_shut: bool,
    write_shut: bool,
    fd: RawFd,
}

/// The device's end.
#[derive(Debug)]
pub struct ModelStream(Arc<Mutex<State>>);

/// The test's end.
#[derive(Debug, Clone)]
pub struct Peer(Arc<Mutex<State>>);

/// A stream that takes whatever it is given.
pub fn stream() -> (ModelStream, Peer) {
    numbered_stream(100)
}

fn numbered_stream(fd: RawFd) -> (ModelStream, Peer) {
    let state = Arc::new(Mutex::new(State {
        to_guest: VecDeque::new(),
        ended: false,
        received: Vec::new(),
        accepts: usize::MAX,
        refuses: false,
        read_shut: false,
        write_shut: false,
        fd,
    }));
    (ModelStream(state.clone()), Peer(state))
}

impl Peer {
    pub fn send(&self, bytes: &[u8]) {
        self.0.lock().unwrap().to_guest.extend(bytes);
    }

    pub fn end(&self) {
        self.0.lock().unwrap().ended = true;
    }

    pub fn received(&self) -> Vec<u8> {
        self.0.lock().unwrap().received.clone()
    }

    /// Takes so many more bytes before it blocks.
    pub fn accept(&self, bytes: usize) {
        self.0.lock().unwrap().accepts = bytes;
    }

    pub fn refuse(&self) {
        self.0.lock().unwrap().refuses = true;
    }

    pub fn read_shut(&self) -> bool {
        self.0.lock().unwrap().read_shut
    }

    pub fn write_shut(&self) -> bool {
        self.0.lock().unwrap().write_shut
    }

    pub fn fd(&self) -> RawFd {
        self.0.lock().unwrap().fd
    }
}

impl Stream for ModelStream {
    fn read_own(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut state = self.0.lock().unwrap();
        if state.to_guest.is_empty() {
            return if state.ended { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        let count = into.len().min(state.to_guest.len());
        for (byte, from) in into.iter_mut().zip(state.to_guest.drain(..count)) {
            *byte = from;
        }
        Ok(count)
    }

    fn read(&mut self, into: &[VolatileSlice]) -> io::Result<usize> {
        let mut state = self.0.lock().unwrap();
        if state.to_guest.is_empty() {
            return if state.ended { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        let mut read = 0;
        for slice in into {
            let count = slice.len().min(state.to_guest.len());
            let bytes: Vec<u8> = state.to_guest.drain(..count).collect();
            slice.copy_from(&bytes);
            read += count;
        }
        Ok(read)
    }

    fn write_guest(&mut self, from: &[VolatileSlice]) -> io::Result<usize> {
        let mut bytes = Vec::new();
        for slice in from {
            let mut part = vec![0; slice.len()];
            slice.copy_to(&mut part);
            bytes.extend(part);
        }
        self.write(&bytes)
    }

    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock().unwrap();
        if state.refuses {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = from.len().min(state.accepts);
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        state.accepts -= count;
        state.received.extend(&from[..count]);
        Ok(count)
    }

    fn shutdown(&mut self, how: Shutdown) {
        let mut state = self.0.lock().unwrap();
        state.read_shut |= matches!(how, Shutdown::Read | Shutdown::Both);
        state.write_shut |= matches!(how, Shutdown::Write | Shutdown::Both);
    }

    fn fd(&self) -> RawFd {
        self.0.lock().unwrap().fd
    }
}

/// Connects every port but 404, and keeps the peers for the test.
#[derive(Clone, Default)]
pub struct ModelConnector {
    peers: Arc<Mutex<Vec<Peer>>>,
    waiting: Arc<Mutex<VecDeque<ModelStream>>>,
}

/// By which it is told that host programs have connected.
pub const LISTENER: RawFd = 99;

impl ModelConnector {
    /// A host program connects.
    pub fn dial(&self) -> Peer {
        let mut peers = self.peers.lock().unwrap();
        let (stream, peer) = numbered_stream(1000 + peers.len() as RawFd);
        peers.push(peer.clone());
        self.waiting.lock().unwrap().push_back(stream);
        peer
    }

    /// The peer of the `index`th connection.
    pub fn peer(&self, index: usize) -> Peer {
        self.peers.lock().unwrap()[index].clone()
    }

    /// One of the peers, if there is any.
    pub fn any_peer(&self, index: usize) -> Option<Peer> {
        let peers = self.peers.lock().unwrap();
        peers.get(index % peers.len().max(1)).cloned()
    }
}

impl Connector for ModelConnector {
    type Stream = ModelStream;

    fn connect(&self, port: u32) -> io::Result<ModelStream> {
        if port == 404 {
            return Err(io::ErrorKind::NotFound.into());
        }
        let mut peers = self.peers.lock().unwrap();
        let (stream, peer) = numbered_stream(1000 + peers.len() as RawFd);
        peers.push(peer);
        Ok(stream)
    }

    fn listener(&self) -> Option<RawFd> {
        Some(LISTENER)
    }

    fn accept(&self) -> io::Result<ModelStream> {
        self.waiting.lock().unwrap().pop_front().ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }
}
