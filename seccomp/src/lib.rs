//! Seccomp as the kernel has it: a [`bpf::Policy`], with a decision for each system call number, becomes a BPF program,
//! which [`install`] puts into force. What a policy says is its owner's business: the container runtime's comes from an
//! OCI spec, the VMM's from its own table.

pub mod bpf;
pub mod i386_table;
#[cfg(feature = "interpreter")]
pub mod interpreter;
mod kernel;
pub mod syscall_table;

pub use kernel::{install, install_with_listener};
