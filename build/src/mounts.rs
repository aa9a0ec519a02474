//! `RUN --mount`: what is mounted while a command runs, and is no part of the image.
//!
//! ```text
//! ROOT/build-mounts/HEX/id      of type=cache: what it is called; HEX is that name's digest
//!                       data    its files, which outlive the build
//!                       new-…   what is about to become `data`
//!                       lock    held (flock) exclusively by a RUN with sharing=locked or =private
//! STATE/build/PID-…            of type=bind and type=secret: copies that end with the build
//! ```
//!
//! A bind is a copy of what it names, so that `.dockerignore` and owners are as for COPY, and what a command writes
//! there (`rw`) is gone afterwards.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use cloche_engine::home::Home;
use cloche_engine::record::ProcessId;
use cloche_images::{Bounded, Digest, FileInfo, FileKind, bytes_below, remove_tree};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags, ResolveFlags, Timespec,
    Timestamps,
};
use serde::Serialize;

use crate::Observer;
use crate::dockerfile::Flag;
use crate::draft::{Hashing, Visit, Walk};
use crate::key::Key;
use crate::tree::{Item, Tree, joined};

/// Something to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) target: String,
    pub(crate) kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Files of the context (without `from`), a stage or an image.
    Bind { from: Option<String>, source: String, writable: bool },
    /// A directory that is kept. It begins empty, or as `source` in `from`.
    Cache {
        id: String,
        sharing: Sharing,
        read_only: bool,
        from: Option<String>,
        source: String,
        mode: u32,
        uid: u32,
        gid: u32,
    },
    /// An empty file system in memory.
    Tmpfs { size: Option<u64> },
    /// A secret, as a file or (with `variable`) as a variable.
    Secret {
        id: String,
        variable: Option<String>,
        as_file: bool,
        required: bool,
        mode: u32,
        uid: u32,
        gid: u32,
    },
}

/// Who may use a cache at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// Everybody.
    Shared,
    /// One after the other.
    Locked,
    /// Everybody has one alone, of as many as are needed.
    Private,
}

/// Expands variables.
type Expand<'a> = &'a dyn Fn(&str) -> Result<String, String>;

/// The stages and images that mounts take files from.
pub(crate) fn sources(flags: &[Flag]) -> Result<Vec<String>, String> {
    let plain = |text: &str| Ok(text.to_owned());
    let mut found = Vec::new();
    for mount in parse(flags, &plain)? {
        if let Kind::Bind { from: Some(from), .. } | Kind::Cache { from: Some(from), .. } = mount.kind {
            if from.contains('$') {
                return Err(
                    "from= cannot have variables; name a stage of this file, which can: FROM $IMAGE AS NAME"
                        .into(),
                );
            }
            found.push(from);
        }
    }
    Ok(found)
}

/// The mounts that flags ask for.
pub(crate) fn parse(flags: &[Flag], expand: Expand<'_>) -> Result<Vec<Mount>, String> {
    let mounts = flags.iter().filter(|flag| flag.name == "mount");
    mounts.map(|flag| parse_one(flag.value.as_deref().unwrap_or_default(), expand)).collect()
}

