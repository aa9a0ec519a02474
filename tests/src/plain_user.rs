//! `cloche-tests plain-user PLACE COMMAND…`: becomes a user without any rights but to open `/dev/kvm`, and the command.

use std::ffi::OsString;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::{fs, io};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::process::{Gid, Uid};
use rustix::thread::{UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// Its user and group: nobody's, on any host.
pub const ID: u32 = 54_321;

/// Words of a command that is run so; `place` is an empty directory.
pub fn words(place: &Path, program: &Path) -> Vec<OsString> {
    vec!["plain-user".into(), place.into(), program.into()]
}

/// The subcommand.
pub fn main(words: &[String]) -> ExitCode {
    let [place, program, rest @ ..] = words else { return ExitCode::from(2) };
    let error = match become_plain(Path::new(place)) {
        Ok(()) => Command::new(program).args(rest).exec(),
        Err(error) => error,
    };
    eprintln!("cloche-tests: {program} cannot be run as a plain user: {error}");
    ExitCode::from(2)
}

fn become_plain(place: &Path) -> io::Result<()> {
    // What could go wrong with it is descriptors that are no longer shared; these are.
    #[expect(deprecated, reason = "its successor is unsafe")]
    rustix::thread::unshare(UnshareFlags::NEWNS)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    // A node that everybody may open, whatever the host's is like.
    mount("tmpfs", place, "tmpfs", MountFlags::empty(), None)?;
    let node = place.join("kvm");
    let number = fs::metadata("/dev/kvm")?.rdev();
    mknodat(CWD, &node, FileType::CharacterDevice, Mode::empty(), number)?;
    fs::set_permissions(&node, fs::Permissions::from_mode(0o666))?;
    mount_bind(&node, "/dev/kvm")?;
    set_thread_groups(&[])?;
    let (uid, gid) = (Uid::from_raw(ID), Gid::from_raw(ID));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}
