//! The ioctls of `/dev/net/tun` (Linux `include/uapi/linux/if_tun.h`).
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// Flags of an interface.
pub mod flag {
    /// Ethernet frames, not IP packets.
    pub const TAP: i16 = 0x0002;
    /// No packet information in front of a frame.
    pub const NO_PI: i16 = 0x1000;
    /// A virtio header in front of a frame.
    pub const VNET_HDR: i16 = 0x4000;
}

/// What may be left undone for frames that are read.
pub mod offload {
    /// Checksums.
    pub const CSUM: u32 = 0x01;
    /// TCP over IPv4.
    pub const TSO4: u32 = 0x02;
    /// TCP over IPv6.
    pub const TSO6: u32 = 0x04;
    /// Both with ECN.
    pub const TSO_ECN: u32 = 0x08;
    /// UDP over IPv4; since Linux 6.2.
    pub const USO4: u32 = 0x20;
    /// UDP over IPv6; since Linux 6.2.
    pub const USO6: u32 = 0x40;
}

/// Bytes of an interface's name, the final NUL included.
pub const NAME_BYTES: usize = libc::IFNAMSIZ;

fn request() -> libc::ifreq {
    // SAFETY: an all-zero ifreq is a valid one: integers and a union of plain data.
    unsafe { std::mem::zeroed() }
}

/// Makes `fd` the queue of the tap `name`, which is created if it is not there and the caller may.
pub fn attach(fd: BorrowedFd, name: &str, flags: i16) -> io::Result<()> {
    let mut request = request();
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: `request` is a live ifreq with a NUL-terminated name, which the kernel reads and writes.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) })
}

/// The flags of the tap behind `fd`.
pub fn flags(fd: BorrowedFd) -> io::Result<i16> {
    let mut request = request();
    // SAFETY: `request` is a live ifreq, which the kernel fills in.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
    // SAFETY: the kernel has set this field of the union; it is a plain integer anyway.
    Ok(unsafe { request.ifr_ifru.ifru_flags })
}

/// How many bytes are in front of a frame.
pub fn set_header_bytes(fd: BorrowedFd, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const bytes) })
}

/// What may be left undone for frames that are read: bits of [`offload`].
pub fn set_offloads(fd: BorrowedFd, offloads: u32) -> io::Result<()> {
    // SAFETY: the argument is an integer and no pointer.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
