//! `--chown` and USER: names looked up in the image's own files, and `--chmod`.

use std::io::{self, Read};

use cloche_images::View;

/// Bytes of `/etc/passwd` and `/etc/group` that are looked at.
const MAX_BYTES: u64 = 4 << 20;

/// User and group of `USER[:GROUP]`; the group is 0 if neither it nor the user's entry says one.
pub fn owner(view: &View, text: &str) -> Result<(u32, u32), String> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let passwd =
        || read(view, b"etc/passwd").map_err(|error| format!("cannot read the image's /etc/passwd: {error}"));
    let (uid, own_gid) = match user.parse::<u32>() {
        // As BuildKit: a number without a group has the group of the same number.
        Ok(uid) => (uid, uid),
        Err(_) => {
            let passwd = passwd()?;
            let entry = entries(&passwd).find(|fields| fields.first() == Some(&user));
            let number = |at: usize| entry.as_ref()?.get(at)?.parse::<u32>().ok();
            match (number(2), number(3)) {
                (Some(uid), Some(gid)) => (uid, gid),
                _ => return Err(format!("the image's /etc/passwd has no user {user}; give a number")),
            }
        }
    };
    let gid = match group {
        None => own_gid,
        Some(group) => match group.parse::<u32>() {
            Ok(gid) => gid,
            Err(_) => {
                let text = read(view, b"etc/group")
                    .map_err(|error| format!("cannot read the image's /etc/group: {error}"))?;
                let entry = entries(&text).find(|fields| fields.first() == Some(&group));
                entry
                    .and_then(|fields| fields.get(2)?.parse().ok())
                    .ok_or_else(|| format!("the image's /etc/group has no group {group}; give a number"))?
            }
        },
    };
    Ok((uid, gid))
}

fn entries(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.trim().split(':').collect())
}

fn read(view: &View, path: &[u8]) -> io::Result<String> {
    let Some(node) = view.resolve(path, true)?.node else { return Ok(String::new()) };
    let mut bytes = Vec::new();
    view.open(&node)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `--chmod`: an octal number.
pub fn mode(text: &str) -> Result<u16, String> {
    match u16::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(mode),
        _ => Err(format!("--chmod={text} is no octal number up to 7777, such as 755")),
    }
}
