//! The socket device (virtio 1.2 §5.10): streams between the guest and unix sockets of the host.
//!
//! A guest that connects to a port of the host (context id 2) gets the connected socket that the configuration has for
//! that port, once. A host program that connects to the listening socket which the VMM was given, and asks for a port of
//! the guest, gets a stream to it: see `handshake`.
//!
//! ```text
//!   device      queues: packets out of tx buffers, packets into rx buffers        knows virtio
//!   handshake   host programs that have not said their port yet                   knows a stream
//!   muxer       (guest port, host port) ─▶ connection; limits; whose turn it is   knows packets
//!   connection  one stream: credit, half-close, reset                             knows packets and a stream
//!   Connector   opens a stream for a port                                         knows the host
//! ```
//!
//! Each side of a stream says how much it can buffer (`buf_alloc`) and how much it has passed on (`fwd_cnt`), and sends
//! no more than that allows (§5.10.6.3). So a host process that does not read stops the guest's writer, and a guest
//! that does not read stops the host's, without anything in between growing.

mod backlog;
mod connection;
mod device;
mod handshake;
mod muxer;
pub mod packet;
#[cfg(any(test, feature = "fuzzing"))]
pub mod stream_model;

pub use device::Vsock;

use std::{io, net::Shutdown, os::fd::RawFd};

use vm_memory::VolatileSlice;

use crate::backends::socket::{Socket, Sockets};

/// Opens the host's end of a stream.
pub trait Connector: Send {
    /// What it opens.
    type Stream: Stream + Send;

    /// Connects to whatever serves `port`, without waiting.
    fn connect(&self, port: u32) -> io::Result<Self::Stream>;

    /// Where host programs connect that want a stream into the guest, if they may.
    fn listener(&self) -> Option<RawFd>;

    /// The next of them, without waiting.
    fn accept(&self) -> io::Result<Self::Stream>;
}

/// A non-blocking byte stream with two directions that end separately.
pub trait Stream {
    /// Reads into this process's memory; 0 is the end.
    fn read_own(&mut self, into: &mut [u8]) -> io::Result<usize>;
    /// Reads into guest memory; 0 is the end.
    fn read(&mut self, into: &[VolatileSlice]) -> io::Result<usize>;
    /// Writes from guest memory.
    fn write_guest(&mut self, from: &[VolatileSlice]) -> io::Result<usize>;
    /// Writes from this process's memory.
    fn write(&mut self, from: &[u8]) -> io::Result<usize>;
    /// Ends a direction, or both.
    fn shutdown(&mut self, how: Shutdown);
    /// By which readiness is reported.
    fn fd(&self) -> RawFd;
}

impl Connector for Sockets {
    type Stream = Socket;

    fn connect(&self, port: u32) -> io::Result<Socket> {
        Sockets::connect(self, port)
    }

    fn listener(&self) -> Option<RawFd> {
        Sockets::listener(self)
    }

    fn accept(&self) -> io::Result<Socket> {
        Sockets::accept(self)
    }
}

impl Stream for Socket {
    fn read_own(&mut self, into: &mut [u8]) -> io::Result<usize> {
        Socket::read_own(self, into)
    }

    fn read(&mut self, into: &[VolatileSlice]) -> io::Result<usize> {
        Socket::read(self, into)
    }

    fn write_guest(&mut self, from: &[VolatileSlice]) -> io::Result<usize> {
        Socket::write_guest(self, from)
    }

    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        Socket::write(self, from)
    }

    fn shutdown(&mut self, how: Shutdown) {
        Socket::shutdown(self, how);
    }

    fn fd(&self) -> RawFd {
        Socket::fd(self)
    }
}
