//! One layer's conversion: archive entries into file data and a tree, then the checks, then the blob's end.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};

use super::builder::{EntryProblem, LayerBuilder};
use super::decode::{self, DecodeError, Digests, LayerStream};
use super::recipe::{Recipe, Recorded};
use crate::digest::{Digest, HashingReader};
use crate::erofs::{self, BlobError, BlobWriter, DataWriter, FileData};
use crate::limits::{MAX_CHUNKS, MAX_ENTRIES, MAX_TREE_BYTES, PATH_MAX};
use crate::tar::{Entry, EntryKind, Extent, TarError, TarReader, shown};
use crate::tree::{Attributes, Body};

/// Why a layer was not converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The blob cannot be read or decompressed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The tar archive is malformed or torn.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry would do what no layer may.
    #[error("tar entry {entry}: {reason}")]
    Entry {
        /// The entry's name, quoted.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The layer has too many entries.
    #[error("more than {0} entries")]
    TooManyEntries(u64),
    /// The layer's names and attributes take too much memory.
    #[error("names and attributes of more than {0} MiB")]
    TreeTooLarge(u64),
    /// The layer's sparse files have too large maps.
    #[error("sparse files in more than {0} pieces")]
    TooManyChunks(u64),
    /// The blob could not be written.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// What the archive is put together from again could not be written.
    #[error("writing down how the archive is made failed")]
    Recipe(#[source] io::Error),
    /// The blob is not the one that was asked for.
    #[error("the blob has the digest {actual}, expected was {expected}; get the image again")]
    BlobDigest {
        /// Named by the manifest.
        expected: Digest,
        /// Of the bytes that came.
        actual: Digest,
    },
    /// The blob's size is not the one that was announced.
    #[error("the blob has {actual} bytes, expected were {expected}; get the image again")]
    BlobSize {
        /// Named by the manifest.
        expected: u64,
        /// Of what came.
        actual: u64,
    },
    /// The archive is not the one that the image's configuration names.
    #[error("the layer's content has the digest {actual}, expected was {expected}; get the image again")]
    DiffId {
        /// Named by the configuration.
        expected: Digest,
        /// Of the archive that came.
        actual: Digest,
    },
}

/// What is known of a layer before it is read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExpectedLayer {
    /// Digest and size of the blob, where there is a manifest that says so.
    pub(crate) blob: Option<(Digest, u64)>,
    pub(crate) diff_id: Digest,
}

/// Converts the layer in `source` into `output`, an empty file, which is complete only if this succeeds. If the source
/// is an archive that is not compressed, its recipe goes into `recipe`, another empty file. Returns the length of
/// `output` in bytes, and what the source turned out to be.
pub(crate) fn convert(
    source: impl Read + Send,
    expected: &ExpectedLayer,
    output: &File,
    recipe: &File,
    seen: impl FnMut(u64) + Send,
) -> Result<(u64, Digests), LayerError> {
    convert_checked(source, output, recipe, seen, |digests| verify(digests, expected))
}

/// As [`convert`], for a layer of which nothing is known yet.
pub(crate) fn adopt(
    source: impl Read + Send,
    output: &File,
    recipe: &File,
) -> Result<(u64, Digests), LayerError> {
    convert_checked(source, output, recipe, |_| {}, |_| Ok(()))
}

fn convert_checked(
    source: impl Read + Send,
    output: &File,
    recipe: &File,
    seen: impl FnMut(u64) + Send,
    check: impl FnOnce(&Digests) -> Result<(), LayerError>,
) -> Result<(u64, Digests), LayerError> {
    let mut conversion =
        Conversion { blob: BlobWriter::new(output), builder: LayerBuilder::new(), entries: 0, chunks: 0 };
    let ((), digests) = decode::decode(source, seen, |stream| conversion.record(stream, recipe))?;
    check(&digests)?;
    let tree = conversion.builder.finish().map_err(|problem| entry_error(b"", &problem))?;
    let uuid = digests.diff_id.uuid();
    Ok((erofs::finish(&tree, conversion.blob, uuid, &[])?, digests))
}

/// Checks a layer that needs no conversion any more.
pub(crate) fn check(
    source: impl Read + Send,
    expected: &ExpectedLayer,
    seen: impl FnMut(u64) + Send,
) -> Result<Digests, LayerError> {
    let ((), digests) = decode::decode(source, seen, |_| Ok::<_, LayerError>(()))?;
    verify(&digests, expected)?;
    Ok(digests)
}

/// What a failed layer's error should be: that of a damaged blob, if the blob is not the one that was asked for. That
/// says more than where the damage was first met.
pub(crate) fn blame(error: LayerError, source: impl Read, expected: &ExpectedLayer) -> LayerError {
    if !matches!(error, LayerError::Tar(_) | LayerError::Decode(_)) {
        return error;
    }
    match HashingReader::new(source, |_| {}).finish() {
        Ok((digest, bytes)) => verify_blob(digest, bytes, expected).err().unwrap_or(error),
        Err(_) => error,
    }
}

