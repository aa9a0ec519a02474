//! What is at the other end of a network device's cable: whole Ethernet frames, each behind a header that says which
//! checksum and segmentation work is left to do.
//!
//! The header is the 12 bytes of Linux's `virtio_net_hdr_v1`, which is what a tap speaks too (`IFF_VNET_HDR`).

use std::{io, os::fd::RawFd};

use vm_memory::VolatileSlice;

use crate::guest_memory::transfer::Room;

/// Bytes in front of each frame.
pub const HEADER_BYTES: usize = 12;
/// Bytes of the largest frame, that of a segment as large as IP allows: 65,535 and Ethernet's header with a VLAN tag.
pub const MAX_FRAME_BYTES: usize = 65535 + 18;

/// Work that one side may leave to the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames whose checksum is not filled in.
    pub checksum: bool,
    /// TCP segments larger than the MTU, over IPv4.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// Both of them with explicit congestion notification.
    pub ecn: bool,
    /// UDP datagrams to be cut in pieces, over IPv4 and IPv6.
    pub uso: bool,
}

/// Why a frame was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendError {
    /// Not now: the file descriptor becomes writable when it is worth another try.
    Full,
    /// Never: the frame or its header makes no sense, or the interface is down.
    Refused,
    /// There is nobody there any more.
    Gone,
}

/// Why no frame was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReceiveError {
    /// Not now: the file descriptor becomes readable when there is one.
    Empty,
    /// There is nobody there any more.
    Gone,
}

/// One end of a cable.
pub trait Link: Send {
    /// What to watch.
    fn fd(&self) -> RawFd;
    /// The work that it does for what is sent, and can leave undone for what is received.
    fn offloads(&self) -> Offloads;
    /// Says which work may be left undone for what is received; at first, none.
    fn set_receive_offloads(&mut self, offloads: Offloads) -> io::Result<()>;
    /// Fills `into` with the next frame and its header; returns the bytes of both. What does not fit is lost.
    fn receive(&mut self, into: &Room) -> Result<usize, ReceiveError>;
    /// Sends a frame with its header.
    fn send(&mut self, frame: &[VolatileSlice]) -> Result<(), SendError>;
    /// Goes on with what an earlier [`Link::send`] has begun, now that the file descriptor is writable.
    fn flush(&mut self) -> Result<(), SendError> {
        Ok(())
    }
}
