//! The file server on messages that a fuzzer made up, for the target `share` in `fuzz/` and for this crate's tests.
//!
//! ```text
//!  a tmpfs of 8 MiB in a mount namespace of its own, so that nothing fills or leaves it
//!    secret            must never be seen or changed
//!    share/            is exported as in a sandbox: cloned, and attached nowhere
//! ```
//! Needs root for that. An entry panics where something that must hold does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::{
    cell::OnceCell,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use rustix::{
    fs::statfs,
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    rand::{GetRandomFlags, getrandom},
};

use crate::{
    Shared, jail,
    server::Server,
    wire::{self, opcode},
};

/// Covered by the tmpfs, in this thread's namespace. Every host has it, and nobody here needs it.
const PLACE: &str = "/sys";
/// Messages of one run; each can make one file, and have the guest told of one and open one.
const MAX_MESSAGES: usize = 64;

/// Leaves the host's mounts; returns the secret, which no input can contain.
fn enter() -> String {
    thread_local! {
        static SECRET: OnceCell<String> = const { OnceCell::new() };
    }
    let secret = || {
        crate::syscalls::unshare_namespaces().expect("this target needs root");
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let options = Some(c"size=8m,nr_inodes=4096,mode=755");
        mount("tmpfs", PLACE, "tmpfs", MountFlags::empty(), options).unwrap();
        // What the jail does: the only way to a file is its descriptor.
        std::env::set_current_dir("/proc/self/fd").unwrap();
        let mut random = [0; 16];
        getrandom(&mut random, GetRandomFlags::empty()).unwrap();
        random.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    // Of the thread, as its namespaces are.
    SECRET.with(|cell| cell.get_or_init(secret).clone())
}

/// Makes the tree as it was in the beginning.
fn renew(secret: &str) {
    let place = Path::new(PLACE);
    let covering = statfs(place).unwrap();
    // Before anything is removed there.
    assert_eq!(covering.f_blocks * covering.f_bsize as u64, 8 << 20, "{PLACE} is not covered");
    for entry in fs::read_dir(place).unwrap().flatten() {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
            .unwrap();
    }
    let share = place.join("share");
    fs::create_dir_all(share.join("dir/below")).unwrap();
    fs::write(place.join("secret"), secret).unwrap();
    fs::write(share.join("file"), "content").unwrap();
    fs::write(share.join("dir/other"), [7; 5000]).unwrap();
    symlink("../secret", share.join("link")).unwrap();
    symlink(place, share.join("dir/up")).unwrap();
    fs::set_permissions(&share, fs::Permissions::from_mode(0o777)).unwrap();
}

/// A session: each message is an opcode, a file's number, a user, arguments with their length, all mostly small.
pub fn messages(bytes: &[u8]) {
    let secret = enter();
    renew(&secret);
    let open_before = open_files();
    let shares = [Shared { path: Path::new(PLACE).join("share"), recursive: true, read_only: false }];
    let mut server = Server::new(jail::open_trees(&shares).unwrap());
    let mut reply = Vec::new();
    let mut rest = bytes;
    for _ in 0..MAX_MESSAGES {
        let Some(message) = next_message(&mut rest) else { break };
        let replied = server.answer(&message, &mut reply);
        assert!(reply.len() <= wire::MAX_REPLY_BYTES, "a reply of {} bytes", reply.len());
        if replied {
            assert_eq!(u32::from_le_bytes(reply[..4].try_into().unwrap()) as usize, reply.len());
            let error = i32::from_le_bytes(reply[4..8].try_into().unwrap());
            assert!((-4095..=0).contains(&error), "error {error}");
            let seen = reply.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!seen, "the secret was seen");
        }
    }
    let opened = open_files().saturating_sub(open_before);
    assert!(cfg!(test) || opened <= shares.len() + 2 * MAX_MESSAGES, "{opened} files are open");
    drop(server);
    assert!(cfg!(test) || open_files() == open_before, "files are left open");
    let entries = fs::read_dir(PLACE).unwrap().flatten().map(|entry| entry.file_name());
    let mut outside: Vec<_> = entries.collect();
    outside.sort();
    assert_eq!(outside, ["secret", "share"]);
    let now = fs::read_to_string(Path::new(PLACE).join("secret")).unwrap();
    assert_eq!(now, secret, "the secret was changed");
}

fn open_files() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Takes one message off the front.
fn next_message(rest: &mut &[u8]) -> Option<Vec<u8>> {
    let (head, after) = rest.split_first_chunk::<4>()?;
    let [opcode, node, user, length] = *head;
    // Some are longer than their length can tell.
    let length = if length < 0xf8 { usize::from(length) } else { 1 << (length & 7) << 10 };
    let (arguments, after) = after.split_at(length.min(after.len()));
    *rest = after;
    if opcode == 0xff {
        return Some(arguments.to_vec());
    }
    let id = [0, 1000, u32::MAX, 65_534][usize::from(user % 4)];
    let node = if node == 0xff { u64::MAX } else { node.into() };
    Some(message(opcode.into(), node, id, arguments))
}

fn message(opcode: u32, node: u64, id: u32, arguments: &[u8]) -> Vec<u8> {
    let mut message = ((wire::HEADER_BYTES + arguments.len()) as u32).to_le_bytes().to_vec();
    message.extend(opcode.to_le_bytes());
    message.extend(77u64.to_le_bytes());
    message.extend(node.to_le_bytes());
    for word in [id, id, 1, 0] {
        message.extend(word.to_le_bytes());
    }
    message.extend(arguments);
    message
}

