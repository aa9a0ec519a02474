//! Images on their way out, and the store's upkeep: saved archives, checks, prunes, and what layers are for.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cloche_images::{Damage, NoProgress, Store};
use libtest_mimic::Trial;

use crate::archive::{Packing, TestImage, tar_of};
use crate::bed::{Bed, Failure, Need, chain, run, sha256, test};
use crate::layers::noise;
use crate::tarball::{Item, Tarball};

pub fn tests() -> Vec<Trial> {
    vec![
        test("saved_image_is_loaded_with_its_digest_and_name", &[], comes_back),
        test("saved_archive_is_the_same_each_time", &[], reproducible),
        test("saved_archive_is_read_by_skopeo_in_both_forms", &[Need::Tool("skopeo")], skopeo_reads),
        test("saved_directory_is_a_layout", &[], directory),
        test("image_that_has_changed_on_disk_is_found_out", &[], verified),
        test("tag_and_prune_change_names_and_space", &[], upkeep),
        test("layers_are_told_with_what_they_hide", &[], layers),
        test("real_image_is_saved_and_loaded", &[Need::RealImages], real),
    ]
}

fn expect(what: &str, condition: bool) -> Result<(), Failure> {
    if condition { Ok(()) } else { Err(format!("expected: {what}").into()) }
}

fn sample() -> TestImage {
    let mut holes = noise(400_000, 3);
    holes[100_000..300_000].fill(0);
    let base = Tarball::of([
        Item::directory("d"),
        Item::file("d/x", noise(5000, 1)),
        Item::file("holes", holes),
        Item::file("motd", "hello"),
        Item::hard_link("link", "motd"),
    ]);
    let top =
        Tarball::of([Item::file("motd", "other"), Item::file(".wh.d", ""), Item::file("new", noise(10, 1))]);
    TestImage::of([base, top])
}

fn save(store: &Store, images: &[&str], path: PathBuf) -> Result<PathBuf, Failure> {
    let images: Vec<String> = images.iter().map(ToString::to_string).collect();
    store.save(&images, &mut fs::File::create(&path)?).map_err(|error| chain(&error))?;
    Ok(path)
}

fn comes_back(bed: &Bed) -> Result<(), Failure> {
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        for (form, files) in [
            ("oci", sample().packed(packing).oci_files()?),
            ("docker", sample().packed(packing).docker_files()?),
        ] {
            let what = format!("{form}-{packing:?}");
            let store = Store::open(&bed.path(&format!("first-{what}")))?;
            let archive = bed.write("in.tar", &tar_of(&files))?;
            store.load(&archive, &Default::default(), &NoProgress)?;
            let before = store.resolve("test")?;
            let saved = save(&store, &["test"], bed.path("out.tar"))?;
            let other = Store::open(&bed.path(&format!("second-{what}")))?;
            other.load(&saved, &Default::default(), &NoProgress)?;
            let (now, after) = (store.resolve("test")?, other.resolve("test")?);
            expect(&format!("{what}: the same image"), before.id == after.id)?;
            expect(
                &format!("{what}: the same manifest"),
                now.manifest.is_some() && now.manifest == after.manifest,
            )?;
            expect(
                &format!("{what}: its own manifest"),
                before.manifest.is_none_or(|own| Some(own) == after.manifest),
            )?;
            for (one, two) in before.layers.iter().zip(&after.layers) {
                expect(&format!("{what}: the same layers"), fs::read(&one.erofs)? == fs::read(&two.erofs)?)?;
            }
        }
    }
    Ok(())
}

fn reproducible(bed: &Bed) -> Result<(), Failure> {
    let archive = bed.write("in.tar", &tar_of(&sample().packed(Packing::Plain).docker_files()?))?;
    let mut saved = Vec::new();
    for name in ["a", "b"] {
        let store = Store::open(&bed.path(name))?;
        store.load(&archive, &Default::default(), &NoProgress)?;
        saved.push(fs::read(save(&store, &["test"], bed.path("out.tar"))?)?);
        saved.push(fs::read(save(&store, &["test"], bed.path("out.tar"))?)?);
    }
    expect("four times the same bytes", saved.windows(2).all(|pair| pair[0] == pair[1]))
}

fn skopeo_reads(bed: &Bed) -> Result<(), Failure> {
    bed.load(&bed.write("in.tar", &tar_of(&sample().oci_files()?))?)?;
    let saved = save(&bed.store, &["test"], bed.path("out.tar"))?;
    let digest = bed.store.resolve("test")?.manifest.ok_or("no manifest")?.to_string();
    for form in ["docker-archive", "oci-archive"] {
        let seen = run(
            "skopeo",
            &["inspect", "--format", "{{.Digest}} {{.Layers}}", &format!("{form}:{}", saved.display())],
        )?;
        expect(&format!("{form}: two layers: {seen}"), seen.matches("sha256:").count() == 3)?;
        expect(&format!("{form}: the digest"), form == "docker-archive" || seen.contains(&digest))?;
        let target = format!("oci:{}", bed.path(form).display());
        run("skopeo", &["copy", "-q", &format!("{form}:{}", saved.display()), &target])?;
        let copied = bed.load(&bed.path(form))?;
        let layers =
            |image: &cloche_images::Image| image.layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>();
        expect(&format!("{form}: the layers"), layers(&copied) == layers(&bed.store.resolve("test")?))?;
    }
    Ok(())
}

