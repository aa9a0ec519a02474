//! A unix stream socket as the other end of a network device, as passt and QEMU's `-netdev stream` speak it: each frame
//! behind its length, 4 bytes, big-endian. There is no header, and hence no work left undone.

use std::{
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use rustix::net::{AddressFamily, SocketType, sockopt};
use vm_memory::VolatileSlice;

use super::link::{HEADER_BYTES, Link, MAX_FRAME_BYTES, Offloads, ReceiveError, SendError};
use crate::guest_memory::{self, transfer::Room};

const LENGTH_BYTES: usize = 4;
/// Room for one frame of the largest size, or many small ones in one system call.
const BUFFER_BYTES: usize = LENGTH_BYTES + MAX_FRAME_BYTES;

/// A connected socket.
pub struct FrameSocket {
    stream: UnixStream,
    /// What was read and not yet handed over: `received[start..end]`.
    received: Vec<u8>,
    start: usize,
    end: usize,
    /// The rest of a frame that the socket took only in part.
    unsent: Vec<u8>,
}

impl FrameSocket {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::new(UnixStream::connect(path)?)
    }

    /// Takes over a descriptor that is connected already.
    pub fn inherit(fd: OwnedFd) -> io::Result<Self> {
        let stream = sockopt::socket_type(&fd)? == SocketType::STREAM
            && sockopt::socket_domain(&fd)? == AddressFamily::UNIX;
        if !stream {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a unix stream socket"));
        }
        Self::new(UnixStream::from(fd))
    }

    fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, received: vec![0; BUFFER_BYTES], start: 0, end: 0, unsent: Vec::new() })
    }

    /// The next whole frame among what was read. `Err` if the peer does not speak this protocol.
    fn whole_frame(&self) -> Result<Option<&[u8]>, ReceiveError> {
        let unread = self.received.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = unread.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length == 0 || length > MAX_FRAME_BYTES {
            return Err(ReceiveError::Gone);
        }
        Ok(rest.get(..length))
    }

    fn fill(&mut self) -> Result<(), ReceiveError> {
        self.received.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let room = self.received.get_mut(self.end..).unwrap_or_default();
        loop {
            match self.stream.read(room) {
                Ok(0) => return Err(ReceiveError::Gone),
                Ok(bytes) => {
                    self.end += bytes;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(ReceiveError::Empty),
                Err(_) => return Err(ReceiveError::Gone),
            }
        }
    }

    fn write(&self, buffers: &[VolatileSlice]) -> Result<usize, SendError> {
        guest_memory::send(self.stream.as_fd(), buffers).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => SendError::Full,
            _ => SendError::Gone,
        })
    }
}

impl Link for FrameSocket {
    fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    fn set_receive_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, into: &Room) -> Result<usize, ReceiveError> {
        loop {
            if let Some(frame) = self.whole_frame()? {
                let length = frame.len();
                scatter(&[&[0; HEADER_BYTES], frame], into.slices());
                self.start += LENGTH_BYTES + length;
                return Ok(HEADER_BYTES + length);
            }
            self.fill()?;
        }
    }

    fn send(&mut self, frame: &[VolatileSlice]) -> Result<(), SendError> {
        self.flush()?;
        let total: usize = frame.iter().map(VolatileSlice::len).sum();
        let length = total.saturating_sub(HEADER_BYTES);
        if length == 0 || length > MAX_FRAME_BYTES {
            return Err(SendError::Refused);
        }
        let mut prefix = (length as u32).to_be_bytes();
        let mut buffers = vec![VolatileSlice::from(prefix.as_mut_slice())];
        buffers.extend(after(frame, HEADER_BYTES));
        let sent = self.write(&buffers)?;
        for slice in after(&buffers, sent) {
            let from = self.unsent.len();
            self.unsent.resize(from + slice.len(), 0);
            slice.copy_to(self.unsent.get_mut(from..).unwrap_or_default());
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SendError> {
        while !self.unsent.is_empty() {
            let mut unsent = std::mem::take(&mut self.unsent);
            let sent = self.write(&[VolatileSlice::from(unsent.as_mut_slice())]);
            if let Ok(sent) = sent {
                unsent.drain(..sent);
            }
            self.unsent = unsent;
            sent?;
        }
        // A frame that was large once must not be paid for ever.
        self.unsent.shrink_to_fit();
        Ok(())
    }
}

/// The buffers without their first `skip` bytes.
fn after<'a>(buffers: &[VolatileSlice<'a>], mut skip: usize) -> Vec<VolatileSlice<'a>> {
    let mut rest = Vec::with_capacity(buffers.len());
    for slice in buffers {
        let here = skip.min(slice.len());
        skip -= here;
        if let Ok(part) = slice.offset(here)
            && !part.is_empty()
        {
            rest.push(part);
        }
    }
    rest
}

