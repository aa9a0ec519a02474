//! A guest's program, built from steps that are a few instructions each: memory, device registers, I/O ports, loops,
//! waits with a deadline, and checks that end the guest with the number of the step that failed.
//!
//! It runs in 64-bit mode with the low 4 GiB mapped onto themselves, which is how the 64-bit entry of a bzImage is
//! called. No stack, no interrupts; `rax`, `rcx`, `rdx`, `rsi`, `rdi` and `r8` are each step's own, `r12`–`r14` count
//! loops.

/// Where a bzImage's protected-mode part is loaded, and where its 64-bit entry is.
const LOADED_AT: u64 = 0x10_0000;
const ENTRY_OFFSET: usize = 0x200;

/// I/O port that ends the machine with a code of 32 bits.
pub const EXIT_PORT: u16 = 0x5c4;
/// Exit code of a step that failed: this plus its number.
pub const FAILED_STEP: u32 = 0x1000;

/// Cycles of the time stamp counter that a guest waits at most: some ten seconds.
const PATIENCE: u64 = 30_000_000_000;

/// Width of an access in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    One,
    Two,
    Four,
    Eight,
}

impl Width {
    pub const ALL: [Self; 4] = [Self::One, Self::Two, Self::Four, Self::Eight];

    fn prefix(self) -> &'static [u8] {
        match self {
            Self::One | Self::Four => &[],
            Self::Two => &[0x66],
            Self::Eight => &[0x48],
        }
    }

    fn mask(self) -> u64 {
        match self {
            Self::One => 0xff,
            Self::Two => 0xffff,
            Self::Four => 0xffff_ffff,
            Self::Eight => u64::MAX,
        }
    }
}

/// The program so far.
#[derive(Default)]
pub struct Program {
    code: Vec<u8>,
    /// What each numbered step was to show.
    steps: Vec<String>,
    /// Where the loops start that have not ended.
    loops: Vec<usize>,
}

impl Program {
    fn emit(&mut self, bytes: &[u8]) -> &mut Self {
        self.code.extend(bytes);
        self
    }

    fn accumulator(&mut self, value: u64) -> &mut Self {
        self.emit(&[0x48, 0xb8]).emit(&value.to_le_bytes())
    }

    /// Writes to memory or to a device's register.
    pub fn store(&mut self, width: Width, address: u64, value: u64) {
        self.accumulator(value);
        let opcode = if width == Width::One { 0xa2 } else { 0xa3 };
        self.emit(width.prefix()).emit(&[opcode]).emit(&address.to_le_bytes());
    }

    /// Reads into `rax`, zero-extended.
    pub fn load(&mut self, width: Width, address: u64) {
        let opcode = if width == Width::One { 0xa0 } else { 0xa1 };
        self.emit(&[0x31, 0xc0]).emit(width.prefix()).emit(&[opcode]).emit(&address.to_le_bytes());
    }

    pub fn store32(&mut self, address: u64, value: u32) {
        self.store(Width::Four, address, value.into());
    }

    pub fn store16(&mut self, address: u64, value: u16) {
        self.store(Width::Two, address, value.into());
    }

    pub fn store64(&mut self, address: u64, value: u64) {
        self.store(Width::Eight, address, value);
    }

