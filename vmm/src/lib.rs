//! One microVM in one process: [`run`] takes a [`VmConfig`], builds the machine on KVM, and returns when it has ended.
//!
//! It knows nothing of images, containers or the engine. The engine starts the `cloche` binary as `cloche vmm`, which
//! calls [`run`], and reads [`event::Event`]s from a pipe.
//!
//! ```text
//!   machine   builder, vCPU threads, event loop, end       knows everything below
//!   boot      kernel, initramfs, tables in guest memory    knows files and guest memory
//!   devices   serial port, exit port                       know only their registers
//!   virtio    MMIO transport and the devices behind it    know guest memory and backends
//!   control   schema and framing of the control socket     knows no machine
//!   backends  files, sockets, randomness                   know only the host
//! ```

mod backends;
mod boot;
mod devices;
mod guest_memory;
pub mod jail;
mod machine;
mod mailbox;
mod rate_limit;
mod syscalls;
mod virtio;

pub mod config;
pub mod control;
pub mod event;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;

pub use backends::tap::{TapError, attach as attach_tap};
pub use config::VmConfig;
pub use event::{Event, ExitReason};
pub use jail::{Jail, JailError};
pub use machine::{BuildError, CreateError, LoadError, OpenError, RunError, VmError, monotonic_ns, run};
