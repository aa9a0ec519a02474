//! Archives made to confuse: every one is refused in words, in bounded time, and leaves the store as it was.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::bed::Bed;
use crate::image::{Image, Layering, gzip, sha256_hex};
use crate::noise::Noise;
use crate::suite::{Body, Story, body};
use crate::tar::{Archive, Header, kind, pax_record, put_number, seal};
use crate::world::Need;

pub const BODIES: &[Body] = &[
    body!(torn_archives_are_refused).once(),
    body!(flipped_bits_are_found_by_the_digest).once(),
    body!(wrong_digests_are_refused).once(),
    body!(layers_that_climb_out_are_refused).once(),
    body!(layer_through_a_symlink_stays_inside).once(),
    body!(headers_that_lie_about_sizes_are_refused).once(),
    body!(sparse_maps_that_lie_are_refused).once(),
    body!(ten_million_entries_are_refused_in_bounded_time).once().needs(&[Need::RealProcessor]),
    body!(things_that_are_no_image_are_refused).once(),
    body!(manifests_that_lie_are_refused).once(),
    body!(full_disk_is_reported_and_the_store_lives_on).once(),
];

/// A small image whose one layer has a bit of everything.
fn small_image() -> Image {
    let mut archive = Archive::default();
    archive.entry(Header::new(kind::DIRECTORY, "dir/", 0o755), &[]);
    archive.file("dir/file", &Noise::new(3).bytes(10_000));
    let mut link = Header::new(kind::SYMLINK, "link", 0o777);
    link.link = "dir/file".to_owned();
    archive.entry(link, &[]);
    Image::new(vec![archive.finish()])
}

/// Expects the load to fail in words and to leave nothing in a fresh store, which then takes a sound image.
fn is_refused(bed: &Bed, what: &str, from: &Path) -> Story {
    let store = bed.with_store(&bed.scratch().join("refusing"))?;
    let before = store.store_listing()?;
    store.load("bad", from)?.refused().with_context(|| format!("{what} was loaded"))?;
    let after = store.store_listing()?;
    let grown: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
    ensure!(grown.is_empty(), "{what} left files in the store: {grown:#?}");
    let names = store.image_names()?;
    ensure!(names.is_empty(), "{what} was refused, and yet there is {names:?}");
    Ok(())
}

fn bytes_are_refused(bed: &Bed, what: &str, bytes: &[u8]) -> Story {
    let file = bed.write("bad.tar", bytes)?;
    is_refused(bed, what, &file)
}

fn layer_is_refused(bed: &Bed, what: &str, layer: Vec<u8>) -> Story {
    bytes_are_refused(bed, what, &Image::new(vec![layer]).to_docker_archive("bad"))
}

fn torn_archives_are_refused(bed: &Bed) -> Story {
    let whole = small_image().to_docker_archive("torn");
    // The end mark may be missing; what comes before it may not.
    let sound = whole.len() - 1024;
    for length in [0, 1, 511, 512, 1000, sound / 4, sound / 2, sound * 3 / 4, sound - 512, sound - 1000] {
        bytes_are_refused(bed, &format!("{length} of {} bytes", whole.len()), &whole[..length])?;
    }
    let layer = &small_image().layers[0];
    for length in [100, 700, 2000, 8000] {
        layer_is_refused(bed, &format!("a layer cut at {length}"), layer[..length].to_vec())?;
    }
    let squeezed = gzip(layer)?;
    let torn = squeezed[..squeezed.len() / 2].to_vec();
    let layout = small_image().to_oci_layout_of("latest", Layering::Gzip, vec![torn]);
    bytes_are_refused(bed, "a torn gzip layer", &layout.to_tar())
}

fn flipped_bits_are_found_by_the_digest(bed: &Bed) -> Story {
    let mut layout = small_image().to_oci_layout("latest", Layering::Plain)?;
    let blob = layout.largest_blob();
    let middle = blob.len() / 2;
    blob[middle] ^= 1;
    bytes_are_refused(bed, "a layer with a flipped bit, as tar", &layout.to_tar())?;
    let directory = bed.scratch().join("layout");
    layout.write_to(&directory)?;
    is_refused(bed, "a layer with a flipped bit, as directory", &directory)
}

fn wrong_digests_are_refused(bed: &Bed) -> Story {
    // A layer that is not the configuration's diff_id.
    let image = small_image();
    let other = Image::new(vec![crate::tree::Tree::default().to_layer()]);
    let sound = image.to_docker_archive("swapped");
    let text = String::from_utf8_lossy(&sound).into_owned();
    let diff_id = sha256_hex(&image.layers[0]);
    ensure!(text.contains(&diff_id), "the archive names its layer by digest");
    let layout = image.to_oci_layout_of("latest", Layering::Plain, other.layers.clone());
    bytes_are_refused(bed, "a layer that is not its diff_id", &layout.to_tar())?;
    // A descriptor whose size is a lie.
    let layout = image.to_oci_layout("latest", Layering::Plain)?;
    let manifest_with = |from: &str, to: &str| {
        let mut files = layout.to_tar();
        replace(&mut files, from.as_bytes(), to.as_bytes());
        files
    };
    let size = image.layers[0].len().to_string();
    let lie = "9".repeat(size.len());
    bytes_are_refused(bed, "a manifest changed under its digest", &manifest_with(&size, &lie))?;
    bytes_are_refused(
        bed,
        "an index with another digest",
        &manifest_with("\"digest\":\"sha256:", "\"digest\":\"sha255:"),
    )?;
    Ok(())
}

