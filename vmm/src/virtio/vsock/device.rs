//! The device's queues: packets from the guest go to the muxer, packets from the muxer into the guest's buffers.

use std::{
    os::fd::RawFd,
    sync::{Arc, atomic::AtomicUsize},
};

use super::{
    Connector,
    muxer::Muxer,
    packet::{HEADER_BYTES, Header},
};
use crate::virtio::{
    device::{Device, Identity, Poller, Progress, Readiness, Running, device_type},
    queue::{Buffers, Chain, QueueError},
};

const QUEUE_SIZE: u16 = 128;
const RX: usize = 0;
const TX: usize = 1;
/// The third is the event queue, on which there is nothing to say: it tells of a change of the context id.
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE, QUEUE_SIZE, 16];
/// Packets in each direction before other devices have their turn.
const PACKETS_PER_TURN: u16 = 2 * QUEUE_SIZE;

/// The device.
pub struct Vsock<C: Connector> {
    guest_cid: u32,
    muxer: Muxer<C>,
}

impl<C: Connector> Vsock<C> {
    /// A device for a guest with this context id.
    pub fn new(guest_cid: u32, connector: C) -> Self {
        Self { guest_cid, muxer: Muxer::new(guest_cid, connector) }
    }

    /// Bytes that the guest has sent and the host has not taken yet.
    pub fn buffered(&self) -> Arc<AtomicUsize> {
        self.muxer.buffered()
    }

    /// Panics if something that must always hold does not: only `watched` file descriptors have streams, and nothing
    /// has grown over its bound.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn check(&self, watched: &[RawFd]) {
        self.muxer.check(watched);
    }

    /// Moves packets both ways until neither side has one.
    fn pump(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let mut budget = PACKETS_PER_TURN;
        loop {
            let mut idle = self.take_from_guest(running, &mut budget)?;
            idle &= self.give_to_guest(running, &mut budget)?;
            if budget == 0 {
                return Ok(Progress::More);
            }
            if idle {
                return Ok(Progress::Done);
            }
        }
    }

    /// True if the guest has nothing more to send, and will ring when it has.
    fn take_from_guest(&mut self, running: &mut Running, budget: &mut u16) -> Result<bool, QueueError> {
        let memory = running.memory;
        let Some(queue) = running.queues.get_mut(TX) else { return Ok(true) };
        queue.disable_doorbell(memory)?;
        while *budget > 0 {
            let Some(chain) = queue.pop(memory)? else {
                return Ok(!queue.enable_doorbell(memory)?);
            };
            *budget -= 1;
            let head = chain.head;
            let (header, data) = parse(chain)?;
            self.muxer.receive(&header, data, running.poller);
            queue.push_used(memory, head, 0)?;
        }
        Ok(false)
    }

    /// True if there is nothing more for the guest, or no buffer for it and the guest will ring when there is one.
    fn give_to_guest(&mut self, running: &mut Running, budget: &mut u16) -> Result<bool, QueueError> {
        let memory = running.memory;
        let Some(queue) = running.queues.get_mut(RX) else { return Ok(true) };
        while *budget > 0 && self.muxer.has_packet() {
            let wanted = self.muxer.wanted_buffers().min((*budget).into());
            let (mut chains, mut rooms) = (Vec::with_capacity(wanted), Vec::with_capacity(wanted));
            while chains.len() < wanted
                && let Some(mut chain) = queue.pop(memory)?
            {
                if chain.writable.len() < HEADER_BYTES {
                    let problem = "it has no room for a packet header (virtio 1.2 §5.10.6)";
                    return Err(QueueError::BadRequest { head: chain.head, problem });
                }
                rooms.push(std::mem::take(&mut chain.writable));
                chains.push(chain);
            }
            if chains.is_empty() {
                // Only now is it of interest when buffers come.
                return Ok(!queue.enable_doorbell(memory)?);
            }
            let written = self.muxer.send(&mut rooms, running.poller);
            for chain in chains.iter().skip(written.len()).rev() {
                queue.put_back(chain);
            }
            if !written.is_empty() {
                let heads = chains.iter().map(|chain| chain.head);
                let returned: Vec<(u16, u32)> = heads.zip(written).collect();
                // No more than `wanted`.
                *budget -= returned.len() as u16;
                queue.push_used_together(memory, &returned)?;
            }
        }
        Ok(!self.muxer.has_packet())
    }
}

