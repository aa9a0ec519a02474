//! rtnetlink(7): messages as bytes, and a socket to the kernel for the network namespace that it is opened in.
//!
//! ```text
//!  message    length u32 │ type u16 │ flags u16 │ sequence u32 │ port u32 │ header of its type │ attributes
//!  attribute  length u16 │ type u16 │ value, padded to four bytes
//! ```
//! Lengths count themselves, but no padding. Numbers are in the machine's own order.

use std::{io, os::fd::OwnedFd};

use rustix::{
    io::retry_on_intr,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with},
};

/// linux/netlink.h.
pub(super) mod flag {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const ACK: u16 = 4;
    pub(in super::super) const DUMP: u16 = 0x300;
    pub(in super::super) const REPLACE: u16 = 0x100;
    pub(in super::super) const EXCLUSIVE: u16 = 0x200;
    pub(in super::super) const CREATE: u16 = 0x400;
}

/// Types of the messages that control others.
const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER_BYTES: usize = 16;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// Flags in an attribute's type.
const ATTRIBUTE_FLAGS: u16 = 0xc000;
/// A dump comes in pieces that are not larger than this (Linux net/netlink/af_netlink.c).
const MAX_PIECE_BYTES: usize = 64 << 10;
/// More than that no network namespace of a container has to tell.
const MAX_DUMP_BYTES: usize = 16 << 20;

/// A message that is being written.
#[derive(Debug, Clone)]
pub(super) struct Message(Vec<u8>);

impl Message {
    pub(super) fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | flag::REQUEST).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(header);
        Self(bytes).padded()
    }

    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (ATTRIBUTE_HEADER_BYTES + value.len()) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.padded()
    }

    pub(super) fn with_u32(self, kind: u16, value: u32) -> Self {
        self.with(kind, &value.to_ne_bytes())
    }

    /// With a name, which ends with a NUL.
    pub(super) fn with_name(self, kind: u16, name: &str) -> Self {
        let mut bytes = name.as_bytes().to_vec();
        bytes.push(0);
        self.with(kind, &bytes)
    }

    /// With an attribute whose value is the attributes that `inside` adds.
    pub(super) fn nesting(mut self, kind: u16, inside: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        self = inside(self.with(kind, &[]));
        let length = ((self.0.len() - start) as u16).to_ne_bytes();
        self.0[start..start + length.len()].copy_from_slice(&length);
        self
    }

    fn padded(mut self) -> Self {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(super) fn into_bytes(mut self) -> Vec<u8> {
        let length = (self.0.len() as u32).to_ne_bytes();
        self.0[..length.len()].copy_from_slice(&length);
        self.0
    }
}

/// A message that the kernel has sent: its type, and header and attributes.
#[derive(Debug, Clone)]
pub(super) struct Told {
    pub(super) kind: u16,
    body: Vec<u8>,
}

impl Told {
    /// Its type's header of so many bytes.
    pub(super) fn header<const N: usize>(&self) -> io::Result<[u8; N]> {
        self.body.first_chunk().copied().ok_or_else(torn)
    }

    /// The attributes behind a header of so many bytes.
    pub(super) fn attributes(&self, header_bytes: usize) -> Attributes<'_> {
        Attributes(self.body.get(header_bytes..).unwrap_or_default())
    }
}

/// Attributes, by type and value.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    pub(super) fn value(mut self, kind: u16) -> Option<&'a [u8]> {
        self.find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    pub(super) fn find_u32(self, kind: u16) -> Option<u32> {
        self.value(kind)?.try_into().ok().map(u32::from_ne_bytes)
    }

    pub(super) fn find_name(self, kind: u16) -> Option<String> {
        let bytes = self.value(kind)?;
        Some(String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned())
    }

    /// Those in the value of one.
    pub(super) fn within(self, kind: u16) -> Self {
        Self(self.value(kind).unwrap_or_default())
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (length, rest) = self.0.split_first_chunk()?;
        let (kind, _) = rest.split_first_chunk()?;
        let length = usize::from(u16::from_ne_bytes(*length));
        let value = self.0.get(ATTRIBUTE_HEADER_BYTES..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes(*kind) & !ATTRIBUTE_FLAGS, value))
    }
}

fn torn() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel sent a message that ends too early")
}

