//! Processes that die or meet at the store.

use std::time::Duration;

use cloche_images::Store;
use libtest_mimic::Trial;

use crate::archive::{Packing, TestImage, tar_of};
use crate::bed::{Bed, Failure, test};
use crate::child;
use crate::layers::noise;
use crate::tarball::{Item, Tarball};

pub fn tests() -> Vec<Trial> {
    vec![
        test("load_killed_at_any_moment_leaves_a_sound_store", &[], killed_loads),
        test("loads_and_removals_side_by_side_keep_the_store_sound", &[], concurrent_loads),
    ]
}

fn image(number: u64) -> TestImage {
    let common = Tarball::of([Item::file("common", noise(3 << 20, 1))]);
    let own = Tarball::of([Item::file("own", noise(2 << 20, 100 + number))]);
    let name = format!("docker.io/library/image-{number}:latest");
    TestImage { name: Some(name), ..TestImage::of([common, own]) }.packed(Packing::Zstd)
}

/// Every image that is listed is whole, and what is not referred to is at least complete.
pub fn assert_sound(store: &Store) -> Result<usize, Failure> {
    let images = store.images()?;
    for image in &images {
        for layer in &image.layers {
            let length = std::fs::metadata(&layer.erofs)?.len();
            if length != layer.erofs_bytes {
                return Err(format!("{} has {length} bytes", layer.erofs.display()).into());
            }
        }
    }
    for entry in std::fs::read_dir(store.root().join("layers/sha256"))? {
        crate::erofs::read(&std::fs::read(entry?.path())?)?;
    }
    // Each image's merged file system is there, and no half of any.
    for image in &images {
        let files = store.root_fs(image)?;
        if files.layers.len() != image.layers.len() {
            return Err(format!("{} has {} layers", files.metadata.display(), files.layers.len()).into());
        }
    }
    for entry in std::fs::read_dir(store.root().join("merged/sha256"))? {
        let bytes = std::fs::read(entry?.path())?;
        let blocks = bytes.get(1060..1064).ok_or("a merged file system is cut off")?;
        if bytes.len() != u32::from_le_bytes(blocks.try_into()?) as usize * 4096 {
            return Err("a merged file system is cut off".into());
        }
    }
    for entry in std::fs::read_dir(store.root().join("blobs/sha256"))? {
        let entry = entry?;
        let digest = crate::bed::sha256(&std::fs::read(entry.path())?);
        if entry.file_name().to_str() != Some(digest.as_str()) {
            return Err(format!("{} is not whole", entry.path().display()).into());
        }
    }
    Ok(images.len())
}

fn killed_loads(bed: &Bed) -> Result<(), Failure> {
    let archive = bed.write("image.tar", &tar_of(&image(0).oci_files()?))?;
    // How long a load takes here, whole.
    let start = std::time::Instant::now();
    if !child::spawn(bed.store.root(), &[&archive])?.wait()?.success() {
        return Err("the load failed".into());
    }
    let whole = start.elapsed();
    bed.store.remove("image-0")?;
    const TRIES: u32 = 40;
    for attempt in 0..TRIES {
        let mut child = child::spawn(bed.store.root(), &[&archive])?;
        std::thread::sleep(whole * attempt / TRIES);
        child.kill()?;
        child.wait()?;
        if assert_sound(&bed.store)? > 0 {
            bed.store.remove("image-0")?;
        }
    }
    // The next load works, and the removal after it leaves nothing at all.
    bed.load(&archive)?;
    bed.store.remove("image-0")?;
    for directory in ["blobs/sha256", "layers/sha256", "merged/sha256"] {
        if std::fs::read_dir(bed.store.root().join(directory))?.next().is_some() {
            return Err(format!("files are left in {directory}").into());
        }
    }
    Ok(())
}

fn concurrent_loads(bed: &Bed) -> Result<(), Failure> {
    let archives: Vec<_> = (0..4)
        .map(|number| bed.write(&format!("image-{number}.tar"), &tar_of(&image(number).oci_files()?)))
        .collect::<Result<_, _>>()?;
    for _ in 0..5 {
        let mut children = Vec::new();
        for archive in &archives {
            children.push(child::spawn(bed.store.root(), &[archive, &archives[0]])?);
        }
        // Removals while layers come and go; most find nothing yet.
        for _ in 0..20 {
            let _ = bed.store.remove("image-1");
            std::thread::sleep(Duration::from_millis(5));
        }
        for mut child in children {
            if !child.wait()?.success() {
                return Err("a load failed".into());
            }
        }
        if assert_sound(&bed.store)? < 3 {
            return Err("images are missing".into());
        }
        for image in bed.store.images()? {
            bed.store.remove(&image.id.to_string())?;
        }
        if assert_sound(&bed.store)? > 0
            || std::fs::read_dir(bed.store.root().join("layers/sha256"))?.next().is_some()
        {
            return Err("something is left".into());
        }
    }
    Ok(())
}
