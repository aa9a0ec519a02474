//! Containers of a plain user: which users it has for them, and images as trees that it can mount.
//!
//! A user namespace maps the container's root to the user, and the ids from 1 on to those that /etc/subuid and
//! /etc/subgid give the user, by newuidmap and newgidmap. A user without an entry there has itself alone: all files are
//! the container's root's, and nothing runs as anybody else.
//!
//! A plain user cannot mount an image's EROFS files. So what its layers are merged to is unpacked once, by a process that
//! is root of such a user namespace, and the tree is overlayfs' lower directory (`cloche_images::unpack` says what cannot
//! be in it):
//!
//! ```text
//! ROOT/trees/                    mode 0700: set-user-ID files in it are nobody's to run
//!   lock                         held (flock) while trees are made, taken or removed
//!   MAP/HEX/root/                the tree of the root file system of this key, owners as this map has them
//!   MAP/HEX                      held (flock, shared) by each sandbox that runs from it
//!   MAP/.…                       one that is being made or removed
//! ```
//!
//! A tree goes when no image in the store has its layers, no sandbox runs from it, and somebody removes or prunes images.
//! Files of ids other than the user's can be removed from within the user namespace only, and are.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use cloche_images::{Image, LeftOut, Owners, RootFs, Store, StoreError, bytes_below, remove_tree, unpack};
use cloche_runtime::{WorkError, as_root_of, is_machine_root};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};
use rustix::{
    fs::{FlockOperation, flock, syncfs},
    process::{getegid, geteuid},
};

/// Why a plain user's container cannot have its root file system.
#[derive(Debug, thiserror::Error)]
pub enum RootlessError {
    /// The disk or its permissions are in the way.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The process that unpacks or removes trees could not do so.
    #[error("cannot {action} as root of a user namespace{hint}")]
    Work {
        /// What was attempted.
        action: &'static str,
        /// What could be done about it, or nothing.
        hint: &'static str,
        /// Why.
        #[source]
        source: WorkError,
    },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn io_error<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> RootlessError {
    let path = path.to_owned();
    move |source| RootlessError::Io { action, path, source: source.into() }
}

/// Who the users of a plain user's containers are on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMaps {
    /// First the user itself as 0, then those from 1 on.
    pub uids: Vec<LinuxIdMapping>,
    /// As `uids`.
    pub gids: Vec<LinuxIdMapping>,
}

impl IdMaps {
    /// Those of the calling user.
    pub fn of_caller() -> Self {
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        let name = account_name(&read("/etc/passwd"), uid);
        let ranges = |file| ranges(&read(file), name.as_deref(), uid);
        Self::of(uid, gid, &ranges("/etc/subuid"), &ranges("/etc/subgid"))
    }

    /// Users without groups, or groups without users, make no container.
    fn of(uid: u32, gid: u32, uids: &[Range], gids: &[Range]) -> Self {
        let (uids, gids) = if uids.is_empty() || gids.is_empty() { (&[][..], &[][..]) } else { (uids, gids) };
        Self { uids: maps(uid, uids), gids: maps(gid, gids) }
    }

    /// Whether there is nobody but the user itself.
    pub fn is_single(&self) -> bool {
        self.uids.len() == 1
    }

    /// Whether a group of the container is anybody on the host.
    pub fn has_group(&self, group: u32) -> bool {
        let of = |map: &LinuxIdMapping| group.wrapping_sub(map.container_id()) < map.size();
        self.gids.iter().any(of)
    }

    /// A directory name that no other maps have.
    fn name(&self) -> String {
        let text = |maps: &[LinuxIdMapping]| {
            let parts = maps.iter().map(|map| format!("{}+{}", map.host_id(), map.size()));
            parts.collect::<Vec<_>>().join(",")
        };
        format!("u{}-g{}", text(&self.uids), text(&self.gids))
    }
}

/// First id and how many.
type Range = (u32, u32);

fn maps(own: u32, ranges: &[Range]) -> Vec<LinuxIdMapping> {
    let mut next = 1;
    let mut maps = vec![mapping(0, own, 1)];
    for (start, count) in ranges {
        // The last id is no id.
        let count = (*count).min(u32::MAX - next);
        if count > 0 {
            maps.push(mapping(next, *start, count));
            next += count;
        }
    }
    maps
}

fn mapping(container: u32, host: u32, size: u32) -> LinuxIdMapping {
    LinuxIdMappingBuilder::default()
        .container_id(container)
        .host_id(host)
        .size(size)
        .build()
        // All fields have defaults.
        .unwrap_or_default()
}

