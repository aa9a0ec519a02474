//! Bad archives: each is refused with a message that says what is wrong, and leaves nothing in the store.

use std::time::{Duration, Instant};

use cloche_images::LoadError;
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::archive::{Packing, TestImage, blob_file, descriptor, tar_of, write_directory};
use crate::bed::{Bed, Failure, Need, Shape, chain, run, sha256, test};
use crate::child::{Outcome, load_apart};
use crate::layers::noise;
use crate::tarball::{Item, Tarball, header, push_record, set_checksum};

pub fn tests() -> Vec<Trial> {
    vec![
        test("layer_of_every_forbidden_kind_is_refused", &[], forbidden_layers),
        test("header_that_lies_is_refused", &[], lying_headers),
        test("terabyte_of_holes_costs_little", &[], terabyte_of_holes),
        test("terabyte_of_claimed_data_is_a_torn_archive", &[], terabyte_of_claims),
        test("millions_of_entries_end_in_bounded_time_and_memory", &[], millions_of_entries),
        test("bombs_take_no_memory_and_zeros_no_space", &[], bombs),
        test("archive_cut_anywhere_is_refused", &[], torn_archives),
        test("wrong_digests_are_named", &[], wrong_digests),
        test("manifest_of_every_wrong_kind_is_refused", &[], wrong_manifests),
        test("file_that_is_no_image_is_refused", &[], not_images),
        test("full_disk_leaves_nothing", &[Need::Root], full_disk),
    ]
}

/// Loads what must be refused, and returns the message.
fn refused(bed: &Bed, archive: &[u8]) -> Result<String, Failure> {
    let path = bed.write("bad.tar", archive)?;
    let start = Instant::now();
    let message = match bed.try_load(&path) {
        Ok(loaded) => return Err(format!("loaded {loaded:?}").into()),
        Err(error) => chain(&error),
    };
    if start.elapsed() > Duration::from_secs(60) {
        return Err(format!("took {:?}: {message}", start.elapsed()).into());
    }
    assert_nothing_left(bed)?;
    Ok(message)
}

fn assert_nothing_left(bed: &Bed) -> Result<(), Failure> {
    for directory in ["blobs/sha256", "layers/sha256"] {
        if let Some(entry) = std::fs::read_dir(bed.store.root().join(directory))?.next() {
            return Err(format!("left in the store: {:?}", entry?.path()).into());
        }
    }
    Ok(())
}

fn assert_says(message: &str, expected: &[&str]) -> Result<(), Failure> {
    match expected.iter().find(|text| !message.contains(**text)) {
        Some(text) => Err(format!("{message:?} does not say {text:?}").into()),
        None => Ok(()),
    }
}

fn layer_refused(bed: &Bed, layer: Tarball, expected: &[&str]) -> Result<(), Failure> {
    let image = TestImage::of([layer]).packed(Packing::Plain);
    assert_says(&refused(bed, &tar_of(&image.docker_files()?))?, expected)
}

