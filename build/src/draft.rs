//! A layer before it is written: which files it will have, on top of which, and where their content is.
//!
//! Nothing is read yet but names. So its digest can be asked for first, and if a layer of that digest is there already,
//! nothing needs to be written.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};
use std::sync::Arc;

use cloche_images::{BuildError, Digest, FileInfo, FileKind, LayerWriter, Node, Sizes, View};
use sha2::{Digest as _, Sha256};

use crate::key::Key;
use crate::tree::{Item, Tree, joined};

const MAX_LINKS: u32 = 40;

/// A path from the root: its components.
pub type Components = Vec<Vec<u8>>;

/// Where a new file's content is.
#[derive(Clone)]
pub enum Content {
    /// It has none.
    None,
    /// In a tree.
    Of(Arc<Tree>, Item),
    /// Here.
    Bytes(Arc<[u8]>),
}

/// A file that is to be made.
#[derive(Clone)]
pub struct New {
    /// What it will be.
    pub info: FileInfo,
    /// Of a link.
    pub target: Vec<u8>,
    /// Of a regular file.
    pub content: Content,
}

/// A layer in the making.
pub struct Draft<'a> {
    base: &'a View,
    entries: BTreeMap<Vec<u8>, New>,
    /// Of files of this machine: what was in them when they were described. Somebody may write to them meanwhile.
    described: HashMap<Vec<u8>, Digest>,
    /// Whether a link in the base is replaced rather than followed.
    own_links: bool,
}

/// What is at a path, in the draft or below it.
struct There {
    info: FileInfo,
    target: Vec<u8>,
}

impl<'a> Draft<'a> {
    /// A layer of nothing, on top of `base`.
    pub fn new(base: &'a View, own_links: bool) -> Draft<'a> {
        Draft { base, entries: BTreeMap::new(), described: HashMap::new(), own_links }
    }

    fn base_node(&self, path: &[u8]) -> io::Result<Option<Node>> {
        let mut node = self.base.root()?;
        for name in path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()) {
            match self.base.child(&node, name)? {
                Some(child) => node = child,
                None => return Ok(None),
            }
        }
        Ok(Some(node))
    }

    fn look(&self, path: &[u8]) -> io::Result<Option<There>> {
        if let Some(new) = self.entries.get(path) {
            return Ok(Some(There { info: new.info.clone(), target: new.target.clone() }));
        }
        let Some(node) = self.base_node(path)? else { return Ok(None) };
        let info = self.base.info(&node)?;
        let target = match info.kind {
            FileKind::Symlink => self.base.target(&node)?,
            _ => Vec::new(),
        };
        Ok(Some(There { info, target }))
    }

    /// What is at a path without links, if anything.
    pub fn kind_at(&self, path: &[Vec<u8>]) -> io::Result<Option<FileKind>> {
        Ok(self.look(&path.join(&b'/'))?.map(|there| there.info.kind))
    }

