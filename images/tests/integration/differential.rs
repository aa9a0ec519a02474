//! The same image, unpacked by `umoci` or by a Docker daemon and converted by us, must be the same tree. Where these two
//! differ, decision 0042 says whom we follow, and the tests here say that they do.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use libtest_mimic::Trial;
use rustix::mount::MountFlags;

use crate::archive::{Packing, TestImage, tar_of, write_directory};
use crate::bed::{Bed, Failure, Need, Shape, real_image, run, test};
use crate::engines::{Docker, Driver, Engine};
use crate::layers;
use crate::tarball::{Item, Tarball};
use crate::tree::{Kind, Tree, assert_same, walk};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::Tool("umoci"), Need::Tool("fsck.erofs")];
const REAL: &[Need] = &[
    Need::Root,
    Need::Erofs,
    Need::Tool("umoci"),
    Need::Tool("fsck.erofs"),
    Need::Tool("skopeo"),
    Need::RealImages,
];

const DOCKER: &[Need] =
    &[Need::Root, Need::Erofs, Need::Tool("dockerd"), Need::Tool("docker"), Need::Tool("containerd")];
const REAL_DOCKER: &[Need] = &[
    Need::Root,
    Need::Erofs,
    Need::Tool("dockerd"),
    Need::Tool("docker"),
    Need::Tool("containerd"),
    Need::RealImages,
];

