//! Framing of control messages: a little-endian `u32` length, then that many bytes of JSON.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

/// Longest accepted body in bytes. The other side is not trusted, so the length is checked before any allocation.
pub const MAX_BODY_BYTES: u32 = 256 * 1024;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed, or ended inside a frame.
    #[error("the control stream failed")]
    Io(#[from] io::Error),
    /// The length prefix is over [`MAX_BODY_BYTES`].
    #[error("a control frame announces {0} bytes; at most {MAX_BODY_BYTES} are allowed")]
    TooLong(u32),
    /// The body is not the expected message. serde's own words are not passed on: they quote the body, and a guest
    /// could so write to a user's terminal.
    #[error("a control frame is not a known message: its JSON is {problem} at byte {column}")]
    Malformed {
        /// In a word.
        problem: &'static str,
        /// Where in the body, from 1; 0 for all of it.
        column: usize,
    },
}

impl FrameError {
    fn malformed(error: &serde_json::Error) -> Self {
        let problem = match error.classify() {
            serde_json::error::Category::Data => "of another kind",
            serde_json::error::Category::Eof => "cut off",
            serde_json::error::Category::Syntax | serde_json::error::Category::Io => "malformed",
        };
        Self::Malformed { problem, column: error.column() }
    }
}

/// Writes one message.
pub fn write<T: Serialize>(mut to: impl Write, message: &T) -> Result<(), FrameError> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message).map_err(|error| FrameError::malformed(&error))?;
    let body = u32::try_from(frame.len() - 4).unwrap_or(u32::MAX);
    if body > MAX_BODY_BYTES {
        return Err(FrameError::TooLong(body));
    }
    frame[..4].copy_from_slice(&body.to_le_bytes());
    to.write_all(&frame)?;
    Ok(())
}

/// Reads one message from a blocking stream; `None` if the stream ended between frames.
pub fn read<T: DeserializeOwned>(mut from: impl Read) -> Result<Option<T>, FrameError> {
    let mut decoder = Decoder::default();
    loop {
        if let Some(message) = decoder.take()? {
            return Ok(Some(message));
        }
        let mut chunk = vec![0; decoder.missing()];
        match from.read(&mut chunk)? {
            0 if decoder.is_empty() => return Ok(None),
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            count => decoder.push(&chunk[..count]),
        }
    }
}

/// Collects bytes from a non-blocking stream and yields whole messages.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Appends bytes as they come. Callers take messages out with [`Decoder::take`] after every push.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether no byte of a frame has arrived yet.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// How many more bytes the frame under way needs, at least 1, at most [`MAX_BODY_BYTES`].
    fn missing(&self) -> usize {
        let wanted = match self.body_length() {
            Ok(Some(body)) => 4 + body,
            _ => 4,
        };
        wanted.saturating_sub(self.buffer.len()).max(1)
    }

    fn body_length(&self) -> Result<Option<usize>, FrameError> {
        let Some(prefix) = self.buffer.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*prefix);
        if length > MAX_BODY_BYTES {
            return Err(FrameError::TooLong(length));
        }
        Ok(Some(length as usize))
    }

    /// The next whole message, or `None` if more bytes are needed.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some(length) = self.body_length()? else { return Ok(None) };
        let Some(body) = self.buffer.get(4..4 + length) else { return Ok(None) };
        let message = serde_json::from_slice(body).map_err(|error| FrameError::malformed(&error))?;
        self.buffer.drain(..4 + length);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Exit, ExitStatus, FromGuest, ToGuest};

    #[test]
    fn read_of_written_message_returns_it() {
        let sent = FromGuest::Exited(Exit {
            status: ExitStatus::Signal(9),
            oom_killed: true,
            memory_peak_bytes: Some(1 << 20),
        });
        let mut wire = Vec::new();
        write(&mut wire, &sent).unwrap();
        assert_eq!(read::<FromGuest>(wire.as_slice()).unwrap(), Some(sent));
        assert_eq!(read::<FromGuest>([].as_slice()).unwrap(), None);
    }

    #[test]
    fn decoder_fed_byte_by_byte_yields_each_message_once() {
        let mut wire = Vec::new();
        for signo in [1, 15] {
            write(&mut wire, &ToGuest::Signal { signo }).unwrap();
        }
        let mut decoder = Decoder::default();
        let mut seen = Vec::new();
        for byte in wire {
            decoder.push(&[byte]);
            while let Some(ToGuest::Signal { signo }) = decoder.take().unwrap() {
                seen.push(signo);
            }
        }
        assert_eq!(seen, [1, 15]);
        assert!(decoder.is_empty());
    }

    #[test]
    fn read_of_bad_frame_fails_without_allocating_its_length() {
        let huge = u32::MAX.to_le_bytes();
        assert!(matches!(read::<ToGuest>(huge.as_slice()), Err(FrameError::TooLong(_))));
        let torn = [9, 0, 0, 0, b'{'];
        assert!(matches!(read::<ToGuest>(torn.as_slice()), Err(FrameError::Io(_))));
        let nonsense = [2, 0, 0, 0, b'{', b'}'];
        assert!(matches!(read::<ToGuest>(nonsense.as_slice()), Err(FrameError::Malformed { .. })));
    }

    #[test]
    fn error_of_bad_frame_does_not_repeat_the_guests_words() {
        let body = br#"{"type":"\u001b[2Jlook\u0007"}"#;
        let wire = [&(body.len() as u32).to_le_bytes(), body.as_slice()].concat();
        let error = read::<FromGuest>(wire.as_slice()).unwrap_err();
        let text = format!("{error} {:?}", std::error::Error::source(&error));
        assert!(!text.contains("look") && !text.contains('\x1b'), "{text}");
    }
}
