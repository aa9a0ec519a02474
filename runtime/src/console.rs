//! The container's terminal: a pseudo-terminal of its own devpts, whose other end goes to whoever asked for it.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use oci_spec::runtime::Process;
use rustix::{
    fs::{FileType, Gid, OFlags, Uid, fchown, fstat, fstatfs, major, minor},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
    process::ioctl_tiocsctty,
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
    termios::{Winsize, tcsetwinsize},
};

use crate::mounts::{
    self,
    paths::{self, Make, Symlinks},
};

/// Why there is no terminal.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} for the container's terminal")]
pub struct ConsoleError {
    action: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> ConsoleError {
    move |source| ConsoleError { action, source: source.into() }
}

/// Makes a terminal, shows it as `/dev/console` if `as_console`, makes it stdin, stdout, stderr and the controlling
/// terminal of this process, which leads a session, and sends the other end to `socket`.
pub(crate) fn set_up(
    root: BorrowedFd<'_>,
    process: &Process,
    as_console: bool,
    socket: BorrowedFd<'_>,
) -> Result<(), ConsoleError> {
    let master = open_multiplexer(root).map_err(failed("open /dev/pts/ptmx"))?;
    unlockpt(&master).map_err(failed("unlock a pseudo-terminal"))?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    // By the descriptor: no path of the container's has a say in which terminal this is.
    let slave = ioctl_tiocgptpeer(&master, flags).map_err(failed("open a pseudo-terminal"))?;
    if let Some(size) = process.console_size() {
        let cells = |number: u64| u16::try_from(number).unwrap_or(u16::MAX);
        let (ws_row, ws_col) = (cells(size.height()), cells(size.width()));
        tcsetwinsize(&slave, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 })
            .map_err(failed("set the size"))?;
    }
    let user = Uid::from_raw(process.user().uid());
    match fchown(&slave, Some(user), None::<Gid>) {
        // In a user namespace without this user's id the terminal stays whose it is.
        Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
        Err(errno) => return Err(failed("set the owner")(errno)),
    }
    if as_console {
        show_as_console(root, slave.as_fd()).map_err(failed("mount /dev/console"))?;
    }
    ioctl_tiocsctty(&slave).map_err(failed("make it the controlling terminal"))?;
    dup2_stdin(&slave).map_err(failed("place stdin"))?;
    dup2_stdout(&slave).map_err(failed("place stdout"))?;
    dup2_stderr(&slave).map_err(failed("place stderr"))?;
    send(socket, master.as_fd()).map_err(failed("send the terminal to the console socket"))
}

/// Opens the multiplexer of the container's devpts, and nothing else that may be there.
fn open_multiplexer(root: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const DEVPTS_SUPER_MAGIC: u64 = 0x1cd1;
    let place = paths::open(root, Path::new("/dev/pts/ptmx"), Symlinks::Refuse)?;
    let stat = fstat(&place)?;
    let is_multiplexer = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && (major(stat.st_rdev), minor(stat.st_rdev)) == (5, 2)
        && fstatfs(&place)?.f_type as u64 == DEVPTS_SUPER_MAGIC;
    if !is_multiplexer {
        return Err(io::Error::other(
            "it is not the multiplexer of a devpts; is devpts mounted at /dev/pts?",
        ));
    }
    Ok(paths::reopen(root, Path::new("/dev/pts/ptmx"), OFlags::RDWR | OFlags::NOCTTY, &stat)?)
}

/// Binds the terminal to `/dev/console`, where an empty file is made if nothing is (CVE-2025-52565: neither end is
/// looked up through a symbolic link).
fn show_as_console(root: BorrowedFd<'_>, slave: BorrowedFd<'_>) -> io::Result<()> {
    let target = paths::open_or_make(root, Path::new("/dev/console"), Symlinks::Refuse, Make::EmptyFile)?;
    Ok(mounts::bind_at(slave, target.as_fd())?)
}

/// Sends a descriptor, as the receivers of other runtimes know it: with the name of the terminal as data.
pub fn send(socket: BorrowedFd<'_>, master: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [master];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::NOBUFS);
    }
    sendmsg(socket, &[IoSlice::new(b"/dev/ptmx")], &mut control, SendFlags::NOSIGNAL).map(drop)
}

/// Receives what [`send`] has sent.
pub fn receive(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    recvmsg(socket, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.next().and_then(|mut fds| fds.next());
    fd.ok_or_else(|| io::Error::other("no descriptor came"))
}
