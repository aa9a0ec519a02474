//! SHA-256 digests as OCI writes them (`sha256:` and 64 lower-case hexadecimal digits), and readers that hash
//! what passes through. Other algorithms are refused by name (OCI image-spec: descriptor.md#digests).

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// The SHA-256 digest of a blob.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// Why a string is not a digest this crate can verify.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a digest of the form sha256:<64 lower-case hexadecimal digits>")]
pub struct ParseDigestError(String);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// The digest as raw bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits, without the algorithm.
    pub fn hex(&self) -> String {
        let nibbles = self.0.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        nibbles.filter_map(|nibble| char::from_digit(nibble.into(), 16)).collect()
    }

    /// A UUID made of the digest (RFC 9562 §5.8: version 8, a value of one's own making).
    pub(crate) fn uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.0[..16]);
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        uuid
    }

    /// Parses 64 hexadecimal digits; upper case is refused, since it would give a blob two names.
    pub fn from_hex(hex: &str) -> Option<Digest> {
        let digits = hex.as_bytes();
        if digits.len() != 64 {
            return None;
        }
        let nibble = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            if let [high, low] = pair {
                *byte = nibble(*high)? << 4 | nibble(*low)?;
            }
        }
        Some(Digest(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Digest, ParseDigestError> {
        text.strip_prefix("sha256:")
            .and_then(Digest::from_hex)
            .ok_or_else(|| ParseDigestError(text.chars().take(200).collect()))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Hashes a stream piece by piece and counts its bytes.
#[derive(Default)]
pub(crate) struct Hasher {
    state: Sha256,
    bytes: u64,
}

impl Hasher {
    pub(crate) fn update(&mut self, piece: &[u8]) {
        self.state.update(piece);
        self.bytes += piece.len() as u64;
    }

    /// The digest and the number of bytes that went into it.
    pub(crate) fn finish(self) -> (Digest, u64) {
        (Digest(self.state.finalize().into()), self.bytes)
    }
}

/// A reader that hashes what is read through it, and reports each read's length to `seen`.
pub(crate) struct HashingReader<R, F> {
    inner: R,
    hasher: Hasher,
    seen: F,
}

impl<R: Read, F: FnMut(u64)> HashingReader<R, F> {
    pub(crate) fn new(inner: R, seen: F) -> Self {
        HashingReader { inner, hasher: Hasher::default(), seen }
    }

    /// Reads what is left, then gives the digest and size of all that was read.
    pub(crate) fn finish(mut self) -> io::Result<(Digest, u64)> {
        let mut buffer = vec![0; 128 << 10];
        while self.read(&mut buffer)? > 0 {}
        Ok(self.hasher.finish())
    }
}

impl<R: Read, F: FnMut(u64)> Read for HashingReader<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(buffer.get(..count).unwrap_or_default());
        (self.seen)(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn digest_of_nothing_is_the_known_one() {
        assert_eq!(Digest::of(b"").to_string(), EMPTY);
        assert_eq!(EMPTY.parse::<Digest>().unwrap(), Digest::of(b""));
    }

    #[test]
    fn digest_of_another_form_is_refused() {
        for bad in ["", "sha256:", &EMPTY[7..], &EMPTY.to_uppercase(), "sha512:00", &format!("{EMPTY}0")] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn hashing_reader_left_early_finish_hashes_the_rest() {
        let mut seen = 0;
        let mut reader = HashingReader::new(&b"some bytes"[..], |count| seen += count);
        reader.read_exact(&mut [0; 4]).unwrap();
        assert_eq!(reader.finish().unwrap(), (Digest::of(b"some bytes"), 10));
        assert_eq!(seen, 10);
    }
}
