//! The root file system: an image's every file as its layers say, writable or not, and nobody else's.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};

use crate::bed::Bed;
use crate::image::Image;
use crate::noise::Noise;
use crate::suite::{Body, Story, body};
use crate::tree::{LISTING_SCRIPT, Tree, What};

pub const BODIES: &[Body] = &[
    body!(thousand_files_are_as_the_layer_says),
    body!(whiteouts_and_opaque_directories_hide_lower_layers).rootless(),
    body!(hundred_layers_are_one_tree),
    body!(extended_attributes_come_through),
    body!(root_is_writable_and_forgotten).rootless(),
    body!(read_only_root_refuses_writes).rootless(),
    body!(image_files_can_be_changed_in_place).rootless(),
    body!(absolute_and_escaping_symlinks_stay_inside).rootless(),
    body!(one_terabyte_sparse_file_is_read_quickly),
];

/// The bottom layer: busybox and links for the programs the stories use.
pub fn base(bed: &Bed) -> Result<Tree> {
    let mut tree = Tree::default();
    tree.directory("bin");
    tree.file("bin/busybox", bed.busybox_binary()?).mode = 0o755;
    for applet in ["sh", "find", "stat", "sha256sum", "sed", "cat", "ls", "head", "tail", "readlink", "touch"]
    {
        tree.symlink(&format!("bin/{applet}"), "busybox");
    }
    Ok(tree)
}

/// Compares what a sandbox of these layers shows below `tree/` with what they add up to.
fn shows_the_sum_of(bed: &Bed, layers: &[Tree]) -> Story {
    let base = base(bed)?;
    let mut sum = base.clone();
    layers.iter().for_each(|layer| sum.apply(layer));
    let archives = std::iter::once(&base).chain(layers).map(Tree::to_layer).collect();
    let image = bed.generate("layered", &Image::new(archives))?;
    let listing =
        image.sandbox().command(&["sh", "-c", LISTING_SCRIPT, "sh", "tree"]).run()?.succeeds()?.out();
    let seen: BTreeSet<String> = listing.lines().map(str::to_owned).collect();
    let expected = sum.expected_listing("tree");
    let lines = |set: Vec<&String>| set.into_iter().take(10).cloned().collect::<Vec<_>>().join("\n  ");
    ensure!(
        seen == expected,
        "of {} expected lines, missing:\n  {}\nnot expected:\n  {}",
        expected.len(),
        lines(expected.difference(&seen).collect()),
        lines(seen.difference(&expected).collect()),
    );
    Ok(())
}

fn thousand_files_are_as_the_layer_says(bed: &Bed) -> Story {
    let tree = thousand_files();
    ensure!(tree.len() > 1000, "the tree has {} nodes only", tree.len());
    shows_the_sum_of(bed, &[tree])
}

fn thousand_files() -> Tree {
    let mut noise = Noise::new(1000);
    let mut tree = Tree::default();
    tree.directory("tree");
    for directory in 0..40 {
        let path = format!("tree/d{directory:02}");
        let node = tree.directory(&path);
        node.mode = [0o755, 0o700, 0o1777, 0o2775][directory % 4];
        node.owner = (u32::try_from(directory).unwrap_or(0), 100);
    }
    for file in 0..1000_u64 {
        let path = format!("tree/d{:02}/file {file:04}.dat", file % 40);
        let size = match file % 10 {
            0 => file % 5,
            1..=3 => 4095 + file % 3,
            4 if file % 100 == 4 => 1_000_000 + file,
            _ => noise.below(20_000),
        };
        let content = match file % 7 {
            // Zeros end to end, which a converter may take for holes.
            0 => vec![0; usize::try_from(size).unwrap_or(0)],
            _ => noise.bytes(usize::try_from(size).unwrap_or(0)),
        };
        let node = tree.file(&path, content);
        node.mode =
            [0o644, 0o600, 0o4755, 0o2711, 0o000, 0o444, 0o777][usize::try_from(file % 7).unwrap_or(0)];
        node.owner = [(0, 0), (1000, 1000), (65_534, 65_534), (70_000, 123_456)]
            [usize::try_from(file % 4).unwrap_or(0)];
        node.mtime = [0, 1, 1_234_567_890, 4_102_444_800][usize::try_from(file % 4).unwrap_or(0)];
        if file % 25 == 0 {
            let link = format!("tree/d{:02}/link-{file}", (file + 1) % 40);
            tree.symlink(&link, &format!("../d{:02}/file {file:04}.dat", file % 40)).owner = (7, 8);
        }
    }
    odd_nodes(&mut tree);
    tree
}

