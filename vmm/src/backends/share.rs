//! The socket to the file server of a share: `SOCK_SEQPACKET`, one message of its protocol in each packet. What a
//! message means is not known here, but for its header.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use rustix::net::{RecvFlags, recv};
use vm_memory::VolatileSlice;

use crate::guest_memory;

/// Bytes of a reply's header.
pub const REPLY_HEADER_BYTES: usize = 16;

/// A connected socket.
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Talks to whoever is at the other end.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket })
    }

    /// For the event loop.
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Sends one message, or nothing.
    pub fn send(&self, parts: &[VolatileSlice]) -> io::Result<()> {
        guest_memory::send(self.socket.as_fd(), parts).map(drop)
    }

    /// The header of the next message, which stays there. An end of the stream is an error.
    pub fn peek(&self) -> io::Result<[u8; REPLY_HEADER_BYTES]> {
        let mut header = [0; REPLY_HEADER_BYTES];
        match recv(&self.socket, &mut header, RecvFlags::PEEK | RecvFlags::DONTWAIT)? {
            (REPLY_HEADER_BYTES, _) => Ok(header),
            (0, _) => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is shorter than its header")),
        }
    }

    /// Receives the next message into these buffers; how many bytes it had, which may be more than fit.
    pub fn receive(&self, parts: &[VolatileSlice]) -> io::Result<usize> {
        guest_memory::receive(self.socket.as_fd(), parts)
    }

    /// Passes over the next message.
    pub fn discard(&self) -> io::Result<()> {
        recv(&self.socket, &mut [0; 1], RecvFlags::DONTWAIT)?;
        Ok(())
    }
}
