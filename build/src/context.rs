//! The context of a build, and its Dockerfile: a directory, an archive, or nothing.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cloche_images::{Bounded, BuildError, Store, StoreError};
use rustix::fs::{Mode, OFlags};

use crate::dockerfile::MAX_BYTES;
use crate::patterns::{Ignore, PatternError};
use crate::tree::Tree;

/// Where the context is.
#[derive(Debug)]
pub enum Source {
    /// A directory.
    Directory(PathBuf),
    /// An archive, plain or compressed; or a Dockerfile without a context. Read from its start.
    Stream(File),
}

/// What was given to the build.
#[derive(Debug)]
pub struct Input {
    /// The context.
    pub source: Source,
    /// `--file`: a path of this machine for a directory, one in it for an archive.
    pub file: Option<PathBuf>,
    /// The Dockerfile itself, if it came by another way.
    pub text: Option<String>,
}

/// Why there is no context.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// The directory is none.
    #[error("cannot open the context {0}")]
    Directory(PathBuf, #[source] io::Error),
    /// There is no Dockerfile.
    #[error("cannot read the Dockerfile {0}")]
    Dockerfile(PathBuf, #[source] io::Error),
    /// A Dockerfile is text.
    #[error("the Dockerfile {0} is not UTF-8 text")]
    NoText(PathBuf),
    /// It is none.
    #[error("the Dockerfile {0} has more than {MAX_BYTES} bytes")]
    TooLarge(PathBuf),
    /// What it leaves out is malformed.
    #[error("{0}")]
    Ignore(PathBuf, #[source] PatternError),
    /// What is to be left out is not known.
    #[error("cannot read {0}")]
    IgnoreFile(PathBuf, #[source] io::Error),
    /// The archive is none.
    #[error("cannot read the context's archive")]
    Archive(#[source] BuildError),
    /// The stream cannot be read.
    #[error("cannot read the context")]
    Stream(#[from] io::Error),
    /// The store is needed for an archive.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A context that is open.
pub(crate) struct Context {
    pub(crate) tree: Arc<Tree>,
    pub(crate) dockerfile: String,
}

impl Context {
    pub(crate) fn open(input: &Input, store: &Store) -> Result<Context, ContextError> {
        match &input.source {
            Source::Directory(directory) => of_directory(directory, input),
            Source::Stream(file) => of_stream(file, input, store),
        }
    }
}

fn of_directory(directory: &Path, input: &Input) -> Result<Context, ContextError> {
    let path = input.file.clone().unwrap_or_else(|| directory.join("Dockerfile"));
    let dockerfile = match &input.text {
        Some(text) => text.clone(),
        None => {
            let file = open_regular(&path).map_err(|error| ContextError::Dockerfile(path.clone(), error))?;
            text(&mut &file, &path)?
        }
    };
    let mut beside = path.into_os_string();
    beside.push(".dockerignore");
    let own = PathBuf::from(beside);
    let ignore = match input.text.is_none() && own.exists() {
        true => own,
        false => directory.join(".dockerignore"),
    };
    let ignored = match ignore_text(&ignore) {
        Ok(text) => Ignore::parse(&text).map_err(|error| ContextError::Ignore(ignore.clone(), error))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ignore::default(),
        Err(error) => return Err(ContextError::IgnoreFile(ignore, error)),
    };
    let tree = Tree::host(directory, ignored)
        .map_err(|error| ContextError::Directory(directory.to_owned(), error))?;
    Ok(Context { tree: Arc::new(tree), dockerfile })
}

/// A context may be anybody's: what opens a file of it waits for nobody.
fn open_regular(path: &Path) -> io::Result<File> {
    let file = File::from(rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    Ok(file)
}

fn ignore_text(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > MAX_BYTES {
        return Err(io::Error::other(format!("it has more than {MAX_BYTES} bytes")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn of_stream(file: &File, input: &Input, store: &Store) -> Result<Context, ContextError> {
    let name = input.file.clone().unwrap_or_else(|| PathBuf::from("Dockerfile"));
    let mut spool = Bounded::new(store.spool()?);
    io::copy(&mut &*file, &mut spool)?;
    let mut spool = spool.into_inner();
    spool.rewind()?;
    let mut head = [0; 512];
    let count = read_up_to(&mut spool, &mut head)?;
    spool.rewind()?;
    if !is_archive(head.get(..count).unwrap_or_default()) {
        let dockerfile = match &input.text {
            Some(text) => text.clone(),
            None => text(&mut &spool, Path::new("on stdin"))?,
        };
        let nothing = Tree::Layers(cloche_images::View::empty());
        return Ok(Context { tree: Arc::new(nothing), dockerfile });
    }
    let view = store.view_of_archive(spool).map_err(ContextError::Archive)?;
    let tree = Arc::new(Tree::Layers(view));
    let dockerfile = match &input.text {
        Some(text) => text.clone(),
        None => {
            let missing = |error| ContextError::Dockerfile(name.clone(), error);
            let item = tree.resolve(crate::tree::bytes(&name)).map_err(missing)?;
            let item = item.ok_or_else(|| missing(io::ErrorKind::NotFound.into()))?;
            let mut data = tree.open(&item).map_err(missing)?;
            text(&mut data, &name)?
        }
    };
    Ok(Context { tree, dockerfile })
}

/// By its first bytes: a tar header, or what gzip, zstd, bzip2 and xz begin with.
fn is_archive(head: &[u8]) -> bool {
    let magics: [&[u8]; 4] =
        [&[0x1f, 0x8b], &[0x28, 0xb5, 0x2f, 0xfd], b"BZh", &[0xfd, b'7', b'z', b'X', b'Z', 0]];
    magics.iter().any(|magic| head.starts_with(magic)) || head.get(257..262) == Some(b"ustar")
}

fn read_up_to(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut content = Vec::new();
    source.take(buffer.len() as u64).read_to_end(&mut content)?;
    buffer.iter_mut().zip(&content).for_each(|(to, from)| *to = *from);
    Ok(content.len())
}

fn text(source: &mut dyn Read, path: &Path) -> Result<String, ContextError> {
    let mut bytes = Vec::new();
    let read = source.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|error| ContextError::Dockerfile(path.to_owned(), error))?;
    if bytes.len() > MAX_BYTES {
        return Err(ContextError::TooLarge(path.to_owned()));
    }
    String::from_utf8(bytes).map_err(|_| ContextError::NoText(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn fifo_and_endless_file_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(".dockerignore");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::from(0o600), 0)
            .unwrap();
        assert!(ignore_text(&path).is_err());
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(ignore_text(&path).is_err());
        fs::remove_file(&path).unwrap();
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(ignore_text(&path).unwrap_err().to_string().contains("more than"));
        fs::write(&path, "a\n").unwrap();
        assert_eq!(ignore_text(&path).unwrap(), "a\n");
    }
}
