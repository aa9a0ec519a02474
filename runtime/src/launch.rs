//! The parent's half of a start: everything up to `clone3`, and the wait for the child's verdict.

use std::{os::fd::OwnedFd, path::PathBuf};

use oci_spec::runtime::Spec;

use crate::container::Container;

/// What to start.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Sandbox id; names the cgroup when the spec does not.
    pub id: &'a str,
    /// The OCI runtime spec. `root.path` is not read: [`Launch::rootfs`] takes its place.
    pub spec: &'a Spec,
    /// The root file system.
    pub rootfs: Rootfs,
    /// What becomes the process's file descriptors 0, 1 and 2.
    pub stdio: Stdio,
    /// Whether the kernel kills the process when the caller's process dies.
    pub kill_on_parent_death: bool,
}

/// Where the container's root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rootfs {
    /// A directory, used as it is: what the container writes stays there.
    Directory(PathBuf),
    /// EROFS layers under a writable overlay that vanishes with the container's mount namespace.
    Layers {
        /// Block devices or EROFS image files, bottom layer first.
        lowers: Vec<PathBuf>,
        /// Size limit of the writable layer in bytes; `None` leaves tmpfs's default, half of the memory.
        upper_bytes: Option<u64>,
    },
}

/// File descriptors of the container's process.
#[derive(Debug)]
pub struct Stdio {
    /// Becomes file descriptor 0.
    pub stdin: OwnedFd,
    /// Becomes file descriptor 1.
    pub stdout: OwnedFd,
    /// Becomes file descriptor 2.
    pub stderr: OwnedFd,
}

/// Why a container could not be started. Nothing of it is left when this is returned.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The process failed between `clone3` and `execve`.
    #[error("{message}")]
    Setup {
        /// 127 not found, 126 not executable, 125 anything else.
        exit_code: u8,
        /// What failed, with the whole chain of causes.
        message: String,
    },
}

impl LaunchError {
    /// Exit code for a command line: 127 command not found, 126 found but not executable, 125 anything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Setup { exit_code, .. } => *exit_code,
        }
    }
}

/// Starts the container and returns once its `execve` has succeeded.
pub fn launch(launch: Launch<'_>) -> Result<Container, LaunchError> {
    let _ = launch;
    Err(LaunchError::Setup { exit_code: 125, message: "the runtime is under construction".into() })
}
