//! The image store on disk.
//!
//! ```text
//! ROOT/
//!   index.json               images and their names; replaced whole, by rename
//!   index.lock               held (flock, exclusive) while index.json is read, changed and replaced
//!   lock                     held shared by whoever uses or adds blobs, exclusive by whoever deletes some
//!   blobs/sha256/HEX         configurations, manifests, and layers as they came compressed, byte for byte
//!   layers/sha256/HEX.erofs  converted layers; HEX is the layer's diffID, the digest of its tar archive
//!   merged/sha256/HEX.erofs  all layers of an image as one file system, without the data; made when it is needed (`rootfs`)
//!   recipes/sha256/HEX       how such a layer's archive is put together again, if it came uncompressed
//!   partial/sha256/HEX-BYTES blobs that are on their way from a registry
//!   partial/sha256/HEX.whole blobs from there that wait for the rest of their image
//!   steps/HEX                what a step of a build has made (`steps`); missing until there is a build
//! ```
//!
//! A layer is kept twice: converted, to run, and as it came, so that a push or `save` gives back the very image that
//! was pulled (`docs/decisions/0026-layers-are-kept-as-they-came.md`).
//!
//! **Always whole.** Blobs and layers are written without a name and linked once they are complete and on disk
//! (`files`), and `index.json` is replaced by rename after all it refers to is there. So whatever has a name is
//! complete, and a process killed at any moment, or a full disk, leaves no half of anything. It may leave complete
//! blobs that no image refers to; the next sweep deletes them. The exception are the files under `partial/`, which grow
//! under their names, and are looked at as a whole before they move to `blobs/` (`partial`).
//!
//! **The roots** are the images in `index.json`, and the layers of steps; a blob that none of them refers to is garbage. A sweep runs after
//! each removal and each load, if it gets `lock` exclusively at once. If not, someone is adding or using blobs, and
//! the sweep is left to the next one: deleting is never waited for and never hurries anyone.
//!
//! **Locks** are taken in the order `lock`, `index.lock`. Reading `index.json` needs neither. Whoever resolves an
//! image and then opens its layers does so under [`Store::hold`], or must expect a concurrent removal in between;
//! layers that are open or mounted outlive their removal.

mod files;
mod index;
mod partial;
mod steps;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use crate::digest::Digest;
use crate::image::{Image, Layer};
use crate::layer::Rebuilt;
use crate::limits::MAX_CONFIG_BYTES;
use crate::reference::{Reference, ReferenceError};

use files::{Lock, NewFile};
use index::Index;
pub(crate) use index::{BlobRecord, ImageRecord, LayerRecord};
pub(crate) use partial::Partial;
pub(crate) use steps::StepRecord;
pub use steps::StepUsage;

/// The images on this machine. Cheap to open; any number of processes may use the same store.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
}

/// Why the store could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The system refused an operation on the store's files.
    #[error("cannot {action} {path} in the image store")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The store lies on a file system that cannot create nameless files.
    #[error(
        "the file system of the image store at {0} does not support O_TMPFILE; put the store on ext4, xfs, btrfs or tmpfs"
    )]
    NoTmpfile(PathBuf),
    /// A file is not what its digest says, or is missing.
    #[error("the image store is damaged: {path} {problem}; remove image {image} and load it again")]
    Damaged {
        /// The image that needs the file.
        image: Digest,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Why no image could be found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// There is no such image.
    #[error("there is no image {0}; `cloche pull` or `cloche load` it, or see `cloche image ls`")]
    NotFound(String),
    /// Several images' IDs start like this.
    #[error("{count} images have IDs that start with {prefix}; give more digits")]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// How many there are.
        count: usize,
    },
    /// What was asked for can be neither a name nor an ID.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The store could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why an image was not removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoveError {
    /// It was not found.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// It was given by its ID, and has several names.
    #[error("image {id} has several names; remove each of {}", .names.join(", "))]
    SeveralNames {
        /// The image.
        id: Digest,
        /// Its names.
        names: Vec<String>,
    },
    /// The store could not be changed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a removal did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// Names that are gone.
    pub untagged: Vec<String>,
    /// The image, if it is gone too.
    pub deleted: Option<Digest>,
}

