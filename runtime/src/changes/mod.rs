//! A directory tree as a tar archive, made while it is read: what a container has written, as a layer of an image.
//!
//! ```text
//!  overlay's upper directory ──▶ names, sorted ──▶ headers ──▶ content ──▶ two empty blocks
//!    char device 0:0              .wh.NAME                 (OCI image-spec: layer.md#whiteouts)
//!    trusted.overlay.opaque=y     .wh..wh..opq in it
//! ```
//!
//! Owners, modes, times, extended attributes, hard links, devices, holes and names of any bytes are kept. Left out is
//! what no layer has: sockets, and attributes that belong to this machine (overlayfs' own, SELinux labels).
//!
//! The tree may be hostile, and it may change meanwhile, if nobody has stopped what writes to it: no link is followed,
//! what has gone is left out, a file that has become shorter ends in zeros, and memory is bounded.

mod header;
mod sparse;

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::Path,
};

use rustix::{
    fs::{
        Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, getxattr, listxattr, major, minor, open,
        openat, openat2, readlinkat,
    },
    io::Errno,
};

use header::{BLOCK, Header, Kind, PLAIN};
use sparse::Extent;

use crate::rootfs;

/// Bytes of a path with its end; no layer has longer ones.
const PATH_MAX: usize = 4096;
/// Names that are in memory at once, of directories on the way and of files with several links, in bytes.
const MAX_NAMES_BYTES: usize = 256 << 20;
/// What a name takes besides its bytes.
const NAME_OVERHEAD_BYTES: usize = 64;
/// The kernel's limit of a list of names, and of one value (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const MAX_XATTR_BYTES: usize = 64 << 10;
/// All names and values of one file: what others take as one header of an entry.
const MAX_XATTRS_BYTES: usize = (1 << 20) - (64 << 10);
/// The upper directory's own mode, as it is made.
const ROOT_MODE: u32 = 0o755;
/// What a runtime covers by mounts, and makes where an image lacks it.
const COVERED: [&[u8]; 3] = [b"dev", b"proc", b"sys"];

/// Why a tree is no archive.
#[derive(Debug, thiserror::Error)]
enum TreeError {
    #[error("cannot {action} {} of the writable layer", shown(.path))]
    Io { action: &'static str, path: Vec<u8>, source: Errno },
    #[error("the path {} is too long for a layer: more than 4095 bytes", shown(.0))]
    PathTooLong(Vec<u8>),
    #[error("{} cannot be in a layer: names that start with .wh. stand for removals there", shown(.0))]
    WhiteoutName(Vec<u8>),
    #[error("the extended attribute {} of {} cannot be in a layer: its name has a `=`", shown(.1), shown(.0))]
    AttributeName(Vec<u8>, Vec<u8>),
    #[error("the extended attributes of {} take more than a layer's {} KiB", shown(.0), MAX_XATTRS_BYTES >> 10)]
    TooManyAttributes(Vec<u8>),
    #[error("too many names in one directory, or files with several links: more than {} MiB", MAX_NAMES_BYTES >> 20)]
    TooManyNames,
}

/// A name in an error: quoted, escaped, and cut where nobody reads on.
fn shown(name: &[u8]) -> String {
    let start = name.get(..200).unwrap_or(name);
    format!("{:?}", String::from_utf8_lossy(start))
}

impl From<TreeError> for io::Error {
    fn from(error: TreeError) -> Self {
        Self::other(error)
    }
}

/// The archive, as it is read.
#[derive(Debug)]
pub struct Changes {
    root: OwnedFd,
    /// The directory that is being read; opened again after one within it.
    directory: Option<OwnedFd>,
    levels: Vec<Level>,
    path: Vec<u8>,
    /// The first name of each file that has several.
    links: HashMap<u64, Vec<u8>>,
    names_bytes: usize,
    /// What is to be read next, before the data.
    out: Vec<u8>,
    out_at: usize,
    data: Option<Data>,
}

/// A directory on the way, and what is left to read of it.
#[derive(Debug)]
struct Level {
    names: std::vec::IntoIter<CString>,
    names_bytes: usize,
    path_length: usize,
}

/// A file's content on its way.
#[derive(Debug)]
struct Data {
    file: File,
    extents: std::vec::IntoIter<Extent>,
    now: Extent,
    total: u64,
}

impl Changes {
    /// Of a container's writable layer: see [`crate::Container::writable`].
    pub fn of_base(base: BorrowedFd<'_>) -> io::Result<Self> {
        Self::new(rootfs::upper(base)?)
    }

