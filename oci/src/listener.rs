//! Whoever decides on the system calls that a seccomp policy notifies of: a socket at `linux.seccomp.listenerPath` gets
//! the listener with a container process state (config-linux.md#containerprocessstate).

use std::{
    fs::File,
    io::{self, IoSlice, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};

use oci_spec::runtime::{LinuxSeccomp, Spec};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, sendmsg, socket_with,
};
use serde::Serialize;

use crate::state::{Record, Status};

/// What the socket gets.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ProcessState<'a> {
    oci_version: &'a str,
    /// What each descriptor is.
    fds: [&'static str; 1],
    pid: i32,
    #[serde(skip_serializing_if = "str::is_empty")]
    metadata: &'a str,
    state: crate::state::State<'a>,
}

/// A container's seccomp policy.
pub(crate) fn policy(spec: &Spec) -> Option<&LinuxSeccomp> {
    spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref())
}

/// Sends the listener of process `pid` of a container. `first` is the container's first process.
pub(crate) fn send(
    record: &Record,
    policy: Option<&LinuxSeccomp>,
    (first, status): (i32, Status),
    pid: i32,
    listener: OwnedFd,
) -> Result<(), String> {
    let policy = policy.ok_or("the configuration has no seccomp policy")?;
    let path = policy.listener_path().as_deref().ok_or("linux.seccomp.listenerPath is missing")?;
    let state = ProcessState {
        oci_version: &record.oci_version,
        fds: ["seccompFd"],
        pid,
        metadata: policy.listener_metadata().as_deref().unwrap_or_default(),
        state: record.state(first, status.name()),
    };
    let connected = || -> io::Result<OwnedFd> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    let failed = |what: &str, error: io::Error| format!("failed to {what} {}: {error}", path.display());
    let socket = connected().map_err(|error| failed("connect with seccomp agent", error))?;
    let text = serde_json::to_vec(&state).map_err(|error| error.to_string())?;
    transmit(socket, &text, listener).map_err(|error| failed("send the seccomp listener to", error))
}

/// The descriptor goes with the first byte, and the whole text in one message if the socket takes that.
fn transmit(socket: OwnedFd, text: &[u8], listener: OwnedFd) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [listener.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let sent = sendmsg(&socket, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL)?;
    File::from(socket).write_all(text.get(sent..).unwrap_or_default())
}
