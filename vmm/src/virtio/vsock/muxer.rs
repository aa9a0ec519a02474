//! All streams of a device: finds the connection of a packet, opens new ones, and decides who sends next.

use std::{
    collections::{BTreeMap, VecDeque},
    os::fd::RawFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use cloche_protocol::machine::HOST_CID;
use tracing::warn;

use super::{
    Connector, Stream,
    connection::{BUFFER_BYTES, Connection, Verdict},
    handshake::Handshakes,
    packet::{HEADER_BYTES, Header, TYPE_STREAM, op},
};
use crate::virtio::{
    device::{Poller, Readiness},
    queue::Buffers,
};

/// Streams that a guest can have at a time.
pub const MAX_CONNECTIONS: usize = 512;
/// Bytes that are buffered for all of them together; a guest that needs more loses the stream that asks for it.
pub const MAX_BUFFERED_BYTES: usize = 32 << 20;
/// Answers to packets of no connection that wait at most for a buffer; the guest's requests time out beyond it.
const MAX_RESETS: usize = 256;
/// Streams into the guest at most that it has not answered; a further one takes the place of the oldest.
const MAX_REQUESTED: usize = 64;
/// Where the ports begin that streams into the guest come from, above all that a program binds.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Refused connections that are logged at most.
const MAX_LOGGED_REFUSALS: u32 = 10;

/// The two ports that name a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    guest_port: u32,
    host_port: u32,
}

struct Entry<S> {
    connection: Connection<S>,
    /// Whether it waits for its turn to send.
    queued: bool,
}

/// Streams and whose turn it is.
pub struct Muxer<C: Connector> {
    guest_cid: u64,
    connector: C,
    connections: BTreeMap<Key, Entry<C::Stream>>,
    keys: BTreeMap<RawFd, Key>,
    /// Streams that the guest has forgotten, but whose last data the host has not taken yet.
    flushing: BTreeMap<RawFd, Connection<C::Stream>>,
    turns: VecDeque<Key>,
    resets: VecDeque<Key>,
    handshakes: Handshakes<C::Stream>,
    /// Streams into the guest, oldest first, some of which it has not answered.
    requested: VecDeque<Key>,
    next_host_port: u32,
    /// Bytes that wait for the host, in all connections.
    buffered: Arc<AtomicUsize>,
    refusals: u32,
}

impl<C: Connector> Muxer<C> {
    /// Without streams.
    pub fn new(guest_cid: u32, connector: C) -> Self {
        Self {
            guest_cid: guest_cid.into(),
            connector,
            connections: BTreeMap::new(),
            keys: BTreeMap::new(),
            flushing: BTreeMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            handshakes: Handshakes::new(),
            requested: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            buffered: Arc::default(),
            refusals: 0,
        }
    }

    /// Bytes of the guest's that wait for the host.
    pub fn buffered(&self) -> Arc<AtomicUsize> {
        self.buffered.clone()
    }

    /// Lets host programs in from now on.
    pub fn listen(&mut self, poller: &mut dyn Poller) {
        if let Some(listener) = self.connector.listener()
            && let Err(error) = poller.add(listener)
        {
            warn!(%error, "streams into the guest are not possible");
        }
    }

    /// Takes those that have connected. Their number is bounded by the listener's backlog.
    fn accept(&mut self, poller: &mut dyn Poller) {
        while let Ok(stream) = self.connector.accept() {
            if let Err(error) = self.handshakes.add(stream, poller) {
                warn!(%error, "a host program could not be served");
            }
        }
    }

    /// Asks the guest to take a host program's stream, which the poller has already.
    fn request(&mut self, stream: C::Stream, guest_port: u32, poller: &mut dyn Poller) {
        self.requested
            .retain(|key| self.connections.get(key).is_some_and(|entry| entry.connection.is_requested()));
        if self.requested.len() >= MAX_REQUESTED
            && let Some(oldest) = self.requested.pop_front()
        {
            self.remove(oldest, false, poller);
            if self.resets.len() < MAX_RESETS {
                self.resets.push_back(oldest);
            }
        }
        if self.connections.len() + self.flushing.len() >= MAX_CONNECTIONS {
            // The program sees the end of its stream.
            poller.remove(stream.fd());
            return;
        }
        let mut key = Key { guest_port, host_port: self.next_host_port };
        while self.connections.contains_key(&key) {
            key.host_port = Self::port_after(key.host_port);
        }
        self.next_host_port = Self::port_after(key.host_port);
        self.keys.insert(stream.fd(), key);
        self.connections.insert(key, Entry { connection: Connection::request(stream), queued: false });
        self.requested.push_back(key);
        self.queue(key);
    }

