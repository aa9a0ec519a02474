//! Reading a layer: its encoding, its digests, and a thread that reads, hashes and decompresses ahead.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use bzip2::bufread::MultiBzDecoder;
use flate2::bufread::MultiGzDecoder;
use lzma_rust2::XzReader;

use crate::digest::{Digest, Hasher, HashingReader};
use crate::limits::{MAX_LAYER_BYTES, MAX_XZ_MEMORY_KIB, MAX_ZSTD_WINDOW_LOG};

/// Bytes handed from thread to thread at once.
const PIECE: usize = 1 << 20;
/// Pieces on their way; with those being filled and read, this bounds the memory.
const PIECES: usize = 4;

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    Plain,
    Gzip,
    Zstd,
    /// Archives may be; layers are not (OCI image-spec: layer.md#distributable-format).
    Bzip2,
    /// As bzip2.
    Xz,
}

/// Why a stream cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// It is compressed by a method that OCI does not know.
    #[error("it is compressed with {0}; convert the image to gzip or zstd, for example with `skopeo copy`")]
    Compression(&'static str),
    /// Reading failed.
    #[error("reading it failed")]
    Read(#[from] io::Error),
}

/// Tells the encoding by the first bytes, which are put back in front of the rest.
pub(crate) fn detect<R: Read>(mut source: R) -> Result<(Encoding, impl Read), DecodeError> {
    let mut head = Vec::new();
    source.by_ref().take(6).read_to_end(&mut head)?;
    let encoding = match head.as_slice() {
        [0x1f, 0x8b, ..] => Encoding::Gzip,
        // A frame, or a skippable frame as parallel compressors put first (RFC 8878 §3.1).
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Encoding::Zstd,
        [b'B', b'Z', b'h', ..] => Encoding::Bzip2,
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Encoding::Xz,
        _ => Encoding::Plain,
    };
    Ok((encoding, io::Cursor::new(head).chain(source)))
}

/// Decompresses `source`, all members or frames of it.
pub(crate) fn decompressor<'a, R: BufRead + 'a>(
    encoding: Encoding,
    source: R,
) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match encoding {
        Encoding::Plain => Box::new(source),
        Encoding::Gzip => Box::new(MultiGzDecoder::new(source)),
        Encoding::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
            decoder.window_log_max(MAX_ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
        Encoding::Bzip2 => Box::new(MultiBzDecoder::new(source)),
        Encoding::Xz => Box::new(XzReader::new_mem_limit(source, true, MAX_XZ_MEMORY_KIB)),
    })
}

/// What a stream turned out to be, once read to its end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Digests {
    /// Of the bytes as they came.
    pub(crate) blob: Digest,
    pub(crate) blob_bytes: u64,
    /// Of the tar archive in them.
    pub(crate) diff_id: Digest,
}

/// Reads `source` on a second thread while `consume` takes the decompressed stream on this one. What `consume`
/// leaves is read too, since the digests are of the whole. `seen` is told of the bytes read from the source.
pub(super) fn decode<T, E>(
    source: impl Read + Send,
    seen: impl FnMut(u64) + Send,
    consume: impl FnOnce(&mut LayerStream) -> Result<T, E>,
) -> Result<(T, Digests), E>
where
    E: From<DecodeError>,
{
    let mut seen = seen;
    let (encoding, source) = detect(source)?;
    match encoding {
        Encoding::Bzip2 => return Err(DecodeError::Compression("bzip2").into()),
        Encoding::Xz => return Err(DecodeError::Compression("xz").into()),
        Encoding::Plain | Encoding::Gzip | Encoding::Zstd => {}
    }
    thread::scope(|scope| {
        let (filled, pieces) = sync_channel(PIECES);
        let (recycle, empty) = sync_channel(PIECES + 2);
        let reader = thread::Builder::new()
            .name("layer-reader".to_owned())
            .spawn_scoped(scope, move || {
                let mut source = HashingReader::new(source, &mut seen);
                match read_pieces(encoding, &mut source, &filled, &empty) {
                    Ok(true) => source.finish().map(Some),
                    // Nobody wants the rest, and a download of it could take an hour.
                    Ok(false) => Ok(None),
                    Err(error) => {
                        // The other side may have given up already; then nobody asks.
                        let _ = filled.send(Err(error));
                        Ok(None)
                    }
                }
            })
            .map_err(DecodeError::Read)?;
        // A plain stream's two digests are one, which the reader's thread computes.
        let hasher = (encoding != Encoding::Plain).then(Hasher::default);
        let mut stream =
            LayerStream { pieces, recycle, current: Vec::new(), used: 0, total: 0, hasher, ended: false };
        let consumed = consume(&mut stream)?;
        stream.drain()?;
        let hasher = stream.hasher.take();
        drop(stream);
        let ended = || DecodeError::Read(io::Error::other("the thread that reads the layer has stopped"));
        let (blob, blob_bytes) =
            reader.join().map_err(|_| ended())?.map_err(DecodeError::Read)?.ok_or_else(ended)?;
        let diff_id = hasher.map_or(blob, |hasher| hasher.finish().0);
        Ok((consumed, Digests { blob, blob_bytes, diff_id }))
    })
}