/// While this lives, no blob or layer is deleted.
#[derive(Debug)]
pub struct Hold {
    _lock: Lock,
}

impl Store {
    /// Opens the store at `root`, and makes it if there is none.
    pub fn open(root: &Path) -> Result<Store, StoreError> {
        let root = std::path::absolute(root).map_err(io_error("find", root))?;
        let store = Store { root };
        // The last to be made stands for all: each start of a sandbox opens the store, and looks for one only.
        if !store.partials().is_dir() {
            for directory in
                [store.blobs(), store.layers(), store.recipes(), store.merged(), store.partials()]
            {
                fs::create_dir_all(&directory).map_err(io_error("create", &directory))?;
            }
        }
        Ok(store)
    }

    /// Where the store lies.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Keeps all blobs and layers from being deleted, as long as the answer lives.
    pub fn hold(&self) -> Result<Hold, StoreError> {
        let path = self.root.join("lock");
        let lock = Lock::shared(&path).map_err(io_error("lock", &path))?;
        Ok(Hold { _lock: lock })
    }

    /// All images, in the order they came. One that is damaged fails.
    pub fn images(&self) -> Result<Vec<Image>, StoreError> {
        self.each_image()?.into_iter().collect()
    }

    /// Each image, or what is wrong with it, in the order they came.
    pub fn each_image(&self) -> Result<Vec<Result<Image, StoreError>>, StoreError> {
        Ok(self.read_index()?.images.iter().map(|record| self.image(record)).collect())
    }

    /// The image with this name (as people write it), this ID, or an ID that starts like this.
    pub fn resolve(&self, name_or_id: &str) -> Result<Image, ResolveError> {
        let index = self.read_index()?;
        let (record, _) = find(&index, name_or_id)?;
        Ok(self.image(record)?)
    }

    /// Takes a name from an image. With its last name, or when it is given by its ID, the image goes, and with it all
    /// layers that no other image has.
    pub fn remove(&self, name_or_id: &str) -> Result<Removed, RemoveError> {
        let removed = {
            let _lock = self.lock_index()?;
            let mut index = self.read_index()?;
            let (record, name) = find(&index, name_or_id)?;
            let id = record.id;
            if name.is_none() && record.names.len() > 1 {
                return Err(RemoveError::SeveralNames { id, names: record.names.clone() });
            }
            let removed = index
                .remove(id, name.as_ref())
                .ok_or_else(|| ResolveError::NotFound(name_or_id.to_owned()))?;
            self.write_index(&index)?;
            Removed { untagged: removed.untagged, deleted: removed.deleted.then_some(id) }
        };
        self.sweep()?;
        Ok(removed)
    }

    /// Forgets all images that are not wanted, whatever names they have; the caller sweeps.
    pub(crate) fn forget(&self, unwanted: impl Fn(&ImageRecord) -> bool) -> Result<Vec<Digest>, StoreError> {
        let _lock = self.lock_index()?;
        let mut index = self.read_index()?;
        let (gone, kept): (Vec<_>, Vec<_>) = index.images.drain(..).partition(unwanted);
        index.images = kept;
        if !gone.is_empty() {
            self.write_index(&index)?;
        }
        Ok(gone.into_iter().map(|record| record.id).collect())
    }

    /// Adds images whose blobs and layers are all there. The caller holds a [`Hold`] since before it made them.
    pub(crate) fn commit(&self, records: Vec<ImageRecord>) -> Result<(), StoreError> {
        let _lock = self.lock_index()?;
        let mut index = self.read_index()?;
        for record in records {
            index.add(record);
        }
        self.write_index(&index)
    }

