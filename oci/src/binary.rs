//! Keeping this program's own file out of a container's hands (CVE-2019-5736).
//!
//! A process that enters a container is, until it becomes the container's program, this program; and a container can
//! make it run as a program of its own once more: by `/proc/self/exe` as command, which is refused, or as interpreter of
//! a script, which cannot be seen in time. Then the container could open that file, and write to it later. So a verb that
//! enters containers first runs itself again from a file that nobody can write: the same file on a read-only mount that
//! is attached nowhere, or a sealed copy in memory where mounting is not allowed. An optimised build has mostly done so
//! before anything else ([`crate::entry_point`]), and this makes sure.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use rustix::{
    fs::{
        CWD, MemfdFlags, Mode, OFlags, SealFlags, StatVfsMountFlags, fcntl_add_seals, fcntl_get_seals,
        fstatvfs, memfd_create, openat,
    },
    mount::{OpenTreeFlags, open_tree},
};

use crate::error::{Error, system};

const OWN: &str = "/proc/self/exe";

/// Runs this program again, with the same arguments, from a file that cannot be written; returns if it does already.
pub fn protect() -> Result<(), Error> {
    let own = openat(CWD, OWN, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(system("open this program's own file"))?;
    if is_protected(&own) {
        return Ok(());
    }
    let protected =
        read_only_mount().or_else(|_| sealed_copy(&own)).map_err(system("protect this program's file"))?;
    let mut words = std::env::args_os();
    let mut again = Command::new(format!("/proc/self/fd/{}", protected.as_raw_fd()));
    again.arg0(words.next().unwrap_or_default()).args(words);
    Err(system("run this program again")(again.exec()))
}

fn is_protected(own: &OwnedFd) -> bool {
    let is_sealed = fcntl_get_seals(own).is_ok_and(|seals| seals.contains(SealFlags::WRITE));
    is_sealed || fstatvfs(own).is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY))
}

fn read_only_mount() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = open_tree(CWD, OWN, flags)?;
    cloche_runtime::make_mount_readonly(mount.as_fd())?;
    Ok(mount)
}

fn sealed_copy(own: &OwnedFd) -> io::Result<OwnedFd> {
    let copy = memfd_create("cloche", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    io::copy(&mut File::from(own.try_clone()?), &mut File::from(copy.try_clone()?))?;
    fcntl_add_seals(&copy, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(copy)
}
