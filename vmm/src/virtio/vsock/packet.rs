//! The packet header (virtio 1.2 §5.10.6).

/// Bytes of a header on the wire.
pub const HEADER_BYTES: usize = 44;
/// The only type of socket that is offered.
pub const TYPE_STREAM: u16 = 1;

/// Operations.
pub mod op {
    /// Open a stream.
    pub const REQUEST: u16 = 1;
    /// It is open.
    pub const RESPONSE: u16 = 2;
    /// It is no more, or never was.
    pub const RESET: u16 = 3;
    /// One side ends one or both directions.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const DATA: u16 = 5;
    /// The credit fields are news.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Please send a credit update.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`].
pub mod shutdown {
    /// The sender will not receive any more.
    pub const RECEIVE: u32 = 1;
    /// The sender will not send any more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// A packet without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// [`TYPE_STREAM`].
    pub socket_type: u16,
    /// One of [`op`].
    pub op: u16,
    /// Meaning depends on `op`.
    pub flags: u32,
    /// Bytes that the sender can buffer.
    pub buf_alloc: u32,
    /// Bytes that the sender has passed on, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// From the wire.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(next(&mut rest)),
            dst_cid: u64::from_le_bytes(next(&mut rest)),
            src_port: u32::from_le_bytes(next(&mut rest)),
            dst_port: u32::from_le_bytes(next(&mut rest)),
            len: u32::from_le_bytes(next(&mut rest)),
            socket_type: u16::from_le_bytes(next(&mut rest)),
            op: u16::from_le_bytes(next(&mut rest)),
            flags: u32::from_le_bytes(next(&mut rest)),
            buf_alloc: u32::from_le_bytes(next(&mut rest)),
            fwd_cnt: u32::from_le_bytes(next(&mut rest)),
        }
    }

    /// To the wire.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.socket_type.to_le_bytes());
        put(&mut rest, self.op.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// Writes the next field, for which a header of the right size has room.
fn put<const N: usize>(rest: &mut &mut [u8], field: [u8; N]) {
    if let Some((place, after)) = std::mem::take(rest).split_first_chunk_mut::<N>() {
        *place = field;
        *rest = after;
    }
}

/// The next field; zero past the end, which a header of the right size does not reach.
fn next<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((field, after)) = rest.split_first_chunk::<N>() else { return [0; N] };
    *rest = after;
    *field
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_decoded_from_its_encoding_is_the_same() {
        let header = Header {
            src_cid: 1 << 40,
            dst_cid: 2,
            src_port: 3,
            dst_port: 4,
            len: 5,
            socket_type: 6,
            op: 7,
            flags: 8,
            buf_alloc: 9,
            fwd_cnt: 10,
        };
        let bytes = header.encode();
        assert_eq!(bytes[24..28], [5, 0, 0, 0]);
        assert_eq!(bytes[30..32], [7, 0]);
        assert_eq!(Header::decode(&bytes), header);
    }
}
