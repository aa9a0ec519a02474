//! Which guest kernel a VM boots.

use std::path::{Path, PathBuf};

use crate::home::cache_dir;

/// Why there is no kernel to boot.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// `--kernel` names no file.
    #[error("kernel `{}` cannot be read; --kernel takes a vmlinux or bzImage file", path.display())]
    Unreadable {
        /// The file asked for.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// No kernel was built yet.
    #[error("no guest kernel is built ({} is missing); run `cloche kernel build`, or give one with --kernel", .0.display())]
    NotBuilt(PathBuf),
}

/// The directory that holds one directory for each guest kernel built, named by the hash of what went into it, and
/// the link `default` to the one that VMs boot.
pub fn kernels_dir() -> PathBuf {
    cache_dir().join("kernels")
}

/// The kernel asked for, else the one built last.
pub fn find(asked: Option<&Path>) -> Result<PathBuf, KernelError> {
    if let Some(path) = asked {
        return match std::fs::File::open(path) {
            Ok(_) => Ok(path.to_owned()),
            Err(source) => Err(KernelError::Unreadable { path: path.to_owned(), source }),
        };
    }
    let built = kernels_dir().join("default/vmlinux");
    if built.is_file() { Ok(built) } else { Err(KernelError::NotBuilt(built)) }
}