fn odd_nodes(tree: &mut Tree) {
    tree.directory("tree/odd");
    tree.file("tree/odd/a-first-name", "shared");
    for name in ["b-second-name", "c-third-name"] {
        tree.add(&format!("tree/odd/{name}"), 0o644, What::HardLink("tree/odd/a-first-name".to_owned()));
    }
    tree.add("tree/odd/pipe", 0o622, What::Fifo);
    tree.add("tree/odd/null", 0o666, What::Character(1, 3));
    tree.add("tree/odd/high", 0o600, What::Character(300, 70_000));
    tree.file("tree/odd/räuber-ürgh-日本語", "text");
    tree.symlink("tree/odd/dangling", "/no/where");
    tree.symlink("tree/odd/long", &"x/".repeat(700));
    let mut deep = "tree/odd".to_owned();
    for level in 0..6 {
        deep = format!("{deep}/{}{level}", "n".repeat(60));
        tree.directory(&deep);
    }
    tree.file(&format!("{deep}/{}", "l".repeat(255)), "deep");
}

fn whiteouts_and_opaque_directories_hide_lower_layers(bed: &Bed) -> Story {
    let mut lower = Tree::default();
    for directory in ["tree", "tree/kept", "tree/opaque", "tree/gone", "tree/gone/deep", "tree/becomes-file"]
    {
        lower.directory(directory);
    }
    for file in [
        "kept/a",
        "kept/b",
        "opaque/hidden",
        "opaque/same",
        "gone/x",
        "gone/deep/y",
        "becomes-file/z",
        "becomes-dir",
    ] {
        lower.file(&format!("tree/{file}"), format!("lower {file}"));
    }
    lower.symlink("tree/link", "kept");
    let mut middle = Tree::default();
    middle.directory("tree");
    middle.directory("tree/kept").mode = 0o711;
    middle.file("tree/kept/.wh.a", "");
    middle.file("tree/.wh.gone", "");
    middle.directory("tree/opaque");
    middle.file("tree/opaque/.wh..wh..opq", "");
    middle.file("tree/opaque/same", "middle same");
    middle.file("tree/becomes-file", "now a file");
    middle.directory("tree/becomes-dir");
    middle.file("tree/becomes-dir/inside", "now a directory");
    middle.file("tree/link", "no longer a link");
    // A whiteout of what was never there does nothing.
    middle.file("tree/.wh.never-was", "");
    let mut upper = Tree::default();
    upper.directory("tree");
    upper.directory("tree/gone");
    upper.file("tree/gone/reborn", "upper");
    upper.directory("tree/kept");
    upper.file("tree/kept/a", "a again");
    shows_the_sum_of(bed, &[lower, middle, upper])
}

fn hundred_layers_are_one_tree(bed: &Bed) -> Story {
    let layers: Vec<Tree> = (0..100)
        .map(|number| {
            let mut layer = Tree::default();
            layer.directory("tree");
            if number == 0 {
                layer.file("tree/first", "a file with names in several layers");
            } else if number % 10 == 0 {
                let link = What::HardLink("tree/first".to_owned());
                layer.add(&format!("tree/first-in-{number}"), 0o644, link);
            }
            layer.file(&format!("tree/of-{number}"), format!("{number}"));
            layer.file("tree/last", format!("written by {number}"));
            if number > 0 {
                layer.file(&format!("tree/.wh.of-{}", number - 1), "");
            }
            layer
        })
        .collect();
    shows_the_sum_of(bed, &layers)
}

fn extended_attributes_come_through(bed: &Bed) -> Story {
    // struct vfs_cap_data, revision 2: effective bit, CAP_NET_RAW permitted.
    let capability = [&[1, 0, 0, 2, 0, 0x20, 0, 0][..], &[0; 12]].concat();
    let mut tree = base(bed)?;
    tree.file("probe", std::fs::read("/proc/self/exe")?).mode = 0o755;
    tree.file("marked", "x").xattrs = vec![
        ("user.note".to_owned(), b"green".to_vec()),
        ("user.bytes".to_owned(), vec![0, 255, 10, 61]),
        ("security.capability".to_owned(), capability),
    ];
    tree.file("plain", "x");
    tree.directory("dir").xattrs = vec![("user.long".to_owned(), vec![b'y'; 1000])];
    let image = bed.generate("attributed", &Image::new(vec![tree.to_layer()]))?;
    let command = ["/probe", "probe", "xattrs", "/marked", "/plain", "/dir"];
    let finished = image.sandbox().with("--memory", "512m").command(&command).run()?.succeeds()?;
    let seen: BTreeSet<String> = finished.out().lines().map(str::to_owned).collect();
    let expected = BTreeSet::from([
        "/marked user.note=677265656e".to_owned(),
        "/marked user.bytes=00ff0a3d".to_owned(),
        "/marked security.capability=0100000200200000000000000000000000000000".to_owned(),
        format!("/dir user.long={}", "79".repeat(1000)),
    ]);
    ensure!(seen == expected, "other attributes than the layer's\n{finished}");
    Ok(())
}

