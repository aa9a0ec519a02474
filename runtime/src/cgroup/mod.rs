//! Control groups on v1, hybrid and v2.

use std::path::{Path, PathBuf};

/// How the machine's cgroup hierarchies are laid out under `/sys/fs/cgroup`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One hierarchy for each controller.
    V1,
    /// As [`Layout::V1`], with a v2 hierarchy beside them.
    Hybrid,
    /// The one unified hierarchy.
    V2,
}

/// Why a cgroup operation failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file or directory of the cgroup file system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// One container's cgroup, in every hierarchy where it has one.
#[derive(Debug)]
pub struct Cgroup {
    directories: Vec<PathBuf>,
}

impl Cgroup {
    /// The cgroup of this path (absolute within the hierarchy, e.g. `/cloche/ID`) as it exists now, in whichever
    /// hierarchies it exists; possibly none.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        let _ = path;
        Ok(Self { directories: Vec::new() })
    }

    /// Its directories, one for each hierarchy.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.directories.iter().map(PathBuf::as_path)
    }

    /// Kills every process in it and below it.
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        Ok(())
    }

    /// Removes it and whatever is below it. It must be empty of processes, or emptying.
    pub fn delete(self) -> Result<(), CgroupError> {
        Ok(())
    }
}
