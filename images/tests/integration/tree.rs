//! What is in a directory tree, down to the last attribute, and how two trees differ.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::bed::{Failure, sha256};

/// All that is compared of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    pub kind: Kind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, i64),
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// The names of this same file within the tree, if it has several.
    pub names: BTreeSet<Vec<u8>>,
    /// Links as the file system counts them; 0 for directories.
    pub links: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    File { size: u64, digest: String },
    Directory,
    Symlink(Vec<u8>),
    CharDevice(u64),
    BlockDevice(u64),
    Fifo,
    Socket,
}

/// Files by their path; the root is the empty path.
pub type Tree = BTreeMap<Vec<u8>, Facts>;

/// Reads a tree from a mounted file system.
pub fn walk(root: &Path) -> Result<Tree, Failure> {
    let mut tree = Tree::new();
    let mut same: HashMap<(u64, u64), BTreeSet<Vec<u8>>> = HashMap::new();
    let mut inodes = Vec::new();
    let mut pending = vec![root.to_path_buf()];
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path)?;
        let name = path.strip_prefix(root)?.as_os_str().as_bytes().to_vec();
        if metadata.is_dir() {
            for entry in fs::read_dir(&path)? {
                pending.push(entry?.path());
            }
        } else {
            same.entry((metadata.dev(), metadata.ino())).or_default().insert(name.clone());
        }
        inodes.push((name.clone(), (metadata.dev(), metadata.ino())));
        tree.insert(name, facts(&path, &metadata)?);
    }
    for (name, inode) in inodes {
        if let (Some(names), Some(facts)) = (same.get(&inode), tree.get_mut(&name))
            && names.len() > 1
        {
            facts.names = names.clone();
        }
    }
    Ok(tree)
}

fn facts(path: &Path, metadata: &fs::Metadata) -> Result<Facts, Failure> {
    let file_type = metadata.file_type();
    let kind = if file_type.is_dir() {
        Kind::Directory
    } else if file_type.is_symlink() {
        Kind::Symlink(fs::read_link(path)?.into_os_string().as_bytes().to_vec())
    } else if file_type.is_char_device() {
        Kind::CharDevice(metadata.rdev())
    } else if file_type.is_block_device() {
        Kind::BlockDevice(metadata.rdev())
    } else if file_type.is_fifo() {
        Kind::Fifo
    } else if file_type.is_socket() {
        Kind::Socket
    } else {
        Kind::File { size: metadata.len(), digest: sha256(&fs::read(path)?) }
    };
    Ok(Facts {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        xattrs: xattrs(path)?,
        names: BTreeSet::new(),
        links: if kind == Kind::Directory { 0 } else { metadata.nlink() },
        kind,
    })
}

/// All attributes but those of overlayfs itself and the host's SELinux labels.
fn xattrs(path: &Path) -> Result<BTreeMap<String, Vec<u8>>, Failure> {
    let mut list = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut list)?;
    let mut xattrs = BTreeMap::new();
    for name in list[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let name = String::from_utf8_lossy(name).into_owned();
        if name.starts_with("trusted.overlay.") || name == "security.selinux" {
            continue;
        }
        let mut value = vec![0; 64 << 10];
        // The VFS keeps user attributes of anything but files and directories to itself.
        let length = rustix::fs::lgetxattr(path, &name, &mut value)
            .map_err(|error| format!("{name} of {}: {error}", path.display()))?;
        value.truncate(length);
        xattrs.insert(name, value);
    }
    Ok(xattrs)
}

/// An error that shows the first differences, if there are any.
pub fn assert_same(what: &str, actual: &Tree, expected: &Tree) -> Result<(), Failure> {
    let paths: BTreeSet<_> = actual.keys().chain(expected.keys()).collect();
    let differences: Vec<String> = paths
        .into_iter()
        .filter_map(|path| match (actual.get(path), expected.get(path)) {
            (actual, expected) if actual == expected => None,
            (actual, expected) => Some(format!(
                "/{}\n     got {actual:?}\n  wanted {expected:?}",
                String::from_utf8_lossy(path)
            )),
        })
        .collect();
    if differences.is_empty() {
        return Ok(());
    }
    let shown = differences.iter().take(5).cloned().collect::<Vec<_>>().join("\n");
    Err(format!("{what}: {} of {} files differ:\n{shown}", differences.len(), expected.len()).into())
}
