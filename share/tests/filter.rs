//! The file server's list of system calls is minimal: take any away, and a guest that does everything with a shared
//! directory has its server killed.
//!
//! ```text
//!   test: the guest's side of the socket ──▶ this program again, as the server, with one call less
//! ```

use std::{
    fs,
    io::{self, BufRead, BufReader},
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::Path,
    process::{Command, ExitCode, ExitStatus, Stdio},
};

use cloche_seccomp::syscall_table::name;
use cloche_share::{Config, Shared, additions::Addition, allowed_calls, configure, run_without};
use libtest_mimic::{Arguments, Failed, Trial};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen,
    recv, send, socket_with, socketpair, sockopt::set_socket_send_buffer_size,
};

/// Files of a large directory: what is known of them takes memory that the server asks the kernel for.
const MANY: u32 = 4096;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    if words.get(1).is_some_and(|word| word == "server") {
        let without = words.get(2).and_then(|number| number.parse().ok());
        return match run_without(without) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                println!("{error}: {:?}", std::error::Error::source(&error).map(ToString::to_string));
                ExitCode::FAILURE
            }
        };
    }
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("filter: all tests are ignored, because the server's mounts need root");
    }
    let large = match large_directory() {
        Ok(large) => large,
        Err(error) => {
            eprintln!("filter: cannot make a directory: {error}");
            return ExitCode::FAILURE;
        }
    };
    let path = large.path().to_owned();
    let mut trials = vec![Trial::test("guest_that_does_everything_is_served", move || {
        let served = serve(None, &path)?;
        if served.failure.is_none() && served.status.success() {
            Ok(())
        } else {
            Err(format!("{served:?}").into())
        }
    })];
    for call in allowed_calls() {
        let name = format!("{}_is_needed", name(call as u32).unwrap_or("unknown"));
        let path = large.path().to_owned();
        trials.push(Trial::test(name, move || is_needed(call, &path)));
    }
    let trials = trials.into_iter().map(|trial| trial.with_ignored_flag(!is_root)).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn is_needed(call: libc::c_long, large: &Path) -> Result<(), Failed> {
    let served = serve(Some(call), large)?;
    if served.status.signal() == Some(libc::SIGSYS) { Ok(()) } else { Err(format!("{served:?}").into()) }
}

/// What came of a server.
#[derive(Debug)]
struct Served {
    failure: Option<String>,
    status: ExitStatus,
}

/// A guest that does everything, and a server without one call.
fn serve(without: Option<libc::c_long>, large: &Path) -> Result<Served, Failed> {
    // On a disk: it takes all that files can be told.
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let shared = folder.path().join("shared");
    fs::create_dir(&shared)?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    set_socket_send_buffer_size(&ours, 1 << 20)?;
    set_socket_send_buffer_size(&theirs, 1 << 20)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("server").args(without.map(|call| call.to_string()));
    let mut child = command.stdin(Stdio::from(theirs)).stdout(Stdio::piped()).spawn()?;
    // Else this program would keep the server's end open.
    drop(command);
    let large = Shared { path: large.to_owned(), recursive: true, read_only: true };
    let own = Shared { path: shared, recursive: true, read_only: false };
    let config = Config { shares: vec![own.clone(), large] };
    let at = folder.path().join("additions");
    let listener = seqpacket()?;
    bind(&listener, &SocketAddrUnix::new(&at)?)?;
    listen(&listener, 8)?;
    configure(ours.as_fd(), &serde_json::to_vec(&config)?, Some(listener.as_fd()))?;
    drop(listener);
    let mut said = String::new();
    BufReader::new(child.stdout.take().ok_or("stdout is piped")?).read_line(&mut said)?;
    let guest = Guest { socket: ours };
    let done = if said.trim() == cloche_share::READY {
        guest.everything().and_then(|()| guest.additions(&at, &own))
    } else {
        Err(said.into())
    };
    drop(guest);
    Ok(Served { failure: done.err().map(|error| error.to_string()), status: child.wait()? })
}

fn seqpacket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn addition(at: &Path) -> Answer<Addition> {
    let socket = seqpacket()?;
    connect(&socket, &SocketAddrUnix::new(at)?)?;
    Ok(Addition::over(socket)?)
}