    fn new(root: OwnedFd) -> io::Result<Self> {
        let mut changes = Self {
            root,
            directory: None,
            levels: Vec::new(),
            path: Vec::new(),
            links: HashMap::new(),
            names_bytes: 0,
            out: Vec::new(),
            out_at: 0,
            data: None,
        };
        let stat = fstat(&changes.root).map_err(|errno| changes.failed("look at", errno))?;
        let xattrs = changes.xattrs(changes.root.as_fd())?;
        let is_changed =
            stat.st_mode & 0o7777 != ROOT_MODE || stat.st_uid != 0 || stat.st_gid != 0 || !xattrs.is_empty();
        if is_changed {
            let header = Header { path: b"./", kind: Kind::Directory, xattrs: &xattrs, ..of_stat(&stat) };
            header.write(&mut changes.out);
        }
        changes.descend()?;
        Ok(changes)
    }

    fn failed(&self, action: &'static str, source: Errno) -> TreeError {
        let path = [b"/", &self.path[..]].concat();
        TreeError::Io { action, path, source }
    }

    /// The current directory; `None` if it is gone.
    fn open_directory(&self) -> Result<Option<OwnedFd>, TreeError> {
        let path: &[u8] = if self.path.is_empty() { b"." } else { &self.path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Not even if a directory on the way becomes a link does this lead elsewhere.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        match openat2(&self.root, Path::new(std::ffi::OsStr::from_bytes(path)), flags, Mode::empty(), resolve)
        {
            Ok(directory) => Ok(Some(directory)),
            Err(errno) if is_gone(errno) => Ok(None),
            Err(errno) => Err(self.failed("open", errno)),
        }
    }

    /// Goes on with what is in the current directory.
    fn descend(&mut self) -> Result<(), TreeError> {
        let mut names = Vec::new();
        let mut names_bytes = 0;
        if let Some(directory) = self.open_directory()? {
            let listing = Dir::read_from(&directory).map_err(|errno| self.failed("list", errno))?;
            for entry in listing {
                let entry = entry.map_err(|errno| self.failed("list", errno))?;
                let name = entry.file_name();
                if name == c"." || name == c".." {
                    continue;
                }
                names_bytes += name.count_bytes() + NAME_OVERHEAD_BYTES;
                if self.names_bytes + names_bytes > MAX_NAMES_BYTES {
                    return Err(TreeError::TooManyNames);
                }
                names.push(name.to_owned());
            }
            self.directory = Some(directory);
        }
        // So that the same tree gives the same archive.
        names.sort_unstable();
        self.names_bytes += names_bytes;
        self.levels.push(Level { names: names.into_iter(), names_bytes, path_length: self.path.len() });
        Ok(())
    }

    /// Appends the next entry, or the archive's end; false if that was before.
    fn advance(&mut self) -> Result<bool, TreeError> {
        let Some(level) = self.levels.last_mut() else { return Ok(false) };
        self.path.truncate(level.path_length);
        let Some(name) = level.names.next() else {
            self.names_bytes -= level.names_bytes;
            self.levels.pop();
            self.directory = None;
            if self.levels.is_empty() {
                self.out.resize(self.out.len() + 2 * BLOCK, 0);
            }
            return Ok(true);
        };
        if self.directory.is_none() {
            self.directory = self.open_directory()?;
        }
        // Taken out, so that what follows may change the rest.
        let Some(directory) = self.directory.take() else { return Ok(true) };
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend(name.to_bytes());
        if self.path.len() >= PATH_MAX {
            return Err(TreeError::PathTooLong(self.path.clone()));
        }
        let is_directory = self.add(directory.as_fd(), &name)?;
        if is_directory {
            self.descend()?;
        } else {
            self.directory = Some(directory);
        }
        Ok(true)
    }

    /// Appends one entry; true if it is a directory.
    fn add(&mut self, directory: BorrowedFd<'_>, name: &CStr) -> Result<bool, TreeError> {
        // All that follows is of this one thing, whatever its name stands for later: to open a device node that has
        // taken a file's place would be to use the device, with rights that the container has not.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let node = match openat(directory, name, flags, Mode::empty()) {
            Ok(node) => node,
            Err(errno) if is_gone(errno) => return Ok(false),
            Err(errno) => return Err(self.failed("look at", errno)),
        };
        let node = node.as_fd();
        let stat = fstat(node).map_err(|errno| self.failed("look at", errno))?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            FileType::CharacterDevice => Kind::CharDevice,
            FileType::BlockDevice => Kind::BlockDevice,
            FileType::Fifo => Kind::Fifo,
            _ => return Ok(false),
        };
        if kind == Kind::CharDevice && stat.st_rdev == 0 {
            self.add_marker(&[b".wh.", name.to_bytes()].concat());
            return Ok(false);
        }
        if name.to_bytes().starts_with(b".wh.") {
            return Err(TreeError::WhiteoutName(self.path.clone()));
        }
        if kind == Kind::Directory {
            return self.add_directory(node, &stat);
        }
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&stat.st_ino) {
                let header =
                    Header { path: &self.path, kind: Kind::HardLink, link_target: first, ..of_stat(&stat) };
                header.write(&mut self.out);
                return Ok(false);
            }
            self.names_bytes += self.path.len() + NAME_OVERHEAD_BYTES;
            if self.names_bytes > MAX_NAMES_BYTES {
                return Err(TreeError::TooManyNames);
            }
            self.links.insert(stat.st_ino, self.path.clone());
        }
        let xattrs = self.xattrs(node)?;
        if kind == Kind::File {
            return self.add_file(node, &xattrs).map(|()| false);
        }
        let target = match kind {
            Kind::Symlink => {
                let target = readlinkat(node, c"", Vec::new());
                target.map_err(|errno| self.failed("read the link", errno))?.into_bytes()
            }
            _ => Vec::new(),
        };
        let device = match kind {
            Kind::CharDevice | Kind::BlockDevice => (major(stat.st_rdev), minor(stat.st_rdev)),
            _ => (0, 0),
        };
        let header = Header {
            path: &self.path,
            kind,
            link_target: &target,
            device,
            xattrs: &xattrs,
            ..of_stat(&stat)
        };
        header.write(&mut self.out);
        Ok(false)
    }

    /// Appends the sign that stands, beside the current path, for what an overlay has marks for.
    fn add_marker(&mut self, name: &[u8]) {
        let parent = self.path.iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
        let path = [self.path.get(..parent).unwrap_or_default(), name].concat();
        Header { path: &path, ..PLAIN }.write(&mut self.out);
    }

    fn add_directory(&mut self, directory: BorrowedFd<'_>, stat: &Stat) -> Result<bool, TreeError> {
        if COVERED.contains(&&self.path[..]) && is_empty(directory) {
            return Ok(false);
        }
        let xattrs = self.xattrs(directory)?;
        let path = [&self.path[..], b"/"].concat();
        let header = Header { path: &path, kind: Kind::Directory, xattrs: &xattrs, ..of_stat(stat) };
        header.write(&mut self.out);
        if is_opaque(directory) {
            let marker = [&path[..], b".wh..wh..opq"].concat();
            Header { path: &marker, ..PLAIN }.write(&mut self.out);
        }
        Ok(true)
    }

    fn add_file(&mut self, node: BorrowedFd<'_>, xattrs: &[header::Xattr]) -> Result<(), TreeError> {
        let opened = open(by_proc(node), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let file = File::from(opened.map_err(|errno| self.failed("open", errno))?);
        let stat = fstat(&file).map_err(|errno| self.failed("look at", errno))?;
        let size = stat.st_size as u64;
        let whole = vec![Extent { offset: 0, length: size }];
        let has_holes = (stat.st_blocks as u64).saturating_mul(512) < size;
        let extents = match has_holes {
            true => sparse::extents(&file, size).map_err(|error| {
                self.failed("find the holes of", Errno::from_io_error(&error).unwrap_or(Errno::IO))
            })?,
            false => whole.clone(),
        };
        let is_sparse = extents != whole;
        let map = if is_sparse { header::sparse_map(&extents) } else { Vec::new() };
        let stored: u64 = extents.iter().map(|extent| extent.length).sum();
        let header = Header {
            path: &self.path,
            size: map.len() as u64 + stored,
            xattrs,
            sparse_size: is_sparse.then_some(size),
            ..of_stat(&stat)
        };
        header.write(&mut self.out);
        self.out.extend(map);
        let now = Extent { offset: 0, length: 0 };
        self.data = Some(Data { file, extents: extents.into_iter(), now, total: stored });
        Ok(())
    }

    /// The attributes that a layer keeps, sorted by name.
    fn xattrs(&self, node: BorrowedFd<'_>) -> Result<Vec<header::Xattr>, TreeError> {
        let path = by_proc(node);
        let mut names = Vec::with_capacity(256);
        let listed = match listxattr(&path, rustix::buffer::spare_capacity(&mut names)) {
            Err(Errno::RANGE) => {
                names.reserve(MAX_XATTR_BYTES);
                listxattr(&path, rustix::buffer::spare_capacity(&mut names))
            }
            listed => listed,
        };
        match listed {
            Ok(_) => {}
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(errno) => return Err(self.failed("list the extended attributes of", errno)),
        }
        let mut xattrs = Vec::new();
        let mut bytes = 0;
        for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            if name.starts_with(b"trusted.overlay.") || name == b"security.selinux" {
                continue;
            }
            if name.contains(&b'=') {
                return Err(TreeError::AttributeName(self.path.clone(), name.to_vec()));
            }
            let mut value = Vec::with_capacity(MAX_XATTR_BYTES);
            match getxattr(&path, name, rustix::buffer::spare_capacity(&mut value)) {
                Ok(_) => {}
                Err(Errno::NODATA) => continue,
                Err(errno) => return Err(self.failed("read the extended attributes of", errno)),
            }
            value.shrink_to_fit();
            bytes += name.len() + value.len();
            if bytes > MAX_XATTRS_BYTES {
                return Err(TreeError::TooManyAttributes(self.path.clone()));
            }
            xattrs.push((name.to_vec(), value));
        }
        xattrs.sort_unstable();
        Ok(xattrs)
    }
}

