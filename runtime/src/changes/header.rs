//! Headers of tar entries: ustar, with a pax record (POSIX.1-2008, `pax`, *pax Extended Header*) for whatever its fields
//! have no room for.

use super::sparse::Extent;

/// The unit of everything in a tar archive.
pub(super) const BLOCK: usize = 512;

/// An extended attribute's name and value.
pub(super) type Xattr = (Vec<u8>, Vec<u8>);

/// What an entry is, by its type flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One entry, without its content.
pub(super) struct Header<'a> {
    pub(super) path: &'a [u8],
    pub(super) kind: Kind,
    /// Permission, set-id and sticky bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds since 1970, the latter counted upwards.
    pub(super) mtime: (i64, u32),
    /// Bytes of content that follow in the archive.
    pub(super) size: u64,
    pub(super) link_target: &'a [u8],
    pub(super) device: (u32, u32),
    pub(super) xattrs: &'a [Xattr],
    /// The file's own size, if only parts of it follow.
    pub(super) sparse_size: Option<u64>,
}

impl Header<'_> {
    /// Appends the entry's blocks.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let records = self.records();
        if !records.is_empty() {
            let name = [b"PaxHeaders/", self.path.get(..80).unwrap_or(self.path)].concat();
            let header = Header { path: &name, mode: 0o644, xattrs: &[], ..PLAIN };
            out.extend(header.block(b'x', records.len() as u64));
            out.extend(&records);
            pad(out);
        }
        let flag = match self.kind {
            Kind::File => b'0',
            Kind::HardLink => b'1',
            Kind::Symlink => b'2',
            Kind::CharDevice => b'3',
            Kind::BlockDevice => b'4',
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
        };
        out.extend(self.block(flag, self.size));
    }

    fn records(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if self.sparse_size.is_some() || !fits(self.path) {
            let keyword = if self.sparse_size.is_some() { "GNU.sparse.name" } else { "path" };
            record(&mut out, keyword.as_bytes(), self.path);
        }
        if !fits(self.link_target) {
            record(&mut out, b"linkpath", self.link_target);
        }
        for (keyword, value) in [("uid", self.uid), ("gid", self.gid)] {
            if octal(value.into(), 7).is_none() {
                record(&mut out, keyword.as_bytes(), value.to_string().as_bytes());
            }
        }
        if octal(self.size, 11).is_none() {
            record(&mut out, b"size", self.size.to_string().as_bytes());
        }
        if self.mtime.1 != 0 || u64::try_from(self.mtime.0).ok().and_then(|secs| octal(secs, 11)).is_none() {
            record(&mut out, b"mtime", decimal(self.mtime).as_bytes());
        }
        if let Some(size) = self.sparse_size {
            // GNU tar manual, "PAX Format, Version 1.0": the map is at the beginning of the content.
            record(&mut out, b"GNU.sparse.major", b"1");
            record(&mut out, b"GNU.sparse.minor", b"0");
            record(&mut out, b"GNU.sparse.realsize", size.to_string().as_bytes());
        }
        for (name, value) in self.xattrs {
            record(&mut out, &[b"SCHILY.xattr.", &name[..]].concat(), value);
        }
        out
    }

    fn block(&self, flag: u8, size: u64) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        let mut field = |at: usize, text: &[u8]| {
            block.iter_mut().skip(at).zip(text).for_each(|(to, from)| *to = *from);
        };
        // What does not fit stands in a record.
        let number = |value: u64, digits| octal(value, digits).unwrap_or_else(|| "0".repeat(digits));
        field(0, self.path.get(..100).unwrap_or(self.path));
        field(100, number(self.mode.into(), 7).as_bytes());
        field(108, number(self.uid.into(), 7).as_bytes());
        field(116, number(self.gid.into(), 7).as_bytes());
        field(124, number(size, 11).as_bytes());
        field(136, number(u64::try_from(self.mtime.0).unwrap_or(0), 11).as_bytes());
        field(148, b"        ");
        field(156, &[flag]);
        field(157, self.link_target.get(..100).unwrap_or(self.link_target));
        field(257, b"ustar\x0000");
        field(329, number(self.device.0.into(), 7).as_bytes());
        field(337, number(self.device.1.into(), 7).as_bytes());
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        let sum = format!("{sum:06o}\0");
        block.iter_mut().skip(148).zip(sum.as_bytes()).for_each(|(to, from)| *to = *from);
        block
    }
}

/// An entry of nothing.
pub(super) const PLAIN: Header<'static> = Header {
    path: b"",
    kind: Kind::File,
    mode: 0,
    uid: 0,
    gid: 0,
    mtime: (0, 0),
    size: 0,
    link_target: b"",
    device: (0, 0),
    xattrs: &[],
    sparse_size: None,
};

/// Fills the last block up.
pub(super) fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(BLOCK), 0);
}

/// The map of a sparse file, whose content comes right after it.
pub(super) fn sparse_map(extents: &[Extent]) -> Vec<u8> {
    let mut map = format!("{}\n", extents.len()).into_bytes();
    for extent in extents {
        map.extend(format!("{}\n{}\n", extent.offset, extent.length).into_bytes());
    }
    pad(&mut map);
    map
}

/// Whether readers find this name in the header's field as it is: in ASCII, since in which other encoding it is, a
/// header does not say.
fn fits(name: &[u8]) -> bool {
    name.len() <= 100 && name.is_ascii()
}

fn octal(value: u64, digits: usize) -> Option<String> {
    let text = format!("{value:0digits$o}");
    (text.len() <= digits).then_some(text)
}

/// `-1.5` is half a second before the last second of 1969.
fn decimal((seconds, nanoseconds): (i64, u32)) -> String {
    let text = match (seconds, nanoseconds) {
        (_, 0) => return seconds.to_string(),
        (..0, _) => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds),
        _ => format!("{seconds}.{nanoseconds:09}"),
    };
    text.trim_end_matches('0').to_owned()
}

/// `LENGTH KEYWORD=VALUE\n`, the length counting its own digits, too.
fn record(out: &mut Vec<u8>, keyword: &[u8], value: &[u8]) {
    let rest = keyword.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend(length.to_string().into_bytes());
    out.push(b' ');
    out.extend(keyword);
    out.push(b'=');
    out.extend(value);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_counts_its_own_digits() {
        for (length, expected) in [(1, 6), (5, 11), (93, 99), (94, 101)] {
            let mut out = Vec::new();
            record(&mut out, b"k", &vec![b'v'; length]);
            assert_eq!(out.len(), expected, "{}", String::from_utf8_lossy(&out));
            assert!(out.starts_with(format!("{expected} k=").as_bytes()));
        }
    }

    #[test]
    fn time_is_written_in_decimal() {
        for (time, text) in [
            ((1, 0), "1"),
            ((1, 500_000_000), "1.5"),
            ((0, 1), "0.000000001"),
            ((-1, 0), "-1"),
            ((-2, 500_000_000), "-1.5"),
            ((-1, 250_000_000), "-0.75"),
        ] {
            assert_eq!(decimal(time), text);
        }
    }

    #[test]
    fn what_fits_no_field_stands_in_a_record() {
        let path = "p".repeat(101);
        let header = Header { path: path.as_bytes(), uid: 1 << 21, size: 1 << 33, mtime: (-1, 0), ..PLAIN };
        let records = String::from_utf8(header.records()).unwrap();
        for expected in [format!("path={path}\n"), "uid=2097152\n".into(), "size=8589934592\n".into()] {
            assert!(records.contains(&expected), "{records}");
        }
        assert!(records.contains("mtime=-1\n") && !records.contains("gid="), "{records}");
    }
}