    /// Writes bytes to memory; the last ones are padded with zeros to a multiple of eight.
    pub fn store_bytes(&mut self, address: u64, bytes: &[u8]) {
        for (at, part) in (address..).step_by(8).zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.store64(at, u64::from_le_bytes(word));
        }
    }

    /// `add word [address], 1`; below 2 GiB.
    pub fn increment16(&mut self, address: u64) {
        self.emit(&[0x66, 0x83, 0x04, 0x25]).emit(&(address as u32).to_le_bytes()).emit(&[1]);
    }

    /// Writes `value` to a table of 16-bit entries, to the entry whose number is the 16-bit word at `index` modulo
    /// `size`.
    pub fn store16_indexed(&mut self, table: u64, index: u64, size: u16, value: u16) {
        self.load(Width::Two, index);
        // and eax, size - 1; mov word [table + rax * 2], value
        self.emit(&[0x25]).emit(&u32::from(size - 1).to_le_bytes());
        self.emit(&[0x66, 0xc7, 0x04, 0x45]).emit(&(table as u32).to_le_bytes()).emit(&value.to_le_bytes());
    }

    pub fn port_out(&mut self, width: Width, port: u16, value: u32) {
        self.accumulator(value.into()).port(port);
        match width {
            Width::One => self.emit(&[0xee]),
            Width::Two => self.emit(&[0x66, 0xef]),
            _ => self.emit(&[0xef]),
        };
    }

    pub fn port_in(&mut self, width: Width, port: u16) {
        self.port(port);
        match width {
            Width::One => self.emit(&[0xec]),
            Width::Two => self.emit(&[0x66, 0xed]),
            _ => self.emit(&[0xed]),
        };
    }

    /// Writes to and reads from all ports from `first` to `last`, in this width; `value` is what is written.
    pub fn sweep_ports(&mut self, width: Width, first: u16, last: u16, value: u32) {
        self.port(first);
        let again = self.code.len();
        self.accumulator(value.into());
        let (out, read): (&[u8], &[u8]) = match width {
            Width::One => (&[0xee], &[0xec]),
            Width::Two => (&[0x66, 0xef], &[0x66, 0xed]),
            _ => (&[0xef], &[0xed]),
        };
        // out; in; inc edx; cmp edx, last; jbe again
        self.emit(out).emit(read).emit(&[0xff, 0xc2, 0x81, 0xfa]).emit(&u32::from(last).to_le_bytes());
        self.jump_back(&[0x0f, 0x86], again);
    }

    /// `rep outs` of `count` units from memory to a port.
    pub fn port_out_string(&mut self, width: Width, port: u16, from: u64, count: u32) {
        // mov rsi, from; mov ecx, count
        self.emit(&[0x48, 0xbe]).emit(&from.to_le_bytes()).emit(&[0xb9]).emit(&count.to_le_bytes());
        self.port(port);
        match width {
            Width::One => self.emit(&[0xf3, 0x6e]),
            Width::Two => self.emit(&[0x66, 0xf3, 0x6f]),
            _ => self.emit(&[0xf3, 0x6f]),
        };
    }

    /// `rep ins` of `count` units from a port to memory.
    pub fn port_in_string(&mut self, width: Width, port: u16, to: u64, count: u32) {
        // mov rdi, to; mov ecx, count
        self.emit(&[0x48, 0xbf]).emit(&to.to_le_bytes()).emit(&[0xb9]).emit(&count.to_le_bytes());
        self.port(port);
        match width {
            Width::One => self.emit(&[0xf3, 0x6c]),
            Width::Two => self.emit(&[0x66, 0xf3, 0x6d]),
            _ => self.emit(&[0xf3, 0x6d]),
        };
    }

    fn port(&mut self, port: u16) -> &mut Self {
        self.emit(&[0xba]).emit(&u32::from(port).to_le_bytes())
    }

    /// What comes now is done so many times, up to [`Program::end_loop`]; at most three deep.
    pub fn start_loop(&mut self, times: u32) {
        let register = self.loops.len() as u8;
        assert!(register < 3, "loops are nested too deep");
        // mov r12d.., times
        self.emit(&[0x41, 0xbc + register]).emit(&times.to_le_bytes());
        self.loops.push(self.code.len());
    }

    /// Ends the innermost loop.
    pub fn end_loop(&mut self) {
        let again = self.loops.pop().expect("a loop has started");
        // dec r12d..; jnz again
        self.emit(&[0x41, 0xff, 0xcc + self.loops.len() as u8]);
        self.jump_back(&[0x0f, 0x85], again);
    }

    fn jump_back(&mut self, opcode: &[u8], to: usize) {
        self.emit(opcode);
        let distance = to as i32 - (self.code.len() as i32 + 4);
        self.emit(&distance.to_le_bytes());
    }

    /// Ends the guest unless `rax` is (or is not) `value`.
    fn check(&mut self, value: u64, equal: bool, what: String) {
        // mov rcx, value; cmp rax, rcx; je/jne over the end
        self.emit(&[0x48, 0xb9]).emit(&value.to_le_bytes()).emit(&[0x48, 0x39, 0xc8]);
        let end = self.end_of_step(what);
        self.emit(&[if equal { 0x74 } else { 0x75 }, end.len() as u8]).emit(&end);
    }

    fn end_of_step(&mut self, what: String) -> Vec<u8> {
        let code = FAILED_STEP + self.steps.len() as u32;
        self.steps.push(what);
        exit(code)
    }

    /// What is at `address` must be `value`.
    pub fn expect(&mut self, width: Width, address: u64, value: u64, what: &str) {
        self.load(width, address);
        self.check(value & width.mask(), true, format!("{what}: {address:#x} is not {value:#x}"));
    }

    /// What is at `address` must not be `value`.
    pub fn expect_not(&mut self, width: Width, address: u64, value: u64, what: &str) {
        self.load(width, address);
        self.check(value & width.mask(), false, format!("{what}: {address:#x} is {value:#x}"));
    }

    /// Waits until the bits `mask` at `address` are set.
    pub fn wait_for_bits(&mut self, address: u64, mask: u32, what: &str) {
        self.wait(format!("{what}: bits {mask:#x} at {address:#x} did not come"), |program| {
            program.load(Width::Four, address);
            // and eax, mask; cmp eax, mask
            program.emit(&[0x25]).emit(&mask.to_le_bytes()).emit(&[0x3d]).emit(&mask.to_le_bytes());
        });
    }

    /// Waits until two 16-bit words in memory are equal.
    pub fn wait_for_equal16(&mut self, one: u64, other: u64, what: &str) {
        self.wait(format!("{what}: {one:#x} and {other:#x} did not become equal"), |program| {
            program.load(Width::Two, one);
            // cmp ax, [other]
            program.emit(&[0x66, 0x3b, 0x04, 0x25]).emit(&(other as u32).to_le_bytes());
        });
    }

    /// Waits until a 32-bit word is `value`.
    pub fn wait_for_value(&mut self, address: u64, value: u32, what: &str) {
        self.wait(format!("{what}: {address:#x} did not become {value:#x}"), |program| {
            program.load(Width::Four, address);
            program.emit(&[0x3d]).emit(&value.to_le_bytes());
        });
    }

    /// Repeats `compare` until it leaves the zero flag set, or ends the guest.
    fn wait(&mut self, what: String, compare: impl FnOnce(&mut Self)) {
        const READ_TIME: &[u8] = &[0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0];
        // r8 = now + PATIENCE
        self.emit(READ_TIME).emit(&[0x49, 0x89, 0xc0, 0x48, 0xb9]).emit(&PATIENCE.to_le_bytes());
        self.emit(&[0x49, 0x01, 0xc8]);
        let again = self.code.len();
        compare(self);
        let end = self.end_of_step(what);
        // je over the rest: 9 + 3 + 6 bytes and the end
        self.emit(&[0x74, 18 + end.len() as u8]).emit(READ_TIME);
        // cmp rax, r8; jb again
        self.emit(&[0x4c, 0x39, 0xc0]);
        self.jump_back(&[0x0f, 0x82], again);
        self.emit(&end);
    }

    /// An exception without a handler, and no table of handlers: a triple fault.
    pub fn triple_fault(&mut self) {
        // lidt [0x7f00], where there are only zeros; ud2
        self.emit(&[0x0f, 0x01, 0x1c, 0x25, 0x00, 0x7f, 0x00, 0x00, 0x0f, 0x0b]);
    }

    /// Ends the guest with this code.
    pub fn exit(&mut self, code: u32) {
        self.emit(&exit(code));
    }

    /// What the step with this exit code was to show.
    pub fn step(&self, code: u32) -> Option<&str> {
        self.steps.get(code.checked_sub(FAILED_STEP)? as usize).map(String::as_str)
    }

    /// The program as a bzImage: boot sector, one setup sector with a 64-bit entry, code.
    pub fn image(&self) -> Vec<u8> {
        let mut file = vec![0; 0x400];
        let fields: [(usize, &[u8]); 9] = [
            (0x1f1, &[1]),
            (0x1fe, &[0x55, 0xaa]),
            (0x202, b"HdrS"),
            (0x206, &0x020f_u16.to_le_bytes()),
            (0x211, &[1]),
            (0x214, &(LOADED_AT as u32).to_le_bytes()),
            (0x236, &[1]),
            (0x258, &LOADED_AT.to_le_bytes()),
            (0x260, &0x10_0000_u32.to_le_bytes()),
        ];
        for (at, bytes) in fields {
            file[at..at + bytes.len()].copy_from_slice(bytes);
        }
        file.resize(0x400 + ENTRY_OFFSET, 0);
        file.extend(&self.code);
        file
    }
}

/// `mov eax, code; mov edx, EXIT_PORT; out dx, eax; hlt`, since it takes a moment.
fn exit(code: u32) -> Vec<u8> {
    let mut end = vec![0xb8];
    end.extend(code.to_le_bytes());
    end.push(0xba);
    end.extend(u32::from(EXIT_PORT).to_le_bytes());
    end.extend([0xef, 0xf4, 0xeb, 0xfd]);
    end
}