    /// Where a path leads, all links followed; it need not exist.
    pub fn resolve(&self, path: &[u8]) -> io::Result<Components> {
        let mut stack: Components = Vec::new();
        let mut pending: Vec<Vec<u8>> = path.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec).collect();
        let mut links = 0;
        while let Some(name) = pending.pop() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    stack.pop();
                    continue;
                }
                _ => stack.push(name),
            }
            if self.own_links {
                continue;
            }
            let Some(there) = self.look(&stack.join(&b'/'))? else { continue };
            if there.info.kind == FileKind::Symlink {
                links += 1;
                if links > MAX_LINKS {
                    return Err(rustix::io::Errno::LOOP.into());
                }
                match there.target.starts_with(b"/") {
                    true => stack.clear(),
                    false => {
                        stack.pop();
                    }
                }
                pending.extend(there.target.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec));
            }
        }
        Ok(stack)
    }

    /// Makes a directory and those above it where they are missing; tells whether it made this one.
    pub fn make_directories(&mut self, path: &[Vec<u8>], like: &FileInfo) -> io::Result<bool> {
        // From below, as most often all but the last are there.
        let mut missing = Vec::new();
        for end in (1..=path.len()).rev() {
            let at = path.get(..end).unwrap_or_default().join(&b'/');
            match self.look(&at)? {
                Some(there) if there.info.kind == FileKind::Directory => break,
                Some(there) if there.info.kind == FileKind::Symlink && self.own_links => {}
                Some(_) => return Err(not_a_directory(&at)),
                None => {}
            }
            missing.push(at);
        }
        let made = !missing.is_empty();
        for at in missing {
            let info = FileInfo { kind: FileKind::Directory, ..like.clone() };
            self.entries.insert(at, New { info, target: Vec::new(), content: Content::None });
        }
        Ok(made)
    }

    /// Gives a directory that is there other attributes.
    pub fn set_directory(&mut self, path: &[Vec<u8>], info: FileInfo) {
        self.entries.insert(path.join(&b'/'), New { info, target: Vec::new(), content: Content::None });
    }

    /// Puts a file that is no directory at a path whose parents are there.
    pub fn put(&mut self, path: &[Vec<u8>], new: New) -> io::Result<()> {
        let at = path.join(&b'/');
        match self.look(&at)? {
            _ if path.is_empty() => return Err(io::Error::other("/ can only be a directory")),
            Some(there) if there.info.kind == FileKind::Directory => {
                let shown = String::from_utf8_lossy(&at).into_owned();
                return Err(io::Error::other(format!(
                    "/{shown} is a directory, and no file can take its place"
                )));
            }
            _ => {}
        }
        self.entries.insert(at, new);
        Ok(())
    }

    /// Whether there is nothing to be made.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds to a key all that the layer will be made of, but for times.
    pub fn describe(&mut self, key: &mut Key) -> io::Result<()> {
        let mut sizes = Sizes::default();
        for (path, new) in &self.entries {
            key.bytes(path);
            describe_info(key, &new.info);
            key.bytes(&new.target);
            if new.info.kind == FileKind::File {
                sizes.add(new.info.size)?;
                let digest = content_digest(new)?;
                key.bytes(digest.as_bytes());
                if let Content::Of(tree, _) = &new.content
                    && matches!(**tree, Tree::Host(_))
                {
                    self.described.insert(path.clone(), digest);
                }
            }
        }
        Ok(())
    }

    /// Writes it, with the directories on the way to its files. No file is younger than `latest`.
    pub fn write(mut self, writer: &mut LayerWriter, latest: Option<i64>) -> Result<(), BuildError> {
        self.add_parents().map_err(BuildError::Write)?;
        let mut written: HashMap<(usize, u64, u64), Vec<u8>> = HashMap::new();
        for (path, new) in &self.entries {
            let shown = |source: io::Error| {
                let at = String::from_utf8_lossy(path);
                BuildError::Write(io::Error::new(source.kind(), format!("/{at}: {source}")))
            };
            let identity = match &new.content {
                // Numbers are of one tree.
                Content::Of(tree, item) => {
                    item.identity.map(|(part, number)| (Arc::as_ptr(tree).addr(), part, number))
                }
                _ => None,
            };
            // The name of the root in an archive.
            let name = if path.is_empty() { b"." } else { path.as_slice() };
            if let Some(first) = identity.and_then(|identity| written.get(&identity)) {
                writer.link(name, first).map_err(shown)?;
                continue;
            }
            let mut info = new.info.clone();
            if let Some(latest) = latest
                && info.mtime.0 >= latest
            {
                info.mtime = (latest, 0);
            }
            let mut data: Box<dyn Read> = match &new.content {
                Content::Of(tree, item) if info.kind == FileKind::File => tree.open(item).map_err(shown)?,
                Content::Bytes(bytes) => Box::new(bytes.as_ref()),
                _ => Box::new(io::empty()),
            };
            match self.described.get(path) {
                Some(&described) => {
                    let mut data = Hashing::new(data);
                    writer.add(name, &info, &new.target, &mut data).map_err(shown)?;
                    if data.digest().map_err(shown)? != described {
                        return Err(shown(changed()));
                    }
                }
                None => writer.add(name, &info, &new.target, &mut data).map_err(shown)?,
            }
            if let Some(identity) = identity {
                written.insert(identity, path.clone());
            }
        }
        Ok(())
    }

    /// A directory without an entry would lose its attributes to those of an entry that nobody wrote.
    fn add_parents(&mut self) -> io::Result<()> {
        let mut parents = Vec::new();
        for path in self.entries.keys() {
            let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
            parents.extend(ends.chain([0]).map(|end| path.get(..end).unwrap_or_default().to_vec()));
        }
        parents.sort_unstable();
        parents.dedup();
        for path in parents {
            if !self.entries.contains_key(&path)
                && let Some(there) = self.look(&path)?
            {
                let new = New { info: there.info, target: Vec::new(), content: Content::None };
                self.entries.insert(path, new);
            }
        }
        Ok(())
    }
}

