//! Mirrors: other places that serve what a registry has. They are asked first, one after the other, and the registry
//! itself if none of them serves. Nothing is pushed to one.
//!
//! They are named by `CLOCHE_REGISTRY_MIRRORS` (`HOST=URL`, any number, with blanks between them), or else, as Docker
//! has it, by `registry-mirrors` in `/etc/docker/daemon.json`, which are docker.io's.
//!
//! A mirror says what a tag stands for, so it is trusted as much as the registry. What an image's name has a digest of
//! is checked as ever.

use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;

use super::client::{RegistryOptions, Repository};
use super::pull::{PullError, Pulled, Transfer};
use super::url::Url;
use crate::reference::Reference;
use crate::store::Store;

/// The registry whose mirrors Docker's configuration names.
const DOCKER: &str = "docker.io";
const VARIABLE: &str = "CLOCHE_REGISTRY_MIRRORS";
const DAEMON: &str = "/etc/docker/daemon.json";
/// Nobody writes a longer one.
const MAX_DAEMON_BYTES: u64 = 1 << 20;

/// Which registries have mirrors, and where those are. The default is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mirrors(Vec<(String, Mirror)>);

/// Where a mirror is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mirror(pub(super) Url);

/// Mirrors that cannot be used as they are written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MirrorError {
    /// A word is none.
    #[error(
        "{VARIABLE} has {word:?}: {problem}; write HOST=https://MIRROR, such as docker.io=https://mirror.example"
    )]
    Variable {
        /// As it is written.
        word: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// Docker's configuration has one that is none.
    #[error(
        "registry-mirrors in {DAEMON} has {url:?}: {problem}; set {VARIABLE}, if only to nothing, to do without it"
    )]
    Daemon {
        /// As it is written.
        url: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// Docker's configuration cannot be read.
    #[error("cannot read {DAEMON}; set {VARIABLE}, if only to nothing, to do without it")]
    Unreadable(#[source] io::Error),
}

impl Mirrors {
    /// Those of this process's environment, or of this machine's Docker.
    pub fn of_environment() -> Result<Mirrors, MirrorError> {
        match std::env::var(VARIABLE) {
            Ok(text) => Mirrors::parse(&text),
            Err(_) => Mirrors::of_daemon(Path::new(DAEMON)),
        }
    }

    /// As the variable would say.
    pub fn parse(text: &str) -> Result<Mirrors, MirrorError> {
        let one = |word: &str| {
            let bad = |problem| MirrorError::Variable { word: word.to_owned(), problem };
            let (domain, url) = word.split_once('=').ok_or_else(|| bad("it names no registry"))?;
            // As in image names, where a first part without dot or port is none.
            let known = format!("{domain}/x").parse::<Reference>().ok();
            if known.is_none_or(|known| known.domain() != domain) {
                return Err(bad("it begins with no registry's host"));
            }
            Ok((domain.to_owned(), Mirror::parse(url).map_err(bad)?))
        };
        Ok(Mirrors(text.split_whitespace().map(one).collect::<Result<_, _>>()?))
    }

    fn of_daemon(path: &Path) -> Result<Mirrors, MirrorError> {
        #[derive(Deserialize)]
        struct Daemon {
            #[serde(default, rename = "registry-mirrors")]
            mirrors: Vec<String>,
        }
        let content = match fs::metadata(path) {
            Ok(metadata) if metadata.len() > MAX_DAEMON_BYTES => Err(io::Error::other("it is too long")),
            Ok(_) => fs::read(path),
            Err(error) => Err(error),
        };
        let content = match content {
            // Who may not read it is not meant by it.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::PermissionDenied
                ) =>
            {
                return Ok(Mirrors::default());
            }
            result => result.map_err(MirrorError::Unreadable)?,
        };
        let daemon: Daemon =
            serde_json::from_slice(&content).map_err(io::Error::from).map_err(MirrorError::Unreadable)?;
        let one = |url: String| match Mirror::parse(&url) {
            Ok(mirror) => Ok((DOCKER.to_owned(), mirror)),
            Err(problem) => Err(MirrorError::Daemon { url, problem }),
        };
        Ok(Mirrors(daemon.mirrors.into_iter().map(one).collect::<Result<_, _>>()?))
    }

    fn of<'a>(&'a self, domain: &'a str) -> impl Iterator<Item = &'a Mirror> {
        self.0.iter().filter(move |(of, _)| of == domain).map(|(_, mirror)| mirror)
    }
}

