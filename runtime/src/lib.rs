//! Linux containers: an OCI runtime spec and a root file system become a confined process.
//!
//! The same code runs on the host, called by the single-threaded `cloche` process, and in the guest, called by
//! the agent that is PID 1 there. It starts no threads, no programs but `newuidmap` and `newgidmap`, and knows nothing of
//! images, virtual machines or sandbox state on disk.
//!
//! ```text
//!  launch()                                     child, in its new namespaces
//!    check the spec, compile seccomp              rootfs ▸ pivot_root ▸ mounts ▸ devices ▸ masks
//!    create the cgroup, set limits                rlimits ▸ user ▸ capabilities ▸ seccomp
//!    clone3 ──────────────────────────────────▶   execve
//!    read the error pipe ◀────────────────────    end of file = running; else exit code and message
//! ```

pub mod cgroup;
mod changes;
mod console;
mod container;
mod devices;
mod entry;
pub mod hooks;
mod init;
mod join;
mod launch;
mod mounts;
mod namespaces;
mod process;
mod procfs;
pub mod pump;
mod rootfs;
mod seccomp;
mod spec_check;
mod syscalls;
mod sysctls;
mod user_namespace;
mod verdict;

pub use changes::Changes;
pub use console::{receive as receive_terminal, send as send_terminal};
pub use container::{Container, Exit, ExitStatus, WaitError, wait_for};
pub use join::{Join, Joined, join};
pub use launch::{
    Created, HookState, Launch, LaunchError, Listener, Lower, Oci, Rootfs, Stdio, cgroup_path, check, launch,
};
pub use mounts::{
    MOUNT_OPTIONS, MountError, OptionError, destination, make_mount_points, protect::make_mount_readonly,
};
pub use namespaces::NamespaceError;
pub use process::capabilities::names as capability_names;
pub use rootfs::RootfsError;
pub use seccomp::{ACTIONS as SECCOMP_ACTIONS, Filter, SeccompError};
pub use spec_check::{SpecError, check as check_spec};
pub use syscalls::{
    Cloned, clone3, close_all_but, pidfd_send_signal as send_signal, signal_descriptor, unblock_signals,
};
pub use sysctls::SysctlError;
pub use user_namespace::{UserNamespaceError, WorkError, as_root_of, is_machine_root};
pub use verdict::{chain, listener_in, take_listener};
