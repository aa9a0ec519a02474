//! Generated layers with everything that a layer may hold.

use crate::tarball::{Item, Tarball};

/// The part of a POSIX ACL that `setfacl -m u:1000:rw` leaves on a file of mode 0644.
const ACL: &[u8] =
    b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x06\0\xe8\x03\0\0\x04\0\x04\0\xff\xff\xff\xff\
                     \x10\0\x06\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
/// `cap_net_raw=ep`.
const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Bytes that look random and are not.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

fn root() -> Item {
    Item::directory("./").mode(0o755).time(1_600_000_000, 1)
}

/// Kinds, modes, owners, times and attributes.
pub fn attributes() -> Tarball {
    let mut tar = Tarball::of([
        root(),
        Item::directory("./bin"),
        Item::file("./bin/su", noise(5000, 1)).mode(0o4755),
        Item::file("./bin/wall", noise(4096, 2)).mode(0o2755).owner(0, 5),
        Item::directory("./tmp").mode(0o1777),
        Item::directory("./secret").mode(0o0700).owner(1000, 1000),
        Item::file("./secret/none", "").mode(0),
        Item::file("./owner-16", "x").owner(65535, 65535),
        Item::file("./owner-17", "x").owner(65536, 100_000),
        Item::file("./owner-32", "x").owner(4_294_967_294, 4_000_000_000),
        Item::file("./time-zero", "x").time(0, 0),
        Item::file("./time-ns", "x").time(1_234_567_890, 123_456_789),
        Item::file("./time-old", "x").time(-1000, 250_000_000),
        Item::file("./time-far", "x").time(7_258_118_400, 999_999_999),
        Item::char_device("./null", 1, 3),
        Item::char_device("./big-char", 0xfff, 0xfffff).owner(1, 2),
        Item::block_device("./loop", 7, 300).mode(0o640),
        Item::fifo("./pipe").mode(0o622),
        Item::symlink("./absolute", "/etc/passwd"),
        Item::symlink("./dangling", "no/such/../file").owner(1000, 1000).time(1_000_000_000, 7),
        Item::file("./capable", noise(100, 3)).xattr("security.capability", CAPABILITY),
        Item::file("./acl", "x").mode(0o664).xattr("system.posix_acl_access", ACL),
        Item::directory("./acl-dir").mode(0o775).xattr("system.posix_acl_default", ACL),
        Item::file("./user", "x").xattr("user.text", "a=b\n\0c"),
        Item::directory("./trusted").xattr("trusted.thing", noise(300, 4)),
        Item::symlink("./trusted-link", "x").xattr("trusted.on.link", "v"),
        Item::fifo("./trusted-pipe").xattr("trusted.on.pipe", "v"),
        Item::file("./large-xattr", "x").xattr("user.large", noise(3000, 5)),
    ]);
    for seed in 0..40 {
        tar = tar.add(Item::file(format!("./shared-{seed}"), "x").xattr("user.same", "for all"));
    }
    tar
}

/// Names and links.
pub fn names() -> Tarball {
    let long = "n".repeat(255);
    let deep = format!("./deep/{}", "directory/".repeat(200));
    let mut tar = Tarball::of([
        root(),
        Item::file("plain", "no dot"),
        Item::file("/absolute-name", "no slash"),
        Item::file("./dots/../climbs", "cleaned"),
        Item::directory("./dots"),
        Item::directory("./utf8-ü"),
        Item::file(b"./not-\xff\xfe-utf8", "bytes"),
        Item::file("./white \t\nspace", "bytes"),
        Item::file("./!before-dot", "sorts before ."),
        Item::file("./...", "between"),
        Item::directory("./deep"),
        Item::directory("./longs"),
        Item::file(format!("./longs/{long}"), "long"),
        Item::symlink("./longs/target", "t/".repeat(1000)),
        Item::symlink("./longs/longest", "t".repeat(4095)),
        Item::file("./one", "linked"),
        Item::hard_link("./two", "./one"),
        Item::hard_link("./dots/three", "/one"),
        Item::symlink("./link", "one"),
        Item::hard_link("./link-too", "link"),
        Item::char_device("./null", 1, 3),
        Item::hard_link("./null-too", "null"),
    ]);
    // Each directory on the way has an entry: what a tool gives those that have none is its own business.
    let mut path = "./deep".to_owned();
    for part in deep.trim_start_matches("./deep/").split_terminator('/') {
        path = format!("{path}/{part}");
        tar = tar.add(Item::directory(&path));
    }
    tar = tar.add(Item::file(format!("{path}/bottom"), "deep"));
    tar =
        tar.long_name(format!("./longs/gnu-{}", "g".repeat(200)).as_bytes()).add(Item::file("./cut", "gnu"));
    // A ustar name in two parts.
    let mut prefixed = crate::tarball::header(&Item::file("in-prefix", ""));
    prefixed[345..353].copy_from_slice(b"longs/..");
    crate::tarball::set_checksum(&mut prefixed);
    tar.raw(&prefixed)
}

