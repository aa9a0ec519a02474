//! Reading and writing the small files of a cgroup directory.

use std::{
    fs::{self, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::fs::{CWD, Mode, OFlags};

use super::CgroupError;

/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// `CGROUP_SUPER_MAGIC`, v1.
const CGROUP1_MAGIC: u64 = 0x0027_e0eb;

pub(super) fn is_cgroup2(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type as u64 == CGROUP2_MAGIC)
}

pub(super) fn is_cgroup1(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type as u64 == CGROUP1_MAGIC)
}

pub(super) fn open_directory(path: &Path) -> Result<OwnedFd, CgroupError> {
    rustix::fs::openat(CWD, path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| CgroupError::Io {
            action: "open".into(),
            path: path.to_owned(),
            source: errno.into(),
        })
}

pub(super) fn open_to_write(directory: &Path, file: &str) -> Result<OwnedFd, CgroupError> {
    let path = directory.join(file);
    let opened = rustix::fs::openat(CWD, &path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|errno| CgroupError::Io { action: "open".into(), path, source: errno.into() })
}

/// Writes `value` with one `write`, as cgroup files want it.
pub(super) fn write(directory: &Path, file: &str, value: &str) -> Result<(), CgroupError> {
    let path = directory.join(file);
    let written =
        OpenOptions::new().write(true).open(&path).and_then(|mut file| file.write_all(value.as_bytes()));
    written.map_err(|source| CgroupError::Io { action: format!("write {value:?} to"), path, source })
}

/// As [`write`], for a directory that no path may lead to any more.
pub(super) fn write_at(directory: BorrowedFd<'_>, file: &str, value: &str) -> Result<(), CgroupError> {
    let written = rustix::fs::openat(directory, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| rustix::io::write(file, value.as_bytes()));
    written.map(drop).map_err(|errno| CgroupError::Io {
        action: format!("write {value:?} to"),
        path: file.into(),
        source: errno.into(),
    })
}

/// As [`write`]; `false` if there is no such file.
pub(super) fn write_if_present(directory: &Path, file: &str, value: &str) -> Result<bool, CgroupError> {
    match write(directory, file, value) {
        Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(false),
        other => other.map(|()| true),
    }
}

/// The processes that a directory lists. Those of PID namespaces that this process cannot see are listed as 0, and left
/// out. The list is the container's to lengthen, so it is taken line by line.
pub(super) fn processes(directory: BorrowedFd<'_>) -> impl Iterator<Item = i32> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let list = rustix::fs::openat(directory, "cgroup.procs", flags, Mode::empty()).ok();
    let lines = list.into_iter().flat_map(|list| BufReader::new(fs::File::from(list)).lines());
    lines.map_while(Result::ok).filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0)
}

/// A file's text. The kernel bounds most of them by a page, and nobody needs more of the others than this.
pub(super) fn read(directory: &Path, file: &str) -> io::Result<String> {
    const ENOUGH_BYTES: u64 = 1 << 20;
    let mut text = String::new();
    fs::File::open(directory.join(file))?.take(ENOUGH_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

pub(super) fn read_number(directory: &Path, file: &str) -> Option<u64> {
    read(directory, file).ok()?.trim().parse().ok()
}

/// The number behind `key` in a file of lines `key number`.
pub(super) fn read_field(directory: &Path, file: &str, key: &str) -> Option<u64> {
    field(&read(directory, file).ok()?, key)
}

pub(super) fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_of_flat_keyed_text_is_found_by_whole_key() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(field(text, "oom_kill"), Some(2));
        assert_eq!(field(text, "oom"), Some(3));
        assert_eq!(field(text, "oom_"), None);
        assert_eq!(field("oom_kill many", "oom_kill"), None);
    }
}