    /// Adds what is new about an image that may have been removed meanwhile; tells whether it is there. The caller
    /// holds a [`Hold`].
    pub(crate) fn update(&self, record: ImageRecord) -> Result<bool, StoreError> {
        let _lock = self.lock_index()?;
        let mut index = self.read_index()?;
        let is_there = index.images.iter().any(|image| image.id == record.id);
        if is_there {
            index.add(record);
            self.write_index(&index)?;
        }
        Ok(is_there)
    }

    /// What is known of an image.
    pub(crate) fn record(&self, id: Digest) -> Result<ImageRecord, StoreError> {
        let found = self.records()?.into_iter().find(|record| record.id == id);
        let path = self.index_path();
        found.ok_or(StoreError::Damaged { image: id, path, problem: "does not name it any more" })
    }

    /// What is known of all images.
    pub(crate) fn records(&self) -> Result<Vec<ImageRecord>, StoreError> {
        Ok(self.read_index()?.images)
    }

    /// A configuration or manifest, whose digest is looked at.
    pub(crate) fn read_blob(&self, digest: Digest) -> Result<Vec<u8>, StoreError> {
        let path = self.blob_path(digest);
        let content = read_bounded(&path, MAX_CONFIG_BYTES).map_err(io_error("read", &path))?;
        if Digest::of(&content) != digest {
            let problem = "does not have its digest";
            return Err(StoreError::Damaged { image: digest, path, problem });
        }
        Ok(content)
    }

    /// Stores a configuration or manifest.
    pub(crate) fn put_blob(&self, content: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(content);
        let path = self.blobs().join(digest.hex());
        if path.exists() {
            return Ok(digest);
        }
        let new = self.new_file(&self.blobs())?;
        new.file().write_all(content).map_err(io_error("write", &path))?;
        new.publish(&digest.hex()).map_err(io_error("write", &path))?;
        Ok(digest)
    }

    /// Where the layer with this diffID lies, whether it is there or not.
    pub(crate) fn layer_path(&self, diff_id: Digest) -> PathBuf {
        self.layers().join(layer_name(diff_id))
    }

    /// Nameless files that are to become a layer.
    pub(crate) fn new_layer(&self) -> Result<NewLayer, StoreError> {
        let (layers, recipes) = (self.layers(), self.recipes());
        let (blob, recipe) = (self.new_file(&layers)?, self.new_file(&recipes)?);
        Ok(NewLayer { blob, layers, recipe, recipes })
    }

    /// Whether a layer's archive can be had again: as it was compressed, or from its recipe if it was not.
    pub(crate) fn has_archive(&self, diff_id: Digest, blob: &BlobRecord) -> bool {
        let is_plain = blob.digest == diff_id;
        self.has_blob(blob.digest, blob.bytes) || is_plain && self.recipes().join(diff_id.hex()).exists()
    }

    /// A layer as it travels, from its start. Nobody has checked its digest.
    pub(crate) fn open_archive(&self, diff_id: Digest, blob: &BlobRecord) -> Result<Archive, StoreError> {
        let recipe = self.recipes().join(diff_id.hex());
        if blob.digest != diff_id || !recipe.exists() {
            return self.open_blob(blob.digest, blob.bytes).map(Archive::File);
        }
        let open = || Rebuilt::open(fs::File::open(&recipe)?, fs::File::open(self.layer_path(diff_id))?);
        open().map(|rebuilt| Archive::Rebuilt(Box::new(rebuilt))).map_err(io_error("read", &recipe))
    }

    /// A nameless file on the store's file system, for what must be seekable for a while.
    pub(crate) fn scratch(&self) -> Result<fs::File, StoreError> {
        let new = self.new_file(&self.root)?;
        new.file().try_clone().map_err(io_error("create a file in", &self.root))
    }

    /// Deletes what no image refers to, unless someone is using or adding blobs; and downloads that nobody has gone on
    /// with for long.
    pub(crate) fn sweep(&self) -> Result<(), StoreError> {
        self.sweep_with(Some(partial::KEPT_FOR))
    }

