//! Images in the making: layers written file by file or taken over from a sandbox, and what steps of builds have made.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::bounded::{Bounded, Sizes};
use crate::commit::AddError;
use crate::digest::Digest;
use crate::image::{Image, Layer};
use crate::layer::{self, LayerError, decompressor, detect};
use crate::limits::{MAX_ENTRIES, MAX_LAYERS};
use crate::load::LoadError;
use crate::reference::Reference;
use crate::store::{ImageRecord, LayerRecord, StepRecord, Store, StoreError};
use crate::tar::{Entry, EntryKind, Input, TarError, TarReader, TarWriter, Timestamp};
use crate::view::{FileInfo, FileKind, View};

/// Why a layer or an image was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file cannot be written to the layer's archive.
    #[error("cannot write the layer's archive")]
    Write(#[source] io::Error),
    /// An archive is none.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An archive cannot be read.
    #[error(transparent)]
    Archive(#[from] LoadError),
    /// An archive cannot be a layer.
    #[error("it cannot be a layer")]
    Layer(#[from] LayerError),
    /// A layer cannot be taken in.
    #[error(transparent)]
    Add(#[from] AddError),
    /// Too many layers.
    #[error("the image has {0} layers; it can have {MAX_LAYERS}")]
    TooManyLayers(usize),
}

/// A layer that is in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StoredLayer(LayerRecord);

impl StoredLayer {
    /// The digest of its archive.
    pub fn diff_id(&self) -> Digest {
        self.0.diff_id
    }
}

/// The result of a step of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedStep {
    /// Seconds since 1970.
    pub created: u64,
    /// The layer it made, if it made one.
    pub layer: Option<StoredLayer>,
}

/// How a sandbox's changes become a layer.
#[derive(Debug, Default)]
pub struct Changes {
    /// No file is younger than this, in seconds since 1970.
    pub latest: Option<i64>,
    /// Paths from the root that were made to mount something there. They are left out if nothing else came of them.
    pub stubs: Vec<Vec<u8>>,
}

impl Store {
    /// The layers of an image, for another one on top of them.
    pub fn layers_under(&self, image: &Image) -> Result<Vec<StoredLayer>, StoreError> {
        Ok(self.record(image.id)?.layers.into_iter().map(StoredLayer).collect())
    }

    /// The file systems of layers, bottom first.
    pub fn layer_files(&self, layers: &[StoredLayer]) -> Vec<PathBuf> {
        layers.iter().map(|layer| self.layer_path(layer.0.diff_id)).collect()
    }

    /// What a sandbox on these layers, bottom first, would see.
    pub fn view(&self, layers: &[StoredLayer]) -> Result<View, StoreError> {
        let open = |layer: &StoredLayer| {
            let path = self.layer_path(layer.0.diff_id);
            File::open(&path).map_err(|source| StoreError::Io { action: "open", path, source })
        };
        let files = layers.iter().map(open).collect::<Result<_, _>>()?;
        let read = |source| StoreError::Io { action: "read", path: self.root().to_owned(), source };
        View::new(files).map_err(read)
    }

    /// What is in an archive, plain or compressed, without keeping it.
    pub fn view_of_archive(&self, archive: File) -> Result<View, BuildError> {
        let file = crate::load::unpack_file(std::path::Path::new("the archive"), archive, self)?;
        let new = self.new_layer()?;
        layer::adopt(rewound(&file)?, new.blob(), new.recipe())?;
        let blob = new.blob().try_clone().map_err(BuildError::Write)?;
        View::new(vec![blob]).map_err(BuildError::Write)
    }

    /// A file system with one file in it, which belongs to root.
    pub fn view_of_file(
        &self,
        content: File,
        name: &[u8],
        mode: u16,
        mtime: i64,
    ) -> Result<View, BuildError> {
        let size = content.metadata().map_err(BuildError::Write)?.len();
        let info = FileInfo {
            kind: FileKind::File,
            mode,
            uid: 0,
            gid: 0,
            size,
            mtime: (mtime, 0),
            xattrs: Vec::new(),
        };
        let mut writer = TarWriter::new(BufWriter::new(Bounded::new(self.scratch()?)));
        let mut content = rewound(&content)?;
        writer.entry(&info.entry(name, b""), &mut content).map_err(BuildError::Write)?;
        let file = writer.finish().map_err(BuildError::Write)?;
        let file = file.into_inner().map_err(|error| BuildError::Write(error.into_error()))?;
        self.view_of_archive(file.into_inner())
    }

    /// Whether a file is an archive that [`Self::view_of_archive`] reads.
    pub fn is_archive(&self, file: &File) -> io::Result<bool> {
        let mut file = file.try_clone()?;
        file.rewind()?;
        let (encoding, stream) = detect(&file).map_err(io::Error::other)?;
        // A single block is enough, and of what is no archive no more is decompressed.
        let mut head = Vec::new();
        let is_read =
            decompressor(encoding, BufReader::new(stream))?.take(512).read_to_end(&mut head).is_ok();
        file.rewind()?;
        Ok(is_read && (head.get(257..262) == Some(b"ustar") || is_old_tar(&head)))
    }

    /// A nameless file on the store's file system.
    pub fn spool(&self) -> Result<File, StoreError> {
        self.scratch()
    }

    /// Starts a layer.
    pub fn write_layer(&self) -> Result<LayerWriter, BuildError> {
        let file = Bounded::new(self.scratch()?);
        Ok(LayerWriter {
            tar: TarWriter::new(BufWriter::with_capacity(1 << 20, file)),
            sizes: Sizes::default(),
        })
    }

    /// Takes a layer into the store.
    pub fn add_layer(&self, writer: LayerWriter) -> Result<StoredLayer, BuildError> {
        let file = writer.tar.finish().map_err(BuildError::Write)?;
        let file = file.into_inner().map_err(|error| BuildError::Write(error.into_error()))?;
        Ok(StoredLayer(self.add_archive(rewound(&file.into_inner())?)?))
    }

    /// Takes what a sandbox on `lower` changed, an archive, into the store as a layer: in order of names, so that the
    /// same changes are the same layer.
    pub fn add_changes(
        &self,
        archive: File,
        lower: &View,
        changes: &Changes,
    ) -> Result<StoredLayer, BuildError> {
        let mut stubs = Stubs::of(&changes.stubs);
        let mut tar = TarReader::new(BufReader::new(rewound(&archive)?));
        let mut entries = 0;
        while let Some(entry) = tar.next()? {
            entries += 1;
            if entries > MAX_ENTRIES {
                return Err(LayerError::TooManyEntries(MAX_ENTRIES).into());
            }
            stubs.note(entry);
        }
        let left_out = stubs.left_out(lower).map_err(BuildError::Write)?;
        let mut writer = self.write_layer()?;
        let mut tar = TarReader::new(BufReader::new(rewound(&archive)?));
        while let Some(mut entry) = tar.next()? {
            if left_out.contains(&plain(&entry.path)) {
                continue;
            }
            if let Some(latest) = changes.latest
                && entry.mtime.seconds >= latest
            {
                entry.mtime = Timestamp { seconds: latest, nanoseconds: 0 };
            }
            writer.copy(&mut tar, entry)?;
        }
        self.add_layer(writer)
    }

    /// An image that is in no index, to run something on its layers.
    pub fn unnamed_image(&self, config: &[u8], layers: &[StoredLayer]) -> Result<Image, BuildError> {
        let records: Vec<LayerRecord> = layers.iter().map(|layer| layer.0.clone()).collect();
        let record = ImageRecord {
            id: Digest::of(config),
            manifest: None,
            digests: Vec::new(),
            names: Vec::new(),
            layers: records.clone(),
        };
        let layers = records.into_iter().map(|layer| Layer {
            diff_id: layer.diff_id,
            erofs: self.layer_path(layer.diff_id),
            erofs_bytes: layer.erofs_bytes,
        });
        Image::new(&record, Vec::new(), layers.collect(), config.to_vec())
            .map_err(|error| BuildError::Write(error.into()))
    }

    /// Makes an image of a configuration and its layers, bottom first.
    pub fn put_image(
        &self,
        config: &[u8],
        layers: &[StoredLayer],
        names: &[Reference],
    ) -> Result<Digest, BuildError> {
        if layers.len() > MAX_LAYERS {
            return Err(BuildError::TooManyLayers(layers.len()));
        }
        let id = self.put_blob(config)?;
        let record = ImageRecord {
            id,
            manifest: None,
            digests: Vec::new(),
            names: names.iter().map(ToString::to_string).collect(),
            layers: layers.iter().map(|layer| layer.0.clone()).collect(),
        };
        self.commit(vec![record])?;
        Ok(id)
    }

    /// The result of the step with this key, if it is known.
    pub fn cached_step(&self, key: Digest) -> Option<CachedStep> {
        let StepRecord { created, layer } = self.read_step(key)?;
        Some(CachedStep { created, layer: layer.map(StoredLayer) })
    }

    /// Writes down the result of the step with this key.
    pub fn cache_step(&self, key: Digest, step: &CachedStep) -> Result<(), StoreError> {
        let layer = step.layer.as_ref().map(|layer| layer.0.clone());
        self.write_step(key, &StepRecord { created: step.created, layer })
    }

    /// Deletes what nobody refers to, if nobody is at work. The caller has no [`crate::Hold`] any more.
    pub fn tidy(&self) -> Result<(), StoreError> {
        self.sweep()
    }
}

/// A header without a magic, as before POSIX, that adds up.
fn is_old_tar(head: &[u8]) -> bool {
    let mut tar = TarReader::new(io::Cursor::new(head.to_vec()));
    head.len() == 512 && head.first() != Some(&0) && matches!(tar.next(), Ok(Some(_)))
}

impl FileInfo {
    pub(crate) fn entry(&self, path: &[u8], target: &[u8]) -> Entry {
        let kind = match self.kind {
            FileKind::File => EntryKind::File { size: self.size, extents: None },
            FileKind::Directory => EntryKind::Directory,
            FileKind::Symlink => EntryKind::Symlink { target: target.to_vec() },
            FileKind::CharDevice(major, minor) => EntryKind::CharDevice { major, minor },
            FileKind::BlockDevice(major, minor) => EntryKind::BlockDevice { major, minor },
            FileKind::Fifo => EntryKind::Fifo,
        };
        let (seconds, nanoseconds) = self.mtime;
        Entry {
            path: path.to_vec(),
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            mtime: Timestamp { seconds, nanoseconds },
            xattrs: self.xattrs.clone(),
            kind,
        }
    }
}

fn rewound(file: &File) -> Result<File, BuildError> {
    let mut file = file.try_clone().map_err(BuildError::Write)?;
    file.rewind().map_err(BuildError::Write)?;
    Ok(file)
}

/// An entry's name without `./`, `/` in front and `/` behind.
fn plain(path: &[u8]) -> Vec<u8> {
    let components = path.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
    components.collect::<Vec<_>>().join(&b'/')
}

/// Entries that exist only because something was mounted upon them, and directories that are entries only because those
/// were made in them. Of all entries, only those that may be left out are kept: how many there are is up to a guest.
#[derive(Default)]
struct Stubs {
    /// What may be left out, whether it was mounted upon, and its entry.
    candidates: BTreeMap<Vec<u8>, (bool, Option<Entry>)>,
    /// Those in which something is that may not.
    occupied: BTreeSet<Vec<u8>>,
}

impl Stubs {
    fn of(stubs: &[Vec<u8>]) -> Stubs {
        let mut candidates = BTreeMap::new();
        for stub in stubs {
            let stub = plain(stub);
            for parent in parents(&stub) {
                candidates.entry(parent.to_vec()).or_insert((false, None));
            }
            candidates.insert(stub, (true, None));
        }
        Stubs { candidates, occupied: BTreeSet::new() }
    }

    fn note(&mut self, entry: Entry) {
        let path = plain(&entry.path);
        if let Some((_, known)) = self.candidates.get_mut(&path) {
            *known = Some(entry);
            return;
        }
        self.occupy_above(&path);
    }

    fn occupy_above(&mut self, path: &[u8]) {
        for parent in parents(path) {
            if self.candidates.contains_key(parent) && !self.occupied.contains(parent) {
                self.occupied.insert(parent.to_vec());
            }
        }
    }

    fn left_out(mut self, lower: &View) -> io::Result<BTreeSet<Vec<u8>>> {
        let mut left_out = BTreeSet::new();
        // The deepest first, so that what has nothing left in it goes as well.
        while let Some((path, (is_stub, entry))) = self.candidates.pop_last() {
            let Some(entry) = entry else { continue };
            let is_empty = match entry.kind {
                EntryKind::Directory => true,
                EntryKind::File { size, .. } => size == 0,
                _ => false,
            };
            if is_empty && !self.occupied.contains(&path) && is_unchanged(&path, &entry, is_stub, lower)? {
                left_out.insert(path);
            } else {
                self.occupy_above(&path);
            }
        }
        Ok(left_out)
    }
}

/// Whether `lower` has the same, so that nothing is lost without the entry.
fn is_unchanged(path: &[u8], entry: &Entry, is_stub: bool, lower: &View) -> io::Result<bool> {
    let there = lower.resolve(path, false).ok().and_then(|found| found.node);
    let Some(node) = there else { return Ok(true) };
    let info = lower.info(&node)?;
    let same = (info.mode, info.uid, info.gid) == (entry.mode, entry.uid, entry.gid);
    Ok(!is_stub && info.kind == FileKind::Directory && same && info.xattrs == entry.xattrs)
}

/// The directories above a path, the root last.
fn parents(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let ends = path.iter().enumerate().rev().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    let root = (!path.is_empty()).then_some(0);
    ends.chain(root).map(|end| path.get(..end).unwrap_or_default())
}

/// A layer that is being written.
pub struct LayerWriter {
    tar: TarWriter<BufWriter<Bounded>>,
    sizes: Sizes,
}

impl LayerWriter {
    /// Writes a file of any kind; `target` is a link's, `data` a regular file's.
    pub fn add(
        &mut self,
        path: &[u8],
        info: &FileInfo,
        target: &[u8],
        data: &mut dyn Read,
    ) -> io::Result<()> {
        if info.kind == FileKind::File {
            self.sizes.add(info.size)?;
        }
        self.tar.entry(&info.entry(path, target), data)
    }

    /// Writes another name of a file that was written before.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> io::Result<()> {
        let entry = Entry {
            path: path.to_vec(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
            kind: EntryKind::HardLink { target: target.to_vec() },
        };
        self.tar.entry(&entry, &mut io::empty())
    }

    /// Takes an entry over, a sparse file as one that is not.
    fn copy<R: Input>(&mut self, tar: &mut TarReader<R>, mut entry: Entry) -> Result<(), BuildError> {
        let mut pieces = Vec::new();
        if let EntryKind::File { size, extents } = &mut entry.kind {
            let whole = vec![crate::tar::Extent { offset: 0, length: *size }];
            pieces = extents.take().unwrap_or(whole);
            self.sizes.add(*size).map_err(BuildError::Write)?;
        }
        let size = self.tar.begin(&entry).map_err(BuildError::Write)?;
        let mut position = 0;
        for piece in pieces {
            self.zeros(piece.offset - position)?;
            tar.copy_data(piece.length, |data| self.tar.data(data).map_err(BuildError::Write))?;
            position = piece.offset + piece.length;
        }
        self.zeros(size - position)?;
        self.tar.end(size).map_err(BuildError::Write)
    }

    fn zeros(&mut self, count: u64) -> Result<(), BuildError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut left = count;
        while left > 0 {
            let step = left.min(ZEROS.len() as u64);
            self.tar.data(ZEROS.get(..step as usize).unwrap_or(&ZEROS)).map_err(BuildError::Write)?;
            left -= step;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: EntryKind) -> Entry {
        Entry {
            path: path.as_bytes().to_vec(),
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
            kind,
        }
    }

    #[test]
    fn only_what_was_made_to_mount_upon_is_left_out() {
        let mut stubs = Stubs::of(&[b"/a/b/c".to_vec(), b"/x/y".to_vec(), b"/dev".to_vec()]);
        for (path, kind) in [
            ("./", EntryKind::Directory),
            ("a", EntryKind::Directory),
            ("a/b", EntryKind::Directory),
            ("a/b/c", EntryKind::File { size: 0, extents: None }),
            ("x/", EntryKind::Directory),
            ("x/y", EntryKind::Directory),
            ("x/other", EntryKind::Fifo),
            ("dev", EntryKind::Fifo),
        ] {
            stubs.note(entry(path, kind));
        }
        assert_eq!(stubs.candidates.len(), 7);
        let left_out = stubs.left_out(&View::empty()).unwrap();
        let expected = ["a", "a/b", "a/b/c", "x/y"].map(|path| path.as_bytes().to_vec());
        assert_eq!(left_out, BTreeSet::from(expected));
    }
}
