//! A directory tree in memory: what a layer holds once its archive has been read, without the file data.
//!
//! A node is what the file system calls an inode; a directory's children give nodes names, several names may give
//! one node. Nodes live in an arena; one that has lost its last name is not reached any more, and its place is free
//! again once it is released. There may be millions, so they are small.

use std::collections::{BTreeMap, HashMap};
use std::ops::{Index, IndexMut};

use crate::erofs::{EncodedXattrs, FileData};
use crate::tar::Timestamp;

/// A node of one [`Tree`]; only a tree makes them, so they are always valid there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NodeId(u32);

/// A set of extended attributes of one [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct XattrSet(u32);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub attributes: Attributes,
    pub body: Body,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Permission, set-id and sticky bits; the type is the body's.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    pub xattrs: Option<XattrSet>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    /// Children by name, sorted as EROFS wants them.
    Directory(BTreeMap<Box<[u8]>, NodeId>),
    File {
        size: u64,
        data: FileData,
    },
    Symlink(Box<[u8]>),
    /// With the encoded device number.
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
}

pub(crate) struct Tree {
    nodes: Vec<Node>,
    xattrs: Vec<EncodedXattrs>,
    xattr_sets: HashMap<EncodedXattrs, XattrSet>,
    /// How many names each node has, and holds.
    holders: Vec<u32>,
    /// Where each was last given a name. Of a directory, which has one name at most, it is where `..` leads.
    parents: Vec<NodeId>,
    /// Places of nodes that were released.
    free: Vec<NodeId>,
    /// An estimate of the memory taken.
    bytes: u64,
}

impl Tree {
    pub(crate) const ROOT: NodeId = NodeId(0);

    /// A tree of a root directory and nothing else.
    pub(crate) fn new(root: Attributes) -> Tree {
        let root = Node { attributes: root, body: Body::Directory(BTreeMap::new()) };
        Tree {
            nodes: vec![root],
            xattrs: Vec::new(),
            xattr_sets: HashMap::new(),
            holders: vec![1],
            parents: vec![Tree::ROOT],
            free: Vec::new(),
            bytes: 0,
        }
    }

    /// Adds a node that has no name yet.
    pub(crate) fn add(&mut self, node: Node) -> NodeId {
        self.bytes += node.cost();
        if let Some(id) = self.free.pop() {
            self[id] = node;
            return id;
        }
        // Far fewer than 2^32: `limits::MAX_ENTRIES`, and a path's worth of implied parents for each at most,
        // which the bound on `bytes` cuts off.
        let id = NodeId(self.nodes.len() as u32);
        self.nodes.push(node);
        self.holders.push(0);
        self.parents.push(Tree::ROOT);
        id
    }

    /// Stores a set of extended attributes, once for all nodes that have the same.
    pub(crate) fn add_xattrs(&mut self, encoded: EncodedXattrs) -> XattrSet {
        if let Some(&set) = self.xattr_sets.get(&encoded) {
            return set;
        }
        // Twice, with the map's slot.
        self.bytes += 2 * encoded.bytes().len() as u64 + 128;
        let set = XattrSet(self.xattrs.len() as u32);
        self.xattrs.push(encoded.clone());
        self.xattr_sets.insert(encoded, set);
        set
    }

    #[allow(clippy::indexing_slicing)] // Only `add_xattrs` makes sets.
    pub(crate) fn xattrs(&self, set: XattrSet) -> &EncodedXattrs {
        &self.xattrs[set.0 as usize]
    }

