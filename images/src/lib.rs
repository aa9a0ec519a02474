//! OCI images: archives in, a content store on disk, and each layer as an EROFS file system.
//!
//! ```text
//!   archive ──▶ load ──▶ layer (tar, erofs) ──▶ store ──▶ image,       rootfs (merge)
//!               what is in it    conversion      on disk    what it holds   its layers as one file system
//! ```
//!
//! This crate knows nothing of VMs, containers or mounts: it hands out paths of layer blobs and the image's
//! configuration, and its callers do the rest. Everything that comes from an image is hostile until it is checked;
//! the bounds are in `limits`.

// What an image can reach must not panic. (Tests may.)
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

mod bounded;
mod built;
mod change;
mod clock;
mod commit;
mod diff;
mod digest;
mod erofs;
mod flatten;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod image;
mod import;
mod inspect;
mod layer;
mod layers;
mod limits;
mod load;
mod merge;
pub mod reference;
pub mod registry;
mod remove;
mod rootfs;
mod save;
mod store;
mod tar;
mod travel;
mod tree;
mod unpack;
mod upkeep;
mod view;

pub use bounded::{Bounded, Sizes};
pub use built::{BuildError, CachedStep, Changes, LayerWriter, StoredLayer};
pub use change::{Change, ParseChangeError, ports, set_env};
pub use clock::{EpochError, epoch, timestamp};
pub use commit::{AddError, Commit, CommitError, Settings};
pub use diff::{DiffError, Difference, RootError};
pub use digest::{Digest, ParseDigestError};
pub use erofs::BlobError;
pub use image::{Image, Layer};
pub use import::ImportError;
pub use inspect::{Inspect, InspectConfig, InspectRootFs};
pub use layer::{DecodeError, LayerError, PathProblem};
pub use layers::{HistoryEntry, LayerReport, LayersError};
pub use load::{LayerStart, LoadError, LoadOptions, Loaded, NoProgress, Progress};
pub use merge::MergeError;
pub use reference::{Reference, ReferenceError};
pub use remove::{bytes_below, remove_tree};
pub use rootfs::RootFs;
pub use save::SaveError;
pub use store::{Hold, RemoveError, Removed, ResolveError, StepUsage, Store, StoreError};
pub use tar::{TarError, TarProblem};
pub use travel::TravelError;
pub use unpack::{LeftOut, Owners, UnpackError, unpack};
pub use upkeep::{Damage, Pruned, Usage};
pub use view::{FileInfo, FileKind, Node, Resolved, View};
