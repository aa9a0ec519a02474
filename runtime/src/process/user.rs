//! The user that the process runs as.

use std::{fs::File, io, io::Read, path::Path};

use oci_spec::runtime::User;
use rustix::{
    fs::Mode,
    io::Errno,
    process::{Gid, Uid, umask},
    thread::{set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

/// Why the user could not be changed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub struct UserError {
    action: String,
    source: io::Error,
}

/// Takes on the user, its groups and its umask. The permitted capabilities stay; a user other than root loses the
/// effective ones.
pub(crate) fn switch(user: &User) -> Result<(), UserError> {
    let failed = |action: String| move |errno: Errno| UserError { action, source: errno.into() };
    let additional = user.additional_gids().as_deref().unwrap_or_default();
    // (uid_t) -1 and (gid_t) -1 mean "leave as it is" to the kernel.
    if [user.uid(), user.gid()].iter().chain(additional).any(|id| *id == u32::MAX) {
        let action = format!("run as user {}:{}: 4294967295 is no id", user.uid(), user.gid());
        return Err(failed(action)(Errno::INVAL));
    }
    let groups: Vec<_> = additional.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&groups).map_err(failed(format!("set the additional groups {additional:?}")))?;
    let gid = Gid::from_raw(user.gid());
    set_thread_res_gid(gid, gid, gid).map_err(failed(format!("become group {gid}")))?;
    set_keep_capabilities(true).map_err(failed("keep capabilities".into()))?;
    let uid = Uid::from_raw(user.uid());
    set_thread_res_uid(uid, uid, uid).map_err(failed(format!("become user {uid}")))?;
    set_keep_capabilities(false).map_err(failed("stop keeping capabilities".into()))?;
    umask(Mode::from_raw_mode(user.umask().unwrap_or(0o022) & 0o777));
    Ok(())
}

/// The user's home directory according to the container's `/etc/passwd`, or `/`. To be called inside the root.
pub(crate) fn home(uid: u32) -> String {
    /// The image chooses what the file is; nobody's user list is longer than this.
    const ENOUGH_BYTES: u64 = 1 << 20;
    let mut text = Vec::new();
    let path = Path::new("/etc/passwd");
    // Anything but a regular file might block.
    if path.is_file() {
        let _ = File::open(path).and_then(|file| file.take(ENOUGH_BYTES).read_to_end(&mut text));
    }
    home_in(&String::from_utf8_lossy(&text), uid).unwrap_or("/").to_owned()
}

fn home_in(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let listed: u32 = fields.next()?.parse().ok()?;
        let home = fields.nth(2)?;
        (listed == uid && home.starts_with('/')).then_some(home)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_in_passwd_is_that_of_the_first_matching_user() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nme:x:1000:1000::/home/me:\nalso:x:1000:1:::\n";
        assert_eq!(home_in(passwd, 0), Some("/root"));
        assert_eq!(home_in(passwd, 1000), Some("/home/me"));
        assert_eq!(home_in(passwd, 7), None);
        assert_eq!(home_in("x:x:7:7::relative:\n", 7), None);
    }
}
