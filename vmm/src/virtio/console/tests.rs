//! The device with a model of its driver, and a terminal that is a socket.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
};

use proptest::prelude::*;

use super::Terminal;
use crate::{
    devices::console::Console,
    guest_memory::GuestMemory,
    virtio::{
        device::Progress,
        driver_model::{Driver, Part, memory, ring},
        queue::{QueueError, VirtQueue},
    },
};

struct Fixture {
    memory: GuestMemory,
    drivers: [Driver; 2],
    queues: [VirtQueue; 2],
    device: Terminal,
    console: Arc<Mutex<Console>>,
    terminal: UnixStream,
}

impl Fixture {
    fn new(with_terminal: bool) -> Self {
        let memory = memory();
        let drivers = [0, 1].map(|index| Driver::new(&memory, index, 64));
        let queues = [drivers[0].queue(), drivers[1].queue()];
        let (terminal, socket) = UnixStream::pair().unwrap();
        terminal.set_nonblocking(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        let console = Arc::new(Mutex::new(Console::default()));
        let device = Terminal::new(console.clone(), with_terminal.then_some(socket));
        Self { memory, drivers, queues, device, console, terminal }
    }

    fn ring(&mut self) -> Result<(), QueueError> {
        while ring(&mut self.device, &mut self.queues, &self.memory)? == Progress::More {}
        Ok(())
    }

    fn returned(&mut self, queue: usize) -> usize {
        std::iter::from_fn(|| self.drivers[queue].take_used()).count()
    }
}

#[test]
fn printed_bytes_are_in_the_console_and_on_the_terminal() {
    for with_terminal in [false, true] {
        let mut fixture = Fixture::new(with_terminal);
        fixture.drivers[1].add(&[Part::Readable(b"hel"), Part::Readable(b"lo\n")]);
        fixture.drivers[1].add(&[Part::Readable(b"world\n")]);
        fixture.ring().unwrap();
        assert_eq!(fixture.returned(1), 2);
        assert_eq!(fixture.console.lock().unwrap().contents(), b"hello\nworld\n");
        let mut seen = [0; 100];
        let read = fixture.terminal.read(&mut seen).unwrap_or(0);
        assert_eq!(&seen[..read], if with_terminal { b"hello\nworld\n".as_slice() } else { b"" });
    }
}

#[test]
fn typed_bytes_wait_for_buffers_and_buffers_for_bytes() {
    let mut fixture = Fixture::new(true);
    fixture.terminal.write_all(b"abcdef").unwrap();
    fixture.ring().unwrap();
    fixture.drivers[0].add(&[Part::Writable(2), Part::Writable(2)]);
    fixture.drivers[0].add(&[Part::Writable(10)]);
    fixture.drivers[0].add(&[Part::Writable(10)]);
    fixture.ring().unwrap();
    let (_, bytes, written) = fixture.drivers[0].take_used().unwrap();
    assert_eq!((bytes.as_slice(), written), (b"abcd".as_slice(), 4));
    let (_, bytes, written) = fixture.drivers[0].take_used().unwrap();
    assert_eq!((&bytes[..2], written), (b"ef".as_slice(), 2));
    assert!(fixture.drivers[0].take_used().is_none());
    fixture.terminal.write_all(b"g").unwrap();
    fixture.ring().unwrap();
    assert_eq!(fixture.drivers[0].take_used().unwrap().2, 1);
}

#[test]
fn slow_terminal_holds_the_guest_back_and_gets_every_byte() {
    let mut fixture = Fixture::new(true);
    let line = [b'x'; 30_000];
    let mut returned = 0;
    for _ in 0..40 {
        fixture.drivers[1].add(&[Part::Readable(&line)]);
        fixture.ring().unwrap();
        returned += fixture.returned(1);
    }
    assert!(returned < 40, "more was taken than a socket holds");
    assert!(fixture.device.unsent.len() <= line.len());
    let mut seen = 0;
    let mut buffer = vec![0; 1 << 20];
    while seen < 40 * line.len() {
        seen += fixture.terminal.read(&mut buffer).unwrap_or(0);
        fixture.ring().unwrap();
        returned += fixture.returned(1);
    }
    assert_eq!((seen, returned), (40 * line.len(), 40));
}

#[test]
fn terminal_that_is_gone_does_not_hold_the_guest_back() {
    let mut fixture = Fixture::new(true);
    fixture.drivers[0].add(&[Part::Writable(10)]);
    fixture.terminal.shutdown(std::net::Shutdown::Both).unwrap();
    for _ in 0..100 {
        fixture.drivers[1].add(&[Part::Readable(&[b'x'; 20_000])]);
        fixture.ring().unwrap();
        assert_eq!(fixture.returned(1), 1);
    }
    assert_eq!(fixture.returned(0), 0);
    assert_eq!(fixture.console.lock().unwrap().contents().len(), 64 << 10);
}

#[test]
fn chain_that_prints_or_takes_nothing_or_too_much_fails_the_queue() {
    let fails = |queue: usize, parts: &[Part]| {
        let mut fixture = Fixture::new(true);
        fixture.drivers[queue].add(parts);
        matches!(fixture.ring(), Err(QueueError::BadRequest { .. }))
    };
    assert!(fails(1, &[Part::Writable(4)]));
    assert!(fails(1, &[Part::Readable(&vec![0; (64 << 10) + 1])]));
    assert!(!fails(1, &[Part::Readable(&vec![0; 64 << 10])]));
    assert!(fails(0, &[Part::Readable(b"x")]));
}

proptest! {
    /// However the guest prints and the terminal reads: the same bytes in the same order.
    #[test]
    fn terminal_sees_what_was_printed(
        steps in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..3000), 0usize..5000), 1..40),
    ) {
        let mut fixture = Fixture::new(true);
        let (mut printed, mut seen) = (Vec::new(), Vec::<u8>::new());
        for (bytes, read) in steps {
            fixture.drivers[1].add(&[Part::Readable(&bytes)]);
            printed.extend(bytes);
            fixture.ring().unwrap();
            let _ = fixture.returned(1);
            let mut buffer = vec![0; read];
            let read = fixture.terminal.read(&mut buffer).unwrap_or(0);
            seen.extend(&buffer[..read]);
        }
        while seen.len() < printed.len() {
            let mut buffer = [0; 4096];
            let read = fixture.terminal.read(&mut buffer).unwrap();
            seen.extend(&buffer[..read]);
            fixture.ring().unwrap();
        }
        prop_assert_eq!(seen, printed);
    }
}