fn forbidden_layers(bed: &Bed) -> Result<(), Failure> {
    let long = "n".repeat(256);
    let item = |item: Item| Tarball::of([item]);
    let cases: Vec<(Tarball, &[&str])> = vec![
        (item(Item::file("../escape", "x")), &["\"../escape\"", "out of the image's root"]),
        (item(Item::file("a/../../escape", "x")), &["out of the image's root"]),
        (item(Item::file("/../escape", "x")), &["out of the image's root"]),
        (item(Item::hard_link("a", "../../etc/passwd")), &["\"a\"", "out of the image's root"]),
        (item(Item::hard_link("a", "/etc/passwd")), &["\"a\"", "hard link", "\"etc/passwd\"", "neither"]),
        (
            Tarball::of([Item::directory("d"), Item::hard_link("a", "d")]),
            &["hard link", "which is a directory"],
        ),
        (
            Tarball::of([Item::file("f", "x"), Item::file("f/below", "x")]),
            &["\"f/below\"", "not a directory"],
        ),
        (
            Tarball::of([Item::symlink("l", "l"), Item::file("l/x", "x")]),
            &["\"l/x\"", "too many symbolic links"],
        ),
        (item(Item::file(".", "x")), &["only a directory"]),
        (item(Item::symlink("/", "x")), &["only a directory"]),
        (item(Item::file(&long, "x")), &["255 bytes"]),
        (item(Item::file("d/".repeat(2048) + "x", "x")), &["4095 bytes"]),
        (item(Item::symlink("l", "")), &["empty"]),
        (item(Item::symlink("l", "t".repeat(4096))), &["4095 bytes"]),
        (item(Item::file(".wh.", "")), &["reserved for whiteouts"]),
        (item(Item::file(".wh...", "")), &["reserved for whiteouts"]),
        (item(Item::file(".wh.d/x", "")), &["reserved for whiteouts"]),
        (item(Item::char_device("c", 4096, 0)), &["4096:0"]),
        (item(Item::file("x", "x").owner(u64::from(u32::MAX), 0)), &["uid"]),
        (item(Item::file("x", "x").xattr("user.x", vec![0; 65536])), &["65536", "65535"]),
        (item(Item::file("x", "x").xattr(&format!("user.{long}"), "")), &["user.nnn", "255 bytes"]),
        (item(Item::file("x", "x").xattr("system.posix_acl_access", "junk")), &["access control list"]),
        (item(Item::file("x", "x").pax("GNU.sparse.major", "2")), &["GNU sparse format"]),
        (item(Item { kind: b'V', ..Item::file("volume", "") }), &["type 'V'"]),
        (item(Item { kind: b'M', ..Item::file("multi", "") }), &["type 'M'"]),
    ];
    for (layer, expected) in cases {
        layer_refused(bed, layer, expected)?;
    }
    Ok(())
}

fn lying_headers(bed: &Bed) -> Result<(), Failure> {
    let claim = |kind, size| {
        let mut item = Item::file("liar", "");
        item.kind = kind;
        item.claimed_size = Some(size);
        Tarball::new().raw(&header(&item))
    };
    let mut no_checksum = header(&Item::file("x", ""));
    no_checksum[0] = b'y';
    let mut negative = header(&Item::file("negative", ""));
    negative[124..136].fill(0xff);
    set_checksum(&mut negative);
    let mut not_octal = header(&Item::file("not-octal", ""));
    not_octal[100..108].copy_from_slice(b"0009999\0");
    set_checksum(&mut not_octal);
    let mut records = Vec::new();
    push_record(&mut records, b"size", b"18446744073709551615");
    let mut global = Vec::new();
    push_record(&mut global, b"uid", b"0");
    let many = (0..20).fold(Tarball::new(), |tar, _| tar.long_name(b"again"));
    let extents: Vec<(u64, &[u8])> = vec![(0, b"x"), (0, b"y")];
    let cases: Vec<(Tarball, &[&str])> = vec![
        (claim(b'x', 1 << 40), &["special header", "1099511627776"]),
        (claim(b'L', 1 << 62), &["special header"]),
        (claim(b'x', 1 << 20), &["torn", "special header"]),
        (claim(b'0', 1 << 62), &["\"liar\"", "4611686018427387904"]),
        (claim(b'0', u64::MAX), &["size"]),
        (Tarball::new().raw(&no_checksum), &["checksum"]),
        (Tarball::new().raw(&negative), &["size is not a number in range"]),
        (Tarball::new().raw(&not_octal), &["mode is not a number in range"]),
        (Tarball::new().raw(&noise(1024, 1)), &["checksum", "not a tar archive"]),
        (
            Tarball::new().special(b'x', &records).add(Item::file("x", "")),
            &["byte 0", "x", "18446744073709551615"],
        ),
        (Tarball::new().special(b'x', b"garbage").add(Item::file("x", "")), &["malformed pax"]),
        (Tarball::new().special(b'g', &global).add(Item::file("x", "")), &["global pax header"]),
        (many, &["special headers in a row"]),
        (Tarball::new().old_gnu_sparse("overlap", 100, &extents), &["\"overlap\"", "sparse map"]),
        (Tarball::new().pax_sparse("0.1", "overlap", 100, &extents), &["sparse map"]),
        (Tarball::new().pax_sparse("1.0", "small", 1, &[(5, b"x")]), &["sparse map"]),
        (Tarball::new().pax_sparse("0.0", "huge", 1 << 60, &[(5, b"x")]), &["1152921504606846976"]),
        (
            Tarball::of([Item::file("map", "99999999\n")
                .pax("GNU.sparse.major", "1")
                .pax("GNU.sparse.minor", "0")]),
            &["sparse map"],
        ),
    ];
    for (layer, expected) in cases {
        layer_refused(bed, layer, expected)?;
    }
    Ok(())
}