fn root_is_writable_and_forgotten(bed: &Bed) -> Story {
    let script = "test ! -e /new && echo text > /new && mkdir -p /a/b && rm /etc/passwd && cat /new";
    // The second run sees nothing of the first.
    bed.busybox().sh(script).run()?.succeeds()?.prints("text\n")?;
    bed.busybox().sh(script).run()?.succeeds()?.prints("text\n")?;
    Ok(())
}

fn read_only_root_refuses_writes(bed: &Bed) -> Story {
    let mut attempts = bed.busybox().option("--read-only").each(&[
        "echo x >> /new",
        "echo x >> /etc/new",
        "mkdir -p /tmp 2>/dev/null; echo x >> /tmp/new",
        "echo x >> /etc/passwd",
        "echo x > /dev/shm/x && echo x > /dev/null && cat /etc/passwd > /dev/shm/y && echo fine",
    ])?;
    attempts.pop().context("the last works")?.succeeds()?.prints("fine\n")?;
    for attempt in attempts {
        ensure!(attempt.code() != 0, "it could be written\n{attempt}");
        let said = attempt.err().to_lowercase();
        ensure!(said.contains("read-only") || said.contains("nonexistent directory"), "{attempt}");
    }
    Ok(())
}

fn image_files_can_be_changed_in_place(bed: &Bed) -> Story {
    let mut tree = base(bed)?;
    let content = Noise::new(5).bytes(3 << 20);
    tree.file("large", content).mode = 0o644;
    tree.directory("dir");
    tree.file("dir/one", "1");
    let image = bed.generate("changed", &Image::new(vec![tree.to_layer()]))?;
    image
        .sandbox()
        .sh("busybox chmod 600 /large && echo more >> /large && stat -c '%a %s' /large && \
             busybox mv /dir /moved && cat /moved/one && busybox rm -r /moved && ls /moved 2>&1 || true")
        .run()?
        .succeeds()?
        .prints(&format!("600 {}\n1ls: /moved: No such file or directory\n", (3 << 20) + 5))?;
    Ok(())
}

fn absolute_and_escaping_symlinks_stay_inside(bed: &Bed) -> Story {
    let mut tree = base(bed)?;
    tree.directory("etc");
    tree.file("etc/secret", "the image's own\n");
    tree.symlink("absolute", "/etc/secret");
    tree.symlink("climbing", "../../../../../../etc/secret");
    // The entries that runtimes like to write to.
    tree.symlink("etc/hosts", "/../../../../tmp/cloche-escape");
    tree.symlink("proc", "/etc");
    let image = bed.generate("linked", &Image::new(vec![tree.to_layer()]))?;
    let finished = image.sandbox().sh("cat /absolute /climbing").run()?;
    // /proc as a link is refused or replaced; either way nothing outside is touched.
    if finished.code() == 0 {
        finished.prints("the image's own\nthe image's own\n")?;
    } else {
        finished.refused_with(125)?.says("/proc")?;
    }
    ensure!(!std::path::Path::new("/tmp/cloche-escape").exists(), "a file was made outside of the sandbox");
    Ok(())
}

fn one_terabyte_sparse_file_is_read_quickly(bed: &Bed) -> Story {
    use crate::tar::{Archive, Header, kind, pax_record};
    const TERABYTE: u64 = 1 << 40;
    // GNU tar's sparse format 1.0: the map, padded to a record, is the beginning of the data. One piece of data, at
    // the very end.
    let tail = b"the end\n";
    let offset = TERABYTE - tail.len() as u64;
    let mut records = Vec::new();
    for (key, value) in
        [("major", "1"), ("minor", "0"), ("name", "sparse"), ("realsize", &TERABYTE.to_string())]
    {
        pax_record(&mut records, &format!("GNU.sparse.{key}"), value.as_bytes());
    }
    let mut data = format!("1\n{offset}\n{}\n", tail.len()).into_bytes();
    data.resize(512, 0);
    data.extend_from_slice(tail);
    let mut archive = Archive::default();
    archive.entry(Header::new(kind::PAX, "pax", 0o644), &records);
    archive.entry(Header::new(kind::FILE, "GNUSparseFile.0/sparse", 0o644), &data);
    let image = bed.generate("sparse", &Image::new(vec![base(bed)?.to_layer(), archive.finish()]))?;
    image
        .sandbox()
        .sh("stat -c %s /sparse; tail -c 8 /sparse; head -c 4096 /sparse | busybox tr -d '\\0' | busybox wc -c")
        .run()?
        .succeeds()?
        .prints(&format!("{TERABYTE}\nthe end\n0\n"))?;
    Ok(())
}
