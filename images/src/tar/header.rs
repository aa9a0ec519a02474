//! The 512-byte header block: fields, number encodings, checksum. No I/O and no meaning.

use super::{Extent, TarProblem};

/// The unit of everything in a tar archive.
pub(super) const BLOCK: usize = 512;

/// Which of the incompatible header layouts a block has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// One header block.
pub(super) struct Header {
    block: [u8; BLOCK],
}

impl Header {
    pub(super) fn new(block: [u8; BLOCK]) -> Header {
        Header { block }
    }

    fn field<const START: usize, const LEN: usize>(&self) -> &[u8] {
        const { assert!(START + LEN <= BLOCK) };
        self.block.get(START..START + LEN).unwrap_or_default()
    }

    pub(super) fn is_zero(&self) -> bool {
        self.block.iter().all(|&byte| byte == 0)
    }

    /// The sum of all bytes, with the checksum field itself as spaces. Some old archivers added signed bytes.
    pub(super) fn checksum_matches(&self) -> bool {
        let Some(stored) = octal(self.field::<148, 8>()) else { return false };
        let (mut unsigned, mut signed) = (0i64, 0i64);
        for (index, &byte) in self.block.iter().enumerate() {
            let byte = if (148..156).contains(&index) { b' ' } else { byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        i64::try_from(stored).is_ok_and(|stored| stored == unsigned || stored == signed)
    }

    pub(super) fn format(&self) -> Format {
        match (self.field::<257, 6>(), self.field::<263, 2>()) {
            (b"ustar\0", _) if self.field::<508, 4>() == b"tar\0" => Format::Star,
            (b"ustar\0", _) => Format::Ustar,
            (b"ustar ", b" \0") => Format::Gnu,
            _ => Format::V7,
        }
    }

    pub(super) fn kind(&self) -> u8 {
        self.block[156]
    }

    /// The name, with ustar's or star's prefix before it.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = until_nul(self.field::<0, 100>());
        let prefix = match self.format() {
            Format::Ustar => until_nul(self.field::<345, 155>()),
            Format::Star => until_nul(self.field::<345, 131>()),
            // GNU keeps times and sparse maps there; V7 nothing.
            Format::Gnu | Format::V7 => b"",
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link_target(&self) -> Vec<u8> {
        until_nul(self.field::<157, 100>()).to_vec()
    }

    pub(super) fn mode(&self) -> Result<i64, TarProblem> {
        number(self.field::<100, 8>(), "mode")
    }

    pub(super) fn uid(&self) -> Result<i64, TarProblem> {
        number(self.field::<108, 8>(), "uid")
    }

    pub(super) fn gid(&self) -> Result<i64, TarProblem> {
        number(self.field::<116, 8>(), "gid")
    }

    pub(super) fn size(&self) -> Result<u64, TarProblem> {
        let size = number(self.field::<124, 12>(), "size")?;
        u64::try_from(size).map_err(|_| TarProblem::Number { field: "size" })
    }

    pub(super) fn mtime(&self) -> Result<i64, TarProblem> {
        number(self.field::<136, 12>(), "mtime")
    }

    /// Major and minor number of a device.
    pub(super) fn device(&self) -> Result<(u32, u32), TarProblem> {
        if self.format() == Format::V7 {
            return Ok((0, 0));
        }
        let part = |field: &[u8], name| {
            u32::try_from(number(field, name)?).map_err(|_| TarProblem::Number { field: name })
        };
        Ok((part(self.field::<329, 8>(), "devmajor")?, part(self.field::<337, 8>(), "devminor")?))
    }

    /// Old GNU sparse: the extents in this header, whether more blocks of them follow, and the real size.
    pub(super) fn old_gnu_sparse(&self) -> Result<(Vec<Extent>, bool, u64), TarProblem> {
        let size = number(self.field::<483, 12>(), "realsize")?;
        let size = u64::try_from(size).map_err(|_| TarProblem::Number { field: "realsize" })?;
        Ok((old_gnu_extents(self.field::<386, 96>())?, self.block[482] != 0, size))
    }
}

/// Old GNU sparse: a continuation block's extents, and whether yet another block follows.
pub(super) fn old_gnu_continuation(block: &[u8; BLOCK]) -> Result<(Vec<Extent>, bool), TarProblem> {
    Ok((old_gnu_extents(&block[..504])?, block[504] != 0))
}

/// Extents of 12 + 12 bytes up to the first that is empty.
fn old_gnu_extents(field: &[u8]) -> Result<Vec<Extent>, TarProblem> {
    let part = |field: &[u8]| {
        u64::try_from(number(field, "sparse map")?).map_err(|_| TarProblem::Number { field: "sparse map" })
    };
    let mut extents = Vec::new();
    for pair in field.chunks_exact(24) {
        let (offset, length) = pair.split_at(12);
        if offset.first() == Some(&0) || length.first() == Some(&0) {
            break;
        }
        extents.push(Extent { offset: part(offset)?, length: part(length)? });
    }
    Ok(extents)
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// A numeric field: base-256 when the top bit is set (GNU and star, two's complement), octal otherwise.
fn number(field: &[u8], name: &'static str) -> Result<i64, TarProblem> {
    let error = TarProblem::Number { field: name };
    match field {
        [first, rest @ ..] if first & 0x80 != 0 => {
            let negative = first & 0x40 != 0;
            // The remaining bits of the first byte, sign-extended.
            let head = i64::from(first & 0x7f) - if negative { 0x80 } else { 0 };
            let value = rest.iter().try_fold(head, |value, &byte| {
                value.checked_mul(256).and_then(|value| value.checked_add(i64::from(byte)))
            });
            value.ok_or(error)
        }
        _ => octal(field).and_then(|value| i64::try_from(value).ok()).ok_or(error),
    }
}

/// Octal digits, padded by spaces or NULs on either side; nothing at all is 0.
fn octal(field: &[u8]) -> Option<u64> {
    let padding = |byte: &u8| *byte == b' ' || *byte == 0;
    let start = field.iter().position(|byte| !padding(byte)).unwrap_or(field.len());
    let digits = until_nul(field.get(start..).unwrap_or_default()).trim_ascii_end();
    digits.iter().try_fold(0u64, |value, &digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_in_each_encoding_is_read() {
        let value = |field: &[u8]| number(field, "size").ok();
        assert_eq!(value(b"0000644\0"), Some(0o644));
        assert_eq!(value(b"   644 \0"), Some(0o644));
        assert_eq!(value(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(value(b"\x80\0\0\0\0\x20\0\0"), Some(0x20_0000));
        assert_eq!(value(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"), Some(-2));
        assert_eq!(value(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"), None, "more than 63 bits");
        assert_eq!(value(b"0000648\0"), None);
        assert_eq!(value(b"-000644\0"), None);
    }
}
