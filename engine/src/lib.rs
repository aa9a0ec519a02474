//! Sandboxes and their life: from a request to a running, attended, recorded sandbox under either isolation, and what
//! can be asked about it afterwards.
//!
//! The engine knows neither arguments nor output formats (that is the command line's part), nor how a container or a
//! VM is built (that is `cloche-runtime`'s and `cloche-vmm`'s).
//!
//! ```text
//!  request ─▶ run ─▶ spec ─▶ isolation::{container, vm} ─▶ monitor ─▶ outcome
//!              └─▶ sandboxes (records on disk, reconcile) ◀─ steering, stats (other processes)
//! ```

pub mod changes;
pub mod compare;
pub mod doctor;
pub mod home;
pub mod isolation;
mod monitor;
pub mod mounts;
pub mod record;
pub mod request;
pub mod rootless;
pub mod run;
pub mod sandboxes;
pub mod signals;
pub mod sources;
mod spec;
pub mod stats;
pub mod steering;
pub mod syscalls;
pub mod trace;
pub mod volumes;

pub use cloche_runtime::chain;
pub use isolation::vm::{INITRAMFS, oci::OciVm};
