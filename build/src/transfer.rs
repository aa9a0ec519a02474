//! COPY and ADD: from sources and a target to the files of a layer, as BuildKit has it.
//!
//! * A directory's content is copied, not the directory; into a target that is made if it is missing and then is like
//!   the source. A directory that was there keeps its attributes, those below it get the source's.
//! * A file goes into the target if that ends with a slash or is a directory, and else to that name.
//! * Links of the target's path are followed within the image; links in a source are copied as such, and a source that
//!   is one itself is followed.
//! * Parents that are missing are made 0755 and belong to whom `--chown` says.

use std::io;
use std::sync::Arc;

use cloche_images::{FileInfo, FileKind};

use crate::draft::{Components, Content, Draft, New, below, children};
use crate::patterns::{Ignore, PathPattern, PatternError};
use crate::tree::{Item, Tree, joined};

/// Why nothing was copied.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// A source is missing.
    #[error("{path} is not in {whence}{hint}")]
    Missing {
        /// As it is written.
        path: String,
        /// Where it was looked for.
        whence: String,
        /// What might be the reason.
        hint: &'static str,
    },
    /// A source is no pattern.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// A file cannot be read, or its target not be written.
    #[error("{0}")]
    Io(String, #[source] io::Error),
    /// Several sources need a directory.
    #[error("several sources need a directory as target: write {0}/")]
    NoDirectory(String),
}

/// How files are copied.
pub struct How {
    /// Owner of all; nothing keeps the source's.
    pub owner: Option<(u32, u32)>,
    /// Mode of all files and directories; nothing keeps the source's.
    pub mode: Option<u16>,
    /// What of a source is left out.
    pub exclude: Ignore,
    /// Keep the path of a source below the target.
    pub parents: bool,
    /// Time of directories that are made, in seconds since 1970.
    pub now: i64,
}

/// One thing to copy.
pub enum Source {
    /// A path or pattern of a tree, and how to call that tree.
    Path(Arc<Tree>, String, String),
    /// A file that is made of a text, and its name.
    Text(String, Arc<[u8]>, u16, i64),
    /// What was in an archive: its root directory's content.
    Unpacked(Arc<Tree>),
}

/// Adds what is copied to a draft. `target` is absolute; a slash at its end makes it a directory.
pub fn transfer(
    draft: &mut Draft<'_>,
    sources: &[Source],
    target: &str,
    how: &How,
) -> Result<(), TransferError> {
    if sources.len() > 1 && !target.ends_with('/') {
        return Err(TransferError::NoDirectory(target.to_owned()));
    }
    let refused = |source| TransferError::Io(format!("cannot write to {target}"), source);
    for source in sources {
        match source {
            Source::Text(name, bytes, mode, mtime) => {
                let info = FileInfo {
                    kind: FileKind::File,
                    mode: *mode,
                    uid: 0,
                    gid: 0,
                    size: bytes.len() as u64,
                    mtime: (*mtime, 0),
                    xattrs: Vec::new(),
                };
                let new = New {
                    info: how.apply(&info),
                    target: Vec::new(),
                    content: Content::Bytes(bytes.clone()),
                };
                let path = file_target(draft, target, name.as_bytes()).map_err(refused)?;
                how.put(draft, &path, new).map_err(refused)?;
            }
            Source::Unpacked(tree) => {
                let root = tree.root().map_err(refused)?;
                // Its own root is not meant to change the target's attributes.
                let path = draft.resolve(target.as_bytes()).map_err(refused)?;
                draft.make_directories(&path, &how.parent()).map_err(refused)?;
                copy_children(draft, tree, &root, b"", &path, how).map_err(refused)?;
            }
            Source::Path(tree, written, whence) => {
                for item in find(tree, written, whence)? {
                    let failed =
                        |source| TransferError::Io(format!("cannot copy {written} to {target}"), source);
                    copy(draft, tree, &item, target, how).map_err(failed)?;
                }
            }
        }
    }
    Ok(())
}

/// A source that was found: under which name, and what it is.
struct Found {
    name: Vec<u8>,
    /// Its directory from the root, or from `./` in what is written; for `--parents`.
    parents: Vec<u8>,
    item: Item,
}

