//! pax extended header records (POSIX.1-2008, `pax`, *pax Extended Header*): `LENGTH KEYWORD=VALUE\n`.
//!
//! Keywords that say something an image keeps are understood; `atime`, `ctime`, `uname`, `gname`, comments, and
//! vendors' keywords that do not change what the file is are skipped, as POSIX allows. `LIBARCHIVE.xattr.*` is
//! among them: bsdtar writes each attribute as `SCHILY.xattr.*` too, and that is the form all OCI tools read.

use super::{Extent, TarProblem, Timestamp, Xattr};
use crate::limits::{MAX_SPARSE_EXTENTS, MAX_XATTR_VALUE_BYTES};

/// What one record block says. `None`: it says nothing, the plain header counts.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PaxRecords {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_target: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    pub(super) mtime: Option<Timestamp>,
    pub(super) xattrs: Vec<Xattr>,
    pub(super) sparse: SparseRecords,
}

/// The `GNU.sparse.*` records; versions 0.0, 0.1 and 1.0 use different ones.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SparseRecords {
    pub(super) version: (Option<Vec<u8>>, Option<Vec<u8>>),
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// The map of 0.0 (pairs of records) or 0.1 (one record).
    pub(super) map: Option<Vec<Extent>>,
    /// An offset whose length is yet to come (0.0).
    offset: Option<u64>,
}

impl PaxRecords {
    /// Adds the records of `block`; a later record replaces an earlier one of the same keyword.
    pub(super) fn parse(&mut self, block: &[u8]) -> Result<(), TarProblem> {
        let mut rest = block;
        while !rest.is_empty() {
            let (keyword, value, after) = split_record(rest).ok_or(TarProblem::PaxSyntax)?;
            self.set(keyword, value)?;
            rest = after;
        }
        Ok(())
    }

    fn set(&mut self, keyword: &[u8], value: &[u8]) -> Result<(), TarProblem> {
        match keyword {
            b"path" => self.path = text(value, "path")?,
            b"linkpath" => self.link_target = text(value, "linkpath")?,
            b"size" => self.size = unsigned(value, "size")?,
            b"uid" => self.uid = signed(value, "uid")?,
            b"gid" => self.gid = signed(value, "gid")?,
            b"mtime" => self.mtime = timestamp(value)?,
            b"GNU.sparse.major" => self.sparse.version.0 = text(value, "GNU.sparse.major")?,
            b"GNU.sparse.minor" => self.sparse.version.1 = text(value, "GNU.sparse.minor")?,
            b"GNU.sparse.name" => self.sparse.name = text(value, "GNU.sparse.name")?,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.real_size = unsigned(value, "GNU.sparse.size")?;
            }
            b"GNU.sparse.map" => self.sparse.map = Some(sparse_map(value)?),
            b"GNU.sparse.offset" => self.sparse.offset = unsigned(value, "GNU.sparse.offset")?,
            b"GNU.sparse.numbytes" => self.sparse.add_length(value)?,
            _ => {
                if let Some(name) = keyword.strip_prefix(b"SCHILY.xattr.") {
                    self.set_xattr(name, value)?;
                }
            }
        }
        Ok(())
    }

    fn set_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), TarProblem> {
        if name.contains(&0) {
            return Err(TarProblem::Nul("the name of an extended attribute"));
        }
        if value.len() > MAX_XATTR_VALUE_BYTES {
            return Err(TarProblem::HeaderTooLarge {
                bytes: value.len() as u64,
                limit: MAX_XATTR_VALUE_BYTES as u64,
            });
        }
        self.xattrs.push((name.to_vec(), value.to_vec()));
        Ok(())
    }
}

impl SparseRecords {
    fn add_length(&mut self, value: &[u8]) -> Result<(), TarProblem> {
        let length = unsigned(value, "GNU.sparse.numbytes")?;
        let (Some(offset), Some(length)) = (self.offset.take(), length) else {
            return Err(TarProblem::SparseMap);
        };
        let map = self.map.get_or_insert_default();
        if map.len() == MAX_SPARSE_EXTENTS {
            return Err(TarProblem::SparseTooLong(MAX_SPARSE_EXTENTS));
        }
        map.push(Extent { offset, length });
        Ok(())
    }
}

/// Whether a global record block holds nothing but comments (as `git archive` writes).
pub(super) fn is_comment_only(block: &[u8]) -> Result<bool, TarProblem> {
    let mut rest = block;
    let mut only = true;
    while !rest.is_empty() {
        let (keyword, _, after) = split_record(rest).ok_or(TarProblem::PaxSyntax)?;
        only &= keyword == b"comment";
        rest = after;
    }
    Ok(only)
}

/// Splits the first record off: keyword, value, what follows.
fn split_record(block: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = block.iter().take(20).position(|&byte| byte == b' ')?;
    let length = usize::try_from(decimal(block.get(..space)?)?).ok()?;
    let (record, after) = block.split_at_checked(length)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let mut parts = record.splitn(2, |&byte| byte == b'=');
    match (parts.next()?, parts.next()?) {
        (b"", _) => None,
        (keyword, value) => Some((keyword, value, after)),
    }
}