pub fn tests() -> Vec<Trial> {
    vec![
        test("busybox_image_is_as_umoci_unpacks_it", REAL, |bed| compare_real(bed, "busybox", &[])),
        test("debian_image_is_as_umoci_unpacks_it", REAL, |bed| compare_real(bed, "debian", &[])),
        test("image_of_python_nginx_and_redis_is_as_umoci_unpacks_it", REAL, |bed| {
            compare_real(bed, "workloads", &["--dest-compress-level", "1"])
        }),
        test("real_images_are_as_docker_unpacks_them", REAL_DOCKER, real_in_docker),
        test("generated_layers_are_as_docker_unpacks_them", DOCKER, generated_in_docker),
        test("docker_differs_from_the_specification_where_we_say_so", DOCKER, docker_differs),
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
        test("directories_after_what_is_in_them_are_as_umoci_unpacks_them", NEEDS, |bed| {
            compare(bed, &TestImage::of([layers::late_parents()]))
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
fn compare_real(bed: &Bed, name: &str, options: &[&str]) -> Result<(), Failure> {
    let archive = real_image(name).ok_or("no such image")?;
    let direct = bed.load(&archive)?;
    // Which name of the archive is taken makes no difference.
    let first = direct.names.first().ok_or("the image has no name")?;
    let from = format!("docker-archive:{}:{}", archive.display(), first.short());
    let layout = bed.path("layout");
    let to = format!("oci:{}:test", layout.display());
    run("skopeo", &[&["copy", "--quiet"], options, &[&from, &to]].concat())?;
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

/// What a daemon has of an image that it has just loaded, as a container of it would see it.
fn docker_tree(bed: &Bed, docker: &Docker, archive: &Path, name: &str) -> Result<Tree, Failure> {
    docker.run(&["load", "--quiet", "--input", &archive.display().to_string()])?;
    let mut directories = docker.directories(name)?;
    if let [only] = directories.as_slice() {
        return walk(only);
    }
    // One alone is no overlay, which needs two or an upper one.
    let (target, empty) = (bed.path("docker-view"), bed.path("docker-empty"));
    fs::create_dir_all(&target)?;
    fs::create_dir_all(&empty)?;
    directories.push(empty);
    let lower: Vec<String> = directories.iter().map(|path| path.display().to_string()).collect();
    let options = CString::new(format!("lowerdir={}", lower.join(":")))?;
    rustix::mount::mount("overlay", &target, "overlay", MountFlags::RDONLY, options.as_c_str())?;
    walk(&crate::bed::Mount { target }.target)
}

fn our_tree(bed: &Bed, archive: &Path, name: &str) -> Result<Tree, Failure> {
    let image = bed.load(archive)?;
    walk(&bed.mount_image(&image, name, Shape::Devices)?.target)
}

fn real_in_docker(bed: &Bed) -> Result<(), Failure> {
    let docker = Docker::start(bed, Driver::Overlay)?;
    for name in ["busybox", "debian", "workloads"] {
        let archive = real_image(name).ok_or("no such image")?;
        let ours = without_root_time(our_tree(bed, &archive, name)?);
        let theirs = without_root_time(docker_tree(bed, &docker, &archive, name)?);
        assert_same(&format!("{name}: ours against docker's"), &ours, &theirs)?;
    }
    Ok(())
}

/// The daemon makes the root directory itself, at its own time.
fn without_root_time(mut tree: Tree) -> Tree {
    if let Some(root) = tree.get_mut(&b""[..]) {
        root.mtime = (0, 0);
    }
    tree
}

/// Leaves out what a daemon does in its own way. (That we do it as umoci does is compared above.)
fn without_dockers_ways(tree: Tree) -> Tree {
    let mut tree = without_root_time(tree);
    for facts in tree.values_mut() {
        // There is no time before 1970.
        if facts.mtime.0 < 0 {
            facts.mtime = (0, 0);
        }
        // A hard link's entry gives the file its attributes.
        if facts.links > 1 {
            (facts.mode, facts.uid, facts.gid) = (0, 0, 0);
            facts.xattrs.clear();
        }
        // A layer on top of it has a copy of its own of what is no regular file.
        if matches!(facts.kind, Kind::Fifo) {
            facts.mode = 0;
            facts.links = 1;
            facts.names.clear();
        }
    }
    tree
}

fn generated_in_docker(bed: &Bed) -> Result<(), Failure> {
    let docker = Docker::start(bed, Driver::Vfs)?;
    let sets: [(&str, Vec<Tarball>); 9] = [
        ("attributes", vec![layers::attributes()]),
        ("names", vec![layers::names()]),
        ("directories", vec![layers::directories()]),
        ("contents", vec![layers::contents()]),
        ("sparse", vec![layers::sparse(&layers::SPARSE_FORMATS[1..])]),
        ("late-parents", vec![layers::late_parents()]),
        ("through-links", vec![layers::through_links()]),
        ("stacked", layers::stacked().into()),
        ("linked", layers::linked().into()),
    ];
    let mut problems = String::new();
    for (name, set) in sets {
        let image = TestImage { name: Some(format!("{name}:latest")), ..TestImage::of(set) };
        let archive = bed.write("image.tar", &tar_of(&image.docker_files()?))?;
        let ours = without_dockers_ways(our_tree(bed, &archive, name)?);
        let theirs = without_dockers_ways(docker_tree(bed, &docker, &archive, name)?);
        if let Err(error) = assert_same(&format!("{name}: ours against docker's"), &ours, &theirs) {
            problems.push_str(&format!("{error}\n"));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.into()) }
}

/// What a Docker daemon does otherwise than the specification, umoci and we.
fn docker_differs(bed: &Bed) -> Result<(), Failure> {
    let docker = Docker::start(bed, Driver::Overlay)?;
    let write = |name: &str, layers: Vec<Tarball>| -> Result<_, Failure> {
        let image = TestImage { name: Some(format!("{name}:latest")), ..TestImage::of(layers) };
        bed.write("image.tar", &tar_of(&image.docker_files()?))
    };
    let content = |tree: &Tree, path: &str| match tree.get(path.as_bytes()).map(|facts| &facts.kind) {
        Some(Kind::File { digest, .. }) => Some(digest.clone()),
        _ => None,
    };
    // On overlayfs, a directory that a layer removes and makes again shows the lower one's files.
    let again = [
        Tarball::of([Item::directory("made-again"), Item::file("made-again/old", "x")]),
        Tarball::of([Item::file(".wh.made-again", ""), Item::directory("made-again")]),
    ];
    let archive = write("again", again.into())?;
    let theirs = docker_tree(bed, &docker, &archive, "again")?;
    let ours = our_tree(bed, &archive, "again")?;
    if content(&theirs, "made-again/old").is_none() || content(&ours, "made-again/old").is_some() {
        return Err("the old file is seen by docker alone".into());
    }
    // There, an entry below a lower layer's link makes a directory in the link's place.
    let through = [
        Tarball::of([Item::directory("d"), Item::symlink("link", "d")]),
        Tarball::of([Item::file("link/new", "x")]),
    ];
    let archive = write("through", through.into())?;
    let theirs = docker_tree(bed, &docker, &archive, "through")?;
    let ours = our_tree(bed, &archive, "through")?;
    if content(&theirs, "link/new").is_none() || content(&ours, "d/new").is_none() {
        return Err("the link is kept by us alone".into());
    }
    // There, hard links into lower layers are refused; everywhere, entries that come twice.
    for (name, layers, problem) in [
        ("linked", layers::linked().to_vec(), "no such file or directory"),
        ("duplicates", vec![layers::duplicates()], "duplicates of file paths"),
    ] {
        let archive = write(name, layers)?;
        our_tree(bed, &archive, name)?;
        let refused = docker_tree(bed, &docker, &archive, name).err().ok_or("docker has learned it")?;
        if !refused.to_string().contains(problem) {
            return Err(refused);
        }
    }
    Ok(())
}