/// What was opened as a path only, for calls that want more of it. This leads to the thing itself, even if it is a link.
fn by_proc(node: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", node.as_raw_fd())
}

fn is_empty(directory: BorrowedFd<'_>) -> bool {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let listing = openat(directory, c".", flags, Mode::empty()).and_then(Dir::new);
    listing.is_ok_and(|listing| {
        listing.flatten().all(|entry| matches!(entry.file_name().to_bytes(), b"." | b".."))
    })
}

/// Kernel: `overlayfs.rst`, "whiteouts and opaque directories".
fn is_opaque(directory: BorrowedFd<'_>) -> bool {
    let mut value = [0; 2];
    getxattr(by_proc(directory), c"trusted.overlay.opaque", &mut value) == Ok(1) && value[0] == b'y'
}

fn of_stat(stat: &Stat) -> Header<'static> {
    let mode = stat.st_mode & 0o7777;
    let mtime = (stat.st_mtime, stat.st_mtime_nsec as u32);
    Header { mode, uid: stat.st_uid, gid: stat.st_gid, mtime, ..PLAIN }
}

/// Whether this means that a name is not there any more, or another kind of thing.
fn is_gone(errno: Errno) -> bool {
    matches!(errno, Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE | Errno::NXIO)
}

impl Data {
    /// Reads on; 0 at the end.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.now.length == 0 {
            let Some(next) = self.extents.next() else { return Ok(0) };
            self.now = next;
        }
        let most = buffer.len().min(usize::try_from(self.now.length).unwrap_or(usize::MAX));
        let Some(piece) = buffer.get_mut(..most) else { return Ok(0) };
        let mut count = self.file.read_at(piece, self.now.offset)?;
        if count == 0 {
            // It has become shorter, but its length is told already.
            piece.fill(0);
            count = most;
        }
        self.now.offset += count as u64;
        self.now.length -= count as u64;
        Ok(count)
    }
}

