//! Inodes and directories: first every node gets its place, then all are written in that order.

use std::collections::BTreeMap;
use std::ops::{Index, IndexMut};

use super::blob::{BlobError, BlobWriter};
use super::data::FileData;
use super::directory::{self, DirectoryEntry};
use super::format::{
    BLOCK, DEVICE_BYTES, Device, FT_BLOCK_DEVICE, FT_CHAR_DEVICE, FT_DIRECTORY, FT_FIFO, FT_REGULAR,
    FT_SYMLINK, Inode, Layout, NULL_BLOCK, SLOT, Superblock,
};
use crate::tar::Timestamp;
use crate::tree::{Body, Node, NodeId, Tree};

/// Writes the tree behind the data, and then the superblock. Returns the blob's length in bytes.
///
/// If there are devices, nothing was written before, and the tree's files lie on them: block 0 of the tree is the first
/// block of the first device.
pub(crate) fn finish(
    tree: &Tree,
    mut blob: BlobWriter<'_>,
    uuid: [u8; 16],
    devices: &[Device],
) -> Result<u64, BlobError> {
    let plan = Plan::new(tree)?;
    let table_blocks = (devices.len() as u64 * DEVICE_BYTES).div_ceil(BLOCK);
    let metadata_block = u64::from(blob.next_block()?) + table_blocks;
    // Checked once for all: with this the last block's number fits too, and so does every sum below.
    let inode_blocks = plan.inode_bytes.div_ceil(BLOCK);
    let end = metadata_block + inode_blocks + plan.outer_blocks;
    let device_blocks: u64 = devices.iter().map(|device| u64::from(device.blocks)).sum();
    if end + device_blocks >= u64::from(NULL_BLOCK) {
        return Err(BlobError::TooLarge);
    }
    let (blocks, metadata_block) = (end as u32, metadata_block as u32);
    let mut next = blocks;
    for device in devices {
        blob.write(&device.encode(next))?;
        next += device.blocks;
    }
    blob.align(BLOCK)?;
    let data_start = if devices.is_empty() { 0 } else { blocks };
    let writer = Writer { tree, plan: &plan, outer_start: metadata_block + inode_blocks as u32, data_start };
    let start = blob.position();
    for &node in &plan.order {
        blob.zeros(start + plan.places[node].offset - blob.position())?;
        writer.write_inode(&mut blob, node)?;
    }
    blob.align(BLOCK)?;
    for &node in &plan.order {
        writer.write_outer(&mut blob, node)?;
    }
    let superblock = Superblock {
        root: (plan.places[Tree::ROOT].offset / SLOT) as u16,
        inodes: plan.order.len() as u64,
        build_time: plan.build_time,
        blocks,
        metadata_block,
        uuid,
        has_chunks: plan.has_chunks,
        // Far fewer than 2^16: `limits::MAX_LAYERS`.
        devices: devices.len() as u16,
    };
    blob.finish(&superblock.encode())
}

/// Where a node's inode and content go.
#[derive(Clone, Copy)]
struct Place {
    /// Offset of the inode in the metadata.
    offset: u64,
    /// First of the blocks outside the inode area, counted from that area's end.
    outer_block: u32,
    /// How many names the node has; for a directory, itself and its subdirectories' `..` too.
    links: u32,
    /// Of a directory, what `..` means.
    parent: NodeId,
}

/// A place for each node of a tree.
struct Places(Vec<Place>);

impl Places {
    fn new(tree: &Tree) -> Places {
        let nowhere = Place { offset: 0, outer_block: 0, links: 0, parent: Tree::ROOT };
        Places(vec![nowhere; tree.len()])
    }
}

// A node's index is below the tree's length.
#[allow(clippy::indexing_slicing)]
impl Index<NodeId> for Places {
    type Output = Place;

    fn index(&self, id: NodeId) -> &Place {
        &self.0[id.index()]
    }
}

#[allow(clippy::indexing_slicing)]
impl IndexMut<NodeId> for Places {
    fn index_mut(&mut self, id: NodeId) -> &mut Place {
        &mut self.0[id.index()]
    }
}

