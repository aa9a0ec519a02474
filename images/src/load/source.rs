//! Where an image is loaded from: a directory or a tar archive, both as files by name.
//!
//! An archive is read through once, headers only, and its members are then read where they lie. One that cannot be
//! read like that (compressed, or a pipe) is first written to a nameless file in the store.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::LoadError;
use crate::layer::{DecodeError, Encoding, decompressor, detect};
use crate::limits::{MAX_ARCHIVE_MEMBERS, MAX_LAYER_BYTES, MAX_MEMBER_NAME, RESERVED_DISK_BYTES};
use crate::store::Store;
use crate::tar::{EntryKind, TarReader};

/// Symbolic links followed from one member to another.
const MAX_ALIASES: usize = 8;

pub(super) struct Source {
    path: PathBuf,
    form: Form,
}

enum Form {
    Directory(File),
    Archive { file: File, members: HashMap<String, Place> },
}

/// Where an archive's member is.
enum Place {
    Data {
        offset: u64,
        bytes: u64,
    },
    /// A link to another member.
    Alias(String),
}

/// A file of the source.
pub(super) struct Member<'a> {
    pub(super) bytes: u64,
    pub(super) reader: Box<dyn Read + Send + 'a>,
}

impl Source {
    /// Opens a directory or an archive. `store` has the space for what must be unpacked first.
    pub(super) fn open(path: &Path, store: &Store) -> Result<Source, LoadError> {
        let read = |source| LoadError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        let metadata = file.metadata().map_err(read)?;
        // A device has no end; an archive comes from a file or through a pipe.
        if metadata.file_type().is_char_device() || metadata.file_type().is_block_device() {
            return Err(LoadError::NotAnImage(path.to_owned()));
        }
        if metadata.is_dir() {
            return Ok(Source { path: path.to_owned(), form: Form::Directory(file) });
        }
        let file = unpack_file(path, file, store)?;
        let members = list_members(path, &file)?;
        Ok(Source { path: path.to_owned(), form: Form::Archive { file, members } })
    }

    /// The file or directory this reads.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn has(&self, name: &str) -> Result<bool, LoadError> {
        self.member(name).map(|member| member.is_some())
    }

    /// The file `name`, or an error that says who named it.
    pub(super) fn require(&self, name: &str, named_by: &str) -> Result<Member<'_>, LoadError> {
        self.member(name)?.ok_or_else(|| LoadError::Missing {
            path: self.path.clone(),
            member: name.to_owned(),
            named_by: named_by.to_owned(),
        })
    }

    /// The whole content of a small file.
    pub(super) fn read(&self, name: &str, named_by: &str, limit: u64) -> Result<Vec<u8>, LoadError> {
        let member = self.require(name, named_by)?;
        let too_large = |bytes| LoadError::TooLarge { member: name.to_owned(), bytes, limit };
        if member.bytes > limit {
            return Err(too_large(member.bytes));
        }
        let mut content = Vec::new();
        let read = member.reader.take(limit + 1).read_to_end(&mut content);
        read.map_err(|source| LoadError::Read { path: self.path.join(name), source })?;
        // A file of a directory may have grown.
        if content.len() as u64 > limit { Err(too_large(content.len() as u64)) } else { Ok(content) }
    }

    fn member(&self, name: &str) -> Result<Option<Member<'_>>, LoadError> {
        match &self.form {
            Form::Directory(directory) => open_below(directory, name)
                .map_err(|source| LoadError::Read { path: self.path.join(name), source }),
            Form::Archive { file, members } => {
                let mut name = normalise("", name);
                for _ in 0..MAX_ALIASES {
                    match members.get(&name) {
                        None => return Ok(None),
                        Some(Place::Alias(target)) => name.clone_from(target),
                        Some(&Place::Data { offset, bytes }) => {
                            let reader = Box::new(Section { file, next: offset, end: offset + bytes });
                            return Ok(Some(Member { bytes, reader }));
                        }
                    }
                }
                Ok(None)
            }
        }
    }
}

/// A file that can be read at any place: itself, or what is in it if it is compressed or a pipe.
pub(crate) fn unpack_file(path: &Path, file: File, store: &Store) -> Result<File, LoadError> {
    let read = |source| LoadError::Read { path: path.to_owned(), source };
    let decode = |source| LoadError::Decode { path: path.to_owned(), source };
    let is_file = file.metadata().map_err(read)?.is_file();
    let (encoding, mut stream) = detect(&file).map_err(decode)?;
    if encoding == Encoding::Plain && is_file {
        drop(stream);
        return Ok(file);
    }
    let scratch = store.scratch()?;
    unpack(encoding, &mut stream, &scratch).map_err(|error| decode(DecodeError::Read(error)))?;
    Ok(scratch)
}