/// One for all servers.
fn large_directory() -> io::Result<tempfile::TempDir> {
    let directory = tempfile::tempdir_in("/var/tmp")?;
    (0..MANY).try_for_each(|number| fs::write(directory.path().join(number.to_string()), ""))?;
    Ok(directory)
}

type Answer<T> = Result<T, Box<dyn std::error::Error>>;

/// The guest's end. Messages are FUSE's (Linux `include/uapi/linux/fuse.h`).
struct Guest {
    socket: OwnedFd,
}

impl Guest {
    /// Asks as this user; the body of the answer.
    fn ask_as(&self, user: u32, opcode: u32, node: u64, arguments: &[&[u8]]) -> Answer<Vec<u8>> {
        const FORGET: u32 = 2;
        let arguments = arguments.concat();
        let words = |words: [u32; 4]| words.map(u32::to_le_bytes).concat();
        let length = 40 + u32::try_from(arguments.len())?;
        let header = [words([length, opcode, 77, 0]), node.to_le_bytes().to_vec(), words([user, user, 1, 0])];
        send(&self.socket, &[header.concat(), arguments].concat(), SendFlags::NOSIGNAL)?;
        if opcode == FORGET {
            return Ok(Vec::new());
        }
        let mut reply = vec![0; 256 << 10];
        let (_, length) = recv(self.socket.as_fd(), reply.as_mut_slice(), RecvFlags::empty())?;
        reply.truncate(length);
        let error = reply.get(4..8).ok_or("the server is gone")?;
        match i32::from_le_bytes(error.try_into()?) {
            0 => Ok(reply.split_off(16)),
            error => Err(format!("operation {opcode}: {}", io::Error::from_raw_os_error(-error)).into()),
        }
    }

    fn ask(&self, opcode: u32, node: u64, arguments: &[&[u8]]) -> Answer<Vec<u8>> {
        self.ask_as(0, opcode, node, arguments)
    }

    /// The number at the beginning of an answer: of a file, or of an open one.
    fn number(answer: &[u8]) -> Answer<u64> {
        Ok(u64::from_le_bytes(answer.get(..8).ok_or("a short answer")?.try_into()?))
    }

    /// What others add, as long as they are there.
    fn additions(&self, at: &Path, shared: &Shared) -> Answer<()> {
        let (first, second) = (addition(at)?, addition(at)?);
        let read_only = Shared { read_only: true, ..shared.clone() };
        first.add(&[shared.clone(), read_only])?;
        // More than one message carries.
        second.add(&vec![shared.clone(); 300])?;
        let look = |addition: &Addition, index: usize| {
            let name = format!("{}\0", addition.first() + index);
            self.ask(1, 1, &[name.as_bytes()]).and_then(|answer| Self::number(&answer))
        };
        let (own, last) = (look(&first, 0)?, look(&second, 299)?);
        if look(&second, 300).is_ok() {
            return Err("a share that nobody has added is there".into());
        }
        let directory = 0o755_u32.to_le_bytes();
        self.ask(9, own, &[&directory, &[0; 4], b"made\0"])?;
        let made = Self::number(&self.ask(1, last, &[b"made\0"])?)?;
        if self.ask(11, look(&first, 1)?, &[b"made\0"]).is_ok() {
            return Err("a read-only share was written to".into());
        }
        let open = Self::number(&self.ask(27, made, &[&[0; 8]])?)?.to_le_bytes();
        drop(second);
        // Made after that end, so that its answer says that it was heard of.
        addition(at)?.settle()?;
        for (operation, number, arguments) in [(3, last, vec![0; 16]), (3, made, vec![0; 16])] {
            if self.ask(operation, number, &[&arguments]).is_ok() {
                return Err("what is given back can still be used".into());
            }
        }
        if self.ask(29, made, &[&open, &[0; 16]]).is_ok() {
            return Err("an open directory of what is given back is still open".into());
        }
        self.ask(11, own, &[b"made\0"]).map(drop)
    }

