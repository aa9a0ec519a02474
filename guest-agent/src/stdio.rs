//! What a process reads and writes, carried between the host's streams and its pipes or its terminal.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use cloche_runtime::{
    Stdio,
    pump::{self, Pump, Target},
};
use rustix::termios::{Winsize, tcsetwinsize};

/// The host's ends, connected.
pub struct HostStreams {
    pub stdin: Option<OwnedFd>,
    pub stdout: OwnedFd,
    /// None with a terminal.
    pub stderr: Option<OwnedFd>,
}

/// A process's streams: the pumps that carry them, and what the process gets.
pub struct Streams {
    /// That of stdin, if there is one, is the last.
    pub pumps: Vec<Pump>,
    outputs: usize,
    given: Option<Stdio>,
    terminal: Option<Terminal>,
}

/// A terminal, before and after it is made.
enum Terminal {
    Awaited { ours: OwnedFd, theirs: OwnedFd, streams: HostStreams },
    Made(OwnedFd),
}

impl Streams {
    pub fn new(streams: HostStreams, has_terminal: bool) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&streams.stdout, true)?;
        if has_terminal {
            let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
            let given = Stdio { stdin: null()?, stdout: null()?, stderr: null()? };
            let (ours, theirs) = UnixStream::pair()?;
            let terminal = Terminal::Awaited { ours: ours.into(), theirs: theirs.into(), streams };
            return Ok(Self { pumps: Vec::new(), outputs: 1, given: Some(given), terminal: Some(terminal) });
        }
        let mut pumps = Vec::with_capacity(3);
        let mut output = |stream| {
            let (read, write) = pump::pipe_read_side()?;
            pumps.push(Pump::new(read, stream, Target::NonBlocking));
            Ok::<_, io::Error>(write)
        };
        let stdout = output(streams.stdout)?;
        let stderr = match streams.stderr {
            Some(stream) => {
                rustix::io::ioctl_fionbio(&stream, true)?;
                output(stream)?
            }
            None => File::options().write(true).open("/dev/null")?.into(),
        };
        let outputs = pumps.len();
        let stdin = match streams.stdin {
            Some(stream) => {
                let (read, write) = pump::pipe_write_side()?;
                pumps.push(Pump::new(stream, write, Target::NonBlocking));
                read
            }
            None => File::open("/dev/null")?.into(),
        };
        Ok(Self { pumps, outputs, given: Some(Stdio { stdin, stdout, stderr }), terminal: None })
    }

    /// What becomes the process's stdio. Once.
    pub fn take_given(&mut self) -> Option<Stdio> {
        self.given.take()
    }

    /// Where the process is to send its terminal.
    pub fn console_socket(&self) -> Option<BorrowedFd<'_>> {
        match &self.terminal {
            Some(Terminal::Awaited { theirs, .. }) => Some(theirs.as_fd()),
            _ => None,
        }
    }

    /// Takes the terminal in, which a process that was made has sent.
    pub fn receive_terminal(&mut self) -> io::Result<()> {
        let Some(Terminal::Awaited { ours, theirs, streams }) = self.terminal.take() else { return Ok(()) };
        drop(theirs);
        let master = cloche_runtime::receive_terminal(ours.as_fd())?;
        rustix::io::ioctl_fionbio(&master, true)?;
        self.pumps.push(Pump::new(master.try_clone()?, streams.stdout, Target::NonBlocking));
        if let Some(stdin) = streams.stdin {
            self.pumps.push(Pump::new(stdin, master.try_clone()?, Target::NonBlocking));
        }
        self.terminal = Some(Terminal::Made(master));
        Ok(())
    }

    /// Gives the terminal, if there is one, a size.
    pub fn resize(&self, rows: u16, columns: u16) {
        if let Some(Terminal::Made(master)) = &self.terminal {
            let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            // A terminal that is gone needs no size.
            let _ = tcsetwinsize(master, size);
        }
    }

    /// Nobody reads what comes on stdin any more.
    pub fn close_stdin(&mut self) {
        self.pumps.truncate(self.outputs);
    }

    /// Whether all that was written is on its way to the host, with whatever may still write left out. If not, something
    /// is left to be polled for: the end of a source is taken in here, and nobody would hear of it again.
    pub fn is_drained(&mut self) -> io::Result<bool> {
        let waits = |pump: &Pump| pump.is_done() || pump.waits_for_source();
        while self.pumps.iter().all(waits) {
            let ready = pump::poll(&mut self.pumps, &[], Some(Duration::ZERO))?;
            if !ready.contains(&true) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Moves what is left of a container that has ended. Every process of it is dead (its PID namespace died with its
    /// first process), so what they wrote to comes to its end.
    pub fn drain(&mut self) -> io::Result<()> {
        self.close_stdin();
        while !self.pumps.iter().all(Pump::is_done) {
            pump::poll(&mut self.pumps, &[], None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn what_is_left_and_the_end_of_it_are_carried_at_once() {
        let (stdout, mut host) = UnixStream::pair().unwrap();
        let streams = HostStreams { stdin: None, stdout: stdout.into(), stderr: None };
        let mut streams = Streams::new(streams, false).unwrap();
        let Stdio { stdout, .. } = streams.take_given().unwrap();
        assert!(streams.is_drained().unwrap());
        File::from(stdout).write_all(b"word").unwrap();
        // No later round of polling would have anything that tells of it.
        assert!(streams.is_drained().unwrap());
        assert!(streams.pumps.iter().all(Pump::is_done));
        let mut word = String::new();
        host.read_to_string(&mut word).unwrap();
        assert_eq!(word, "word");
    }
}