fn parse_one(text: &str, expand: Expand<'_>) -> Result<Mount, String> {
    let mut fields = Fields::read(text, expand)?;
    let kind = fields.take("type").unwrap_or_else(|| "bind".into());
    let target = fields.take("target").or_else(|| fields.take("dst")).or_else(|| fields.take("destination"));
    let needed = |target: Option<String>| target.ok_or_else(|| format!("--mount={text} has no target="));
    let mount = match kind.as_str() {
        "bind" => {
            let read_only = fields.truth("readonly")?.or(fields.truth("ro")?);
            let writable =
                fields.truth("rw")?.or(fields.truth("readwrite")?).unwrap_or(read_only == Some(false));
            let kind = Kind::Bind {
                from: fields.take("from"),
                source: fields.take("source").or_else(|| fields.take("src")).unwrap_or_else(|| "/".into()),
                writable,
            };
            Mount { target: needed(target)?, kind }
        }
        "cache" => {
            let target = needed(target)?;
            let sharing = match fields.take("sharing").as_deref() {
                None | Some("shared") => Sharing::Shared,
                Some("locked") => Sharing::Locked,
                Some("private") => Sharing::Private,
                Some(other) => {
                    return Err(format!("sharing={other} is not supported; shared, locked and private are"));
                }
            };
            let from = fields.take("from");
            let source = fields.take("source").or_else(|| fields.take("src"));
            if from.is_none() && source.is_some() {
                return Err(format!("--mount={text} has a source= without a from="));
            }
            let writable = fields.truth("rw")?.or(fields.truth("readwrite")?);
            let read_only = fields.truth("readonly")?.or(fields.truth("ro")?);
            let kind = Kind::Cache {
                id: fields.take("id").unwrap_or_else(|| target.clone()),
                sharing,
                read_only: read_only.unwrap_or(writable == Some(false)),
                from,
                source: source.unwrap_or_else(|| "/".into()),
                mode: fields.mode(0o755)?,
                uid: fields.number("uid")?.unwrap_or(0),
                gid: fields.number("gid")?.unwrap_or(0),
            };
            Mount { target, kind }
        }
        "tmpfs" => {
            let size = fields
                .take("size")
                .map(|text| text.parse::<cloche_engine::request::Bytes>().map(|bytes| bytes.0));
            Mount { target: needed(target)?, kind: Kind::Tmpfs { size: size.transpose()? } }
        }
        "secret" => {
            let id = fields.take("id").or_else(|| {
                target.as_deref().and_then(|target| target.rsplit('/').next()).map(str::to_owned)
            });
            let id = id.filter(|id| !id.is_empty()).ok_or("a secret needs an id=")?;
            let variable = fields.take("env");
            let as_file = target.is_some() || variable.is_none();
            let kind = Kind::Secret {
                as_file,
                variable,
                required: fields.truth("required")?.unwrap_or(false),
                mode: fields.mode(0o400)?,
                uid: fields.number("uid")?.unwrap_or(0),
                gid: fields.number("gid")?.unwrap_or(0),
                id: id.clone(),
            };
            Mount { target: target.unwrap_or_else(|| format!("/run/secrets/{id}")), kind }
        }
        "ssh" => return Err("type=ssh is not supported: a build has no SSH agent; use a secret".into()),
        other => return Err(format!("type={other} is not supported; bind, cache, tmpfs and secret are")),
    };
    match fields.0.first() {
        Some((name, _)) => Err(format!("--mount=type={kind} has no field {name}")),
        None => Ok(mount),
    }
}

struct Fields(Vec<(String, Option<String>)>);

impl Fields {
    fn read(text: &str, expand: Expand<'_>) -> Result<Fields, String> {
        let mut fields = Vec::new();
        for field in text.split(',') {
            let (name, value) = match field.split_once('=') {
                Some((name, value)) => (name, Some(expand(value)?)),
                None => (field, None),
            };
            let name = name.trim().to_ascii_lowercase();
            if name.is_empty() {
                return Err(format!("--mount={text} has an empty field"));
            }
            fields.push((name, value));
        }
        Ok(Fields(fields))
    }

    fn remove(&mut self, name: &str) -> Option<Option<String>> {
        let at = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.remove(at).1)
    }

    fn take(&mut self, name: &str) -> Option<String> {
        self.remove(name).map(Option::unwrap_or_default)
    }

    fn truth(&mut self, name: &str) -> Result<Option<bool>, String> {
        match self.remove(name) {
            None => Ok(None),
            Some(None) => Ok(Some(true)),
            Some(Some(value)) => match value.as_str() {
                "true" | "1" => Ok(Some(true)),
                "false" | "0" => Ok(Some(false)),
                other => Err(format!("{name}={other} is neither true nor false")),
            },
        }
    }

    fn number(&mut self, name: &str) -> Result<Option<u32>, String> {
        let value = self.take(name);
        value.map(|value| value.parse().map_err(|_| format!("{name}={value} is no number"))).transpose()
    }

    fn mode(&mut self, default: u32) -> Result<u32, String> {
        let Some(value) = self.take("mode") else { return Ok(default) };
        let mode = u32::from_str_radix(&value, 8).ok().filter(|mode| *mode <= 0o7777);
        mode.ok_or_else(|| format!("mode={value} is no octal number up to 7777"))
    }
}

