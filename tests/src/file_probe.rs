//! What programs do to files, done in one directory and checked step by step. It runs inside a sandbox, in a directory
//! of the host, and must find there what any file system of Linux's own has.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, RenameFlags, Timespec, Timestamps, Uid, XattrFlags,
    chownat, fallocate, getxattr, listxattr, mknodat, removexattr, renameat_with, setxattr, utimensat,
};

use crate::mapping;

type Step = (&'static str, fn(&Path) -> Result<()>);

const STEPS: &[Step] = &[
    ("contents", contents),
    ("names", names),
    ("modes and owners", modes_and_owners),
    ("times", times),
    ("attributes", attributes),
    ("exclusive creation", exclusive_creation),
    ("append", append),
    ("sparse files", sparse_files),
    ("mapped memory", mapped_memory),
    ("locks", locks),
    ("removed but open", removed_but_open),
    ("special files", special_files),
    ("file system", file_system),
];

/// Runs every step in a directory of its own below `base`; the last makes this many entries.
pub fn run(base: &str, entries: u32) -> Result<()> {
    let last = |directory: &Path| many_entries(directory, entries);
    let steps = STEPS.iter().map(|(name, step)| (*name, step as &dyn Fn(&Path) -> Result<()>));
    for (number, (name, step)) in steps.chain([("many entries", &last as _)]).enumerate() {
        let directory = Path::new(base).join(format!("step-{number}"));
        fs::create_dir(&directory).with_context(|| format!("{name}: make its directory"))?;
        step(&directory).context(name)?;
        println!("{name}: fine");
    }
    Ok(())
}

fn contents(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    // Neither a multiple of a page nor of a request.
    let bytes: Vec<u8> = (0..1_234_567_u32).map(|index| (index / 3) as u8).collect();
    fs::write(&path, &bytes)?;
    ensure!(fs::read(&path)? == bytes, "it reads back differently");
    let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
    file.write_all_at(b"in the middle", 600_000)?;
    file.seek(SeekFrom::Start(599_999))?;
    let mut some = [0; 15];
    file.read_exact(&mut some)?;
    ensure!(&some[1..14] == b"in the middle", "{some:?}");
    file.set_len(100)?;
    ensure!(file.metadata()?.len() == 100 && fs::read(&path)?.len() == 100, "not cut");
    file.set_len(5000)?;
    ensure!(fs::read(&path)?.iter().skip(100).all(|byte| *byte == 0), "what was added is not zero");
    file.sync_all()?;
    file.sync_data()?;
    File::open(dir)?.sync_all()?;
    drop(file);
    let truncated = OpenOptions::new().write(true).truncate(true).open(&path)?;
    ensure!(truncated.metadata()?.len() == 0, "O_TRUNC");
    Ok(())
}

fn names(dir: &Path) -> Result<()> {
    let (a, b, c) = (dir.join("a"), dir.join("b"), dir.join("ü-日本 x"));
    fs::write(&a, "a")?;
    fs::rename(&a, &b)?;
    ensure!(!a.exists() && fs::read(&b)? == b"a", "rename");
    fs::hard_link(&b, &c)?;
    let (first, second) = (fs::metadata(&b)?, fs::metadata(&c)?);
    ensure!(first.ino() == second.ino() && second.nlink() == 2, "hard link: {first:?} {second:?}");
    fs::write(&a, "other")?;
    ensure!(renameat_with(CWD, &a, CWD, &b, RenameFlags::NOREPLACE).is_err(), "RENAME_NOREPLACE replaced");
    renameat_with(CWD, &a, CWD, &b, RenameFlags::EXCHANGE).context("RENAME_EXCHANGE")?;
    ensure!(fs::read(&a)? == b"a" && fs::read(&b)? == b"other", "exchange");
    let link = dir.join("link");
    symlink("../no/where", &link)?;
    ensure!(fs::read_link(&link)? == Path::new("../no/where"), "symbolic link");
    fs::create_dir_all(dir.join("d/e"))?;
    ensure!(fs::remove_dir(dir.join("d")).is_err_and(|error| error.kind() == ErrorKind::DirectoryNotEmpty));
    fs::rename(dir.join("d/e"), dir.join("f"))?;
    for name in ["a", "b", "ü-日本 x", "link"] {
        fs::remove_file(dir.join(name)).with_context(|| format!("remove {name}"))?;
    }
    fs::remove_dir(dir.join("f"))?;
    fs::remove_dir(dir.join("d"))?;
    ensure!(fs::read_dir(dir)?.count() == 0, "something is left");
    ensure!(fs::metadata(&a).is_err_and(|error| error.kind() == ErrorKind::NotFound));
    let long = dir.join("n".repeat(256));
    ensure!(File::create(long).is_err_and(|error| error.raw_os_error() == Some(36)), "ENAMETOOLONG");
    Ok(())
}

fn modes_and_owners(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    fs::write(&path, "x")?;
    fs::set_permissions(&path, Permissions::from_mode(0o640))?;
    chownat(CWD, &path, Some(Uid::from_raw(1234)), Some(Gid::from_raw(99_999)), AtFlags::empty())?;
    let metadata = fs::metadata(&path)?;
    ensure!((metadata.uid(), metadata.gid(), metadata.mode()) == (1234, 99_999, 0o100_640), "{metadata:?}");
    fs::set_permissions(&path, Permissions::from_mode(0o4755))?;
    ensure!(fs::metadata(&path)?.mode() == 0o104_755, "set-user-ID bit");
    // A change of owner takes the bit away.
    chownat(CWD, &path, Some(Uid::ROOT), Some(Gid::ROOT), AtFlags::empty())?;
    ensure!(fs::metadata(&path)?.mode() == 0o100_755, "{:o}", fs::metadata(&path)?.mode());
    let link = dir.join("link");
    symlink("file", &link)?;
    chownat(CWD, &link, Some(Uid::from_raw(7)), None, AtFlags::SYMLINK_NOFOLLOW)?;
    ensure!(fs::symlink_metadata(&link)?.uid() == 7 && fs::metadata(&path)?.uid() == 0, "owner of a link");
    Ok(())
}

fn times(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    fs::write(&path, "x")?;
    let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let set = Timestamps { last_access: time(1_000_000_000, 5), last_modification: time(-5, 123_456_789) };
    utimensat(CWD, &path, &set, AtFlags::empty())?;
    let metadata = fs::metadata(&path)?;
    let seen = (metadata.atime(), metadata.atime_nsec(), metadata.mtime(), metadata.mtime_nsec());
    ensure!(seen == (1_000_000_000, 5, -5, 123_456_789), "{seen:?}");
    fs::write(&path, "y")?;
    ensure!(fs::metadata(&path)?.mtime() > 1_000_000_000, "writing does not change the time");
    Ok(())
}

fn attributes(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    fs::write(&path, "x")?;
    let value: Vec<u8> = (0..=255).collect();
    setxattr(&path, "user.one", &value, XattrFlags::CREATE)?;
    ensure!(setxattr(&path, "user.one", b"", XattrFlags::CREATE).is_err(), "XATTR_CREATE replaced");
    setxattr(&path, "user.two", b"", XattrFlags::empty())?;
    let mut room = [0; 1000];
    let length = getxattr(&path, "user.one", &mut room)?;
    ensure!(room[..length] == value, "another value");
    let length = listxattr(&path, &mut room)?;
    let names = String::from_utf8_lossy(&room[..length]).into_owned();
    ensure!(names.contains("user.one\0") && names.contains("user.two\0"), "{names:?}");
    removexattr(&path, "user.two")?;
    ensure!(getxattr(&path, "user.two", &mut room).is_err(), "still there");
    Ok(())
}

fn exclusive_creation(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let create = || OpenOptions::new().write(true).create_new(true).open(&path);
    drop(create()?);
    ensure!(
        create().is_err_and(|error| error.kind() == ErrorKind::AlreadyExists),
        "O_EXCL opened what was there"
    );
    Ok(())
}

fn append(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let open = || OpenOptions::new().append(true).create(true).open(&path);
    let (mut one, mut other) = (open()?, open()?);
    for round in 0..50 {
        one.write_all(format!("one {round}\n").as_bytes())?;
        other.write_all(format!("other {round}\n").as_bytes())?;
    }
    let text = fs::read_to_string(&path)?;
    let expected: String = (0..50).map(|round| format!("one {round}\nother {round}\n")).collect();
    ensure!(text == expected, "lines are lost or mixed up");
    Ok(())
}

fn sparse_files(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
    file.write_all_at(b"end", 8 << 20)?;
    ensure!(file.metadata()?.blocks() < 1000, "a hole takes room");
    let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0))?;
    ensure!(data > 0 && data <= 8 << 20, "SEEK_DATA: {data}");
    fallocate(&file, FallocateFlags::empty(), 0, 1 << 20)?;
    ensure!(file.metadata()?.blocks() >= 2048, "fallocate took no room");
    fallocate(&file, FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE, 0, 1 << 20)?;
    ensure!(file.metadata()?.blocks() < 1000, "punching a hole gave no room");
    Ok(())
}