    fn port_after(port: u32) -> u32 {
        // VMADDR_PORT_ANY is no port.
        if port >= u32::MAX - 1 { FIRST_HOST_PORT } else { port + 1 }
    }

    /// Takes a packet from the guest. `data` has `header.len` bytes.
    pub fn receive(&mut self, header: &Header, data: Buffers, poller: &mut dyn Poller) {
        // A packet that claims to be another's is nobody's; there is no one to answer.
        if header.src_cid != self.guest_cid {
            return;
        }
        let key = Key { guest_port: header.src_port, host_port: header.dst_port };
        // §5.10.6.4.1: what is not understood is answered by a reset.
        if header.dst_cid != u64::from(HOST_CID) || header.socket_type != TYPE_STREAM {
            self.refuse(key, header);
            return;
        }
        let Some(entry) = self.connections.get_mut(&key) else {
            if header.op == op::REQUEST {
                self.connect(key, header, poller);
            } else {
                self.refuse(key, header);
            }
            return;
        };
        let before = entry.connection.buffered();
        let over = self.buffered.load(Ordering::Relaxed) + data.len() > MAX_BUFFERED_BYTES;
        let verdict =
            if over { Verdict::Remove { flush: false } } else { entry.connection.receive(header, data) };
        account(&self.buffered, before, entry.connection.buffered());
        match verdict {
            Verdict::Keep => self.queue(key),
            Verdict::Remove { flush } => {
                self.remove(key, flush, poller);
                if over {
                    self.refuse(key, header);
                }
            }
        }
    }

    fn connect(&mut self, key: Key, request: &Header, poller: &mut dyn Poller) {
        if self.connections.len() + self.flushing.len() >= MAX_CONNECTIONS {
            self.log_refusal(key, &format!("it has {MAX_CONNECTIONS} streams already"));
            self.refuse(key, request);
            return;
        }
        let opened = self.connector.connect(key.host_port).and_then(|stream| {
            poller.add(stream.fd())?;
            Ok(stream)
        });
        match opened {
            Ok(stream) => {
                self.keys.insert(stream.fd(), key);
                let connection = Connection::new(stream, request);
                self.connections.insert(key, Entry { connection, queued: false });
                self.queue(key);
            }
            Err(error) => {
                self.log_refusal(key, &error.to_string());
                self.refuse(key, request);
            }
        }
    }

    fn log_refusal(&mut self, key: Key, reason: &str) {
        self.refusals = self.refusals.saturating_add(1);
        if self.refusals <= MAX_LOGGED_REFUSALS {
            warn!(port = key.host_port, reason, "a vsock connection of the guest was refused");
        }
    }

    /// Answers with a reset, but never a reset with a reset.
    fn refuse(&mut self, key: Key, header: &Header) {
        if header.op != op::RESET && self.resets.len() < MAX_RESETS {
            self.resets.push_back(key);
        }
    }

    /// A stream's file descriptor is ready.
    pub fn ready(&mut self, fd: RawFd, ready: Readiness, poller: &mut dyn Poller) {
        if self.connector.listener() == Some(fd) {
            self.accept(poller);
            return;
        }
        if self.handshakes.has(fd) {
            if let Some((stream, port)) = self.handshakes.ready(fd, poller) {
                self.request(stream, port, poller);
            }
            return;
        }
        if let Some(connection) = self.flushing.get_mut(&fd) {
            let before = connection.buffered();
            connection.writable();
            account(&self.buffered, before, connection.buffered());
            if connection.buffered() == 0 {
                poller.remove(fd);
                self.flushing.remove(&fd);
            }
            return;
        }
        let Some(key) = self.keys.get(&fd).copied() else { return };
        let Some(entry) = self.connections.get_mut(&key) else { return };
        if ready.writable {
            let before = entry.connection.buffered();
            entry.connection.writable();
            account(&self.buffered, before, entry.connection.buffered());
        }
        if ready.readable {
            entry.connection.readable();
        }
        self.queue(key);
    }

    /// Gives a connection a turn if it has something to send.
    fn queue(&mut self, key: Key) {
        if let Some(entry) = self.connections.get_mut(&key)
            && !entry.queued
            && entry.connection.has_packet()
        {
            entry.queued = true;
            self.turns.push_back(key);
        }
    }

    /// Whether [`Muxer::send`] may have a packet.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// How many buffers the next packets can use at most: streams that send much get several at a time, so that one
    /// read fills them all.
    pub fn wanted_buffers(&self) -> usize {
        let next = if self.resets.is_empty() { self.turns.front() } else { None };
        next.and_then(|key| self.connections.get(key)).map_or(1, |entry| entry.connection.wanted_buffers())
    }