/// Directories of sizes around those of blocks.
pub fn directories() -> Tarball {
    let mut tar = Tarball::of([root()]);
    for count in [0, 1, 100, 150, 160, 170, 180, 200, 1000, 5000] {
        tar = tar.add(Item::directory(format!("./d{count}")));
        for index in 0..count {
            tar = tar.add(Item::file(format!("./d{count}/file-{index:06}"), ""));
        }
    }
    for length in [1, 2, 127, 254, 255] {
        tar = tar.add(Item::directory(format!("./w{length}")));
        for letter in b'a'..=b'z' {
            let name = String::from_utf8_lossy(&vec![letter; length]).into_owned();
            tar = tar.add(Item::directory(format!("./w{length}/{name}")));
        }
    }
    tar
}

/// Files of sizes around those of blocks and chunks, with and without zeros.
pub fn contents() -> Tarball {
    let mut tar = Tarball::of([root()]);
    for size in [0, 1, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 65537, 1 << 20, (3 << 20) + 17] {
        tar = tar.add(Item::file(format!("./noise-{size}"), noise(size, size as u64)));
        tar = tar.add(Item::file(format!("./zeros-{size}"), vec![0; size]));
        let mut mixed = noise(size, 9);
        let middle = size / 3..size / 3 * 2;
        mixed[middle].fill(0);
        tar = tar.add(Item::file(format!("./mixed-{size}"), mixed));
        let mut last = vec![0; size];
        if let Some(byte) = last.last_mut() {
            *byte = 1;
        }
        tar = tar.add(Item::file(format!("./last-{size}"), last));
    }
    // A header of size zero for a directory, and sizes that directories and links only claim.
    let mut directory = Item::directory("./claims");
    directory.claimed_size = Some(1 << 20);
    let mut link = Item::symlink("./claims-link", "x");
    link.claimed_size = Some(512);
    tar.add(directory).add(link)
}

/// The four encodings of sparse files; umoci does not know the first.
pub const SPARSE_FORMATS: [&str; 4] = ["old", "0.0", "0.1", "1.0"];

/// The same three sparse files in each of some encodings.
pub fn sparse(formats: &[&str]) -> Tarball {
    let mut tar = Tarball::of([root()]);
    let (a, b, c) = (noise(512, 1), noise(70_000, 2), noise(1, 3));
    let size = 40 << 20;
    let few: [(u64, &[u8]); 4] = [(0, &a), (5 << 20, &b), ((30 << 20) + 5, &c), (size, &[])];
    let many_data: Vec<Vec<u8>> = (0..60).map(|seed| noise(700, seed)).collect();
    let many: Vec<(u64, &[u8])> = many_data
        .iter()
        .enumerate()
        .map(|(index, data)| (index as u64 * 100_000 + 3, data.as_slice()))
        .collect();
    for (name, extents) in [("none", &[(size, &[][..])][..]), ("few", &few), ("many", &many)] {
        for format in formats {
            let path = format!("{format}-{name}");
            tar = match *format {
                "old" => tar.old_gnu_sparse(&path, size, extents),
                pax => tar.pax_sparse(pax, &path, size, extents),
            };
        }
    }
    tar
}

/// Entries that come twice, as other things, and out of order.
pub fn duplicates() -> Tarball {
    Tarball::of([
        root(),
        Item::file("twice", "first"),
        Item::file("twice", "second").mode(0o600),
        Item::file("becomes-dir", "x"),
        Item::directory("becomes-dir"),
        Item::file("becomes-dir/inside", "x"),
        Item::directory("becomes-file"),
        Item::file("becomes-file/gone", "x"),
        Item::file("becomes-file", "now a file"),
        Item::directory("again"),
        Item::file("again/kept", "x"),
        Item::directory("again").mode(0o711).owner(7, 8),
        Item::file("original", "old"),
        Item::hard_link("second-name", "original"),
        Item::file("original", "new"),
        Item::symlink("link", "twice"),
        Item::file("link", "no longer a link"),
        // A directory's entry after what is in it.
        Item::directory("late"),
        Item::file("late/child", "x"),
        Item::directory("late").mode(0o750).time(1_500_000_000, 5),
    ])
}

/// Directories whose entries come after those of what is in them.
pub fn late_parents() -> Tarball {
    Tarball::of([
        Item::file("late/child", "x"),
        Item::file("late/deep/below/file", "x"),
        Item::symlink("late/link", "child"),
        Item::directory("late/deep/below").mode(0o700).owner(3, 4),
        Item::directory("late/deep").mode(0o711).time(1_400_000_000, 0),
        Item::directory("late").mode(0o750).owner(1, 2).time(1_500_000_000, 5),
        root(),
    ])
}

