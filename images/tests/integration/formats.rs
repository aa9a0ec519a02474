//! All forms in which images come, and what the store does with their names.

use cloche_images::{LoadOptions, NoProgress, RemoveError, ResolveError};
use libtest_mimic::Trial;
use serde_json::json;

use crate::archive::{Packing, TestImage, blob_file, descriptor, tar_of, write_directory};
use crate::bed::{Bed, Failure, Need, chain, run, test};
use crate::tarball::{Item, Tarball};
use crate::{erofs, layers};

pub fn tests() -> Vec<Trial> {
    vec![
        test("image_in_every_form_gives_the_same_layers", &[], every_form),
        test("layer_through_links_of_the_archive_is_found", &[], linked_layers),
        test("archive_with_both_manifests_is_loaded_by_the_oci_one", &[], both_manifests),
        test("archive_of_several_images_is_loaded_whole", &[], several_images),
        test("index_of_several_platforms_gives_the_one_that_runs_here", &[], platforms),
        test("names_are_normalised_moved_and_removed", &[], names),
        test("image_without_a_name_takes_the_given_one", &[], given_name),
        test("inspection_shows_what_docker_shows", &[], inspection),
        test("sparse_file_in_every_encoding_is_the_same", &[], sparse_encodings),
        test("pipe_is_loaded_like_a_file", &[], pipe),
        test("archives_of_other_tools_are_loaded", &[Need::Tool("skopeo"), Need::Tool("umoci")], other_tools),
        test(
            "archives_packed_by_bzip2_and_xz_are_loaded",
            &[Need::Tool("bzip2"), Need::Tool("xz")],
            other_compressors,
        ),
        test("archives_of_buildah_are_loaded", &[Need::Root, Need::Tool("buildah")], buildah),
    ]
}

fn small(content: &str) -> TestImage {
    TestImage::of([Tarball::of([Item::directory("./"), Item::file("./file", content)])])
}

fn expect(what: &str, condition: bool) -> Result<(), Failure> {
    if condition { Ok(()) } else { Err(format!("expected: {what}").into()) }
}

fn every_form(bed: &Bed) -> Result<(), Failure> {
    let mut blobs = Vec::new();
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let image = small("x").packed(packing);
        for (form, files) in [("oci", image.oci_files()?), ("docker", image.docker_files()?)] {
            let directory = bed.path(&format!("{form}-{packing:?}"));
            write_directory(&directory, &files)?;
            let tar = tar_of(&files);
            let mut sources = vec![directory];
            for outer in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
                sources.push(bed.write(&format!("{form}-{packing:?}-{outer:?}.tar"), &outer.pack(&tar)?)?);
            }
            for source in sources {
                let image = bed.load(&source).map_err(|error| format!("{}: {error}", source.display()))?;
                expect(
                    "the name of the archive",
                    image.names.iter().any(|name| name.short() == "test:latest"),
                )?;
                expect("a manifest in OCI layouts only", image.manifest.is_some() == (form == "oci"))?;
                blobs.push(std::fs::read(&image.layers.first().ok_or("no layer")?.erofs)?);
                bed.store.remove("test")?;
            }
        }
    }
    expect("the same bytes each time", blobs.windows(2).all(|pair| pair[0] == pair[1]))
}

