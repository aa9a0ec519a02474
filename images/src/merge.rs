//! An image's layers as one file system, of which only the metadata are written: its files' data lie in the layers'
//! blobs, to which a device table refers (`erofs`).
//!
//! ```text
//!   layer blobs, bottom first ──▶ applied to a tree, one after the other ──▶ superblock, device table, metadata
//! ```
//!
//! What a layer's files mean for those below it is decided here (OCI image-spec: layer.md#applying-changesets):
//!
//! * A file takes the place of whatever had its name. A directory on a directory gives it its attributes, and both
//!   contents are merged; an opaque directory removes the lower content first.
//! * A directory without an entry changes nothing about a lower one. Where a symbolic link is instead, it is followed
//!   below the root, as umoci and containerd do; if it leads to no directory, the link is replaced.
//! * A whiteout removes what lower layers have under its name.
//! * A hard link to a file of lower layers is one more name of what they have there before this layer changes it. Links
//!   on the way are followed. That there is no such file, or that it is a directory, is an error.
//!
//! Layers are what [`crate::layer`] has made of archives, and so of bounded shape; what a disk may have done to them
//! since is an error, too. Nothing here recurses, and the tree's memory is bounded.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::rc::Rc;

use rustix::fs::FileType;

use crate::digest::Digest;
use crate::erofs::{self, BlobError, BlobWriter, Device, EncodedXattrs, ReadInode, Reader};
use crate::layer::{EntryProblem, IMPLIED_ATTRIBUTES, marks, walk};
use crate::limits::MAX_MERGED_BYTES;
use crate::store::StoreError;
use crate::tar::shown;
use crate::tree::{Attributes, Body, Node, NodeId, Tree};

