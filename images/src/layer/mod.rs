//! Layers: one streaming pass from a tar archive (plain, gzip or zstd) to an EROFS blob, checked on the way.
//!
//! ```text
//!  source ──▶ hash, decompress ──▶ channel ──▶ hash ──▶ tar entries ──┬─ file data ──▶ blob, as they come
//!             (one thread)                     (the other thread)     └─ names, attributes ──▶ tree ──▶ blob, at the end
//! ```
//!
//! What an archive's entries mean is decided here (OCI image-spec: layer.md):
//!
//! * Names are cleaned lexically; a leading `/` is dropped; a name that climbs above the root is refused.
//! * A later entry replaces an earlier one of the same name; a directory entry upon a directory keeps the children.
//! * An entry below a symbolic link of the same layer goes where the link leads within the layer's root, which is
//!   the container's root: absolute targets start there and `..` stops there, as in umoci. An entry below anything
//!   else that is no directory is refused. Links of *lower* layers are followed where the layers are merged, since a
//!   layer is converted by itself.
//! * Directories without an entry are made: mode 0755, owner 0:0, time 0, and the mark `trusted.overlay.cloche.implied`,
//!   by which the merge of layers can tell that they say nothing about a lower layer's directory. (overlayfs ignores
//!   and hides the attribute.)
//! * A hard link is another name of an earlier entry of the same layer; its own attributes are not looked at. If there
//!   is none, it is a file of a lower layer: an empty file with the target in `trusted.overlay.cloche.link` stands for
//!   it, and the root has the mark `trusted.overlay.cloche.has-links`.
//! * `.wh.NAME` becomes overlayfs' whiteout, a character device 0:0, unless the layer itself has NAME: a layer's
//!   whiteouts apply to lower layers only. If NAME is a directory here, it becomes opaque.
//!   `.wh..wh..opq` makes its directory opaque (`trusted.overlay.opaque=y`). Other `.wh..wh.*` names are AUFS' own
//!   and are skipped with all below them. Any other name that starts with `.wh.` is refused.
//! * Attributes `trusted.overlay.*` and `user.overlay.*` would steer overlayfs and are dropped, as umoci does;
//!   so are those in namespaces that Linux files cannot have (macOS' `com.apple.*`), and `user.*` on anything but
//!   files and directories, where Linux does not allow them.

mod builder;
mod convert;
mod decode;
pub(crate) mod marks;
mod path;
mod recipe;
mod summary;
pub(crate) mod walk;

pub(crate) use builder::{EntryProblem, IMPLIED_ATTRIBUTES};
pub use convert::LayerError;
pub(crate) use convert::{ExpectedLayer, adopt, blame, check, convert};
pub use decode::DecodeError;
pub(crate) use decode::{Encoding, decompressor, detect};
pub use path::PathProblem;
pub(crate) use recipe::Rebuilt;
pub(crate) use summary::{LayerPath, Summary, summarise};
