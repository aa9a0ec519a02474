//! Shares that come and go while a server runs: those of further containers in its VM. Who may open the listening socket
//! may add to what the guest sees; the socket is in a directory that nobody but the VM's owner enters, and the guest and
//! its VMM have no way to it.
//!
//! ```text
//!  owner ── connects ────────────────────────────────────▶ server: the number that its shares have from here on
//!        ── mounts, as descriptors (SCM_RIGHTS), or none ──▶       how many it has now
//!        ── the connection ends, whatever has ended it ────▶       they are given back, with all that the guest had in them
//! ```
//! Messages of one connection are answered in their order, and connections that have ended come before newer ones: an
//! answer also says that whatever had ended before is given back.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, SocketFlags, accept_with, recv, recvmsg, send, sendmsg,
    },
};

use crate::{JailError, Shared, jail, retry, server::Server};

/// As many as one message carries (Linux: `SCM_MAX_FD`).
const MAX_DESCRIPTORS: usize = 253;
/// Connections at once; a further one is told nothing.
pub const MAX_OWNERS: usize = 64;
/// Shares of one connection; so many numbers it has for itself.
pub const MAX_SHARES: usize = 1 << 12;

/// The server's side.
#[derive(Debug)]
pub(crate) struct Additions {
    listener: OwnedFd,
    owners: Vec<Owner>,
    /// Numbers are not given twice: what the guest still knows of one that is gone is no other.
    next: usize,
    /// It could not be accepted from: the guest has as many files open as there can be. Until something else happens.
    rests: bool,
}

#[derive(Debug)]
struct Owner {
    socket: OwnedFd,
    first: usize,
    count: usize,
}

/// Receives a message of `room` bytes at most, and the descriptors that come with it.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    room: &mut [u8],
    flags: RecvFlags,
) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let length = retry(|| {
        recvmsg(socket, &mut [IoSliceMut::new(room)], &mut control, flags | RecvFlags::CMSG_CLOEXEC)
    })?
    .bytes;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok((length, fds.flatten().collect()))
}

impl Additions {
    /// Shares get numbers from `taken` on.
    pub(crate) fn new(listener: OwnedFd, taken: usize) -> Self {
        Self { listener, owners: Vec::new(), next: taken.next_multiple_of(MAX_SHARES), rests: false }
    }

    /// Serves owners until the guest's socket has something.
    pub(crate) fn serve(&mut self, guest: BorrowedFd<'_>, server: &mut Server) -> Result<(), Errno> {
        loop {
            let of = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
            let mut fds = vec![of(guest)];
            fds.extend(self.owners.iter().map(|owner| of(owner.socket.as_fd())));
            if !self.rests {
                fds.push(of(self.listener.as_fd()));
            }
            retry(|| poll(&mut fds, None))?;
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            self.rests = false;
            let mut places = ready.iter().copied();
            let has_request = places.next() == Some(true);
            self.owners.retain_mut(|owner| {
                let goes_on = places.next() != Some(true) || owner.advance(server);
                if !goes_on {
                    server.take_back(owner.first..owner.first + MAX_SHARES);
                }
                goes_on
            });
            if places.next() == Some(true) {
                self.accept();
            }
            if has_request {
                return Ok(());
            }
        }
    }

    fn accept(&mut self) {
        let Ok(socket) = accept_with(&self.listener, SocketFlags::CLOEXEC) else {
            self.rests = true;
            return;
        };
        if self.owners.len() >= MAX_OWNERS {
            return;
        }
        let first = self.next;
        let told = send(&socket, &(first as u64).to_le_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        if told.is_ok() {
            self.next = first.saturating_add(MAX_SHARES);
            self.owners.push(Owner { socket, first, count: 0 });
        }
    }
}

impl Owner {
    /// Takes one message in; false if there will be none any more.
    fn advance(&mut self, server: &mut Server) -> bool {
        let mounts = match receive(self.socket.as_fd(), &mut [0], RecvFlags::DONTWAIT) {
            Ok((1.., mounts)) => mounts,
            Err(Errno::AGAIN) => return true,
            _ => return false,
        };
        for mount in mounts {
            if self.count == MAX_SHARES {
                break;
            }
            server.add(self.first + self.count, mount);
            self.count += 1;
        }
        let answer = (self.count as u64).to_le_bytes();
        send(&self.socket, &answer, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).is_ok()
    }
}

/// An owner's side: shares of a server for as long as this lives, in whichever processes.
#[derive(Debug)]
pub struct Addition {
    socket: OwnedFd,
    first: usize,
}

/// Why files cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// One of them is not usable.
    #[error(transparent)]
    Open(#[from] JailError),
    /// The server does not answer as it should.
    #[error("the file server of the virtual machine does not take more files")]
    Socket(#[source] io::Error),
    /// It has no room.
    #[error(
        "the file server of the virtual machine has taken {taken} of {given} mounts; it can hold no more files"
    )]
    Full {
        /// How many there are now.
        taken: u64,
        /// How many there should be.
        given: usize,
    },
}

impl Addition {
    /// Over a socket that is connected to a server's.
    pub fn over(socket: OwnedFd) -> io::Result<Self> {
        let first = usize::try_from(number(&socket)?).map_err(io::Error::other)?;
        Ok(Self { socket, first })
    }

    /// The number of its first share; the others follow.
    pub fn first(&self) -> usize {
        self.first
    }

    /// Its descriptor, which keeps the shares.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Adds these files and directories of the host, as this process sees them.
    pub fn add(&self, shares: &[Shared]) -> Result<(), AddError> {
        let mounts = jail::open_trees(shares)?;
        let mut taken = 0;
        for some in mounts.chunks(MAX_DESCRIPTORS) {
            let fds: Vec<_> = some.iter().map(AsFd::as_fd).collect();
            taken = self.send(&fds).map_err(AddError::Socket)?;
        }
        if taken == mounts.len() as u64 { Ok(()) } else { Err(AddError::Full { taken, given: mounts.len() }) }
    }

    /// Returns once the server has given back what others had whose connections ended before this one was made.
    pub fn settle(&self) -> io::Result<()> {
        self.send(&[]).map(drop)
    }

    fn send(&self, fds: &[BorrowedFd<'_>]) -> io::Result<u64> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        retry(|| sendmsg(&self.socket, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL))?;
        number(&self.socket)
    }
}

fn number(socket: &OwnedFd) -> io::Result<u64> {
    let mut bytes = [0; 8];
    match retry(|| recv(socket, &mut bytes[..], RecvFlags::empty()))? {
        (_, 8) => Ok(u64::from_le_bytes(bytes)),
        _ => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "it has as many containers as it can have, or has ended",
        )),
    }
}
