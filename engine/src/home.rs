//! Where Cloche keeps things: what must last (images) and what dies with the machine (sandboxes).

use std::path::{Path, PathBuf};

/// The two directories that everything on disk lives under.
#[derive(Debug, Clone)]
pub struct Home {
    root: PathBuf,
    state: PathBuf,
}

impl Home {
    /// Default of the lasting directory.
    pub const DEFAULT_ROOT: &str = "/var/lib/cloche";
    /// Default of the run-time directory; on a tmpfs, so that a reboot clears it.
    pub const DEFAULT_STATE: &str = "/run/cloche";

    /// A home in these two directories; neither needs to exist yet.
    pub fn new(root: PathBuf, state: PathBuf) -> Self {
        Self { root, state }
    }

    /// The image store's directory.
    pub fn images(&self) -> &Path {
        &self.root
    }

    /// The directory that holds one directory per volume.
    pub fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }

    /// The directory that holds one directory per sandbox.
    pub fn sandboxes(&self) -> PathBuf {
        self.state.join("sandboxes")
    }
}

/// The directory for what is slow to make again: `$XDG_CACHE_HOME/cloche`, else `~/.cache/cloche`.
pub fn cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    base.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or("/root".into())).join(".cache"))
        .join("cloche")
}