/// Opens a regular file below `directory`; symbolic links may not lead out of it.
fn open_below(directory: &File, name: &str) -> io::Result<Option<Member<'static>>> {
    // Without O_NONBLOCK, a FIFO in the directory would make us wait for a writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let file: File = match rustix::fs::openat2(directory, name, flags, Mode::empty(), resolve) {
        Ok(file) => file.into(),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok(Some(Member { bytes: metadata.len(), reader: Box::new(file) }))
}

/// A part of a file; many may be read at once.
struct Section<'a> {
    file: &'a File,
    next: u64,
    end: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = buffer.len().min(usize::try_from(self.end - self.next).unwrap_or(usize::MAX));
        let count = self.file.read_at(buffer.get_mut(..length).unwrap_or_default(), self.next)?;
        self.next += count as u64;
        Ok(count)
    }
}

/// Lists an archive's members. A later one of the same name replaces an earlier one.
fn list_members(path: &Path, file: &File) -> Result<HashMap<String, Place>, LoadError> {
    let read = |source| LoadError::Read { path: path.to_owned(), source };
    let mut input = file.try_clone().map_err(read)?;
    io::Seek::rewind(&mut input).map_err(read)?;
    let mut tar = TarReader::new(BufReader::new(input));
    let mut members = HashMap::new();
    let archive = |source| LoadError::Archive { path: path.to_owned(), source };
    while let Some(entry) = tar.next().map_err(archive)? {
        // Members that images are made of have plain names; others are no part of one.
        let Some(name) = plain_name(entry.path) else { continue };
        let name = normalise("", &name);
        let alias =
            |base: &str, target| plain_name(target).map(|target| Place::Alias(normalise(base, &target)));
        let place = match entry.kind {
            EntryKind::File { size, extents: None } => {
                Some(Place::Data { offset: tar.position(), bytes: size })
            }
            // Relative to the directory of the link.
            EntryKind::Symlink { target } => {
                alias(name.rsplit_once('/').map_or("", |(directory, _)| directory), target)
            }
            EntryKind::HardLink { target } => alias("", target),
            _ => None,
        };
        if let Some(place) = place {
            members.insert(name, place);
        }
        if members.len() > MAX_ARCHIVE_MEMBERS {
            return Err(LoadError::TooManyMembers { path: path.to_owned(), limit: MAX_ARCHIVE_MEMBERS });
        }
    }
    Ok(members)
}

fn plain_name(name: Vec<u8>) -> Option<String> {
    String::from_utf8(name).ok().filter(|name| name.len() <= MAX_MEMBER_NAME)
}

/// `name` as seen from `base`, without `.`, `..` and empty components.
fn normalise(base: &str, name: &str) -> String {
    let base = if name.starts_with('/') { "" } else { base };
    let mut components = Vec::new();
    for component in base.split('/').chain(name.split('/')) {
        match component {
            "" | "." => {}
            ".." => {
                components.pop();
            }
            _ => components.push(component),
        }
    }
    components.join("/")
}

/// Writes an archive that cannot be read in place to a file. A large one leaves the disk some space.
fn unpack(encoding: Encoding, stream: impl Read, mut scratch: &File) -> io::Result<()> {
    const PIECE: usize = 1 << 20;
    let mut reader = decompressor(encoding, BufReader::with_capacity(PIECE, stream))?.take(MAX_LAYER_BYTES);
    let mut piece = Vec::with_capacity(PIECE);
    let mut written = 0;
    loop {
        piece.clear();
        reader.by_ref().take(PIECE as u64).read_to_end(&mut piece)?;
        if piece.is_empty() {
            return Ok(());
        }
        written += piece.len() as u64;
        if written > RESERVED_DISK_BYTES {
            let stat = rustix::fs::fstatvfs(scratch)?;
            if stat.f_bavail.saturating_mul(stat.f_frsize) < RESERVED_DISK_BYTES {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        scratch.write_all(&piece)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_name_is_normalised_within_the_archive() {
        for (base, name, expected) in [
            ("", "./index.json", "index.json"),
            ("abc", "../def.tar", "def.tar"),
            ("abc", "../../../def.tar", "def.tar"),
            ("abc", "/def.tar", "def.tar"),
            ("", "blobs//sha256/./x", "blobs/sha256/x"),
        ] {
            assert_eq!(normalise(base, name), expected);
        }
    }
}