/// Docker takes archives, but not layers, that bzip2 and xz have packed.
fn other_compressors(bed: &Bed) -> Result<(), Failure> {
    let image = small("x").packed(Packing::Plain);
    let archive = bed.write("image.tar", &tar_of(&image.docker_files()?))?.display().to_string();
    let packed = |tool: &str, options: &[&str]| -> Result<_, Failure> {
        let path = bed.path(&format!("image.tar.{tool}"));
        run("sh", &["-c", &format!("{tool} {} -c {archive} >{}", options.join(" "), path.display())])?;
        Ok(path)
    };
    for (tool, options) in [("bzip2", &[][..]), ("xz", &[]), ("xz", &["-9", "--check=sha256"])] {
        bed.load(&packed(tool, options)?).map_err(|error| format!("{tool}: {error}"))?;
        bed.store.remove("test")?;
    }
    // What claims to need more memory than anybody's does gets none.
    let greedy = bed.try_load(&packed("xz", &["--lzma2=dict=512MiB"])?);
    let said = greedy.err().map(|error| chain(&error)).ok_or("an xz stream got 512 MiB of memory")?;
    expect(&format!("it says so: {said}"), said.contains("memory"))?;
    for tool in ["bzip2", "xz"] {
        let layer = bed.write("layer.tar", &image.layers[0])?.display().to_string();
        let path = bed.path("layer.packed").display().to_string();
        run("sh", &["-c", &format!("{tool} -c {layer} >{path}")])?;
        let mut files = image.docker_files()?;
        let member = files.iter_mut().find(|(name, _)| name.ends_with("layer.tar")).ok_or("no layer")?;
        member.1 = std::fs::read(&path)?;
        let refused = bed.try_load(&bed.write("bad.tar", &tar_of(&files))?);
        let said = refused.err().map(|error| chain(&error)).ok_or("such a layer was loaded")?;
        expect(&format!("{tool} is named: {said}"), said.contains(tool))?;
    }
    Ok(())
}

/// `docker save` of old wrote layers that others have as links.
fn linked_layers(bed: &Bed) -> Result<(), Failure> {
    let image = small("x").packed(Packing::Plain);
    let files = image.docker_files()?;
    let mut tar = Tarball::new();
    for (name, content) in &files {
        if name.ends_with("/layer.tar") {
            tar = tar
                .add(Item::symlink(name, "../link.tar"))
                .add(Item::hard_link("link.tar", "real.tar"))
                .add(Item::file("./real.tar", content));
        } else {
            tar = tar.add(Item::file(format!("./{name}"), content));
        }
    }
    bed.load(&bed.write("linked.tar", &tar.finish())?)?;
    Ok(())
}

/// `docker save` since Docker 25: an OCI layout, with a `manifest.json` for older readers.
fn both_manifests(bed: &Bed) -> Result<(), Failure> {
    let image = small("x").packed(Packing::Plain);
    let mut files = image.oci_files()?;
    let is_index = |(name, _): &&mut (String, Vec<u8>)| name == "index.json";
    let (_, index) = files.iter_mut().find(is_index).ok_or("no index")?;
    let mut entry = serde_json::from_slice::<serde_json::Value>(index)?["manifests"][0].clone();
    // Two tags of one image: a descriptor for each.
    let tagged = ["v1", "v2"].map(|tag| {
        entry["annotations"] = json!({
            "io.containerd.image.name": format!("docker.io/library/both:{tag}"),
            "org.opencontainers.image.ref.name": tag,
        });
        entry.clone()
    });
    *index = json!({"schemaVersion": 2, "manifests": tagged}).to_string().into_bytes();
    let (config, _) = blob_file(image.config());
    let (layer, _) = blob_file(image.layers[0].clone());
    let manifest = json!([{"Config": config, "RepoTags": ["both:v1", "both:v2"], "Layers": [layer]}]);
    files.push(("manifest.json".to_owned(), manifest.to_string().into_bytes()));
    let loaded = bed.load(&bed.write("both.tar", &tar_of(&files))?)?;
    let names: Vec<String> = loaded.names.iter().map(|name| name.short()).collect();
    expect("both names and a manifest", names == ["both:v1", "both:v2"] && loaded.manifest.is_some())?;
    // The older manifest alone.
    files.retain(|(name, _)| name != "index.json" && name != "oci-layout");
    let older = bed.load(&bed.write("older.tar", &tar_of(&files))?)?;
    expect("the same image", older.id == loaded.id && older.names.len() == 2)
}

