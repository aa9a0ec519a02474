//! Numbers that the virtual machine and the guest share: vsock ports, I/O ports, marks.

use serde::{Deserialize, Serialize};

/// The context id by which a guest reaches its host (virtio 1.2 §5.10.4).
pub const HOST_CID: u32 = 2;
/// The context id that every guest gets. Each VM has a vsock device of its own, so they need not differ.
pub const GUEST_CID: u32 = 3;

/// Guest-to-host vsock ports.
pub mod vsock_port {
    /// Control messages, framed as in [`crate::frame`].
    pub const CONTROL: u32 = 1024;
    /// The process's stdin, raw; the host's half-close is end of file.
    pub const STDIN: u32 = 1025;
    /// The process's stdout, or its terminal's output, raw; the guest's half-close is end of file.
    pub const STDOUT: u32 = 1026;
    /// The process's stderr, raw; the guest's half-close is end of file.
    pub const STDERR: u32 = 1027;
}

/// Host-to-guest vsock ports.
pub mod guest_port {
    /// Whoever connects is told [`crate::message::Status`], framed as in [`crate::frame`], and the stream ends.
    pub const STATUS: u32 = 1030;
    /// Whoever connects and asks gets the container's changes: see [`crate::changes`]. Also after the container's end.
    pub const CHANGES: u32 = 1031;
    /// Whoever connects sends a [`crate::message::Request`], framed as in [`crate::frame`].
    pub const REQUESTS: u32 = 1032;
}

/// x86 I/O ports of the VMM's own device.
pub mod io_port {
    /// Writing one byte, a [`super::GuestMark`], makes the VMM stamp its clock.
    pub const MARK: u16 = 0x5c0;
    /// Writing four bytes, little-endian, ends the VM at once with that code.
    pub const EXIT: u16 = 0x5c4;
}

/// A moment in the guest's start that the VMM stamps with the host's CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum GuestMark {
    /// The agent's first instructions: the kernel has handed over to `/init`.
    Init = 1,
    /// The agent has read its configuration and dialled the control port.
    AgentReady = 2,
    /// The root file system is mounted and the container's process is about to start.
    ProcessStart = 3,
    /// The container's process has ended.
    ProcessExit = 4,
}

impl GuestMark {
    /// The mark that a byte written to [`io_port::MARK`] stands for, if any.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Init, Self::AgentReady, Self::ProcessStart, Self::ProcessExit]
            .into_iter()
            .find(|mark| *mark as u8 == byte)
    }
}
