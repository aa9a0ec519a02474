//! A layer unpacked as a tree must be what the kernel shows of its file system, but for what a plain user cannot make.

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
        test("unpacked_layer_hides_and_marks_as_overlayfs_reads_it", NEEDS, overlay_marks),
    ]
}

/// What of a mounted layer a plain user's tree has.
fn without_what_needs_root(mut tree: Tree) -> (Tree, LeftOut) {
    let mut left_out = LeftOut::default();
    for facts in tree.values_mut() {
        let before = facts.xattrs.len();
        facts.xattrs.retain(|name, _| !name.starts_with("trusted."));
        left_out.xattrs += (before - facts.xattrs.len()) as u64;
        if matches!(facts.kind, Kind::CharDevice(_) | Kind::BlockDevice(_)) {
            left_out.devices += u64::from(facts.kind != Kind::CharDevice(0));
            let (names, links) = (Default::default(), 1);
            *facts = Facts { kind: Kind::CharDevice(0), mode: 0, names, links, ..facts.clone() };
        }
    }
    (tree, left_out)
}

/// Times and owners of whiteouts mean nothing.
fn of_whiteouts_nothing(mut tree: Tree) -> Tree {
    for facts in tree.values_mut().filter(|facts| facts.kind == Kind::CharDevice(0)) {
        (facts.uid, facts.gid, facts.mtime) = (0, 0, (0, 0));
    }
    tree
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
        if unpack(&image.layers[0].erofs, &tree, Owners::Kept)? != left_out {
            return Err(format!("layer {number}: not counted as left out: {left_out:?}").into());
        }
        let (unpacked, expected) = (of_whiteouts_nothing(walk(&tree)?), of_whiteouts_nothing(expected));
        assert_same(&format!("layer {number} unpacked"), &unpacked, &expected)?;
    }
    Ok(())
}

fn overlay_marks(bed: &Bed) -> Result<(), Failure> {
    let layer = Tarball::of([
        Item::file("./.wh.gone", ""),
        Item::directory("./opaque"),
        Item::file("./opaque/.wh..wh..opq", ""),
        Item::file("./implied/file", "x").owner(1000, 1000),
        Item::block_device("./disk", 8, 0),
    ]);
    let archive = bed.write("image.tar", &tar_of(&TestImage::of([layer]).oci_files()?))?;
    let image = bed.load(&archive)?;
    let tree = bed.path("tree");
    fs::create_dir(&tree)?;
    unpack(&image.layers[0].erofs, &tree, Owners::Own)?;
    let found = walk(&tree)?;
    let kind = |name: &str| found.get(name.as_bytes()).map(|facts| facts.kind.clone());
    for whiteout in ["gone", "disk"] {
        if kind(whiteout) != Some(Kind::CharDevice(0)) {
            return Err(format!("{whiteout} is {:?}", kind(whiteout)).into());
        }
    }
    let marked: Vec<_> = found.iter().filter(|(_, facts)| !facts.xattrs.is_empty()).collect();
    match marked.as_slice() {
        [(name, facts)] if *name == b"opaque" && facts.xattrs["user.overlay.opaque"] == b"y" => {}
        other => return Err(format!("marks: {other:?}").into()),
    }
    let owner = &found[b"implied/file".as_slice()];
    if (owner.uid, owner.gid) != (0, 0) {
        return Err("a file has an owner that this user could not give it".into());
    }
    Ok(())
}
