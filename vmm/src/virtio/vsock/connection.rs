//! One stream, from the guest's request to its end.
//!
//! The two directions are independent, and each ends once:
//! ```text
//!   guest ▶ host   open ── SHUTDOWN(SEND) ──▶ flushing ── all written ──▶ stream.shutdown(Write)
//!                    └──── write fails: EPIPE ──▶ discarding, SHUTDOWN(RECEIVE) to the guest
//!   host ▶ guest   open ── read returns 0 ──▶ SHUTDOWN(SEND) to the guest
//!                    └──── SHUTDOWN(RECEIVE) ──▶ stream.shutdown(Read)
//! ```
//! When the guest has ended both, what is left is flushed and a RESET answers; a RESET from the guest ends all at once,
//! except that data which the guest sent before it closed is still flushed.

use std::{io, net::Shutdown, num::Wrapping};

use super::{
    Stream,
    backlog::Backlog,
    packet::{Header, op, shutdown},
};
use crate::virtio::queue::Buffers;

/// Bytes from the guest that are buffered for a host process which does not read fast enough.
pub const BUFFER_BYTES: u32 = 256 * 1024;

/// The guest learns of passed-on bytes at the latest when there are this many: early enough that it never waits while
/// the host reads.
const UPDATE_AFTER_BYTES: u32 = BUFFER_BYTES / 4;

/// Buffers of the guest's that one read may fill: 64 KiB of those that Linux offers.
const MAX_BUFFERS_AT_ONCE: usize = 16;

/// What the caller makes packets of, adding addresses and [`Connection::credit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Its operation.
    pub op: u16,
    /// Its flags.
    pub flags: u32,
    /// Bytes that were put into the buffers, each of which but the last is full: a packet for each.
    pub len: u32,
}

/// What a packet from the guest does to its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Keep,
    /// It is over. If `flush`, what is buffered should still reach the host.
    Remove {
        /// Whether something is buffered that the guest sent before it closed in order.
        flush: bool,
    },
}

/// A stream.
pub struct Connection<S> {
    stream: S,
    /// Bytes from the guest that the stream has not taken yet.
    outgoing: Backlog,
    /// Bytes from the guest that were passed on.
    forwarded: Wrapping<u32>,
    /// Value of `forwarded` in the last packet to the guest.
    forwarded_told: Wrapping<u32>,
    /// Directions that the guest has ended ([`shutdown`]).
    guest_ended: u32,
    /// Whether the stream's writing half is shut.
    write_shut: bool,
    /// Whether the stream refuses data.
    write_broken: bool,
    /// Bytes that were sent to the guest.
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    /// Buffers that the next read may need: twice as many as the last one, if that filled all it had.
    wanted_buffers: usize,
    /// Whether reading may yield something.
    readable: bool,
    /// Whether the stream has ended.
    read_ended: bool,
    /// Directions of whose end the guest should be, and was, told.
    ended: u32,
    ended_told: u32,
    opening: Opening,
    reset: bool,
    update_credit: bool,
    request_credit: bool,
    credit_requested: bool,
}

/// How far a stream is from being open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opening {
    /// The guest asked, and is to be answered.
    Respond,
    /// The host asked, and the guest is to be told.
    Request,
    /// The guest has been told.
    Requested,
    /// It is open.
    Done,
}

impl<S: Stream> Connection<S> {
    /// A stream that answers the guest's request.
    pub fn new(stream: S, request: &Header) -> Self {
        let credit = (request.buf_alloc, Wrapping(request.fwd_cnt));
        Self { readable: true, ..Self::opening(stream, Opening::Respond, credit) }
    }

    /// A stream that a host program wants.
    pub fn request(stream: S) -> Self {
        Self::opening(stream, Opening::Request, (0, Wrapping(0)))
    }

    fn opening(stream: S, opening: Opening, (guest_buffer, guest_forwarded): (u32, Wrapping<u32>)) -> Self {
        Self {
            stream,
            outgoing: Backlog::default(),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            guest_ended: 0,
            write_shut: false,
            write_broken: false,
            sent: Wrapping(0),
            guest_buffer,
            guest_forwarded,
            wanted_buffers: 1,
            readable: false,
            read_ended: false,
            ended: 0,
            ended_told: 0,
            opening,
            reset: false,
            update_credit: false,
            request_credit: false,
            credit_requested: false,
        }
    }

