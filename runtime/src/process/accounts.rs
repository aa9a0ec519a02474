//! Docker's `user[:group]`, resolved in the container's own `/etc/passwd` and `/etc/group`.
//!
//! The OCI spec knows numbers only, and whoever writes it cannot look into a root file system that is not mounted yet.
//! So the string travels beside the spec, and this is called inside the new root. The image chooses what the files
//! contain; they are read up to a bound.

use std::{os::fd::BorrowedFd, path::Path};

use crate::mounts::paths;

/// Nobody's user list is longer than this.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Groups that a process may be in (Linux: NGROUPS_MAX).
const MAX_GROUPS: usize = 65_536;

/// Why a user is not known to the container.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AccountError {
    /// No such user.
    #[error("user `{0}` is not in the image's /etc/passwd; use a name that is, or a number")]
    UnknownUser(String),
    /// No such group.
    #[error("group `{0}` is not in the image's /etc/group; use a name that is, or a number")]
    UnknownGroup(String),
    /// (uid_t) -1 and (gid_t) -1 mean "leave as it is" to the kernel.
    #[error("cannot run as user {0}:{1} with the groups {2:?}: 4294967295 is no id")]
    NoId(u32, u32, Vec<u32>),
    /// More groups than a process can be in.
    #[error("user `{0}` is in more than {MAX_GROUPS} groups")]
    TooManyGroups(String),
}

/// A user and its groups, as numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) additional_gids: Vec<u32>,
}

impl Account {
    /// Refuses ids that are none.
    pub(crate) fn checked(self) -> Result<Self, AccountError> {
        let Self { uid, gid, additional_gids } = &self;
        if [uid, gid].into_iter().chain(additional_gids).any(|id| *id == u32::MAX) {
            return Err(AccountError::NoId(self.uid, self.gid, self.additional_gids));
        }
        Ok(self)
    }
}

impl From<&oci_spec::runtime::User> for Account {
    fn from(user: &oci_spec::runtime::User) -> Self {
        let additional_gids = user.additional_gids().clone().unwrap_or_default();
        Self { uid: user.uid(), gid: user.gid(), additional_gids }
    }
}

/// Resolves `user[:group]` in the container's root.
pub(crate) fn resolve(root: BorrowedFd<'_>, user: &str) -> Result<Account, AccountError> {
    resolve_in(user, &read(root, "/etc/passwd"), &read(root, "/etc/group"))
}

/// The user's home directory according to the container's `/etc/passwd`, or `/`.
pub(crate) fn home(root: BorrowedFd<'_>, uid: u32) -> String {
    home_in(&read(root, "/etc/passwd"), uid).unwrap_or("/").to_owned()
}

/// A file's text as far as it is of use; a missing one is empty, as for Docker.
fn read(root: BorrowedFd<'_>, path: &str) -> String {
    let bytes = paths::read(root, Path::new(path), MAX_FILE_BYTES).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A line of `/etc/passwd` (passwd(5)).
struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn users(passwd: &str) -> impl Iterator<Item = User<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(User { name, uid, gid, home: fields.nth(1).unwrap_or("") })
    })
}

/// A line of `/etc/group` (group(5)).
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Group { name, gid, members: fields.next().unwrap_or("") })
    })
}

/// Docker's rules: a name must be listed, a number need not be; a user that is listed brings its group and, unless a
/// group is given, the groups that list it.
fn resolve_in(user: &str, passwd: &str, group_file: &str) -> Result<Account, AccountError> {
    let (user, group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let number = user.parse::<u32>().ok();
    let listed = match (user, number) {
        ("", _) => users(passwd).find(|known| known.uid == 0),
        // A name made of digits wins over the number, as everywhere.
        (_, number) => users(passwd)
            .find(|known| known.name == user)
            .or_else(|| users(passwd).find(|known| Some(known.uid) == number)),
    };
    let mut account = match (&listed, number) {
        (Some(known), _) => Account { uid: known.uid, gid: known.gid, additional_gids: Vec::new() },
        (None, Some(uid)) => Account { uid, ..Account::default() },
        (None, None) if user.is_empty() => Account::default(),
        (None, None) => return Err(AccountError::UnknownUser(user.into())),
    };
    if let Some(group) = group {
        let listed = groups(group_file).find(|known| known.name == group).map(|known| known.gid);
        account.gid =
            listed.or_else(|| group.parse().ok()).ok_or_else(|| AccountError::UnknownGroup(group.into()))?;
    } else if let Some(known) = listed {
        let lists = |group: &Group<'_>| group.members.split(',').any(|member| member == known.name);
        account.additional_gids =
            groups(group_file).filter(lists).map(|group| group.gid).take(MAX_GROUPS + 1).collect();
        if account.additional_gids.len() > MAX_GROUPS {
            return Err(AccountError::TooManyGroups(user.into()));
        }
    }
    Ok(account)
}

fn home_in(passwd: &str, uid: u32) -> Option<&str> {
    users(passwd).find(|user| user.uid == uid).map(|user| user.home).filter(|home| home.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34::/var/www:\n1000:x:7:8::rel:\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\naudio:x:29:root,web\nvideo:x:44:web\n";

    fn ids(user: &str) -> Result<(u32, u32, Vec<u32>), AccountError> {
        resolve_in(user, PASSWD, GROUP).map(|account| (account.uid, account.gid, account.additional_gids))
    }

    #[test]
    fn resolve_of_listed_user_brings_its_groups() {
        assert_eq!(ids("web"), Ok((33, 34, vec![29, 44])));
        assert_eq!(ids("33"), Ok((33, 34, vec![29, 44])));
        assert_eq!(ids(""), Ok((0, 0, vec![29])));
    }

    #[test]
    fn resolve_with_group_takes_only_that_group() {
        assert_eq!(ids("web:audio"), Ok((33, 29, vec![])));
        assert_eq!(ids("5:6"), Ok((5, 6, vec![])));
        assert_eq!(ids(":6"), Ok((0, 6, vec![])));
    }

    #[test]
    fn resolve_of_unlisted_number_has_group_root_and_of_unlisted_name_fails() {
        assert_eq!(ids("5"), Ok((5, 0, vec![])));
        assert_eq!(ids("1000"), Ok((7, 8, vec![])));
        assert_eq!(ids("nobody"), Err(AccountError::UnknownUser("nobody".into())));
        assert_eq!(ids("web:nope"), Err(AccountError::UnknownGroup("nope".into())));
        assert_eq!(ids("99999999999"), Err(AccountError::UnknownUser("99999999999".into())));
    }

    #[test]
    fn home_of_user_is_its_absolute_directory() {
        assert_eq!(home_in(PASSWD, 33), Some("/var/www"));
        assert_eq!(home_in(PASSWD, 7), None);
        assert_eq!(home_in(PASSWD, 99), None);
    }
}