/// Entries that go through symbolic links of the same layer.
pub fn through_links() -> Tarball {
    Tarball::of([
        root(),
        Item::directory("usr"),
        Item::directory("usr/lib"),
        Item::symlink("lib", "usr/lib"),
        Item::file("lib/through-relative", "x"),
        Item::symlink("abs", "/usr/lib"),
        Item::file("abs/through-absolute", "x"),
        Item::symlink("climb", "../../../../usr"),
        Item::file("climb/lib/through-climbing", "x"),
        Item::symlink("chain", "lib"),
        Item::file("chain/through-chain", "x"),
        Item::hard_link("named-through", "lib/through-relative"),
    ])
}

/// Three layers that hide and replace each other's files.
pub fn stacked() -> [Tarball; 3] {
    let bottom = Tarball::of([
        root(),
        Item::directory("kept"),
        Item::file("kept/a", "bottom"),
        Item::file("kept/hidden", "bottom"),
        Item::directory("gone"),
        Item::file("gone/x", "bottom"),
        Item::directory("opaque"),
        Item::file("opaque/old", "bottom"),
        Item::directory("opaque/old-dir"),
        Item::file("opaque/old-dir/x", "bottom"),
        Item::directory("opaque-late"),
        Item::file("opaque-late/old", "bottom"),
        Item::directory("replaced"),
        Item::file("replaced/x", "bottom"),
        Item::directory("recreated"),
        Item::file("recreated/old", "bottom"),
        Item::file("to-dir", "bottom"),
        Item::directory("to-file"),
        Item::file("to-file/x", "bottom"),
        Item::file("file", "bottom").owner(1, 1),
        Item::file("linked", "bottom"),
        Item::hard_link("linked-too", "linked"),
        Item::symlink("symlink", "kept"),
        Item::file("comes-back", "bottom"),
    ]);
    let middle = Tarball::of([
        root().mode(0o711),
        Item::directory("kept").mode(0o700),
        Item::file("kept/.wh.hidden", ""),
        Item::file("kept/b", "middle"),
        Item::file(".wh.gone", ""),
        Item::directory("opaque").mode(0o555),
        Item::file("opaque/.wh..wh..opq", ""),
        Item::file("opaque/new", "middle"),
        Item::directory("opaque-late"),
        Item::file("opaque-late/new", "middle"),
        Item::file("opaque-late/.wh..wh..opq", ""),
        Item::file(".wh.replaced", ""),
        Item::file("replaced", "now a file"),
        Item::file(".wh.recreated", ""),
        Item::directory("recreated"),
        Item::file("recreated/new", "middle"),
        Item::directory("to-dir"),
        Item::file("to-dir/x", "middle"),
        Item::file("to-file", "middle"),
        Item::file("file", "middle").owner(2, 2),
        Item::file("linked", "middle"),
        Item::file(".wh.comes-back", ""),
        Item::file(".wh..wh.aufs", "bookkeeping"),
    ]);
    let top = Tarball::of([
        root().time(1_650_000_000, 9),
        Item::file("comes-back", "top"),
        Item::directory("opaque").mode(0o755),
        Item::file("opaque/.wh.new", ""),
        Item::file("opaque/newest", "top"),
        Item::directory("gone"),
        Item::file("gone/y", "top"),
        Item::file(".wh.symlink", ""),
        Item::file(".wh.never-was", ""),
        Item::directory("kept").mode(0o755),
        Item::file("kept/a", "top"),
    ]);
    [bottom, middle, top]
}

/// Layers whose files are linked to those below, directly and by way of symbolic links.
pub fn linked() -> [Tarball; 3] {
    let bottom = Tarball::of([
        root(),
        Item::file("one", noise(70_000, 1)).owner(7, 8).xattr("security.capability", CAPABILITY),
        Item::directory("d"),
        Item::file("d/two", "bottom"),
        Item::hard_link("d/two-too", "d/two"),
        Item::symlink("to-d", "/d"),
        Item::symlink("to-d-again", "to-d"),
        Item::symlink("dangling", "made/here"),
        Item::file("file", "bottom"),
        Item::fifo("pipe"),
    ]);
    let middle = Tarball::of([
        root(),
        Item::hard_link("one-more", "one"),
        Item::hard_link("d/up", "/one"),
        Item::hard_link("another", "one-more"),
        Item::hard_link("two-by-link", "to-d-again/two"),
        Item::hard_link("link-too", "to-d"),
        Item::hard_link("pipe-too", "pipe"),
        // Below links of the lower layer.
        Item::file("to-d-again/three", "middle"),
        Item::file("to-d/sub/four", "middle").mode(0o640),
        Item::directory("d/sub").mode(0o701),
        // The link leads to what was there before.
        Item::hard_link("old-file", "file"),
        Item::file("file", "middle"),
    ]);
    let top = Tarball::of([
        root(),
        Item::hard_link("late", "one-more"),
        Item::file(".wh.one", ""),
        Item::hard_link("d/own", "late"),
        Item::file("d/two-too", "top"),
        Item::directory("d"),
        // In the place of a link, a directory.
        Item::directory("to-d"),
        Item::file("to-d/alone", "top"),
        Item::file("dangling", "no link any more"),
        Item::hard_link("again", "old-file"),
    ]);
    [bottom, middle, top]
}