fn several_images(bed: &Bed) -> Result<(), Failure> {
    let (one, two) = (small("one"), small("two"));
    let mut files = Vec::new();
    let mut manifest = Vec::new();
    for (image, tags) in [(&one, json!(["one", "also/one:v1"])), (&two, json!(null))] {
        let image_files = image.docker_files()?;
        let entries: serde_json::Value = serde_json::from_slice(&image_files.last().ok_or("no manifest")?.1)?;
        let mut entry = entries[0].clone();
        entry["RepoTags"] = tags;
        manifest.push(entry);
        files.extend(image_files.into_iter().filter(|(name, _)| name != "manifest.json"));
    }
    files.push(("manifest.json".to_owned(), json!(manifest).to_string().into_bytes()));
    let loaded = bed.try_load(&bed.write("two.tar", &tar_of(&files))?).map_err(|error| chain(&error))?;
    let names: Vec<Vec<String>> =
        loaded.iter().map(|image| image.names.iter().map(|name| name.short()).collect()).collect();
    expect(
        "two images, one of them without a name",
        names == [vec!["one:latest".to_owned(), "also/one:v1".to_owned()], vec![]],
    )?;
    let unnamed = loaded.last().ok_or("nothing loaded")?.id;
    expect("the nameless image by its ID", bed.store.resolve(&unnamed.hex()[..12])?.id == unnamed)?;
    // One bad image, and none of them is there.
    let bad: Vec<_> = files
        .iter()
        .cloned()
        .map(
            |(name, content)| {
                if content == two.layers[0] { (name, b"bad".to_vec()) } else { (name, content) }
            },
        )
        .collect();
    for image in bed.store.images()? {
        for name in &image.names {
            bed.store.remove(&name.to_string())?;
        }
        let _ = bed.store.remove(&image.id.to_string());
    }
    let bad = bed.write("bad.tar", &tar_of(&bad))?;
    let _ = bed.try_load(&bad);
    expect("nothing or everything", matches!(bed.store.images()?.len(), 0 | 2))
}

