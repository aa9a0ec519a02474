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

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::io;

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
    let mut merge = Merge { tree: Tree::new(IMPLIED_ATTRIBUTES), steps: 0, held: BTreeSet::new() };
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

/// A directory of a layer, and where it goes.
type Pending = VecDeque<(u64, NodeId)>;

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
    /// Nodes that are remembered until this layer is done, whatever it does to their names. With a directory are those
    /// that it is in, so that the way up from it stays.
    held: BTreeSet<NodeId>,
}

impl Merge {
    fn apply(&mut self, reader: &Reader<'_>, base: u32) -> Result<(), Problem> {
        self.steps = 0;
        let root = reader.inode(reader.root())?;
        let (attributes, marks) = self.attributes(reader, &root)?;
        let lower = if marks.has_links { self.lower_files(reader)? } else { HashMap::new() };
        let mut layer = Applied { reader, base, lower, several: HashMap::new() };
        self.merge_directory(Tree::ROOT, attributes, &marks);
        let mut pending = Pending::from([(reader.root(), Tree::ROOT)]);
        while let Some((number, to)) = pending.pop_front() {
            for (name, child) in reader.entries(&reader.inode(number)?)? {
                self.apply_entry(&mut layer, to, &name, child, &mut pending)?;
                // Each time: one entry can be given thousands of directories by a link.
                if self.tree.bytes() > MAX_MERGED_BYTES {
                    return Err(Problem::TooLarge);
                }
            }
        }
        std::mem::take(&mut self.held).into_iter().for_each(|node| self.tree.release(node));
        Ok(())
    }

    fn hold(&mut self, node: NodeId) {
        if self.held.insert(node) {
            self.tree.hold(node);
        }
    }

    /// Holds a directory and the way to it.
    fn hold_directory(&mut self, mut node: NodeId) {
        while self.held.insert(node) {
            self.tree.hold(node);
            node = self.tree.parent(node);
        }
    }

    /// The way to a directory from the root, without the root.
    fn way(&mut self, mut node: NodeId) -> Vec<NodeId> {
        let mut way = Vec::new();
        while node != Tree::ROOT {
            way.push(node);
            node = self.tree.parent(node);
        }
        self.steps += way.len() as u64;
        way.reverse();
        way
    }

    fn apply_entry(
        &mut self,
        layer: &mut Applied<'_, '_>,
        to: NodeId,
        name: &[u8],
        number: u64,
        pending: &mut Pending,
    ) -> Result<(), Problem> {
        if let Some(&node) = layer.several.get(&number) {
            self.tree.replace(to, name, node);
            return Ok(());
        }
        let inode = layer.reader.inode(number)?;
        let kind = FileType::from_raw_mode(inode.mode.into());
        if kind == FileType::CharacterDevice && inode.device_number() == 0 {
            self.tree.remove(to, name);
            return Ok(());
        }
        let (attributes, marks) = self.attributes(layer.reader, &inode)?;
        if kind == FileType::Directory {
            let goes_to = self.directory(to, name, attributes, &marks)?;
            pending.push_back((number, goes_to));
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
        self.tree.replace(to, name, node);
        if inode.links > 1 {
            self.hold(node);
            layer.several.insert(number, node);
        }
        Ok(())
    }

    /// Where the content of a layer's directory goes.
    fn directory(
        &mut self,
        to: NodeId,
        name: &[u8],
        attributes: Attributes,
        marks: &Marks,
    ) -> Result<NodeId, Problem> {
        let existing = self.tree.child(to, name);
        match existing.map(|node| (node, &self.tree[node].body)) {
            Some((node, Body::Directory(_))) => {
                self.merge_directory(node, attributes, marks);
                self.hold_directory(node);
                return Ok(node);
            }
            Some((_, Body::Symlink(_))) if marks.implied && !marks.opaque => {
                let make =
                    |tree: &mut Tree, parent, name: &[u8]| Some(walk::make_directory(tree, parent, name));
                let way = self.way(to);
                match walk::to_directory(&mut self.tree, way, name, &mut self.steps, make) {
                    Ok(way) => {
                        let node = way.and_then(|way| way.last().copied()).unwrap_or(Tree::ROOT);
                        self.hold_directory(node);
                        return Ok(node);
                    }
                    Err(EntryProblem::LinkSteps) => {
                        return Err(Problem::Layer(EntryProblem::LinkSteps.to_string()));
                    }
                    // It leads to no directory.
                    Err(_) => {}
                }
            }
            _ => {}
        }
        let node = self.tree.add(Node { attributes, body: Body::Directory(BTreeMap::new()) });
        self.tree.replace(to, name, node);
        self.hold_directory(node);
        Ok(node)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::{layer_entry, memory};
    use crate::layer::{ExpectedLayer, convert};

    fn layer(entries: impl IntoIterator<Item = Vec<u8>>) -> MergeLayer {
        let mut archive = entries.into_iter().collect::<Vec<_>>().concat();
        archive.resize(archive.len() + 1024, 0);
        let diff_id = Digest::of(&archive);
        let blob = memory("layer");
        let expected = ExpectedLayer { blob: None, diff_id };
        convert(archive.as_slice(), &expected, &blob, &memory("recipe"), |_| {}).unwrap();
        MergeLayer { diff_id, blob }
    }

    fn link(name: &str, target: &str) -> Vec<u8> {
        layer_entry(b'2', name, target, b"")
    }

    fn file(name: &str) -> Vec<u8> {
        layer_entry(b'0', name, "", b"")
    }

    /// Ever more directories, of which the deepest is `top`, and links in it that lead to itself; then a layer with
    /// something below each.
    fn links_far_down(count: u32) -> Vec<MergeLayer> {
        let deep = "d/".repeat(45);
        let mut lower = Vec::new();
        let mut top = ".".to_owned();
        for level in 0..39 {
            lower.push(file(&format!("{top}/{deep}x")));
            let next = format!("l{level}");
            lower.push(link(&next, &format!("{top}/{deep}")));
            top = next;
        }
        lower.push(link("top", &top));
        vec![
            layer(lower),
            layer((0..count).map(|number| link(&format!("top/s{number}"), "."))),
            layer((0..count).map(|number| file(&format!("top/s{number}/y{number}")))),
        ]
    }

    #[test]
    fn way_to_a_link_far_down_is_counted() {
        let layers = links_far_down(100);
        let mut merged = Merge { tree: Tree::new(IMPLIED_ATTRIBUTES), steps: 0, held: BTreeSet::new() };
        for layer in &layers {
            merged.apply(&Reader::open(&layer.blob).unwrap(), 0).map_err(|_| "refused").unwrap();
        }
        let (depth, count) = (39 * 45, 100);
        assert!((depth * count..(depth + 3) * (count + 2)).contains(&merged.steps), "{}", merged.steps);
        assert!(merged.held.is_empty());
        // Nothing was made at the links: all went to the one directory.
        assert_eq!(merged.tree.len() as u64, 1 + depth + 39 + 40 + 2 * count);
        let lower = walk::to_directory(&mut merged.tree, Vec::new(), b"top", &mut 0, |_, _, _| None);
        let lower = *lower.unwrap().unwrap().last().unwrap();
        assert!(merged.tree.child(lower, b"y99").is_some());

        let refused = merge(&links_far_down(10_000), &memory("merged"), [0; 16]).unwrap_err();
        assert!(refused.to_string().contains("symbolic links"), "{refused}");
    }
}
