//! Writes tar archives header by header, so that a test can also write the ones no sane program makes.
//!
//! Format: POSIX.1-1988 ustar with POSIX.1-2001 (pax) extended records where a value does not fit, and GNU's
//! base-256 numbers on request. Reading tar is the business of the code under test, not of this module.

use std::fmt::Write as _;

/// Size of a tar record.
pub const BLOCK: usize = 512;

/// Type flags of POSIX.1-1988 and GNU tar.
pub mod kind {
    /// Regular file.
    pub const FILE: u8 = b'0';
    /// Hard link to an earlier entry.
    pub const HARD_LINK: u8 = b'1';
    /// Symbolic link.
    pub const SYMLINK: u8 = b'2';
    /// Character device.
    pub const CHARACTER: u8 = b'3';
    /// Directory.
    pub const DIRECTORY: u8 = b'5';
    /// Named pipe.
    pub const FIFO: u8 = b'6';
    /// Extended records for the next entry.
    pub const PAX: u8 = b'x';
    /// GNU: the next entry's long name.
    pub const GNU_LONG_NAME: u8 = b'L';
    /// GNU: old sparse format.
    pub const GNU_SPARSE: u8 = b'S';
}

/// One entry's header fields.
#[derive(Debug, Clone)]
pub struct Header {
    /// Path as written in the archive.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since the Unix epoch.
    pub mtime: u64,
    /// The size the header claims, which need not be that of the data that follow.
    pub size: u64,
    /// Type flag, see [`kind`].
    pub kind: u8,
    /// Target of a hard or symbolic link.
    pub link: String,
    /// Device number, major and minor.
    pub device: (u32, u32),
    /// Extended attributes, written as `SCHILY.xattr.*` records.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

impl Header {
    /// An entry owned by root, made on 2001-09-09.
    pub fn new(kind: u8, path: impl Into<String>, mode: u32) -> Self {
        Self {
            path: path.into(),
            mode,
            uid: 0,
            gid: 0,
            mtime: 1_000_000_000,
            size: 0,
            kind,
            link: String::new(),
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }

    /// The 512 bytes of the header alone. What does not fit is cut; [`Archive::entry`] adds pax records for it.
    pub fn to_block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        put_text(&mut block[..100], &self.path);
        put_number(&mut block[100..108], u64::from(self.mode));
        put_number(&mut block[108..116], u64::from(self.uid));
        put_number(&mut block[116..124], u64::from(self.gid));
        put_number(&mut block[124..136], self.size);
        put_number(&mut block[136..148], self.mtime);
        block[156] = self.kind;
        put_text(&mut block[157..257], &self.link);
        block[257..265].copy_from_slice(b"ustar\x0000");
        put_number(&mut block[329..337], u64::from(self.device.0));
        put_number(&mut block[337..345], u64::from(self.device.1));
        seal(&mut block);
        block
    }

    fn pax_records(&self) -> Vec<u8> {
        let mut records = Vec::new();
        if self.path.len() > 100 {
            pax_record(&mut records, "path", self.path.as_bytes());
        }
        if self.link.len() > 100 {
            pax_record(&mut records, "linkpath", self.link.as_bytes());
        }
        for (name, value) in &self.xattrs {
            pax_record(&mut records, &format!("SCHILY.xattr.{name}"), value);
        }
        records
    }
}

/// Sets a header's checksum, after all else is in place.
pub fn seal(block: &mut [u8; BLOCK]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    let text = format!("{sum:06o}\0 ");
    block[148..156].copy_from_slice(text.as_bytes());
}

/// Appends one pax record; its length prefix counts itself (POSIX.1-2001, pax: "Extended Header").
pub fn pax_record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let digits = |number: usize| number.to_string().len();
    let mut length = rest + digits(rest);
    length = rest + digits(length);
    records.extend_from_slice(format!("{length} {key}=").as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// Writes a number in octal, or in GNU's base-256 form when it does not fit.
pub fn put_number(field: &mut [u8], value: u64) {
    let width = field.len() - 1;
    let mut text = String::new();
    let _ = write!(text, "{value:0width$o}");
    if text.len() == width {
        field[..width].copy_from_slice(text.as_bytes());
        field[width] = 0;
    } else {
        let bytes = value.to_be_bytes();
        field.fill(0);
        let start = field.len().saturating_sub(bytes.len());
        let taken = field.len() - start;
        field[start..].copy_from_slice(&bytes[bytes.len() - taken..]);
        field[0] |= 0x80;
    }
}

fn put_text(field: &mut [u8], text: &str) {
    let taken = text.len().min(field.len());
    field[..taken].copy_from_slice(&text.as_bytes()[..taken]);
}

/// An archive under construction, in memory.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
}

impl Archive {
    /// Appends an entry whose size is that of its data.
    pub fn entry(&mut self, mut header: Header, data: &[u8]) -> &mut Self {
        header.size = data.len() as u64;
        let records = header.pax_records();
        if !records.is_empty() {
            self.entry(Header::new(kind::PAX, "pax", 0o644), &records);
        }
        self.raw(&header.to_block()).padded(data)
    }

    /// Appends a regular file that anyone may read.
    pub fn file(&mut self, path: &str, data: &[u8]) -> &mut Self {
        self.entry(Header::new(kind::FILE, path, 0o644), data)
    }

    /// Appends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends bytes and zeros up to the next record.
    pub fn padded(&mut self, data: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        self
    }

    /// The archive with its end mark.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK, 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_record_length_counts_its_own_digits() {
        let mut records = Vec::new();
        pax_record(&mut records, "path", &[b'x'; 91]);
        // 91 + "path" + " =\n" are 98 bytes; three digits are needed to count themselves: 101.
        assert!(records.starts_with(b"101 path="));
        assert_eq!(records.len(), 101);
    }

    #[test]
    fn number_over_field_is_written_in_base_256() {
        let mut field = [0; 12];
        put_number(&mut field, 0o777);
        assert_eq!(&field, b"00000000777\0");
        put_number(&mut field, 1 << 40);
        assert_eq!(field, [0x80, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
    }
}