/// One terabyte, of which two pieces are not zero.
fn terabyte_of_holes(bed: &Bed) -> Result<(), Failure> {
    const TERABYTE: u64 = 1 << 40;
    let (first, last) = (noise(5000, 1), noise(5000, 2));
    let extents: [(u64, &[u8]); 2] = [(1 << 30, &first), (TERABYTE - 5000, &last)];
    let layer = Tarball::new()
        .old_gnu_sparse("old", TERABYTE, &extents)
        .pax_sparse("1.0", "new", TERABYTE, &extents)
        .pax_sparse("0.1", "nothing", TERABYTE, &[]);
    let image = TestImage::of([layer]);
    let start = Instant::now();
    let image = bed.load(&bed.write("sparse.tar", &tar_of(&image.oci_files()?))?)?;
    if start.elapsed() > Duration::from_secs(10) {
        return Err(format!("took {:?}", start.elapsed()).into());
    }
    let metadata = std::fs::metadata(&image.layers.first().ok_or("no layer")?.erofs)?;
    let allocated = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
    if allocated > 8 << 20 || metadata.len() > 256 << 20 {
        return Err(format!("the blob has {} bytes, {allocated} of them allocated", metadata.len()).into());
    }
    // Where the kernel can tell, the content is right too.
    if rustix::process::geteuid().is_root() && std::path::Path::new("/sys/fs/erofs").exists() {
        let mounted = bed.mount_image(&image, "sparse", Shape::Devices)?;
        for name in ["old", "new"] {
            let file = std::fs::File::open(mounted.target.join(name))?;
            let mut buffer = vec![1; 5000];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut buffer, TERABYTE - 5000)?;
            let mut around = vec![1; 6000];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut around, (1 << 30) - 500)?;
            if buffer != last
                || around[..500] != [0; 500]
                || around[500..5500] != first
                || around[5500..] != [0; 500]
            {
                return Err(format!("{name} has the wrong content").into());
            }
        }
    }
    Ok(())
}

fn terabyte_of_claims(bed: &Bed) -> Result<(), Failure> {
    let mut item = Item::file("huge", noise(3000, 1));
    item.claimed_size = Some(1 << 40);
    layer_refused(
        bed,
        Tarball::of([item]),
        &["\"huge\"", "torn", "inside a file's data", "layer 1 of 1", "bad.tar"],
    )
}

/// More entries than any layer has, in few bytes of archive: headers repeat well.
fn millions_of_entries(bed: &Bed) -> Result<(), Failure> {
    use std::io::Write as _;
    let block: Vec<u8> = (0..1000).flat_map(|index| header(&Item::file(format!("f{index}"), ""))).collect();
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1)?;
    for _ in 0..10_000 {
        encoder.write_all(&block)?;
    }
    let layer = encoder.finish()?;
    // The digest does not come to matter.
    let image = TestImage::of([Tarball::new()]);
    let files: Vec<_> = image
        .docker_files()?
        .into_iter()
        .map(|(name, content)| if name.ends_with(".tar") { (name, layer.clone()) } else { (name, content) })
        .collect();
    let archive = bed.write("entries.tar", &tar_of(&files))?;
    let outcome = load_apart(bed.store.root(), &[&archive])?;
    assert_says(&outcome.error.unwrap_or_default(), &["more than 4194304 entries"])?;
    assert_nothing_left(bed)?;
    // The limit on a tree is 1 GiB; one of this many entries is well below it.
    if outcome.peak_memory_kib > 1 << 20 {
        return Err(format!("peak memory of {} KiB", outcome.peak_memory_kib).into());
    }
    Ok(())
}