fn find(tree: &Tree, written: &str, whence: &str) -> Result<Vec<Found>, TransferError> {
    let failed = |source| TransferError::Io(format!("cannot look for {written} in {whence}"), source);
    // What comes before `/./` is no parent (`--parents`).
    let pivot = written.split_once("/./").map_or(0, |(before, _)| clean(before).len());
    let path = clean(written);
    let split = |path: &str| {
        let kept = path.get(pivot..).unwrap_or_default().trim_start_matches('/');
        let (parents, name) = kept.rsplit_once('/').unwrap_or(("", kept));
        (parents.as_bytes().to_vec(), name.as_bytes().to_vec())
    };
    if !PathPattern::is_pattern(&path) {
        let found = tree.resolve(path.as_bytes()).map_err(failed)?;
        let hint = match tree {
            Tree::Host(_) => "; is it left out by .dockerignore?",
            Tree::Layers(_) => "",
        };
        let item = found.ok_or_else(|| TransferError::Missing {
            path: written.to_owned(),
            whence: whence.to_owned(),
            hint,
        })?;
        let (parents, name) = split(&path);
        return Ok(vec![Found { name, parents, item }]);
    }
    let pattern = PathPattern::parse(&path)?;
    // Down to the first component that is a pattern, names are names.
    let components: Vec<&str> = path.split('/').collect();
    let plain = components.iter().take_while(|name| !PathPattern::is_pattern(name)).count();
    let start = components.get(..plain).unwrap_or_default().join("/");
    let Some(directory) = tree.resolve(start.as_bytes()).map_err(failed)? else { return Ok(Vec::new()) };
    let mut matched = Vec::new();
    let mut pending = vec![(start.into_bytes(), directory)];
    while let Some((at, directory)) = pending.pop() {
        if directory.info.kind != FileKind::Directory {
            continue;
        }
        for (path, _, child) in children(tree, &directory, &at).map_err(failed)? {
            let shown = String::from_utf8_lossy(&path).into_owned();
            if pattern.matches(&shown) {
                matched.push(shown);
            } else if shown.matches('/').count() + 1 < components.len() {
                pending.push((path, child));
            }
        }
    }
    matched.sort();
    let mut found = Vec::new();
    for path in matched {
        // A link that matches is followed; one that leads nowhere is missed.
        let Some(item) = tree.resolve(path.as_bytes()).map_err(failed)? else {
            let whence = whence.to_owned();
            return Err(TransferError::Missing { path, whence, hint: "; a link there leads nowhere" });
        };
        let (parents, name) = split(&path);
        found.push(Found { name, parents, item });
    }
    Ok(found)
}

/// Go's `filepath.Clean` of a path from the root, without the slash in front.
fn clean(path: &str) -> String {
    let mut kept = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                kept.pop();
            }
            name => kept.push(name),
        }
    }
    kept.join("/")
}

fn copy(draft: &mut Draft<'_>, tree: &Arc<Tree>, found: &Found, target: &str, how: &How) -> io::Result<()> {
    let Found { name, parents, item } = found;
    let is_directory = item.info.kind == FileKind::Directory;
    if how.parents {
        let relative = joined(parents, name);
        let is_excluded = !relative.is_empty() && how.exclude.matches(&String::from_utf8_lossy(&relative));
        if is_excluded && !(is_directory && any_wanted(tree, item, &relative, &how.exclude)?) {
            return Ok(());
        }
        let mut directory = draft.resolve(target.as_bytes())?;
        directory
            .extend(parents.split(|&byte| byte == b'/').filter(|name| !name.is_empty()).map(<[u8]>::to_vec));
        if is_directory && !name.is_empty() {
            directory.push(name.clone());
        }
        if !is_directory {
            draft.make_directories(&directory, &how.parent())?;
            let path = below(&directory, name);
            return how.put(draft, &path, how.made_of(tree, item)?);
        }
        return copy_directory(draft, tree, item, &relative, &directory, how);
    }
    if is_directory {
        let path = draft.resolve(target.as_bytes())?;
        return copy_directory(draft, tree, item, b"", &path, how);
    }
    if how.exclude.matches(&String::from_utf8_lossy(name)) {
        return Ok(());
    }
    let path = file_target(draft, target, name)?;
    how.put(draft, &path, how.made_of(tree, item)?)
}

/// Where a file goes.
fn file_target(draft: &Draft<'_>, target: &str, name: &[u8]) -> io::Result<Components> {
    let path = draft.resolve(target.as_bytes())?;
    let is_directory = target.ends_with('/') || draft.kind_at(&path)? == Some(FileKind::Directory);
    match is_directory {
        true => {
            // A link of that name in the target is replaced, not followed.
            Ok(below(&path, name))
        }
        false => Ok(path),
    }
}

fn copy_directory(
    draft: &mut Draft<'_>,
    tree: &Arc<Tree>,
    item: &Item,
    relative: &[u8],
    path: &[Vec<u8>],
    how: &How,
) -> io::Result<()> {
    let (_, parents) = path.split_last().map_or((None, &[][..]), |(last, parents)| (Some(last), parents));
    draft.make_directories(parents, &how.parent())?;
    draft.make_directories(path, &how.apply(&item.info))?;
    copy_children(draft, tree, item, relative, path, how)
}

