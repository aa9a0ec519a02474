//! Walks an archive: special headers are folded into the entry they precede, data come out as borrowed slices.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek};

use super::header::{BLOCK, Format, Header, old_gnu_continuation};
use super::pax::{self, PaxRecords};
use super::{Entry, EntryKind, Extent, TarError, TarProblem, Timestamp, shown, sparse};
use crate::limits::{MAX_EXTENDED_HEADER_BYTES, MAX_FILE_BYTES, MAX_HEADERS_PER_ENTRY, MAX_SPARSE_EXTENTS};

/// Where an archive is read from.
pub(crate) trait Input: BufRead {
    /// Passes over up to `count` bytes, fewer only at the end of the input, and returns how many.
    fn skip(&mut self, count: u64) -> io::Result<u64> {
        let mut skipped = 0;
        while skipped < count {
            let available = self.fill_buf()?.len();
            if available == 0 {
                break;
            }
            let step = available.min(usize::try_from(count - skipped).unwrap_or(usize::MAX));
            self.consume(step);
            skipped += step as u64;
        }
        Ok(skipped)
    }

    /// As `consume`, for what was given out as a file's data.
    fn consume_data(&mut self, count: usize) {
        self.consume(count);
    }
}

impl<T: Input> Input for &mut T {
    fn skip(&mut self, count: u64) -> io::Result<u64> {
        (**self).skip(count)
    }

    fn consume_data(&mut self, count: usize) {
        (**self).consume_data(count);
    }
}

/// A regular file passes over data without reading them.
impl Input for BufReader<File> {
    fn skip(&mut self, count: u64) -> io::Result<u64> {
        let position = self.stream_position()?;
        let left = self.get_ref().metadata()?.len().saturating_sub(position);
        let step = count.min(left);
        self.seek_relative(i64::try_from(step).map_err(io::Error::other)?)?;
        Ok(step)
    }
}

/// A piece of an archive that is in memory.
impl Input for io::Cursor<Vec<u8>> {}

#[cfg(test)]
impl Input for &[u8] {}

/// The parser. After [`TarReader::next`] has given an entry, [`TarReader::copy_data`] gives its stored data; what is
/// not asked for is passed over.
pub(crate) struct TarReader<R> {
    input: R,
    /// Bytes consumed.
    position: u64,
    /// Start of the current entry's first header.
    entry_start: u64,
    entry_name: Option<String>,
    /// Stored bytes of the current entry that were not given out yet.
    remaining: u64,
    /// Bytes between the end of the stored data and the next block boundary.
    padding: u64,
}

impl<R: Input> TarReader<R> {
    pub(crate) fn new(input: R) -> Self {
        TarReader { input, position: 0, entry_start: 0, entry_name: None, remaining: 0, padding: 0 }
    }

