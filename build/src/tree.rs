//! Where COPY takes files from: a directory of this machine, or the layers of an image, a stage or an archive.
//!
//! Neither leads out of itself. A directory is only ever entered by `openat2` beneath its root and without following
//! links; links are followed here, by name, with the root as the top. Layers are not mounted at all.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cloche_images::{FileInfo, FileKind, Node, View};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};

use crate::patterns::Ignore;

const MAX_LINKS: u32 = 40;
/// A path with its end, as the kernel counts. A layer can nest deeper, by entries that lead through links; no more than
/// this is taken from it, as none of it could be named elsewhere.
const PATH_MAX: usize = 4096;

/// A tree of files to take from.
pub enum Tree {
    /// A directory, and what of it is not there.
    Host(Host),
    /// Layers.
    Layers(View),
}

/// A directory of this machine.
pub struct Host {
    root: OwnedFd,
    ignore: Ignore,
}

/// A file of a tree.
#[derive(Clone)]
pub struct Item {
    /// From the root, without links.
    pub path: Vec<u8>,
    /// What it is.
    pub info: FileInfo,
    /// The same for all names of one file that has several.
    pub identity: Option<(u64, u64)>,
    node: Option<Node>,
}

impl Tree {
    /// A directory.
    pub fn host(directory: &Path, ignore: Ignore) -> io::Result<Tree> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, directory, flags, Mode::empty())?;
        Ok(Tree::Host(Host { root, ignore }))
    }

    /// The root.
    pub fn root(&self) -> io::Result<Item> {
        match self {
            Tree::Host(host) => Ok(host.item(b"", &rustix::fs::fstat(&host.root)?)),
            Tree::Layers(view) => layers_item(view, Vec::new(), view.root()?),
        }
    }

    /// What a directory has under a name.
    pub fn child(&self, directory: &Item, name: &[u8]) -> io::Result<Option<Item>> {
        let path = joined(&directory.path, name);
        if path.len() >= PATH_MAX {
            return Err(rustix::io::Errno::NAMETOOLONG.into());
        }
        match (self, &directory.node) {
            (Tree::Host(host), _) => host.look(&path),
            (Tree::Layers(view), Some(node)) => match view.child(node, name)? {
                Some(child) => layers_item(view, path, child).map(Some),
                None => Ok(None),
            },
            (Tree::Layers(_), None) => Ok(None),
        }
    }

    /// The names in a directory, sorted.
    pub fn names(&self, directory: &Item) -> io::Result<Vec<Vec<u8>>> {
        match (self, &directory.node) {
            (Tree::Host(host), _) => host.names(&directory.path),
            (Tree::Layers(view), Some(node)) => view.names(node),
            (Tree::Layers(_), None) => Ok(Vec::new()),
        }
    }

    /// Where a symbolic link leads.
    pub fn target(&self, item: &Item) -> io::Result<Vec<u8>> {
        match (self, &item.node) {
            (Tree::Host(host), _) => {
                let link = host.open(&item.path, OFlags::PATH | OFlags::NOFOLLOW)?;
                Ok(rustix::fs::readlinkat(link, "", Vec::new())?.into_bytes())
            }
            (Tree::Layers(view), Some(node)) => view.target(node),
            (Tree::Layers(_), None) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// A regular file's content.
    pub fn open<'a>(&'a self, item: &'a Item) -> io::Result<Box<dyn Read + 'a>> {
        match (self, &item.node) {
            (Tree::Host(host), _) => {
                // Whatever it has become since it was looked at, opening it does not wait for anybody.
                let file =
                    File::from(host.open(&item.path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK)?);
                if !file.metadata()?.is_file() {
                    return Err(io::Error::other("it is not a regular file any more"));
                }
                Ok(Box::new(file))
            }
            (Tree::Layers(view), Some(node)) => Ok(Box::new(view.open(node)?)),
            (Tree::Layers(_), None) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// What a path from the root leads to, links followed.
    pub fn resolve(&self, path: &[u8]) -> io::Result<Option<Item>> {
        let mut stack = vec![self.root()?];
        let mut pending: Vec<Vec<u8>> = path.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec).collect();
        let mut links = 0;
        while let Some(name) = pending.pop() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if stack.len() > 1 {
                        stack.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let Some(directory) = stack.last().filter(|item| item.info.kind == FileKind::Directory) else {
                return Ok(None);
            };
            let Some(child) = self.child(directory, &name)? else { return Ok(None) };
            if child.info.kind != FileKind::Symlink {
                stack.push(child);
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(rustix::io::Errno::LOOP.into());
            }
            let target = self.target(&child)?;
            if target.starts_with(b"/") {
                stack.truncate(1);
            }
            pending.extend(target.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec));
        }
        Ok(stack.pop())
    }
}

/// A name in a directory, as a path.
pub fn joined(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

fn layers_item(view: &View, path: Vec<u8>, node: Node) -> io::Result<Item> {
    let info = view.info(&node)?;
    let is_shared = info.kind != FileKind::Directory && view.links(&node)? > 1;
    let identity = view.identity(&node).filter(|_| is_shared).map(|(blob, number)| (blob as u64, number));
    Ok(Item { path, info, identity, node: Some(node) })
}

impl Host {
    /// Opens what has this very path.
    fn open(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let path = if path.is_empty() { b"." } else { path };
        Ok(rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    fn look(&self, path: &[u8]) -> io::Result<Option<Item>> {
        match self.look_at_all(path)? {
            Some(item) if self.is_visible(&item)? => Ok(Some(item)),
            _ => Ok(None),
        }
    }

    /// What is there, ignored or not.
    fn look_at_all(&self, path: &[u8]) -> io::Result<Option<Item>> {
        match self.open(path, OFlags::PATH | OFlags::NOFOLLOW) {
            Ok(found) => {
                let stat = rustix::fs::statat(&found, "", AtFlags::EMPTY_PATH)?;
                let item = self.item(path, &stat);
                let is_there = item.info.kind != FileKind::Fifo
                    || FileType::from_raw_mode(stat.st_mode) == FileType::Fifo;
                Ok(is_there.then_some(item))
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether it is not ignored, or something in it is not.
    fn is_visible(&self, item: &Item) -> io::Result<bool> {
        let mut pending = vec![item.clone()];
        while let Some(item) = pending.pop() {
            if !self.ignore.matches(&String::from_utf8_lossy(&item.path)) {
                return Ok(true);
            }
            if item.info.kind == FileKind::Directory && self.ignore.brings_back() {
                for name in self.list(&item.path)? {
                    pending.extend(self.look_at_all(&joined(&item.path, &name))?);
                }
            }
        }
        Ok(false)
    }

    fn names(&self, path: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut names = Vec::new();
        for name in self.list(path)? {
            if self.look(&joined(path, &name))?.is_some() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn list(&self, path: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let directory = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut names = Vec::new();
        for entry in Dir::new(directory)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if !matches!(name.as_slice(), b"." | b"..") {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// As BuildKit sends a context: owned by root, without extended attributes.
    fn item(&self, path: &[u8], stat: &Stat) -> Item {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => FileKind::Directory,
            FileType::Symlink => FileKind::Symlink,
            FileType::RegularFile => FileKind::File,
            FileType::CharacterDevice => {
                FileKind::CharDevice(rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev))
            }
            FileType::BlockDevice => {
                FileKind::BlockDevice(rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev))
            }
            // A socket is looked at by the caller, who takes it for nothing.
            _ => FileKind::Fifo,
        };
        let size = if matches!(kind, FileKind::File | FileKind::Symlink) { stat.st_size as u64 } else { 0 };
        let info = FileInfo {
            kind,
            mode: (stat.st_mode & 0o7777) as u16,
            uid: 0,
            gid: 0,
            size,
            mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
            xattrs: Vec::new(),
        };
        let is_shared = kind != FileKind::Directory && stat.st_nlink > 1;
        Item {
            path: path.to_vec(),
            info,
            identity: is_shared.then_some((stat.st_dev, stat.st_ino)),
            node: None,
        }
    }
}

/// A path's bytes.
pub fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_of_a_context_lead_nowhere_but_into_it() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "s").unwrap();
        let directory = outside.path().join("context");
        fs::create_dir_all(directory.join("d")).unwrap();
        fs::write(directory.join("d/f"), "inside").unwrap();
        symlink("../../../../d/f", directory.join("up")).unwrap();
        symlink(outside.path().join("secret"), directory.join("absolute")).unwrap();
        symlink("/d", directory.join("rooted")).unwrap();
        symlink("loop", directory.join("loop")).unwrap();
        symlink("..", directory.join("parent")).unwrap();
        let tree = Tree::host(&directory, Ignore::default()).unwrap();
        let read = |path: &str| -> Option<String> {
            let item = tree.resolve(path.as_bytes()).unwrap()?;
            let mut text = String::new();
            tree.open(&item).unwrap().read_to_string(&mut text).unwrap();
            Some(text)
        };
        assert_eq!(read("up").as_deref(), Some("inside"));
        assert_eq!(read("rooted/f").as_deref(), Some("inside"));
        assert_eq!(read("../secret"), None);
        assert_eq!(read("absolute"), None);
        assert_eq!(read("parent/secret"), None);
        assert!(tree.resolve(b"loop").is_err());
        let root = tree.root().unwrap();
        let link = tree.child(&root, b"up").unwrap().unwrap();
        assert_eq!(tree.target(&link).unwrap(), b"../../../../d/f");
    }

    #[test]
    fn ignored_directory_is_there_for_what_is_wanted_of_it() {
        let directory = tempfile::tempdir().unwrap();
        for path in ["a/keep", "a/drop", "b/drop", "c"] {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let tree = Tree::host(directory.path(), Ignore::parse("*\n!a/keep\n!c").unwrap()).unwrap();
        let root = tree.root().unwrap();
        assert_eq!(tree.names(&root).unwrap(), [b"a".to_vec(), b"c".to_vec()]);
        let a = tree.child(&root, b"a").unwrap().unwrap();
        assert_eq!(tree.names(&a).unwrap(), [b"keep".to_vec()]);
        assert!(tree.resolve(b"b").unwrap().is_none());
    }
}
