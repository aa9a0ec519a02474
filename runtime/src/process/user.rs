//! The user that the process runs as.

use std::io;

use rustix::{
    fs::{FileType, Mode, fchown, fstat},
    io::Errno,
    process::{Gid, Uid, umask},
    stdio::{stderr, stdin, stdout},
    thread::{set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

use super::accounts::Account;

/// Why the user could not be changed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub struct UserError {
    action: String,
    source: io::Error,
}

/// Gives the pipes that are stdin, stdout and stderr to the user, so that `/dev/stdout` can be opened as well as written
/// to; other runtimes do so, and images count on it. Files and terminals of the caller's stay the caller's.
pub(crate) fn own_stdio(account: &Account) -> Result<(), UserError> {
    let failed =
        |errno: Errno| UserError { action: "give the stdio pipes to the user".into(), source: errno.into() };
    for stdio in [stdin(), stdout(), stderr()] {
        let stat = fstat(stdio).map_err(failed)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo && stat.st_uid != account.uid {
            match fchown(stdio, Some(Uid::from_raw(account.uid)), None) {
                // In a user namespace, a pipe of somebody outside stays theirs.
                Ok(()) | Err(Errno::PERM | Errno::INVAL) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
    }
    Ok(())
}

/// Says that an id is not in this user namespace's map, if that is so.
fn unmapped(kind: &str, id: u32) -> &'static str {
    let map = std::fs::read_to_string(format!("/proc/self/{kind}_map")).unwrap_or_default();
    let is_mapped = map.lines().any(|line| {
        let mut fields = line.split_whitespace().map(|field| field.parse().unwrap_or(0u32));
        let (start, _, count) = (fields.next(), fields.next(), fields.next());
        start.zip(count).is_some_and(|(start, count)| id.wrapping_sub(start) < count)
    });
    if is_mapped || map.is_empty() {
        ""
    } else {
        ", whom the user namespace lacks; see /etc/subuid and /etc/subgid"
    }
}

/// Takes on the user, its groups and the umask. The permitted capabilities stay; a user other than root loses the
/// effective ones. With `keep_groups`, the additional groups stay as they are.
pub(crate) fn switch(account: &Account, mask: Option<u32>, keep_groups: bool) -> Result<(), UserError> {
    let failed = |action: String| move |errno: Errno| UserError { action, source: errno.into() };
    let Account { uid, gid, additional_gids } = account;
    let groups: Vec<_> = additional_gids.iter().map(|gid| Gid::from_raw(*gid)).collect();
    if !keep_groups {
        match set_thread_groups(&groups) {
            // A user namespace of one user may not change its groups, and has none but nobody's.
            Err(Errno::PERM) if groups.is_empty() => {}
            result => result.map_err(failed(format!("set the additional groups {additional_gids:?}")))?,
        }
    }
    let gid = Gid::from_raw(*gid);
    set_thread_res_gid(gid, gid, gid)
        .map_err(|errno| failed(format!("become group {gid}{}", unmapped("gid", gid.as_raw())))(errno))?;
    set_keep_capabilities(true).map_err(failed("keep capabilities".into()))?;
    let uid = Uid::from_raw(*uid);
    set_thread_res_uid(uid, uid, uid)
        .map_err(|errno| failed(format!("become user {uid}{}", unmapped("uid", uid.as_raw())))(errno))?;
    set_keep_capabilities(false).map_err(failed("stop keeping capabilities".into()))?;
    umask(Mode::from_raw_mode(mask.unwrap_or(0o022) & 0o777));
    Ok(())
}
