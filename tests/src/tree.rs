//! A model of a file tree: it is written as a layer, layers are applied to it by the rules of the image spec, and
//! it says what a listing taken inside a sandbox must look like.

use std::collections::{BTreeMap, BTreeSet};

use crate::image::sha256_hex;
use crate::tar::{Archive, Header, kind};

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A directory.
    Directory,
    /// A regular file with its content.
    File(Vec<u8>),
    /// A symbolic link with its target.
    Symlink(String),
    /// Another name of the file at that path, which sorts before this one.
    HardLink(String),
    /// A named pipe.
    Fifo,
    /// A character device, major and minor number.
    Character(u32, u32),
}

/// One path's metadata and content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Permission bits.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Seconds since the Unix epoch.
    pub mtime: u64,
    /// Type and content.
    pub what: What,
    /// Extended attributes.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

/// Paths, relative and without a trailing slash, with what they are. Every parent is a node of its own.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// Adds a node owned by root.
    pub fn add(&mut self, path: &str, mode: u32, what: What) -> &mut Node {
        let node = Node { mode, owner: (0, 0), mtime: 1_000_000_000, what, xattrs: Vec::new() };
        self.nodes.insert(path.to_owned(), node);
        // Just inserted.
        self.nodes.get_mut(path).expect("the node was inserted above")
    }

    /// Adds a directory, 0755.
    pub fn directory(&mut self, path: &str) -> &mut Node {
        self.add(path, 0o755, What::Directory)
    }

    /// Adds a regular file, 0644.
    pub fn file(&mut self, path: &str, content: impl Into<Vec<u8>>) -> &mut Node {
        self.add(path, 0o644, What::File(content.into()))
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Node {
        self.add(path, 0o777, What::Symlink(target.to_owned()))
    }

    /// How many nodes there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The tree as a layer. Whiteouts are plain files named `.wh.…`, as in the image spec.
    pub fn to_layer(&self) -> Vec<u8> {
        let mut archive = Archive::default();
        for (path, node) in &self.nodes {
            let flag = match node.what {
                What::Directory => kind::DIRECTORY,
                What::File(_) => kind::FILE,
                What::Symlink(_) => kind::SYMLINK,
                What::HardLink(_) => kind::HARD_LINK,
                What::Fifo => kind::FIFO,
                What::Character(..) => kind::CHARACTER,
            };
            let mut header = Header::new(flag, path, node.mode);
            (header.uid, header.gid) = node.owner;
            header.mtime = node.mtime;
            header.xattrs = node.xattrs.clone();
            let data = match &node.what {
                What::File(content) => content.as_slice(),
                What::Symlink(target) | What::HardLink(target) => {
                    header.link = target.clone();
                    &[]
                }
                What::Character(major, minor) => {
                    header.device = (*major, *minor);
                    &[]
                }
                What::Directory | What::Fifo => &[],
            };
            if node.what == What::Directory {
                header.path.push('/');
            }
            archive.entry(header, data);
        }
        archive.finish()
    }

    /// Applies a layer on top (OCI image-spec: layer.md#applying-changesets).
    pub fn apply(&mut self, layer: &Tree) {
        // Whiteouts hide what lower layers hold, never what this layer adds, so they go first
        // (layer.md#opaque-whiteout: "regardless of ordering").
        for path in layer.nodes.keys() {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            if name == ".wh..wh..opq" {
                self.remove_below(parent);
            } else if let Some(hidden) = name.strip_prefix(".wh.") {
                let hidden = if parent.is_empty() { hidden.to_owned() } else { format!("{parent}/{hidden}") };
                self.remove_below(&hidden);
                self.nodes.remove(&hidden);
            }
        }
        for (path, node) in &layer.nodes {
            if path.rsplit('/').next().is_some_and(|name| name.starts_with(".wh.")) {
                continue;
            }
            if node.what != What::Directory {
                self.remove_below(path);
            }
            self.nodes.insert(path.clone(), node.clone());
        }
    }

    fn remove_below(&mut self, directory: &str) {
        let prefix = format!("{directory}/");
        self.nodes.retain(|path, _| !path.starts_with(&prefix));
    }

    /// What [`LISTING_SCRIPT`] must print for the tree below `directory`, in sorted lines.
    pub fn expected_listing(&self, directory: &str) -> BTreeSet<String> {
        let prefix = format!("{directory}/");
        let mut lines = BTreeSet::new();
        for (path, node) in self.nodes.iter().filter(|(path, _)| path.starts_with(&prefix)) {
            let (original, node) = match &node.what {
                What::HardLink(target) => (target, &self.nodes[target]),
                _ => (path, node),
            };
            let (uid, gid) = node.owner;
            let (kind, size, device) = match &node.what {
                What::Directory => (0o040_000, None, (0, 0)),
                What::File(content) => (0o100_000, Some(content.len()), (0, 0)),
                What::Symlink(target) => (0o120_000, Some(target.len()), (0, 0)),
                What::Fifo => (0o010_000, Some(0), (0, 0)),
                What::Character(major, minor) => (0o020_000, Some(0), (*major, *minor)),
                What::HardLink(_) => continue,
            };
            let common = format!("{path}|{:x}|{uid}|{gid}|{}", kind | node.mode, node.mtime);
            match size {
                // A directory's size and link count are the file system's own affair.
                None => lines.insert(format!("directory {common}")),
                Some(size) => {
                    let names = self.names_of(original);
                    lines.insert(format!("other {common}|{size}|{names}|{:x}:{:x}", device.0, device.1))
                }
            };
            match &node.what {
                What::Symlink(target) => lines.insert(format!("symlink '{path}' -> '{target}'")),
                What::File(content) => lines.insert(format!("sha256 {}  {path}", sha256_hex(content))),
                _ => false,
            };
        }
        lines
    }

    fn names_of(&self, original: &str) -> usize {
        let links = |node: &&Node| matches!(&node.what, What::HardLink(target) if target == original);
        1 + self.nodes.values().filter(links).count()
    }
}

/// Lists the tree below the directory `$1` of the root. Works with busybox's and with GNU's programs.
pub const LISTING_SCRIPT: &str = r#"cd / &&
find "$1"/* -type d -exec stat -c 'directory %n|%f|%u|%g|%Y' {} + &&
find "$1"/* ! -type d -exec stat -c 'other %n|%f|%u|%g|%Y|%s|%h|%t:%T' {} + &&
find "$1"/* -type l -exec stat -c 'symlink %N' {} + &&
find "$1"/* -type f -exec sha256sum {} + | sed 's/^/sha256 /'"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apply_of_whiteouts_hides_lower_names_only() {
        let mut tree = Tree::default();
        tree.directory("t");
        tree.directory("t/d");
        tree.file("t/d/old", "1");
        tree.file("t/gone", "2");
        tree.file("t/stays", "3");
        let mut layer = Tree::default();
        layer.file("t/.wh.gone", "");
        layer.directory("t/d");
        layer.file("t/d/.wh..wh..opq", "");
        layer.file("t/d/new", "4");
        tree.apply(&layer);
        let paths: Vec<&str> = tree.nodes.keys().map(String::as_str).collect();
        assert_eq!(paths, ["t", "t/d", "t/d/new", "t/stays"]);
    }

    #[test]
    fn expected_listing_counts_names_of_hard_links() {
        let mut tree = Tree::default();
        tree.file("t/a", "x");
        tree.add("t/b", 0o644, What::HardLink("t/a".to_owned()));
        let listing = tree.expected_listing("t");
        assert!(listing.contains("other t/b|81a4|0|0|1000000000|1|2|0:0"), "{listing:?}");
    }
}