/// Why layers cannot be merged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// A layer's file system cannot be read, or is damaged.
    #[error("cannot read the file system of layer {number} of {count} ({diff_id})")]
    Read {
        /// From 1, the bottom.
        number: usize,
        /// How many there are.
        count: usize,
        /// The layer.
        diff_id: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer does not go with those below it.
    #[error("layer {number} of {count} ({diff_id}): {reason}")]
    Layer {
        /// From 1, the bottom.
        number: usize,
        /// How many there are.
        count: usize,
        /// The layer.
        diff_id: Digest,
        /// What is wrong.
        reason: String,
    },
    /// All layers together are too large.
    #[error("the image's names and attributes take more than {0} MiB of memory")]
    TooLarge(u64),
    /// The merged file system could not be written.
    #[error("cannot merge the image's layers")]
    Blob(#[from] BlobError),
    /// The store cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A layer, bottom first.
pub(crate) struct MergeLayer {
    pub(crate) diff_id: Digest,
    pub(crate) blob: File,
}

/// Writes the metadata of all layers together into an empty file. The same layers give the same bytes.
pub(crate) fn merge(layers: &[MergeLayer], output: &File, uuid: [u8; 16]) -> Result<(), MergeError> {
    let mut merge = Merge { tree: Tree::new(IMPLIED_ATTRIBUTES), steps: 0, held: Vec::new() };
    let mut devices: Vec<Device> = Vec::new();
    let mut bases: HashMap<Digest, u32> = HashMap::new();
    let mut next = 0_u32;
    for (index, layer) in layers.iter().enumerate() {
        let (number, count, diff_id) = (index + 1, layers.len(), layer.diff_id);
        let fail = |problem| match problem {
            Problem::Read(source) => MergeError::Read { number, count, diff_id, source },
            Problem::Layer(reason) => MergeError::Layer { number, count, diff_id, reason },
            Problem::TooLarge => MergeError::TooLarge(MAX_MERGED_BYTES >> 20),
        };
        let reader = Reader::open(&layer.blob).map_err(|error| fail(error.into()))?;
        let blocks = reader.blocks();
        let base = match bases.get(&diff_id) {
            Some(base) => *base,
            None if reader.has_data() => {
                let base = next;
                next = next.checked_add(blocks).ok_or(BlobError::TooLarge)?;
                devices.push(Device { tag: tag(diff_id), blocks });
                bases.insert(diff_id, base);
                base
            }
            None => 0,
        };
        merge.apply(&reader, base).map_err(fail)?;
    }
    erofs::finish(&merge.tree, BlobWriter::new(output), uuid, &devices)?;
    Ok(())
}

/// How a device table names a layer.
fn tag(diff_id: Digest) -> [u8; erofs::DEVICE_TAG_BYTES] {
    let mut tag = [0; erofs::DEVICE_TAG_BYTES];
    let hex = diff_id.hex();
    tag.iter_mut().zip(hex.bytes()).for_each(|(byte, digit)| *byte = digit);
    tag
}

/// The layer that a device table names like this.
pub(crate) fn layer_of(tag: &[u8; erofs::DEVICE_TAG_BYTES]) -> Option<Digest> {
    Digest::from_hex(std::str::from_utf8(tag).ok()?)
}

/// Why one layer cannot be applied.
enum Problem {
    Read(io::Error),
    Layer(String),
    TooLarge,
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Problem::Read(error)
    }
}

/// A directory on the way down from the root.
struct Step {
    node: NodeId,
    parent: Option<Rc<Step>>,
}

impl Step {
    /// The way to here from the root, without the root.
    fn stack(&self) -> Vec<NodeId> {
        let mut stack = Vec::new();
        let mut step = self;
        while let Some(parent) = &step.parent {
            stack.push(step.node);
            step = parent;
        }
        stack.reverse();
        stack
    }

    fn along(stack: &[NodeId]) -> Rc<Step> {
        let root = Rc::new(Step { node: Tree::ROOT, parent: None });
        stack.iter().fold(root, |parent, &node| Step::below(&parent, node))
    }

    fn below(parent: &Rc<Step>, node: NodeId) -> Rc<Step> {
        Rc::new(Step { node, parent: Some(parent.clone()) })
    }
}

/// A directory of a layer, and where it goes.
type Pending = VecDeque<(u64, Rc<Step>)>;

/// What a layer's marks say of a file.
#[derive(Default)]
struct Marks {
    opaque: bool,
    implied: bool,
    link: Option<Vec<u8>>,
    has_links: bool,
}

/// What is known of a layer while it is applied.
struct Applied<'r, 'f> {
    reader: &'r Reader<'f>,
    /// The number of the layer's first block.
    base: u32,
    /// The lower files to which the layer has links, by path.
    lower: HashMap<Vec<u8>, NodeId>,
    /// Its files that have several names, by inode.
    several: HashMap<u64, NodeId>,
}

struct Merge {
    tree: Tree,
    /// What following links has cost in this layer.
    steps: u64,
    /// Nodes that are remembered until this layer is done, whatever it does to their names.
    held: Vec<NodeId>,
}

impl Merge {
    fn apply(&mut self, reader: &Reader<'_>, base: u32) -> Result<(), Problem> {
        self.steps = 0;
        let root = reader.inode(reader.root())?;
        let (attributes, marks) = self.attributes(reader, &root)?;
        let lower = if marks.has_links { self.lower_files(reader)? } else { HashMap::new() };
        let mut layer = Applied { reader, base, lower, several: HashMap::new() };
        self.merge_directory(Tree::ROOT, attributes, &marks);
        let mut pending = Pending::from([(reader.root(), Step::along(&[]))]);
        while let Some((number, to)) = pending.pop_front() {
            for (name, child) in reader.entries(&reader.inode(number)?)? {
                self.apply_entry(&mut layer, &to, &name, child, &mut pending)?;
            }
            if self.tree.bytes() > MAX_MERGED_BYTES {
                return Err(Problem::TooLarge);
            }
        }
        std::mem::take(&mut self.held).into_iter().for_each(|node| self.tree.release(node));
        Ok(())
    }

    fn hold(&mut self, node: NodeId) {
        self.tree.hold(node);
        self.held.push(node);
    }

    fn apply_entry(
        &mut self,
        layer: &mut Applied<'_, '_>,
        to: &Rc<Step>,
        name: &[u8],
        number: u64,
        pending: &mut Pending,
    ) -> Result<(), Problem> {
        if let Some(&node) = layer.several.get(&number) {
            self.tree.replace(to.node, name, node);
            return Ok(());
        }
        let inode = layer.reader.inode(number)?;
        let kind = FileType::from_raw_mode(inode.mode.into());
        if kind == FileType::CharacterDevice && inode.device_number() == 0 {
            self.tree.remove(to.node, name);
            return Ok(());
        }
        let (attributes, marks) = self.attributes(layer.reader, &inode)?;
        if kind == FileType::Directory {
            let step = self.directory(to, name, attributes, &marks);
            pending.push_back((number, step));
            return Ok(());
        }
        let node = match marks.link {
            Some(target) => *layer.lower.get(&target).ok_or_else(|| {
                let (name, target) = (shown(name), shown(&target));
                Problem::Layer(format!(
                    "{name} is a hard link to {target}, which neither this layer nor a lower one has as a file"
                ))
            })?,
            None => {
                let body = body(layer, &inode, kind)?;
                self.tree.add(Node { attributes, body })
            }
        };
        self.tree.replace(to.node, name, node);
        if inode.links > 1 {
            self.hold(node);
            layer.several.insert(number, node);
        }
        Ok(())
    }

    /// Where the content of a layer's directory goes.
    fn directory(&mut self, to: &Rc<Step>, name: &[u8], attributes: Attributes, marks: &Marks) -> Rc<Step> {
        let existing = self.tree.child(to.node, name);
        match existing.map(|node| (node, &self.tree[node].body)) {
            Some((node, Body::Directory(_))) => {
                self.merge_directory(node, attributes, marks);
                self.hold(node);
                return Step::below(to, node);
            }
            Some((_, Body::Symlink(_))) if marks.implied && !marks.opaque => {
                let make =
                    |tree: &mut Tree, parent, name: &[u8]| Some(walk::make_directory(tree, parent, name));
                let walked = walk::to_directory(&mut self.tree, to.stack(), name, &mut self.steps, make);
                if let Ok(Some(stack)) = walked {
                    stack.iter().for_each(|&node| self.hold(node));
                    return Step::along(&stack);
                }
            }
            _ => {}
        }
        let node = self.tree.add(Node { attributes, body: Body::Directory(BTreeMap::new()) });
        self.tree.replace(to.node, name, node);
        self.hold(node);
        Step::below(to, node)
    }

    /// Puts a layer's directory upon one that is there.
    fn merge_directory(&mut self, node: NodeId, attributes: Attributes, marks: &Marks) {
        if marks.opaque {
            self.tree.clear(node);
        }
        if !marks.implied {
            self.tree[node].attributes = attributes;
        }
    }

    /// The files of lower layers to which a layer has hard links, before anything of it is applied.
    fn lower_files(&mut self, reader: &Reader<'_>) -> Result<HashMap<Vec<u8>, NodeId>, Problem> {
        let mut lower = HashMap::new();
        let mut pending = VecDeque::from([reader.root()]);
        while let Some(directory) = pending.pop_front() {
            for (_, number) in reader.entries(&reader.inode(directory)?)? {
                let inode = reader.inode(number)?;
                match FileType::from_raw_mode(inode.mode.into()) {
                    FileType::Directory => pending.push_back(number),
                    FileType::RegularFile => {
                        let mut xattrs = reader.xattrs(&inode)?.into_iter();
                        let Some((_, target)) = xattrs.find(|(name, _)| name == marks::LINK) else {
                            continue;
                        };
                        if !lower.contains_key(&target)
                            && let Some(node) = self.lower_file(&target)?
                        {
                            self.hold(node);
                            lower.insert(target, node);
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(lower)
    }

    /// The file at a path, unless that is a directory.
    fn lower_file(&mut self, path: &[u8]) -> Result<Option<NodeId>, Problem> {
        let slash = path.iter().rposition(|&byte| byte == b'/');
        let (parents, last) = slash.map_or((&b""[..], path), |at| {
            let (parents, last) = path.split_at(at);
            (parents, last.get(1..).unwrap_or_default())
        });
        let walked = walk::to_directory(&mut self.tree, Vec::new(), parents, &mut self.steps, |_, _, _| None);
        let directory = match walked {
            Ok(stack) => stack.map(|stack| stack.last().copied().unwrap_or(Tree::ROOT)),
            Err(EntryProblem::LinkSteps) => return Err(Problem::Layer(EntryProblem::LinkSteps.to_string())),
            Err(_) => None,
        };
        let node = directory.and_then(|directory| self.tree.child(directory, last));
        Ok(node.filter(|&node| !self.tree[node].is_directory()))
    }

    fn attributes(&mut self, reader: &Reader<'_>, inode: &ReadInode) -> Result<(Attributes, Marks), Problem> {
        let mut found = Marks::default();
        let mut kept = reader.xattrs(inode)?;
        kept.retain_mut(|(name, value)| {
            match name.as_slice() {
                marks::OPAQUE => found.opaque = true,
                marks::IMPLIED => found.implied = true,
                marks::LINK => found.link = Some(std::mem::take(value)),
                marks::HAS_LINKS => found.has_links = true,
                name => return !name.starts_with(marks::PREFIX),
            }
            false
        });
        let damaged = |_| io::Error::other("its extended attributes are damaged");
        let encoded = EncodedXattrs::encode(&kept).map_err(damaged)?;
        let attributes = Attributes {
            mode: inode.mode & 0o7777,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            xattrs: encoded.map(|encoded| self.tree.add_xattrs(encoded)),
        };
        Ok((attributes, found))
    }
}

fn body(layer: &Applied<'_, '_>, inode: &ReadInode, kind: FileType) -> io::Result<Body> {
    Ok(match kind {
        FileType::RegularFile => Body::File { size: inode.size, data: layer.reader.data(inode, layer.base)? },
        FileType::Symlink => Body::Symlink(layer.reader.link_target(inode)?.into()),
        FileType::CharacterDevice => Body::CharDevice(inode.device_number()),
        FileType::BlockDevice => Body::BlockDevice(inode.device_number()),
        FileType::Fifo => Body::Fifo,
        _ => return Err(io::Error::other("it has a file of a kind that is never written")),
    })
}
