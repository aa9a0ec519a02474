//! Named volumes: kept, filled from the image, guarded while in use.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use anyhow::ensure;

use super::rootfs::base;
use crate::bed::Bed;
use crate::image::Image;
use crate::suite::{Body, Story, body};
use crate::tree::What;

pub const BODIES: &[Body] = &[
    body!(volume_outlives_its_sandboxes).rootless(),
    body!(empty_volume_is_filled_from_the_image),
    body!(volume_in_use_is_not_removed).rootless(),
    body!(volume_commands_tell_what_there_is).once(),
];

/// Volumes live in the store's directory, which is shared by all tests.
fn removed_after(bed: &Bed, name: &str, story: impl FnOnce() -> Story) -> Story {
    let told = story();
    let removed = bed.run(&["volume", "rm", name])?.succeeds();
    told?;
    removed?;
    Ok(())
}

fn volume_outlives_its_sandboxes(bed: &Bed) -> Story {
    removed_after(bed, "kept", || {
        bed.busybox().with("-v", "kept:/data").sh("echo one > /data/file").run()?.succeeds()?;
        let script = "cat /data/file; echo two >> /data/file; cat /data/file";
        bed.busybox().with("-v", "kept:/data").sh(script).run()?.succeeds()?.prints("one\none\ntwo\n")?;
        let mount = "type=volume,source=kept,target=/data,readonly";
        let finished = bed.busybox().with("--mount", mount).sh("cat /data/file; echo x > /data/x").run()?;
        ensure!(finished.code() != 0, "a read-only volume was written\n{finished}");
        finished.prints("one\ntwo\n")?.says("Read-only file system")?;
        Ok(())
    })
}

fn empty_volume_is_filled_from_the_image(bed: &Bed) -> Story {
    let mut tree = base(bed)?;
    let data = tree.directory("data");
    data.mode = 0o1770;
    data.owner = (12, 34);
    let file = tree.file("data/file", vec![b'x'; 300_000]);
    file.mode = 0o4755;
    file.owner = (1000, 1001);
    file.mtime = 1_234_567_890;
    file.xattrs = vec![("user.note".to_owned(), b"green".to_vec())];
    tree.directory("data/deep");
    tree.directory("data/deep/er");
    tree.file("data/deep/er/file", "deep\n");
    tree.symlink("data/link", "/etc/passwd");
    tree.add("data/pipe", 0o622, What::Fifo);
    let image = bed.generate("filling", &Image::new(vec![tree.to_layer()]))?;
    removed_after(bed, "filled", || {
        let script = "stat -c '%a %u %g' /data /data/file; stat -c '%Y %s' /data/file; cat /data/deep/er/file; \
            readlink /data/link; stat -c '%F %a' /data/pipe; echo changed > /data/deep/er/file; busybox rm /data/link";
        let first = "1770 12 34\n4755 1000 1001\n1234567890 300000\ndeep\n/etc/passwd\nfifo 622\n";
        image.sandbox().with("-v", "filled:/data").sh(script).run()?.succeeds()?.prints(first)?;
        let inspected = bed.json(&["volume", "inspect", "filled"])?;
        let mountpoint = std::path::PathBuf::from(inspected[0]["mountpoint"].as_str().unwrap_or_default());
        let mut note = [0; 10];
        let length = rustix::fs::getxattr(mountpoint.join("file"), "user.note", &mut note)?;
        ensure!(&note[..length] == b"green", "an attribute is lost");
        ensure!(fs::metadata(mountpoint.join("file"))?.uid() == 1000, "the owner on the host");
        // It is filled once only.
        let script = "cat /data/deep/er/file; ls /data";
        image
            .sandbox()
            .with("-v", "filled:/data")
            .sh(script)
            .run()?
            .succeeds()?
            .prints("changed\ndeep\nfile\npipe\n")?;
        Ok(())
    })?;
    removed_after(bed, "unfilled", || {
        let finished =
            image.sandbox().with("-v", "unfilled:/data:nocopy").sh("ls /data").run()?.succeeds()?;
        finished.prints("")?;
        Ok(())
    })
}

fn volume_in_use_is_not_removed(bed: &Bed) -> Story {
    removed_after(bed, "used", || {
        let mut running =
            bed.busybox().with("-v", "used:/data").held_input().sh("echo up; read -r line").start()?;
        running.wait_for_stdout("up\n")?;
        let refused = bed.run(&["volume", "rm", "used"])?;
        ensure!(refused.code() == 1, "{refused}");
        refused.says("in use")?;
        ensure!(!bed.run(&["volume", "prune"])?.succeeds()?.out().contains("used"), "pruned while in use");
        // Two sandboxes share it.
        bed.busybox().with("-v", "used:/data").sh("echo x > /data/x").run()?.succeeds()?;
        running.write(b"\n")?;
        running.wait()?.succeeds()?;
        Ok(())
    })
}

fn volume_commands_tell_what_there_is(bed: &Bed) -> Story {
    let bed = bed.with_empty_store()?;
    bed.run(&["volume", "ls", "-q"])?.succeeds()?.prints("")?;
    bed.run(&["volume", "create", "one", "two"])?.succeeds()?.prints("one\ntwo\n")?;
    bed.run(&["volume", "create", "one"])?.succeeds()?;
    bed.run(&["volume", "ls", "-q"])?.succeeds()?.prints("one\ntwo\n")?;
    let listed = bed.json(&["volume", "ls", "--json"])?;
    ensure!(listed[0]["name"] == "one" && listed[0]["in_use"] == false, "{listed}");
    bed.run(&["volume", "create", "../escape"])?.refused_with(125)?.says("cannot name a volume")?;
    let refused = bed.run(&["volume", "rm", "three"])?;
    ensure!(refused.code() == 1, "{refused}");
    refused.says("no volume `three`")?;
    bed.run(&["volume", "prune"])?.succeeds()?.prints("one\ntwo\n")?;
    bed.run(&["volume", "ls", "-q"])?.succeeds()?.prints("")?;
    Ok(())
}