fn not_a_directory(path: &[u8]) -> io::Error {
    io::Error::other(format!("/{} is there and is no directory", String::from_utf8_lossy(path)))
}

fn describe_info(key: &mut Key, info: &FileInfo) {
    let kind = match info.kind {
        FileKind::File => "file".to_owned(),
        FileKind::Directory => "directory".to_owned(),
        FileKind::Symlink => "link".to_owned(),
        FileKind::CharDevice(major, minor) => format!("char {major}:{minor}"),
        FileKind::BlockDevice(major, minor) => format!("block {major}:{minor}"),
        FileKind::Fifo => "fifo".to_owned(),
    };
    key.text(&kind);
    key.text(&format!("{:o} {} {}", info.mode, info.uid, info.gid));
    for (name, value) in &info.xattrs {
        key.bytes(name);
        key.bytes(value);
    }
}

fn content_digest(new: &New) -> io::Result<Digest> {
    match &new.content {
        Content::None => Ok(Digest::of(b"")),
        Content::Bytes(bytes) => Ok(Digest::of(bytes)),
        Content::Of(tree, item) => digest_of(&mut tree.open(item)?),
    }
}

/// What was built of it would be known as what it was before.
pub fn changed() -> io::Error {
    io::Error::other("it changed while it was read; build again when nobody writes to it")
}

/// Hashes what is read through it.
pub struct Hashing<R> {
    source: R,
    hasher: Sha256,
}

impl<R: Read> Hashing<R> {
    /// Reads this.
    pub fn new(source: R) -> Hashing<R> {
        Hashing { source, hasher: Sha256::new() }
    }

