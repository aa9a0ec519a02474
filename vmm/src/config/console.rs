//! The console device.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

/// The virtio console device, `hvc0`: what the guest prints there is kept like what it prints on the serial port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Inherited file descriptor of a connected stream socket: what the guest prints goes there too, and what comes
    /// from there is typed. A reader that is slow holds the guest's output back.
    #[serde(default)]
    pub socket_fd: Option<RawFd>,
}
