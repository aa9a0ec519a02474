//! Files of the kernel's in `/proc`, to be written to. A write that should change a limit, a label or a parameter must
//! not go to some other file that is mounted there, or that a link leads to (CVE-2019-19921, CVE-2025-52881). So the
//! file is opened within `/proc` as mounted here, across no further mount, and only if that is a procfs.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, fstatfs, openat, openat2},
    io::Errno,
};

const PROC_SUPER_MAGIC: u64 = 0x9fa0;

/// Whether a file is in a procfs.
pub(crate) fn is_on_procfs(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(fstatfs(file)?.f_type as u64 == PROC_SUPER_MAGIC)
}

/// Whether a file is the kernel's word on itself, not somebody's data: a procfs, sysfs or cgroup (linux/magic.h).
pub(crate) fn is_kernels(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    const SYSFS_MAGIC: u64 = 0x6265_6572;
    const CGROUP_SUPER_MAGIC: u64 = 0x0027_e0eb;
    const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
    let kind = fstatfs(file)?.f_type as u64;
    Ok([PROC_SUPER_MAGIC, SYSFS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC].contains(&kind))
}

/// Opens a file below `/proc` for writing; `path` is relative to that.
pub(crate) fn open(path: &str) -> io::Result<OwnedFd> {
    let root = openat(CWD, "/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    if !is_on_procfs(root.as_fd())? {
        return Err(io::Error::other("what is mounted at /proc is no procfs"));
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    match openat2(&root, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty(), resolve) {
        Err(Errno::XDEV) => Err(io::Error::other(format!("something else is mounted over /proc/{path}"))),
        result => Ok(result?),
    }
}

/// Writes to a file below `/proc`, with one call.
pub(crate) fn write(path: &str, value: &[u8]) -> io::Result<()> {
    let file = open(path)?;
    Ok(rustix::io::write(file, value).map(drop)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_tells_of_itself_is_known_as_such() {
        let is = |path: &str| is_kernels(std::fs::File::open(path).unwrap().as_fd()).unwrap();
        assert!(is("/proc/self") && is("/sys/kernel"));
        assert!(!is("/") && !is("/dev/null"));
    }

    #[test]
    fn file_outside_or_behind_a_magic_link_is_not_opened() {
        assert!(open("self/oom_score_adj").is_ok());
        for path in ["../tmp/x", "/tmp/x", "self/root/dev/null", "self/cwd/x", "self/fd/0"] {
            assert!(open(path).is_err(), "{path}");
        }
    }
}