fn platforms(bed: &Bed) -> Result<(), Failure> {
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    let mut files = vec![("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec())];
    let mut entries = Vec::new();
    for (architecture, variant) in [("arm64", "v8"), ("amd64", "v3"), ("amd64", ""), ("unknown", "")] {
        let image = TestImage { architecture, ..small(&format!("{architecture}{variant}")) };
        let image_files = image.oci_files()?;
        let manifest = image_files
            .iter()
            .find(|(_, content)| content.starts_with(b"{\"config\""))
            .ok_or("no manifest")?;
        let mut entry = descriptor(MANIFEST, &manifest.1);
        entry["platform"] = json!({"os": "linux", "architecture": architecture});
        if !variant.is_empty() {
            entry["platform"]["variant"] = json!(variant);
        }
        if architecture == "unknown" {
            entry["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
        }
        entries.push(entry);
        files.extend(image_files.into_iter().filter(|(name, _)| name.starts_with("blobs/")));
    }
    let with_index = |entries: &[serde_json::Value]| {
        let inner =
            json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).to_string().into_bytes();
        let mut entry = descriptor(INDEX, &inner);
        entry["annotations"] = json!({"io.containerd.image.name": "quay.io/multi/arch:v2"});
        let outer = json!({"schemaVersion": 2, "manifests": [entry]}).to_string().into_bytes();
        let mut files = files.clone();
        files.push(blob_file(inner));
        files.push(("index.json".to_owned(), outer));
        tar_of(&files)
    };
    let image = bed.load(&bed.write("multi.tar", &with_index(&entries))?)?;
    expect(
        "the plain amd64 one",
        image.manifest.map(|digest| digest.to_string()) == entries[2]["digest"].as_str().map(str::to_owned),
    )?;
    expect("containerd's name", image.names.iter().any(|name| name.to_string() == "quay.io/multi/arch:v2"))?;
    let others = bed.write("others.tar", &with_index(&entries[..1]))?;
    let error = bed.try_load(&others).err().ok_or("loaded an image for another machine")?;
    expect("what there is instead", chain(&error).contains("linux/arm64/v8"))
}

fn names(bed: &Bed) -> Result<(), Failure> {
    let store = &bed.store;
    let load = |content: &str, name: &str| -> Result<_, Failure> {
        let image = TestImage { name: Some(name.to_owned()), ..small(content) };
        bed.load(&bed.write("image.tar", &tar_of(&image.docker_files()?))?)
    };
    let first = load("first", "app")?;
    let again = load("first", "docker.io/library/app:v1")?;
    expect("one image with two names", first.id == again.id && again.names.len() == 2)?;
    for name in
        ["app", "app:latest", "library/app", "docker.io/library/app:v1", "index.docker.io/library/app"]
    {
        expect(name, store.resolve(name)?.id == first.id)?;
    }
    let hex = first.id.hex();
    for id in
        [hex.as_str(), &hex[..12], &hex[..3], &format!("sha256:{hex}"), &format!("sha256:{}", &hex[..7])]
    {
        expect(id, store.resolve(id)?.id == first.id)?;
    }
    expect("no such name", matches!(store.resolve("app:v2"), Err(ResolveError::NotFound(_))))?;
    expect("no such form", matches!(store.resolve("App!"), Err(ResolveError::Reference(_))))?;
    // The name moves; the first image keeps its other one.
    let second = load("second", "app")?;
    expect("the new image", store.resolve("app")?.id == second.id)?;
    expect("the old image", store.resolve("app:v1")?.id == first.id)?;
    expect("any image", matches!(store.resolve(""), Err(ResolveError::Reference(_))))?;
    load("second", "other")?;
    expect(
        "an image of two names is not removed by its ID",
        matches!(store.remove(&second.id.to_string()), Err(RemoveError::SeveralNames { .. })),
    )?;
    let removed = store.remove("other")?;
    expect(
        "only the name is gone",
        removed.deleted.is_none() && removed.untagged == ["docker.io/library/other:latest"],
    )?;
    expect("its layer is still there", second.layers[0].erofs.exists())?;
    expect("the image is gone", store.remove("app")?.deleted == Some(second.id))?;
    expect("its layer too", !second.layers[0].erofs.exists())?;
    expect("the other image's not", first.layers[0].erofs.exists())?;
    expect("by its ID", store.remove(&hex[..12])?.deleted == Some(first.id))?;
    expect("nothing is left", store.images()?.is_empty() && !first.layers[0].erofs.exists())?;
    // By the manifest's digest.
    let pinned = bed.load(&bed.write("image.tar", &tar_of(&small("third").oci_files()?))?)?;
    let digest = pinned.manifest.ok_or("no manifest")?;
    expect("by digest", store.resolve(&format!("test@{digest}"))?.id == pinned.id)?;
    expect("of another repository", store.resolve(&format!("other@{digest}")).is_err())?;
    // While someone holds the store, the name goes, and the layer stays for the time being.
    let hold = store.hold()?;
    store.remove("test")?;
    expect("the layer is held", pinned.layers[0].erofs.exists())?;
    drop(hold);
    load("fourth", "next")?;
    expect("the layer is swept", !pinned.layers[0].erofs.exists())
}

fn given_name(bed: &Bed) -> Result<(), Failure> {
    let image = TestImage { name: Some("latest".to_owned()), ..small("x") };
    let archive = bed.write("image.tar", &tar_of(&image.oci_files()?))?;
    expect("a tag alone is no name", bed.load(&archive)?.names.is_empty())?;
    let options = LoadOptions { name: Some("given:v1".parse()?) };
    bed.store.load(&archive, &options, &NoProgress)?;
    expect("the given name", bed.store.resolve("given:v1")?.names.len() == 1)
}

fn inspection(bed: &Bed) -> Result<(), Failure> {
    let image = bed.load(&bed.write("image.tar", &tar_of(&small("x").oci_files()?))?)?;
    let shown = serde_json::to_value(image.inspect())?;
    for (pointer, expected) in [
        ("/Id", json!(image.id.to_string())),
        ("/RepoTags", json!(["test:latest"])),
        ("/RepoDigests/0", json!(format!("test@{}", image.manifest.ok_or("no manifest")?))),
        ("/Architecture", json!("amd64")),
        ("/Os", json!("linux")),
        ("/Config/Cmd", json!(["sh"])),
        ("/Config/Env/0", json!("PATH=/bin")),
        ("/Config/Entrypoint", json!(null)),
        ("/RootFS/Type", json!("layers")),
        ("/RootFS/Layers/0", json!(image.layers[0].diff_id.to_string())),
        ("/Size", json!(image.layers[0].erofs_bytes)),
    ] {
        expect(
            &format!("{pointer} is {expected}, not {:?}", shown.pointer(pointer)),
            shown.pointer(pointer) == Some(&expected),
        )?;
    }
    Ok(())
}

fn sparse_encodings(bed: &Bed) -> Result<(), Failure> {
    let image = TestImage::of([layers::sparse(&layers::SPARSE_FORMATS)]);
    let image = bed.load(&bed.write("image.tar", &tar_of(&image.oci_files()?))?)?;
    let blob = std::fs::read(&image.layers[0].erofs)?;
    // Twelve files of 40 MiB.
    expect("holes are not stored", blob.len() < 20 << 20)?;
    let files = erofs::read(&blob)?;
    let content =
        |format: &str, name: &str| files.get(format!("{format}-{name}").as_bytes()).map(|file| &file.content);
    for name in ["none", "few", "many"] {
        for format in layers::SPARSE_FORMATS {
            let same = content(format, name).is_some() && content(format, name) == content("1.0", name);
            expect(&format!("{format}-{name} is as the others"), same)?;
        }
    }
    Ok(())
}

fn pipe(bed: &Bed) -> Result<(), Failure> {
    let archive = tar_of(&small("x").docker_files()?);
    let fifo = bed.path("fifo");
    run("mkfifo", &[&fifo.display().to_string()])?;
    let writer = std::thread::spawn({
        let fifo = fifo.clone();
        move || std::fs::write(fifo, archive)
    });
    bed.load(&fifo)?;
    Ok(writer.join().map_err(|_| "the writer panicked")??)
}

fn other_tools(bed: &Bed) -> Result<(), Failure> {
    let layout = bed.path("umoci");
    let layer = bed.write("layer.tar", &Tarball::of([Item::file("a", "x")]).finish())?;
    let tagged = format!("{}:v1", layout.display());
    run("umoci", &["init", "--layout", &layout.display().to_string()])?;
    run("umoci", &["new", "--image", &tagged])?;
    run("umoci", &["raw", "add-layer", "--image", &tagged, &layer.display().to_string()])?;
    let image = bed.load(&layout)?;
    let from = format!("oci:{tagged}");
    for (transport, name) in [("docker-archive", "d.tar"), ("oci-archive", "o.tar")] {
        let path = bed.path(name);
        let to = format!("{transport}:{}:example.org/tools/{name}:v2", path.display());
        run("skopeo", &["copy", "--quiet", &from, &to])?;
        let copied = bed.load(&path)?;
        expect("the same layers", copied.layers == image.layers)?;
        let expected = format!("example.org/tools/{name}:v2");
        expect(&expected, copied.names.iter().any(|other| other.to_string() == expected))?;
    }
    for format in ["--dest-compress-format=zstd", "--dest-compress-format=gzip"] {
        let directory = bed.path(format.trim_start_matches("--dest-compress-format="));
        let to = format!("oci:{}:x", directory.display());
        run("skopeo", &["copy", "--quiet", "--dest-compress", format, &from, &to])?;
        expect("the same layers", bed.load(&directory)?.layers == image.layers)?;
    }
    Ok(())
}

fn buildah(bed: &Bed) -> Result<(), Failure> {
    let layer = bed.write("file", b"content")?;
    let root = bed.path("buildah-root").display().to_string();
    let run_root = bed.path("buildah-run").display().to_string();
    let buildah = |arguments: &[&str]| {
        let storage = ["--root", &root, "--runroot", &run_root, "--storage-driver", "vfs"];
        run("buildah", &[&storage, arguments].concat())
    };
    let container = buildah(&["from", "scratch"])?;
    let container = container.trim();
    buildah(&["copy", container, &layer.display().to_string(), "/file"])?;
    buildah(&["config", "--cmd", "/file", container])?;
    buildah(&["commit", "--quiet", container, "built"])?;
    for (transport, name) in [("docker-archive", "b.tar"), ("oci-archive", "bo.tar")] {
        let path = bed.path(name);
        let to = format!("{transport}:{}:built:v3", path.display());
        buildah(&["push", "--quiet", "localhost/built", &to])?;
        bed.load(&path)?;
    }
    Ok(())
}
