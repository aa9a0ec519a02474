//! The socket at which a created container waits to be started. Only who may enter the state directory gets at it.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::{Errno, read, retry_on_intr, write},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with},
};

const NAME: &str = "start.sock";

fn socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | flags, None)
}

/// The address, by a descriptor of the directory, since a socket's path is short (unix(7): 108 bytes).
fn with_address<T>(
    directory: &Path,
    act: impl FnOnce(&SocketAddrUnix) -> Result<T, Errno>,
) -> Result<T, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat(CWD, directory, flags, Mode::empty())?;
    act(&SocketAddrUnix::new(format!("/proc/self/fd/{}/{NAME}", directory.as_raw_fd()))?)
}

/// Makes the gate in a container's directory.
pub(crate) fn make(directory: &Path) -> io::Result<OwnedFd> {
    let gate = socket(SocketFlags::empty())?;
    with_address(directory, |address| bind(&gate, address))?;
    listen(&gate, 16)?;
    Ok(gate)
}

/// Whether somebody waits at the gate.
pub(crate) fn is_waited_at(directory: &Path) -> bool {
    let look = || with_address(directory, |address| connect(socket(SocketFlags::NONBLOCK)?, address));
    // A process that stands still takes nobody, and the next who looked would wait for room (unix(7)).
    matches!(look(), Ok(()) | Err(Errno::AGAIN))
}

/// What came of a start.
pub(crate) enum Outcome {
    Started,
    /// Nobody waits.
    NotWaiting,
    /// The program could not be run.
    Failed {
        exit_code: u8,
        message: String,
    },
}

/// Lets the waiting process go on, and waits until it has become the container's program. `take_listener` takes a
/// descriptor of it, by its number.
pub(crate) fn open(
    directory: &Path,
    take_listener: &dyn Fn(i32) -> Result<(), String>,
) -> io::Result<Outcome> {
    let socket = socket(SocketFlags::empty())?;
    match with_address(directory, |address| connect(&socket, address)) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => return Ok(Outcome::NotWaiting),
        result => result?,
    }
    if retry_on_intr(|| write(&socket, &[1])) == Err(Errno::PIPE) {
        return Ok(Outcome::NotWaiting);
    }
    const MAX_REPORT_BYTES: usize = 8192;
    let mut report = Vec::new();
    let mut buffer = [0; 4096];
    while report.len() < MAX_REPORT_BYTES {
        match retry_on_intr(|| read(&socket, &mut buffer)) {
            Ok(0) => break,
            Ok(count) => {
                report.extend(buffer.iter().take(count));
                let Some(number) = cloche_runtime::listener_in(&mut report) else { continue };
                if let Err(message) = take_listener(number) {
                    return Ok(Outcome::Failed { exit_code: 125, message });
                }
                retry_on_intr(|| write(&socket, &[1]))?;
            }
            // It was killed, or somebody else was let through a moment ago.
            Err(Errno::CONNRESET) => return Ok(Outcome::NotWaiting),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(match report.as_slice() {
        [] => Outcome::Started,
        [exit_code, message @ ..] => {
            Outcome::Failed { exit_code: *exit_code, message: String::from_utf8_lossy(message).into_owned() }
        }
    })
}
