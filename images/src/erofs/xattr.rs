//! Extended attributes as they follow an inode: a 12-byte header, then entries of prefix number, rest of the name,
//! and value, each padded to 4 bytes.

use super::format::Fields;
use crate::limits::{MAX_XATTR_VALUE_BYTES, MAX_XATTRS_BYTES, NAME_MAX};
use crate::tar::Xattr;

/// Name prefixes that EROFS has numbers for. (The two ACLs are whole names.)
pub(super) const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];
const ACL_ACCESS: u8 = 2;
const ACL_DEFAULT: u8 = 3;

/// Why an attribute cannot be stored.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum XattrProblem {
    /// Its namespace does not exist on Linux file systems.
    Namespace,
    /// Its name has no part after the namespace, or too long a one.
    Name,
    /// Its value is longer than 65535 bytes.
    Value,
    /// It is an access control list that the kernel would not understand.
    Acl,
    /// All of the file's attributes together are too large.
    Total,
}

/// All attributes of one file, in the form they have on disk. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct EncodedXattrs(Box<[u8]>);

impl EncodedXattrs {
    /// Encodes attributes, sorted by name; of several with one name the last counts. `None` if there are none.
    pub(crate) fn encode(xattrs: &[Xattr]) -> Result<Option<EncodedXattrs>, XattrProblem> {
        let sorted: std::collections::BTreeMap<_, _> =
            xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice())).collect();
        if sorted.is_empty() {
            return Ok(None);
        }
        let mut out = Fields(vec![0; 12]);
        for (name, value) in sorted {
            let (prefix, rest) = split_name(name)?;
            check_value(prefix, value)?;
            push(&mut out, prefix, rest, value)?;
        }
        Ok(Some(EncodedXattrs(out.0.into())))
    }

    /// These attributes and one more, which must not be among them yet.
    pub(crate) fn with(
        existing: Option<&EncodedXattrs>,
        name: &[u8],
        value: &[u8],
    ) -> Result<EncodedXattrs, XattrProblem> {
        let (prefix, rest) = split_name(name)?;
        check_value(prefix, value)?;
        let mut out = Fields(existing.map_or_else(|| vec![0; 12], |existing| existing.0.to_vec()));
        push(&mut out, prefix, rest, value)?;
        Ok(EncodedXattrs(out.0.into()))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// `i_xattr_icount`: one for the header, and one for each 4 bytes after it.
    pub(super) fn count(&self) -> u16 {
        // At most `MAX_XATTRS_BYTES`.
        (1 + (self.0.len() - 12) / 4) as u16
    }
}

fn push(out: &mut Fields, prefix: u8, rest: &[u8], value: &[u8]) -> Result<(), XattrProblem> {
    // Both lengths were checked: a name has at most 255 bytes, a value 65535.
    out.bytes(&[rest.len() as u8, prefix]);
    out.u16(value.len() as u16);
    out.bytes(rest);
    out.bytes(value);
    out.0.resize(out.0.len().next_multiple_of(4), 0);
    if out.0.len() > MAX_XATTRS_BYTES { Err(XattrProblem::Total) } else { Ok(()) }
}

/// The prefix number, and what of the name it does not say.
fn split_name(name: &[u8]) -> Result<(u8, &[u8]), XattrProblem> {
    for (prefix, number) in PREFIXES {
        if let Some(rest) = name.strip_prefix(prefix) {
            let whole = matches!(number, ACL_ACCESS | ACL_DEFAULT);
            return match rest.len() {
                0 if whole => Ok((number, rest)),
                1.. if whole => Err(XattrProblem::Namespace),
                // The kernel bounds the full name.
                1.. if name.len() <= NAME_MAX && !rest.contains(&0) => Ok((number, rest)),
                _ => Err(XattrProblem::Name),
            };
        }
    }
    Err(XattrProblem::Namespace)
}

/// The whole name; `None` for a prefix that is never written.
pub(super) fn full_name(prefix: u8, rest: &[u8]) -> Option<Vec<u8>> {
    let (start, _) = PREFIXES.iter().find(|(_, number)| *number == prefix)?;
    Some([start, rest].concat())
}

/// An ACL has a version, 2, in 4 bytes, and entries of 8 (kernel: `include/uapi/linux/posix_acl_xattr.h`).
fn check_value(prefix: u8, value: &[u8]) -> Result<(), XattrProblem> {
    if value.len() > MAX_XATTR_VALUE_BYTES {
        return Err(XattrProblem::Value);
    }
    if matches!(prefix, ACL_ACCESS | ACL_DEFAULT) {
        match value.split_first_chunk::<4>() {
            Some((version, entries)) if *version == [2, 0, 0, 0] && entries.len().is_multiple_of(8) => {}
            _ => return Err(XattrProblem::Acl),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xattr(name: &str, value: &[u8]) -> Xattr {
        (name.as_bytes().to_vec(), value.to_vec())
    }

    #[test]
    fn attributes_are_sorted_padded_and_the_last_of_a_name_counts() {
        let xattrs = [xattr("user.b", b"12345"), xattr("trusted.a", b"x"), xattr("user.b", b"1")];
        let encoded = EncodedXattrs::encode(&xattrs).unwrap().unwrap();
        assert_eq!(encoded.bytes()[12..], *b"\x01\x04\x01\0ax\0\0\x01\x01\x01\0b1\0\0");
        assert_eq!(encoded.count(), 1 + 4);
        assert_eq!(EncodedXattrs::encode(&[]), Ok(None));
    }

    #[test]
    fn attribute_that_cannot_be_stored_is_refused() {
        let problem = |name: &str, value: &[u8]| EncodedXattrs::encode(&[xattr(name, value)]).unwrap_err();
        assert_eq!(problem("com.apple.quarantine", b""), XattrProblem::Namespace);
        assert_eq!(problem("system.posix_acl_access2", b""), XattrProblem::Namespace);
        assert_eq!(problem("user.", b""), XattrProblem::Name);
        assert_eq!(problem(&format!("user.{}", "n".repeat(251)), b""), XattrProblem::Name);
        assert_eq!(problem("user.a", &[0; 65536]), XattrProblem::Value);
        assert_eq!(problem("system.posix_acl_access", b"\x02\0\0\0\x01"), XattrProblem::Acl);
        let many: Vec<_> = (0..5).map(|n| xattr(&format!("user.{n}"), &[0; 65535])).collect();
        assert_eq!(EncodedXattrs::encode(&many), Err(XattrProblem::Total));
    }
}
