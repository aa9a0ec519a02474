//! How a layer's tar archive is put together again, byte for byte, from its EROFS file system.
//!
//! The file system has the content of all files, but not the archive's headers as they were. A recipe has those, and
//! says where in the blob the rest lies. So an archive that came uncompressed need not be kept beside the blob; a
//! recipe has some 60 bytes for each entry.
//!
//! ```text
//! zstd( "cloche recipe 1\n" ( 'L' length:u32 bytes | 'C' offset:u64 length:u64 | 'Z' length:u64 )* )   little-endian
//! ```
//!
//! Recipes are our own files. What is put together is checked against the layer's diffID all the same.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;

use super::decode::LayerStream;
use crate::erofs::Stored;
use crate::tar::Input;

const MAGIC: &[u8; 16] = b"cloche recipe 1\n";
/// Bytes of one literal.
const MAX_LITERAL: usize = 64 << 10;
/// Headers are alike, and every level of zstd finds that.
const LEVEL: i32 = 1;

/// Writes a recipe while a layer is converted.
pub(super) struct Recipe<'a> {
    output: zstd::Encoder<'static, BufWriter<&'a File>>,
    literal: Vec<u8>,
    stored: Option<Stored>,
    /// The first thing that went wrong; told at the end.
    failure: Option<io::Error>,
}

impl<'a> Recipe<'a> {
    pub(super) fn begin(file: &'a File) -> io::Result<Recipe<'a>> {
        let mut output = zstd::Encoder::new(BufWriter::new(file), LEVEL)?;
        output.write_all(MAGIC)?;
        Ok(Recipe { output, literal: Vec::new(), stored: None, failure: None })
    }

    /// These bytes come next in the archive, and are nowhere else.
    fn literal(&mut self, bytes: &[u8]) {
        self.flush_stored();
        self.literal.extend_from_slice(bytes);
        if self.literal.len() >= MAX_LITERAL {
            self.flush_literal();
        }
    }

    /// What comes next in the archive is in the blob.
    pub(super) fn stored(&mut self, next: Stored) {
        self.flush_literal();
        match (&mut self.stored, next) {
            (Some(Stored::Zeros(count)), Stored::Zeros(more)) => *count += more,
            (Some(Stored::At { offset, bytes }), Stored::At { offset: at, bytes: more })
                if *offset + *bytes == at =>
            {
                *bytes += more;
            }
            _ => {
                self.flush_stored();
                self.stored = Some(next);
            }
        }
    }

    fn flush_literal(&mut self) {
        for piece in std::mem::take(&mut self.literal).chunks(MAX_LITERAL) {
            let length = (piece.len() as u32).to_le_bytes();
            self.write(&[b"L", &length[..], piece]);
        }
    }

    fn flush_stored(&mut self) {
        match self.stored.take() {
            Some(Stored::At { offset, bytes }) => {
                self.write(&[b"C", &offset.to_le_bytes(), &bytes.to_le_bytes()]);
            }
            Some(Stored::Zeros(count)) => self.write(&[b"Z", &count.to_le_bytes()]),
            None => {}
        }
    }

    fn write(&mut self, pieces: &[&[u8]]) {
        for piece in pieces {
            if self.failure.is_none() {
                self.failure = self.output.write_all(piece).err();
            }
        }
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        self.flush_literal();
        self.flush_stored();
        match self.failure.take() {
            Some(error) => Err(error),
            None => self.output.finish()?.flush(),
        }
    }
}

/// A layer's stream, of which a recipe is taken.
pub(super) struct Recorded<'s, 'r, 'f> {
    pub(super) stream: &'s mut LayerStream,
    pub(super) recipe: Option<&'r RefCell<Recipe<'f>>>,
}

impl Recorded<'_, '_, '_> {
    /// Reads what is left; it belongs to the archive, too.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        loop {
            let length = self.fill_buf()?.len();
            if length == 0 {
                return Ok(());
            }
            self.consume(length);
        }
    }
}

impl Read for Recorded<'_, '_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Recorded<'_, '_, '_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.stream.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        if let Some(recipe) = self.recipe {
            recipe.borrow_mut().literal(self.stream.unread().get(..count).unwrap_or_default());
        }
        self.stream.consume(count);
    }
}

impl Input for Recorded<'_, '_, '_> {
    fn consume_data(&mut self, count: usize) {
        // The file's data were noted where they were written.
        self.stream.consume(count);
    }
}

/// Puts an archive together again.
pub(crate) struct Rebuilt {
    recipe: BufReader<zstd::Decoder<'static, BufReader<File>>>,
    blob: File,
    now: Now,
}

enum Now {
    Literal(u64),
    At { offset: u64, left: u64 },
    Zeros(u64),
}

impl Rebuilt {
    pub(crate) fn open(recipe: File, blob: File) -> io::Result<Rebuilt> {
        let mut recipe = BufReader::new(zstd::Decoder::new(recipe)?);
        let mut magic = [0; MAGIC.len()];
        recipe.read_exact(&mut magic)?;
        if magic != *MAGIC {
            return Err(io::Error::other("it is no recipe of a version that is known"));
        }
        Ok(Rebuilt { recipe, blob, now: Now::Literal(0) })
    }

    fn number(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.recipe.read_exact(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The next step with bytes in it; `false` at the end.
    fn next(&mut self) -> io::Result<bool> {
        let mut kind = [0];
        if self.recipe.read(&mut kind)? == 0 {
            return Ok(false);
        }
        self.now = match kind {
            [b'L'] => {
                let mut length = [0; 4];
                self.recipe.read_exact(&mut length)?;
                Now::Literal(u32::from_le_bytes(length).into())
            }
            [b'C'] => Now::At { offset: self.number()?, left: self.number()? },
            [b'Z'] => Now::Zeros(self.number()?),
            [other] => return Err(io::Error::other(format!("a recipe has no step {other}"))),
        };
        Ok(true)
    }
}

impl Read for Rebuilt {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let left = match &mut self.now {
                Now::Literal(left) | Now::At { left, .. } | Now::Zeros(left) => *left,
            };
            if left == 0 {
                if !self.next()? {
                    return Ok(0);
                }
                continue;
            }
            let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let piece = buffer.get_mut(..most).unwrap_or_default();
            let count = match &mut self.now {
                Now::Literal(left) => {
                    let count = self.recipe.read(piece)?;
                    *left -= count as u64;
                    count
                }
                Now::At { offset, left } => {
                    let count = self.blob.read_at(piece, *offset)?;
                    *offset += count as u64;
                    *left -= count as u64;
                    count
                }
                Now::Zeros(left) => {
                    piece.fill(0);
                    *left -= most as u64;
                    most
                }
            };
            if count == 0 && most > 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            return Ok(count);
        }
    }
}