/// Takes a piece of an answer apart. True once the answer is complete.
pub(super) fn take(mut piece: &[u8], told: &mut Vec<Told>) -> io::Result<bool> {
    while let Some(length) = piece.first_chunk() {
        let length = u32::from_ne_bytes(*length) as usize;
        let message = piece.get(..length).filter(|message| message.len() >= HEADER_BYTES).ok_or_else(torn)?;
        let kind = message[4..].first_chunk().map(|kind| u16::from_ne_bytes(*kind)).ok_or_else(torn)?;
        let body = &message[HEADER_BYTES..];
        match kind {
            // Of either the first four bytes are 0 or an error's number, negative.
            DONE | ERROR => {
                let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                return if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(true) };
            }
            _ => told.push(Told { kind, body: body.to_vec() }),
        }
        piece = piece.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// A socket.
#[derive(Debug)]
pub(super) struct Kernel(OwnedFd);

impl Kernel {
    /// That of this thread's network namespace, also if the thread moves on.
    pub(super) fn here() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        // NETLINK_ROUTE is the default, 0.
        Ok(Self(socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?))
    }

    /// Has something changed.
    pub(super) fn change(&self, message: Message) -> io::Result<()> {
        self.ask(message).map(drop)
    }

    /// All that there is of a kind; `get` is the type that asks for it.
    pub(super) fn list(&self, get: u16, header: &[u8]) -> io::Result<Vec<Told>> {
        self.ask(Message::new(get, flag::DUMP, header))
    }

    fn ask(&self, message: Message) -> io::Result<Vec<Told>> {
        send(&self.0, &message.into_bytes(), SendFlags::empty())?;
        let mut piece = vec![0; MAX_PIECE_BYTES];
        let (mut told, mut bytes) = (Vec::new(), 0);
        loop {
            let (count, _) = retry_on_intr(|| recv(&self.0, &mut piece[..], RecvFlags::empty()))?;
            bytes += count;
            if take(&piece[..count], &mut told)? {
                return Ok(told);
            }
            if bytes > MAX_DUMP_BYTES {
                return Err(io::Error::other("the network namespace has more in it than a container's"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_is_read_as_it_is_written() {
        let message = Message::new(16, flag::ACK, &[7; 6])
            .with_name(3, "eth0")
            .nesting(18, |inner| inner.with_name(1, "veth").with_u32(2, 9))
            .with_u32(4, 1500);
        let bytes = message.into_bytes();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(bytes[..8], [bytes.len() as u8, 0, 0, 0, 16, 0, 5, 0]);
        let mut told = Vec::new();
        assert!(!take(&bytes, &mut told).unwrap());
        assert_eq!(told[0].kind, 16);
        assert_eq!(told[0].header().unwrap(), [7; 6]);
        let attributes = told[0].attributes(8);
        assert_eq!(attributes.find_name(3).as_deref(), Some("eth0"));
        assert_eq!(attributes.within(18).find_name(1).as_deref(), Some("veth"));
        assert_eq!(attributes.within(18).find_u32(2), Some(9));
        assert_eq!(attributes.find_u32(4), Some(1500));
        assert_eq!(attributes.value(5), None);
    }

    #[test]
    fn attributes_that_end_too_early_are_none() {
        for bytes in [&[][..], &[8, 0, 1], &[8, 0, 1, 0, 5], &[0, 0, 0, 0], &[3, 0, 1, 0]] {
            assert_eq!(Attributes(bytes).count(), 0, "{bytes:?}");
        }
    }

    #[test]
    fn error_of_the_kernel_is_its_number() {
        let refusal = Message::new(ERROR, 0, &(-17_i32).to_ne_bytes()).into_bytes();
        let error = take(&refusal, &mut Vec::new()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(17));
        let done = Message::new(DONE, 0, &[0; 4]).into_bytes();
        assert!(take(&done, &mut Vec::new()).unwrap());
        let mut torn = Message::new(16, 0, &[]).into_bytes();
        torn[0] = 200;
        assert_eq!(take(&torn, &mut Vec::new()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        torn[0] = 3;
        assert!(take(&torn, &mut Vec::new()).is_err());
    }

    #[test]
    fn loopback_is_among_the_links() {
        const GET_LINK: u16 = 18;
        let links = Kernel::here().unwrap().list(GET_LINK, &[0; 16]).unwrap();
        let names: Vec<_> = links.iter().filter_map(|link| link.attributes(16).find_name(3)).collect();
        assert!(names.iter().any(|name| name == "lo"), "{names:?}");
    }
}