fn parse(mut chain: Chain) -> Result<(Header, Buffers), QueueError> {
    let head = chain.head;
    let bad = |problem| QueueError::BadRequest { head, problem };
    let bytes = chain
        .readable
        .read::<HEADER_BYTES>()
        .ok_or_else(|| bad("it is shorter than a packet header (virtio 1.2 §5.10.6)"))?;
    let header = Header::decode(&bytes);
    let data = chain
        .readable
        .take(header.len as usize)
        .ok_or_else(|| bad("it is shorter than its header says (virtio 1.2 §5.10.6)"))?;
    Ok((header, data))
}

impl<C: Connector> Device for Vsock<C> {
    fn identity(&self) -> Identity {
        Identity {
            device_type: device_type::SOCKET,
            // Streams need no feature bit (§5.10.3).
            features: 0,
            queue_sizes: QUEUE_SIZES,
            optional_queues: 0,
            config: u64::from(self.guest_cid).to_le_bytes().to_vec(),
        }
    }

    fn start(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.muxer.listen(running.poller);
        self.pump(running)
    }

    fn queues_ready(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.pump(running)
    }

    fn fd_ready(
        &mut self,
        fd: RawFd,
        ready: Readiness,
        running: &mut Running,
    ) -> Result<Progress, QueueError> {
        self.muxer.ready(fd, ready, running.poller);
        self.pump(running)
    }

    fn fd_ready_while_stopped(&mut self, fd: RawFd, ready: Readiness, poller: &mut dyn Poller) {
        // Last words of a driver that is gone.
        self.muxer.ready(fd, ready, poller);
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        self.muxer.reset(poller);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        guest_memory::GuestMemory,
        virtio::{
            driver_model::{Driver, Part, Watched, memory},
            queue::VirtQueue,
            vsock::{
                connection::BUFFER_BYTES,
                handshake::MAX_WAITING,
                muxer::MAX_CONNECTIONS,
                packet::{TYPE_STREAM, op, shutdown},
                stream_model::{LISTENER, ModelConnector, Peer},
            },
        },
    };

    const CID: u32 = 3;
    const BOTH: Readiness = Readiness { readable: true, writable: true };

    /// A device with its two queues, and a guest's driver on the other side.
    struct Fixture {
        memory: GuestMemory,
        rx: Driver,
        tx: Driver,
        queues: Vec<VirtQueue>,
        device: Vsock<ModelConnector>,
        connector: ModelConnector,
        watched: Watched,
    }

    impl Fixture {
        fn new() -> Self {
            let memory = memory();
            let rx = Driver::new(&memory, 0, QUEUE_SIZE);
            let tx = Driver::new(&memory, 1, QUEUE_SIZE);
            let connector = ModelConnector::default();
            Self {
                queues: vec![rx.queue(), tx.queue()],
                device: Vsock::new(CID, connector.clone()),
                memory,
                rx,
                tx,
                connector,
                watched: Watched::default(),
            }
        }

        fn run(
            &mut self,
            work: impl Fn(&mut Vsock<ModelConnector>, &mut Running) -> Result<Progress, QueueError>,
        ) {
            let poller = &mut self.watched;
            let mut running = Running { queues: &mut self.queues, features: 0, memory: &self.memory, poller };
            while work(&mut self.device, &mut running).unwrap() == Progress::More {}
        }

        fn pump(&mut self) {
            self.run(|device, running| device.queues_ready(running));
        }

        /// Something happened at the host's end.
        fn ready(&mut self, peer: &Peer) {
            let fd = peer.fd();
            self.run(|device, running| device.fd_ready(fd, BOTH, running));
        }

        fn send_packet(&mut self, header: Header, data: &[u8]) {
            let bytes = header.encode();
            if data.is_empty() {
                self.tx.add(&[Part::Readable(&bytes)]);
            } else {
                self.tx.add(&[Part::Readable(&bytes), Part::Readable(data)]);
            }
            self.pump();
            while self.tx.take_used().is_some() {}
        }