/// A gigabyte of zeros in a megabyte of gzip, and then much that is not zero in little memory.
fn bombs(bed: &Bed) -> Result<(), Failure> {
    let zeros = Tarball::of([Item::file("zeros", vec![0; 1 << 30])]);
    let image = TestImage::of([zeros]);
    let archive = bed.write("zeros.tar", &tar_of(&image.oci_files()?))?;
    let image = bed.load(&archive)?;
    let layer = image.layers.first().ok_or("no layer")?;
    if layer.erofs_bytes > 1 << 20 {
        return Err(format!("the blob has {} bytes", layer.erofs_bytes).into());
    }
    bed.store.remove("test")?;
    let ones = TestImage::of([Tarball::of([Item::file("ones", vec![1; 128 << 20])])]).packed(Packing::Zstd);
    let ones = bed.write("ones.tar", &tar_of(&ones.oci_files()?))?;
    let outcome = load_apart(bed.store.root(), &[&archive, &ones])?;
    match outcome {
        Outcome { error: None, peak_memory_kib: ..65_536 } => Ok(()),
        Outcome { error, peak_memory_kib } => Err(format!("{error:?}, {peak_memory_kib} KiB").into()),
    }
}

fn torn_archives(bed: &Bed) -> Result<(), Failure> {
    let layer = Tarball::of((0..20).map(|index| Item::file(format!("f{index}"), noise(3000, index))));
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let image = TestImage::of([layer.clone()]).packed(packing);
        // The layer itself is torn, inside an archive that is whole.
        let torn: Vec<_> = image
            .docker_files()?
            .into_iter()
            .map(|(name, mut content)| {
                if name.ends_with(".tar") {
                    content.truncate(content.len() * 3 / 5);
                }
                (name, content)
            })
            .collect();
        assert_says(
            &refused(bed, &tar_of(&torn))?,
            &["layer 1 of 1", "layer.tar in ", "bad.tar", "torn", "at byte"],
        )?;
        // The archive is torn.
        let whole = tar_of(&image.oci_files()?);
        for length in (0..whole.len() - 2048).step_by(whole.len() / 37) {
            refused(bed, &whole[..length])?;
        }
        for compressed in [Packing::Gzip, Packing::Zstd] {
            let mut outer = compressed.pack(&whole)?;
            outer.truncate(outer.len() * 9 / 10);
            assert_says(&refused(bed, &outer)?, &["bad.tar"])?;
        }
    }
    Ok(())
}

/// Changes the file whose name `pick` likes.
fn with_changed(
    files: Vec<(String, Vec<u8>)>,
    pick: impl Fn(&str, &[u8]) -> bool,
    change: impl Fn(&mut Vec<u8>),
) -> Vec<(String, Vec<u8>)> {
    let changed = files.into_iter().map(|(name, mut content)| {
        if pick(&name, &content) {
            change(&mut content);
        }
        (name, content)
    });
    changed.collect()
}

fn wrong_digests(bed: &Bed) -> Result<(), Failure> {
    let image = TestImage::of([Tarball::of([Item::file("file", noise(3000, 1))])]).packed(Packing::Plain);
    let flip = |content: &mut Vec<u8>| {
        let middle = content.len() / 2;
        content[middle] ^= 1;
    };
    let layer_digest = sha256(&image.layers[0]);
    let is_layer = |_: &str, content: &[u8]| sha256(content) == layer_digest;
    let is_json = |text: &'static str| {
        move |_: &str, content: &[u8]| {
            content.starts_with(b"{") && String::from_utf8_lossy(content).contains(text)
        }
    };
    let cases = [
        (
            with_changed(image.oci_files()?, is_layer, flip),
            vec!["digest", layer_digest.as_str(), "layer 1 of 1"],
        ),
        (
            with_changed(image.docker_files()?, is_layer, flip),
            vec!["digest", layer_digest.as_str(), "expected"],
        ),
        (
            with_changed(image.oci_files()?, is_layer, |content| content.push(0)),
            vec!["bytes, expected were", "layer 1 of 1"],
        ),
        (
            with_changed(image.oci_files()?, is_json("diff_ids"), |c| c[2] ^= 1),
            vec!["blobs/sha256/", "expected was"],
        ),
        (
            with_changed(image.oci_files()?, is_json("layers\":["), |c| c[2] ^= 1),
            vec!["blobs/sha256/", "expected was"],
        ),
        (
            with_changed(image.docker_files()?, is_json("diff_ids"), |c| c[2] ^= 1),
            vec![".json", "expected was"],
        ),
    ];
    for (files, expected) in cases {
        assert_says(&refused(bed, &tar_of(&files))?, &expected)?;
    }
    // Damage that a decompressor or the tar parser meets first is told as what it is, too.
    for packing in [Packing::Gzip, Packing::Zstd] {
        let image = image.clone().packed(packing);
        let blob = sha256(&packing.pack(&image.layers[0])?);
        let files = with_changed(image.oci_files()?, |_, content| sha256(content) == blob, flip);
        assert_says(&refused(bed, &tar_of(&files))?, &["layer 1 of 1", "the blob has the digest", &blob])?;
    }
    // The manifest names a blob that is right, but the configuration another archive.
    let other = TestImage::of([Tarball::of([Item::file("other", "x")])]).packed(Packing::Plain);
    let config = blob_file(other.config());
    let files = relinked(&image, &config.1)?;
    assert_says(&refused(bed, &tar_of(&files))?, &["content has the digest", &sha256(&other.layers[0])])?;
    // A layer that is in the store already is checked all the same.
    bed.load(&bed.write("good.tar", &tar_of(&image.oci_files()?))?)?;
    let bad = bed.write("bad.tar", &tar_of(&with_changed(image.oci_files()?, is_layer, flip)))?;
    if !matches!(bed.try_load(&bad), Err(LoadError::Layer { .. })) {
        return Err("a damaged layer was taken as it was in the store already".into());
    }
    Ok(())
}

