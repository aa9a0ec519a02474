//! Entry names: cleaned, checked, and split into components.

use crate::limits::{NAME_MAX, PATH_MAX};

/// Prefix of names that mean something else than a file (OCI image-spec: layer.md#whiteouts).
const WHITEOUT: &[u8] = b".wh.";
/// Prefix of AUFS' own files; one of them is the opaque marker.
const AUFS: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why a name is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PathProblem {
    /// It climbs above the root.
    #[error("the path leads out of the image's root")]
    Escapes,
    /// It is longer than the kernel accepts.
    #[error("the path is longer than 4095 bytes")]
    PathTooLong,
    /// One component is longer than the kernel accepts.
    #[error("a component of the path is longer than 255 bytes")]
    NameTooLong,
    /// It uses the whiteout prefix in a way that means nothing.
    #[error("names that start with .wh. are reserved for whiteouts, and this is none")]
    BadWhiteout,
}

/// What an entry's name stands for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target<'a> {
    /// A file by its components; none means the root.
    File(Vec<&'a [u8]>),
    /// Hides a name of lower layers: the directory's components, and the name.
    Whiteout(Vec<&'a [u8]>, &'a [u8]),
    /// Hides all of a directory's lower content.
    Opaque(Vec<&'a [u8]>),
    /// AUFS bookkeeping.
    Skip,
}

/// Cleans a name: components without empty ones and `.`, and each `..` resolved against what is before it.
pub(super) fn components(name: &[u8]) -> Result<Vec<&[u8]>, PathProblem> {
    if name.len() >= PATH_MAX {
        return Err(PathProblem::PathTooLong);
    }
    let mut components = Vec::new();
    for component in name.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                components.pop().ok_or(PathProblem::Escapes)?;
            }
            _ if component.len() > NAME_MAX => return Err(PathProblem::NameTooLong),
            _ => components.push(component),
        }
    }
    Ok(components)
}

/// Cleans an entry's name and tells what it stands for.
pub(super) fn target(name: &[u8]) -> Result<Target<'_>, PathProblem> {
    let mut components = components(name)?;
    let Some((last, parents)) = components.split_last() else { return Ok(Target::File(components)) };
    if parents.iter().any(|parent| parent.starts_with(AUFS)) {
        return Ok(Target::Skip);
    }
    if parents.iter().any(|parent| parent.starts_with(WHITEOUT)) {
        return Err(PathProblem::BadWhiteout);
    }
    let last = *last;
    let Some(hidden) = last.strip_prefix(WHITEOUT) else { return Ok(Target::File(components)) };
    components.pop();
    match hidden {
        _ if last == OPAQUE => Ok(Target::Opaque(components)),
        _ if last.starts_with(AUFS) => Ok(Target::Skip),
        b"" | b"." | b".." => Err(PathProblem::BadWhiteout),
        _ => Ok(Target::Whiteout(components, hidden)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(name: &str) -> Result<String, PathProblem> {
        let joined = components(name.as_bytes())?.join(&b'/');
        Ok(String::from_utf8(joined).unwrap())
    }

    #[test]
    fn name_is_cleaned_lexically() {
        for (name, expected) in [
            ("./a/b/", "a/b"),
            ("/a//b/./c", "a/b/c"),
            ("a/../b", "b"),
            ("./", ""),
            ("/", ""),
            ("a/b/../../c", "c"),
        ] {
            assert_eq!(clean(name).as_deref(), Ok(expected), "{name}");
        }
    }

    #[test]
    fn name_that_climbs_above_the_root_is_refused() {
        for name in ["..", "../a", "/../a", "a/../../b", "./../a"] {
            assert_eq!(clean(name), Err(PathProblem::Escapes), "{name}");
        }
    }

    #[test]
    fn name_beyond_the_kernels_limits_is_refused() {
        assert_eq!(clean(&"a".repeat(256)), Err(PathProblem::NameTooLong));
        assert_eq!(clean(&"a/".repeat(2048)), Err(PathProblem::PathTooLong));
        assert!(clean(&"a/".repeat(2047)).is_ok());
    }

    #[test]
    fn whiteout_names_are_told_apart() {
        let parents = || vec![&b"d"[..]];
        assert_eq!(target(b"d/.wh.x"), Ok(Target::Whiteout(parents(), b"x")));
        assert_eq!(target(b"d/.wh..wh..opq"), Ok(Target::Opaque(parents())));
        assert_eq!(target(b".wh..wh.plnk/1"), Ok(Target::Skip));
        assert_eq!(target(b"d/.wh..wh.aufs"), Ok(Target::Skip));
        assert_eq!(target(b"d/.wh.x/y"), Err(PathProblem::BadWhiteout));
        for bad in [&b".wh."[..], b".wh..", b".wh..."] {
            assert_eq!(target(bad), Err(PathProblem::BadWhiteout));
        }
        assert_eq!(target(b"d/.whx"), Ok(Target::File(vec![b"d", b".whx"])));
    }
}