        fn send(&mut self, port: u32, op: u16, data: &[u8]) {
            self.send_packet(packet(port, op, data.len()), data);
        }

        /// Gives the device a receive buffer, and takes what comes.
        fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
            if self.rx.take_used().is_some() {
                panic!("a packet was left over");
            }
            self.rx.add(&[Part::Writable(4096 + HEADER_BYTES)]);
            self.pump();
            let (_, bytes, written) = self.rx.take_used()?;
            Some(split(&bytes, written))
        }

        fn connect(&mut self, port: u32) {
            self.send(port, op::REQUEST, &[]);
            assert_eq!(self.receive().unwrap().0.op, op::RESPONSE);
        }
    }

    fn split(bytes: &[u8], written: u32) -> (Header, Vec<u8>) {
        let header = Header::decode(bytes[..HEADER_BYTES].try_into().unwrap());
        assert_eq!(written as usize, HEADER_BYTES + header.len as usize);
        (header, bytes[HEADER_BYTES..written as usize].to_vec())
    }

    fn packet(port: u32, op: u16, len: usize) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: 2,
            src_port: port,
            dst_port: port,
            len: len as u32,
            socket_type: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: 1 << 18,
            fwd_cnt: 0,
        }
    }

    #[test]
    fn connected_port_carries_data_both_ways() {
        let mut fixture = Fixture::new();
        fixture.connect(7);
        let peer = fixture.connector.peer(0);
        fixture.send(7, op::DATA, b"ping");
        assert_eq!(peer.received(), b"ping");
        peer.send(b"pong");
        fixture.rx.add(&[Part::Writable(100)]);
        fixture.ready(&peer);
        let (_, bytes, written) = fixture.rx.take_used().unwrap();
        let (header, data) = split(&bytes, written);
        assert_eq!((header.op, header.src_cid, header.dst_cid), (op::DATA, 2, CID.into()));
        assert_eq!((header.src_port, header.dst_port, header.fwd_cnt), (7, 7, 4));
        assert_eq!(data, b"pong");
    }

    #[test]
    fn data_waits_for_a_receive_buffer() {
        let mut fixture = Fixture::new();
        fixture.connect(7);
        let peer = fixture.connector.peer(0);
        peer.send(b"early");
        // The buffer that connect() left behind is not there: readiness finds none.
        fixture.ready(&peer);
        assert_eq!(fixture.receive().unwrap().1, b"early");
    }

    /// A host program has connected and said `line`.
    fn dialled(fixture: &mut Fixture, line: &[u8]) -> Peer {
        let peer = fixture.connector.dial();
        fixture.run(|device, running| device.fd_ready(LISTENER, BOTH, running));
        peer.send(line);
        fixture.ready(&peer);
        peer
    }

    /// What the guest says to a stream that the host opened.
    fn from_guest(request: &Header, op: u16, len: usize) -> Header {
        Header { src_port: request.dst_port, dst_port: request.src_port, ..packet(0, op, len) }
    }

    #[test]
    fn host_stream_that_the_guest_accepts_carries_data_both_ways() {
        let mut fixture = Fixture::new();
        // What follows the line at once is the guest's, byte by byte.
        let peer = dialled(&mut fixture, b"CONNECT 52\nearly\n");
        let (request, _) = fixture.receive().unwrap();
        assert_eq!((request.op, request.dst_port, request.src_cid), (op::REQUEST, 52, 2));
        assert!(peer.received().is_empty());
        fixture.send_packet(from_guest(&request, op::RESPONSE, 0), &[]);
        assert_eq!(peer.received(), format!("OK {}\n", request.src_port).as_bytes());
        assert_eq!(fixture.receive().unwrap().1, b"early\n");
        fixture.send_packet(from_guest(&request, op::DATA, 4), b"back");
        assert!(peer.received().ends_with(b"\nback"));
        // The guest closes, and the stream ends.
        fixture.send_packet(Header { flags: shutdown::BOTH, ..from_guest(&request, op::SHUTDOWN, 0) }, &[]);
        assert_eq!(fixture.receive().unwrap().0.op, op::RESET);
        assert!(peer.write_shut() && fixture.watched.fds.is_empty());
    }

    #[test]
    fn host_stream_that_the_guest_refuses_ends() {
        let mut fixture = Fixture::new();
        let peer = dialled(&mut fixture, b"CONNECT 52\n");
        let (request, _) = fixture.receive().unwrap();
        fixture.send_packet(from_guest(&request, op::RESET, 0), &[]);
        assert!(peer.received().is_empty() && fixture.watched.fds.is_empty());
    }

    #[test]
    fn guest_that_answers_a_request_with_data_is_reset() {
        let mut fixture = Fixture::new();
        let peer = dialled(&mut fixture, b"CONNECT 52\n");
        let (request, _) = fixture.receive().unwrap();
        fixture.send_packet(from_guest(&request, op::DATA, 4), b"evil");
        assert_eq!(fixture.receive().unwrap().0.op, op::RESET);
        assert!(peer.received().is_empty() && fixture.watched.fds.is_empty());
    }

    #[test]
    fn host_programs_that_say_nothing_sensible_are_sent_away() {
        let mut fixture = Fixture::new();
        for line in [&b"HELLO\n"[..], b"CONNECT x\n", &[b'x'; 30]] {
            dialled(&mut fixture, line);
        }
        dialled(&mut fixture, b"CONN").end();
        assert_eq!(fixture.watched.fds.len(), 1);
        let silent = fixture.connector.peer(3);
        fixture.ready(&silent);
        assert!(fixture.watched.fds.is_empty());
        for _ in 0..2 * MAX_WAITING {
            dialled(&mut fixture, b"CONNECT 5");
        }
        assert_eq!(fixture.watched.fds.len(), MAX_WAITING);
        fixture.device.stop(&mut fixture.watched);
        assert!(fixture.watched.fds.is_empty());
    }

    #[test]
    fn guest_that_answers_no_request_holds_a_bounded_number() {
        let mut fixture = Fixture::new();
        for _ in 0..3 * MAX_CONNECTIONS {
            dialled(&mut fixture, b"CONNECT 52\n");
        }
        assert!(fixture.watched.fds.len() <= 64, "{}", fixture.watched.fds.len());
    }

    #[test]
    fn port_without_listener_is_reset() {
        let mut fixture = Fixture::new();
        fixture.send(404, op::REQUEST, &[]);
        assert_eq!(fixture.receive().unwrap().0.op, op::RESET);
        assert!(fixture.watched.fds.is_empty());
    }

    #[test]
    fn packet_of_no_connection_is_reset_unless_it_is_a_reset() {
        let mut fixture = Fixture::new();
        fixture.send(7, op::DATA, b"x");
        assert_eq!(fixture.receive().unwrap().0.op, op::RESET);
        fixture.send_packet(Header { socket_type: 2, ..packet(7, op::REQUEST, 0) }, &[]);
        assert_eq!(fixture.rx.take_used(), None);
        let mut fixture = Fixture::new();
        fixture.send(7, op::RESET, &[]);
        fixture.send_packet(Header { src_cid: 9, ..packet(7, op::REQUEST, 0) }, &[]);
        assert!(fixture.receive().is_none());
    }

    #[test]
    fn closed_stream_is_forgotten_and_its_port_can_be_used_again() {
        let mut fixture = Fixture::new();
        fixture.connect(7);
        fixture.send_packet(Header { flags: shutdown::BOTH, ..packet(7, op::SHUTDOWN, 0) }, &[]);
        assert_eq!(fixture.receive().unwrap().0.op, op::RESET);
        assert!(fixture.watched.fds.is_empty());
        assert!(fixture.connector.peer(0).write_shut());
        fixture.connect(7);
    }

    #[test]
    fn last_words_reach_a_slow_host_after_the_guest_forgot_the_stream() {
        let mut fixture = Fixture::new();
        fixture.connect(7);
        let peer = fixture.connector.peer(0);
        peer.accept(0);
        fixture.send(7, op::DATA, b"last words");
        fixture.send_packet(Header { flags: shutdown::BOTH, ..packet(7, op::SHUTDOWN, 0) }, &[]);
        fixture.send(7, op::RESET, &[]);
        let buffered = fixture.device.buffered();
        assert_eq!(buffered.load(std::sync::atomic::Ordering::Relaxed), 10);
        peer.accept(100);
        fixture.ready(&peer);
        assert_eq!((peer.received(), peer.write_shut()), (b"last words".to_vec(), true));
        assert_eq!(buffered.load(std::sync::atomic::Ordering::Relaxed), 0);
        assert!(fixture.watched.fds.is_empty());
    }

    #[test]
    fn connections_over_the_bound_are_reset() {
        let mut fixture = Fixture::new();
        for port in 0..MAX_CONNECTIONS as u32 {
            fixture.connect(1000 + port);
        }
        fixture.send(1, op::REQUEST, &[]);
        assert_eq!(fixture.receive().unwrap().0.op, op::RESET);
        fixture.device.stop(&mut fixture.watched);
        assert!(fixture.watched.fds.is_empty());
    }

    #[test]
    fn answers_without_receive_buffers_stay_bounded() {
        let mut fixture = Fixture::new();
        for port in 0..5000 {
            fixture.send(port, op::DATA, b"x");
        }
        let mut resets = 0;
        while fixture.receive().is_some_and(|(header, _)| header.op == op::RESET) {
            resets += 1;
        }
        assert_eq!(resets, 256);
    }

    #[test]
    fn streams_opened_and_closed_without_receive_buffers_leave_nothing_behind() {
        let mut fixture = Fixture::new();
        for _ in 0..1000 {
            fixture.send(7, op::REQUEST, &[]);
            fixture.send(7, op::RESET, &[]);
        }
        fixture.device.check(&fixture.watched.fds);
        assert!(!fixture.device.muxer.has_packet());
    }

    #[test]
    fn last_words_are_passed_on_after_the_driver_is_gone() {
        let mut fixture = Fixture::new();
        fixture.connect(7);
        let peer = fixture.connector.peer(0);
        peer.accept(1);
        fixture.send(7, op::DATA, b"bye");
        fixture.send_packet(Header { flags: shutdown::SEND, ..packet(7, op::SHUTDOWN, 0) }, &[]);
        fixture.device.stop(&mut fixture.watched);
        let buffered = fixture.device.buffered();
        assert_eq!(buffered.load(std::sync::atomic::Ordering::Relaxed), 2);
        peer.accept(10);
        fixture.device.fd_ready_while_stopped(peer.fd(), BOTH, &mut fixture.watched);
        assert_eq!(peer.received(), b"bye");
        assert_eq!(buffered.load(std::sync::atomic::Ordering::Relaxed), 0);
        assert!(fixture.watched.fds.is_empty());
    }

    #[test]
    fn two_streams_take_turns() {
        let mut fixture = Fixture::new();
        fixture.connect(1);
        fixture.connect(2);
        let peers = [fixture.connector.peer(0), fixture.connector.peer(1)];
        peers.iter().for_each(|peer| peer.send(&[0; 20_000]));
        peers.iter().for_each(|peer| fixture.ready(peer));
        let ports: Vec<u32> = (0..4).map(|_| fixture.receive().unwrap().0.src_port).collect();
        assert_ne!(ports[0], ports[1]);
        assert_eq!(ports[..2], ports[2..]);
    }

    #[test]
    fn torn_packet_fails_the_device() {
        for parts in [vec![Part::Readable(&[0; HEADER_BYTES - 1])], vec![Part::Writable(100)]] {
            let mut fixture = Fixture::new();
            fixture.tx.add(&parts);
            let mut running = Running {
                features: 0,
                queues: &mut fixture.queues,
                memory: &fixture.memory,
                poller: &mut fixture.watched,
            };
            assert!(matches!(fixture.device.queues_ready(&mut running), Err(QueueError::BadRequest { .. })));
        }
        let mut fixture = Fixture::new();
        let header = packet(7, op::DATA, 2).encode();
        fixture.tx.add(&[Part::Readable(&header), Part::Readable(b"x")]);
        let mut running = Running {
            features: 0,
            queues: &mut fixture.queues,
            memory: &fixture.memory,
            poller: &mut fixture.watched,
        };
        assert!(matches!(fixture.device.queues_ready(&mut running), Err(QueueError::BadRequest { .. })));
    }

    /// A step of a test against the model below.
    #[derive(Debug, Clone)]
    enum Step {
        GuestSends(usize),
        GuestReceives,
        GuestReads(u32),
        HostSends(usize),
        HostTakes(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1usize..5000).prop_map(Step::GuestSends),
            Just(Step::GuestReceives),
            (1u32..5000).prop_map(Step::GuestReads),
            (1usize..9000).prop_map(Step::HostSends),
            (0usize..9000).prop_map(Step::HostTakes),
        ]
    }

    fn pattern(from: usize, count: usize) -> Vec<u8> {
        (from..from + count).map(|index| (index * 31 + index / 251) as u8).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// However reads, writes and credit interleave, both sides get exactly what the other sent, neither is sent
        /// more than it can buffer, and nothing is stuck in the end.
        #[test]
        fn streams_are_exact_under_any_interleaving(steps in prop::collection::vec(step(), 1..120)) {
            const GUEST_BUFFER: u32 = 6000;
            let mut fixture = Fixture::new();
            fixture.connect(7);
            let peer = fixture.connector.peer(0);
            peer.accept(0);
            let (mut guest_sent, mut host_sent) = (0, 0);
            let (mut guest_got, mut guest_read) = (Vec::new(), 0u32);
            let mut device_forwarded = 0u32;
            let header = |op, len, read| Header { buf_alloc: GUEST_BUFFER, fwd_cnt: read, ..packet(7, op, len) };
            fixture.send_packet(header(op::CREDIT_UPDATE, 0, 0), &[]);
            let mut all = steps;
            // The end: everybody takes everything.
            all.push(Step::HostTakes(usize::MAX));
            for _ in 0..250 {
                all.push(Step::GuestReads(u32::MAX));
                all.push(Step::GuestReceives);
            }
            for step in all {
                match step {
                    Step::GuestSends(count) => {
                        let credit = BUFFER_BYTES - (guest_sent as u32 - device_forwarded);
                        let count = count.min(credit as usize);
                        if count > 0 {
                            fixture.send_packet(header(op::DATA, count, guest_read), &pattern(guest_sent, count));
                            guest_sent += count;
                        }
                    }
                    Step::GuestReceives => {
                        if let Some((packet, data)) = fixture.receive() {
                            prop_assert_ne!(packet.op, op::RESET);
                            device_forwarded = packet.fwd_cnt;
                            guest_got.extend(data);
                            prop_assert!(guest_got.len() as u32 - guest_read <= GUEST_BUFFER);
                        } else {
                            // Take the buffer back, so that receive() finds the queue as it expects it.
                            fixture = reclaim(fixture);
                        }
                    }
                    Step::GuestReads(count) => {
                        let unread = guest_got.len() as u32 - guest_read;
                        guest_read += count.min(unread);
                        fixture.send_packet(header(op::CREDIT_UPDATE, 0, guest_read), &[]);
                    }
                    Step::HostSends(count) => {
                        peer.send(&pattern(host_sent, count));
                        host_sent += count;
                        fixture.ready(&peer);
                    }
                    Step::HostTakes(count) => {
                        peer.accept(count);
                        fixture.ready(&peer);
                    }
                }
            }
            prop_assert_eq!(peer.received(), pattern(0, guest_sent));
            prop_assert_eq!(guest_got, pattern(0, host_sent));
        }
    }

    /// Lets the driver forget an unused receive buffer: both ends of the queue start anew.
    fn reclaim(mut fixture: Fixture) -> Fixture {
        let memory = fixture.memory.clone();
        fixture.rx = Driver::new(&memory, 0, QUEUE_SIZE);
        fixture.rx.set_available_index(0);
        fixture.rx.set_used_index(0);
        fixture.queues[RX] = fixture.rx.queue();
        fixture
    }
}