    /// Where the next unread byte lies; right after `next`, that is where the entry's stored data start.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// The next entry, or `None` at the archive's end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        self.finish_entry().map_err(|problem| self.locate(problem))?;
        self.entry_start = self.position;
        self.entry_name = None;
        self.read_entry().map_err(|problem| self.locate(problem))
    }

    /// Gives the next `length` bytes of the current entry's stored data to `sink`, piece by piece, or what is left.
    pub(crate) fn copy_data<E: From<TarError>>(
        &mut self,
        length: u64,
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        const WHAT: &str = "a file's data";
        let mut left = length.min(self.remaining);
        while left > 0 {
            let (step, taken) = match self.input.fill_buf() {
                Ok([]) => {
                    return Err(self.locate(TarProblem::Torn { end: self.position, what: WHAT }).into());
                }
                Ok(buffer) => {
                    let step = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    (step, sink(buffer.get(..step).unwrap_or_default()))
                }
                Err(source) => return Err(self.locate(self.read_problem(source, WHAT)).into()),
            };
            self.input.consume_data(step);
            self.position += step as u64;
            self.remaining -= step as u64;
            left -= step as u64;
            taken?;
        }
        Ok(())
    }

    fn locate(&self, problem: TarProblem) -> TarError {
        TarError { offset: self.entry_start, entry: self.entry_name.clone(), problem }
    }

    fn read_problem(&self, source: io::Error, what: &'static str) -> TarProblem {
        match source.kind() {
            // Decompressors say so when their stream is cut.
            io::ErrorKind::UnexpectedEof => TarProblem::Torn { end: self.position, what },
            _ => TarProblem::Read { at: self.position, source },
        }
    }

    /// Passes over what is left of the current entry.
    fn finish_entry(&mut self) -> Result<(), TarProblem> {
        let count = self.remaining + self.padding;
        let skipped = self.input.skip(count).map_err(|source| self.read_problem(source, "a file's data"))?;
        self.position += skipped;
        if skipped < count {
            return Err(TarProblem::Torn { end: self.position, what: "a file's data" });
        }
        self.remaining = 0;
        self.padding = 0;
        Ok(())
    }

    /// Fills `buffer`; `false` if the input ended right before it.
    fn read_exact(&mut self, mut buffer: &mut [u8], what: &'static str) -> Result<bool, TarProblem> {
        let start = self.position;
        while !buffer.is_empty() {
            let step = match self.input.read(buffer) {
                Ok(0) if self.position == start => return Ok(false),
                Ok(0) => return Err(TarProblem::Torn { end: self.position, what }),
                Ok(step) => step,
                Err(source) if source.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(self.read_problem(source, what)),
            };
            self.position += step as u64;
            buffer = buffer.get_mut(step..).unwrap_or_default();
        }
        Ok(true)
    }

    fn read_block(&mut self, what: &'static str) -> Result<Option<[u8; BLOCK]>, TarProblem> {
        let mut block = [0; BLOCK];
        Ok(self.read_exact(&mut block, what)?.then_some(block))
    }

    /// The next header block; `None` at the end, which is two zero blocks, or one, or none: all occur.
    fn read_header(&mut self) -> Result<Option<Header>, TarProblem> {
        let Some(block) = self.read_block("a header")? else { return Ok(None) };
        let header = Header::new(block);
        if header.is_zero() {
            return match self.read_block("a header")? {
                Some(block) if !Header::new(block).is_zero() => Err(TarProblem::Checksum),
                _ => Ok(None),
            };
        }
        if header.checksum_matches() { Ok(Some(header)) } else { Err(TarProblem::Checksum) }
    }

    /// The content of a special header, whose size is bounded before anything is allocated.
    fn read_special(&mut self, header: &Header) -> Result<Vec<u8>, TarProblem> {
        let size = header.size()?;
        if size > MAX_EXTENDED_HEADER_BYTES {
            return Err(TarProblem::HeaderTooLarge { bytes: size, limit: MAX_EXTENDED_HEADER_BYTES });
        }
        let mut content = vec![0; usize::try_from(size).unwrap_or_default()];
        if !content.is_empty() && !self.read_exact(&mut content, "a special header")? {
            return Err(TarProblem::Torn { end: self.position, what: "a special header" });
        }
        self.padding = padding(size);
        self.finish_entry()?;
        Ok(content)
    }

    fn read_entry(&mut self) -> Result<Option<Entry>, TarProblem> {
        let mut pax = PaxRecords::default();
        let (mut long_name, mut long_target) = (None, None);
        for count in 0.. {
            if count > MAX_HEADERS_PER_ENTRY {
                return Err(TarProblem::TooManyHeaders(MAX_HEADERS_PER_ENTRY));
            }
            let Some(header) = self.read_header()? else {
                return if count == 0 {
                    Ok(None)
                } else {
                    Err(TarProblem::Torn { end: self.position, what: "the headers of an entry" })
                };
            };
            match header.kind() {
                b'x' => {
                    let block = self.read_special(&header)?;
                    pax.parse(&block)?;
                }
                // OCI tools read over global headers, so one that changes entries would change what the image is.
                b'g' => {
                    let block = self.read_special(&header)?;
                    if !pax::is_comment_only(&block)? {
                        return Err(TarProblem::Unsupported(
                            "a global pax header that changes entries".to_owned(),
                        ));
                    }
                }
                b'L' => long_name = Some(gnu_long(self.read_special(&header)?)),
                b'K' => long_target = Some(gnu_long(self.read_special(&header)?)),
                _ => {
                    let path = long_name.unwrap_or_else(|| header.path());
                    let target = long_target.unwrap_or_else(|| header.link_target());
                    return self.build_entry(&header, pax, path, target).map(Some);
                }
            }
        }
        Ok(None)
    }

    fn build_entry(
        &mut self,
        header: &Header,
        mut pax: PaxRecords,
        path: Vec<u8>,
        target: Vec<u8>,
    ) -> Result<Entry, TarProblem> {
        let path = pax.sparse.name.take().or(pax.path.take()).unwrap_or(path);
        self.entry_name = Some(shown(&path));
        if path.is_empty() {
            return Err(TarProblem::NoName);
        }
        let target = pax.link_target.take().unwrap_or(target);
        let mode = header.mode()? & 0o7777;
        let (uid, gid) =
            (pax.uid.map_or_else(|| header.uid(), Ok)?, pax.gid.map_or_else(|| header.gid(), Ok)?);
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            None => Timestamp { seconds: header.mtime()?, nanoseconds: 0 },
        };
        let kind = self.entry_kind(header, &mut pax, &path, target)?;
        Ok(Entry {
            path,
            // The mask above leaves 12 bits.
            mode: u16::try_from(mode).unwrap_or_default(),
            uid: owner(uid, "uid")?,
            gid: owner(gid, "gid")?,
            mtime,
            xattrs: pax.xattrs,
            kind,
        })
    }

    /// The kind of the entry; for a regular file, this also arms `remaining` and `padding` for its data. Other
    /// kinds have no data whatever their size field says.
    fn entry_kind(
        &mut self,
        header: &Header,
        pax: &mut PaxRecords,
        path: &[u8],
        target: Vec<u8>,
    ) -> Result<EntryKind, TarProblem> {
        Ok(match header.kind() {
            // Before ustar, a directory was a file with a slash.
            b'\0' if path.ends_with(b"/") => EntryKind::Directory,
            b'\0' | b'0' | b'7' => self.regular_file(header, pax)?,
            b'S' if header.format() == Format::Gnu => self.old_gnu_sparse_file(header, pax)?,
            b'1' => EntryKind::HardLink { target },
            b'2' => EntryKind::Symlink { target },
            b'3' => {
                let (major, minor) = header.device()?;
                EntryKind::CharDevice { major, minor }
            }
            b'4' => {
                let (major, minor) = header.device()?;
                EntryKind::BlockDevice { major, minor }
            }
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => {
                return Err(TarProblem::Unsupported(format!("an entry of type {:?}", char::from(other))));
            }
        })
    }

    fn arm_data(&mut self, stored: u64) -> Result<(), TarProblem> {
        if stored > MAX_FILE_BYTES {
            return Err(TarProblem::FileTooLarge { size: stored, limit: MAX_FILE_BYTES });
        }
        self.remaining = stored;
        self.padding = padding(stored);
        Ok(())
    }

    fn regular_file(&mut self, header: &Header, pax: &mut PaxRecords) -> Result<EntryKind, TarProblem> {
        let stored = pax.size.map_or_else(|| header.size(), Ok)?;
        self.arm_data(stored)?;
        let sparse = std::mem::take(&mut pax.sparse);
        let extents = match (sparse.version.0.as_deref(), sparse.version.1.as_deref()) {
            (Some(b"1"), Some(b"0")) => self.read_sparse_map()?,
            // 0.0 and 0.1 may go without saying.
            (Some(b"0"), Some(b"0" | b"1")) | (None, None) => match sparse.map {
                Some(map) => map,
                None => return Ok(EntryKind::File { size: stored, extents: None }),
            },
            _ => {
                return Err(TarProblem::Unsupported(
                    "a GNU sparse format other than 0.0, 0.1 and 1.0".into(),
                ));
            }
        };
        let size = sparse.real_size.ok_or(TarProblem::SparseMap)?;
        self.sparse_file(size, extents)
    }

    fn old_gnu_sparse_file(
        &mut self,
        header: &Header,
        pax: &mut PaxRecords,
    ) -> Result<EntryKind, TarProblem> {
        let (mut extents, mut more, size) = header.old_gnu_sparse()?;
        while more {
            if extents.len() > MAX_SPARSE_EXTENTS {
                return Err(TarProblem::SparseTooLong(MAX_SPARSE_EXTENTS));
            }
            let what = "a sparse map";
            let block = self.read_block(what)?.ok_or(TarProblem::Torn { end: self.position, what })?;
            let (further, again) = old_gnu_continuation(&block)?;
            extents.extend(further);
            more = again;
        }
        let stored = pax.size.map_or_else(|| header.size(), Ok)?;
        self.arm_data(stored)?;
        self.sparse_file(size, extents)
    }

    fn sparse_file(&mut self, size: u64, extents: Vec<Extent>) -> Result<EntryKind, TarProblem> {
        if size > MAX_FILE_BYTES {
            return Err(TarProblem::FileTooLarge { size, limit: MAX_FILE_BYTES });
        }
        sparse::check(&extents, size, self.remaining)?;
        Ok(EntryKind::File { size, extents: Some(extents) })
    }

    /// The map of format 1.0, which stands at the head of the data: a count, then an offset and a length for each
    /// extent, each number on its own line, and zeros up to the block's end.
    fn read_sparse_map(&mut self) -> Result<Vec<Extent>, TarProblem> {
        let mut lines = SparseLines { reader: self, block: [0; BLOCK], used: BLOCK };
        let count = lines.next_number()?;
        let count = usize::try_from(count)
            .ok()
            .filter(|count| *count <= MAX_SPARSE_EXTENTS)
            .ok_or(TarProblem::SparseTooLong(MAX_SPARSE_EXTENTS))?;
        let mut extents = Vec::new();
        for _ in 0..count {
            extents.push(Extent { offset: lines.next_number()?, length: lines.next_number()? });
        }
        Ok(extents)
    }
}

