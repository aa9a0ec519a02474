//! Terminals: the socket that a container's terminal is sent to, and a user's own terminal carried to it.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use cloche_runtime::pump::{Pump, Target};
use rustix::{
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, socketpair},
    stdio::{stdin, stdout},
    termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize},
};

use crate::error::{Error, of_file, system};

/// Connects to a caller's console socket.
pub(crate) fn connect_to(path: &Path) -> Result<OwnedFd, Error> {
    let failed = |errno: rustix::io::Errno| of_file("connect to the console socket", path)(errno);
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(failed)?;
    connect(&socket, &SocketAddrUnix::new(path).map_err(failed)?).map_err(failed)?;
    Ok(socket)
}

/// Where a container's terminal goes.
pub(crate) enum Console {
    /// There is none.
    None,
    /// To the caller.
    Sent(OwnedFd),
    /// Here: our end and the container's.
    Kept { here: OwnedFd, there: OwnedFd },
}

impl Console {
    /// What `process.terminal` and `--console-socket` ask for together.
    pub(crate) fn new(terminal: bool, socket: Option<&Path>, is_detached: bool) -> Result<Self, Error> {
        match (terminal, socket) {
            (false, None) => Ok(Self::None),
            (false, Some(_)) => Err(Error::Request(
                "--console-socket is given, but the process has no terminal; set process.terminal".into(),
            )),
            (true, Some(path)) => Ok(Self::Sent(connect_to(path)?)),
            (true, None) if is_detached => Err(Error::Request(
                "the process has a terminal, and nobody takes it; give --console-socket".into(),
            )),
            (true, None) => {
                let (here, there) =
                    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                        .map_err(system("make a socket"))?;
                Ok(Self::Kept { here, there })
            }
        }
    }

    /// The end that the container's process sends its terminal to.
    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::None => None,
            Self::Sent(socket) | Self::Kept { there: socket, .. } => Some(socket.as_fd()),
        }
    }

    /// The terminal that was sent here.
    pub(crate) fn terminal(self) -> Result<Option<Terminal>, Error> {
        let Self::Kept { here, there } = self else { return Ok(None) };
        drop(there);
        Terminal::new(
            cloche_runtime::receive_terminal(here.as_fd())
                .map_err(system("receive the container's terminal"))?,
        )
        .map(Some)
    }
}

/// A container's terminal, carried to and from this process's own, which is in raw mode meanwhile.
pub(crate) struct Terminal {
    master: OwnedFd,
    restore: Option<Termios>,
}

impl Terminal {
    fn new(master: OwnedFd) -> Result<Self, Error> {
        // Its only user is this process. A program that waits for its own output to be read takes no input meanwhile.
        rustix::io::ioctl_fionbio(&master, true).map_err(system("set up the container's terminal"))?;
        let restore = if isatty(stdin()) {
            let present = tcgetattr(stdin()).map_err(system("read the terminal's settings"))?;
            let mut raw = present.clone();
            raw.make_raw();
            tcsetattr(stdin(), OptionalActions::Flush, &raw)
                .map_err(system("set the terminal to raw mode"))?;
            Some(present)
        } else {
            None
        };
        let terminal = Self { master, restore };
        terminal.resize();
        Ok(terminal)
    }

    /// Gives the container's terminal the size of our own.
    pub(crate) fn resize(&self) {
        if let Ok(size) = tcgetwinsize(stdin()) {
            // A terminal that is gone needs no size.
            let _ = tcsetwinsize(&self.master, size);
        }
    }

    /// What carries its bytes: to stdout, and from stdin.
    pub(crate) fn pumps(&self) -> Result<[Pump; 2], Error> {
        let clone = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(system("duplicate the stdio"));
        Ok([
            Pump::new(clone(self.master.as_fd())?, clone(stdout())?, Target::Shared),
            Pump::new(clone(stdin())?, clone(self.master.as_fd())?, Target::NonBlocking),
        ])
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(settings) = &self.restore {
            let _ = tcsetattr(stdin(), OptionalActions::Flush, settings);
        }
    }
}

/// The caller's stdio, to become a container's.
pub(crate) fn own_stdio() -> Result<cloche_runtime::Stdio, Error> {
    let clone = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(system("duplicate the stdio"));
    Ok(cloche_runtime::Stdio {
        stdin: clone(stdin())?,
        stdout: clone(stdout())?,
        stderr: clone(rustix::stdio::stderr())?,
    })
}