/// Sessions that do what a kernel does. Numbers of files and handles count up from 2 and 1.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    if target != "share" {
        return Vec::new();
    }
    let ask = |opcode: u32, node: u8, user: u8, arguments: &[u8]| {
        [&[opcode as u8, node, user, arguments.len() as u8], arguments].concat()
    };
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let lookup = |node, name: &[u8]| ask(opcode::LOOKUP, node, 0, &[name, b"\0"].concat());
    let (root, file, dir) = (lookup(1, b"0"), lookup(2, b"file"), lookup(2, b"dir"));
    let flags = |flags: i32| words(&[flags as u64]);
    let create = [&words(&[2 | 0o644 << 32, 0])[..], b"new\0"].concat();
    let rename = |flags: u64| [&words(&[2, flags])[..], b"new\0file\0"].concat();
    let setattr = |valid: u64, size: u64| {
        [words(&[valid, 1, size, 0, 5, 6, 0, 7]), words(&[0o4755 << 32, 1000 << 32 | 7])].concat()
    };
    let xattr = [&[4, 0, 0, 0, 0, 0, 0, 0][..], b"trusted.x\0data"].concat();
    vec![
        [
            &root[..],
            &file,
            &ask(opcode::OPEN, 3, 0, &flags(2)),
            &ask(opcode::READ, 3, 0, &words(&[1, 0, 100, 0, 0])),
        ]
        .concat(),
        [
            &root[..],
            &file,
            &ask(opcode::OPEN, 3, 0, &flags(2)),
            &ask(opcode::WRITE, 3, 0, &[&words(&[1, 3, 4, 0, 0])[..], b"abcd"].concat()),
            &ask(opcode::FALLOCATE, 3, 0, &words(&[1, 0, 1 << 20, 0])),
            &ask(opcode::LSEEK, 3, 0, &words(&[1, 0, 3])),
            &ask(opcode::RELEASE, 3, 0, &words(&[1])),
        ]
        .concat(),
        [
            &root[..],
            &dir,
            &ask(opcode::OPENDIR, 3, 0, &flags(0)),
            &ask(opcode::READDIR, 3, 0, &words(&[1, 0, 4096, 0, 0])),
        ]
        .concat(),
        [
            &root[..],
            &ask(opcode::CREATE, 2, 1, &create),
            &ask(opcode::RENAME2, 2, 0, &rename(0)),
            &ask(opcode::MKDIR, 2, 1, &[&words(&[0o755])[..], b"d\0"].concat()),
            &ask(opcode::SYMLINK, 2, 1, b"s\0../../secret\0"),
            &ask(opcode::MKNOD, 2, 1, &[&words(&[0o010_644, 0])[..], b"f\0"].concat()),
            &ask(opcode::LINK, 2, 0, &[&words(&[3])[..], b"hard\0"].concat()),
            &ask(opcode::UNLINK, 2, 0, b"hard\0"),
            &ask(opcode::RMDIR, 2, 0, b"d\0"),
        ]
        .concat(),
        [
            &root[..],
            &file,
            &ask(opcode::SETATTR, 3, 0, &setattr(1 | 2 | 4 | 8 | 16 | 32, 3)),
            &ask(opcode::GETATTR, 3, 0, &words(&[0, 0])),
            &ask(opcode::SETXATTR, 3, 0, &xattr),
            &ask(opcode::GETXATTR, 3, 0, &[&words(&[64])[..], b"trusted.x\0"].concat()),
            &ask(opcode::LISTXATTR, 3, 0, &words(&[64])),
            &ask(opcode::REMOVEXATTR, 3, 0, b"trusted.x\0"),
            &ask(opcode::STATFS, 3, 0, &[]),
            &lookup(2, b"link"),
            &ask(opcode::READLINK, 4, 0, &[]),
            &ask(opcode::FORGET, 3, 0, &words(&[1])),
            &ask(opcode::SYNCFS, 2, 0, &words(&[0])),
        ]
        .concat(),
        [
            &ask(opcode::INIT, 0, 0, &words(&[7 | 40 << 32, 1 << 17 | 0xffff_ffff << 32, 0xffff_ffff]))[..],
            &root[..],
            &lookup(2, b".."),
            &ask(0xff, 0, 0, &message(opcode::LOOKUP, 2, 0, b"file")),
            &ask(opcode::DESTROY, 0, 0, &[]),
        ]
        .concat(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_survives_seeds_and_noise() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can make the scratch tree");
            return;
        }
        let seeds = seeds("share");
        seeds.iter().for_each(|seed| messages(seed));
        let mut noise = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            noise as usize
        };
        for _ in 0..300 {
            let mut bytes =
                [seeds[next() % seeds.len()].clone(), seeds[next() % seeds.len()].clone()].concat();
            for _ in 0..next() % 8 {
                let at = next() % bytes.len();
                bytes[at] = next() as u8;
            }
            messages(&bytes);
        }
    }

    #[test]
    fn seeds_do_what_a_kernel_does() {
        // A session whose messages are mostly refused would teach a fuzzer little.
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can make the scratch tree");
            return;
        }
        let secret = enter();
        let (mut done, mut refused) = (0, 0);
        for seed in seeds("share") {
            renew(&secret);
            let shares = [Shared { path: Path::new(PLACE).join("share"), recursive: true, read_only: false }];
            let mut server = Server::new(jail::open_trees(&shares).unwrap());
            let (mut rest, mut reply) = (&seed[..], Vec::new());
            while let Some(message) = next_message(&mut rest) {
                if server.answer(&message, &mut reply) {
                    if reply[4..8] == [0; 4] { done += 1 } else { refused += 1 }
                }
            }
        }
        // The name `..`, and what comes after it with a number that was never given.
        assert!(done > 25 && refused <= 3, "{done} done, {refused} refused");
    }
}
