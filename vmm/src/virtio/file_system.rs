//! The file system device (virtio 1.2 §5.11): FUSE requests of the guest go to a file server in a process of its own,
//! and its replies come back.
//!
//! ```text
//!  queues: 0 high priority, 1 requests
//!    pop ──▶ header with a number of ours ──▶ socket ──▶ file server
//!    used ◀── header with the guest's own ◀── socket ◀──────┘
//! ```
//! Nothing is kept but which chain a number stands for: data go from guest memory to the socket and back. When the
//! server has ended, every request is answered with EIO.

use tracing::warn;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::{
    device::{Device, Identity, Progress, Readiness, Running, device_type},
    queue::{Buffers, QueueError},
};
use crate::{
    backends::share::{Channel, REPLY_HEADER_BYTES},
    guest_memory::{self, GuestMemory},
};

const QUEUE_SIZE: u16 = 128;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE; QUEUES];
/// High priority and requests (§5.11.2).
const QUEUES: usize = 2;
/// Requests at the server at once. More wait in their queue.
pub const MAX_PENDING: usize = 128;
/// §5.11.4: the tag, padded with zeros.
const TAG_BYTES: usize = 36;
/// A request's header (§5.11.6.1: `struct fuse_in_header`): length at 0, opcode at 4, number at 8.
const HEADER_BYTES: usize = 40;
/// The longest request: a write of 128 KiB, as the server agrees with the guest, with its header.
pub const MAX_REQUEST_BYTES: usize = (128 << 10) + 4096;
/// The number of a request for which no reply comes.
const NO_REPLY: u64 = u64::MAX;

/// A request that the server has.
struct Pending {
    queue: usize,
    head: u16,
    /// The guest's own number for it.
    unique: u64,
    /// Where the reply goes.
    room: Vec<(GuestAddress, usize)>,
}

/// The device.
pub struct FileSystem {
    tag: String,
    channel: Channel,
    /// By the lower half of their numbers.
    pending: Vec<Option<Pending>>,
    /// Upper half of the numbers of requests; another one after each reset, since replies to former requests may
    /// still come.
    generation: u32,
    watched: bool,
    /// The socket was full.
    blocked: bool,
    /// The server has ended.
    dead: bool,
}

/// What became of a request.
enum Sent {
    Yes,
    /// It must wait until the socket has room.
    Later,
}

impl FileSystem {
    /// A device whose driver knows it by `tag` (shortened to 36 bytes).
    pub fn new(tag: &str, channel: Channel) -> Self {
        let pending = (0..MAX_PENDING).map(|_| None).collect();
        Self { tag: tag.into(), channel, pending, generation: 0, watched: false, blocked: false, dead: false }
    }

    /// Takes replies in and passes requests on, as far as it goes.
    fn work(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        if !self.watched && !self.dead {
            match running.poller.add(self.channel.fd()) {
                Ok(()) => self.watched = true,
                Err(error) => self.give_up(&error, running)?,
            }
        }
        let replies = self.receive(running)?;
        let mut progress = replies;
        for index in 0..QUEUES {
            if self.send(index, running)? == Progress::More {
                progress = Progress::More;
            }
        }
        Ok(progress)
    }

    /// Passes on what the driver made available in one queue.
    fn send(&mut self, index: usize, running: &mut Running) -> Result<Progress, QueueError> {
        let memory = running.memory;
        let mut budget = QUEUE_SIZE;
        loop {
            let Some(queue) = running.queue(index) else { return Ok(Progress::Done) };
            queue.disable_doorbell(memory)?;
            // A driver that never takes back what it gave cannot make more pending than there is room for.
            while !self.blocked && self.pending.iter().any(Option::is_none) {
                let Some(chain) = queue.pop(memory)? else { break };
                let head = chain.head;
                let (readable, mut writable) = (chain.readable, chain.writable);
                if self.dead {
                    let written = answer_with_error(&mut writable, &readable);
                    queue.push_used(memory, head, written)?;
                } else {
                    let wants_reply = !writable.is_empty();
                    match self.pass_on(index, head, readable, &writable, memory)? {
                        Ok(Sent::Yes) if wants_reply => {}
                        Ok(Sent::Yes) => queue.push_used(memory, head, 0)?,
                        Ok(Sent::Later) => {
                            queue.undo_pop();
                            self.blocked = true;
                        }
                        Err(error) => {
                            queue.undo_pop();
                            self.give_up(&error, running)?;
                            return Ok(Progress::More);
                        }
                    }
                }
                budget -= 1;
                if budget == 0 {
                    return Ok(Progress::More);
                }
            }
            if self.blocked || !self.pending.iter().any(Option::is_none) {
                // A reply, or room in the socket, brings us back.
                return Ok(Progress::Done);
            }
            if !queue.enable_doorbell(memory)? {
                return Ok(Progress::Done);
            }
        }
    }