    /// As [`Self::sweep`], but with all downloads that nobody is at.
    pub(crate) fn sweep_all(&self) -> Result<(), StoreError> {
        self.sweep_with(None)
    }

    fn sweep_with(&self, kept_for: Option<Duration>) -> Result<(), StoreError> {
        let path = self.root.join("lock");
        let Some(_lock) = Lock::try_exclusive(&path).map_err(io_error("lock", &path))? else {
            return Ok(());
        };
        let index = self.read_index()?;
        let steps = self.step_layers()?;
        let blobs = index.images.iter().flat_map(|image| [Some(image.id), image.manifest]).flatten();
        let layers = index.images.iter().flat_map(|image| &image.layers).chain(&steps);
        let travelling = layers.clone().filter_map(|layer| Some(layer.blob?.digest));
        sweep_directory(&self.blobs(), blobs.chain(travelling).map(|digest| digest.hex()).collect())?;
        sweep_directory(&self.layers(), layers.clone().map(|layer| layer_name(layer.diff_id)).collect())?;
        let merged =
            index.images.iter().map(|image| merged_name(image.layers.iter().map(|layer| layer.diff_id)));
        sweep_directory(&self.merged(), merged.collect())?;
        sweep_directory(&self.recipes(), layers.map(|layer| layer.diff_id.hex()).collect())?;
        self.sweep_partials(kept_for)
    }