/// All places, decided before anything is written.
struct Plan {
    places: Places,
    /// Breadth first, a directory's children in order of their names: what is listed together lies together.
    order: Vec<NodeId>,
    build_time: Timestamp,
    inode_bytes: u64,
    outer_blocks: u64,
    has_chunks: bool,
}

impl Plan {
    fn new(tree: &Tree) -> Result<Plan, BlobError> {
        let mut plan = Plan {
            places: Places::new(tree),
            order: Vec::new(),
            build_time: Timestamp::default(),
            inode_bytes: 0,
            outer_blocks: 0,
            has_chunks: false,
        };
        plan.find_nodes(tree);
        // The latest time: where an image was built reproducibly, all files have it, and need the short form only.
        let times = plan.order.iter().map(|&node| tree[node].attributes.mtime);
        plan.build_time = times.max().unwrap_or_default();
        // Slot 0 stays empty: an inode number of 0 reads as "deleted" in old C libraries' `readdir`.
        let mut next = SLOT;
        let order = std::mem::take(&mut plan.order);
        for &node in &order {
            next = plan.place(tree, node, next)?;
        }
        plan.order = order;
        plan.inode_bytes = next;
        Ok(plan)
    }

    /// Lists the nodes that have names, and counts their links.
    fn find_nodes(&mut self, tree: &Tree) {
        self.order.push(Tree::ROOT);
        self.places[Tree::ROOT].links = 2;
        let mut done = 0;
        while let Some(&directory) = self.order.get(done) {
            done += 1;
            let Body::Directory(children) = &tree[directory].body else { continue };
            for &child in children.values() {
                let place = &mut self.places[child];
                if place.links == 0 {
                    self.order.push(child);
                }
                place.links += 1;
                if tree[child].is_directory() {
                    place.links += 1;
                    place.parent = directory;
                    self.places[directory].links += 1;
                }
            }
        }
    }

    /// Places one node at the first fit from `next`, and returns where the next one may start.
    fn place(&mut self, tree: &Tree, id: NodeId, next: u64) -> Result<u64, BlobError> {
        let node = &tree[id];
        let shape = Shape::of(tree, node, self.places[id].links, self.build_time);
        let mut offset = next.next_multiple_of(SLOT);
        // What is packed behind an inode must lie in the inode's own block.
        if shape.inline_bytes > 0 && offset % BLOCK + shape.head_bytes + shape.inline_bytes > BLOCK {
            offset = offset.next_multiple_of(BLOCK);
        }
        let place = &mut self.places[id];
        place.offset = offset;
        place.outer_block = u32::try_from(self.outer_blocks).map_err(|_| BlobError::TooLarge)?;
        self.outer_blocks += shape.outer_blocks;
        self.has_chunks |= shape.layout == Layout::Chunks;
        Ok(offset + shape.head_bytes + shape.inline_bytes + shape.map_bytes)
    }
}

/// How much space a node needs, and where.
struct Shape {
    layout: Layout,
    size: u64,
    /// Inode and extended attributes.
    head_bytes: u64,
    /// Content packed behind them.
    inline_bytes: u64,
    /// A chunk map behind them.
    map_bytes: u64,
    /// Content in blocks outside the inode area.
    outer_blocks: u64,
}