fn read(path: &str) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

fn account_name(passwd: &str, uid: u32) -> Option<String> {
    let uid = uid.to_string();
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    })
}

/// A user's ranges (subuid(5)): `NAME:FIRST:COUNT` or `UID:FIRST:COUNT`. newuidmap knows nobody who has no name.
fn ranges(text: &str, name: Option<&str>, uid: u32) -> Vec<Range> {
    let Some(name) = name else { return Vec::new() };
    let uid = uid.to_string();
    let lines = text.lines().filter_map(|line| {
        let fields: Vec<&str> = line.trim().split(':').collect();
        let [owner, first, count] = fields.as_slice() else { return None };
        let range = (first.parse().ok()?, count.parse().ok()?);
        (*owner == name || *owner == uid).then_some(range)
    });
    lines.filter(|(_, count)| *count > 0).collect()
}

/// A tree that is not removed as long as this lives.
#[derive(Debug)]
pub struct Held {
    /// Its root.
    pub root: PathBuf,
    /// What of the image is not in it, if it was made just now.
    pub left_out: LeftOut,
    _lock: File,
}

/// What the trees of a store take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TreeUsage {
    /// How many there are.
    pub count: usize,
    /// Those that sandboxes run from.
    pub active: usize,
    /// Bytes on disk.
    pub bytes: u64,
}

/// The trees of one store.
#[derive(Debug)]
pub struct Trees {
    dir: PathBuf,
}

impl Trees {
    /// Those in this directory, which is made when the first tree is.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The tree of an image, unpacked from its root file system if it is not there yet. The caller holds the store.
    pub fn hold(&self, image: &Image, root_fs: &RootFs, maps: &IdMaps) -> Result<Held, RootlessError> {
        let dir = self.dir.join(maps.name());
        make_private(&self.dir).map_err(io_error("make", &self.dir))?;
        make_private(&dir).map_err(io_error("make", &dir))?;
        let _turn = self.lock()?;
        let name = image.root_fs_key().hex();
        let place = dir.join(&name);
        let left_out = if place.is_dir() { LeftOut::default() } else { make(&dir, maps, root_fs, &name)? };
        let lock = File::open(&place).map_err(io_error("open", &place))?;
        flock(&lock, FlockOperation::LockShared).map_err(io_error("lock", &place))?;
        Ok(Held { root: place.join("root"), left_out, _lock: lock })
    }

    /// What they take.
    pub fn usage(&self) -> Result<TreeUsage, RootlessError> {
        let mut trees = Vec::new();
        if self.dir.is_dir() {
            for map in directories(&self.dir).map_err(io_error("list", &self.dir))? {
                trees.extend(directories(&map).map_err(io_error("list", &map))?);
            }
        }
        if trees.is_empty() {
            return Ok(TreeUsage::default());
        }
        // Directories of the containers' other users are closed to this one.
        let sum = || Ok(trees.iter().map(|tree| bytes_below(tree)).sum::<u64>().to_string());
        let bytes = work(&IdMaps::of_caller(), "look at unpacked images", sum)?;
        let active = trees.iter().filter(|tree| !is_unused(tree)).count();
        Ok(TreeUsage { count: trees.len(), active, bytes: bytes.parse().unwrap_or(0) })
    }

    /// Removes trees of which the store has no image any more, and that no sandbox runs from.
    pub fn sweep(&self, store: &Store) -> Result<(), RootlessError> {
        if !self.dir.is_dir() {
            return Ok(());
        }
        let _turn = self.lock()?;
        // One that is damaged has to be loaded again, and is unpacked again then.
        let images = store.each_image()?;
        let wanted: HashSet<String> =
            images.iter().flatten().map(|image| image.root_fs_key().hex()).collect();
        let mut unused = Vec::new();
        for map in directories(&self.dir).map_err(io_error("list", &self.dir))? {
            for tree in directories(&map).map_err(io_error("list", &map))? {
                let name = tree.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if !wanted.contains(&name) && is_unused(&tree) {
                    unused.push(tree);
                }
            }
        }
        if unused.is_empty() {
            return Ok(());
        }
        let mut gone = Vec::new();
        for tree in unused {
            let name = tree.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let hidden = tree.with_file_name(format!(".{name}"));
            if !name.starts_with('.') {
                fs::rename(&tree, &hidden).map_err(io_error("remove", &tree))?;
            }
            gone.push(if name.starts_with('.') { tree } else { hidden });
        }
        let remove = || {
            for tree in &gone {
                remove_tree(tree).map_err(io_error("remove", tree))?;
            }
            Ok(String::new())
        };
        work(&IdMaps::of_caller(), "remove unpacked images", remove)?;
        // Maps that nobody has any more.
        directories(&self.dir).unwrap_or_default().iter().for_each(|map| {
            let _ = fs::remove_dir(map);
        });
        Ok(())
    }

