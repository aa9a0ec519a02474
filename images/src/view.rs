//! The file system of an image as a sandbox would see it, read without mounting anything: its layers are merged
//! ([`crate::merge`]), so that there is one answer to what they mean together.
//!
//! Symbolic links are followed within the image and nowhere else: there is no host here to escape to.

use std::fs::File;
use std::io::{self, Read};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::digest::Digest;
use crate::erofs::{BlobReader, Data, RawInode, Reader};
use crate::limits::{MAX_LINK_DEPTH, NAME_MAX};
use crate::merge::{MergeLayer, layer_of, merge};
use crate::tar::Timestamp;

/// Layers, as one file system.
#[derive(Debug)]
pub struct View {
    /// Nothing, of no layers.
    blob: Option<BlobReader>,
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

/// A file of a view: its inode. There is none for the root of no layers.
#[derive(Debug, Clone)]
pub struct Node(Option<u64>);

/// Where a path leads.
#[derive(Debug)]
pub struct Resolved {
    /// Without links: components from the root.
    pub path: Vec<Vec<u8>>,
    /// What is there, if anything.
    pub node: Option<Node>,
}

impl View {
    /// Of layers, bottom first.
    pub(crate) fn new(layers: Vec<File>) -> io::Result<View> {
        if layers.is_empty() {
            return Ok(View::empty());
        }
        // By what they are called here, so that the devices can be told apart.
        let diff_id = |number: usize| Digest::of(&number.to_le_bytes());
        let named = layers.into_iter().enumerate();
        let mut layers: Vec<MergeLayer> =
            named.map(|(number, blob)| MergeLayer { diff_id: diff_id(number), blob }).collect();
        let merged = File::from(memfd_create("view", MemfdFlags::CLOEXEC)?);
        merge(&layers, &merged, [0; 16]).map_err(io::Error::other)?;
        let devices = Reader::open(&merged)?.devices()?;
        let device = |tag| {
            let place = layers.iter().position(|layer| Some(layer.diff_id) == layer_of(tag));
            place.map(|place| layers.swap_remove(place).blob).ok_or_else(missing)
        };
        let devices = devices.iter().map(device).collect::<io::Result<_>>()?;
        Ok(View { blob: Some(BlobReader::open(merged, devices)?) })
    }

    /// A file system of nothing but its root.
    pub fn empty() -> View {
        View { blob: None }
    }

    /// The root directory.
    pub fn root(&self) -> io::Result<Node> {
        Ok(Node(self.blob.as_ref().map(BlobReader::root)))
    }

    /// What a directory has under a name; nothing, if it is no directory.
    pub fn child(&self, directory: &Node, name: &[u8]) -> io::Result<Option<Node>> {
        let Some(number) = directory.0 else { return Ok(None) };
        let blob = self.blob()?;
        if kind(&blob.inode(number)?)? != FileKind::Directory {
            return Ok(None);
        }
        Ok(blob.children(number)?.get(name).map(|&child| Node(Some(child))))
    }

    /// The names in a directory, sorted.
    pub fn names(&self, directory: &Node) -> io::Result<Vec<Vec<u8>>> {
        let Some(number) = directory.0 else { return Ok(Vec::new()) };
        Ok(self.blob()?.children(number)?.keys().map(|name| name.to_vec()).collect())
    }

    /// What is known of a file.
    pub fn info(&self, node: &Node) -> io::Result<FileInfo> {
        let Some(number) = node.0 else {
            return Ok(FileInfo {
                kind: FileKind::Directory,
                mode: 0o755,
                uid: 0,
                gid: 0,
                size: 0,
                mtime: (0, 0),
                xattrs: Vec::new(),
            });
        };
        let blob = self.blob()?;
        let inode = blob.inode(number)?;
        let Timestamp { seconds, nanoseconds } = inode.mtime;
        Ok(FileInfo {
            kind: kind(&inode)?,
            mode: inode.mode & 0o7777,
            uid: inode.uid,
            gid: inode.gid,
            size: inode.size,
            mtime: (seconds, nanoseconds),
            xattrs: blob.xattrs(&inode)?,
        })
    }

    /// Which file it is: the same for all names of one.
    pub fn identity(&self, node: &Node) -> Option<(usize, u64)> {
        node.0.map(|number| (0, number))
    }

    /// How many names it has.
    pub fn links(&self, node: &Node) -> io::Result<u32> {
        node.0.map_or(Ok(1), |number| Ok(self.blob()?.inode(number)?.links))
    }

    /// A regular file's content.
    pub fn open(&self, node: &Node) -> io::Result<impl Read + '_> {
        let blob = self.blob()?;
        Ok(Data::new(blob, blob.inode(node.0.ok_or_else(missing)?)?))
    }

    /// Where a regular file has data, by offset and length; the rest is zeros.
    pub(crate) fn extents(&self, node: &Node) -> io::Result<Vec<(u64, u64)>> {
        let blob = self.blob()?;
        blob.extents(&blob.inode(node.0.ok_or_else(missing)?)?)
    }

    /// A part of a regular file's content.
    pub(crate) fn open_part(&self, node: &Node, extent: (u64, u64)) -> io::Result<impl Read + '_> {
        let blob = self.blob()?;
        Ok(Data::part(blob, blob.inode(node.0.ok_or_else(missing)?)?, extent))
    }

    /// Where a symbolic link leads.
    pub fn target(&self, node: &Node) -> io::Result<Vec<u8>> {
        let blob = self.blob()?;
        blob.content(&blob.inode(node.0.ok_or_else(missing)?)?)
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

    fn blob(&self) -> io::Result<&BlobReader> {
        self.blob.as_ref().ok_or_else(missing)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::{layer_entry, memory};
    use crate::layer::{ExpectedLayer, convert};

    fn layer(entries: &[Vec<u8>]) -> File {
        let mut archive = entries.concat();
        archive.resize(archive.len() + 1024, 0);
        let blob = memory("layer");
        let expected = ExpectedLayer { blob: None, diff_id: Digest::of(&archive) };
        convert(archive.as_slice(), &expected, &blob, &memory("recipe"), |_| {}).unwrap();
        blob
    }

    #[test]
    fn links_to_files_of_lower_layers_are_followed() {
        let view = View::new(vec![
            layer(&[layer_entry(b'0', "etc/users", "", b"anna"), layer_entry(b'2', "lib", "usr/lib", b"")]),
            layer(&[]),
            layer(&[
                layer_entry(b'1', "etc/passwd", "etc/users", b""),
                layer_entry(b'0', "lib/new", "", b"of the top layer"),
                layer_entry(b'0', "etc/.wh.users", "", b""),
            ]),
        ])
        .unwrap();
        let content = |path: &[u8]| {
            let node = view.resolve(path, true).unwrap().node?;
            let mut text = String::new();
            view.open(&node).unwrap().read_to_string(&mut text).unwrap();
            Some((view.info(&node).unwrap().mode, text))
        };
        assert_eq!(content(b"etc/passwd"), Some((0o644, "anna".to_owned())));
        assert_eq!(content(b"etc/users"), None);
        // Below a link of a lower layer, and where that leads.
        let new = Some((0o644, "of the top layer".to_owned()));
        assert_eq!((content(b"lib/new"), content(b"usr/lib/new")), (new.clone(), new));
        assert_eq!(view.names(&view.root().unwrap()).unwrap(), [&b"etc"[..], b"lib", b"usr"]);
    }
}