    /// Sends a request under a number of ours. The outer error is the driver's, the inner one the server's.
    fn pass_on(
        &mut self,
        queue: usize,
        head: u16,
        mut readable: Buffers,
        writable: &Buffers,
        memory: &GuestMemory,
    ) -> Result<std::io::Result<Sent>, QueueError> {
        let bad = |problem| QueueError::BadRequest { head, problem };
        let length = readable.len();
        if length > MAX_REQUEST_BYTES {
            return Err(bad("it is longer than what the file system has agreed to (virtio 1.2 §5.11.6)"));
        }
        let mut header = readable
            .read::<HEADER_BYTES>()
            .ok_or_else(|| bad("its header is shorter than 40 bytes (virtio 1.2 §5.11.6.1)"))?;
        let number = if writable.is_empty() { None } else { self.pending.iter().position(Option::is_none) };
        let unique = number.map_or(NO_REPLY, |number| u64::from(self.generation) << 32 | number as u64);
        let theirs = replace_number(&mut header, unique);
        set_length(&mut header, length as u32);
        let mut parts = vec![VolatileSlice::from(header.as_mut_slice())];
        parts.extend(readable.slices().iter().cloned());
        match self.channel.send(&parts) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(Ok(Sent::Later)),
            Err(error) => return Ok(Err(error)),
        }
        if let Some(slot) = number.and_then(|number| self.pending.get_mut(number)) {
            let room = guest_memory::places(memory, writable.slices());
            *slot = Some(Pending { queue, head, unique: theirs, room });
        }
        Ok(Ok(Sent::Yes))
    }

    /// Takes in the replies that have come.
    fn receive(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        for _ in 0..MAX_PENDING {
            if self.dead {
                return Ok(Progress::Done);
            }
            let header = match self.channel.peek() {
                Ok(header) => header,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(Progress::Done),
                Err(error) => {
                    self.give_up(&error, running)?;
                    return Ok(Progress::Done);
                }
            };
            let Some(pending) = self.take_pending(number_of(&header)) else {
                // To a request of before a reset.
                if let Err(error) = self.channel.discard() {
                    self.give_up(&error, running)?;
                }
                continue;
            };
            let memory = running.memory;
            match self.deliver(&pending, memory) {
                Ok(written) => {
                    if let Some(queue) = running.queue(pending.queue) {
                        queue.push_used(memory, pending.head, written)?;
                    }
                }
                Err(error) => {
                    self.fail(pending, running)?;
                    self.give_up(&error, running)?;
                }
            }
        }
        Ok(Progress::More)
    }

    fn take_pending(&mut self, number: u64) -> Option<Pending> {
        let (generation, slot) = ((number >> 32) as u32, (number & 0xffff_ffff) as usize);
        if generation != self.generation {
            return None;
        }
        self.pending.get_mut(slot)?.take()
    }

    /// Receives the reply to `pending` into its place; how many bytes it has.
    fn deliver(&self, pending: &Pending, memory: &GuestMemory) -> std::io::Result<u32> {
        let mut room = room(pending, memory);
        let Some(mut place) = room.take(REPLY_HEADER_BYTES) else {
            // The driver left no room even for an error.
            self.channel.discard()?;
            return Ok(0);
        };
        let space = room.len() + REPLY_HEADER_BYTES;
        let mut header = [0; REPLY_HEADER_BYTES];
        let mut parts = vec![VolatileSlice::from(header.as_mut_slice())];
        parts.extend(room.slices().iter().cloned());
        let received = self.channel.receive(&parts)?;
        if received > space {
            return Ok(write_error(&mut place, pending.unique));
        }
        replace_number(&mut header, pending.unique);
        place.write(&header);
        Ok(received as u32)
    }

    /// The server is gone: what it has is answered with an error, and so is everything to come.
    fn give_up(&mut self, error: &std::io::Error, running: &mut Running) -> Result<(), QueueError> {
        if !self.dead {
            warn!(%error, "the file server of the share has ended; its files give I/O errors");
        }
        self.dead = true;
        self.blocked = false;
        self.unwatch(running.poller);
        for slot in 0..MAX_PENDING {
            if let Some(pending) = self.pending.get_mut(slot).and_then(Option::take) {
                self.fail(pending, running)?;
            }
        }
        Ok(())
    }

    fn fail(&self, pending: Pending, running: &mut Running) -> Result<(), QueueError> {
        let memory = running.memory;
        let written = write_error(&mut room(&pending, memory), pending.unique);
        let Some(queue) = running.queue(pending.queue) else { return Ok(()) };
        queue.push_used(memory, pending.head, written)
    }

    fn unwatch(&mut self, poller: &mut dyn super::device::Poller) {
        if std::mem::take(&mut self.watched) {
            poller.remove(self.channel.fd());
        }
    }
}

