//! Writes archives of layers: ustar headers, and pax records where a value does not fit one (POSIX.1-2008 `pax`).
//!
//! The same entries give the same bytes, whatever machine writes them.

use std::io::{self, Read, Write};

use super::header::BLOCK;
use super::{Entry, EntryKind};

const BLOCK_BYTES: u64 = BLOCK as u64;

/// Writes entries one after the other.
pub(crate) struct TarWriter<W> {
    output: W,
}

impl<W: Write> TarWriter<W> {
    pub(crate) fn new(output: W) -> Self {
        TarWriter { output }
    }

    /// Writes one entry. `data` must have the size that a file's entry says; a sparse one is not for this.
    pub(crate) fn entry(&mut self, entry: &Entry, data: &mut dyn Read) -> io::Result<()> {
        let size = self.begin(entry)?;
        let copied = io::copy(&mut data.take(size), &mut self.output)?;
        if copied != size {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a file got shorter while it was read"));
        }
        self.end(size)
    }

    /// Writes the headers of a file that has data at these places only (offset, length; in order); that data, and
    /// [`Self::end`], must follow. Returns the bytes before them (GNU tar manual, "PAX Format, Version 1.0").
    pub(crate) fn begin_sparse(&mut self, entry: &Entry, extents: &[(u64, u64)]) -> io::Result<u64> {
        let EntryKind::File { size, .. } = entry.kind else {
            return Err(io::Error::other("only a file has holes"));
        };
        // One without length tells where the file ends.
        let ended = [(size, 0)];
        let mut map = format!("{}\n", extents.len() + 1);
        for (offset, bytes) in extents.iter().chain(&ended) {
            map.push_str(&format!("{offset}\n{bytes}\n"));
        }
        let before = (map.len() as u64).next_multiple_of(BLOCK_BYTES);
        let stored = before + extents.iter().map(|(_, bytes)| bytes).sum::<u64>();
        // For who knows no sparse files, it has another name and what is stored as its content.
        let kind = EntryKind::File { size: stored, extents: None };
        let shown = Entry { path: b"GNUSparseFile.0/x".to_vec(), kind, ..entry.clone() };
        let mut records = records(&shown);
        for (name, value) in [
            (&b"GNU.sparse.major"[..], &b"1"[..]),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", &entry.path),
            (b"GNU.sparse.realsize", size.to_string().as_bytes()),
        ] {
            record(&mut records, name, value);
        }
        self.output.write_all(&header(b'x', b"PaxHeaders/x", records.len() as u64, entry, false))?;
        self.output.write_all(&records)?;
        self.end(records.len() as u64)?;
        self.output.write_all(&header(b'0', &shown.path, stored, &shown, true))?;
        self.output.write_all(map.as_bytes())?;
        self.end(map.len() as u64)?;
        Ok(before)
    }

    /// Writes one entry's headers; the data of a file, of the size that is returned, and [`Self::end`] must follow.
    pub(crate) fn begin(&mut self, entry: &Entry) -> io::Result<u64> {
        let records = records(entry);
        if !records.is_empty() {
            let name = b"PaxHeaders/x";
            self.output.write_all(&header(b'x', name, records.len() as u64, entry, false))?;
            self.output.write_all(&records)?;
            self.end(records.len() as u64)?;
        }
        let (kind, size) = match &entry.kind {
            EntryKind::File { size, .. } => (b'0', *size),
            EntryKind::HardLink { .. } => (b'1', 0),
            EntryKind::Symlink { .. } => (b'2', 0),
            EntryKind::CharDevice { .. } => (b'3', 0),
            EntryKind::BlockDevice { .. } => (b'4', 0),
            EntryKind::Directory => (b'5', 0),
            EntryKind::Fifo => (b'6', 0),
        };
        self.output.write_all(&header(kind, &entry.path, size, entry, true))?;
        Ok(size)
    }

    /// A piece of a file's data.
    pub(crate) fn data(&mut self, piece: &[u8]) -> io::Result<()> {
        self.output.write_all(piece)
    }

    /// Ends an entry with so many bytes of data.
    pub(crate) fn end(&mut self, written: u64) -> io::Result<()> {
        let padding = written.next_multiple_of(BLOCK_BYTES) - written;
        self.output.write_all([0; BLOCK].get(..padding as usize).unwrap_or_default())
    }

    /// Writes the end.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.output.write_all(&[0; 2 * BLOCK])?;
        Ok(self.output)
    }
}

