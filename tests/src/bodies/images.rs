//! `cloche image …`: every form an image comes in, more than once and at once, and its removal.

use anyhow::{Context as _, ensure};

use super::rootfs::base;
use crate::bed::Bed;
use crate::image::{Image, Layering, gzip};
use crate::process::Input;
use crate::suite::{Body, Story, body};

pub const BODIES: &[Body] = &[
    body!(docker_archive_is_loaded_and_runs),
    body!(oci_layouts_are_loaded_and_run),
    body!(compressed_layers_are_loaded_and_run),
    body!(compressed_archive_is_loaded_and_runs),
    body!(image_goes_by_each_of_its_names),
    body!(image_for_another_processor_is_refused),
    body!(archive_is_loaded_from_stdin),
    body!(removed_image_no_longer_runs),
    body!(loading_twice_changes_nothing).once(),
    body!(four_loads_at_once_all_succeed).once(),
    body!(listing_and_inspection_are_json).once(),
    body!(removal_gives_the_space_back).once(),
    body!(shared_layer_survives_removal_of_one_image).once(),
];

fn sample(bed: &Bed) -> anyhow::Result<Image> {
    let mut tree = base(bed)?;
    tree.file("greeting", "hello from the image\n");
    Ok(Image::new(vec![tree.to_layer()]))
}

fn greets(bed: &Bed, name: &str) -> Story {
    bed.sandbox(name).command(&["cat", "/greeting"]).run()?.succeeds()?.prints("hello from the image\n")?;
    bed.run(&["image", "rm", name])?.succeeds()?;
    Ok(())
}

fn docker_archive_is_loaded_and_runs(bed: &Bed) -> Story {
    let archive = bed.write("a.tar", &sample(bed)?.to_docker_archive("greeter"))?;
    // Without --name the archive's own tag counts.
    bed.run(&["image", "load", &archive.to_string_lossy()])?.succeeds()?.prints_some("greeter")?;
    greets(bed, "greeter")
}

fn oci_layouts_are_loaded_and_run(bed: &Bed) -> Story {
    let layout = sample(bed)?.to_oci_layout("latest", Layering::Plain)?;
    let archive = bed.write("layout.tar", &layout.to_tar())?;
    bed.load("as-tar", &archive)?.succeeds()?;
    let directory = bed.scratch().join("layout");
    layout.write_to(&directory)?;
    bed.load("as-directory", &directory)?.succeeds()?;
    greets(bed, "as-tar")?;
    greets(bed, "as-directory")
}

fn compressed_layers_are_loaded_and_run(bed: &Bed) -> Story {
    for layering in [Layering::Gzip, Layering::Zstd] {
        let layout = sample(bed)?.to_oci_layout("latest", layering)?;
        let archive = bed.write("layout.tar", &layout.to_tar())?;
        bed.load("squeezed", &archive)?.succeeds()?;
        greets(bed, "squeezed")?;
    }
    Ok(())
}

fn compressed_archive_is_loaded_and_runs(bed: &Bed) -> Story {
    let archive = bed.write("a.tar.gz", &gzip(&sample(bed)?.to_docker_archive("packed"))?)?;
    bed.load("packed", &archive)?.succeeds()?;
    greets(bed, "packed")
}

fn image_goes_by_each_of_its_names(bed: &Bed) -> Story {
    let listing = bed.json(&["image", "ls", "--json"])?;
    let images = listing.as_array().context("`image ls --json` is an array")?;
    let is_busybox = |image: &&serde_json::Value| image["names"].to_string().contains("busybox");
    let id =
        images.iter().find(is_busybox).and_then(|image| image["id"].as_str()).context("busybox has an id")?;
    let digits = id.trim_start_matches("sha256:");
    for name in [
        "busybox",
        "busybox:latest",
        "docker.io/library/busybox",
        "library/busybox:latest",
        id,
        &digits[..12],
    ] {
        bed.sandbox(name).command(&["echo", "hi"]).run()?.succeeds()?.prints("hi\n")?;
    }
    bed.sandbox("busybox:other").command(&["true"]).run()?.refused_with(125)?.says("busybox:other")?;
    Ok(())
}

fn image_for_another_processor_is_refused(bed: &Bed) -> Story {
    let mut image = sample(bed)?;
    image.architecture = "arm64";
    let archive = bed.write("a.tar", &image.to_docker_archive("foreign"))?;
    let loaded = bed.load("foreign", &archive)?;
    // At the load or at the run; not by an exec format error.
    if loaded.code() != 0 {
        loaded.refused()?.says("arm64")?;
        return Ok(());
    }
    let refused = bed.sandbox("foreign").command(&["true"]).run()?;
    bed.run(&["image", "rm", "foreign"])?.succeeds()?;
    refused.refused_with(125)?.says("arm64")?;
    Ok(())
}

fn archive_is_loaded_from_stdin(bed: &Bed) -> Story {
    let archive = sample(bed)?.to_docker_archive("piped");
    bed.start(&["image", "load", "--name", "piped", "-"], &Input::Bytes(archive))?.wait()?.succeeds()?;
    greets(bed, "piped")
}