/// The buffers for a reply: up to the first that is not there any more, as memory that was added can go away. A reply
/// that is too long for them then is an I/O error.
fn room<'m>(pending: &Pending, memory: &'m GuestMemory) -> Buffers<'m> {
    let slices = pending.room.iter().map_while(|(address, bytes)| memory.get_slice(*address, *bytes).ok());
    slices.collect()
}

/// EIO for a request that the server never saw.
fn answer_with_error(writable: &mut Buffers, readable: &Buffers) -> u32 {
    let header = readable.prefix(HEADER_BYTES).to_vec();
    let unique = header.get(8..16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
    write_error(writable, unique)
}

fn write_error(writable: &mut Buffers, unique: u64) -> u32 {
    const EIO: i32 = -5;
    let mut reply = (REPLY_HEADER_BYTES as u32).to_le_bytes().to_vec();
    reply.extend(EIO.to_le_bytes());
    reply.extend(unique.to_le_bytes());
    if writable.write(&reply) { REPLY_HEADER_BYTES as u32 } else { 0 }
}

/// The number is at 8 in the header of requests and replies.
fn number_of(header: &[u8]) -> u64 {
    header.get(8..16).and_then(|bytes| bytes.try_into().ok()).map_or(NO_REPLY, u64::from_le_bytes)
}

fn replace_number(header: &mut [u8], number: u64) -> u64 {
    let former = number_of(header);
    if let Some(place) = header.get_mut(8..16) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    former
}

/// The server is told the length that there is, not the one that the guest claims.
fn set_length(header: &mut [u8], length: u32) {
    if let Some(place) = header.get_mut(..4) {
        place.copy_from_slice(&length.to_le_bytes());
    }
}

impl Device for FileSystem {
    fn identity(&self) -> Identity {
        let mut config = self.tag.clone().into_bytes();
        config.resize(TAG_BYTES, 0);
        let request_queues = (QUEUES - 1) as u32;
        config.extend(request_queues.to_le_bytes());
        Identity {
            device_type: device_type::FILE_SYSTEM,
            features: 0,
            queue_sizes: QUEUE_SIZES,
            optional_queues: 0,
            config,
        }
    }

    fn queues_ready(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.work(running)
    }

    fn fd_ready(
        &mut self,
        _fd: i32,
        ready: Readiness,
        running: &mut Running,
    ) -> Result<Progress, QueueError> {
        self.blocked &= !ready.writable;
        self.work(running)
    }

    fn stop(&mut self, poller: &mut dyn super::device::Poller) {
        self.unwatch(poller);
        self.blocked = false;
        self.pending.iter_mut().for_each(|slot| *slot = None);
        self.generation = self.generation.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

    use super::*;
    use crate::{
        guest_memory::{self, CHUNK_BYTES},
        virtio::{
            device::Poller as _,
            driver_model::{Driver, Part, Watched, memory},
            queue::VirtQueue,
        },
    };

    struct Fixture {
        memory: GuestMemory,
        driver: Driver,
        queues: [VirtQueue; 2],
        device: FileSystem,
        server: Option<OwnedFd>,
        poller: Watched,
    }

    fn fixture() -> Fixture {
        let memory = memory();
        let high = Driver::new(&memory, 0, QUEUE_SIZE);
        let driver = Driver::new(&memory, 1, QUEUE_SIZE);
        let queues = [high.queue(), driver.queue()];
        let (ours, server) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let device = FileSystem::new("tag", Channel::new(ours).unwrap());
        Fixture { memory, driver, queues, device, server: Some(server), poller: Watched::default() }
    }

    fn header(opcode: u32, unique: u64) -> Vec<u8> {
        let mut header = 0u32.to_le_bytes().to_vec();
        header.extend(opcode.to_le_bytes());
        header.extend(unique.to_le_bytes());
        header.resize(HEADER_BYTES, 0);
        header
    }

    impl Fixture {
        fn ring(&mut self) -> Result<Progress, QueueError> {
            let Self { memory, queues, device, poller, .. } = self;
            device.queues_ready(&mut Running { queues, features: 0, memory, poller })
        }

        fn receive(&self) -> Vec<u8> {
            let mut message = vec![0; MAX_REQUEST_BYTES];
            let server = self.server.as_ref().unwrap();
            let (_, length) = recv(server, message.as_mut_slice(), RecvFlags::DONTWAIT).unwrap();
            message.truncate(length);
            message
        }

        fn reply(&self, number: u64, body: &[u8]) {
            let mut message = (16 + body.len() as u32).to_le_bytes().to_vec();
            message.extend(0i32.to_le_bytes());
            message.extend(number.to_le_bytes());
            message.extend(body);
            send(self.server.as_ref().unwrap(), &message, SendFlags::empty()).unwrap();
        }
    }

    use rustix::net::{RecvFlags, recv};

    #[test]
    fn configuration_has_the_tag_and_one_request_queue() {
        let config = fixture().device.identity().config;
        assert_eq!(config.len(), 40);
        assert_eq!(&config[..4], b"tag\0");
        assert_eq!(config[36..], [1, 0, 0, 0]);
    }

    #[test]
    fn requests_are_answered_in_the_server_s_order_under_the_guest_s_numbers() {
        let mut fixture = fixture();
        let first = fixture.driver.add(&[Part::Readable(&header(3, 500)), Part::Writable(64)]);
        let second = fixture.driver.add(&[
            Part::Readable(&header(16, 500)),
            Part::Readable(b"data"),
            Part::Writable(16),
            Part::Writable(8),
        ]);
        fixture.ring().unwrap();
        let (one, two) = (fixture.receive(), fixture.receive());
        assert_eq!(one.len(), 40);
        assert_eq!(u32::from_le_bytes(two[..4].try_into().unwrap()), 44);
        assert_eq!(&two[40..], b"data");
        // What was not asked for is passed over.
        fixture.reply(77, b"");
        fixture.reply(number_of(&two), b"12345678");
        fixture.reply(number_of(&one), b"abc");
        fixture.ring().unwrap();
        let (head, bytes, written) = fixture.driver.take_used().unwrap();
        assert_eq!((head, written), (second, 24));
        assert_eq!(&bytes[44 + 8..44 + 16], 500u64.to_le_bytes());
        assert_eq!(&bytes[44 + 16..], b"12345678");
        let (head, bytes, written) = fixture.driver.take_used().unwrap();
        assert_eq!((head, written), (first, 19));
        assert_eq!(&bytes[40 + 16..40 + 19], b"abc");
        // Nor does a number count twice.
        fixture.reply(number_of(&one), b"abc");
        fixture.ring().unwrap();
        assert!(fixture.driver.take_used().is_none());
    }

    #[test]
    fn room_for_a_reply_ends_where_memory_has_gone() {
        let region = guest_memory::map_pluggable(GuestAddress(4 << 30), CHUNK_BYTES).unwrap();
        let memory = guest_memory::with_region(&memory(), region.clone()).unwrap();
        let places = vec![(GuestAddress(0), 16), (GuestAddress(4 << 30), 8), (GuestAddress(64), 8)];
        let pending = Pending { queue: 1, head: 0, unique: 1, room: places };
        region.set_present(0, true);
        assert_eq!(room(&pending, &memory).len(), 32);
        region.set_present(0, false);
        // Or the rest of a reply would be in the wrong place.
        assert_eq!(room(&pending, &memory).len(), 16);
    }

    #[test]
    fn request_without_room_for_a_reply_is_returned_at_once() {
        let mut fixture = fixture();
        fixture.driver.add(&[Part::Readable(&header(2, 1)), Part::Readable(&[0; 8])]);
        fixture.ring().unwrap();
        assert_eq!(fixture.driver.take_used().unwrap().2, 0);
        let message = fixture.receive();
        assert_eq!(number_of(&message), NO_REPLY);
    }

    #[test]
    fn reply_that_does_not_fit_is_an_error() {
        let mut fixture = fixture();
        fixture.driver.add(&[Part::Readable(&header(3, 9)), Part::Writable(20)]);
        fixture.driver.add(&[Part::Readable(&header(3, 10)), Part::Writable(3)]);
        fixture.ring().unwrap();
        for _ in 0..2 {
            let message = fixture.receive();
            fixture.reply(number_of(&message), b"12345");
        }
        fixture.ring().unwrap();
        let (_, bytes, written) = fixture.driver.take_used().unwrap();
        assert_eq!(written, 16);
        assert_eq!(bytes[44..48], (-5i32).to_le_bytes());
        assert_eq!(fixture.driver.take_used().unwrap().2, 0);
    }

    #[test]
    fn end_of_the_server_answers_all_with_eio() {
        let mut fixture = fixture();
        fixture.driver.add(&[Part::Readable(&header(3, 9)), Part::Writable(100)]);
        fixture.ring().unwrap();
        assert_eq!(fixture.poller.fds.len(), 1);
        fixture.server = None;
        fixture.driver.add(&[Part::Readable(&header(3, 10)), Part::Writable(100)]);
        while fixture.ring().unwrap() == Progress::More {}
        for number in [9u64, 10] {
            let (_, bytes, written) = fixture.driver.take_used().unwrap();
            assert_eq!(written, 16);
            assert_eq!(bytes[44..48], (-5i32).to_le_bytes());
            assert_eq!(bytes[48..56], number.to_le_bytes());
        }
        assert!(fixture.poller.fds.is_empty());
    }

    #[test]
    fn more_than_fits_waits_and_nothing_is_lost() {
        let mut fixture = fixture();
        let data = vec![7; 100 << 10];
        for number in 0..6 {
            fixture.driver.add(&[
                Part::Readable(&header(16, number)),
                Part::Readable(&data),
                Part::Writable(24),
            ]);
        }
        fixture.ring().unwrap();
        assert!(fixture.device.blocked);
        let mut seen = 0;
        while seen < 6 {
            let message = fixture.receive();
            assert_eq!(message.len(), 40 + data.len());
            fixture.reply(number_of(&message), &[0; 8]);
            seen += 1;
            let Fixture { memory, queues, device, poller, .. } = &mut fixture;
            let ready = Readiness { readable: true, writable: true };
            let fd = device.channel.fd();
            device.fd_ready(fd, ready, &mut Running { queues, features: 0, memory, poller }).unwrap();
        }
        for number in 0..6u64 {
            let (_, bytes, _) = fixture.driver.take_used().unwrap();
            assert_eq!(bytes[40 + data.len() + 8..][..8], number.to_le_bytes());
        }
    }

    #[test]
    fn heads_given_twice_do_not_make_more_pending_than_there_is_room_for() {
        let mut fixture = fixture();
        let head = fixture.driver.add(&[Part::Readable(&header(3, 9)), Part::Writable(100)]);
        for _ in 0..3 {
            for _ in 0..100 {
                fixture.driver.publish(head);
            }
            fixture.ring().unwrap();
            while recv(fixture.server.as_ref().unwrap(), &mut [0; 64], RecvFlags::DONTWAIT).is_ok() {}
        }
        assert_eq!(fixture.device.pending.len(), MAX_PENDING);
        assert!(fixture.device.pending.iter().all(Option::is_some));
    }

    #[test]
    fn reply_to_a_request_before_a_reset_goes_nowhere() {
        let mut fixture = fixture();
        fixture.driver.add(&[Part::Readable(&header(3, 9)), Part::Writable(100)]);
        fixture.ring().unwrap();
        let message = fixture.receive();
        fixture.poller.fds.clear();
        let fd = fixture.device.channel.fd();
        let Fixture { device, poller, .. } = &mut fixture;
        poller.add(fd).unwrap();
        device.stop(poller);
        assert!(poller.fds.is_empty());
        fixture.reply(number_of(&message), b"late");
        fixture.ring().unwrap();
        assert!(fixture.driver.take_used().is_none());
    }

    #[test]
    fn short_and_long_requests_fail_the_queue() {
        let mut fixture = fixture();
        fixture.driver.add(&[Part::Readable(&[0; 39]), Part::Writable(100)]);
        assert!(matches!(fixture.ring(), Err(QueueError::BadRequest { .. })));
        let mut fixture = self::fixture();
        let long = vec![0; MAX_REQUEST_BYTES];
        fixture.driver.add(&[Part::Readable(&header(16, 1)), Part::Readable(&long), Part::Writable(100)]);
        assert!(matches!(fixture.ring(), Err(QueueError::BadRequest { .. })));
    }
}