/// Records for what does not fit the header.
fn records(entry: &Entry) -> Vec<u8> {
    let mut out = Vec::new();
    if entry.path.len() > 100 {
        record(&mut out, b"path", &entry.path);
    }
    if let Some(target) = target(entry)
        && target.len() > 100
    {
        record(&mut out, b"linkpath", target);
    }
    for (name, id) in [(&b"uid"[..], entry.uid), (b"gid", entry.gid)] {
        if u64::from(id) >= 1 << 21 {
            record(&mut out, name, id.to_string().as_bytes());
        }
    }
    if let EntryKind::File { size, .. } = entry.kind
        && size >= 1 << 33
    {
        record(&mut out, b"size", size.to_string().as_bytes());
    }
    let (seconds, nanoseconds) = (entry.mtime.seconds, entry.mtime.nanoseconds);
    if nanoseconds != 0 || !(0..1 << 33).contains(&seconds) {
        // Nanoseconds count upwards also before 1970, decimals do not.
        let value = match (seconds < 0, nanoseconds) {
            (_, 0) => seconds.to_string(),
            (false, _) => format!("{seconds}.{nanoseconds:09}"),
            (true, _) => {
                let whole = (seconds + 1).unsigned_abs();
                format!("-{whole}.{:09}", 1_000_000_000 - nanoseconds.min(999_999_999))
            }
        };
        record(&mut out, b"mtime", value.as_bytes());
    }
    for (name, value) in &entry.xattrs {
        record(&mut out, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
    }
    out
}

fn target(entry: &Entry) -> Option<&[u8]> {
    match &entry.kind {
        EntryKind::HardLink { target } | EntryKind::Symlink { target } => Some(target),
        _ => None,
    }
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + rest.to_string().len();
    length = rest + length.to_string().len();
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn header(kind: u8, path: &[u8], size: u64, entry: &Entry, with_entry: bool) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    text(&mut block, 0, 100, path);
    let seconds = entry.mtime.seconds.clamp(0, (1 << 33) - 1) as u64;
    let id = |id: u32| u64::from(id).min((1 << 21) - 1);
    // What a pax record says is not looked at here, and must still be a number.
    octal(&mut block, 100, 8, if with_entry { u64::from(entry.mode) } else { 0o644 });
    octal(&mut block, 108, 8, if with_entry { id(entry.uid) } else { 0 });
    octal(&mut block, 116, 8, if with_entry { id(entry.gid) } else { 0 });
    octal(&mut block, 124, 12, size.min((1 << 33) - 1));
    octal(&mut block, 136, 12, if with_entry { seconds } else { 0 });
    text(&mut block, 156, 1, &[kind]);
    text(&mut block, 257, 8, b"ustar\x0000");
    let (major, minor) = match entry.kind {
        EntryKind::CharDevice { major, minor } | EntryKind::BlockDevice { major, minor } => (major, minor),
        _ => (0, 0),
    };
    if with_entry {
        text(&mut block, 157, 100, target(entry).unwrap_or_default());
        octal(&mut block, 329, 8, major.into());
        octal(&mut block, 337, 8, minor.into());
    }
    text(&mut block, 148, 8, b"        ");
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    text(&mut block, 148, 8, format!("{sum:06o}\0 ").as_bytes());
    block
}

fn text(block: &mut [u8; BLOCK], at: usize, bytes: usize, value: &[u8]) {
    let field = block.get_mut(at..at + bytes).unwrap_or_default();
    field.iter_mut().zip(value).for_each(|(to, from)| *to = *from);
}

fn octal(block: &mut [u8; BLOCK], at: usize, bytes: usize, value: u64) {
    text(block, at, bytes, format!("{value:0width$o}\0", width = bytes - 1).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::{TarReader, Timestamp};

    #[test]
    fn entries_are_read_back_as_they_were_written() {
        let entry = |path: &[u8], kind| Entry {
            path: path.to_vec(),
            mode: 0o4755,
            uid: 3_000_000,
            gid: 7,
            mtime: Timestamp { seconds: 1_700_000_000, nanoseconds: 0 },
            xattrs: vec![(b"user.a".to_vec(), b"\0=\n".to_vec())],
            kind,
        };
        let long = vec![b'x'; 300];
        let mut entries = vec![
            entry(b"d", EntryKind::Directory),
            entry(&long, EntryKind::File { size: 5, extents: None }),
            entry(b"link", EntryKind::Symlink { target: long.clone() }),
            entry(b"hard", EntryKind::HardLink { target: b"d/f".to_vec() }),
            entry(b"dev", EntryKind::CharDevice { major: 1, minor: 300 }),
            entry(b"pipe", EntryKind::Fifo),
        ];
        for (index, (seconds, nanoseconds)) in
            [(-1, 0), (-2, 500_000_000), (0, 1), (1 << 40, 0)].iter().enumerate()
        {
            let mut entry = entry(format!("t{index}").as_bytes(), EntryKind::Fifo);
            entry.mtime = Timestamp { seconds: *seconds, nanoseconds: *nanoseconds };
            entries.push(entry);
        }
        let mut writer = TarWriter::new(Vec::new());
        for entry in &entries {
            writer.entry(entry, &mut &b"12345"[..]).unwrap();
        }
        let archive = writer.finish().unwrap();
        assert!(archive.len().is_multiple_of(BLOCK));
        let mut reader = TarReader::new(archive.as_slice());
        for entry in &entries {
            assert_eq!(reader.next().unwrap().as_ref(), Some(entry));
        }
        assert_eq!(reader.next().unwrap(), None);
    }
}