/// Copies `parts`, one after the other, into `buffers`, as far as they reach.
pub fn scatter<'a>(parts: &[&[u8]], buffers: impl IntoIterator<Item = VolatileSlice<'a>>) {
    let mut buffers = buffers.into_iter();
    let mut room = buffers.next();
    for part in parts {
        let mut part = *part;
        while !part.is_empty() {
            let Some(slice) = room else { return };
            let (now, later) = part.split_at(part.len().min(slice.len()));
            slice.copy_from(now);
            part = later;
            room = match slice.offset(now.len()) {
                Ok(rest) if !rest.is_empty() => Some(rest),
                _ => buffers.next(),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, sync::Arc};

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::guest_memory::transfer::Kept;

    fn pair() -> (FrameSocket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (FrameSocket::inherit(ours.into()).unwrap(), theirs)
    }

    fn receive(socket: &mut FrameSocket) -> Result<Vec<u8>, ReceiveError> {
        let memory = Arc::new(guest_memory::map(&[(GuestAddress(0), 2 << 20)]).unwrap());
        memory.write_slice(&[1; 7], GuestAddress(0)).unwrap();
        let mut kept = Kept::new(memory.clone());
        assert!(kept.push(&memory.get_slice(GuestAddress(0), 7).unwrap()));
        let mut spare = vec![1; HEADER_BYTES + MAX_FRAME_BYTES];
        let bytes = socket.receive(&kept.room(&mut spare))?;
        let mut received = vec![0; 7];
        memory.read_slice(&mut received, GuestAddress(0)).unwrap();
        received.extend(spare);
        assert_eq!(received[..HEADER_BYTES], [0; HEADER_BYTES]);
        Ok(received[HEADER_BYTES..bytes].to_vec())
    }

    fn send(socket: &mut FrameSocket, frame: &[u8]) -> Result<(), SendError> {
        let mut bytes = [&[0xff; HEADER_BYTES], frame].concat();
        let (head, tail) = bytes.split_at_mut(HEADER_BYTES / 2);
        socket.send(&[VolatileSlice::from(head), VolatileSlice::from(tail)])
    }

    fn framed(frame: &[u8]) -> Vec<u8> {
        [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
    }

    #[test]
    fn frames_are_received_whole_however_the_stream_is_cut() {
        let (mut socket, mut theirs) = pair();
        let stream = [framed(&[1; 60]), framed(&[2; 1514]), framed(&[3])].concat();
        let mut frames = Vec::new();
        for piece in stream.chunks(11) {
            theirs.write_all(piece).unwrap();
            while let Ok(frame) = receive(&mut socket) {
                frames.push(frame);
            }
        }
        assert_eq!(frames, [vec![1; 60], vec![2; 1514], vec![3]]);
        assert_eq!(receive(&mut socket), Err(ReceiveError::Empty));
        drop(theirs);
        assert_eq!(receive(&mut socket), Err(ReceiveError::Gone));
    }

    #[test]
    fn stream_with_an_impossible_length_ends_the_link() {
        for length in [0, MAX_FRAME_BYTES as u32 + 1, u32::MAX] {
            let (mut socket, mut theirs) = pair();
            theirs.write_all(&length.to_be_bytes()).unwrap();
            assert_eq!(receive(&mut socket), Err(ReceiveError::Gone), "{length}");
        }
    }

    #[test]
    fn frames_for_a_slow_reader_arrive_whole_and_in_order() {
        let (mut socket, mut theirs) = pair();
        let frames: Vec<Vec<u8>> = (0..40).map(|index| vec![index; 60_000]).collect();
        let expected: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
        let mut seen = Vec::<u8>::new();
        let mut full = 0;
        let mut chunk = [0; 30_000];
        for frame in &frames {
            loop {
                match send(&mut socket, frame) {
                    Ok(()) => break,
                    Err(SendError::Full) => {
                        full += 1;
                        let bytes = theirs.read(&mut chunk).unwrap();
                        seen.extend(&chunk[..bytes]);
                    }
                    Err(other) => panic!("{other:?}"),
                }
                assert!(socket.unsent.len() <= BUFFER_BYTES);
            }
        }
        while seen.len() < expected.len() {
            let _ = socket.flush();
            let bytes = theirs.read(&mut chunk).unwrap();
            seen.extend(&chunk[..bytes]);
        }
        assert!(full > 0);
        assert!(seen == expected);
        drop(theirs);
        assert_eq!(send(&mut socket, &[1; 60]), Err(SendError::Gone));
    }

    #[test]
    fn frame_without_content_or_too_large_is_refused() {
        let (mut socket, _theirs) = pair();
        assert_eq!(send(&mut socket, &[]), Err(SendError::Refused));
        assert_eq!(send(&mut socket, &vec![0; MAX_FRAME_BYTES + 1]), Err(SendError::Refused));
    }

    #[test]
    fn inherit_of_another_kind_of_socket_fails() {
        let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        assert!(FrameSocket::inherit(datagram.into()).is_err());
        assert!(FrameSocket::inherit(tempfile::tempfile().unwrap().into()).is_err());
    }

    proptest! {
        #[test]
        fn scatter_fills_any_buffers_in_order(
            parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..4),
            sizes in prop::collection::vec(0usize..20, 0..6),
        ) {
            let total: usize = sizes.iter().sum();
            let mut memory = vec![0; total];
            let mut rest = memory.as_mut_slice();
            let mut buffers = Vec::new();
            for size in sizes {
                let (here, after) = rest.split_at_mut(size);
                buffers.push(VolatileSlice::from(here));
                rest = after;
            }
            let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            scatter(&slices, buffers);
            let mut expected = parts.concat();
            expected.resize(expected.len().max(total), 0);
            expected.truncate(total);
            prop_assert_eq!(memory, expected);
        }
    }
}
