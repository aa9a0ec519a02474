//! The VMM's own I/O ports: marks in a guest's start, and the way out (`cloche_protocol::machine::io_port`).

use cloche_protocol::machine::{GuestMark, io_port};

/// What a guest's write to one of these ports asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Stamp the clock.
    Mark(GuestMark),
    /// End the machine with this code.
    Exit(u32),
}

/// What a write means; `None` if the port is another's or the value is nothing that was agreed on.
pub fn decode(port: u16, data: &[u8]) -> Option<Request> {
    match (port, data) {
        (io_port::MARK, [mark]) => GuestMark::from_byte(*mark).map(Request::Mark),
        (io_port::EXIT, data) => data.try_into().ok().map(u32::from_le_bytes).map(Request::Exit),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_of_agreed_writes_yields_requests() {
        assert_eq!(decode(0x5c0, &[1]), Some(Request::Mark(GuestMark::Init)));
        assert_eq!(decode(0x5c4, &[1, 2, 0, 0]), Some(Request::Exit(0x201)));
    }

    #[test]
    fn decode_of_anything_else_is_none() {
        for (port, data) in [(0x5c0, &[99][..]), (0x5c0, &[1, 1]), (0x5c4, &[1]), (0x5c1, &[1]), (0x5c4, &[])]
        {
            assert_eq!(decode(port, data), None, "{port:#x} {data:?}");
        }
    }
}