/// Decompresses and sends until the end, an error, or nobody listens; tells whether it came to the end.
fn read_pieces(
    encoding: Encoding,
    source: &mut (impl Read + Send),
    filled: &SyncSender<io::Result<Vec<u8>>>,
    empty: &Receiver<Vec<u8>>,
) -> io::Result<bool> {
    let mut decoder = match encoding {
        // No second buffer for what goes straight through.
        Encoding::Plain => Box::new(source) as Box<dyn Read>,
        _ => decompressor(encoding, BufReader::with_capacity(256 << 10, source))?,
    };
    loop {
        let mut piece = empty.try_recv().unwrap_or_default();
        piece.resize(PIECE, 0);
        let mut length = 0;
        while length < PIECE {
            match decoder.read(piece.get_mut(length..).unwrap_or_default()) {
                Ok(0) => break,
                Ok(count) => length += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // What came before the damage is delivered first, so that the offset in messages is right.
                    piece.truncate(length);
                    let _ = filled.send(Ok(piece));
                    return Err(error);
                }
            }
        }
        piece.truncate(length);
        if filled.send(Ok(piece)).is_err() {
            return Ok(false);
        }
        if length < PIECE {
            return Ok(true);
        }
    }
}

/// The decompressed stream as the converting thread sees it.
pub(super) struct LayerStream {
    pieces: Receiver<io::Result<Vec<u8>>>,
    recycle: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    used: usize,
    total: u64,
    hasher: Option<Hasher>,
    ended: bool,
}

impl LayerStream {
    /// Whether the stream is the archive itself, as it came.
    pub(super) fn is_plain(&self) -> bool {
        self.hasher.is_none()
    }

    /// What the last `fill_buf` gave and was not consumed.
    pub(super) fn unread(&self) -> &[u8] {
        self.current.get(self.used..).unwrap_or_default()
    }

    fn drain(&mut self) -> Result<(), DecodeError> {
        loop {
            let length = self.fill_buf()?.len();
            if length == 0 {
                return Ok(());
            }
            self.consume(length);
        }
    }
}

impl Read for LayerStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for LayerStream {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.used == self.current.len() && !self.ended {
            // Full only if the other side has stopped taking; then the piece is freed instead.
            let _ = self.recycle.try_send(std::mem::take(&mut self.current));
            self.used = 0;
            match self.pieces.recv() {
                Ok(piece) => self.current = piece?,
                Err(_) => self.ended = true,
            }
            self.total += self.current.len() as u64;
            if self.total > MAX_LAYER_BYTES {
                let limit = MAX_LAYER_BYTES >> 30;
                return Err(io::Error::other(format!("the layer unpacks to more than {limit} GiB")));
            }
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&self.current);
            }
        }
        Ok(self.unread())
    }

    fn consume(&mut self, count: usize) {
        self.used = (self.used + count).min(self.current.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_wants_is_not_read() {
        let mut read = 0;
        let source = io::repeat(0).take(64 << 20);
        let failed = decode(source, |bytes| read = bytes, |_| Err::<(), _>(DecodeError::Compression("none")));
        assert!(failed.is_err());
        assert!(read < 16 << 20, "{read} bytes were read for nothing");
    }
}