impl Read for Changes {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(left) = self.out.get(self.out_at..).filter(|left| !left.is_empty()) {
                let count = left.len().min(buffer.len());
                let (from, to) = (left.get(..count), buffer.get_mut(..count));
                from.zip(to).into_iter().for_each(|(from, to)| to.copy_from_slice(from));
                self.out_at += count;
                return Ok(count);
            }
            self.out.clear();
            self.out_at = 0;
            if let Some(data) = &mut self.data {
                let count = data.read(buffer)?;
                if count > 0 {
                    return Ok(count);
                }
                let padding = data.total.next_multiple_of(BLOCK as u64) - data.total;
                self.out.resize(padding as usize, 0);
                self.data = None;
            } else if !self.advance()? {
                return Ok(0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
        process::{Command, Stdio},
    };

    use rustix::fs::CWD;

    use super::*;

    fn open(path: &Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    fn archive(path: &Path) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        // In uneven pieces, as sockets take them.
        let mut changes = Changes::new(open(path))?;
        let mut piece = [0; 777];
        loop {
            match changes.read(&mut piece)? {
                0 => return Ok(bytes),
                count => bytes.extend(&piece[..count]),
            }
        }
    }

    /// What GNU tar lists.
    fn listed(archive: &[u8]) -> Vec<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), archive).unwrap();
        let output =
            Command::new("tar").arg("-tf").arg(file.path()).stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
    }

    #[test]
    fn attributes_of_a_file_are_bounded_in_all() {
        let from = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = from.path().join("file");
        fs::write(&file, "x").unwrap();
        let set = |number: usize| {
            let value = vec![7; 60_000];
            rustix::fs::setxattr(&file, format!("user.{number}"), &value, rustix::fs::XattrFlags::empty())
        };
        if set(0) == Err(Errno::OPNOTSUPP) {
            eprintln!("not run: needs a tmpfs that keeps users' extended attributes (Linux 6.6)");
            return;
        }
        (1..16).for_each(|number| set(number).unwrap());
        archive(from.path()).unwrap();
        (16..20).for_each(|number| set(number).unwrap());
        let error = archive(from.path()).unwrap_err().to_string();
        assert_eq!(error, "the extended attributes of \"file\" take more than a layer's 960 KiB");
    }

    #[test]
    fn tree_is_unpacked_as_it_was_by_gnu_tar() {
        let from = tempfile::tempdir_in("/dev/shm").unwrap();
        let root = from.path();
        let long = "l".repeat(200);
        fs::create_dir_all(root.join(&long).join(&long)).unwrap();
        fs::write(root.join(&long).join(&long).join("deep"), "deep").unwrap();
        fs::write(root.join("b"), vec![7; 100_000]).unwrap();
        fs::hard_link(root.join("b"), root.join("c")).unwrap();
        fs::write(root.join(std::ffi::OsStr::from_bytes(b"bad\xff")), "x").unwrap();
        symlink("b", root.join("link")).unwrap();
        symlink("t".repeat(150), root.join("long-link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
        let sparse = File::create(root.join("sparse")).unwrap();
        sparse.set_len(64 << 20).unwrap();
        sparse.write_all_at(b"in the middle", 32 << 20).unwrap();
        fs::set_permissions(root.join("b"), PermissionsExt::from_mode(0o4711)).unwrap();

        let bytes = archive(root).unwrap();
        assert!(bytes.len() < 1 << 20, "holes are not stored: {} bytes", bytes.len());
        assert_eq!(bytes, archive(root).unwrap());
        let to = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = to.path().join("archive.tar");
        fs::write(&file, &bytes).unwrap();
        let target = to.path().join("root");
        fs::create_dir(&target).unwrap();
        let status = Command::new("tar").arg("-xpf").arg(&file).arg("-C").arg(&target).status().unwrap();
        assert!(status.success());
        fs::remove_file(root.join("socket")).unwrap();
        let same =
            Command::new("diff").args(["-r", "--no-dereference"]).args([root, &target]).output().unwrap();
        assert!(same.status.success(), "{same:?}");
        let stat = |path: std::path::PathBuf| rustix::fs::lstat(path).unwrap();
        for name in ["b", "link", "sparse", "bad", &long] {
            let (old, new) = match name {
                "bad" => continue,
                name => (stat(root.join(name)), stat(target.join(name))),
            };
            assert_eq!(
                (old.st_mode, old.st_mtime, old.st_mtime_nsec),
                (new.st_mode, new.st_mtime, new.st_mtime_nsec),
                "{name}"
            );
        }
        assert_eq!(stat(target.join("b")).st_ino, stat(target.join("c")).st_ino);
        assert!(stat(target.join("sparse")).st_blocks < 100);
    }

    #[test]
    fn directories_of_the_runtime_are_no_changes() {
        let from = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::set_permissions(from.path(), PermissionsExt::from_mode(0o755)).unwrap();
        for name in ["dev", "proc", "sys/own", "etc"] {
            fs::create_dir_all(from.path().join(name)).unwrap();
        }
        assert_eq!(listed(&archive(from.path()).unwrap()), ["etc/", "sys/", "sys/own/"]);
        fs::set_permissions(from.path(), PermissionsExt::from_mode(0o700)).unwrap();
        assert_eq!(listed(&archive(from.path()).unwrap())[0], "./");
    }

    #[test]
    fn name_that_would_remove_something_is_refused_in_a_layer() {
        let from = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::create_dir(from.path().join("d")).unwrap();
        fs::write(from.path().join("d/.wh.x"), "").unwrap();
        let error = archive(from.path()).unwrap_err();
        assert!(error.to_string().starts_with("\"d/.wh.x\" cannot be in a layer"), "{error}");
    }

    /// Were the pipe opened, this would wait for a writer; a link's attributes and target are its own.
    #[test]
    fn what_is_no_file_is_described_and_not_opened() {
        let from = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::set_permissions(from.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let pipe = from.path().join("pipe");
        rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        symlink("pipe", from.path().join("link")).unwrap();
        symlink("nowhere", from.path().join("dangling")).unwrap();
        let names = listed(&archive(from.path()).unwrap());
        assert_eq!(names, ["dangling", "link", "pipe"]);
    }

    #[test]
    fn file_that_became_shorter_ends_in_zeros() {
        let from = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::write(from.path().join("f"), vec![1; 4000]).unwrap();
        let mut changes = Changes::new(open(from.path())).unwrap();
        let mut head = vec![0; 3 * BLOCK];
        changes.read_exact(&mut head).unwrap();
        fs::write(from.path().join("f"), "").unwrap();
        let mut rest = Vec::new();
        changes.read_to_end(&mut rest).unwrap();
        assert_eq!((head.len() + rest.len()) % BLOCK, 0);
        assert!(rest.ends_with(&[0; 2 * BLOCK]));
    }
}