/// The numbers of a format 1.0 map, read block by block from the entry's data.
struct SparseLines<'a, R> {
    reader: &'a mut TarReader<R>,
    block: [u8; BLOCK],
    used: usize,
}

impl<R: Input> SparseLines<'_, R> {
    fn next_number(&mut self) -> Result<u64, TarProblem> {
        let mut digits = Vec::new();
        loop {
            match self.next_byte()? {
                b'\n' => return pax::decimal(&digits).ok_or(TarProblem::SparseMap),
                // 20 digits hold any 64-bit number.
                digit if digits.len() < 20 => digits.push(digit),
                _ => return Err(TarProblem::SparseMap),
            }
        }
    }

    fn next_byte(&mut self) -> Result<u8, TarProblem> {
        if self.used == BLOCK {
            let reader = &mut *self.reader;
            reader.remaining = reader.remaining.checked_sub(BLOCK as u64).ok_or(TarProblem::SparseMap)?;
            let what = "a sparse map";
            self.block = reader.read_block(what)?.ok_or(TarProblem::Torn { end: reader.position, what })?;
            self.used = 0;
        }
        let byte = self.block.get(self.used).copied();
        self.used += 1;
        byte.ok_or(TarProblem::SparseMap)
    }
}

/// GNU long names end with a NUL.
fn gnu_long(mut content: Vec<u8>) -> Vec<u8> {
    if let Some(end) = content.iter().position(|&byte| byte == 0) {
        content.truncate(end);
    }
    content
}

