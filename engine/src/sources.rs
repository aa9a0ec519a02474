//! The host's side of a request's mounts: what must exist is looked for, what may be made is made.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use cloche_share::Shared;
use rustix::fs::{StatVfsMountFlags, statvfs};

use crate::{
    mounts::{MountRequest, MountSource},
    volumes::{Held, VolumeError, Volumes},
};

/// Why a mount's source cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A volume cannot be had.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Nothing is there.
    #[error(
        "cannot mount {} at {target}: the source does not exist; make it, or use -v, which makes a directory",
        path.display()
    )]
    Missing {
        /// Path on the host.
        path: PathBuf,
        /// Path in the sandbox.
        target: String,
    },
    /// It is no file that two kernels could share.
    #[error(
        "cannot mount {} at {target}: it is neither a regular file nor a directory; --isolation container mounts it",
        path.display()
    )]
    Special {
        /// Path on the host.
        path: PathBuf,
        /// Path in the sandbox.
        target: String,
    },
    /// It cannot be looked at or made.
    #[error("cannot {action} {} to mount it at {target}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// Path on the host.
        path: PathBuf,
        /// Path in the sandbox.
        target: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A mount whose source is there.
#[derive(Debug)]
pub struct Source {
    /// What was asked for.
    pub request: MountRequest,
    /// What of the host is mounted; empty for a tmpfs.
    pub path: PathBuf,
    /// Its number among those that a VM's file server serves; `None` for a tmpfs.
    pub share: Option<usize>,
    /// Whether it is an empty volume, to be filled with what the image has at the target.
    pub fill: bool,
    /// Flags of the mount that it lies on, as options: a bind keeps them, and a guest has to be told.
    pub inherited: Vec<&'static str>,
    /// Held for its lock; of several that are one volume, by the first.
    volume: Option<Held>,
}

impl Source {
    /// Makes sure that the sources of `requests` are there, and stay there as long as the result lives; in the order
    /// in which they are to be mounted.
    pub fn find_all(requests: &[MountRequest], volumes: &Volumes) -> Result<Vec<Self>, SourceError> {
        // As Docker: what is mounted below another mount comes after it.
        let mut ordered: Vec<&MountRequest> = requests.iter().collect();
        ordered.sort_by_key(|request| request.target.matches('/').count());
        let mut fillers = BTreeMap::new();
        for request in &ordered {
            if let MountSource::Volume { name, copy } = &request.source {
                *fillers.entry(name.as_str()).or_insert(false) |= *copy && !request.read_only;
            }
        }
        // In one order, whoever starts: each may have to wait until another sandbox has filled a volume.
        let hold = |(name, fills)| Ok((name, volumes.hold(name, fills)?));
        let mut held: BTreeMap<_, _> = fillers.into_iter().map(hold).collect::<Result<_, VolumeError>>()?;
        let empty: BTreeSet<_> = held.iter().filter(|(_, held)| held.fill).map(|(name, _)| *name).collect();
        let mut shares = 0..;
        let mut found: Vec<Self> = Vec::new();
        for request in ordered {
            let share = if request.is_tmpfs() { None } else { shares.next() };
            let mut volume = None;
            let mut fill = false;
            if let MountSource::Volume { name, copy } = &request.source {
                fill = *copy && !request.read_only && empty.contains(name.as_str());
                volume = held.remove(name.as_str());
            }
            found.push(Self { fill, volume, ..Self::find(request, share, volumes)? });
        }
        Ok(found)
    }

    /// The program runs, so what was to be filled is.
    pub fn filled(&mut self) -> Result<(), VolumeError> {
        self.volume.as_mut().map_or(Ok(()), Held::filled)
    }

    fn find(request: &MountRequest, share: Option<usize>, volumes: &Volumes) -> Result<Self, SourceError> {
        let target = || request.target.clone();
        let (path, inherited) = match &request.source {
            MountSource::Tmpfs { .. } => (PathBuf::new(), Vec::new()),
            MountSource::Volume { name, .. } => (volumes.data(name), Vec::new()),
            MountSource::Bind { path, create } => {
                let failed = |action| {
                    move |source| SourceError::Io { action, path: path.clone(), target: target(), source }
                };
                match fs::metadata(path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound && *create => {
                        fs::create_dir_all(path).map_err(failed("make the directory"))?;
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        return Err(SourceError::Missing { path: path.clone(), target: target() });
                    }
                    result => {
                        result.map_err(failed("look at"))?;
                    }
                }
                (path.clone(), inherited_flags(path).map_err(failed("look at"))?)
            }
        };
        Ok(Self { request: request.clone(), path, share, fill: false, inherited, volume: None })
    }

    /// Refuses what a virtual machine cannot be given.
    pub fn check_for_vm(&self) -> Result<(), SourceError> {
        if self.request.is_tmpfs() {
            return Ok(());
        }
        let metadata = fs::metadata(&self.path).map_err(|source| SourceError::Io {
            action: "look at",
            path: self.path.clone(),
            target: self.request.target.clone(),
            source,
        })?;
        if metadata.is_file() || metadata.is_dir() {
            return Ok(());
        }
        Err(SourceError::Special { path: self.path.clone(), target: self.request.target.clone() })
    }

    /// The spec's mount of it, where it is called `origin`.
    pub(crate) fn to_spec(&self, origin: &Path) -> serde_json::Value {
        let fill = self.fill.then_some("copyup");
        let options: Vec<&str> = self.inherited.iter().copied().chain(fill).collect();
        self.request.to_spec(origin, &options)
    }

    /// For a VM's file server; `None` if it is no file of the host.
    pub(crate) fn shared(&self) -> Option<Shared> {
        self.share?;
        Some(Shared { path: self.path.clone(), recursive: true, read_only: self.request.read_only })
    }
}

/// Flags of the mount that a file lies on, as options: a bind keeps them, and a guest has to be told.
pub(crate) fn inherited_flags(path: &Path) -> io::Result<Vec<&'static str>> {
    let flags = statvfs(path)?.f_flag;
    let known = [
        (StatVfsMountFlags::NOSUID, "nosuid"),
        (StatVfsMountFlags::NODEV, "nodev"),
        (StatVfsMountFlags::NOEXEC, "noexec"),
    ];
    Ok(known.into_iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, option)| option).collect())
}
