//! A user of the VMM's own, and its tie to the monitor.

use std::{
    fs,
    io::{self, Write},
    os::{fd::RawFd, unix::fs::MetadataExt},
};

use rustix::{
    process::{DumpableBehavior, Signal, geteuid, set_dumpable_behavior, set_parent_process_death_signal},
    thread::{
        CapabilitySet, capabilities, set_capabilities, set_keep_capabilities, set_thread_groups,
        set_thread_res_gid, set_thread_res_uid,
    },
};

use super::{JailError, NAMESPACES_HINT, failed, syscalls};

/// User and group ids from here on belong to VMMs. Nothing else is given ids of this range: those of containers end below
/// it (systemd's `docs/UIDS-GIDS.md`).
const FIRST_ID: u32 = 0x7000_0000;
/// How many they are. Linux numbers namespaces from 0xf000_0000 on (`PROC_DYNAMIC_FIRST`), and so has as many.
const IDS: u64 = 0x1000_0000;

/// Has the kernel kill this process when the monitor ends, and fails if that has happened already.
pub fn die_with_parent(events: Option<RawFd>) -> Result<(), JailError> {
    let Some(events) = events else { return Ok(()) };
    let tie = failed("tie this process to its parent", "");
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(tie)?;
    // A parent outside of the PID namespace has no number in it; but it alone holds the other end of this.
    if syscalls::has_no_reader(events) {
        return Err(failed("go on without a parent", "")(io::Error::from(io::ErrorKind::BrokenPipe)));
    }
    Ok(())
}

/// Becomes a user that owns nothing, in a user namespace where no other is known. If root started it, that user is
/// nobody else's; otherwise it is the caller, who cannot become anybody else.
pub fn become_nobody() -> Result<(), JailError> {
    let own = own_id().map_err(failed("find out its own user", "; is /proc mounted?"))?;
    let outer = match own {
        Some(id) => {
            // The monitor passes its capabilities on: without this one it could not kill another user's process, and
            // neither could the kernel on its death.
            let can_kill = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::KILL));
            if !can_kill {
                let source = io::Error::from(io::ErrorKind::PermissionDenied);
                let hint = "; root needs CAP_KILL for it, or start Cloche as a plain user";
                return Err(failed("become a user whom its monitor can kill", hint)(source));
            }
            let id = become_user(id).map_err(failed("change the user", ""))?;
            (id, id)
        }
        None => (geteuid().as_raw(), rustix::process::getegid().as_raw()),
    };
    syscalls::unshare(libc::CLONE_NEWUSER).map_err(failed("make a user namespace", NAMESPACES_HINT))?;
    map(outer).map_err(failed("map its user into its user namespace", NAMESPACES_HINT))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("forbid core dumps", ""))
}

/// The id to become: `None` if this is not root, or root of a user namespace that has no other ids to give.
fn own_id() -> io::Result<Option<u32>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    // Of all that tells one VMM from others, this is not told apart by namespaces: roots of two containers, which are one
    // user to the kernel, may give the same process id, and have VMMs with the same id.
    let id = id_of(fs::metadata("/proc/self/ns/pid")?.ino());
    let known = |map: &str| fs::read_to_string(map).map(|map| covers(&map, id));
    Ok((known("/proc/self/uid_map")? && known("/proc/self/gid_map")?).then_some(id))
}

/// The id that belongs to a PID namespace. No two that exist have the same number, on the whole host.
fn id_of(pid_namespace: u64) -> u32 {
    FIRST_ID + (pid_namespace % IDS) as u32
}

/// Whether an id is in a map of a user namespace (user_namespaces(7): first id inside, first outside, how many).
fn covers(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        match (numbers.next(), numbers.nth(1)) {
            (Some(Ok(first)), Some(Ok(count))) => (first..first + count).contains(&id.into()),
            _ => false,
        }
    })
}

/// Takes the id for user and group, and keeps the capabilities for making a user namespace: some hosts do not let
/// plain users make any.
fn become_user(id: u32) -> io::Result<u32> {
    set_keep_capabilities(true)?;
    set_thread_groups(&[])?;
    let gid = rustix::process::Gid::from_raw(id);
    set_thread_res_gid(gid, gid, gid)?;
    let uid = rustix::process::Uid::from_raw(id);
    set_thread_res_uid(uid, uid, uid)?;
    let mut sets = capabilities(None)?;
    sets.effective = sets.permitted;
    set_capabilities(None, sets)?;
    // The change took /proc/self from its owner, who has to write there.
    set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    Ok(id)
}

/// Makes `(uid, gid)` known to the new user namespace, as 0. Of all ids it could be, it is the one to which the kernel
/// gives a process's files in /proc, so that the monitor of a plain user can look at them.
fn map((uid, gid): (u32, u32)) -> io::Result<()> {
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", &format!("0 {gid} 1"))
}

fn write(path: &str, text: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_of_each_namespace_is_its_own() {
        let ids = [0xf000_0000, 0xf000_0001, 0xffff_ffff].map(id_of);
        assert_eq!(ids, [0x7000_0000, 0x7000_0001, 0x7fff_ffff]);
    }

    #[test]
    fn map_covers_what_is_between_first_and_count() {
        let all = "         0          0 4294967295\n";
        assert!(covers(all, 0x7000_0001));
        assert!(!covers("0 1000 1\n1 100000 65536\n", 0x7000_0001));
        assert!(covers("0 1000 1\n1 100000 65536\n", 65536));
        assert!(!covers("0 1000 1\n1 100000 65536\n", 65537));
        assert!(!covers("", 0));
    }
}