fn verify_blob(digest: Digest, bytes: u64, expected: &ExpectedLayer) -> Result<(), LayerError> {
    match expected.blob {
        Some((_, expected)) if expected != bytes => Err(LayerError::BlobSize { expected, actual: bytes }),
        Some((expected, _)) if expected != digest => Err(LayerError::BlobDigest { expected, actual: digest }),
        _ => Ok(()),
    }
}

fn verify(digests: &Digests, expected: &ExpectedLayer) -> Result<(), LayerError> {
    verify_blob(digests.blob, digests.blob_bytes, expected)?;
    if digests.diff_id != expected.diff_id {
        return Err(LayerError::DiffId { expected: expected.diff_id, actual: digests.diff_id });
    }
    Ok(())
}

fn entry_error(name: &[u8], problem: &EntryProblem) -> LayerError {
    LayerError::Entry { entry: shown(name), reason: problem.to_string() }
}

struct Conversion<'a> {
    blob: BlobWriter<'a>,
    builder: LayerBuilder,
    entries: u64,
    chunks: u64,
}

impl Conversion<'_> {
    fn record(&mut self, stream: &mut LayerStream, output: &File) -> Result<(), LayerError> {
        if !stream.is_plain() {
            return self.run(&mut Recorded { stream, recipe: None });
        }
        let recipe = RefCell::new(Recipe::begin(output).map_err(LayerError::Recipe)?);
        let mut recorded = Recorded { stream, recipe: Some(&recipe) };
        self.run(&mut recorded)?;
        recorded.drain()?;
        recipe.into_inner().finish().map_err(LayerError::Recipe)
    }

    fn run(&mut self, stream: &mut Recorded<'_, '_, '_>) -> Result<(), LayerError> {
        let recipe = stream.recipe;
        let mut tar = TarReader::new(stream);
        while let Some(entry) = tar.next()? {
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return Err(LayerError::TooManyEntries(MAX_ENTRIES));
            }
            self.add(&mut tar, entry, recipe)?;
            if self.builder.bytes() > MAX_TREE_BYTES {
                return Err(LayerError::TreeTooLarge(MAX_TREE_BYTES >> 20));
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        tar: &mut TarReader<&mut Recorded<'_, '_, '_>>,
        entry: Entry,
        recipe: Option<&RefCell<Recipe<'_>>>,
    ) -> Result<(), LayerError> {
        let Entry { path, mode, uid, gid, mtime, xattrs, kind } = entry;
        let error = |problem: EntryProblem| entry_error(&path, &problem);
        let body = match kind {
            EntryKind::HardLink { target } => return self.builder.link(&path, &target).map_err(error),
            EntryKind::File { size, extents } => {
                let data = self.copy_data(tar, size, extents, recipe)?;
                self.chunks += data.chunks(size);
                if self.chunks > MAX_CHUNKS {
                    return Err(LayerError::TooManyChunks(MAX_CHUNKS));
                }
                Body::File { size, data }
            }
            EntryKind::Symlink { target } if target.is_empty() => {
                return Err(error(EntryProblem::EmptyTarget));
            }
            EntryKind::Symlink { target } if target.len() >= PATH_MAX => {
                return Err(error(EntryProblem::TargetTooLong));
            }
            EntryKind::Symlink { target } => Body::Symlink(target.into()),
            EntryKind::CharDevice { major, minor } => Body::CharDevice(device(major, minor).map_err(error)?),
            EntryKind::BlockDevice { major, minor } => {
                Body::BlockDevice(device(major, minor).map_err(error)?)
            }
            EntryKind::Directory => Body::Directory(Default::default()),
            EntryKind::Fifo => Body::Fifo,
        };
        let allow_user = matches!(body, Body::File { .. } | Body::Directory(_));
        let xattrs = self.builder.encode_xattrs(xattrs, allow_user).map_err(error)?;
        self.builder.add(&path, Attributes { mode, uid, gid, mtime, xattrs }, body).map_err(error)
    }

    fn copy_data(
        &mut self,
        tar: &mut TarReader<&mut Recorded<'_, '_, '_>>,
        size: u64,
        extents: Option<Vec<Extent>>,
        recipe: Option<&RefCell<Recipe<'_>>>,
    ) -> Result<FileData, LayerError> {
        let mut data = DataWriter::new(&mut self.blob, size);
        let mut position = 0;
        for extent in extents.unwrap_or_else(|| vec![Extent { offset: 0, length: size }]) {
            data.skip(extent.offset - position)?;
            let note = |stored| recipe.into_iter().for_each(|recipe| recipe.borrow_mut().stored(stored));
            tar.copy_data(extent.length, |piece| data.write(piece, note).map_err(LayerError::from))?;
            position = extent.offset + extent.length;
        }
        data.skip(size - position)?;
        Ok(data.finish()?)
    }
}

fn device(major: u32, minor: u32) -> Result<u32, EntryProblem> {
    erofs::encode_device(major, minor).ok_or(EntryProblem::Device(major, minor))
}

impl From<io::Error> for LayerError {
    fn from(error: io::Error) -> Self {
        LayerError::Decode(DecodeError::Read(error))
    }
}