fn padding(size: u64) -> u64 {
    size.next_multiple_of(BLOCK as u64) - size
}

/// An owner; the top value means "none" to the kernel and cannot be stored.
fn owner(value: i64, field: &'static str) -> Result<u32, TarProblem> {
    match u32::try_from(value) {
        Ok(u32::MAX) | Err(_) => Err(TarProblem::Number { field }),
        Ok(value) => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tarball::{Item, Tarball};
    use super::*;

    /// All entries with their stored data.
    fn read(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
        let mut reader = TarReader::new(archive);
        let mut entries = Vec::new();
        while let Some(entry) = reader.next()? {
            let mut data = Vec::new();
            reader.copy_data(u64::MAX, |piece| {
                data.extend_from_slice(piece);
                Ok::<_, TarError>(())
            })?;
            entries.push((entry, data));
        }
        Ok(entries)
    }

    fn problem(archive: &[u8]) -> TarProblem {
        read(archive).unwrap_err().problem
    }

    #[test]
    fn entries_of_all_kinds_come_with_what_pax_says() {
        let long = "long/".repeat(40) + "name";
        let items = [
            Item::file(&long, "data").owner(4_000_000_000, 1).time(-5, 500_000_000).mode(0o4711),
            Item::symlink("link", "t".repeat(150)).xattr("user.a", "b"),
            Item::char_device("null", 1, 3),
            Item::directory("d/"),
        ];
        let entries = read(&Tarball::of(items).finish()).unwrap();
        let (file, data) = &entries[0];
        assert_eq!((file.path.as_slice(), data.as_slice()), (long.as_bytes(), &b"data"[..]));
        assert_eq!((file.uid, file.gid, file.mode), (4_000_000_000, 1, 0o4711));
        assert_eq!(file.mtime, Timestamp { seconds: -5, nanoseconds: 500_000_000 });
        assert_eq!(entries[1].0.kind, EntryKind::Symlink { target: vec![b't'; 150] });
        assert_eq!(entries[1].0.xattrs, [(b"user.a".to_vec(), b"b".to_vec())]);
        assert_eq!(entries[2].0.kind, EntryKind::CharDevice { major: 1, minor: 3 });
        assert_eq!(entries[3].0.kind, EntryKind::Directory);
    }

    #[test]
    fn archive_without_its_end_marker_is_accepted() {
        let tar = Tarball::of([Item::file("a", "x")]);
        assert_eq!(read(&tar.clone().unfinished()).unwrap().len(), 1);
        assert_eq!(read(&tar.raw(&[0; 512]).unfinished()).unwrap().len(), 1);
        assert!(read(b"").unwrap().is_empty());
    }

    #[test]
    fn archive_cut_inside_an_entry_is_torn() {
        let tar = Tarball::of([Item::file("n".repeat(200), vec![1; 700])]).unfinished();
        for length in (1..tar.len()).filter(|length| length % 97 == 0) {
            assert!(matches!(problem(&tar[..length]), TarProblem::Torn { .. }), "{length}");
        }
    }

    #[test]
    fn sparse_map_of_each_encoding_is_read() {
        let extents: [(u64, &[u8]); 2] = [(1000, b"abc"), (5000, b"de")];
        let tar = Tarball::new()
            .old_gnu_sparse("file", 9000, &extents)
            .pax_sparse("0.0", "file", 9000, &extents)
            .pax_sparse("0.1", "file", 9000, &extents)
            .pax_sparse("1.0", "file", 9000, &extents);
        let expected = EntryKind::File {
            size: 9000,
            extents: Some(vec![Extent { offset: 1000, length: 3 }, Extent { offset: 5000, length: 2 }]),
        };
        let entries = read(&tar.finish()).unwrap();
        assert_eq!(entries.len(), 4);
        for (entry, data) in entries {
            assert_eq!((entry.path.as_slice(), &entry.kind), (&b"file"[..], &expected));
            assert_eq!(data, b"abcde");
        }
    }

    #[test]
    fn special_header_of_any_claimed_size_is_refused_before_it_is_read() {
        let mut item = Item::file("x", "");
        item.kind = b'x';
        item.claimed_size = Some(1 << 40);
        assert!(matches!(problem(&Tarball::of([item]).finish()), TarProblem::HeaderTooLarge { .. }));
    }
}