/// The image's OCI layout with another configuration.
fn relinked(image: &TestImage, config: &[u8]) -> Result<Vec<(String, Vec<u8>)>, Failure> {
    let layer = image.packing.pack(&image.layers[0])?;
    let manifest = json!({
        "schemaVersion": 2,
        "config": descriptor("application/vnd.oci.image.config.v1+json", config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    });
    layout_of(&manifest, vec![blob_file(layer), blob_file(config.to_vec())])
}

fn layout_of(manifest: &Value, mut blobs: Vec<(String, Vec<u8>)>) -> Result<Vec<(String, Vec<u8>)>, Failure> {
    let manifest = manifest.to_string().into_bytes();
    let entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    blobs.push(blob_file(manifest));
    blobs.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
    blobs.push((
        "index.json".to_owned(),
        json!({"schemaVersion": 2, "manifests": [entry]}).to_string().into_bytes(),
    ));
    Ok(blobs)
}

fn wrong_manifests(bed: &Bed) -> Result<(), Failure> {
    let image = TestImage::of([Tarball::of([Item::file("file", "x")])]);
    let replace = |name: &'static str, content: String| -> Result<Vec<u8>, Failure> {
        let changed =
            with_changed(image.oci_files()?, |file, _| file == name, |old| *old = content.clone().into());
        Ok(tar_of(&changed))
    };
    let docker = |content: String| -> Result<Vec<u8>, Failure> {
        let changed = with_changed(
            image.docker_files()?,
            |file, _| file == "manifest.json",
            |old| *old = content.clone().into(),
        );
        Ok(tar_of(&changed))
    };
    let other_platform = TestImage { architecture: "arm64", ..image.clone() };
    let digest = format!("sha256:{}", "0".repeat(64));
    let entry = |media_type: &str, digest: &str| {
        json!({"schemaVersion": 2, "manifests": [{"mediaType": media_type, "digest": digest, "size": 2}]})
            .to_string()
    };
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let artifact = json!({
        "schemaVersion": 2,
        "config": descriptor("application/vnd.cncf.helm.config.v1+json", b"{}"),
        "layers": [],
    });
    let many_layers = TestImage { layers: vec![image.layers[0].clone(); 128], ..image.clone() };
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (replace("index.json", "{".into())?, &["index.json is malformed"]),
        (replace("index.json", " ".repeat(5 << 20))?, &["index.json has 5242880 bytes"]),
        (replace("index.json", entry(manifest_type, &digest))?, &["blobs/sha256/0000", "index.json names"]),
        (replace("index.json", entry(manifest_type, "sha512:00"))?, &["index.json"]),
        (replace("index.json", entry(manifest_type, "sha256:../../../etc/passwd"))?, &["index.json"]),
        (replace("index.json", entry("application/x-thing", &digest))?, &["holds no image"]),
        (replace("oci-layout", r#"{"imageLayoutVersion":"9.0.0"}"#.into())?, &["9.0.0"]),
        (tar_of(&other_platform.oci_files()?), &["linux/amd64", "linux/arm64"]),
        (tar_of(&other_platform.docker_files()?), &["linux/amd64", "linux/arm64"]),
        (tar_of(&layout_of(&artifact, vec![blob_file(b"{}".to_vec())])?), &["helm", "not an image"]),
        (tar_of(&many_layers.docker_files()?), &["128 layers"]),
        (docker("[]".into())?, &["holds no image"]),
        (docker("{}".into())?, &["manifest.json is malformed"]),
        (docker(r#"[{"Config":"../../etc/passwd","Layers":[]}]"#.into())?, &["has no ../../etc/passwd"]),
        (docker(r#"[{"Config":"no.json","Layers":[]}]"#.into())?, &["has no no.json", "incomplete"]),
    ];
    for (archive, expected) in cases {
        assert_says(&refused(bed, &archive)?, expected)?;
    }
    Ok(())
}

fn not_images(bed: &Bed) -> Result<(), Failure> {
    for (content, expected) in [
        (Vec::new(), "holds no image"),
        (b"hello".to_vec(), "torn"),
        (noise(10_000, 1), "not a tar archive"),
        (tar_of(&[("etc/passwd".to_owned(), b"x".to_vec())]), "holds no image"),
        (b"BZh91AY&SY".to_vec(), "bad.tar"),
        (b"\xfd7zXZ\0\0".to_vec(), "bad.tar"),
        (b"\x1f\x8bgarbage that is no gzip".to_vec(), "bad.tar"),
    ] {
        assert_says(&refused(bed, &content)?, &[expected])?;
    }
    let missing = bed.try_load(&bed.path("missing")).err().ok_or("loaded what is not there")?;
    assert_says(&chain(&missing), &["cannot read", "missing", "No such file"])?;
    // A directory whose files lead out of it, or would make us wait.
    let directory = bed.path("directory");
    let image = TestImage::of([Tarball::of([Item::file("file", "x")])]);
    write_directory(&directory, &image.oci_files()?)?;
    std::fs::remove_file(directory.join("index.json"))?;
    std::os::unix::fs::symlink("/etc/passwd", directory.join("index.json"))?;
    let error = bed.try_load(&directory).err().ok_or("followed a link out of the directory")?;
    assert_says(&chain(&error), &["index.json"])?;
    std::fs::remove_file(directory.join("index.json"))?;
    run("mkfifo", &[&directory.join("index.json").display().to_string()])?;
    let error = bed.try_load(&directory).err().ok_or("read a FIFO")?;
    assert_says(&chain(&error), &["index.json", "not a regular file"])?;
    assert_nothing_left(bed)
}

/// A store on a file system that is too small for the image.
fn full_disk(bed: &Bed) -> Result<(), Failure> {
    let small = bed.path("small");
    std::fs::create_dir(&small)?;
    run("mount", &["-t", "tmpfs", "-o", "size=4m", "tmpfs", &small.display().to_string()])?;
    let _mount = crate::bed::Mount { target: small.clone() };
    let image = TestImage::of([
        Tarball::of([Item::file("fits", noise(1 << 20, 1))]),
        Tarball::of([Item::file("does-not-fit", noise(8 << 20, 2))]),
    ]);
    let archive = bed.write("image.tar", &tar_of(&image.oci_files()?))?;
    let outcome = load_apart(&small, &[&archive])?;
    assert_says(&outcome.error.unwrap_or_default(), &["layer 2 of 2", "No space left"])?;
    // Through the scratch file too.
    let compressed = bed.write("image.tar.gz", &Packing::Gzip.pack(&std::fs::read(&archive)?)?)?;
    let outcome = load_apart(&small, &[&compressed])?;
    assert_says(&outcome.error.unwrap_or_default(), &["No space left"])?;
    let free = rustix::fs::statvfs(&small)?;
    if std::fs::read_dir(small.join("layers/sha256"))?.next().is_some()
        || free.f_bavail * free.f_frsize < 3 << 20
    {
        return Err("something was left on the full disk".into());
    }
    // And the store still works.
    let small_image = TestImage::of([Tarball::of([Item::file("small", "x")])]);
    let outcome = load_apart(&small, &[&bed.write("small.tar", &tar_of(&small_image.oci_files()?))?])?;
    outcome.error.map_or(Ok(()), |error| Err(error.into()))
}
