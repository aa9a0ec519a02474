//! The server without a guest: requests as bytes, on a directory of this machine. As any user: what needs root is
//! tested in a sandbox.

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt, symlink},
    },
    path::Path,
    sync::Once,
};

use proptest::prelude::*;
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
};
use tempfile::TempDir;

use crate::{server::Server, wire::opcode};

struct Guest {
    server: Server,
    dir: TempDir,
}

fn place(path: &Path) -> OwnedFd {
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

impl Guest {
    fn new() -> Self {
        // What the jail does; in it, there is no other way to a file than its descriptor.
        static DESCRIPTORS: Once = Once::new();
        DESCRIPTORS.call_once(|| std::env::set_current_dir("/proc/self/fd").unwrap());
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("share")).unwrap();
        fs::write(dir.path().join("secret"), "secret").unwrap();
        fs::write(dir.path().join("share/file"), "content").unwrap();
        let server = Server::new(vec![place(&dir.path().join("share")), place(&dir.path().join("secret"))]);
        Self { server, dir }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join("share").join(name)
    }

    /// The reply's body, or its error.
    fn ask(&mut self, opcode: u32, node: u64, arguments: &[u8]) -> Result<Vec<u8>, Errno> {
        let mut reply = Vec::new();
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        assert!(self.server.answer(&request(opcode, node, (uid, gid), arguments), &mut reply));
        let length = u32::from_le_bytes(reply[..4].try_into().unwrap());
        assert_eq!(length as usize, reply.len());
        assert_eq!(u64::from_le_bytes(reply[8..16].try_into().unwrap()), 77);
        match i32::from_le_bytes(reply[4..8].try_into().unwrap()) {
            0 => Ok(reply[16..].to_vec()),
            error => {
                assert_eq!(reply.len(), 16);
                Err(Errno::from_raw_os_error(-error))
            }
        }
    }

    fn lookup(&mut self, parent: u64, name: &[u8]) -> Result<u64, Errno> {
        let entry = self.ask(opcode::LOOKUP, parent, &[name, b"\0"].concat())?;
        assert_eq!(entry.len(), 128);
        Ok(number(&entry, 0))
    }

    fn root(&mut self) -> u64 {
        self.lookup(1, b"0").unwrap()
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let arguments = [(flags as u32).to_le_bytes(), [0; 4]].concat();
        self.ask(opcode::OPEN, node, &arguments).map(|open| number(&open, 0))
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn request(opcode: u32, node: u64, (uid, gid): (u32, u32), arguments: &[u8]) -> Vec<u8> {
    let mut message = (40 + arguments.len() as u32).to_le_bytes().to_vec();
    message.extend(opcode.to_le_bytes());
    message.extend(77u64.to_le_bytes());
    message.extend(node.to_le_bytes());
    for word in [uid, gid, 1, 0] {
        message.extend(word.to_le_bytes());
    }
    message.extend(arguments);
    message
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn init_agrees_on_what_both_know_and_refuses_old_guests() {
    let mut guest = Guest::new();
    let init = |minor: u32| -> Vec<u8> {
        [7, minor, 1 << 17, 0xffff_ffff, 0xffff_ffff]
            .iter()
            .flat_map(|word: &u32| word.to_le_bytes())
            .collect()
    };
    let reply = guest.ask(opcode::INIT, 0, &init(40)).unwrap();
    assert_eq!(reply.len(), 64);
    assert_eq!(u32::from_le_bytes(reply[4..8].try_into().unwrap()), 38);
    assert_eq!(u32::from_le_bytes(reply[20..24].try_into().unwrap()), 128 << 10);
    assert_eq!(reply[32] & 1 << 4, 1 << 4, "DIRECT_IO_ALLOW_MMAP");
    assert_eq!(guest.ask(opcode::INIT, 0, &init(30)), Err(Errno::PROTO));
}

#[test]
fn root_is_a_directory_that_nobody_changes() {
    let mut guest = Guest::new();
    let attributes = guest.ask(opcode::GETATTR, 1, &[0; 16]).unwrap();
    assert_eq!(attributes.len(), 104);
    assert_eq!(u32::from_le_bytes(attributes[76..80].try_into().unwrap()), 0o040_555);
    let root = guest.root();
    let same = guest.ask(opcode::GETATTR, root, &[0; 16]).unwrap();
    assert_eq!(same.len(), 104);
    assert_eq!(u32::from_le_bytes(same[76..80].try_into().unwrap()) & libc::S_IFMT, libc::S_IFDIR);
    assert_eq!(guest.ask(opcode::MKDIR, 1, b"12345678name\0"), Err(Errno::PERM));
    assert_eq!(guest.ask(opcode::OPENDIR, 1, &[0; 8]), Err(Errno::PERM));
}

#[test]
fn file_is_found_read_and_written() {
    let mut guest = Guest::new();
    let root = guest.root();
    let file = guest.lookup(root, b"file").unwrap();
    let handle = guest.open(file, libc::O_RDWR).unwrap();
    let read = |offset: u64, size: u64| words(&[handle, offset, size, 0, 0]);
    assert_eq!(guest.ask(opcode::READ, file, &read(3, 1000)).unwrap(), b"tent");
    assert_eq!(guest.ask(opcode::READ, file, &read(0, 4)).unwrap(), b"cont");
    assert_eq!(guest.ask(opcode::READ, file, &read(100, 4)).unwrap(), b"");
    let write = [words(&[handle, 7, 2, 0, 0]), b"!?".to_vec()].concat();
    assert_eq!(number(&guest.ask(opcode::WRITE, file, &write).unwrap(), 0), 2);
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"content!?");
    guest.ask(opcode::RELEASE, file, &words(&[handle, 0, 0])).unwrap();
    assert_eq!(guest.ask(opcode::READ, file, &read(0, 4)), Err(Errno::BADF));
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let mut guest = Guest::new();
    let root = guest.root();
    for name in [&b".."[..], b".", b"", b"../secret", b"/etc/passwd", b"share/..", b"a/b"] {
        assert_eq!(guest.lookup(root, name), Err(Errno::INVAL), "{name:?}");
        let unlink = [name, b"\0"].concat();
        assert_eq!(guest.ask(opcode::UNLINK, root, &unlink), Err(Errno::INVAL));
        let rename = [&words(&[root])[..], b"file\0", name, b"\0"].concat();
        assert_eq!(guest.ask(opcode::RENAME, root, &rename), Err(Errno::INVAL));
    }
    assert!(guest.dir.path().join("secret").exists() && guest.path("file").exists());
    // Shares have numbers, and only those that there are.
    assert_eq!(guest.lookup(1, b"2"), Err(Errno::NOENT));
    assert_eq!(guest.lookup(1, b"secret"), Err(Errno::NOENT));
}

#[test]
fn symbolic_link_is_itself_and_never_followed() {
    let mut guest = Guest::new();
    symlink("../secret", guest.path("link")).unwrap();
    symlink("/etc", guest.path("dir")).unwrap();
    let root = guest.root();
    let link = guest.lookup(root, b"link").unwrap();
    assert_eq!(guest.ask(opcode::READLINK, link, b"").unwrap(), b"../secret");
    assert_eq!(guest.open(link, libc::O_RDONLY), Err(Errno::INVAL));
    let dir = guest.lookup(root, b"dir").unwrap();
    assert_eq!(guest.lookup(dir, b"passwd"), Err(Errno::NOTDIR));
    let cut = [words(&[8]), vec![0; 80]].concat();
    assert_eq!(guest.ask(opcode::SETATTR, link, &cut), Err(Errno::INVAL));
    assert_eq!(fs::read(guest.dir.path().join("secret")).unwrap(), b"secret");
}

#[test]
fn device_nodes_and_whiteouts_are_refused() {
    let mut guest = Guest::new();
    let root = guest.root();
    for kind in [libc::S_IFCHR, libc::S_IFBLK, libc::S_IFDIR, libc::S_IFLNK] {
        let arguments = [&words(&[u64::from(kind | 0o644) | 259 << 32, 0])[..], b"node\0"].concat();
        assert_eq!(guest.ask(opcode::MKNOD, root, &arguments), Err(Errno::PERM));
    }
    let whiteout = [&words(&[root, 4])[..], b"file\0gone\0"].concat();
    assert_eq!(guest.ask(opcode::RENAME2, root, &whiteout), Err(Errno::INVAL));
}

#[test]
fn fifo_is_not_opened_here() {
    let mut guest = Guest::new();
    let root = guest.root();
    let arguments = [&words(&[u64::from(libc::S_IFIFO | 0o644), 0])[..], b"fifo\0"].concat();
    let entry = guest.ask(opcode::MKNOD, root, &arguments).unwrap();
    assert_eq!(guest.open(number(&entry, 0), libc::O_RDONLY), Err(Errno::INVAL));
}

#[test]
fn forgotten_file_is_closed_and_its_number_is_not_given_again() {
    let mut guest = Guest::new();
    let root = guest.root();
    let file = guest.lookup(root, b"file").unwrap();
    assert_eq!(guest.lookup(root, b"file").unwrap(), file);
    let forget = |count| request(opcode::FORGET, file, (0, 0), &words(&[count]));
    assert!(!guest.server.answer(&forget(1), &mut Vec::new()));
    assert_eq!(guest.server.nodes.len(), 2);
    assert!(!guest.server.answer(&forget(u64::MAX), &mut Vec::new()));
    assert_eq!(guest.server.nodes.len(), 1);
    assert_eq!(guest.open(file, libc::O_RDONLY), Err(Errno::STALE));
    assert_ne!(guest.lookup(root, b"file").unwrap(), file);
}

#[test]
fn directory_is_listed_with_the_numbers_of_its_files() {
    let mut guest = Guest::new();
    let expected: Vec<String> = (0..500).map(|number| format!("entry-{number}")).collect();
    for name in &expected {
        fs::write(guest.path(name), "").unwrap();
    }
    fs::remove_file(guest.path("file")).unwrap();
    let root = guest.root();
    let handle = number(&guest.ask(opcode::OPENDIR, root, &[0; 8]).unwrap(), 0);
    let (mut offset, mut names) = (0, Vec::new());
    loop {
        let page = guest.ask(opcode::READDIR, root, &words(&[handle, offset, 4096, 0, 0])).unwrap();
        assert!(page.len() <= 4096);
        let mut rest = &page[..];
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            let length = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
            let name = String::from_utf8(rest[24..24 + length].to_vec()).unwrap();
            if name.starts_with("entry") {
                assert_eq!(number(rest, 0), fs::metadata(guest.path(&name)).unwrap().ino());
            }
            offset = number(rest, 8);
            names.push(name);
            rest = &rest[(24 + length).next_multiple_of(8)..];
        }
    }
    names.sort();
    let mut all: Vec<String> = [".", ".."].map(String::from).into_iter().chain(expected).collect();
    all.sort();
    assert_eq!(names, all);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever comes is answered, once, and nothing outside of the shares is touched.
    #[test]
    fn any_messages_are_answered(
        messages in prop::collection::vec(
            (0u32..54, prop_oneof![0u64..6, any::<u64>()], prop::collection::vec(prop_oneof![0u8..8, any::<u8>()], 0..120)),
            1..24,
        ),
    ) {
        let mut guest = Guest::new();
        let root = guest.root();
        let _ = guest.lookup(root, b"file");
        let mut reply = Vec::new();
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        for (opcode, node, arguments) in messages {
            // fsync and syncfs are for the disk, and slow.
            prop_assume!(opcode != opcode::SYNCFS);
            if guest.server.answer(&request(opcode, node, own, &arguments), &mut reply) {
                prop_assert!(reply.len() >= 16 && reply.len() <= crate::wire::MAX_REPLY_BYTES);
                let error = i32::from_le_bytes(reply[4..8].try_into().unwrap());
                prop_assert!((-4095..=0).contains(&error));
            }
        }
        let outside: Vec<_> = fs::read_dir(guest.dir.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
        prop_assert_eq!(outside.len(), 2);
    }

    /// A message may end anywhere.
    #[test]
    fn any_bytes_are_survived(message in prop::collection::vec(any::<u8>(), 0..100)) {
        let mut guest = Guest::new();
        guest.server.answer(&message, &mut Vec::new());
    }
}
