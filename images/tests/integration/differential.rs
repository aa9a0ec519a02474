//! The same image, unpacked by `umoci` and converted by us, must be the same tree.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use libtest_mimic::Trial;

use crate::archive::{Packing, TestImage, tar_of, write_directory};
use crate::bed::{Bed, Failure, Need, Shape, real_image, run, test};
use crate::layers;
use crate::tarball::{Item, Tarball};
use crate::tree::{Tree, assert_same, walk};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::Tool("umoci"), Need::Tool("fsck.erofs")];
const REAL: &[Need] = &[
    Need::Root,
    Need::Erofs,
    Need::Tool("umoci"),
    Need::Tool("fsck.erofs"),
    Need::Tool("skopeo"),
    Need::RealImages,
];

pub fn tests() -> Vec<Trial> {
    vec![
        test("busybox_image_is_as_umoci_unpacks_it", REAL, |bed| compare_real(bed, "busybox")),
        test("debian_image_is_as_umoci_unpacks_it", REAL, |bed| compare_real(bed, "debian")),
        test("attributes_are_as_umoci_unpacks_them", NEEDS, |bed| {
            compare(bed, &TestImage::of([layers::attributes()]))
        }),
        test("names_and_links_are_as_umoci_unpacks_them", NEEDS, |bed| {
            compare(bed, &TestImage::of([layers::names()]).packed(Packing::Plain))
        }),
        test("directories_of_all_sizes_are_as_umoci_unpacks_them", NEEDS, |bed| {
            compare(bed, &TestImage::of([layers::directories()]))
        }),
        test("contents_of_all_sizes_are_as_umoci_unpacks_them", NEEDS, |bed| {
            compare(bed, &TestImage::of([layers::contents()]))
        }),
        test("sparse_files_are_as_umoci_unpacks_them", NEEDS, |bed| {
            compare(bed, &TestImage::of([layers::sparse(&layers::SPARSE_FORMATS[1..])]))
        }),
        test("duplicate_entries_are_as_umoci_unpacks_them", NEEDS, |bed| {
            compare(bed, &TestImage::of([layers::duplicates()]))
        }),
        test("entries_through_links_are_as_umoci_unpacks_them", NEEDS, |bed| {
            compare(bed, &TestImage::of([layers::through_links()]))
        }),
        test("merged_layers_are_as_umoci_unpacks_them", NEEDS, |bed| {
            compare(bed, &TestImage::of(layers::stacked()))
        }),
        test("links_between_layers_are_as_umoci_unpacks_them", NEEDS, |bed| {
            compare(bed, &TestImage::of(layers::linked()))
        }),
        test("marks_of_made_directories_are_gone_after_merging", NEEDS, hidden_marks),
    ]
}

/// Our own mark on directories without an entry is not to be seen.
fn hidden_marks(bed: &Bed) -> Result<(), Failure> {
    let layers = ["one", "two"].map(|name| Tarball::of([Item::file(format!("made/{name}"), "x")]));
    let archive = bed.write("image.tar", &tar_of(&TestImage::of(layers).oci_files()?))?;
    let image = bed.load(&archive)?;
    let mounted = bed.mount_image(&image, "marks", Shape::Devices)?;
    for directory in [mounted.target.clone(), mounted.target.join("made")] {
        let length = rustix::fs::listxattr(&directory, &mut [0u8; 0])?;
        if length > 0 || std::fs::metadata(&directory)?.permissions().mode() & 0o7777 != 0o755 {
            return Err(format!("{} is not as made", directory.display()).into());
        }
    }
    if std::fs::read_dir(mounted.target.join("made"))?.count() != 2 {
        return Err("the layers were not merged".into());
    }
    Ok(())
}

fn compare(bed: &Bed, image: &TestImage) -> Result<(), Failure> {
    let layout = bed.path("layout");
    write_directory(&layout, &TestImage { name: Some("test".to_owned()), ..image.clone() }.oci_files()?)?;
    compare_layout(bed, &layout, "test")
}

fn compare_layout(bed: &Bed, layout: &Path, tag: &str) -> Result<(), Failure> {
    let image = bed.load(layout)?;
    for layer in &image.layers {
        run("fsck.erofs", &[&layer.erofs.display().to_string()])?;
    }
    let theirs = theirs(bed, layout, tag)?;
    for shape in [Shape::Devices, Shape::OneDisk] {
        let mounted = bed.mount_image(&image, &format!("ours-{shape:?}"), shape)?;
        assert_same(&format!("ours ({shape:?}) against umoci's"), &walk(&mounted.target)?, &theirs)?;
    }
    Ok(())
}

fn theirs(bed: &Bed, layout: &Path, tag: &str) -> Result<Tree, Failure> {
    let bundle = bed.path("bundle");
    let image = format!("{}:{tag}", layout.display());
    run("umoci", &["unpack", "--image", &image, &bundle.display().to_string()])?;
    walk(&bundle.join("rootfs"))
}

/// A docker-archive, and the OCI layout that skopeo makes of it: the same layers, and what umoci says.
fn compare_real(bed: &Bed, name: &str) -> Result<(), Failure> {
    let archive = real_image(name).ok_or("no such image")?;
    let direct = bed.load(&archive)?;
    // Which name of the archive is taken makes no difference.
    let first = direct.names.first().ok_or("the image has no name")?;
    let from = format!("docker-archive:{}:{}", archive.display(), first.short());
    let layout = bed.path("layout");
    let to = format!("oci:{}:test", layout.display());
    run("skopeo", &["copy", "--quiet", &from, &to])?;
    compare_layout(bed, &layout, "test")?;
    // Packed otherwise, by another tool, into another store: the same bytes.
    let other = cloche_images::Store::open(&bed.path("other-store"))?;
    let loaded = other.load(&layout, &Default::default(), &cloche_images::NoProgress)?;
    let repacked = other.resolve(&loaded.first().ok_or("nothing loaded")?.id.to_string())?;
    for (one, two) in direct.layers.iter().zip(&repacked.layers) {
        if std::fs::read(&one.erofs)? != std::fs::read(&two.erofs)? {
            return Err(format!("{} was converted to different bytes", one.diff_id).into());
        }
    }
    Ok(())
}