    fn image(&self, record: &ImageRecord) -> Result<Image, StoreError> {
        let path = self.blobs().join(record.id.hex());
        let damaged =
            |path: &Path, problem| StoreError::Damaged { image: record.id, path: path.to_owned(), problem };
        let raw_config = match read_bounded(&path, MAX_CONFIG_BYTES) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged(&path, "is missing"));
            }
            Err(error) => return Err(io_error("read", &path)(error)),
        };
        if Digest::of(&raw_config) != record.id {
            return Err(damaged(&path, "does not have its digest"));
        }
        let mut layers = Vec::new();
        for &LayerRecord { diff_id, erofs_bytes, .. } in &record.layers {
            let erofs = self.layer_path(diff_id);
            match fs::metadata(&erofs) {
                Ok(metadata) if metadata.len() == erofs_bytes => {}
                Ok(_) => return Err(damaged(&erofs, "does not have its length")),
                Err(_) => return Err(damaged(&erofs, "is missing")),
            }
            layers.push(Layer { diff_id, erofs, erofs_bytes });
        }
        let names = record.names.iter().filter_map(|name| name.parse().ok()).collect();
        Image::new(record, names, layers, raw_config)
            .map_err(|_| damaged(&path, "is not an image configuration"))
    }

    fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    fn recipes(&self) -> PathBuf {
        self.root.join("recipes/sha256")
    }

    fn merged(&self) -> PathBuf {
        self.root.join("merged/sha256")
    }

    /// Where the metadata of these layers together lie, whether they are there or not.
    pub(crate) fn merged_path(&self, layers: &[Digest]) -> PathBuf {
        self.merged().join(merged_name(layers.iter().copied()))
    }

    /// A nameless file for them. Stores of older versions have no place for it yet.
    pub(crate) fn new_merged(&self) -> Result<NewMerged, StoreError> {
        let directory = self.merged();
        fs::create_dir_all(&directory).map_err(io_error("create", &directory))?;
        Ok(NewMerged { file: self.new_file(&directory)? })
    }

    fn partials(&self) -> PathBuf {
        self.root.join("partial/sha256")
    }

    /// Whether a blob is there in its whole length.
    pub(crate) fn has_blob(&self, digest: Digest, bytes: u64) -> bool {
        fs::metadata(self.blob_path(digest)).is_ok_and(|metadata| metadata.len() == bytes)
    }

    /// Where the blob of this digest lies, whether it is there or not.
    pub(crate) fn blob_path(&self, digest: Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    /// A nameless file that is to become a blob.
    pub(crate) fn new_blob(&self) -> Result<NewBlob, StoreError> {
        Ok(NewBlob { file: self.new_file(&self.blobs())?, directory: self.blobs() })
    }

    /// Whether an image has this layer in this form.
    pub(crate) fn knows_pair(&self, diff_id: Digest, blob: Digest) -> Result<bool, StoreError> {
        let index = self.read_index()?;
        let mut layers = index.images.iter().flat_map(|image| &image.layers);
        Ok(layers
            .any(|layer| layer.diff_id == diff_id && layer.blob.is_some_and(|known| known.digest == blob)))
    }

    fn layers(&self) -> PathBuf {
        self.root.join("layers/sha256")
    }

    fn index_path(&self) -> PathBuf {
        self.root.join("index.json")
    }

    fn lock_index(&self) -> Result<Lock, StoreError> {
        let path = self.root.join("index.lock");
        Lock::exclusive(&path).map_err(io_error("lock", &path))
    }

    fn read_index(&self) -> Result<Index, StoreError> {
        let path = self.index_path();
        Index::read(&path).map_err(io_error("read", &path))
    }

    /// The length of a converted layer, if it is there. One that has lost its length is made again and replaced.
    pub(crate) fn whole_layer(&self, diff_id: Digest) -> Option<u64> {
        let bytes = fs::metadata(self.layer_path(diff_id)).ok()?.len();
        self.layer_is_whole(diff_id, bytes).then_some(bytes)
    }

    /// Whether a layer's file has the length that the images which use it have it down with.
    fn layer_is_whole(&self, diff_id: Digest, bytes: u64) -> bool {
        // An index that cannot be read fails the load later, with its own words.
        let Ok(index) = self.read_index() else { return true };
        let mut layers = index.images.iter().flat_map(|image| &image.layers);
        layers.all(|layer| layer.diff_id != diff_id || layer.erofs_bytes == bytes)
    }

    /// Only under [`Self::lock_index`].
    fn write_index(&self, index: &Index) -> Result<(), StoreError> {
        let path = self.index_path();
        index.encode().and_then(|content| files::replace(&path, &content)).map_err(io_error("replace", &path))
    }

    fn new_file(&self, directory: &Path) -> Result<NewFile, StoreError> {
        NewFile::create(directory).map_err(|error| match error.raw_os_error() {
            Some(code) if code == rustix::io::Errno::OPNOTSUPP.raw_os_error() => {
                StoreError::NoTmpfile(self.root.clone())
            }
            _ => io_error("create a file in", directory)(error),
        })
    }
}

/// A layer's archive.
pub(crate) enum Archive {
    File(fs::File),
    Rebuilt(Box<Rebuilt>),
}

impl Read for Archive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Archive::File(file) => file.read(buffer),
            Archive::Rebuilt(rebuilt) => rebuilt.read(buffer),
        }
    }
}

/// A layer that is being written.
pub(crate) struct NewLayer {
    blob: NewFile,
    layers: PathBuf,
    recipe: NewFile,
    recipes: PathBuf,
}

impl NewLayer {
    pub(crate) fn blob(&self) -> &fs::File {
        self.blob.file()
    }

    pub(crate) fn recipe(&self) -> &fs::File {
        self.recipe.file()
    }

    /// Makes the layer appear, and its recipe before it, if it has one.
    pub(crate) fn publish(self, diff_id: Digest, has_recipe: bool) -> Result<(), StoreError> {
        if has_recipe {
            let path = self.recipes.join(diff_id.hex());
            self.recipe.publish(&diff_id.hex()).map_err(io_error("write", &path))?;
        }
        let name = layer_name(diff_id);
        let path = self.layers.join(&name);
        self.blob.publish(&name).map_err(io_error("write", &path))
    }
}