    /// The child of a directory; `None` too if the node is no directory.
    pub(crate) fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self[directory].body {
            Body::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    /// Gives a node a name, taking the name from whatever had it, which is not released. On a node that is no directory
    /// this does nothing.
    pub(crate) fn name(&mut self, directory: NodeId, name: &[u8], node: NodeId) -> Option<NodeId> {
        let Body::Directory(children) = &mut self[directory].body else { return None };
        let leaf = if children.is_empty() { LEAF_COST } else { 0 };
        let before = children.insert(name.into(), node);
        if before.is_none() {
            self.bytes += name_cost(name) + leaf;
        }
        self.hold(node);
        if let Some(parent) = self.parents.get_mut(node.index()) {
            *parent = directory;
        }
        before
    }

    /// The directory in which a directory is or was; the root is in itself.
    pub(crate) fn parent(&self, directory: NodeId) -> NodeId {
        self.parents.get(directory.index()).copied().unwrap_or(Tree::ROOT)
    }

    /// As [`Self::name`], but whatever had the name is released.
    pub(crate) fn replace(&mut self, directory: NodeId, name: &[u8], node: NodeId) {
        if let Some(before) = self.name(directory, name, node) {
            self.release(before);
        }
    }

    /// Takes a name away, and releases what had it.
    pub(crate) fn remove(&mut self, directory: NodeId, name: &[u8]) {
        let Body::Directory(children) = &mut self[directory].body else { return };
        if let Some(node) = children.remove(name) {
            let leaf = if children.is_empty() { LEAF_COST } else { 0 };
            self.bytes -= name_cost(name) + leaf;
            self.release(node);
        }
    }

    /// Removes all that is in a directory.
    pub(crate) fn clear(&mut self, directory: NodeId) {
        let Body::Directory(children) = &mut self[directory].body else { return };
        let children = std::mem::take(children);
        self.release_names(children).into_iter().for_each(|node| self.release(node));
    }

    /// Keeps a node where it is, whatever becomes of its names, until it is released as often.
    pub(crate) fn hold(&mut self, node: NodeId) {
        if let Some(holders) = self.holders.get_mut(node.index()) {
            *holders += 1;
        }
    }

    /// Takes a name or a hold away. With the last one goes the node, and what only it holds.
    pub(crate) fn release(&mut self, node: NodeId) {
        let mut pending = vec![node];
        while let Some(id) = pending.pop() {
            let Some(holders) = self.holders.get_mut(id.index()) else { continue };
            *holders = holders.saturating_sub(1);
            if *holders > 0 {
                continue;
            }
            let cost = self[id].cost();
            self.bytes -= cost;
            if let Body::Directory(children) = std::mem::replace(&mut self[id].body, Body::Fifo) {
                pending.extend(self.release_names(children));
            }
            self.free.push(id);
        }
    }

    /// Accounts for names that are gone, and gives the nodes that had them.
    fn release_names(&mut self, children: BTreeMap<Box<[u8]>, NodeId>) -> Vec<NodeId> {
        if !children.is_empty() {
            self.bytes -= LEAF_COST + children.keys().map(|name| name_cost(name)).sum::<u64>();
        }
        children.into_values().collect()
    }

    /// An estimate of the memory this takes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Nodes in the arena, named or not.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }
}

/// The first leaf of a directory's map.
const LEAF_COST: u64 = 256;

/// The string, its allocation, and a map slot at typical fill.
fn name_cost(name: &[u8]) -> u64 {
    name.len() as u64 + 48
}

impl NodeId {
    /// The node's place in the arena.
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

impl Node {
    /// The memory that it takes, and what it takes when the tree is written.
    fn cost(&self) -> u64 {
        let more = match &self.body {
            Body::Symlink(target) => target.len() as u64,
            Body::File { data, .. } => data.heap_bytes(),
            _ => 0,
        };
        size_of::<Node>() as u64 + 32 + more
    }

    pub(crate) fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory(_))
    }
}

// Only `add` makes nodes' IDs, and no node is ever removed.
#[allow(clippy::indexing_slicing)]
impl Index<NodeId> for Tree {
    type Output = Node;

    fn index(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }
}

#[allow(clippy::indexing_slicing)]
impl IndexMut<NodeId> for Tree {
    fn index_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }
}
