//! Guests of a few instructions that drive devices: code for 32-bit protected mode, put together from stores, waits
//! and an end.

/// Where the code is loaded and starts.
const CODE: u32 = 0x20_0000;
/// Registers of the virtio device `n`.
const fn device(n: u32) -> u32 {
    0xd000_0000 + n * 0x1000
}
/// Queue `n` of device `d`: descriptors, and at fixed distances the two rings.
const fn queue(d: u32, n: u32) -> u32 {
    0x40_0000 + (d * 4 + n) * 0x1_0000
}
const AVAILABLE: u32 = 0x4000;
const USED: u32 = 0x8000;
/// Entries of a queue.
const ENTRIES: u32 = 16;
/// Memory for requests.
const BUFFERS: u32 = 0x80_0000;

/// Descriptor flags (virtio 1.2 §2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Code that is being written.
#[derive(Default)]
pub struct Guest {
    code: Vec<u8>,
    /// Requests so far, by device and queue.
    requests: std::collections::HashMap<(u32, u32), u16>,
}

/// One buffer of a request.
pub struct Buffer {
    address: u32,
    bytes: u32,
    writable: bool,
}

impl Guest {
    /// `mov dword [address], value`
    pub fn store(&mut self, address: u32, value: u32) {
        self.code.extend([0xc7, 0x05]);
        self.code.extend(address.to_le_bytes());
        self.code.extend(value.to_le_bytes());
    }

    /// `mov word [address], value`
    fn store_word(&mut self, address: u32, value: u16) {
        self.code.extend([0x66, 0xc7, 0x05]);
        self.code.extend(address.to_le_bytes());
        self.code.extend(value.to_le_bytes());
    }

    /// `again: cmp word [address], value; jne again`
    fn wait_for_word(&mut self, address: u32, value: u16) {
        self.code.extend([0x66, 0x81, 0x3d]);
        self.code.extend(address.to_le_bytes());
        self.code.extend(value.to_le_bytes());
        self.code.extend([0x75, 0xf5]);
    }

    /// Raw instructions.
    pub fn instructions(&mut self, code: &[u8]) {
        self.code.extend(code);
    }

    /// `mov al, byte; mov dx, port; out dx, al`
    pub fn out(&mut self, port: u16, byte: u8) {
        let [low, high] = port.to_le_bytes();
        self.code.extend([0x66, 0xba, low, high, 0xb0, byte, 0xee]);
    }

    /// Initialises device `d` with so many queues (virtio 1.2 §3.1.1 and §4.2.2).
    pub fn start(&mut self, d: u32, queues: u32) {
        self.start_with(d, queues, 0);
    }

    /// As [`Guest::start`], with these features out of the first 32.
    pub fn start_with(&mut self, d: u32, queues: u32, features: u32) {
        let base = device(d);
        for status in [0, 1, 3] {
            self.store(base + 0x70, status);
        }
        // VIRTIO_F_VERSION_1 is bit 0 of the second word.
        self.store(base + 0x24, 1);
        self.store(base + 0x20, 1);
        self.store(base + 0x24, 0);
        self.store(base + 0x20, features);
        self.store(base + 0x70, 11);
        for n in 0..queues {
            let at = queue(d, n);
            self.store(base + 0x30, n);
            self.store(base + 0x38, ENTRIES);
            self.store(base + 0x80, at);
            self.store(base + 0x90, at + AVAILABLE);
            self.store(base + 0xa0, at + USED);
            self.store(base + 0x44, 1);
        }
        self.store(base + 0x70, 15);
    }

    /// Resets device `d`.
    pub fn reset(&mut self, d: u32) {
        self.store(device(d) + 0x70, 0);
    }

    /// Makes a request available and rings.
    pub fn submit(&mut self, d: u32, n: u32, buffers: &[Buffer]) {
        let at = queue(d, n);
        let request = *self.requests.entry((d, n)).and_modify(|count| *count += 1).or_insert(1);
        // Descriptors are used in turn: at most 5 requests of 3 buffers are on their way.
        let first = (u32::from(request) % 5) * 3;
        for (index, buffer) in (0..).zip(buffers) {
            let descriptor = at + (first + index) * 16;
            let last = index as usize + 1 == buffers.len();
            let flags = if last { 0 } else { NEXT } | if buffer.writable { WRITE } else { 0 };
            self.store(descriptor, buffer.address);
            self.store(descriptor + 4, 0);
            self.store(descriptor + 8, buffer.bytes);
            self.store(descriptor + 12, u32::from(flags) | (first + index + 1) << 16);
        }
        let place = u32::from(request - 1) % ENTRIES;
        self.store_word(at + AVAILABLE + 4 + 2 * place, first as u16);
        self.store_word(at + AVAILABLE + 2, request);
        self.store(device(d) + 0x50, n);
    }

    /// Waits until the device has used all requests of a queue.
    pub fn await_used(&mut self, d: u32, n: u32) {
        let request = self.requests.get(&(d, n)).copied().unwrap_or(0);
        self.wait_for_word(queue(d, n) + USED + 2, request);
    }

