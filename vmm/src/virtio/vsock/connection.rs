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

use std::{collections::VecDeque, io, net::Shutdown, num::Wrapping};

use super::{
    Stream,
    packet::{Header, op, shutdown},
};
use crate::virtio::queue::Buffers;

/// Bytes from the guest that are buffered for a host process which does not read fast enough.
pub const BUFFER_BYTES: u32 = 256 * 1024;

/// The guest learns of passed-on bytes at the latest when there are this many: early enough that it never waits while
/// the host reads.
const UPDATE_AFTER_BYTES: u32 = BUFFER_BYTES / 4;

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
    outgoing: VecDeque<u8>,
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
    /// Whether reading may yield something.
    readable: bool,
    /// Whether the stream has ended.
    read_ended: bool,
    /// Directions of whose end the guest should be, and was, told.
    ended: u32,
    ended_told: u32,
    respond: bool,
    reset: bool,
    update_credit: bool,
    request_credit: bool,
    credit_requested: bool,
}

impl<S: Stream> Connection<S> {
    /// A stream that answers the guest's request.
    pub fn new(stream: S, request: &Header) -> Self {
        Self {
            stream,
            outgoing: VecDeque::new(),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            guest_ended: 0,
            write_shut: false,
            write_broken: false,
            sent: Wrapping(0),
            guest_buffer: request.buf_alloc,
            guest_forwarded: Wrapping(request.fwd_cnt),
            readable: true,
            read_ended: false,
            ended: 0,
            ended_told: 0,
            respond: true,
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
            op::DATA => self.receive_data(data),
            op::SHUTDOWN => self.receive_shutdown(header.flags),
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => self.update_credit = true,
            op::RESET => return Verdict::Remove { flush: self.has_last_words() },
            // A second request, a response that nobody asked for, or an unknown operation.
            _ => self.reset = true,
        }
        Verdict::Keep
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
            self.outgoing.extend(data.to_vec());
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
            let (front, _) = self.outgoing.as_slices();
            match self.stream.write(front) {
                Ok(0) => return,
                Ok(count) => {
                    self.outgoing.drain(..count);
                    self.passed_on(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => self.write_failed(&error),
            }
        }
        self.finish_writing();
    }

    /// The stream may have data, or its end.
    pub fn readable(&mut self) {
        self.readable = self.guest_ended & shutdown::RECEIVE == 0;
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
            _ => self.reset = true,
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
            || self.respond
            || self.update_credit
            || self.request_credit
            || self.ended != self.ended_told
            || (self.readable && self.may_read())
    }

    fn may_read(&self) -> bool {
        !self.read_ended && (self.guest_credit() > 0 || !self.credit_requested)
    }

    /// The next packet for the guest: its operation, flags and number of bytes that were put in `room`. The caller adds
    /// addresses and [`Connection::credit`].
    pub fn next_packet(&mut self, room: &Buffers) -> Option<(u16, u32, u32)> {
        let packet = self.choose_packet(room)?;
        self.forwarded_told = self.forwarded;
        self.update_credit = false;
        Some(packet)
    }

    fn choose_packet(&mut self, room: &Buffers) -> Option<(u16, u32, u32)> {
        if self.reset {
            return Some((op::RESET, 0, 0));
        }
        if std::mem::take(&mut self.respond) {
            return Some((op::RESPONSE, 0, 0));
        }
        if let Some(count) = self.read(room) {
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

    /// Reads from the stream as much as buffer and credit allow.
    fn read(&mut self, room: &Buffers) -> Option<u32> {
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
        let target = room.prefix(credit as usize);
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