    fn lock(&self) -> Result<File, RootlessError> {
        let path = self.dir.join("lock");
        let file = File::create(&path).map_err(io_error("create", &path))?;
        rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
            .map_err(io_error("lock", &path))?;
        Ok(file)
    }
}

/// Removes a directory with all in it, files of this user's containers' other users included.
pub(crate) fn remove_all(path: &Path) -> io::Result<()> {
    match remove_tree(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !is_machine_root() => {
            let remove = || {
                remove_tree(path)?;
                Ok(String::new())
            };
            work(&IdMaps::of_caller(), "remove files", remove).map_err(io::Error::other).map(drop)
        }
        result => result,
    }
}

fn make_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Unpacks a root file system, and names the tree when it is whole.
fn make(dir: &Path, maps: &IdMaps, root_fs: &RootFs, name: &str) -> Result<LeftOut, RootlessError> {
    let owners = if maps.is_single() { Owners::Own } else { Owners::Kept };
    let staging = dir.join(format!(".{name}"));
    let root = staging.join("root");
    let unpack_all = || {
        // What a killed process has left.
        match remove_tree(&staging) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.map_err(io_error("remove", &staging))?,
        }
        make_private(&staging).and_then(|()| make_private(&root)).map_err(io_error("make", &root))?;
        let left_out = unpack(root_fs, &root, owners)?;
        let flushed = File::open(dir).and_then(|dir| Ok(syncfs(dir)?));
        flushed.map_err(io_error("write to disk", dir))?;
        Ok(format!("{} {}", left_out.devices, left_out.xattrs))
    };
    let counts = work(maps, "unpack the image", unpack_all)?;
    let named = dir.join(name);
    fs::rename(&staging, &named).map_err(io_error("name", &named))?;
    let mut counts = counts.split(' ').map(|count| count.parse().unwrap_or(0));
    Ok(LeftOut { devices: counts.next().unwrap_or(0), xattrs: counts.next().unwrap_or(0) })
}

fn work(
    maps: &IdMaps,
    action: &'static str,
    work: impl FnOnce() -> Result<String, Box<dyn std::error::Error>>,
) -> Result<String, RootlessError> {
    as_root_of(&maps.uids, &maps.gids, work).map_err(|source| {
        let hint = match &source {
            WorkError::Namespace(_) => "; `cloche doctor` tells what this machine allows",
            WorkError::Work(_) => "",
        };
        RootlessError::Work { action, hint, source }
    })
}

fn directories(path: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
    Ok(entries.into_iter().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
}

fn is_unused(tree: &Path) -> bool {
    File::open(tree).is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nanna:x:1000:1000::/home/anna:/bin/sh\n";

    #[test]
    fn ranges_of_a_user_are_found_by_name_and_number() {
        let name = account_name(PASSWD, 1000);
        assert_eq!(name.as_deref(), Some("anna"));
        let text = "root:1:1\nanna:100000:65536\n1000:200000:1000\nanna:x:1\nbad\n";
        assert_eq!(ranges(text, name.as_deref(), 1000), [(100_000, 65_536), (200_000, 1000)]);
        assert!(ranges(text, None, 1000).is_empty());
    }

    #[test]
    fn maps_put_the_user_first_and_its_ranges_behind() {
        let maps = IdMaps::of(1000, 1001, &[(100_000, 65_536)], &[(300_000, 10), (400_000, 5)]);
        let lines = |maps: &[LinuxIdMapping]| -> Vec<_> {
            maps.iter().map(|map| (map.container_id(), map.host_id(), map.size())).collect()
        };
        assert_eq!(lines(&maps.uids), [(0, 1000, 1), (1, 100_000, 65_536)]);
        assert_eq!(lines(&maps.gids), [(0, 1001, 1), (1, 300_000, 10), (11, 400_000, 5)]);
        assert_eq!(maps.name(), "u1000+1,100000+65536-g1001+1,300000+10,400000+5");
        assert!(maps.has_group(5) && maps.has_group(15) && !maps.has_group(16));
    }

    #[test]
    fn user_without_both_ranges_is_alone() {
        let maps = IdMaps::of(1000, 1000, &[(100_000, 65_536)], &[]);
        assert!(maps.is_single() && maps.gids.len() == 1 && !maps.has_group(5));
    }
}
