//! An image unpacked as a tree must be what the kernel shows of its file system, but for what a plain user cannot make.

use std::fs;

use cloche_images::{LeftOut, Owners, unpack};
use libtest_mimic::Trial;

use crate::archive::{Packing, TestImage, tar_of};
use crate::bed::{Bed, Failure, Need, test};
use crate::layers;
use crate::tarball::{Item, Tarball};
use crate::tree::{Facts, Kind, Tree, assert_same, walk};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs];

pub fn tests() -> Vec<Trial> {
    vec![
        test("unpacked_layers_are_as_mounted", NEEDS, as_mounted),
        test("unpacked_image_is_what_its_layers_are_merged_to", &[Need::Root], merged),
    ]
}

/// What of a mounted layer a plain user's tree has.
fn without_what_needs_root(mut tree: Tree) -> (Tree, LeftOut) {
    let mut left_out = LeftOut::default();
    for facts in tree.values_mut() {
        // Marks are for the merge.
        facts.xattrs.retain(|name, _| !name.starts_with("trusted.overlay."));
        let before = facts.xattrs.len();
        facts.xattrs.retain(|name, _| !name.starts_with("trusted."));
        left_out.xattrs += (before - facts.xattrs.len()) as u64;
    }
    let is_device = |facts: &Facts| matches!(facts.kind, Kind::CharDevice(_) | Kind::BlockDevice(_));
    let names_of = |facts: &&Facts| is_device(facts) && facts.kind != Kind::CharDevice(0);
    left_out.devices = tree.values().filter(names_of).count() as u64;
    tree.retain(|_, facts| !is_device(facts));
    (tree, left_out)
}

fn as_mounted(bed: &Bed) -> Result<(), Failure> {
    let made = [layers::attributes(), layers::names(), layers::directories(), layers::contents()];
    let sparse = layers::sparse(&layers::SPARSE_FORMATS[1..]);
    for (number, layer) in made.into_iter().chain([sparse]).enumerate() {
        let test_image = TestImage::of([layer]).packed(Packing::Plain);
        let archive = bed.write("image.tar", &tar_of(&test_image.oci_files()?))?;
        let image = bed.load(&archive)?;
        let mounted = bed.mount_erofs(&image.layers[0].erofs, &format!("mounted{number}"))?;
        let (expected, left_out) = without_what_needs_root(walk(&mounted.target)?);
        let tree = bed.path(&format!("tree{number}"));
        fs::create_dir(&tree)?;
        if unpack(&bed.store.root_fs(&image)?, &tree, Owners::Kept)? != left_out {
            return Err(format!("layer {number}: not counted as left out: {left_out:?}").into());
        }
        assert_same(&format!("layer {number} unpacked"), &walk(&tree)?, &expected)?;
    }
    Ok(())
}

fn merged(bed: &Bed) -> Result<(), Failure> {
    let lower = Tarball::of([
        Item::directory("./tmp").mode(0o1777),
        Item::file("./gone", ""),
        Item::file("./file", "of the lower layer").mode(0o640),
        Item::symlink("./lib", "usr/lib"),
        Item::directory("./usr/lib"),
    ]);
    let upper = Tarball::of([
        Item::file("./.wh.gone", ""),
        Item::file("./tmp/file", "x").owner(1000, 1000),
        Item::hard_link("./name", "./file"),
        Item::file("./lib/new", "below a link"),
        Item::block_device("./disk", 8, 0),
    ]);
    let archive = bed.write("image.tar", &tar_of(&TestImage::of([lower, upper]).oci_files()?))?;
    let image = bed.load(&archive)?;
    let tree = bed.path("tree");
    fs::create_dir(&tree)?;
    let left_out = unpack(&bed.store.root_fs(&image)?, &tree, Owners::Own)?;
    if left_out != (LeftOut { devices: 1, xattrs: 0 }) {
        return Err(format!("left out: {left_out:?}").into());
    }
    let found = walk(&tree)?;
    let names: Vec<_> = found.keys().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    for gone in ["gone", "disk"] {
        if found.contains_key(gone.as_bytes()) {
            return Err(format!("{gone} is there").into());
        }
    }
    for (name, content) in [("name", "of the lower layer"), ("usr/lib/new", "below a link")] {
        if fs::read(tree.join(name)).map_err(|error| format!("{name}: {error}; {names:?}"))?
            != content.as_bytes()
        {
            return Err(format!("{name} has another content").into());
        }
    }
    let facts = |name: &str| &found[name.as_bytes()];
    if (facts("name").mode & 0o7777, facts("tmp").mode & 0o7777) != (0o640, 0o1777) {
        return Err(format!("modes: {:o} {:o}", facts("name").mode, facts("tmp").mode).into());
    }
    if (facts("tmp/file").uid, facts("tmp/file").gid) != (0, 0) {
        return Err("a file has an owner that this user could not give it".into());
    }
    Ok(())
}
