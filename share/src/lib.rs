//! The file server of one VM: it answers the FUSE requests of a guest's virtio-fs device for the files and
//! directories of the host that the sandbox may use, and can reach nothing else.
//!
//! ```text
//!  guest kernel ── virtio-fs ──▶ VMM ── SOCK_SEQPACKET, one FUSE message each ──▶ this process ──▶ host's files
//! ```
//!
//! Its first message is not the guest's but the engine's: a [`Config`], with a listening socket if more may be shared
//! later ([`additions`]). It then opens what is shared, leaves the
//! host's files, network and rights behind ([`jail`]), says `ready` on its stdout, and serves until the socket ends.
//! Whatever the guest sends is answered by an error or an answer ([`server`]); nothing of it panics, and what the
//! guest can make this process hold is bounded by its limit of open files.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod additions;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod jail;
mod nodes;
mod operations;
mod server;
mod syscalls;
#[cfg(test)]
mod tests;
mod wire;

use std::{
    io::{IoSlice, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    path::PathBuf,
};

use rustix::{
    io::Errno,
    net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, send, sendmsg},
};
use serde::{Deserialize, Serialize};

use additions::Additions;
pub use jail::JailError;
#[doc(hidden)]
pub use jail::allowed_calls;

/// What is shared, by its number: the guest finds number 0 as `0` in the share's root directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The files and directories.
    pub shares: Vec<Shared>,
}

/// A file or directory of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shared {
    /// Where it is.
    pub path: PathBuf,
    /// Whether mounts below it come along.
    pub recursive: bool,
    /// Whether writing is refused, with EROFS.
    pub read_only: bool,
}

/// Longest [`Config`] in bytes.
pub const MAX_CONFIG_BYTES: usize = 64 << 10;

/// Sends a server its configuration, and where more may be added to what it shares, if it may.
pub fn configure(
    server: BorrowedFd<'_>,
    config: &[u8],
    listener: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = listener.into_iter().collect();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::NOBUFS);
    }
    sendmsg(server, &[IoSlice::new(config)], &mut control, SendFlags::NOSIGNAL).map(drop)
}

/// What this process says on its stdout when it serves. Anything else is why it does not.
pub const READY: &str = "ready";

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The engine's message did not come.
    #[error("cannot receive the configuration")]
    Receive(#[source] std::io::Error),
    /// The engine's message makes no sense.
    #[error("the configuration is not valid")]
    Config(#[source] serde_json::Error),
    /// The host's side cannot be left.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The socket broke.
    #[error("cannot {action}")]
    Socket {
        /// What was attempted.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
}

/// Serves what the first message on stdin asks for until stdin, a socket, ends.
pub fn run() -> Result<(), ShareError> {
    run_without(None)
}

/// As [`run`], with one system call less: for the test that shows that the list has none in vain.
#[doc(hidden)]
pub fn run_without(call: Option<libc::c_long>) -> Result<(), ShareError> {
    syscalls::close_inherited()
        .map_err(|source| ShareError::Socket { action: "close what it inherited", source })?;
    let socket = rustix::stdio::stdin();
    let mut message = vec![0; MAX_CONFIG_BYTES];
    let (length, mut given) = additions::receive(socket, &mut message, RecvFlags::empty())
        .map_err(|errno| ShareError::Receive(errno.into()))?;
    let config: Config =
        serde_json::from_slice(message.get(..length).unwrap_or_default()).map_err(ShareError::Config)?;
    drop(message);
    let mut additions = given.pop().map(|listener| Additions::new(listener, config.shares.len()));
    let shares = jail::open(&config.shares)?;
    let mut server = server::Server::new(shares);
    jail::enter(additions.is_some(), call)?;
    let said = std::io::stdout().write_all(format!("{READY}\n").as_bytes());
    said.map_err(|source| ShareError::Socket { action: "say that it serves", source })?;

    let failed = |action| move |errno: Errno| ShareError::Socket { action, source: errno.into() };
    let mut request = vec![0; wire::MAX_REQUEST_BYTES];
    let mut reply = Vec::with_capacity(wire::MAX_REPLY_BYTES);
    loop {
        if let Some(additions) = &mut additions {
            additions.serve(socket.as_fd(), &mut server).map_err(failed("wait for a request"))?;
        }
        let (_, length) = retry(|| recv(socket, request.as_mut_slice(), RecvFlags::empty()))
            .map_err(failed("receive a request"))?;
        if length == 0 {
            return Ok(());
        }
        if !server.answer(request.get(..length).unwrap_or_default(), &mut reply) {
            continue;
        }
        match retry(|| send(socket, &reply, SendFlags::NOSIGNAL)) {
            Ok(_) => {}
            // The VMM has ended.
            Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
            Err(errno) => return Err(failed("send a reply")(errno)),
        }
    }
}

fn retry<T>(call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    rustix::io::retry_on_intr(call)
}