fn removed_image_no_longer_runs(bed: &Bed) -> Story {
    let archive = bed.write("a.tar", &sample(bed)?.to_docker_archive("fleeting"))?;
    bed.load("fleeting", &archive)?.succeeds()?;
    bed.run(&["image", "rm", "fleeting"])?.succeeds()?;
    bed.sandbox("fleeting").command(&["true"]).run()?.refused_with(125)?.says("fleeting")?;
    bed.run(&["image", "rm", "fleeting"])?.refused()?.says("fleeting")?;
    Ok(())
}

fn loading_twice_changes_nothing(bed: &Bed) -> Story {
    let archive = bed.write("a.tar", &sample(bed)?.to_docker_archive("twice"))?;
    let bed = bed.with_empty_store()?;
    bed.load("twice", &archive)?.succeeds()?;
    let first = bed.store_listing()?;
    bed.load("twice", &archive)?.succeeds()?;
    let second = bed.store_listing()?;
    ensure!(first == second, "the second load changed the store:\n{first:#?}\n{second:#?}");
    Ok(())
}

fn four_loads_at_once_all_succeed(bed: &Bed) -> Story {
    let archive = bed.write("a.tar", &sample(bed)?.to_docker_archive("crowd"))?;
    let archive = archive.to_string_lossy();
    let alone = bed.with_store(&bed.scratch().join("alone"))?;
    alone.run(&["image", "load", "--name", "crowd", &archive])?.succeeds()?;
    let crowd = bed.with_store(&bed.scratch().join("crowd"))?;
    let load = |_| crowd.start(&["image", "load", "--name", "crowd", &archive], &Input::Null);
    let loads: Vec<_> = (0..4).map(load).collect::<Result<_, _>>()?;
    for load in loads {
        load.wait()?.succeeds()?;
    }
    let names = |bed: &Bed| -> anyhow::Result<Vec<String>> {
        let root = bed.store_root().to_string_lossy().into_owned();
        Ok(bed.store_listing()?.iter().map(|line| line.replacen(&root, "", 1)).collect())
    };
    let (expected, seen) = (names(&alone)?, names(&crowd)?);
    ensure!(expected == seen, "four loads left another store than one:\n{expected:#?}\n{seen:#?}");
    ensure!(crowd.image_names()?.len() == 1, "one image, under these names: {:?}", crowd.image_names()?);
    Ok(())
}

fn listing_and_inspection_are_json(bed: &Bed) -> Story {
    let archive = bed.write("a.tar", &sample(bed)?.to_docker_archive("listed"))?;
    let bed = bed.with_empty_store()?;
    let empty = bed.json(&["image", "ls", "--json"])?;
    ensure!(empty.as_array().is_some_and(Vec::is_empty), "an empty store lists {empty}");
    bed.load("listed", &archive)?.succeeds()?;
    let listing = bed.json(&["image", "ls", "--json"])?;
    let images = listing.as_array().context("`image ls --json` is an array")?;
    ensure!(images.len() == 1 && images[0].to_string().contains("listed"), "unexpected listing {listing}");
    let details = bed.json(&["image", "inspect", "listed"])?;
    let text = details.to_string();
    ensure!(
        text.contains("sha256:") && text.contains("PATH="),
        "inspection lacks digests or config: {details}"
    );
    bed.run(&["image", "inspect", "unknown"])?.refused()?.says("unknown")?;
    Ok(())
}

fn removal_gives_the_space_back(bed: &Bed) -> Story {
    let archive = bed.write("a.tar", &sample(bed)?.to_docker_archive("brief"))?;
    let bed = bed.with_empty_store()?;
    let before = bed.store_listing()?;
    bed.load("brief", &archive)?.succeeds()?;
    bed.run(&["image", "rm", "brief"])?.succeeds()?;
    let after = bed.store_listing()?;
    let grown = after.iter().filter(|line| !before.contains(line)).filter(|line| !is_bookkeeping(line));
    let grown: Vec<_> = grown.collect();
    ensure!(grown.is_empty(), "files of a removed image stay: {grown:#?}");
    Ok(())
}

/// A store may keep a small index of its own.
fn is_bookkeeping(line: &str) -> bool {
    line.rsplit(' ').next().and_then(|size| size.parse::<u64>().ok()).is_some_and(|size| size < 1024)
}

fn shared_layer_survives_removal_of_one_image(bed: &Bed) -> Story {
    let shared = base(bed)?.to_layer();
    let mut top = crate::tree::Tree::default();
    top.file("greeting", "hello from the image\n");
    let one = bed.write("one.tar", &Image::new(vec![shared.clone()]).to_docker_archive("one"))?;
    let two = bed.write("two.tar", &Image::new(vec![shared, top.to_layer()]).to_docker_archive("two"))?;
    bed.load("one", &one)?.succeeds()?;
    bed.load("two", &two)?.succeeds()?;
    bed.run(&["image", "rm", "one"])?.succeeds()?;
    greets(bed, "two")
}
