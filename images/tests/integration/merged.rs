//! The file of an image's merged layers: made when it is needed, kept, looked after, and removed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use cloche_images::Damage;
use libtest_mimic::Trial;

use crate::archive::{TestImage, tar_of};
use crate::bed::{Bed, Failure, Need, Shape, test};
use crate::layers;
use crate::tarball::{Item, Tarball};
use crate::tree::walk;

pub fn tests() -> Vec<Trial> {
    vec![
        test("merged_layers_are_made_once_and_again_when_they_are_missing_or_damaged", &[], made_again),
        test("merged_layers_go_with_their_image_and_count_as_space", &[], gone_with_the_image),
        test("verify_tells_of_a_changed_byte_in_merged_layers", &[], verified),
        test("layers_that_do_not_go_together_are_refused_by_load", &[], refused),
        test("image_of_127_layers_is_one_file_system", &[Need::Root, Need::Erofs], many),
    ]
}

fn load(bed: &Bed, layers: impl IntoIterator<Item = Tarball>) -> Result<cloche_images::Image, Failure> {
    bed.load(&bed.write("image.tar", &tar_of(&TestImage::of(layers).docker_files()?))?)
}

fn merged_files(bed: &Bed) -> Result<BTreeSet<PathBuf>, Failure> {
    let entries = fs::read_dir(bed.store.root().join("merged/sha256"))?;
    Ok(entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?)
}

fn made_again(bed: &Bed) -> Result<(), Failure> {
    use std::os::unix::fs::MetadataExt;
    let image = load(bed, layers::stacked())?;
    let first = bed.store.root_fs(&image)?;
    let content = fs::read(&first.metadata)?;
    let number = |path: &Path| fs::metadata(path).map(|metadata| metadata.ino());
    let before = number(&first.metadata)?;
    if bed.store.root_fs(&image)? != first || number(&first.metadata)? != before {
        return Err("it was made twice".into());
    }
    // As in a store from before there were any.
    fs::remove_dir_all(bed.store.root().join("merged"))?;
    bed.store.images()?;
    bed.store.usage()?;
    bed.store.prune(false, |_| true)?;
    if bed.store.root_fs(&image)? != first || fs::read(&first.metadata)? != content {
        return Err("made again, it is something else".into());
    }
    // Torn, and of the right length but nonsense.
    for damaged in [content[..4096].to_vec(), vec![7; content.len()]] {
        fs::remove_file(&first.metadata)?;
        fs::write(&first.metadata, damaged)?;
        if bed.store.root_fs(&image)? != first || fs::read(&first.metadata)? != content {
            return Err("a damaged one was kept".into());
        }
    }
    Ok(())
}

fn gone_with_the_image(bed: &Bed) -> Result<(), Failure> {
    let image = load(bed, layers::stacked())?;
    let used = bed.store.usage()?.layers;
    let file = merged_files(bed)?.pop_first().ok_or("nothing was merged")?;
    let space = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&file)?) * 512;
    let layers: u64 = image.layers.iter().map(|layer| layer.erofs_bytes).sum();
    if space == 0 || used < space || used > layers + space + 4096 * 8 {
        return Err(format!("{used} bytes are used, {space} of them by what is merged").into());
    }
    bed.store.remove(&image.id.to_string())?;
    if !merged_files(bed)?.is_empty() {
        return Err("it outlived its image".into());
    }
    Ok(())
}

fn verified(bed: &Bed) -> Result<(), Failure> {
    use std::os::unix::fs::{FileExt, PermissionsExt};
    let image = load(bed, layers::stacked())?;
    let id = image.id.to_string();
    if let Some(damage) = bed.store.verify(&id)?.first() {
        return Err(format!("{damage}").into());
    }
    let files = bed.store.root_fs(&image)?;
    fs::set_permissions(&files.metadata, fs::Permissions::from_mode(0o600))?;
    let file = fs::File::options().read(true).write(true).open(&files.metadata)?;
    let at = file.metadata()?.len() - 5;
    file.write_all_at(b"!", at)?;
    match bed.store.verify(&id)?.as_slice() {
        [Damage::Merged { path, at: told }] if *path == files.metadata && *told == at => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}

fn refused(bed: &Bed) -> Result<(), Failure> {
    let bottom =
        || Tarball::of([Item::directory("d"), Item::symlink("loop", "loop"), Item::file("file", "")]);
    for target in ["no/such", "d", "loop/x", "file/x", "gone"] {
        let top = Tarball::of([Item::hard_link("name", target)]);
        let image = TestImage::of([bottom(), top]);
        let archive = bed.write("image.tar", &tar_of(&image.docker_files()?))?;
        let Err(error) = bed.try_load(&archive) else { return Err(format!("{target} was taken").into()) };
        let said = crate::bed::chain(&error);
        if !said.contains("layer 2 of 2") || !said.contains("\"name\"") || !said.contains(target) {
            return Err(said.into());
        }
        if !bed.store.images()?.is_empty() || !merged_files(bed)?.is_empty() {
            return Err("something of it stayed".into());
        }
    }
    Ok(())
}

fn many(bed: &Bed) -> Result<(), Failure> {
    let layers = (0..127_i32).map(|number| {
        Tarball::of([
            Item::file(format!("of-{number}"), format!("{number}")),
            Item::file("last", format!("{number}")),
            Item::file(format!(".wh.of-{}", number - 2), ""),
        ])
    });
    let image = load(bed, layers)?;
    // The names of so many devices do not fit the page of options that mount(2) takes.
    let mounted = bed.mount_image(&image, "disk", Shape::OneDisk)?;
    let names: Vec<_> = walk(&mounted.target)?.into_keys().collect();
    let expected: Vec<Vec<u8>> =
        ["", "last", "of-125", "of-126"].map(|name| name.as_bytes().to_vec()).to_vec();
    if names != expected || fs::read_to_string(mounted.target.join("last"))? != "126" {
        return Err(format!("{names:?}").into());
    }
    Ok(())
}