impl Shape {
    fn of(tree: &Tree, node: &Node, links: u32, build_time: Timestamp) -> Shape {
        let size = match &node.body {
            Body::Directory(children) => directory::content_bytes(names(children)),
            Body::File { size, .. } => *size,
            Body::Symlink(target) => target.len() as u64,
            Body::CharDevice(_) | Body::BlockDevice(_) | Body::Fifo => 0,
        };
        let xattr_bytes = node.attributes.xattrs.map_or(0, |set| tree.xattrs(set).bytes().len() as u64);
        let inode = inode(node, links, size, Layout::Plain, 0);
        let head_bytes = inode.encoded_bytes(build_time) + xattr_bytes;
        let mut shape =
            Shape { layout: Layout::Plain, size, head_bytes, inline_bytes: 0, map_bytes: 0, outer_blocks: 0 };
        match &node.body {
            Body::Directory(_) | Body::Symlink(_) => {
                let tail = size % BLOCK;
                if tail > 0 && head_bytes + tail <= BLOCK {
                    shape.layout = Layout::Inline;
                    shape.inline_bytes = tail;
                    shape.outer_blocks = size / BLOCK;
                } else {
                    shape.outer_blocks = size.div_ceil(BLOCK);
                }
            }
            Body::File { data: data @ FileData::Chunks { .. }, .. } => {
                shape.layout = Layout::Chunks;
                shape.map_bytes = 4 * data.chunks(size);
            }
            _ => {}
        }
        shape
    }
}

fn inode(node: &Node, links: u32, size: u64, layout: Layout, payload: u32) -> Inode {
    const S_IFIFO: u16 = 0o010_000;
    const S_IFCHR: u16 = 0o020_000;
    const S_IFDIR: u16 = 0o040_000;
    const S_IFBLK: u16 = 0o060_000;
    const S_IFREG: u16 = 0o100_000;
    const S_IFLNK: u16 = 0o120_000;
    let kind = match node.body {
        Body::Directory(_) => S_IFDIR,
        Body::File { .. } => S_IFREG,
        Body::Symlink(_) => S_IFLNK,
        Body::CharDevice(_) => S_IFCHR,
        Body::BlockDevice(_) => S_IFBLK,
        Body::Fifo => S_IFIFO,
    };
    let attributes = &node.attributes;
    Inode {
        layout,
        xattr_count: 0,
        mode: kind | attributes.mode,
        links,
        size,
        payload,
        number: 0,
        uid: attributes.uid,
        gid: attributes.gid,
        mtime: attributes.mtime,
    }
}

fn file_type(node: &Node) -> u8 {
    match node.body {
        Body::Directory(_) => FT_DIRECTORY,
        Body::File { .. } => FT_REGULAR,
        Body::Symlink(_) => FT_SYMLINK,
        Body::CharDevice(_) => FT_CHAR_DEVICE,
        Body::BlockDevice(_) => FT_BLOCK_DEVICE,
        Body::Fifo => FT_FIFO,
    }
}

/// The children's names with `.` and `..` at their places in the order.
fn names(children: &BTreeMap<Box<[u8]>, NodeId>) -> impl Iterator<Item = &[u8]> {
    with_dots(children).map(|(name, _)| name)
}

/// As [`names`], with the nodes; the dots have none.
fn with_dots(children: &BTreeMap<Box<[u8]>, NodeId>) -> impl Iterator<Item = (&[u8], Option<NodeId>)> {
    let dots: [&[u8]; 2] = [b".", b".."];
    let mut dots = dots.into_iter().peekable();
    let mut children = children.iter().map(|(name, &node)| (&**name, Some(node))).peekable();
    std::iter::from_fn(move || match (dots.peek(), children.peek()) {
        (Some(&dot), Some((name, _))) if dot < *name => dots.next().map(|dot| (dot, None)),
        (Some(_), None) => dots.next().map(|dot| (dot, None)),
        _ => children.next(),
    })
}

struct Writer<'a> {
    tree: &'a Tree,
    plan: &'a Plan,
    /// First block after the inode area.
    outer_start: u32,
    /// The block that is block 0 of the tree's files.
    data_start: u32,
}