/// Replaces the first occurrence by as many bytes. No checksum covers an archive's data.
fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    if let Some(at) = bytes.windows(from.len()).position(|window| window == from) {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
}

fn layers_that_climb_out_are_refused(bed: &Bed) -> Story {
    for path in ["../escape", "dir/../../escape", "./../escape", "dir/.."] {
        let mut archive = Archive::default();
        archive.file("fine", b"x").file(path, b"escaped");
        layer_is_refused(bed, &format!("a layer with {path}"), archive.finish())?;
    }
    for target in ["../../etc/passwd", "../escape", "nowhere"] {
        let mut archive = Archive::default();
        let mut link = Header::new(kind::HARD_LINK, "link", 0o644);
        link.link = target.to_owned();
        archive.entry(link, &[]);
        layer_is_refused(bed, &format!("a hard link to {target}"), archive.finish())?;
    }
    let outside = [bed.scratch().join("escape"), bed.store_root().join("escape"), "/escape".into()];
    for path in outside {
        ensure!(!path.exists(), "{} was made", path.display());
    }
    Ok(())
}

fn layer_through_a_symlink_stays_inside(bed: &Bed) -> Story {
    // A symlink, then a file "in" it. Loading it must not write there, whether it is refused or resolved inside.
    let target = bed.scratch().join("target");
    std::fs::create_dir(&target)?;
    let mut archive = Archive::default();
    let mut link = Header::new(kind::SYMLINK, "way", 0o777);
    link.link = target.to_string_lossy().into_owned();
    archive.entry(link, &[]).file("way/escape", b"escaped");
    let file = bed.write("way.tar", &Image::new(vec![archive.finish()]).to_docker_archive("way"))?;
    let finished = bed.with_empty_store()?.load("way", &file)?;
    if finished.code() != 0 {
        finished.refused()?;
    }
    ensure!(!target.join("escape").exists(), "a file was made through the link");
    Ok(())
}

fn headers_that_lie_about_sizes_are_refused(bed: &Bed) -> Story {
    let mut lies: Vec<(&str, u8, u64)> = Vec::new();
    for size in [1 << 20, 1 << 40, 1 << 62, u64::MAX] {
        lies.push(("a file", kind::FILE, size));
        lies.push(("a pax header", kind::PAX, size));
        lies.push(("a long name", kind::GNU_LONG_NAME, size));
    }
    for (what, flag, size) in lies {
        let mut header = Header::new(flag, "liar", 0o644);
        header.size = size;
        let mut archive = Archive::default();
        archive.file("fine", b"x").raw(&header.to_block()).padded(b"few bytes");
        layer_is_refused(bed, &format!("{what} of {size} bytes"), archive.finish())?;
    }
    for records in [
        "9999999999 path=x\n",
        "0 path=x\n",
        "-5 path=x\n",
        "12 path=xx\n99",
        "path=x\n",
        "18446744073709551616 a=b\n",
        "\n",
    ] {
        let mut archive = Archive::default();
        archive.entry(Header::new(kind::PAX, "pax", 0o644), records.as_bytes()).file("x", b"x");
        layer_is_refused(bed, &format!("pax records {records:?}"), archive.finish())?;
    }
    let mut header = Header::new(kind::FILE, "x", 0o644).to_block();
    header[150] ^= 1;
    let mut archive = Archive::default();
    archive.raw(&header);
    layer_is_refused(bed, "a header with a wrong checksum", archive.finish())?;
    layer_is_refused(bed, "noise", Noise::new(9).bytes(100_000))
}

fn sparse_maps_that_lie_are_refused(bed: &Bed) -> Story {
    let pax = |real_size: &str, map: &str| {
        let mut records = Vec::new();
        for (key, value) in [("major", "1"), ("minor", "0"), ("name", "sparse"), ("realsize", real_size)] {
            pax_record(&mut records, &format!("GNU.sparse.{key}"), value.as_bytes());
        }
        let mut data = map.as_bytes().to_vec();
        data.resize(data.len().next_multiple_of(512), 0);
        data.extend_from_slice(b"data");
        let mut archive = Archive::default();
        archive.entry(Header::new(kind::PAX, "pax", 0o644), &records).file("sparse", &data);
        archive.finish()
    };
    for (what, size, map) in [
        ("ten million pieces", "100", "10000000\n0\n4\n"),
        ("a piece behind the end", "100", "1\n1000\n4\n"),
        ("pieces that overlap", "100", "2\n0\n4\n2\n4\n"),
        ("pieces in the wrong order", "100", "2\n50\n2\n10\n2\n"),
        ("a piece over 2^64", "100", "1\n18446744073709551615\n4\n"),
        ("more data than there is", "1000000", "1\n0\n1000000\n"),
        ("a map that is no number", "100", "one\n0\n4\n"),
        ("a size over every file's", "18446744073709551615", "1\n0\n4\n"),
    ] {
        layer_is_refused(bed, &format!("a sparse map with {what}"), pax(size, map))?;
    }
    // GNU's old format: four pieces in the header, and a flag that more follow.
    let mut block = Header::new(kind::GNU_SPARSE, "old", 0o644).to_block();
    block[257..265].copy_from_slice(b"ustar  \0");
    put_number(&mut block[386..398], u64::MAX / 2);
    put_number(&mut block[398..410], u64::MAX / 2);
    block[482] = 1;
    put_number(&mut block[483..495], u64::MAX / 2);
    seal(&mut block);
    let mut archive = Archive::default();
    archive.raw(&block);
    layer_is_refused(bed, "an endless old sparse map", archive.finish())
}