impl Mirror {
    fn parse(text: &str) -> Result<Mirror, &'static str> {
        let url = Url::parse(text).ok_or("it is no URL of a mirror")?;
        if url.target != "/" {
            return Err("a mirror is a host, without a path");
        }
        Ok(Mirror(url))
    }
}

/// Whether somebody else may serve what failed here: all but what is this machine's own trouble.
fn is_theirs(error: &PullError) -> bool {
    !matches!(error, PullError::Disk { .. } | PullError::Store(_) | PullError::Thread(_) | PullError::Stopped)
}

impl Store {
    /// Pulls from the registry's mirrors, as far as there are any, or else from itself. `failed` is told of a mirror
    /// that does not serve, and why; what came from it and was right is kept.
    pub fn pull_from_any(
        &self,
        reference: &Reference,
        options: &RegistryOptions,
        progress: &dyn Transfer,
        failed: &dyn Fn(&str, PullError),
    ) -> Result<Pulled, PullError> {
        for mirror in options.mirrors.of(reference.domain()) {
            let pulled = Repository::open_mirror(reference, mirror, options)
                .map_err(PullError::from)
                .and_then(|repository| self.pull(reference, &repository, progress));
            match pulled {
                Err(error) if is_theirs(&error) => failed(&mirror.0.authority(), error),
                result => return result,
            }
        }
        let repository = Repository::open(reference, false, options)?;
        self.pull(reference, &repository, progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(mirrors: &Mirrors, domain: &str) -> Vec<String> {
        mirrors.of(domain).map(|mirror| mirror.0.origin()).collect()
    }

    #[test]
    fn mirrors_are_those_of_their_registry_in_order() {
        let text =
            "docker.io=https://a.example localhost:5000=http://127.0.0.1:5001/\n docker.io=https://b:444";
        let mirrors = Mirrors::parse(text).unwrap();
        assert_eq!(hosts(&mirrors, "docker.io"), ["https://a.example", "https://b:444"]);
        assert_eq!(hosts(&mirrors, "localhost:5000"), ["http://127.0.0.1:5001"]);
        assert!(hosts(&mirrors, "quay.io").is_empty());
        assert_eq!(Mirrors::parse(" ").unwrap(), Mirrors::default());
        for bad in [
            "https://a.example",
            "docker.io=a.example",
            "docker.io=https://a.example/path",
            "docker.io=https://me:secret@a.example",
            "library=https://a.example",
            "=https://a.example",
        ] {
            let error = Mirrors::parse(bad).unwrap_err().to_string();
            assert!(error.contains(bad), "{error}");
        }
    }

    #[test]
    fn dockers_mirrors_are_its_own_registrys() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("daemon.json");
        assert_eq!(Mirrors::of_daemon(&path).unwrap(), Mirrors::default());
        fs::write(&path, r#"{"debug": true, "registry-mirrors": ["https://mirror.example"]}"#).unwrap();
        assert_eq!(hosts(&Mirrors::of_daemon(&path).unwrap(), "docker.io"), ["https://mirror.example"]);
        for bad in ["{", r#"{"registry-mirrors": ["https://a.example/b"]}"#, r#"{"registry-mirrors": 1}"#] {
            fs::write(&path, bad).unwrap();
            assert!(Mirrors::of_daemon(&path).is_err(), "{bad}");
        }
    }
}
