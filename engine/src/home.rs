//! Where Cloche keeps things: what must last (images) and what dies with the machine (sandboxes).
//!
//! | | root | anybody else |
//! |---|---|---|
//! | lasting | `/var/lib/cloche` | `$XDG_DATA_HOME/cloche`, else `~/.local/share/cloche` |
//! | running | `/run/cloche` | `$XDG_RUNTIME_DIR/cloche`, else `~/.local/state/cloche` |
//!
//! (XDG Base Directory Specification 0.8.) `XDG_RUNTIME_DIR` counts if it is this user's own: after `su` it is not.

use std::{
    env, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The two directories that everything on disk lives under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    root: PathBuf,
    state: PathBuf,
}

/// Nobody knows where a user's files belong.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "neither HOME nor {variable} says where this user's {what} belong; set one of them, or give {option} DIR"
)]
pub struct HomeError {
    variable: &'static str,
    what: &'static str,
    option: &'static str,
}

/// What the defaults follow from.
#[derive(Debug, Clone, Default)]
struct User {
    is_root: bool,
    home: Option<PathBuf>,
    data_home: Option<PathBuf>,
    runtime_dir: Option<PathBuf>,
}

impl User {
    fn calling() -> Self {
        let directory = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let uid = rustix::process::geteuid();
        let is_own = |path: &PathBuf| {
            fs::metadata(path).is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == uid.as_raw())
        };
        Self {
            is_root: uid.is_root(),
            home: directory("HOME"),
            data_home: directory("XDG_DATA_HOME"),
            runtime_dir: directory("XDG_RUNTIME_DIR").filter(is_own),
        }
    }

    fn root(&self) -> Result<PathBuf, HomeError> {
        if self.is_root {
            return Ok("/var/lib/cloche".into());
        }
        let missing = HomeError { variable: "XDG_DATA_HOME", what: "images", option: "--root" };
        self.below_home(&self.data_home, ".local/share", missing)
    }

    fn state(&self) -> Result<PathBuf, HomeError> {
        if self.is_root {
            return Ok("/run/cloche".into());
        }
        let missing = HomeError { variable: "XDG_RUNTIME_DIR", what: "running sandboxes", option: "--state" };
        self.below_home(&self.runtime_dir, ".local/state", missing)
    }

    fn below_home(
        &self,
        named: &Option<PathBuf>,
        otherwise: &str,
        missing: HomeError,
    ) -> Result<PathBuf, HomeError> {
        let base = named.clone().or_else(|| Some(self.home.as_ref()?.join(otherwise)));
        base.map(|base| base.join("cloche")).ok_or(missing)
    }
}

impl Home {
    /// In these two directories, neither of which needs to exist yet; by default, in those of the calling user.
    pub fn new(root: Option<PathBuf>, state: Option<PathBuf>) -> Result<Self, HomeError> {
        Self::of(&User::calling(), root, state)
    }

    fn of(user: &User, root: Option<PathBuf>, state: Option<PathBuf>) -> Result<Self, HomeError> {
        Ok(Self {
            root: root.map_or_else(|| user.root(), Ok)?,
            state: state.map_or_else(|| user.state(), Ok)?,
        })
    }

    /// The image store's directory.
    pub fn images(&self) -> &Path {
        &self.root
    }

    /// The directory of what runs.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The directory that holds one directory per volume.
    pub fn volumes(&self) -> PathBuf {
        self.root.join("volumes")
    }

    /// The directory of a plain user's unpacked layers.
    pub fn trees(&self) -> PathBuf {
        self.root.join("trees")
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

#[cfg(test)]
mod tests {
    use super::*;

    fn home(user: &User) -> Result<(String, String), HomeError> {
        let home = Home::of(user, None, None)?;
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        Ok((text(home.images()), text(&home.sandboxes())))
    }

    fn both(root: &str, state: &str) -> (String, String) {
        (root.into(), state.into())
    }

    #[test]
    fn root_and_plain_users_have_directories_of_their_own() {
        let root = User { is_root: true, home: Some("/root".into()), ..User::default() };
        assert_eq!(home(&root).unwrap(), both("/var/lib/cloche", "/run/cloche/sandboxes"));
        let mut user = User { home: Some("/home/u".into()), ..User::default() };
        let expected = both("/home/u/.local/share/cloche", "/home/u/.local/state/cloche/sandboxes");
        assert_eq!(home(&user).unwrap(), expected);
        user.data_home = Some("/data".into());
        user.runtime_dir = Some("/run/user/1000".into());
        assert_eq!(home(&user).unwrap(), both("/data/cloche", "/run/user/1000/cloche/sandboxes"));
    }

    #[test]
    fn user_without_a_home_is_told_what_to_give() {
        let mut user = User::default();
        assert!(home(&user).unwrap_err().to_string().ends_with("give --root DIR"));
        user.data_home = Some("/data".into());
        assert!(home(&user).unwrap_err().to_string().contains("XDG_RUNTIME_DIR"));
        let given = Home::of(&User::default(), Some("/a".into()), Some("/b".into())).unwrap();
        assert_eq!(given.images(), Path::new("/a"));
    }
}
