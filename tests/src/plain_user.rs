//! `cloche-tests plain-user PLACE IDS COMMAND…`: becomes a user without any rights but to open `/dev/kvm`, and the
//! command. The user has a name, and with `many` further ids in /etc/subuid and /etc/subgid; with `alone`, none.

use std::ffi::{CString, OsString};
use std::io::Write as _;
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

/// Whether the user has ids for its containers' users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// Its own only.
    Alone,
    /// 65536 from [`FIRST_SUBORDINATE`] on.
    Many,
}

/// The first id of the user's range, of users and of groups.
pub const FIRST_SUBORDINATE: u32 = 700_000;

/// Words of a command that is run so; `place` is an empty directory.
pub fn words(place: &Path, ids: Ids, program: &Path) -> Vec<OsString> {
    let ids = if ids == Ids::Many { "many" } else { "alone" };
    vec!["plain-user".into(), place.into(), ids.into(), program.into()]
}

/// The subcommand.
pub fn main(words: &[String]) -> ExitCode {
    let [place, ids, program, rest @ ..] = words else { return ExitCode::from(2) };
    let ids = if ids == "many" { Ids::Many } else { Ids::Alone };
    let error = match become_plain(Path::new(place), ids) {
        Ok(()) => Command::new(program).args(rest).exec(),
        Err(error) => error,
    };
    eprintln!("cloche-tests: {program} cannot be run as a plain user: {error}");
    ExitCode::from(2)
}

fn become_plain(place: &Path, ids: Ids) -> io::Result<()> {
    // What could go wrong with it is descriptors that are no longer shared; these are.
    #[expect(deprecated, reason = "its successor is unsafe")]
    rustix::thread::unshare(UnshareFlags::NEWNS)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    mount("tmpfs", place, "tmpfs", MountFlags::empty(), None)?;
    // A node that everybody may open, whatever the host's is like.
    if let Ok(host) = fs::metadata("/dev/kvm") {
        let node = place.join("kvm");
        mknodat(CWD, &node, FileType::CharacterDevice, Mode::empty(), host.rdev())?;
        fs::set_permissions(&node, fs::Permissions::from_mode(0o666))?;
        mount_bind(&node, "/dev/kvm")?;
    }
    name_user(place, ids)?;
    set_thread_groups(&[])?;
    let (uid, gid) = (Uid::from_raw(ID), Gid::from_raw(ID));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// In an /etc of this namespace's own: newuidmap looks there.
fn name_user(place: &Path, ids: Ids) -> io::Result<()> {
    let (upper, work) = (place.join("upper"), place.join("work"));
    for directory in [&upper, &work] {
        fs::create_dir(directory)?;
    }
    let options = format!("lowerdir=/etc,upperdir={},workdir={}", upper.display(), work.display());
    let options = CString::new(options)?;
    mount("overlay", "/etc", "overlay", MountFlags::empty(), Some(options.as_c_str()))?;
    let append = |file: &str, line: String| {
        let mut file = fs::OpenOptions::new().append(true).create(true).open(file)?;
        writeln!(file, "{line}")
    };
    append("/etc/passwd", format!("cloche-plain:x:{ID}:{ID}::/:/bin/sh"))?;
    append("/etc/group", format!("cloche-plain:x:{ID}:"))?;
    if ids == Ids::Many {
        for file in ["/etc/subuid", "/etc/subgid"] {
            append(file, format!("cloche-plain:{FIRST_SUBORDINATE}:65536"))?;
        }
    }
    Ok(())
}