    /// The host's end.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Whether the guest has not answered the host's request yet.
    pub fn is_requested(&self) -> bool {
        matches!(self.opening, Opening::Request | Opening::Requested)
    }

    /// Whether something waits for the host that the guest sent before it closed in order.
    pub fn has_last_words(&self) -> bool {
        self.guest_ended & shutdown::SEND != 0 && !self.outgoing.is_empty()
    }

    /// Bytes that wait for the host.
    pub fn buffered(&self) -> usize {
        self.outgoing.len()
    }

    /// Takes a packet from the guest. `data` has `header.len` bytes.
    pub fn receive(&mut self, header: &Header, data: Buffers) -> Verdict {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = Wrapping(header.fwd_cnt);
        self.credit_requested = false;
        match header.op {
            op::RESPONSE if self.opening == Opening::Requested => self.opened(header.dst_port),
            op::RESET => return Verdict::Remove { flush: self.has_last_words() },
            // Before it has answered, the guest has nothing else to say.
            _ if self.is_requested() => self.reset = true,
            op::DATA => self.receive_data(data),
            op::SHUTDOWN => self.receive_shutdown(header.flags),
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => self.update_credit = true,
            // A second request, a response that nobody asked for, or an unknown operation.
            _ => self.reset = true,
        }
        Verdict::Keep
    }

    /// The guest accepted: its opener is told, before any byte of the guest's.
    fn opened(&mut self, host_port: u32) {
        self.opening = Opening::Done;
        self.readable = true;
        let line = format!("OK {host_port}\n");
        // The first bytes into a fresh socket always fit, unless nobody is there to read them.
        self.reset |= !matches!(self.stream.write(line.as_bytes()), Ok(count) if count == line.len());
    }

    fn receive_data(&mut self, mut data: Buffers) {
        let room = (BUFFER_BYTES as usize).saturating_sub(self.outgoing.len());
        if data.len() > room || self.guest_ended & shutdown::SEND != 0 {
            // Over its credit (§5.10.6.3), or after its own end.
            self.reset = true;
            return;
        }
        if self.write_broken {
            self.passed_on(data.len());
            return;
        }
        if self.outgoing.is_empty() {
            match self.stream.write_guest(data.slices()) {
                Ok(count) => {
                    self.passed_on(count);
                    data.take(count);
                }
                Err(error) => self.write_failed(&error),
            }
        }
        if self.write_broken {
            self.passed_on(data.len());
        } else {
            self.outgoing.push(&data.to_vec());
        }
    }

    fn receive_shutdown(&mut self, flags: u32) {
        let fresh = flags & !self.guest_ended;
        self.guest_ended |= flags & shutdown::BOTH;
        if fresh & shutdown::RECEIVE != 0 {
            self.stream.shutdown(Shutdown::Read);
            self.readable = false;
        }
        self.finish_writing();
    }