fn ten_million_entries_are_refused_in_bounded_time(bed: &Bed) -> Story {
    // A hundred thousand headers under a few names compress to almost nothing; a gzip stream may have any number of
    // members (RFC 1952 §2.2).
    let mut entries = Archive::default();
    for number in 0..100_000 {
        entries.raw(&Header::new(kind::FILE, format!("entry-{:02}", number % 32), 0o644).to_block());
    }
    let mut raw = entries.finish();
    raw.truncate(100_000 * crate::tar::BLOCK);
    let member = gzip(&raw)?;
    let layout = small_image().to_oci_layout_of("latest", Layering::Gzip, vec![member.repeat(100)]);
    bytes_are_refused(bed, "a layer of ten million entries", &layout.to_tar())
}

fn things_that_are_no_image_are_refused(bed: &Bed) -> Story {
    bytes_are_refused(bed, "noise", &Noise::new(4).bytes(50_000))?;
    bytes_are_refused(bed, "zeros", &[0; 10_240])?;
    bytes_are_refused(bed, "a tar without a manifest", &small_image().layers[0])?;
    let empty = bed.scratch().join("empty");
    std::fs::create_dir(&empty)?;
    is_refused(bed, "an empty directory", &empty)?;
    is_refused(bed, "a missing file", &bed.scratch().join("no-such-file"))?;
    is_refused(bed, "a device", Path::new("/dev/zero"))?;
    is_refused(bed, "the null device", Path::new("/dev/null"))
}

fn manifests_that_lie_are_refused(bed: &Bed) -> Story {
    for (what, manifest) in [
        ("no JSON", "{".to_owned()),
        ("no images", "[]".to_owned()),
        ("a missing configuration", r#"[{"Config":"gone.json","RepoTags":["a:b"],"Layers":[]}]"#.to_owned()),
        (
            "a configuration outside",
            r#"[{"Config":"../../etc/passwd","RepoTags":[],"Layers":["/etc/passwd"]}]"#.to_owned(),
        ),
        ("depth", "[".repeat(100_000)),
        ("another type", r#"[{"Config":5,"RepoTags":"x","Layers":{}}]"#.to_owned()),
        (
            "ten thousand layers",
            format!(r#"[{{"Config":"c.json","RepoTags":[],"Layers":[{}"l"]}}]"#, r#""l","#.repeat(10_000)),
        ),
    ] {
        let mut archive = Archive::default();
        archive.file(
            "c.json",
            br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#,
        );
        archive.file("manifest.json", manifest.as_bytes());
        bytes_are_refused(bed, &format!("a manifest with {what}"), &archive.finish())?;
    }
    Ok(())
}

/// A tmpfs, unmounted at the end.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(at: &'a Path, options: &std::ffi::CStr) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        mount("tmpfs", at, "tmpfs", MountFlags::empty(), options).context("mount a small tmpfs")?;
        Ok(Self(at))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

fn full_disk_is_reported_and_the_store_lives_on(bed: &Bed) -> Story {
    let root = bed.scratch().join("small");
    let _disk = SmallDisk::mount(&root, c"size=96m")?;
    let mut archive = Archive::default();
    archive.file("large", &Noise::new(7).bytes(120 << 20));
    let large = bed.write("large.tar", &Image::new(vec![archive.finish()]).to_docker_archive("large"))?;
    let small = bed.write("small.tar", &small_image().to_docker_archive("small"))?;
    let bed = bed.with_store(&root)?;
    let finished = bed.load("large", &large)?.refused()?;
    let said = finished.err().to_lowercase();
    ensure!(said.contains("space") || said.contains("disk"), "the full disk is not named\n{finished}");
    ensure!(
        bed.store_listing()?.iter().all(|line| !line.contains("large")),
        "something is left in the store"
    );
    let used = rustix::fs::statvfs(&root)?;
    let free = used.f_bavail * used.f_frsize;
    ensure!(free > 95 << 20, "only {free} bytes of 96 MiB are free again: {:#?}", bed.store_listing()?);
    bed.load("small", &small)?.succeeds()?;
    ensure!(bed.image_names()?.len() == 1, "the sound image is not listed");
    Ok(())
}
