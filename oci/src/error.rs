//! Why a verb failed.

use std::{io, path::PathBuf};

use cloche_runtime::{LaunchError, WaitError, cgroup::CgroupError, hooks::HookError};

/// Why a verb failed. The wording of the first group is what callers of OCI runtimes look for.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("container does not exist: {0}")]
    NoContainer(String),
    #[error("container with given ID already exists: {0}")]
    Exists(String),
    #[error("container not running: {0} is {1}")]
    NotRunning(String, &'static str),
    #[error("cannot {action} container {id} in the {status} state{hint}")]
    Status { action: &'static str, id: String, status: &'static str, hint: &'static str },
    #[error("container not paused: {0}")]
    NotPaused(String),
    #[error(
        "invalid container ID {0:?}: it must not be empty, longer than 1024 bytes, `.`, `..`, or have characters other \
         than letters, digits, `_`, `+`, `-`, `.`"
    )]
    Id(String),
    #[error("cannot {action} {path}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("JSON specification file {path} not found")]
    NoConfig { path: PathBuf, source: io::Error },
    #[error("cannot read {path}: it is not a usable OCI configuration")]
    Config { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("{0}")]
    Request(String),
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
    #[error("unable to start container process: {message}")]
    Start { exit_code: u8, message: String },
    #[error("unable to start container process")]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Wait(#[from] WaitError),
    #[error(transparent)]
    Hook(#[from] HookError),
}

impl Error {
    /// Exit code for a command line where a program cannot be run, as shells have it: 127 or 126. None for other errors.
    pub fn exit_code(&self) -> Option<u8> {
        match self {
            Self::Start { exit_code: code @ (126 | 127), .. } => Some(*code),
            Self::Launch(error) if error.exit_code() != 125 => Some(error.exit_code()),
            _ => None,
        }
    }
}

/// An I/O error with the file that it is about.
pub(crate) fn of_file<E: Into<io::Error>>(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(E) -> Error {
    let path = path.into();
    move |source| Error::File { action, path, source: source.into() }
}

/// An I/O error of something without a name.
pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::System(action, source.into())
}