impl Writer<'_> {
    fn shape(&self, id: NodeId) -> Shape {
        Shape::of(self.tree, &self.tree[id], self.plan.places[id].links, self.plan.build_time)
    }

    fn write_inode(&self, blob: &mut BlobWriter<'_>, id: NodeId) -> Result<(), BlobError> {
        let node = &self.tree[id];
        let place = self.plan.places[id];
        let shape = self.shape(id);
        let payload = match &node.body {
            Body::CharDevice(device) | Body::BlockDevice(device) => *device,
            Body::File { size: 0, .. } => 0,
            Body::File { data: FileData::Plain { block }, .. } => self.data_start + *block,
            Body::File { data: FileData::Chunks { chunk_bits, .. }, .. } => u32::from(*chunk_bits),
            Body::Directory(_) | Body::Symlink(_) if shape.outer_blocks > 0 => {
                self.outer_start + place.outer_block
            }
            Body::Directory(_) | Body::Symlink(_) | Body::Fifo => 0,
        };
        let mut inode = inode(node, place.links, shape.size, shape.layout, payload);
        inode.number = self.number(id) as u32;
        let xattrs = node.attributes.xattrs.map(|set| self.tree.xattrs(set));
        inode.xattr_count = xattrs.map_or(0, |xattrs| xattrs.count());
        blob.write(&inode.encode(self.plan.build_time))?;
        if let Some(xattrs) = xattrs {
            blob.write(xattrs.bytes())?;
        }
        match &node.body {
            Body::Directory(children) if shape.inline_bytes > 0 => self.directory_blocks(
                id,
                children,
                |bytes, last| if last { blob.write(bytes) } else { Ok(()) },
            ),
            Body::Symlink(target) if shape.inline_bytes > 0 => blob.write(target),
            Body::File { size, data } => write_chunk_map(blob, *size, data, self.data_start),
            _ => Ok(()),
        }
    }

    /// Writes what of a node's content goes outside the inode area.
    fn write_outer(&self, blob: &mut BlobWriter<'_>, id: NodeId) -> Result<(), BlobError> {
        let shape = self.shape(id);
        if shape.outer_blocks == 0 {
            return Ok(());
        }
        match &self.tree[id].body {
            Body::Directory(children) => self.directory_blocks(id, children, |bytes, last| {
                if last && shape.inline_bytes > 0 { Ok(()) } else { blob.write(bytes) }
            })?,
            Body::Symlink(target) => blob.write(target)?,
            _ => {}
        }
        blob.align(BLOCK)
    }

    fn directory_blocks(
        &self,
        id: NodeId,
        children: &BTreeMap<Box<[u8]>, NodeId>,
        out: impl FnMut(&[u8], bool) -> Result<(), BlobError>,
    ) -> Result<(), BlobError> {
        let parent = self.plan.places[id].parent;
        let entries = with_dots(children).map(|(name, child)| match child {
            Some(child) => {
                DirectoryEntry { name, node: self.number(child), file_type: file_type(&self.tree[child]) }
            }
            None => {
                let target = if name == b"." { id } else { parent };
                DirectoryEntry { name, node: self.number(target), file_type: FT_DIRECTORY }
            }
        });
        directory::write_blocks(entries, out)
    }

    /// The inode number.
    fn number(&self, id: NodeId) -> u64 {
        self.plan.places[id].offset / SLOT
    }
}

/// One block address for each chunk; blocks of 4 bytes, gathered so that a map of holes is written fast too.
fn write_chunk_map(
    blob: &mut BlobWriter<'_>,
    size: u64,
    data: &FileData,
    data_start: u32,
) -> Result<(), BlobError> {
    let FileData::Chunks { chunk_bits, runs } = data else { return Ok(()) };
    let mut written = 0;
    let holes = |blob: &mut BlobWriter<'_>, count: u64| {
        const HOLES: [u8; 4096] = [0xff; 4096];
        let mut left = count * 4;
        while left > 0 {
            let step = left.min(HOLES.len() as u64);
            blob.write(HOLES.get(..step as usize).unwrap_or(&HOLES))?;
            left -= step;
        }
        Ok(())
    };
    for run in runs {
        holes(blob, u64::from(run.chunk) - written)?;
        for index in 0..run.count {
            blob.write(&(data_start + run.block + (index << chunk_bits)).to_le_bytes())?;
        }
        written = u64::from(run.chunk) + u64::from(run.count);
    }
    holes(blob, data.chunks(size) - written)
}