/// A directory that goes with its holder, whatever modes the directories in it have: those of what steps mount are as
/// their sources say, and steps change them.
pub(crate) struct Scratch<'a> {
    path: PathBuf,
    observer: &'a dyn Observer,
}

impl<'a> Scratch<'a> {
    fn make(within: &Path, prefix: &str, observer: &'a dyn Observer) -> io::Result<Scratch<'a>> {
        let made = tempfile::Builder::new().prefix(prefix).tempdir_in(within)?;
        Ok(Scratch { path: made.keep(), observer })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// One in this, for one step.
    pub(crate) fn of_step(&self) -> io::Result<Scratch<'a>> {
        Scratch::make(&self.path, "run", self.observer)
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        if let Err(error) = remove_all(&self.path) {
            let path = self.path.display();
            self.observer.warn(&format!("cannot remove {path}, which files of a step were in: {error}"));
        }
    }
}

/// Removes a directory with all in it, also what its owner has no rights to. Files of other users it cannot.
fn remove_all(path: &Path) -> io::Result<()> {
    match remove_tree(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            make_removable(path)?;
            remove_tree(path)
        }
        result => result,
    }
}

/// Gives their owner all rights to a directory and those in it. A sandbox of a build that was killed may still be
/// changing them, and gets nothing else changed by that: no link is followed, and nothing leads out.
fn make_removable(path: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    let mut pending = vec![b".".to_vec()];
    while let Some(at) = pending.pop() {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let directory = rustix::fs::openat2(&root, at.as_slice(), flags, Mode::empty(), resolve)?;
        let itself = format!("/proc/self/fd/{}", directory.as_raw_fd());
        fs::set_permissions(itself, Permissions::from_mode(0o700))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        for entry in Dir::new(rustix::fs::openat(&directory, ".", flags, Mode::empty())?)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if entry.file_type() == FileType::Directory && !matches!(name, b"." | b"..") {
                pending.push(joined(&at, name));
            }
        }
    }
    Ok(())
}

/// The directories of builds that were killed.
fn remains(home: &Home) -> Vec<PathBuf> {
    let entries = fs::read_dir(home.state().join("build")).into_iter().flatten().flatten();
    let is_dead = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let maker = name.split('-').next().and_then(|pid| pid.parse().ok());
        maker.is_none_or(|pid| ProcessId::of(pid).is_none())
    };
    entries.map(|entry| entry.path()).filter(is_dead).collect()
}

/// Removes what builds that were killed have left of what their sandboxes had mounted: secrets, too. The next build says
/// if it cannot be.
pub fn remove_remains(home: &Home) {
    remains(home).iter().for_each(|path| drop(remove_all(path)));
}

/// A directory of this build. Those of builds that were killed go now.
pub(crate) fn scratch<'a>(home: &Home, observer: &'a dyn Observer) -> Result<Scratch<'a>, String> {
    let directory = home.state().join("build");
    let made = || {
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        for path in remains(home) {
            drop(Scratch { path, observer });
        }
        Scratch::make(&directory, &format!("{}-", std::process::id()), observer)
    };
    made().map_err(|error| format!("cannot make a directory in {}: {error}", directory.display()))
}

fn cache_directory(home: &Home) -> PathBuf {
    home.images().join("build-mounts")
}

/// Which caches a RUN uses, and which of them alone, but for the private ones. Each is locked once, and all in one order
/// whoever locks them: so nobody waits for what waits for him.
pub(crate) fn cache_locks<'a>(mounts: impl Iterator<Item = &'a Mount>) -> BTreeMap<&'a str, bool> {
    let mut locks = BTreeMap::new();
    for mount in mounts {
        if let Kind::Cache { id, sharing: sharing @ (Sharing::Shared | Sharing::Locked), .. } = &mount.kind {
            *locks.entry(id.as_str()).or_insert(false) |= *sharing == Sharing::Locked;
        }
    }
    locks
}