    /// Puts the next packets into buffers of the guest's, one into each, all of one stream; returns the length of each.
    /// None if there is no packet after all. Each buffer must have room for a header.
    pub fn send(&mut self, rooms: &mut [Buffers], poller: &mut dyn Poller) -> Vec<u32> {
        let mut heads: Vec<Buffers> = rooms.iter_mut().filter_map(|room| room.take(HEADER_BYTES)).collect();
        let headers = match self.resets.pop_front() {
            Some(key) => vec![self.header(key, op::RESET, 0, 0, (0, 0))],
            None => self.next_of_connections(rooms, poller),
        };
        let put = |(head, header): (&mut Buffers, Header)| {
            head.write(&header.encode());
            HEADER_BYTES as u32 + header.len
        };
        heads.iter_mut().zip(headers).map(put).collect()
    }

    fn next_of_connections(&mut self, rooms: &[Buffers], poller: &mut dyn Poller) -> Vec<Header> {
        while let Some(key) = self.turns.pop_front() {
            let Some(entry) = self.connections.get_mut(&key) else { continue };
            entry.queued = false;
            let Some(packet) = entry.connection.next_packet(rooms) else { continue };
            let credit = entry.connection.credit();
            if packet.op == op::RESET {
                self.remove(key, false, poller);
            } else if entry.connection.has_packet() {
                entry.queued = true;
                self.turns.push_back(key);
            }
            let mut left = packet.len;
            let mut headers = Vec::with_capacity(rooms.len());
            for room in rooms {
                // A buffer has less than 4 GiB.
                let here = left.min(room.len() as u32);
                headers.push(self.header(key, packet.op, packet.flags, here, credit));
                left -= here;
                if left == 0 {
                    break;
                }
            }
            return headers;
        }
        Vec::new()
    }

    fn header(&self, key: Key, op: u16, flags: u32, len: u32, (buf_alloc, fwd_cnt): (u32, u32)) -> Header {
        Header {
            src_cid: HOST_CID.into(),
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            len,
            socket_type: TYPE_STREAM,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    fn remove(&mut self, key: Key, flush: bool, poller: &mut dyn Poller) {
        let Some(entry) = self.connections.remove(&key) else { return };
        let fd = entry.connection.stream().fd();
        self.keys.remove(&fd);
        if entry.queued {
            // Else a guest that opens and closes a stream, and offers no buffer, would make it grow for ever.
            self.turns.retain(|waiting| *waiting != key);
        }
        if flush {
            self.flushing.insert(fd, entry.connection);
        } else {
            account(&self.buffered, entry.connection.buffered(), 0);
            poller.remove(fd);
        }
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn check(&self, watched: &[RawFd]) {
        let streams = self.connections.len() + self.flushing.len();
        assert!(streams <= MAX_CONNECTIONS);
        let watched = watched.iter().filter(|fd| self.connector.listener() != Some(**fd)).count();
        assert_eq!(watched, streams + self.handshakes.len(), "streams and watched file descriptors");
        assert_eq!(self.keys.len(), self.connections.len());
        assert!(self.turns.len() <= self.connections.len(), "{} turns", self.turns.len());
        assert!(self.resets.len() <= MAX_RESETS);
        let connections = self.connections.values().map(|entry| &entry.connection);
        let waiting: usize = connections.chain(self.flushing.values()).map(Connection::buffered).sum();
        assert_eq!(self.buffered.load(Ordering::Relaxed), waiting, "bytes that wait for the host");
        assert!(waiting <= MAX_BUFFERED_BYTES);
    }

    /// Forgets all streams of a driver that is gone. What it sent and closed in order is still flushed.
    pub fn reset(&mut self, poller: &mut dyn Poller) {
        let streams: Vec<(Key, bool)> =
            self.connections.iter().map(|(key, entry)| (*key, entry.connection.has_last_words())).collect();
        for (key, flush) in streams {
            self.remove(key, flush, poller);
        }
        self.turns.clear();
        self.resets.clear();
        self.requested.clear();
        self.handshakes.clear(poller);
        if let Some(listener) = self.connector.listener() {
            poller.remove(listener);
        }
    }
}

fn account(buffered: &AtomicUsize, before: usize, after: usize) {
    debug_assert!(after <= BUFFER_BYTES as usize);
    // One thread changes it; another one only looks.
    let total = buffered.load(Ordering::Relaxed);
    buffered.store(total.saturating_sub(before) + after, Ordering::Relaxed);
}