/// An empty value cancels a keyword.
fn text(value: &[u8], what: &'static str) -> Result<Option<Vec<u8>>, TarProblem> {
    match value {
        _ if value.contains(&0) => Err(TarProblem::Nul(what)),
        b"" => Ok(None),
        _ => Ok(Some(value.to_vec())),
    }
}

fn unsigned(value: &[u8], field: &'static str) -> Result<Option<u64>, TarProblem> {
    match value {
        b"" => Ok(None),
        _ => decimal(value).map(Some).ok_or(TarProblem::Number { field }),
    }
}

fn signed(value: &[u8], field: &'static str) -> Result<Option<i64>, TarProblem> {
    let value = unsigned(value, field)?;
    value.map(i64::try_from).transpose().map_err(|_| TarProblem::Number { field })
}

/// `[-]SECONDS[.FRACTION]`; digits beyond nanoseconds are dropped.
fn timestamp(value: &[u8]) -> Result<Option<Timestamp>, TarProblem> {
    if value.is_empty() {
        return Ok(None);
    }
    parse_timestamp(value).map(Some).ok_or(TarProblem::Number { field: "mtime" })
}

fn parse_timestamp(value: &[u8]) -> Option<Timestamp> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(value) => (true, value),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |&byte| byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    Some(match (negative, nanoseconds) {
        (false, _) => Timestamp { seconds, nanoseconds },
        (true, 0) => Timestamp { seconds: -seconds, nanoseconds },
        (true, _) => Timestamp { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

/// `OFFSET,LENGTH,OFFSET,LENGTH…` of format 0.1.
fn sparse_map(value: &[u8]) -> Result<Vec<Extent>, TarProblem> {
    let mut extents = Vec::new();
    let mut numbers = value.split(|&byte| byte == b',').filter(|_| !value.is_empty());
    while let Some(offset) = numbers.next() {
        let length = numbers.next().and_then(decimal).ok_or(TarProblem::SparseMap)?;
        let offset = decimal(offset).ok_or(TarProblem::SparseMap)?;
        if extents.len() == MAX_SPARSE_EXTENTS {
            return Err(TarProblem::SparseTooLong(MAX_SPARSE_EXTENTS));
        }
        extents.push(Extent { offset, length });
    }
    Ok(extents)
}

/// Decimal digits, at least one, nothing else.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, &digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(block: &[u8]) -> Result<PaxRecords, TarProblem> {
        let mut records = PaxRecords::default();
        records.parse(block).map(|()| records)
    }

    /// A record with the right length in front.
    fn record(keyword: &str, value: &[u8]) -> Vec<u8> {
        let rest = [b" ", keyword.as_bytes(), b"=", value, b"\n"].concat();
        let mut length = rest.len() + 1;
        while length != rest.len() + length.to_string().len() {
            length = rest.len() + length.to_string().len();
        }
        [length.to_string().as_bytes(), &rest].concat()
    }

    #[test]
    fn records_of_all_kinds_are_understood() {
        let block = [
            record("path", b"\xffa"),
            record("size", b"123"),
            record("uid", b"4000000000"),
            record("mtime", b"1.5"),
            record("SCHILY.xattr.user.a", b"x=y\nz\0"),
            record("VENDOR.thing", b"\0"),
        ];
        let records = parse(&block.concat()).unwrap();
        assert_eq!(records.path.as_deref(), Some(&b"\xffa"[..]));
        assert_eq!((records.size, records.uid), (Some(123), Some(4_000_000_000)));
        assert_eq!(records.mtime, Some(Timestamp { seconds: 1, nanoseconds: 500_000_000 }));
        assert_eq!(records.xattrs, [(b"user.a".to_vec(), b"x=y\nz\0".to_vec())]);
    }

    #[test]
    fn record_of_wrong_length_is_refused() {
        let bad: [&[u8]; 8] = [
            b"5 a=b\n",
            b"7 a=b\n",
            b"6 ab\n\n",
            b"a=b\n",
            b"5 =b\n",
            b"-6 a=b\n",
            b"99999999999999999999 a=b\n",
            b"2 ",
        ];
        for block in bad {
            assert!(matches!(parse(block), Err(TarProblem::PaxSyntax)), "{block:?}");
        }
    }

    #[test]
    fn timestamp_before_the_epoch_counts_nanoseconds_upwards() {
        let time = |text: &str| parse_timestamp(text.as_bytes()).map(|t| (t.seconds, t.nanoseconds));
        assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time("-3"), Some((-3, 0)));
        assert_eq!(time("0.0000000019"), Some((0, 1)));
        assert_eq!(time("1."), Some((1, 0)));
        assert_eq!(time("1.x"), None);
        assert_eq!(time("9223372036854775808"), None);
    }

    #[test]
    fn path_with_nul_is_refused() {
        assert!(matches!(parse(&record("path", b"a\0b")), Err(TarProblem::Nul("path"))));
    }

    #[test]
    fn global_block_with_more_than_comments_is_told() {
        assert!(is_comment_only(&record("comment", b"a")).unwrap());
        assert!(!is_comment_only(&[record("comment", b"a"), record("uid", b"1")].concat()).unwrap());
    }
}