/// Copies what is in a directory into one that is there.
fn copy_children(
    draft: &mut Draft<'_>,
    tree: &Arc<Tree>,
    directory: &Item,
    relative: &[u8],
    path: &[Vec<u8>],
    how: &How,
) -> io::Result<()> {
    // Those still to be copied: how deep they are is up to who made them.
    let mut pending = vec![(directory.clone(), relative.to_vec(), path.to_vec())];
    while let Some((directory, relative, path)) = pending.pop() {
        for (relative, name, child) in children(tree, &directory, &relative)? {
            let is_excluded = how.exclude.matches(&String::from_utf8_lossy(&relative));
            if is_excluded && !(child.info.kind == FileKind::Directory && how.exclude.brings_back()) {
                continue;
            }
            let at = below(&path, &name);
            if child.info.kind != FileKind::Directory {
                draft.put(&at, how.made_of(tree, &child)?)?;
                continue;
            }
            if is_excluded && !any_wanted(tree, &child, &relative, &how.exclude)? {
                continue;
            }
            let info = how.apply(&child.info);
            if !draft.make_directories(&at, &info)? {
                draft.set_directory(&at, info);
            }
            pending.push((child, relative, at));
        }
    }
    Ok(())
}

fn any_wanted(tree: &Tree, directory: &Item, relative: &[u8], exclude: &Ignore) -> io::Result<bool> {
    let mut pending = vec![(directory.clone(), relative.to_vec())];
    while let Some((directory, relative)) = pending.pop() {
        for (relative, _, child) in children(tree, &directory, &relative)? {
            if !exclude.matches(&String::from_utf8_lossy(&relative)) {
                return Ok(true);
            }
            if child.info.kind == FileKind::Directory {
                pending.push((child, relative));
            }
        }
    }
    Ok(false)
}

impl How {
    /// What a source's attributes become.
    fn apply(&self, info: &FileInfo) -> FileInfo {
        let (uid, gid) = self.owner.unwrap_or((info.uid, info.gid));
        let mode = match info.kind {
            FileKind::Symlink => info.mode,
            _ => self.mode.unwrap_or(info.mode),
        };
        FileInfo { uid, gid, mode, ..info.clone() }
    }

    /// Attributes of directories that are made on the way.
    pub fn parent(&self) -> FileInfo {
        let (uid, gid) = self.owner.unwrap_or((0, 0));
        FileInfo {
            kind: FileKind::Directory,
            mode: 0o755,
            uid,
            gid,
            size: 0,
            mtime: (self.now, 0),
            xattrs: Vec::new(),
        }
    }

    fn made_of(&self, tree: &Arc<Tree>, item: &Item) -> io::Result<New> {
        let target = match item.info.kind {
            FileKind::Symlink => tree.target(item)?,
            _ => Vec::new(),
        };
        Ok(New { info: self.apply(&item.info), target, content: Content::Of(tree.clone(), item.clone()) })
    }

    fn put(&self, draft: &mut Draft<'_>, path: &[Vec<u8>], new: New) -> io::Result<()> {
        let (_, parents) = path.split_last().ok_or_else(|| io::Error::other("/ can only be a directory"))?;
        draft.make_directories(parents, &self.parent())?;
        draft.put(path, new)
    }
}

/// A source's path as a name below a target.
pub fn base_name(path: &str) -> String {
    let cleaned = clean(path);
    cleaned.rsplit('/').next().unwrap_or_default().to_owned()
}

/// Where a target leads, from a working directory.
pub fn absolute(workdir: &str, target: &str) -> String {
    let joined = if target.starts_with('/') { target.to_owned() } else { format!("{workdir}/{target}") };
    let is_directory = target.ends_with('/')
        || matches!(target, "." | "..")
        || target.ends_with("/.")
        || target.ends_with("/..");
    let cleaned = String::from_utf8_lossy(&joined_clean(&joined)).into_owned();
    match (cleaned.is_empty(), is_directory) {
        (true, _) => "/".to_owned(),
        (false, true) => format!("/{cleaned}/"),
        (false, false) => format!("/{cleaned}"),
    }
}

fn joined_clean(path: &str) -> Vec<u8> {
    clean(path)
        .split('/')
        .filter(|name| !name.is_empty())
        .fold(Vec::new(), |path, name| joined(&path, name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_is_absolute_and_keeps_its_slash() {
        for (workdir, target, expected) in [
            ("/", "a", "/a"),
            ("/w", "a/", "/w/a/"),
            ("/w", ".", "/w/"),
            ("/w", "./", "/w/"),
            ("/w", "/x/../y", "/y"),
            ("/w", "../../..", "/"),
            ("/", "/", "/"),
        ] {
            assert_eq!(absolute(workdir, target), expected, "{workdir} {target}");
        }
    }
}
