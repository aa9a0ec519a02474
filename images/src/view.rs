//! The file system of an image as a sandbox would see it, read from its layers without mounting anything.
//!
//! ```text
//!   layers, top first:   a/  (opaque)      b ──▶ whiteout      c
//!                        a/  …             b                   c/ …
//! ```
//!
//! A directory is that of all layers down to the first that is opaque or has something else there; a whiteout hides
//! what is below it. Symbolic links are followed within the image and nowhere else: there is no host here to escape to.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};

use crate::erofs::{BlobReader, Data, RawInode};
use crate::limits::{MAX_LINK_DEPTH, NAME_MAX};
use crate::tar::Timestamp;

const OPAQUE: &[u8] = b"trusted.overlay.opaque";
const IMPLIED: &[u8] = b"trusted.overlay.cloche.implied";

/// Layers, as one file system.
#[derive(Debug)]
pub struct View {
    /// Top first.
    blobs: Vec<BlobReader>,
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum FileKind {
    File,
    Directory,
    Symlink,
    /// Major and minor number.
    CharDevice(u32, u32),
    /// Major and minor number.
    BlockDevice(u32, u32),
    Fifo,
}

/// What is known of a file besides its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileInfo {
    /// What it is.
    pub kind: FileKind,
    /// Permission, set-id and sticky bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes; of a link, of its target.
    pub size: u64,
    /// Seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes by full names.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A file of a view.
#[derive(Debug, Clone)]
pub struct Node {
    /// Blobs and inodes, top first; several for a directory only. Empty for the root of no layers.
    places: Vec<(usize, u64)>,
}

/// Where a path leads.
#[derive(Debug)]
pub struct Resolved {
    /// Without links: components from the root.
    pub path: Vec<Vec<u8>>,
    /// What is there, if anything.
    pub node: Option<Node>,
}

impl View {
    pub(crate) fn new(layers: Vec<File>) -> io::Result<View> {
        let blobs = layers.into_iter().rev().map(BlobReader::open).collect::<io::Result<_>>()?;
        Ok(View { blobs })
    }

    /// A file system of nothing but its root.
    pub fn empty() -> View {
        View { blobs: Vec::new() }
    }

    /// The root directory.
    pub fn root(&self) -> io::Result<Node> {
        let roots: Vec<_> = self.blobs.iter().enumerate().map(|(index, blob)| (index, blob.root())).collect();
        self.directory(roots)
    }

    /// A directory of these, down to the first that is opaque.
    fn directory(&self, mut places: Vec<(usize, u64)>) -> io::Result<Node> {
        for (depth, &(blob, number)) in places.iter().enumerate() {
            let reader = self.blob(blob)?;
            let xattrs = reader.xattrs(&reader.inode(number)?)?;
            if xattrs.iter().any(|(name, _)| name == OPAQUE) {
                places.truncate(depth + 1);
                break;
            }
        }
        Ok(Node { places })
    }

    /// What a directory has under a name; nothing, if it is no directory.
    pub fn child(&self, directory: &Node, name: &[u8]) -> io::Result<Option<Node>> {
        if let Some(&(blob, number)) = directory.places.first()
            && kind(&self.blob(blob)?.inode(number)?)? != FileKind::Directory
        {
            return Ok(None);
        }
        let mut found: Vec<(usize, u64)> = Vec::new();
        for &(blob, number) in &directory.places {
            let reader = self.blob(blob)?;
            let Some(&child) = reader.children(number)?.get(name) else { continue };
            let inode = reader.inode(child)?;
            let is_directory = kind(&inode)? == FileKind::Directory;
            if found.is_empty() && !is_directory {
                let is_whiteout = kind(&inode)? == FileKind::CharDevice(0, 0);
                return Ok((!is_whiteout).then(|| Node { places: vec![(blob, child)] }));
            }
            if !is_directory {
                break;
            }
            found.push((blob, child));
        }
        if found.is_empty() { Ok(None) } else { self.directory(found).map(Some) }
    }

    /// The names in a directory, sorted.
    pub fn names(&self, directory: &Node) -> io::Result<Vec<Vec<u8>>> {
        let mut names = BTreeSet::new();
        for &(blob, number) in &directory.places {
            names.extend(self.blob(blob)?.children(number)?.keys().map(|name| name.to_vec()));
        }
        let mut kept = Vec::new();
        for name in names {
            if self.child(directory, &name)?.is_some() {
                kept.push(name);
            }
        }
        Ok(kept)
    }