    fn everything(&self) -> Answer<()> {
        let word = |value: u64| value.to_le_bytes();
        let half = |value: u32| value.to_le_bytes();
        // INIT, and LOOKUP of the first share in the root.
        self.ask(26, 0, &[&half(7), &half(38), &half(1 << 17), &half(u32::MAX), &half(u32::MAX), &[0; 44]])?;
        let root = Self::number(&self.ask(1, 1, &[b"0\0"])?)?;
        // CREATE, as a user of the guest.
        let flags = half((libc::O_RDWR | libc::O_CREAT) as u32);
        let created = self.ask_as(7, 35, root, &[&flags, &half(0o4755), &[0; 8], b"file\0"])?;
        let file = Self::number(&created)?;
        let handle = word(Self::number(created.get(128..).ok_or("a short answer")?)?);
        // WRITE, which takes the set-user-ID bit away; READ; FSYNC in both ways; FALLOCATE; LSEEK to data.
        let kill_setid = half(1 << 2);
        self.ask(16, file, &[&handle, &word(0), &half(7), &kill_setid, &[0; 16], b"content"])?;
        let content = self.ask(15, file, &[&handle, &word(0), &half(100), &[0; 20]])?;
        if content != b"content" {
            return Err(format!("read {content:?}").into());
        }
        for data_only in [0, 1] {
            self.ask(20, file, &[&handle, &half(data_only), &half(0)])?;
        }
        self.ask(43, file, &[&handle, &word(0), &word(8192), &half(0), &half(0)])?;
        self.ask(46, file, &[&handle, &word(0), &half(libc::SEEK_DATA as u32), &half(0)])?;
        // SETATTR: mode, owner, group, size and both times. GETATTR.
        let valid = half(1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5);
        let (size, times) = (word(4096), [word(1), word(1), word(0)].concat());
        let owners = [half(0), half(0), half(0), half(0o600), half(0), half(7), half(7), half(0)].concat();
        self.ask(4, file, &[&valid, &half(0), &word(0), &size, &word(0), &times, &owners])?;
        self.ask(3, file, &[&[0; 16]])?;
        // SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR.
        self.ask(21, file, &[&half(5), &half(0), b"user.name\0", b"value"])?;
        self.ask(22, file, &[&half(1000), &half(0), b"user.name\0"])?;
        self.ask(23, file, &[&half(1000), &half(0)])?;
        self.ask(24, file, &[b"user.name\0"])?;
        // MKDIR, MKNOD of a FIFO, SYMLINK, READLINK, LINK.
        self.ask(9, root, &[&half(0o755), &half(0), b"directory\0"])?;
        self.ask(8, root, &[&half(libc::S_IFIFO | 0o644), &[0; 12], b"fifo\0"])?;
        let link = Self::number(&self.ask(6, root, &[b"link\0target\0"])?)?;
        self.ask(5, link, &[])?;
        self.ask(13, root, &[&word(file), b"second\0"])?;
        // RENAME, RENAME2 without replacing, UNLINK, RMDIR.
        self.ask(12, root, &[&word(root), b"second\0", b"third\0"])?;
        self.ask(45, root, &[&word(root), &half(1), &half(0), b"third\0", b"fourth\0"])?;
        self.ask(10, root, &[b"fourth\0"])?;
        self.ask(11, root, &[b"directory\0"])?;
        // STATFS; SYNCFS.
        self.ask(17, root, &[])?;
        self.ask(50, root, &[&word(0)])?;
        // LOOKUP of many files, OPENDIR, READDIR of all of them, RELEASEDIR; RELEASE, FORGET.
        let large = Self::number(&self.ask(1, 1, &[b"1\0"])?)?;
        for number in 0..MANY {
            self.ask(1, large, &[format!("{number}\0").as_bytes()])?;
        }
        let directory = word(Self::number(&self.ask(27, large, &[&[0; 8]])?)?);
        self.ask(28, large, &[&directory, &word(0), &half(128 << 10), &[0; 20]])?;
        self.ask(29, large, &[&directory, &[0; 16]])?;
        self.ask(18, file, &[&handle, &[0; 16]])?;
        self.ask(2, file, &[&word(u64::MAX)])?;
        self.ask(3, root, &[&[0; 16]])?;
        Ok(())
    }
}