fn mapped_memory(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    fs::write(&path, vec![b'a'; 10_000])?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    mapping::change(&file, 10_000, 5000, b"mapped")?;
    let bytes = fs::read(&path)?;
    ensure!(bytes.len() == 10_000 && &bytes[5000..5006] == b"mapped" && bytes[4999] == b'a', "not written");
    Ok(())
}

fn locks(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    fs::write(&path, "x")?;
    let (one, other) = (File::open(&path)?, File::open(&path)?);
    one.lock()?;
    ensure!(other.try_lock().is_err(), "flock: both have it");
    one.unlock()?;
    other.try_lock().context("flock: freed, and yet not to be had")?;
    Ok(())
}

fn removed_but_open(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
    fs::remove_file(&path)?;
    file.write_all(b"still here")?;
    file.rewind()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    ensure!(text == "still here" && file.metadata()?.nlink() == 0, "{text:?}");
    fs::write(&path, "another")?;
    ensure!(
        fs::metadata(&path)?.ino() != file.metadata()?.ino(),
        "the number of an open file was given away"
    );
    Ok(())
}

fn many_entries(dir: &Path, count: u32) -> Result<()> {
    let name = |number: u32| format!("entry-{number:04}-{}", "x".repeat(number as usize % 60));
    for number in 0..count {
        fs::write(dir.join(name(number)), number.to_string())?;
    }
    let mut seen: Vec<String> = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        ensure!(entry.file_type()?.is_file(), "{:?} has another type", entry.file_name());
        ensure!(rustix::fs::statat(CWD, entry.path(), AtFlags::empty())?.st_ino == entry.ino_of()?);
        seen.push(entry.file_name().to_string_lossy().into_owned());
    }
    seen.sort();
    let expected: Vec<String> = (0..count).map(name).collect();
    ensure!(seen == expected, "{} entries are not the {count} made", seen.len());
    // Removing while reading leaves nothing out.
    for entry in fs::read_dir(dir)? {
        fs::remove_file(entry?.path())?;
    }
    ensure!(fs::read_dir(dir)?.count() == 0, "some are left");
    Ok(())
}

trait InodeOf {
    fn ino_of(&self) -> Result<u64>;
}

impl InodeOf for fs::DirEntry {
    fn ino_of(&self) -> Result<u64> {
        Ok(std::os::unix::fs::DirEntryExt::ino(self))
    }
}

fn special_files(dir: &Path) -> Result<()> {
    let fifo = dir.join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
    ensure!(fs::metadata(&fifo)?.file_type().is_fifo(), "no FIFO");
    let writer = std::thread::spawn({
        let fifo = fifo.clone();
        move || fs::write(fifo, "through the pipe")
    });
    ensure!(fs::read_to_string(&fifo)? == "through the pipe", "FIFO");
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    let socket = dir.join("socket");
    let listener = UnixListener::bind(&socket).context("bind a socket")?;
    let client = std::os::unix::net::UnixStream::connect(&socket).context("connect to the socket")?;
    drop((listener.accept()?, client));
    Ok(())
}

fn file_system(dir: &Path) -> Result<()> {
    let statistics = rustix::fs::statvfs(dir)?;
    ensure!(statistics.f_blocks > 0 && statistics.f_namemax >= 255, "the numbers of statvfs");
    Ok(())
}