    /// What is known of a file.
    pub fn info(&self, node: &Node) -> io::Result<FileInfo> {
        let mut info = None;
        for &(blob, number) in &node.places {
            let reader = self.blob(blob)?;
            let inode = reader.inode(number)?;
            let mut xattrs = reader.xattrs(&inode)?;
            let is_implied = xattrs.iter().any(|(name, _)| name == IMPLIED);
            xattrs.retain(|(name, _)| !name.starts_with(b"trusted.overlay."));
            let Timestamp { seconds, nanoseconds } = inode.mtime;
            info = Some(FileInfo {
                kind: kind(&inode)?,
                mode: inode.mode & 0o7777,
                uid: inode.uid,
                gid: inode.gid,
                size: inode.size,
                mtime: (seconds, nanoseconds),
                xattrs,
            });
            // One that has no entry of its own says nothing of the directory below it.
            if !is_implied {
                break;
            }
        }
        Ok(info.unwrap_or(FileInfo {
            kind: FileKind::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: (0, 0),
            xattrs: Vec::new(),
        }))
    }

    /// Which file it is: the same for all names of one.
    pub fn identity(&self, node: &Node) -> Option<(usize, u64)> {
        node.places.first().copied()
    }

    /// How many names its layer gives it.
    pub fn links(&self, node: &Node) -> io::Result<u32> {
        match node.places.first() {
            Some(&(blob, number)) => Ok(self.blob(blob)?.inode(number)?.links),
            None => Ok(1),
        }
    }

    /// A regular file's content.
    pub fn open(&self, node: &Node) -> io::Result<impl Read + '_> {
        let &(blob, number) = node.places.first().ok_or_else(missing)?;
        let reader = self.blob(blob)?;
        Ok(Data::new(reader, reader.inode(number)?))
    }

    /// Where a symbolic link leads.
    pub fn target(&self, node: &Node) -> io::Result<Vec<u8>> {
        let &(blob, number) = node.places.first().ok_or_else(missing)?;
        let reader = self.blob(blob)?;
        reader.content(&reader.inode(number)?)
    }

    /// Follows a path from the root, and the links on it; the last one only if asked to. What is missing has a path
    /// all the same: that which a new file would get.
    pub fn resolve(&self, path: &[u8], follow_last: bool) -> io::Result<Resolved> {
        let mut stack: Vec<(Vec<u8>, Option<Node>)> = Vec::new();
        let mut pending: Vec<Vec<u8>> = path.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec).collect();
        let mut links = 0;
        while let Some(name) = pending.pop() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    stack.pop();
                    continue;
                }
                name if name.len() > NAME_MAX => return Err(io::ErrorKind::InvalidFilename.into()),
                _ => {}
            }
            let directory = match stack.last() {
                Some((_, node)) => node.clone(),
                None => Some(self.root()?),
            };
            let child = match &directory {
                Some(directory) => {
                    if self.info(directory)?.kind != FileKind::Directory {
                        return Err(io::ErrorKind::NotADirectory.into());
                    }
                    self.child(directory, &name)?
                }
                None => None,
            };
            if let Some(node) = &child
                && self.info(node)?.kind == FileKind::Symlink
                && (follow_last || !pending.iter().all(|rest| rest.is_empty()))
            {
                links += 1;
                if links > MAX_LINK_DEPTH {
                    return Err(rustix::io::Errno::LOOP.into());
                }
                let target = self.target(node)?;
                if target.starts_with(b"/") {
                    stack.clear();
                }
                pending.extend(target.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec));
                continue;
            }
            stack.push((name, child));
        }
        let node = match stack.last() {
            Some((_, node)) => node.clone(),
            None => Some(self.root()?),
        };
        Ok(Resolved { path: stack.into_iter().map(|(name, _)| name).collect(), node })
    }

    fn blob(&self, index: usize) -> io::Result<&BlobReader> {
        self.blobs.get(index).ok_or_else(missing)
    }
}

fn missing() -> io::Error {
    io::ErrorKind::NotFound.into()
}

fn kind(inode: &RawInode) -> io::Result<FileKind> {
    // The kernel's `new_decode_dev`.
    let device = inode.payload;
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00);
    Ok(match inode.mode & 0o170_000 {
        0o100_000 => FileKind::File,
        0o040_000 => FileKind::Directory,
        0o120_000 => FileKind::Symlink,
        0o020_000 => FileKind::CharDevice(major, minor),
        0o060_000 => FileKind::BlockDevice(major, minor),
        0o010_000 => FileKind::Fifo,
        other => {
            return Err(io::Error::other(format!("the layer is damaged: a file has the type {other:o}")));
        }
    })
}
