//! Extended attributes by which a converted layer says what a file system by itself cannot. Names that start like these
//! come from no archive: they are dropped there.

/// What all marks start with.
pub(crate) const PREFIX: &[u8] = b"trusted.overlay.";
/// The directory hides what lower layers have in it.
pub(crate) const OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// The directory has no entry of its own.
pub(crate) const IMPLIED: &[u8] = b"trusted.overlay.cloche.implied";
/// The file is a further name of the file of lower layers whose path this is.
pub(crate) const LINK: &[u8] = b"trusted.overlay.cloche.link";
/// At the root: there are such files.
pub(crate) const HAS_LINKS: &[u8] = b"trusted.overlay.cloche.has-links";