/// A cache's lock, with `locked` for its holder alone; none if another holds it.
pub(crate) fn lock_cache(home: &Home, id: &str, locked: bool) -> io::Result<Option<File>> {
    let directory = cache_directory(home).join(Digest::of(id.as_bytes()).hex());
    DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
    let lock =
        File::options().write(true).create(true).truncate(false).mode(0o600).open(directory.join("lock"))?;
    let how = match locked {
        true => FlockOperation::NonBlockingLockExclusive,
        false => FlockOperation::NonBlockingLockShared,
    };
    match rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, how)) {
        Ok(()) => Ok(Some(lock)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The first cache of a name that nobody uses, with its lock.
pub(crate) fn lock_private(home: &Home, id: &str) -> io::Result<(String, File)> {
    for number in 0u64.. {
        let name = if number == 0 { id.to_owned() } else { format!("{id} ({number})") };
        if let Some(lock) = lock_cache(home, &name, true)? {
            return Ok((name, lock));
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// How a cache begins.
pub(crate) enum Beginning<'a> {
    /// Empty, with this mode, owner and group.
    Empty(u32, u32, u32),
    /// As a copy.
    Of(&'a Tree, &'a Item),
}

/// The directory of a cache whose lock is held.
pub(crate) fn open_cache(home: &Home, id: &str, beginning: &Beginning<'_>) -> io::Result<PathBuf> {
    let directory = cache_directory(home).join(Digest::of(id.as_bytes()).hex());
    let data = directory.join("data");
    if data.is_dir() {
        return Ok(data);
    }
    fs::write(directory.join("id"), id)?;
    let new = tempfile::Builder::new().prefix("new-").tempdir_in(&directory)?;
    let root = new.path().join("root");
    match beginning {
        Beginning::Empty(mode, uid, gid) => {
            DirBuilder::new().mode(0o700).create(&root)?;
            own(&root, *uid, *gid)?;
            fs::set_permissions(&root, Permissions::from_mode(*mode))?;
        }
        // Layers do not change while they are read.
        Beginning::Of(tree, item) => {
            materialise(tree, item, &root)?;
        }
    }
    match rustix::fs::renameat_with(CWD, &root, CWD, &data, RenameFlags::NOREPLACE) {
        // Whoever else has made it meanwhile has made the same.
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(data),
        Err(error) => Err(error.into()),
    }
}

/// What caches of RUN take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CacheUsage {
    /// How many there are.
    pub count: usize,
    /// Bytes of their files.
    pub bytes: u64,
}

/// What the caches of `RUN --mount=type=cache` take.
pub fn cache_mounts(home: &Home) -> io::Result<CacheUsage> {
    let mut usage = CacheUsage { count: 0, bytes: 0 };
    for entry in list(&cache_directory(home))? {
        usage.count += 1;
        usage.bytes += bytes_below(&entry);
    }
    Ok(usage)
}

/// Removes the caches that no build uses now.
pub fn prune_cache_mounts(home: &Home) -> io::Result<CacheUsage> {
    let mut removed = CacheUsage { count: 0, bytes: 0 };
    let mut failure = None;
    for directory in list(&cache_directory(home))? {
        let Ok(lock) = File::options().write(true).open(directory.join("lock")) else { continue };
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let bytes = bytes_below(&directory);
        // The lock stays: somebody may wait for it.
        let parts = fs::read_dir(&directory)?.flatten().filter(|entry| entry.file_name() != "lock");
        let failed = parts.map(|entry| entry.path()).find_map(|path| Some((remove_all(&path).err()?, path)));
        if let Some((error, path)) = failed {
            let said = io::Error::new(error.kind(), format!("{}: {error}", path.display()));
            failure.get_or_insert(said);
            continue;
        }
        removed.count += 1;
        removed.bytes += bytes;
    }
    failure.map_or(Ok(removed), Err)
}

fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result?,
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
    let is_used = |path: &PathBuf| {
        fs::read_dir(path).is_ok_and(|entries| entries.flatten().any(|entry| entry.file_name() != "lock"))
    };
    Ok(paths.into_iter().filter(is_used).collect())
}

/// Writes a secret or a script to a file.
pub(crate) fn write_file(path: &Path, content: &[u8], (mode, uid, gid): (u32, u32, u32)) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    own(path, uid, gid)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Gives a file to somebody, as far as this user may.
fn own(path: &Path, uid: u32, gid: u32) -> io::Result<()> {
    match lchown(path, Some(uid), Some(gid)) {
        Err(error)
            if error.kind() == io::ErrorKind::PermissionDenied && !rustix::process::geteuid().is_root() =>
        {
            Ok(())
        }
        result => result,
    }
}

/// Copies an item to `path`, where nothing is yet, in a directory that nobody else can reach. Gives the digest that
/// [`crate::draft::describe_tree`] gives of what was copied.
pub(crate) fn materialise(tree: &Tree, item: &Item, path: &Path) -> io::Result<Digest> {
    let mut key = Key::new("tree", None);
    let mut walk = Walk::new(tree, item);
    while let Some(visit) = walk.next()? {
        let (Visit::Item(relative, _) | Visit::End(relative, _)) = &visit;
        let at = match relative.is_empty() {
            true => path.to_owned(),
            false => path.join(OsStr::from_bytes(relative)),
        };
        let content = match &visit {
            Visit::Item(_, item) => make(tree, item, &at)?,
            Visit::End(_, info) => {
                // What is put into a directory changes its time.
                dress(&at, info)?;
                Vec::new()
            }
        };
        visit.describe(&mut key, &content);
    }
    Ok(key.digest())
}

/// Makes a file of any kind; gives a link's target, or the digest of what is in a file.
fn make(tree: &Tree, item: &Item, path: &Path) -> io::Result<Vec<u8>> {
    let content = match item.info.kind {
        FileKind::Directory => {
            DirBuilder::new().mode(0o700).create(path)?;
            return Ok(Vec::new());
        }
        FileKind::File => {
            let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
            let mut source = Hashing::new(tree.open(item)?);
            io::copy(&mut source, &mut Bounded::new(file))?;
            source.digest()?.as_bytes().to_vec()
        }
        FileKind::Symlink => {
            let target = tree.target(item)?;
            symlink(OsStr::from_bytes(&target), path)?;
            target
        }
        // They have no content that could be copied, and nobody mounts them.
        FileKind::CharDevice(..) | FileKind::BlockDevice(..) | FileKind::Fifo => return Ok(Vec::new()),
    };
    dress(path, &item.info)?;
    Ok(content)
}

fn dress(path: &Path, info: &FileInfo) -> io::Result<()> {
    own(path, info.uid, info.gid)?;
    if info.kind != FileKind::Symlink {
        fs::set_permissions(path, Permissions::from_mode(info.mode.into()))?;
    }
    let time = Timespec { tv_sec: info.mtime.0, tv_nsec: info.mtime.1.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(text: &str) -> Result<Mount, String> {
        parse_one(text, &|text| Ok(text.replace("$A", "1")))
    }

    #[test]
    fn mounts_have_the_defaults_of_docker() {
        let cache = mount("type=cache,target=/c$A").unwrap();
        assert_eq!(cache.target, "/c1");
        let kind = Kind::Cache {
            id: "/c1".into(),
            sharing: Sharing::Shared,
            read_only: false,
            from: None,
            source: "/".into(),
            mode: 0o755,
            uid: 0,
            gid: 0,
        };
        assert_eq!(cache.kind, kind);
        let bind = mount("target=/b,from=x,ro").unwrap();
        assert_eq!(bind.kind, Kind::Bind { from: Some("x".into()), source: "/".into(), writable: false });
        assert_eq!(mount("type=secret,id=k").unwrap().target, "/run/secrets/k");
        let Kind::Secret { id, as_file, .. } = mount("type=secret,target=/a/key").unwrap().kind else {
            panic!()
        };
        assert!(id == "key" && as_file);
        let Kind::Secret { as_file, variable, .. } = mount("type=secret,id=k,env=K").unwrap().kind else {
            panic!()
        };
        assert!(!as_file && variable.as_deref() == Some("K"));
        assert_eq!(mount("type=tmpfs,target=/t,size=1m").unwrap().kind, Kind::Tmpfs { size: Some(1 << 20) });
    }

    struct Silent;

    impl Observer for Silent {
        fn started(&self, _: usize, _: &str) {}
        fn output(&self, _: usize, _: &[u8]) {}
        fn ended(&self, _: usize, _: crate::Ended) {}
        fn warn(&self, text: &str) {
            panic!("{text}");
        }
        fn image(&self, _: &str, _: bool) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            Ok(())
        }
    }

    #[test]
    fn copies_of_binds_go_whatever_their_modes() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::new(Some(folder.path().join("i")), Some(folder.path().join("s"))).unwrap();
        let scratch = scratch(&home, &Silent).unwrap();
        let step = scratch.of_step().unwrap();
        let outside = folder.path().join("outside");
        let deep = step.path().join("a/b/c");
        [&outside, &deep].iter().for_each(|path| fs::create_dir_all(path).unwrap());
        fs::write(deep.join("f"), "").unwrap();
        symlink(&outside, deep.join("l")).unwrap();
        let inner = [deep.clone(), step.path().join("a/b"), step.path().join("a")];
        let all = [&inner[..], std::slice::from_ref(&outside)].concat();
        all.iter().for_each(|path| fs::set_permissions(path, Permissions::from_mode(0o055)).unwrap());
        // By itself, as root needs no rights.
        make_removable(step.path()).unwrap();
        let mode = |path: &PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(inner.each_ref().map(mode), [0o700; 3]);
        assert_eq!(mode(&outside), 0o055, "a link was followed");
        drop(step);
        drop(scratch);
        assert_eq!(fs::read_dir(home.state().join("build")).unwrap().count(), 0);
    }

    #[test]
    fn cache_is_locked_once_and_in_order() {
        let mounts = [
            "type=cache,id=b,target=/1",
            "type=cache,id=a,target=/2",
            "type=cache,id=b,target=/3,sharing=locked",
            "type=cache,id=p,target=/4,sharing=private",
        ]
        .map(|text| mount(text).unwrap());
        let locks = cache_locks(mounts.iter());
        assert_eq!(locks.into_iter().collect::<Vec<_>>(), [("a", false), ("b", true)]);

        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(Some(directory.path().join("i")), Some(directory.path().join("s"))).unwrap();
        let held = lock_cache(&home, "b", true).unwrap();
        assert!(held.is_some() && lock_cache(&home, "b", false).unwrap().is_none());
        drop(held);
        let shared = lock_cache(&home, "b", false).unwrap();
        assert!(shared.is_some() && lock_cache(&home, "b", false).unwrap().is_some());
        assert!(lock_cache(&home, "b", true).unwrap().is_none());
        let (name, first) = lock_private(&home, "p").unwrap();
        let (other, _second) = lock_private(&home, "p").unwrap();
        assert!(name == "p" && other != name);
        drop(first);
        assert_eq!(lock_private(&home, "p").unwrap().0, "p");
    }

    #[test]
    fn mount_that_cannot_be_honoured_is_refused() {
        for text in [
            "type=cache",
            "type=ssh",
            "type=x,target=/a",
            "type=bind,target=/a,colour=red",
            "type=secret",
            "type=cache,target=/a,sharing=mine",
            "type=cache,target=/a,source=/b",
            "type=cache,target=/a,mode=9",
            "type=tmpfs,target=/a,size=x",
            "type=bind,target=/a,,",
            "type=bind,target=/a,rw=maybe",
        ] {
            assert!(mount(text).is_err(), "{text}");
        }
    }
}