/// Merged metadata that are being written.
pub(crate) struct NewMerged {
    file: NewFile,
}

impl NewMerged {
    pub(crate) fn file(&self) -> &fs::File {
        self.file.file()
    }

    /// Makes it appear.
    pub(crate) fn publish(self, path: &Path) -> Result<(), StoreError> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        self.file.publish(name).map_err(io_error("write", path))
    }
}

/// A blob that is being written.
pub(crate) struct NewBlob {
    file: NewFile,
    directory: PathBuf,
}

impl NewBlob {
    pub(crate) fn file(&self) -> &fs::File {
        self.file.file()
    }

    /// Makes the blob appear.
    pub(crate) fn publish(self, digest: Digest) -> Result<(), StoreError> {
        let path = self.directory.join(digest.hex());
        self.file.publish(&digest.hex()).map_err(io_error("write", &path))
    }
}

/// Of what these layers give together. Its start changes whenever the same layers would be merged otherwise.
pub(crate) fn merged_key(layers: impl Iterator<Item = Digest>) -> Digest {
    let mut text = "cloche merged 1\n".to_owned();
    layers.for_each(|layer| text.extend([&layer.hex(), "\n"]));
    Digest::of(text.as_bytes())
}

fn merged_name(layers: impl Iterator<Item = Digest>) -> String {
    format!("{}.erofs", merged_key(layers).hex())
}

fn layer_name(diff_id: Digest) -> String {
    format!("{}.erofs", diff_id.hex())
}

/// The image meant, and the name by which it was, unless it was by its ID.
fn find<'a>(
    index: &'a Index,
    name_or_id: &str,
) -> Result<(&'a ImageRecord, Option<Reference>), ResolveError> {
    let reference = name_or_id.parse::<Reference>();
    if let Ok(reference) = &reference
        && let Some(record) = index.images.iter().find(|image| has_name(image, reference))
    {
        let tagged = reference.digest().is_none().then(|| reference.clone());
        return Ok((record, tagged));
    }
    let prefix = name_or_id.strip_prefix("sha256:").unwrap_or(name_or_id);
    let is_hex = !prefix.is_empty() && prefix.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !is_hex {
        reference?;
        return Err(ResolveError::NotFound(name_or_id.to_owned()));
    }
    let matches: Vec<_> = index.images.iter().filter(|image| image.id.hex().starts_with(prefix)).collect();
    match matches.as_slice() {
        [] => Err(ResolveError::NotFound(name_or_id.to_owned())),
        [record] => Ok((record, None)),
        more => Err(ResolveError::Ambiguous { prefix: name_or_id.to_owned(), count: more.len() }),
    }
}

fn has_name(image: &ImageRecord, reference: &Reference) -> bool {
    match reference.digest() {
        // A digest says it all; the tag beside it is for people.
        Some(digest) => {
            let of_repository = |name: &String| {
                name.parse::<Reference>().is_ok_and(|name| name.repository() == reference.repository())
            };
            image.digests.contains(&format!("{}@{digest}", reference.repository()))
                || image.manifest == Some(digest) && image.names.iter().any(of_repository)
        }
        None => image.names.contains(&reference.to_string()),
    }
}

/// Deletes all files of a directory but those in `keep`.
fn sweep_directory(directory: &Path, keep: HashSet<String>) -> Result<(), StoreError> {
    let entries = match fs::read_dir(directory) {
        // A store of an older version.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(io_error("list", directory))?,
    };
    for entry in entries {
        let entry = entry.map_err(io_error("list", directory))?;
        if entry.file_name().to_str().is_some_and(|name| keep.contains(name)) {
            continue;
        }
        let path = entry.path();
        fs::remove_file(&path).map_err(io_error("delete", &path))?;
    }
    Ok(())
}

pub(crate) fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    fs::File::open(path)?.take(limit).read_to_end(&mut content)?;
    Ok(content)
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { action, path, source }
}
