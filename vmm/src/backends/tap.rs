//! A tap interface of the host as the other end of a network device.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use vm_memory::VolatileSlice;

use super::{
    link::{HEADER_BYTES, Link, Offloads, ReceiveError, SendError},
    tap_ioctls::{self as ioctls, flag, offload},
};
use crate::guest_memory::{self, transfer::Room};

/// Longest name of an interface.
pub const MAX_NAME_BYTES: usize = ioctls::NAME_BYTES - 1;

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// Whether the host's kernel knows UDP segmentation: Linux 6.2 and above.
    uso: bool,
}

/// Why a tap cannot be used. The caller adds its name or number.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The device file.
    #[error("opening /dev/net/tun failed; load the host's `tun` module")]
    Open(#[source] io::Error),
    /// No such interface, in use, or no right to it.
    #[error("attaching to it failed; it must be a tap that no other process uses and that this user may")]
    Attach(#[source] io::Error),
    /// An inherited descriptor of another kind.
    #[error("it is no tap")]
    NotATap(#[source] io::Error),
    /// An inherited descriptor with other flags.
    #[error("it has flags {0:#x}; open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    Flags(i16),
    /// Setting it up.
    #[error("setting its {what} failed")]
    SetUp {
        /// Which property.
        what: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// Attaches to the tap with this name in the network namespace of this process, which is made if it is not there; then
/// it is gone once nobody has the descriptor any more.
pub fn attach(name: &str) -> Result<OwnedFd, TapError> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").map_err(TapError::Open)?;
    ioctls::attach(file.as_fd(), name, flag::TAP | flag::NO_PI | flag::VNET_HDR).map_err(TapError::Attach)?;
    Ok(file.into())
}

impl Tap {
    /// Attaches to the tap with this name in the network namespace of this process.
    pub fn open(name: &str) -> Result<Self, TapError> {
        Self::set_up(attach(name)?.into())
    }

    /// Takes over a descriptor that is attached already.
    pub fn inherit(fd: OwnedFd) -> Result<Self, TapError> {
        let file = File::from(fd);
        let flags = ioctls::flags(file.as_fd()).map_err(TapError::NotATap)?;
        let needed = flag::TAP | flag::NO_PI | flag::VNET_HDR;
        if flags & needed != needed {
            return Err(TapError::Flags(flags));
        }
        Self::set_up(file)
    }

    fn set_up(file: File) -> Result<Self, TapError> {
        let failed = |what| move |source| TapError::SetUp { what, source };
        ioctls::set_header_bytes(file.as_fd(), HEADER_BYTES).map_err(failed("header size"))?;
        let flags = fcntl_getfl(&file).map_err(|error| failed("flags")(error.into()))?;
        fcntl_setfl(&file, flags | OFlags::NONBLOCK).map_err(|error| failed("flags")(error.into()))?;
        // A kernel refuses bits that it does not know.
        let uso = ioctls::set_offloads(file.as_fd(), offload::CSUM | offload::USO4 | offload::USO6).is_ok();
        ioctls::set_offloads(file.as_fd(), 0).map_err(failed("offloads"))?;
        Ok(Self { file, uso })
    }
}

/// The kernel's bits; segmentation without checksums does not exist.
fn bits(offloads: Offloads) -> u32 {
    if !offloads.checksum {
        return 0;
    }
    let mut bits = offload::CSUM;
    for (wanted, bit) in [
        (offloads.tso4, offload::TSO4),
        (offloads.tso6, offload::TSO6),
        (offloads.ecn && (offloads.tso4 || offloads.tso6), offload::TSO_ECN),
        (offloads.uso, offload::USO4 | offload::USO6),
    ] {
        if wanted {
            bits |= bit;
        }
    }
    bits
}

impl Link for Tap {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true, ecn: true, uso: self.uso }
    }

    fn set_receive_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        ioctls::set_offloads(self.file.as_fd(), bits(offloads))
    }

    fn receive(&mut self, into: &Room) -> Result<usize, ReceiveError> {
        match into.read(self.file.as_fd()) {
            Ok(bytes) => Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(ReceiveError::Empty),
            // EBADFD: the interface was deleted. Whatever else it is, trying again would spin.
            Err(_) => Err(ReceiveError::Gone),
        }
    }

    fn send(&mut self, frame: &[VolatileSlice]) -> Result<(), SendError> {
        match guest_memory::write(self.file.as_fd(), frame) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(SendError::Full),
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Err(SendError::Gone),
            // EINVAL: the kernel checks every field of the header. EIO: the interface is down.
            Err(_) => Err(SendError::Refused),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inherit_of_what_is_no_tap_fails() {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(Tap::inherit(file.into()), Err(TapError::NotATap(_))));
    }

    #[test]
    fn bits_of_segmentation_without_checksum_are_none() {
        assert_eq!(bits(Offloads { tso4: true, tso6: true, ecn: true, uso: true, checksum: false }), 0);
        assert_eq!(bits(Offloads { checksum: true, ecn: true, ..Offloads::default() }), offload::CSUM);
        let all = Offloads { checksum: true, tso4: true, tso6: true, ecn: true, uso: true };
        assert_eq!(bits(all), 0x6f);
    }
}
