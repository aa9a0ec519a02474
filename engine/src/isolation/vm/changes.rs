//! What the container in a guest has written, as its agent sends it. Every byte is the guest's word: whoever reads the
//! archive checks it as that of any image. Here the stream's length and time are bounded.

use std::{
    io::{self, Read},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use cloche_protocol::{
    changes::{Ask, End, MAX_CHUNK_BYTES},
    frame::{self, FrameError},
    machine::guest_port,
};

use super::{
    dial::{self, Until},
    printable,
};

/// How long a guest may take in all, beyond what its bytes take at [`LEAST_RATE_BYTES`]. To stop a container can take 10
/// seconds.
const PATIENCE: Duration = Duration::from_secs(30);
/// The least that comes in a second of waiting.
const LEAST_RATE_BYTES: u64 = 64 << 10;

/// The archive of a guest's container, as it is read.
pub struct GuestChanges {
    stream: UnixStream,
    chunk_left: u32,
    total_left: u64,
    received: u64,
    /// How long the guest has been waited for; what is done with its bytes meanwhile is not its fault.
    waited: Duration,
    patience: Duration,
    is_whole: bool,
}

/// Asks the agent of the guest in this sandbox's directory for at most `max_bytes` of changes.
pub fn ask(dir: &Path, freeze: bool, max_bytes: u64) -> io::Result<GuestChanges> {
    let stream = dial::connect(dir, guest_port::CHANGES)?;
    frame::write(&stream, &Ask { freeze }).map_err(io::Error::other)?;
    Ok(GuestChanges {
        stream,
        chunk_left: 0,
        total_left: max_bytes,
        received: 0,
        waited: Duration::ZERO,
        patience: PATIENCE,
        is_whole: false,
    })
}

/// What a guest with so much memory can have written to it, with what an archive puts before each file. A file takes
/// more of the guest's memory than two headers.
pub fn most_bytes(memory_mib: u32) -> u64 {
    (u64::from(memory_mib) << 20) * 2
}

impl GuestChanges {
    fn begin_chunk(&mut self, until: Instant) -> io::Result<()> {
        let mut stream = Until { stream: &self.stream, until };
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        self.chunk_left = u32::from_le_bytes(length);
        if self.chunk_left > MAX_CHUNK_BYTES {
            let bytes = self.chunk_left;
            return Err(bad(format!(
                "the guest announces a piece of {bytes} bytes; at most {MAX_CHUNK_BYTES} are allowed"
            )));
        }
        if self.chunk_left > 0 {
            return Ok(());
        }
        let end: Option<End> = frame::read(stream).map_err(io::Error::other)?;
        match end {
            Some(End { error: None }) => self.is_whole = true,
            Some(End { error: Some(reason) }) => return Err(io::Error::other(printable(&reason))),
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8], until: Instant) -> io::Result<usize> {
        if self.chunk_left == 0 && !self.is_whole {
            self.begin_chunk(until)?;
        }
        let most = buffer.len().min(self.chunk_left as usize);
        if most == 0 {
            return Ok(0);
        }
        let count = Until { stream: &self.stream, until }.read(buffer.get_mut(..most).unwrap_or_default())?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // At most as much as was left of the chunk.
        self.chunk_left -= count as u32;
        self.received += count as u64;
        self.total_left = self.total_left.checked_sub(count as u64).ok_or_else(|| {
            bad(format!("the guest sends more than its memory can hold: over {} bytes", self.received))
        })?;
        Ok(count)
    }
}

impl Read for GuestChanges {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_whole || buffer.is_empty() {
            return Ok(0);
        }
        let started = Instant::now();
        let allowed = self.patience + Duration::from_millis(self.received * 1000 / LEAST_RATE_BYTES);
        let received = self.receive(buffer, started + allowed.saturating_sub(self.waited));
        self.waited += started.elapsed();
        received.map_err(|error| match timed_out(&error) {
            true => io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the guest is too slow: {} bytes in {} s", self.received, self.waited.as_secs()),
            ),
            false => error,
        })
    }
}

/// Also within a frame, whose own error is around it.
fn timed_out(error: &io::Error) -> bool {
    let framed = error.get_ref().and_then(|inner| inner.downcast_ref::<FrameError>());
    match framed {
        Some(FrameError::Io(inner)) => inner.kind() == io::ErrorKind::TimedOut,
        _ => error.kind() == io::ErrorKind::TimedOut,
    }
}

fn bad(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixListener};

    use super::*;
    use crate::isolation::vm::dial::VSOCK_SOCKET;

    /// What is read of a guest that sends these bytes.
    fn read(bytes: Vec<u8>, max_bytes: u64) -> io::Result<Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(VSOCK_SOCKET)).unwrap();
        let vmm = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut line = [0; 13];
            client.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"CONNECT 1031\n");
            client.write_all(b"OK 7\n").unwrap();
            assert_eq!(frame::read::<Ask>(&client).unwrap(), Some(Ask { freeze: true }));
            let _ = client.write_all(&bytes);
        });
        let mut read = Vec::new();
        let result = ask(dir.path(), true, max_bytes).and_then(|mut changes| changes.read_to_end(&mut read));
        vmm.join().unwrap();
        result.map(|_| read)
    }

    fn chunk(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
    }

    fn end(error: Option<&str>) -> Vec<u8> {
        let mut bytes = vec![0; 4];
        frame::write(&mut bytes, &End { error: error.map(Into::into) }).unwrap();
        bytes
    }

    #[test]
    fn guest_that_drips_is_given_up() {
        for sent in [chunk(&[0; 100]), end(Some(&" ".repeat(100)))] {
            let (stream, mut guest) = UnixStream::pair().unwrap();
            let guest = std::thread::spawn(move || {
                for byte in sent {
                    if guest.write_all(&[byte]).is_err() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let (total_left, patience) = (1000, Duration::from_millis(200));
            let mut changes = GuestChanges {
                stream,
                chunk_left: 0,
                total_left,
                received: 0,
                waited: Duration::ZERO,
                patience,
                is_whole: false,
            };
            let error = changes.read_to_end(&mut Vec::new()).unwrap_err();
            assert!(error.to_string().starts_with("the guest is too slow"), "{error}");
            drop(changes);
            guest.join().unwrap();
        }
    }

    #[test]
    fn chunks_are_joined_up_to_the_end() {
        let sent = [chunk(b"ab"), chunk(b"c"), end(None), b"more".to_vec()].concat();
        assert_eq!(read(sent, 3).unwrap(), b"abc");
    }

    #[test]
    fn archive_that_is_cut_off_too_long_or_failed_is_an_error() {
        for sent in
            [vec![], chunk(b"abc"), [&chunk(b"abc")[..], &[0; 4]].concat(), chunk(b"abc")[..5].to_vec()]
        {
            assert_eq!(read(sent, 100).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
        assert!(read(u32::MAX.to_le_bytes().to_vec(), 100).unwrap_err().to_string().contains("4294967295"));
        assert!(read([chunk(b"abcd"), end(None)].concat(), 3).unwrap_err().to_string().contains("more than"));
        let error = read([chunk(b"a"), end(Some("no \x1b[2J"))].concat(), 100).unwrap_err();
        assert_eq!(error.to_string(), "no \\u{1b}[2J");
    }
}
