//! Property tests: random archives against a model that is too simple to be wrong, and damaged ones against nothing
//! but the demand that they do no harm.

use std::collections::{BTreeMap, BTreeSet};

use libtest_mimic::Trial;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};

use crate::archive::{Packing, TestImage, tar_of};
use crate::bed::{Bed, Failure, chain, test};
use crate::erofs::{self, Content, File};
use crate::layers::noise;
use crate::tarball::{Item, Tarball};

pub fn tests() -> Vec<Trial> {
    vec![
        test("random_layers_are_as_the_model_has_them", &[], random_layers),
        test("random_layers_merge_as_the_model_has_them", &[], random_merges),
        test("damaged_layers_are_refused_or_loaded_whole", &[], damaged_layers),
        test("damaged_archives_are_refused_or_loaded_whole", &[], damaged_archives),
    ]
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

fn report<T: std::fmt::Debug>(result: Result<(), TestError<T>>) -> Result<(), Failure> {
    result.map_err(|error| error.to_string().into())
}

fn random_layers(bed: &Bed) -> Result<(), Failure> {
    let items = prop::collection::vec(item(), 0..24);
    report(runner(400).run(&items, |items| {
        let image = TestImage::of([Tarball::of(items.clone())]).packed(Packing::Plain);
        let outcome = load(bed, &image).map_err(|error| TestCaseError::fail(error.to_string()))?;
        match (Model::of(&items), outcome) {
            (Some(model), Ok(files)) => prop_assert_eq!(files, model),
            (None, Err(_)) => {}
            (Some(_), Err(error)) => return Err(TestCaseError::fail(error)),
            (None, Ok(_)) => return Err(TestCaseError::fail("loaded what the model refuses")),
        }
        Ok(())
    }))
}

/// Several layers, against the rules of merging applied to paths.
fn random_merges(bed: &Bed) -> Result<(), Failure> {
    let layers = prop::collection::vec(prop::collection::vec(item(), 0..10), 2..5);
    let accepted = std::cell::Cell::new(0);
    report(runner(120).run(&layers, |layers| {
        let image = TestImage::of(layers.into_iter().map(Tarball::of)).packed(Packing::Plain);
        let failed = |error: Failure| TestCaseError::fail(error.to_string());
        // What is refused, and why, the tests of single layers look at.
        if let Ok((merged, layers)) = merged(bed, &image).map_err(failed)? {
            accepted.set(accepted.get() + 1);
            prop_assert_eq!(Some(merged), overlaid(layers));
        }
        Ok(())
    }))?;
    if accepted.get() < 5 {
        Err(format!("only {} images were compared", accepted.get()).into())
    } else {
        Ok(())
    }
}

/// Loads an image; gives its merged tree, and each layer's.
#[allow(clippy::type_complexity)]
fn merged(
    bed: &Bed,
    image: &TestImage,
) -> Result<Result<(BTreeMap<Vec<u8>, File>, Vec<BTreeMap<Vec<u8>, File>>), String>, Failure> {
    let archive = bed.write("image.tar", &tar_of(&image.docker_files()?))?;
    let loaded = match bed.try_load(&archive) {
        Ok(loaded) => loaded,
        Err(error) => return Ok(Err(chain(&error))),
    };
    let id = loaded.first().ok_or("nothing was loaded")?.id;
    let image = bed.store.resolve(&id.to_string())?;
    let files = bed.store.root_fs(&image)?;
    let mut disk = Vec::new();
    for part in std::iter::once(&files.metadata).chain(&files.layers) {
        disk.extend(std::fs::read(part)?);
    }
    let layers = image.layers.iter().map(|layer| erofs::read(&std::fs::read(&layer.erofs)?));
    let layers = layers.collect::<Result<_, Failure>>()?;
    let merged = counted(erofs::read(&disk)?);
    bed.store.remove(&id.to_string())?;
    Ok(Ok((merged, layers)))
}

/// Inode numbers only tell which names are one file: counted in order of the paths.
fn counted(mut files: BTreeMap<Vec<u8>, File>) -> BTreeMap<Vec<u8>, File> {
    let mut seen = BTreeMap::new();
    for file in files.values_mut() {
        let next = seen.len() as u64;
        file.inode = *seen.entry(file.inode).or_insert(next);
    }
    files
}

/// Layers upon each other, path by path. `None` if a link leads nowhere.
fn overlaid(layers: Vec<BTreeMap<Vec<u8>, File>>) -> Option<BTreeMap<Vec<u8>, File>> {
    const MARK: &[u8] = b"trusted.overlay.";
    let root = File { links: 2, ..implied() };
    let mut tree = BTreeMap::from([(Vec::new(), root)]);
    for (number, layer) in layers.into_iter().enumerate() {
        let lower = tree.clone();
        for (path, mut file) in layer {
            let mark = |name: &str| file.xattrs.get([MARK, name.as_bytes()].concat().as_slice()).cloned();
            let (opaque, implied) = (mark("opaque").is_some(), mark("cloche.implied").is_some());
            let link = mark("cloche.link");
            file.xattrs.retain(|name, _| !name.starts_with(MARK));
            // Inodes of different layers are different.
            file.inode += (number as u64 + 1) << 32;
            let below = if path.is_empty() { Vec::new() } else { [path.as_slice(), b"/"].concat() };
            let was_directory = tree.get(&path).is_some_and(|file| file.content == Content::Directory);
            if file.content != Content::Directory || opaque || !was_directory {
                tree.retain(|name, _| name.is_empty() || *name == path || !name.starts_with(&below));
            }
            match file.content {
                Content::Device(0) if file.mode & 0o170_000 == 0o020_000 => _ = tree.remove(&path),
                Content::Directory if was_directory && implied => {}
                Content::Directory if was_directory => {
                    file.inode = tree.get(&path)?.inode;
                    tree.insert(path, file);
                }
                _ => {
                    let file = match link {
                        Some(target) => {
                            lower.get(&target).filter(|file| file.content != Content::Directory)?.clone()
                        }
                        None => file,
                    };
                    tree.insert(path, file);
                }
            }
        }
    }
    let names = tree.clone();
    for (path, file) in &mut tree {
        let is_child = |name: &[u8]| {
            let parent = name.iter().rposition(|&byte| byte == b'/').map_or(&b""[..], |at| &name[..at]);
            !name.is_empty() && parent == path.as_slice()
        };
        file.links = match file.content {
            Content::Directory => {
                let children = names.iter().filter(|(name, _)| is_child(name));
                2 + children.filter(|(_, child)| child.content == Content::Directory).count() as u32
            }
            _ => names.values().filter(|other| other.inode == file.inode).count() as u32,
        };
    }
    Some(counted(tree))
}

/// Few and short names, so that they meet.
fn name() -> impl Strategy<Value = String> {
    let component = prop_oneof![Just("a"), Just("b"), Just("c"), Just("."), Just("!")];
    prop::collection::vec(component, 1..4).prop_map(|components| components.join("/"))
}

fn item() -> impl Strategy<Value = Item> {
    let size = prop_oneof![0usize..10, 4000usize..5000, 60_000usize..200_000];
    let plain = prop_oneof![
        4 => (name(), size, any::<u64>(), any::<bool>()).prop_map(|(name, size, seed, zeros)| {
            let mut data = noise(size, seed);
            if zeros {
                data[..size * 4 / 5].fill(0);
            }
            Item::file(name, data)
        }),
        4 => name().prop_map(Item::directory),
        // Names of links are never parents: they are tested against umoci.
        1 => (name(), 1usize..4100).prop_map(|(name, length)| {
            Item::symlink(format!("{name}/link"), "t".repeat(length.min(4095)))
        }),
        2 => (name(), name()).prop_map(|(name, target)| Item::hard_link(name, target)),
        1 => (name(), 0u64..4096, 0u64..(1 << 20)).prop_map(|(name, major, minor)| {
            Item::char_device(name, major, minor)
        }),
        1 => name().prop_map(Item::fifo),
        1 => (name(), name()).prop_map(|(parent, _)| Item::file(format!("{parent}/.wh.b"), "")),
        1 => name().prop_map(|parent| Item::file(format!("{parent}/.wh..wh..opq"), "")),
    ];
    let owner = prop_oneof![Just(0u64), Just(1000), Just(70_000), Just(4_294_967_294)];
    let time =
        prop_oneof![Just((0i64, 0u32)), Just((1_700_000_000, 0)), (-5000i64..5000, 0u32..1_000_000_000)];
    let xattrs = prop::collection::vec((0u8..3, 0usize..3000), 0..3);
    (plain, owner, 0u32..0o10000, time, xattrs).prop_map(|(item, uid, mode, time, xattrs)| {
        let item = item.owner(uid, uid / 2).mode(mode).time(time.0, time.1);
        xattrs.into_iter().fold(item, |item, (number, length)| {
            item.xattr(&format!("trusted.x{number}"), noise(length, u64::from(number)))
        })
    })
}

/// Loads an image of one layer and reads the blob back; the inner error is the loader's.
fn load(bed: &Bed, image: &TestImage) -> Result<Result<BTreeMap<Vec<u8>, File>, String>, Failure> {
    let archive = bed.write("image.tar", &tar_of(&image.docker_files()?))?;
    let loaded = match bed.try_load(&archive) {
        Ok(loaded) => loaded,
        Err(error) => return Ok(Err(chain(&error))),
    };
    let id = loaded.first().ok_or("nothing was loaded")?.id;
    let image = bed.store.resolve(&id.to_string())?;
    let blob = std::fs::read(&image.layers.first().ok_or("no layer")?.erofs)?;
    let files = counted(erofs::read(&blob)?);
    bed.store.remove(&id.to_string())?;
    Ok(Ok(files))
}

/// The tree that a list of entries means, by the rules and nothing else.
struct Model {
    inodes: Vec<File>,
    names: BTreeMap<Vec<u8>, usize>,
    implied: BTreeSet<usize>,
    opaque: BTreeSet<usize>,
    whiteouts: Vec<(usize, Vec<u8>)>,
    /// What stands for files of lower layers, of which there are none.
    missing: BTreeSet<usize>,
}

impl Model {
    /// `None` if some entry must be refused.
    fn of(items: &[Item]) -> Option<BTreeMap<Vec<u8>, File>> {
        let mut model = Model {
            inodes: vec![implied()],
            names: BTreeMap::from([(Vec::new(), 0)]),
            implied: BTreeSet::from([0]),
            opaque: BTreeSet::new(),
            whiteouts: Vec::new(),
            missing: BTreeSet::new(),
        };
        for item in items {
            model.apply(item)?;
        }
        model.finish()
    }

    fn apply(&mut self, item: &Item) -> Option<()> {
        let components: Vec<&[u8]> =
            item.name.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
        let path = components.join(&b'/');
        let (parent, last) = match components.split_last() {
            Some((last, parents)) => (parents.join(&b'/'), last.to_vec()),
            None => (Vec::new(), Vec::new()),
        };
        if last == b".wh..wh..opq" {
            let directory = self.directory(&parent)?;
            self.opaque.insert(directory);
            return Some(());
        }
        if let Some(hidden) = last.strip_prefix(b".wh.") {
            let directory = self.directory(&parent)?;
            self.whiteouts.push((directory, hidden.to_vec()));
            return Some(());
        }
        if item.kind == b'1' {
            let target: Vec<&[u8]> = item
                .target
                .split(|&byte| byte == b'/')
                .filter(|part| !part.is_empty() && *part != b".")
                .collect();
            for parents in 1..target.len() {
                let parent = self.names.get(&target[..parents].join(&b'/'));
                if parent.is_some_and(|parent| self.inodes[*parent].content != Content::Directory) {
                    return None;
                }
            }
            let node = match self.names.get(&target.join(&b'/')) {
                Some(node) => *node,
                None => {
                    self.missing.insert(self.inodes.len());
                    self.inodes.push(File { content: Content::Nothing, ..implied() });
                    self.inodes.len() - 1
                }
            };
            if self.inodes[node].content == Content::Directory || path.is_empty() {
                return None;
            }
            self.directory(&parent)?;
            self.replace(path, node);
            return Some(());
        }
        if path.is_empty() && item.kind != b'5' {
            return None;
        }
        if !path.is_empty() {
            self.directory(&parent)?;
        }
        if let Some(&existing) = self.names.get(&path)
            && item.kind == b'5'
            && self.inodes[existing].content == Content::Directory
        {
            self.inodes[existing] = file(item);
            self.implied.remove(&existing);
            return Some(());
        }
        self.inodes.push(file(item));
        self.replace(path, self.inodes.len() - 1);
        Some(())
    }

    /// The directory at a path, with all that is missing on the way.
    fn directory(&mut self, path: &[u8]) -> Option<usize> {
        let mut current = Vec::new();
        let mut inode = 0;
        for component in path.split(|&byte| byte == b'/').filter(|component| !component.is_empty()) {
            current = if current.is_empty() { component.to_vec() } else { [&current, component].join(&b'/') };
            inode = match self.names.get(&current) {
                Some(&inode) if self.inodes[inode].content == Content::Directory => inode,
                Some(_) => return None,
                None => {
                    self.inodes.push(implied());
                    let inode = self.inodes.len() - 1;
                    self.implied.insert(inode);
                    self.names.insert(current.clone(), inode);
                    inode
                }
            };
        }
        Some(inode)
    }

    fn replace(&mut self, path: Vec<u8>, inode: usize) {
        let below = [path.as_slice(), b"/"].concat();
        self.names.retain(|name, _| !name.starts_with(&below));
        self.names.insert(path, inode);
    }

    fn finish(mut self) -> Option<BTreeMap<Vec<u8>, File>> {
        if self.names.values().any(|inode| self.missing.contains(inode)) {
            return None;
        }
        if !self.missing.is_empty() {
            let mark = b"trusted.overlay.cloche.has-links".to_vec();
            self.inodes[0].xattrs.insert(mark, b"y".to_vec());
        }
        let whiteouts = std::mem::take(&mut self.whiteouts);
        let mut hidden = Vec::new();
        for (directory, name) in whiteouts {
            // A directory that lost its name takes its whiteouts along.
            let Some((path, _)) = self.names.iter().find(|(_, inode)| **inode == directory) else { continue };
            let path = if path.is_empty() { name } else { [path.as_slice(), &name].join(&b'/') };
            match self.names.get(&path) {
                Some(&inode) if self.inodes[inode].content == Content::Directory => {
                    self.opaque.insert(inode);
                }
                Some(_) => {}
                None => hidden.push((directory, path)),
            }
        }
        let whiteout = self.inodes.len();
        self.inodes.push(File { mode: 0o020_000, content: Content::Device(0), ..implied() });
        for (directory, path) in hidden {
            if !self.opaque.contains(&directory) {
                self.names.insert(path, whiteout);
            }
        }
        for (inodes, name) in
            [(&self.opaque, "trusted.overlay.opaque"), (&self.implied, "trusted.overlay.cloche.implied")]
        {
            for &inode in inodes {
                self.inodes[inode].xattrs.insert(name.into(), b"y".to_vec());
            }
        }
        let mut seen = BTreeMap::new();
        let files = self.names.iter().map(|(path, &inode)| {
            let mut file = self.inodes[inode].clone();
            file.links = self.links(path, inode);
            let next = seen.len() as u64;
            file.inode = *seen.entry(inode).or_insert(next);
            (path.clone(), file)
        });
        Some(files.collect())
    }

    fn links(&self, path: &[u8], inode: usize) -> u32 {
        if self.inodes[inode].content != Content::Directory {
            return self.names.values().filter(|other| **other == inode).count() as u32;
        }
        let is_child = |name: &[u8]| {
            let rest = if path.is_empty() {
                Some(name)
            } else {
                name.strip_prefix(path).and_then(|rest| rest.strip_prefix(b"/"))
            };
            rest.is_some_and(|rest| !rest.is_empty() && !rest.contains(&b'/'))
        };
        let is_directory = |inode: usize| self.inodes[inode].content == Content::Directory;
        2 + self.names.iter().filter(|(name, child)| is_child(name) && is_directory(**child)).count() as u32
    }
}

fn implied() -> File {
    File {
        mode: 0o040_755,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        links: 0,
        xattrs: BTreeMap::new(),
        inode: 0,
        content: Content::Directory,
    }
}

fn file(item: &Item) -> File {
    let (kind, content) = match item.kind {
        b'0' => (0o100_000, Content::Bytes(item.data.clone())),
        b'2' => (0o120_000, Content::Bytes(item.target.clone())),
        b'3' => {
            let (major, minor) = (item.device.0 as u32, item.device.1 as u32);
            (0o020_000, Content::Device((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)))
        }
        b'5' => (0o040_000, Content::Directory),
        _ => (0o010_000, Content::Nothing),
    };
    File {
        mode: kind | item.mode as u16,
        uid: item.uid as u32,
        gid: item.gid as u32,
        mtime: (item.seconds, item.nanoseconds),
        xattrs: item.xattrs.iter().cloned().collect(),
        content,
        ..implied()
    }
}

/// How a valid archive is damaged.
#[derive(Debug, Clone)]
enum Damage {
    Cut(prop::sample::Index),
    Flip(prop::sample::Index, u8),
    Fill(prop::sample::Index, u8, usize),
    Repeat(prop::sample::Index, prop::sample::Index),
    /// Changes a byte of a header, whose checksum is then made right again.
    Header(prop::sample::Index, usize, u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    use prop::sample::Index;
    prop_oneof![
        1 => any::<Index>().prop_map(Damage::Cut),
        1 => (any::<Index>(), 1u8..).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        1 => (any::<Index>(), any::<u8>(), 1usize..2000).prop_map(|(at, byte, length)| Damage::Fill(at, byte, length)),
        1 => (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Damage::Repeat(from, to)),
        4 => (any::<Index>(), 0usize..512, any::<u8>()).prop_map(|(block, at, byte)| Damage::Header(block, at, byte)),
    ]
}

fn apply_damage(bytes: &mut Vec<u8>, damage: &Damage) {
    let length = bytes.len();
    match damage {
        Damage::Cut(at) => bytes.truncate(at.index(length)),
        Damage::Flip(at, bits) => bytes[at.index(length)] ^= bits,
        Damage::Fill(at, byte, count) => {
            let start = at.index(length);
            let end = (start + count).min(length);
            bytes[start..end].fill(*byte);
        }
        Damage::Repeat(from, to) => {
            let (from, to) = (from.index(length / 512) * 512, to.index(length / 512) * 512);
            let block = bytes[from..from + 512].to_vec();
            bytes[to..to + 512].copy_from_slice(&block);
        }
        Damage::Header(block, at, byte) => {
            let start = block.index(length / 512) * 512;
            if let Some(block) = bytes[start..].first_chunk_mut::<512>() {
                block[*at] = *byte;
                crate::tarball::set_checksum(block);
            }
        }
    }
}

/// Whatever the bytes, a load ends, and the store holds either the whole image or nothing.
fn damaged_layers(bed: &Bed) -> Result<(), Failure> {
    let layer = [
        crate::layers::attributes(),
        crate::layers::names(),
        crate::layers::sparse(&crate::layers::SPARSE_FORMATS),
    ];
    let layer: Vec<u8> = layer
        .into_iter()
        .flat_map(Tarball::unfinished)
        .filter({
            // The sparse files' data are of no interest here, and large.
            let mut left = 400_000;
            move |_| {
                left -= 1;
                left > 0
            }
        })
        .collect();
    let damages = prop::collection::vec(damage(), 1..4);
    report(runner(300).run(&damages, |damages| {
        let mut layer = layer.clone();
        for damage in &damages {
            if layer.len() >= 1024 {
                apply_damage(&mut layer, damage);
            }
        }
        let mut image = TestImage::of([]).packed(Packing::Plain);
        image.layers.push(layer);
        load(bed, &image).map(drop).map_err(|error| TestCaseError::fail(error.to_string()))?;
        assert_empty(bed)
    }))
}

fn damaged_archives(bed: &Bed) -> Result<(), Failure> {
    let image = TestImage::of([Tarball::of([Item::file("a", "x"), Item::directory("b")])]);
    let oci = tar_of(&image.clone().packed(Packing::Zstd).oci_files()?);
    let docker = tar_of(&image.docker_files()?);
    let damages = (any::<bool>(), prop::collection::vec(damage(), 1..4));
    report(runner(300).run(&damages, |(which, damages)| {
        let mut archive = if which { oci.clone() } else { docker.clone() };
        for damage in &damages {
            if archive.len() >= 1024 {
                apply_damage(&mut archive, damage);
            }
        }
        let path =
            bed.write("image.tar", &archive).map_err(|error| TestCaseError::fail(error.to_string()))?;
        for image in bed.try_load(&path).unwrap_or_default() {
            let removed = bed.store.remove(&image.id.to_string());
            removed.map_err(|error| TestCaseError::fail(error.to_string()))?;
        }
        assert_empty(bed)
    }))
}

fn assert_empty(bed: &Bed) -> Result<(), TestCaseError> {
    for directory in ["blobs/sha256", "layers/sha256"] {
        let entries = std::fs::read_dir(bed.store.root().join(directory));
        let count = entries.map_err(|error| TestCaseError::fail(error.to_string()))?.count();
        prop_assert_eq!(count, 0, "files are left in {}", directory);
    }
    Ok(())
}