fn directory(bed: &Bed) -> Result<(), Failure> {
    let image = bed.load(&bed.write("in.tar", &tar_of(&sample().oci_files()?))?)?;
    let target = bed.path("layout");
    // By its id: without a name.
    let id = image.id.to_string();
    bed.store.save_to_directory(std::slice::from_ref(&id), &target).map_err(|error| chain(&error))?;
    expect("a second time there is something there", bed.store.save_to_directory(&[id], &target).is_err())?;
    let store = Store::open(&bed.path("other"))?;
    let loaded = store.load(&target, &Default::default(), &NoProgress)?;
    expect("no name", loaded.len() == 1 && loaded[0].names.is_empty() && loaded[0].id == image.id)
}

fn flip(path: &Path, at: u64) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
    let file = fs::File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 1], at)?;
    Ok(())
}

fn verified(bed: &Bed) -> Result<(), Failure> {
    for (name, packing) in [("plain", Packing::Plain), ("zstd", Packing::Zstd)] {
        let store = Store::open(&bed.path(name))?;
        let files = sample().packed(packing).oci_files()?;
        store.load(&bed.write("in.tar", &tar_of(&files))?, &Default::default(), &NoProgress)?;
        let image = store.resolve("test")?;
        expect("a fresh image is whole", store.verify("test")?.is_empty())?;
        // The first file's data, and what stands behind all data.
        let erofs = &image.layers[0].erofs;
        for at in [4096, image.layers[0].erofs_bytes - 4000] {
            flip(erofs, at)?;
            let damage = store.verify("test")?;
            let found = matches!(damage.as_slice(), [Damage::Converted { .. } | Damage::Archive { .. }]);
            expect(&format!("{name}: a changed byte at {at} is found: {damage:?}"), found)?;
            flip(erofs, at)?;
        }
        let kept = match packing {
            Packing::Plain => store.root().join("recipes/sha256").join(image.layers[0].diff_id.hex()),
            _ => store.root().join("blobs/sha256").join(sha256(&packing.pack(&sample().layers[0])?)),
        };
        flip(&kept, 60)?;
        let damage = store.verify("test")?;
        expect(&format!("{name}: a changed {} is found", kept.display()), damage.len() == 1)?;
        let error = store
            .save(&["test".to_owned()], &mut std::io::sink())
            .err()
            .ok_or("a damaged layer was saved")?;
        expect("and is not saved", !chain(&error).is_empty())?;
    }
    Ok(())
}

fn upkeep(bed: &Bed) -> Result<(), Failure> {
    let image = bed.load(&bed.write("in.tar", &tar_of(&sample().oci_files()?))?)?;
    bed.store.tag("test", &"localhost:5000/other:1".parse()?)?;
    expect("two names", bed.store.resolve("localhost:5000/other:1")?.names.len() == 2)?;
    // Another image takes one name; the first keeps the other, then loses it, too.
    let second = bed.load(
        &bed.write("b.tar", &tar_of(&TestImage::of([Tarball::of([Item::file("f", "x")])]).oci_files()?))?,
    )?;
    expect("the name moved", bed.store.resolve("test")?.id == second.id)?;
    bed.store.tag("test", &"localhost:5000/other:1".parse()?)?;
    expect("the first has no name", bed.store.resolve(&image.id.to_string())?.names.is_empty())?;
    fs::write(bed.store.root().join("partial/sha256/0"), noise(10_000, 1))?;
    let usage = bed.store.usage()?;
    expect("all is counted", usage.layers > 200_000 && usage.blobs > 0 && usage.partial >= 10_000)?;
    let kept = bed.store.prune(false, |id| id == image.id)?;
    expect("what is needed stays, and a download goes", kept.images.is_empty() && kept.bytes >= 10_000)?;
    let pruned = bed.store.prune(false, |_| false)?;
    expect("what has no name goes", pruned.images == [image.id] && pruned.bytes > 200_000)?;
    expect("the other stays", bed.store.resolve("test")?.id == second.id)?;
    let pruned = bed.store.prune(true, |_| false)?;
    expect("all goes", pruned.images == [second.id] && bed.store.images()?.is_empty())?;
    expect("nothing is left", bed.store.usage()?.layers == 0)
}

fn layers(bed: &Bed) -> Result<(), Failure> {
    bed.load(&bed.write("in.tar", &tar_of(&sample().oci_files()?))?)?;
    let reports = bed.store.layers_of("test").map_err(|error| chain(&error))?;
    let counts: Vec<_> = reports
        .iter()
        .map(|report| (report.added, report.changed, report.hidden, report.bytes, report.wasted))
        .collect();
    // d/x with 5000 bytes goes, and `hello` is changed.
    expect(
        &format!("what the layers say: {counts:?}"),
        counts == [(4, 0, 0, 405_005, 5005), (1, 1, 1, 15, 0)],
    )
}

fn real(bed: &Bed) -> Result<(), Failure> {
    let archive = crate::bed::real_image("debian").ok_or("no debian")?;
    bed.store.load(&archive, &Default::default(), &NoProgress)?;
    let saved = save(&bed.store, &["debian"], bed.path("out.tar"))?;
    let store = Store::open(&bed.path("other"))?;
    store.load(&saved, &Default::default(), &NoProgress)?;
    expect("the same image", store.resolve("debian")?.id == bed.store.resolve("debian")?.id)?;
    expect("it is whole", store.verify("debian")?.is_empty() && bed.store.verify("debian")?.is_empty())
}