    /// Of all that was read.
    pub fn digest(self) -> io::Result<Digest> {
        let hex: String = self.hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Digest::from_hex(&hex).ok_or_else(|| io::Error::other("a digest has another length"))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.hasher.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// The digest of all that can be read.
pub fn digest_of(source: &mut dyn Read) -> io::Result<Digest> {
    let mut source = Hashing::new(source);
    let mut piece = vec![0; 256 << 10];
    while source.read(&mut piece)? > 0 {}
    source.digest()
}

/// The digest of all that is below an item, but for times.
pub fn describe_tree(tree: &Tree, item: &Item) -> io::Result<Digest> {
    let mut key = Key::new("tree", None);
    let mut sizes = Sizes::default();
    let mut walk = Walk::new(tree, item);
    while let Some(visit) = walk.next()? {
        let content = match &visit {
            Visit::Item(_, item) if item.info.kind == FileKind::File => {
                sizes.add(item.info.size)?;
                digest_of(&mut tree.open(item)?)?.as_bytes().to_vec()
            }
            Visit::Item(_, item) if item.info.kind == FileKind::Symlink => tree.target(item)?,
            _ => Vec::new(),
        };
        visit.describe(&mut key, &content);
    }
    Ok(key.digest())
}

/// All that is below an item, itself first, in the order of names. However deep it is, it takes no stack.
pub struct Walk<'a> {
    tree: &'a Tree,
    /// Last first.
    pending: Vec<Visit>,
}

/// What is met on a walk, by its path from where that started.
pub enum Visit {
    /// A file of any kind.
    Item(Vec<u8>, Item),
    /// A directory is left.
    End(Vec<u8>, FileInfo),
}

impl<'a> Walk<'a> {
    /// Starts at an item.
    pub fn new(tree: &'a Tree, item: &Item) -> Walk<'a> {
        Walk { tree, pending: vec![Visit::Item(Vec::new(), item.clone())] }
    }

    /// What comes next.
    pub fn next(&mut self) -> io::Result<Option<Visit>> {
        let next = self.pending.pop();
        if let Some(Visit::Item(path, item)) = &next
            && item.info.kind == FileKind::Directory
        {
            self.pending.push(Visit::End(path.clone(), item.info.clone()));
            let children = children(self.tree, item, path)?;
            self.pending.extend(children.into_iter().rev().map(|(path, _, child)| Visit::Item(path, child)));
        }
        Ok(next)
    }
}

impl Visit {
    /// Adds it to a key, with a link's target or the digest of what is in a file.
    pub fn describe(&self, key: &mut Key, content: &[u8]) {
        let Visit::Item(path, item) = self else { return key.text("end") };
        key.bytes(path.rsplit(|&byte| byte == b'/').next().unwrap_or_default());
        describe_info(key, &item.info);
        key.bytes(content);
    }
}

/// A path below another.
pub fn below(directory: &[Vec<u8>], name: &[u8]) -> Components {
    let mut path = directory.to_vec();
    path.push(name.to_vec());
    path
}

/// A path relative to where a copy started, its last name, and what is there.
type Child = (Vec<u8>, Vec<u8>, Item);

/// A directory's children.
pub fn children(tree: &Tree, item: &Item, relative: &[u8]) -> io::Result<Vec<Child>> {
    let mut found = Vec::new();
    for name in tree.names(item)? {
        if let Some(child) = tree.child(item, &name)? {
            found.push((joined(relative, &name), name, child));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use cloche_images::Store;

    use super::*;
    use crate::patterns::Ignore;
    use crate::transfer::{How, Source, transfer};

    fn how() -> How {
        How { owner: None, mode: None, exclude: Ignore::default(), parents: false, now: 0 }
    }

    fn directory() -> FileInfo {
        how().parent()
    }

    #[test]
    fn file_that_changes_after_it_was_described_is_no_layer() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let context = folder.path().join("context");
        fs::create_dir(&context).unwrap();
        let write = |change: &str| {
            fs::write(context.join("f"), "before").unwrap();
            let tree = Arc::new(Tree::host(&context, Ignore::default()).unwrap());
            let base = View::empty();
            let mut draft = Draft::new(&base, false);
            let source = Source::Path(tree, "f".into(), "the context".into());
            transfer(&mut draft, &[source], "/f", &how()).unwrap();
            draft.describe(&mut Key::new("copy", None)).unwrap();
            fs::write(context.join("f"), change).unwrap();
            draft.write(&mut store.write_layer().unwrap(), None)
        };
        write("before").unwrap();
        write("before, and more").unwrap();
        for change in ["after!", "less"] {
            assert!(write(change).is_err(), "{change}");
        }
    }

    /// As deep as a path can be, and a tree that nests deeper by entries that lead through links.
    fn deep(store: &Store, parts: usize) -> Tree {
        let mut writer = store.write_layer().unwrap();
        let down = ["d"; 1000].join("/");
        let link = FileInfo { kind: FileKind::Symlink, mode: 0o777, ..directory() };
        let mut above = String::new();
        for part in 0..parts {
            let path = format!("{above}{down}");
            writer.add(path.as_bytes(), &directory(), b"", &mut io::empty()).unwrap();
            let name = format!("l{part}");
            writer.add(name.as_bytes(), &link, path.as_bytes(), &mut io::empty()).unwrap();
            above = format!("{name}/");
        }
        let layer = store.add_layer(writer).unwrap();
        Tree::Layers(store.view(&[layer]).unwrap())
    }

    #[test]
    fn tree_of_any_depth_takes_no_stack() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let work = |parts| {
            let tree = Arc::new(deep(&store, parts));
            let small = std::thread::Builder::new().stack_size(256 << 10);
            let works = move || {
                let root = tree.root().unwrap();
                let base = View::empty();
                let mut draft = Draft::new(&base, false);
                let source = Source::Path(tree.clone(), "/".into(), "an image".into());
                let copied = transfer(&mut draft, &[source], "/b/", &how());
                (describe_tree(&tree, &root).is_ok(), copied.is_ok())
            };
            small.spawn(works).unwrap().join().unwrap()
        };
        assert_eq!(work(1), (true, true));
        assert_eq!(work(6), (false, false));
    }
}
