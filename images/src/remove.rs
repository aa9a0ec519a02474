//! Directory trees: what they take, and how they go, however deep they are: a container can make directories below each other that are longer
//! than any path, and `std` has a descriptor open for each of them.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, fstat, openat, unlinkat};
use rustix::io::Errno;

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Removes a directory with all in it, or whatever else is there. Links are removed, not followed.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match unlinkat(CWD, path, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        result => return Ok(result?),
    }
    let mut directory = openat(CWD, path, DIRECTORY, Mode::empty())?;
    // What lies above, as far as it is to be removed, and what it calls the next.
    let mut above = Vec::new();
    loop {
        if let Some(name) = clear(&directory)? {
            let below = openat(&directory, &name, DIRECTORY, Mode::empty())?;
            above.push((identity(&directory)?, name));
            directory = below;
            continue;
        }
        let Some((expected, name)) = above.pop() else { break };
        let parent = openat(&directory, c"..", DIRECTORY, Mode::empty())?;
        if identity(&parent)? != expected {
            return Err(io::Error::other("a directory was moved while it was being removed"));
        }
        unlinkat(&parent, &name, AtFlags::REMOVEDIR)?;
        directory = parent;
    }
    Ok(unlinkat(CWD, path, AtFlags::REMOVEDIR)?)
}

/// Bytes on disk of what is below a directory. What cannot be looked at is not counted: somebody can have made names
/// that together are longer than any path.
pub fn bytes_below(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            bytes += metadata.blocks() * 512;
            if metadata.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    bytes
}

/// Removes what is in a directory, up to a directory that is not empty, which it names.
fn clear(directory: &OwnedFd) -> io::Result<Option<CString>> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        match unlinkat(directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(error.into()),
        }
        match unlinkat(directory, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => return Ok(Some(name.to_owned())),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

fn identity(directory: &OwnedFd) -> io::Result<(u64, u64)> {
    let stat = fstat(directory)?;
    Ok((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn tree_deeper_than_any_path_goes_with_few_descriptors() {
        let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
        let top = scratch.path().join("top");
        fs::create_dir(&top).unwrap();
        let mut directory = openat(CWD, &top, DIRECTORY, Mode::empty()).unwrap();
        // More than there are descriptors, and several times as long as the longest path.
        for _ in 0..1500 {
            for name in [c"a-directory-of-twenty", c"sibling"] {
                rustix::fs::mkdirat(&directory, name, Mode::from(0o700)).unwrap();
            }
            rustix::fs::symlinkat(c"/", &directory, c"link").unwrap();
            directory = openat(&directory, c"a-directory-of-twenty", DIRECTORY, Mode::empty()).unwrap();
        }
        drop(directory);
        remove_tree(&top).unwrap();
        assert!(!top.exists());
    }

    #[test]
    fn links_are_not_followed_and_what_is_missing_is_told() {
        let scratch = tempfile::tempdir().unwrap();
        let kept = scratch.path().join("kept");
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("file"), "x").unwrap();
        let link = scratch.path().join("link");
        symlink(&kept, &link).unwrap();
        remove_tree(&link).unwrap();
        assert!(kept.join("file").exists() && fs::symlink_metadata(&link).is_err());
        let tree = scratch.path().join("tree");
        fs::create_dir_all(tree.join("below")).unwrap();
        symlink("../../kept", tree.join("below/link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(kept.join("file").exists());
        assert_eq!(remove_tree(&tree).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