    /// A block request of one sector (virtio 1.2 §5.2.6): 0 reads, 1 writes, 4 flushes, 11 discards, 13 makes zeros.
    pub fn block(&mut self, d: u32, kind: u32) {
        let header = BUFFERS;
        [kind, 0, 0, 0].into_iter().zip(0..).for_each(|(word, at)| self.store(header + 4 * at, word));
        let mut buffers = vec![Buffer { address: header, bytes: 16, writable: false }];
        if kind > 4 {
            // The sector's number, how many, no flags.
            let segment = BUFFERS + 0x3000;
            [0, 0, 1, 0].into_iter().zip(0..).for_each(|(word, at)| self.store(segment + 4 * at, word));
            buffers.push(Buffer { address: segment, bytes: 16, writable: false });
        } else if kind != 4 {
            buffers.push(Buffer { address: BUFFERS + 0x1000, bytes: 512, writable: kind == 0 });
        }
        buffers.push(Buffer { address: BUFFERS + 0x2000, bytes: 1, writable: true });
        self.submit(d, 0, &buffers);
        self.await_used(d, 0);
    }

    /// Asks for random bytes.
    pub fn entropy(&mut self, d: u32) {
        self.submit(d, 0, &[Buffer { address: BUFFERS, bytes: 64, writable: true }]);
        self.await_used(d, 0);
    }

    /// Sends a frame of 60 bytes, behind the header that `start_with` has agreed to.
    pub fn send_frame(&mut self, d: u32) {
        self.submit(d, 1, &[Buffer { address: BUFFERS, bytes: 12 + 60, writable: false }]);
        self.await_used(d, 1);
    }

    /// Gives a page back to the host.
    pub fn inflate(&mut self, d: u32) {
        self.store(BUFFERS, (BUFFERS + 0x10_0000) >> 12);
        self.submit(d, 0, &[Buffer { address: BUFFERS, bytes: 4, writable: false }]);
        self.await_used(d, 0);
    }

    /// Asks the file server something that has only a header.
    pub fn ask_file_server(&mut self, d: u32) {
        self.store(BUFFERS, 40);
        let reply = Buffer { address: BUFFERS + 0x1000, bytes: 80, writable: true };
        self.submit(d, 1, &[Buffer { address: BUFFERS, bytes: 40, writable: false }, reply]);
        self.await_used(d, 1);
    }

    /// Prints as many zeros as the console keeps.
    pub fn print_zeros(&mut self, d: u32) {
        self.submit(d, 1, &[Buffer { address: BUFFERS + 0x10_0000, bytes: 1 << 16, writable: false }]);
        self.await_used(d, 1);
    }

    /// Waits for a frame from the network.
    pub fn receive_frame(&mut self, d: u32) {
        self.submit(d, 0, &[Buffer { address: BUFFERS + 0x10_0000, bytes: 2048, writable: true }]);
        self.await_used(d, 0);
    }

    /// Gives the socket device a buffer to receive into.
    pub fn vsock_receive(&mut self, d: u32) {
        self.submit(d, 0, &[Buffer { address: BUFFERS + 0x10_0000, bytes: 4096, writable: true }]);
    }

    /// Sends a packet (virtio 1.2 §5.10.6) on the stream from port 1 to port 7 of the host.
    pub fn vsock_send(&mut self, d: u32, op: u16, flags: u32, bytes: u32) {
        let header = BUFFERS;
        let words = [3, 0, 2, 0, 1, 7, bytes, 1 | u32::from(op) << 16, flags, 1 << 18, 0];
        words.into_iter().zip(0..).for_each(|(word, at)| self.store(header + 4 * at, word));
        let mut buffers = vec![Buffer { address: header, bytes: 44, writable: false }];
        if bytes > 0 {
            buffers.push(Buffer { address: BUFFERS + 0x20_0000, bytes, writable: false });
        }
        self.submit(d, 1, &buffers);
        self.await_used(d, 1);
    }

    /// Ends the machine by the exit port.
    pub fn exit(&mut self, code: u32) {
        self.code.push(0xb8);
        self.code.extend(code.to_le_bytes());
        self.code.extend([0xba, 0xc4, 0x05, 0x00, 0x00, 0xef]);
    }

    /// An ELF file with a PVH note, whose only segment is the code.
    pub fn elf(&self) -> Vec<u8> {
        const HEADER: u64 = 64;
        const PROGRAM_HEADER: u64 = 56;
        let note_at = HEADER + 2 * PROGRAM_HEADER;
        let mut note = Vec::new();
        // Name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY, name, entry point.
        for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), CODE] {
            note.extend(word.to_le_bytes());
        }
        let code_at = note_at + note.len() as u64;
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        file.extend(u64::from(CODE).to_le_bytes());
        file.extend(HEADER.to_le_bytes());
        file.extend([0; 12]);
        for half in [HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        let load = (1u32, code_at, u64::from(CODE), self.code.len() as u64);
        for (kind, offset, address, size) in [load, (4, note_at, 0, note.len() as u64)] {
            file.extend(kind.to_le_bytes());
            file.extend(7u32.to_le_bytes());
            for word in [offset, address, address, size, size, 4] {
                file.extend(word.to_le_bytes());
            }
        }
        file.extend(note);
        file.extend(&self.code);
        file
    }
}