    /// The stream takes data again.
    pub fn writable(&mut self) {
        while !self.outgoing.is_empty() && !self.write_broken {
            match self.stream.write(self.outgoing.front()) {
                Ok(0) => return,
                Ok(count) => {
                    self.outgoing.drop_front(count);
                    self.passed_on(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.write_failed(&error);
                    break;
                }
            }
        }
        self.finish_writing();
    }

    /// The stream may have data, or its end.
    pub fn readable(&mut self) {
        self.readable = self.guest_ended & shutdown::RECEIVE == 0 && !self.is_requested();
    }

    fn passed_on(&mut self, count: usize) {
        // `count` is at most BUFFER_BYTES.
        self.forwarded += Wrapping(count as u32);
        if (self.forwarded - self.forwarded_told).0 >= UPDATE_AFTER_BYTES {
            self.update_credit = true;
        }
    }

    fn write_failed(&mut self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::WouldBlock => {}
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                // The host does not want it. What it sent before may still be on its way to the guest.
                self.write_broken = true;
                self.ended |= shutdown::RECEIVE;
                let dropped = self.outgoing.len();
                self.outgoing.clear();
                self.passed_on(dropped);
            }
            // Nothing more can be passed on, and the guest is told so.
            _ => {
                self.write_broken = true;
                self.outgoing.clear();
                self.reset = true;
            }
        }
    }

    fn finish_writing(&mut self) {
        if self.guest_ended & shutdown::SEND == 0 || !self.outgoing.is_empty() {
            return;
        }
        if !self.write_shut {
            self.write_shut = true;
            self.stream.shutdown(Shutdown::Write);
        }
        if self.guest_ended == shutdown::BOTH {
            self.reset = true;
        }
    }

    fn guest_credit(&self) -> u32 {
        self.guest_buffer.saturating_sub((self.sent - self.guest_forwarded).0)
    }

    /// Whether [`Connection::next_packet`] may have something.
    pub fn has_packet(&self) -> bool {
        self.reset
            || matches!(self.opening, Opening::Respond | Opening::Request)
            || self.update_credit
            || self.request_credit
            || self.ended != self.ended_told
            || (self.readable && self.may_read())
    }

    fn may_read(&self) -> bool {
        !self.read_ended && (self.guest_credit() > 0 || !self.credit_requested)
    }

    /// Buffers that [`Connection::next_packet`] can use at most.
    pub fn wanted_buffers(&self) -> usize {
        self.wanted_buffers
    }

    /// The next packet for the guest. The caller adds addresses and [`Connection::credit`].
    pub fn next_packet(&mut self, rooms: &[Buffers]) -> Option<Packet> {
        let (op, flags, len) = self.choose_packet(rooms)?;
        self.forwarded_told = self.forwarded;
        self.update_credit = false;
        Some(Packet { op, flags, len })
    }

    fn choose_packet(&mut self, rooms: &[Buffers]) -> Option<(u16, u32, u32)> {
        if self.reset {
            return Some((op::RESET, 0, 0));
        }
        match self.opening {
            Opening::Respond => {
                self.opening = Opening::Done;
                return Some((op::RESPONSE, 0, 0));
            }
            Opening::Request => {
                self.opening = Opening::Requested;
                return Some((op::REQUEST, 0, 0));
            }
            Opening::Requested | Opening::Done => {}
        }
        if let Some(count) = self.read(rooms) {
            return Some((op::DATA, 0, count));
        }
        if self.reset {
            return Some((op::RESET, 0, 0));
        }
        if self.ended != self.ended_told {
            self.ended_told = self.ended;
            return Some((op::SHUTDOWN, self.ended, 0));
        }
        if std::mem::take(&mut self.request_credit) {
            return Some((op::CREDIT_REQUEST, 0, 0));
        }
        self.update_credit.then_some((op::CREDIT_UPDATE, 0, 0))
    }

    /// Reads from the stream as much as buffers and credit allow.
    fn read(&mut self, rooms: &[Buffers]) -> Option<u32> {
        if !self.readable || self.read_ended {
            return None;
        }
        let credit = self.guest_credit();
        if credit == 0 {
            // The guest says by itself when it has room again, but nothing obliges it to, unless it is asked.
            self.request_credit = !self.credit_requested;
            self.credit_requested = true;
            return None;
        }
        let mut target: Buffers = rooms.iter().flat_map(Buffers::slices).copied().collect();
        let room = target.len();
        if room > credit as usize {
            target = target.prefix(credit as usize);
        }
        if target.is_empty() {
            // Reading nothing would look like the end.
            return None;
        }
        match self.stream.read(target.slices()) {
            Ok(0) => {
                self.read_ended = true;
                self.ended |= shutdown::SEND;
                None
            }
            Ok(count) => {
                self.wanted_buffers = if count == room {
                    (2 * rooms.len()).min(MAX_BUFFERS_AT_ONCE)
                } else {
                    rooms.len().div_ceil(2)
                };
                // At most `credit`.
                let count = count as u32;
                self.sent += Wrapping(count);
                Some(count)
            }
            Err(error) => {
                self.readable = false;
                self.reset |= error.kind() != io::ErrorKind::WouldBlock;
                None
            }
        }
    }

    /// `buf_alloc` and `fwd_cnt` for a packet to the guest.
    pub fn credit(&self) -> (u32, u32) {
        (BUFFER_BYTES, self.forwarded.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::{
        driver_model::{Driver, Part, memory},
        vsock::{
            packet::TYPE_STREAM,
            stream_model::{Peer, stream},
        },
    };

    const GUEST_BUFFER: u32 = 1000;

    fn header(op: u16, flags: u32) -> Header {
        Header { socket_type: TYPE_STREAM, op, flags, buf_alloc: GUEST_BUFFER, ..Header::default() }
    }

    fn open() -> (Connection<crate::virtio::vsock::stream_model::ModelStream>, Peer) {
        let (stream, peer) = stream();
        let mut connection = Connection::new(stream, &header(op::REQUEST, 0));
        assert_eq!(next(&mut connection, 0).unwrap().0, op::RESPONSE);
        (connection, peer)
    }

    /// The next packet into a buffer of `room` bytes: operation, flags, data.
    fn next<S: Stream>(connection: &mut Connection<S>, room: usize) -> Option<(u16, u32, Vec<u8>)> {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 4);
        driver.add(&[Part::Writable(room + 1)]);
        let mut chain = driver.queue().pop(&memory).unwrap().unwrap();
        let room = chain.writable.take(room).unwrap();
        let Packet { op, flags, len } = connection.next_packet(std::slice::from_ref(&room))?;
        let mut data = room.to_vec();
        data.truncate(len as usize);
        Some((op, flags, data))
    }

    fn send<S: Stream>(connection: &mut Connection<S>, data: &[u8]) -> Verdict {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 4);
        driver.add(&[Part::Readable(data)]);
        let chain = driver.queue().pop(&memory).unwrap().unwrap();
        connection.receive(&header(op::DATA, 0), chain.readable)
    }

    fn tell<S: Stream>(connection: &mut Connection<S>, header: &Header) -> Verdict {
        connection.receive(header, Buffers::default())
    }

    #[test]
    fn data_from_guest_goes_straight_to_the_stream() {
        let (mut connection, peer) = open();
        assert_eq!(send(&mut connection, b"hello"), Verdict::Keep);
        assert_eq!(peer.received(), b"hello");
        assert_eq!(connection.credit(), (BUFFER_BYTES, 5));
        assert_eq!(next(&mut connection, 100), None);
    }

    #[test]
    fn data_for_a_full_stream_waits_in_order() {
        let (mut connection, peer) = open();
        peer.accept(3);
        send(&mut connection, b"hello");
        send(&mut connection, b" world");
        assert_eq!((peer.received(), connection.buffered()), (b"hel".to_vec(), 8));
        assert_eq!(connection.credit().1, 3);
        peer.accept(4);
        connection.writable();
        assert_eq!(peer.received(), b"hello w");
        peer.accept(100);
        connection.writable();
        assert_eq!((peer.received(), connection.buffered()), (b"hello world".to_vec(), 0));
        assert_eq!(connection.credit().1, 11);
    }

    #[test]
    fn data_over_the_credit_resets_the_stream() {
        let (mut connection, peer) = open();
        peer.accept(0);
        let chunk = vec![1; BUFFER_BYTES as usize / 2];
        send(&mut connection, &chunk);
        send(&mut connection, &chunk);
        assert_eq!(connection.buffered(), BUFFER_BYTES as usize);
        send(&mut connection, b"x");
        assert_eq!(connection.buffered(), BUFFER_BYTES as usize);
        assert_eq!(next(&mut connection, 100).unwrap().0, op::RESET);
    }

    #[test]
    fn guest_learns_of_credit_before_it_runs_out() {
        let (mut connection, _peer) = open();
        send(&mut connection, &vec![1; UPDATE_AFTER_BYTES as usize - 1]);
        assert!(!connection.has_packet() || next(&mut connection, 100).is_none());
        send(&mut connection, b"x");
        assert_eq!(next(&mut connection, 100).unwrap().0, op::CREDIT_UPDATE);
        assert_eq!(next(&mut connection, 100), None);
        tell(&mut connection, &header(op::CREDIT_REQUEST, 0));
        assert_eq!(next(&mut connection, 100).unwrap().0, op::CREDIT_UPDATE);
    }

    #[test]
    fn data_for_guest_stops_at_its_credit_and_asks_once() {
        let (mut connection, peer) = open();
        peer.send(&vec![7; 1500]);
        connection.readable();
        assert_eq!(next(&mut connection, 600).unwrap().2.len(), 600);
        assert_eq!(next(&mut connection, 600).unwrap().2.len(), 400);
        assert_eq!(next(&mut connection, 600).unwrap().0, op::CREDIT_REQUEST);
        assert!(!connection.has_packet());
        tell(&mut connection, &Header { fwd_cnt: 1000, ..header(op::CREDIT_UPDATE, 0) });
        assert_eq!(next(&mut connection, 600).unwrap().2.len(), 500);
        assert_eq!(next(&mut connection, 600), None);
    }

    #[test]
    fn credit_that_wraps_around_is_still_right() {
        let (mut connection, peer) = open();
        connection.sent = Wrapping(u32::MAX - 9);
        connection.guest_forwarded = connection.sent;
        peer.send(&[7; 20]);
        connection.readable();
        assert_eq!(next(&mut connection, 600).unwrap().2.len(), 20);
        assert_eq!(connection.guest_credit(), GUEST_BUFFER - 20);
        // A guest that claims more than it was sent gets nothing, rather than too much.
        tell(&mut connection, &Header { fwd_cnt: 11, ..header(op::CREDIT_UPDATE, 0) });
        assert_eq!(connection.guest_credit(), 0);
    }

    #[test]
    fn end_of_stream_ends_only_the_guests_reading() {
        let (mut connection, peer) = open();
        peer.send(b"bye");
        peer.end();
        connection.readable();
        assert_eq!(next(&mut connection, 100).unwrap(), (op::DATA, 0, b"bye".to_vec()));
        assert_eq!(next(&mut connection, 100).unwrap(), (op::SHUTDOWN, shutdown::SEND, vec![]));
        assert_eq!(next(&mut connection, 100), None);
        send(&mut connection, b"still");
        assert_eq!(peer.received(), b"still");
    }

    #[test]
    fn guests_half_close_comes_after_its_data() {
        let (mut connection, peer) = open();
        peer.accept(2);
        send(&mut connection, b"data");
        tell(&mut connection, &header(op::SHUTDOWN, shutdown::SEND));
        assert!(!peer.write_shut());
        peer.accept(10);
        connection.writable();
        assert_eq!((peer.received(), peer.write_shut()), (b"data".to_vec(), true));
        peer.send(b"answer");
        connection.readable();
        assert_eq!(next(&mut connection, 100).unwrap().2, b"answer");
        // Data after its end is a violation.
        send(&mut connection, b"x");
        assert_eq!(next(&mut connection, 100).unwrap().0, op::RESET);
    }

    #[test]
    fn guests_close_is_answered_when_its_data_is_flushed() {
        let (mut connection, peer) = open();
        peer.accept(1);
        send(&mut connection, b"data");
        tell(&mut connection, &header(op::SHUTDOWN, shutdown::BOTH));
        assert!(peer.read_shut());
        assert_eq!(next(&mut connection, 100), None);
        assert_eq!(tell(&mut connection, &header(op::RESET, 0)), Verdict::Remove { flush: true });
        peer.accept(3);
        connection.writable();
        assert_eq!((peer.received(), connection.buffered()), (b"data".to_vec(), 0));
        assert_eq!(next(&mut connection, 100).unwrap().0, op::RESET);
    }

    #[test]
    fn guests_reset_without_close_drops_what_waits() {
        let (mut connection, peer) = open();
        peer.accept(0);
        send(&mut connection, b"data");
        assert_eq!(tell(&mut connection, &header(op::RESET, 0)), Verdict::Remove { flush: false });
    }

    #[test]
    fn stream_that_refuses_data_is_told_to_the_guest_but_still_read() {
        let (mut connection, peer) = open();
        peer.send(b"last");
        peer.refuse();
        send(&mut connection, b"unwanted");
        connection.readable();
        assert_eq!(next(&mut connection, 100).unwrap(), (op::DATA, 0, b"last".to_vec()));
        assert_eq!(next(&mut connection, 100).unwrap(), (op::SHUTDOWN, shutdown::RECEIVE, vec![]));
        // What the guest sent before it knew is accounted for.
        send(&mut connection, b"more");
        assert_eq!(connection.credit().1, 12);
        peer.end();
        connection.readable();
        assert_eq!(next(&mut connection, 100).unwrap(), (op::SHUTDOWN, shutdown::BOTH, vec![]));
    }

    #[test]
    fn unexpected_operation_resets_the_stream() {
        for op in [op::REQUEST, op::RESPONSE, 0, 99] {
            let (mut connection, _peer) = open();
            tell(&mut connection, &header(op, 0));
            assert_eq!(next(&mut connection, 100).unwrap().0, op::RESET);
        }
    }
}
