//! Files of the host in a sandbox, and file systems in memory.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use sha2::{Digest as _, Sha256};

use super::crash::file_server_below;
use super::rootfs::base;
use crate::bed::Bed;
use crate::image::Image;
use crate::noise::Noise;

use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(bind_is_shared_both_ways_at_once),
    body!(bind_behaves_as_a_file_system),
    body!(large_file_comes_through_both_ways),
    body!(read_only_bind_refuses_writes),
    body!(single_file_is_bound),
    body!(bind_covers_what_the_image_has).rootless(),
    body!(missing_source_is_made_or_refused).rootless(),
    body!(binds_below_a_bind_come_along),
    body!(links_in_a_bind_lead_into_the_sandbox),
    body!(links_at_a_target_stay_inside),
    body!(file_belongs_to_the_user_that_made_it),
    body!(device_nodes_in_a_bind_open_nothing),
    body!(tmpfs_is_as_asked_for),
    body!(mount_below_a_mount_comes_after_it).rootless(),
    body!(read_only_root_keeps_its_mounts_writable),
    body!(bad_mounts_are_refused),
    body!(killed_share_is_an_error_and_no_hang).only(Isolation::Vm),
];

/// A directory of the host with this file in it.
fn source(bed: &Bed, name: &str, file: &str, content: &str) -> Result<PathBuf> {
    let directory = bed.scratch().join(name);
    fs::create_dir_all(&directory)?;
    fs::write(directory.join(file), content)?;
    Ok(directory)
}

fn volume(source: &Path, rest: &str) -> String {
    format!("{}:{rest}", source.display())
}

fn bind_is_shared_both_ways_at_once(bed: &Bed) -> Story {
    let dir = source(bed, "shared", "from-host", "host\n")?;
    let script = "cat /data/from-host; echo inside > /data/from-inside; echo ready; \
        until [ -e /data/go ]; do sleep 0.02; done; cat /data/go; cat /data/from-host; \
        echo more >> /data/from-host; echo done; until [ ! -e /data/go ]; do sleep 0.02; done; ls /data";
    let running = bed.busybox().with("-v", &volume(&dir, "/data")).sh(script).start()?;
    running.wait_for_stdout("ready\n")?;
    ensure!(fs::read_to_string(dir.join("from-inside"))? == "inside\n", "the host does not see the write");
    // Of the same length, and in place: no change of size tells of it.
    fs::write(dir.join("from-host"), "HOST\n")?;
    fs::write(dir.join("go.new"), "go\n")?;
    fs::rename(dir.join("go.new"), dir.join("go"))?;
    running.wait_for_stdout("done\n")?;
    ensure!(
        fs::read_to_string(dir.join("from-host"))? == "HOST\nmore\n",
        "the host does not see what was added"
    );
    fs::remove_file(dir.join("go"))?;
    running.wait()?.succeeds()?.prints("host\nready\ngo\nHOST\ndone\nfrom-host\nfrom-inside\n")?;
    Ok(())
}

/// The suite's own binary in the sandbox does what programs do; see [`crate::file_probe`].
fn bind_behaves_as_a_file_system(bed: &Bed) -> Story {
    let dir = source(bed, "files", "x", "")?;
    let own = fs::read_link("/proc/self/exe")?;
    // Several times what Linux asks for at once (a page, in fs/fuse/readdir.c).
    let entries = bed.many(1000, 300);
    let finished = bed
        .busybox()
        .with("--memory", "256m")
        .with("-v", &volume(&own, "/probe:ro"))
        .with("-v", &volume(&dir, "/data"))
        .command(&["/probe", "probe", "files", "/data", &entries.to_string()])
        .run()?
        .succeeds()?;
    ensure!(finished.out().lines().count() == 14, "steps are missing\n{finished}");
    // The host agrees about what was left.
    ensure!(fs::read(dir.join("step-8/file"))?.get(5000..5006) == Some(b"mapped"), "the mapping's bytes");
    ensure!(fs::metadata(dir.join("step-3/file"))?.len() == 1, "times");
    Ok(())
}

fn large_file_comes_through_both_ways(bed: &Bed) -> Story {
    // Above what the ring, its requests and what is read ahead hold.
    let mib = bed.many(100, 20);
    let dir = source(bed, "large", "x", "")?;
    let mut noise = Noise::new(7);
    let block = noise.bytes(1 << 20);
    let content: Vec<u8> =
        (0..mib).flat_map(|index| block.iter().map(move |byte| byte ^ index as u8)).collect();
    let digest: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(dir.join("in"), content)?;
    bed.busybox()
        .with("-v", &volume(&dir, "/data"))
        .sh("sha256sum /data/in && cp /data/in /data/out && sync && sha256sum /data/out")
        .run()?
        .succeeds()?
        .prints(&format!("{digest}  /data/in\n{digest}  /data/out\n"))?;
    let copied: String =
        Sha256::digest(fs::read(dir.join("out"))?).iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(copied == digest, "the host reads another file than the sandbox wrote");
    Ok(())
}

fn read_only_bind_refuses_writes(bed: &Bed) -> Story {
    let dir = source(bed, "precious", "file", "precious\n")?;
    fs::create_dir(dir.join("dir"))?;
    let attempts = [
        "echo x > /data/new",
        "echo x >> /data/file",
        "rm /data/file",
        "mv /data/file /data/other",
        "mkdir /data/new",
        "rmdir /data/dir",
        "chmod 777 /data/file",
        "touch /data/file",
        "ln -s x /data/link",
        "ln /data/file /data/link",
        "truncate -s 0 /data/file",
        "echo x >> /single",
    ];
    let script: String = attempts
        .iter()
        .map(|attempt| {
            format!(
                "if ({attempt}) 2>/tmp/said; then echo 'done: {attempt}'; fi; \
                grep -q 'Read-only file system' /tmp/said || {{ echo '{attempt}:'; cat /tmp/said; }}; "
            )
        })
        .collect();
    let ends = ":/single:ro";
    let finished = bed
        .busybox()
        .with("-v", &volume(&dir, "/data:ro"))
        .with("-v", &format!("{}{ends}", dir.join("file").display()))
        .sh(&format!("mkdir -p /tmp; {script} cat /data/file /single"))
        .run()?
        .succeeds()?;
    finished.prints("precious\nprecious\n")?;
    ensure!(fs::read_to_string(dir.join("file"))? == "precious\n", "the file was changed");
    ensure!(fs::read_dir(&dir)?.count() == 2, "the directory was changed");
    Ok(())
}

fn single_file_is_bound(bed: &Bed) -> Story {
    let dir = source(bed, "dir", "file", "one\n")?;
    fs::write(dir.join("secret"), "secret")?;
    let spec = |target: &str| format!("type=bind,source={},target={target}", dir.join("file").display());
    bed.busybox()
        .with("--mount", &spec("/etc/passwd"))
        .with("--mount", &spec("/made/here/file"))
        .sh("cat /etc/passwd; echo two >> /made/here/file; cat /etc/passwd; ls /made/here; stat -c %F /made/here/file")
        .run()?
        .succeeds()?
        .prints("one\none\ntwo\nfile\nregular file\n")?;
    ensure!(fs::read_to_string(dir.join("file"))? == "one\ntwo\n", "the host does not see the write");
    Ok(())
}

fn bind_covers_what_the_image_has(bed: &Bed) -> Story {
    let dir = source(bed, "dir", "file", "the host's\n")?;
    let file = dir.join("file");
    bed.busybox()
        .with("-v", &volume(&dir, "/etc"))
        .with("-v", &volume(&dir, "/not/there/yet"))
        .sh("ls /etc; cat /not/there/yet/file")
        .run()?
        .succeeds()?
        .prints("file\nthe host's\n")?;
    for (source, target) in [(&file, "/etc"), (&dir, "/etc/passwd")] {
        let finished = bed.busybox().with("-v", &volume(source, target)).command(&["true"]).run()?;
        finished.refused_with(125)?.says("directory")?;
    }
    Ok(())
}

fn missing_source_is_made_or_refused(bed: &Bed) -> Story {
    let missing = bed.scratch().join("not/there");
    let spec = format!("type=bind,source={},target=/data", missing.display());
    bed.busybox()
        .with("--mount", &spec)
        .command(&["true"])
        .run()?
        .refused_with(125)?
        .says("does not exist")?;
    ensure!(!missing.exists(), "--mount made it");
    bed.busybox().with("-v", &volume(&missing, "/data")).sh("echo x > /data/x").run()?.succeeds()?;
    ensure!(fs::read_to_string(missing.join("x"))? == "x\n", "-v did not make it");
    Ok(())
}

fn binds_below_a_bind_come_along(bed: &Bed) -> Story {
    let dir = source(bed, "dir", "outer", "outer\n")?;
    let below = dir.join("below");
    fs::create_dir(&below)?;
    mount("tmpfs", &below, "tmpfs", MountFlags::empty(), None).context("mount a tmpfs")?;
    let story = || -> Story {
        fs::write(below.join("inner"), "inner\n")?;
        bed.busybox()
            .with("-v", &volume(&dir, "/data"))
            .sh("cat /data/outer /data/below/inner; echo x > /data/below/x; mv /data/outer /data/below/ && ls /data")
            .run()?
            .succeeds()?
            .prints("outer\ninner\nbelow\n")?;
        ensure!(fs::read_to_string(below.join("outer"))? == "outer\n", "not moved");
        let finished = bed
            .busybox()
            .with("-v", &volume(&dir, "/data:ro"))
            .sh("cat /data/below/x; echo x > /data/below/y")
            .run()?;
        ensure!(
            finished.code() != 0 && !below.join("y").exists(),
            "writable below a read-only bind\n{finished}"
        );
        finished.prints("x\n")?;
        Ok(())
    };
    let told = story();
    unmount(&below, UnmountFlags::DETACH)?;
    told
}

fn links_in_a_bind_lead_into_the_sandbox(bed: &Bed) -> Story {
    let dir = source(bed, "dir", "file", "shared\n")?;
    fs::write(bed.scratch().join("secret"), "the host's secret\n")?;
    symlink("../secret", dir.join("up"))?;
    symlink(bed.scratch().join("secret"), dir.join("absolute"))?;
    symlink("/etc/hostname", dir.join("other"))?;
    symlink("file", dir.join("near"))?;
    let script = "echo mine > /secret; mkdir -p /etc; echo mine > /etc/hostname; \
        cat /data/up /data/other /data/near; cat /data/../secret; cat /data/absolute 2>/dev/null; \
        cat /data/../../../../../../secret; ln -s /../../../../../../../../secret /data/higher; cat /data/higher; \
        cd /data && cat ../secret";
    let finished = bed.busybox().with("-v", &volume(&dir, "/data")).sh(script).run()?.succeeds()?;
    finished.prints("mine\nmine\nshared\nmine\nmine\nmine\nmine\n")?;
    ensure!(fs::read_to_string(bed.scratch().join("secret"))? == "the host's secret\n", "it was changed");
    Ok(())
}

fn links_at_a_target_stay_inside(bed: &Bed) -> Story {
    let dir = source(bed, "dir", "file", "shared\n")?;
    let outside = bed.scratch().join("outside");
    fs::create_dir(&outside)?;
    let mut tree = base(bed)?;
    tree.directory("real");
    tree.symlink("absolute", "/real");
    tree.symlink("climbing", &format!("../../../../../..{}", outside.display()));
    tree.symlink("kernel", "/proc");
    tree.symlink("kernel-file", "/proc/self/attr/current");
    let image = bed.generate("linked", &Image::new(vec![tree.to_layer()]))?;
    image
        .sandbox()
        .with("-v", &volume(&dir, "/absolute"))
        .sh("cat /real/file; echo x > /absolute/new")
        .run()?
        .succeeds()?
        .prints("shared\n")?;
    ensure!(dir.join("new").exists(), "not mounted where the link leads");
    let finished =
        image.sandbox().with("-v", &volume(&dir, "/climbing/x")).sh("cat /climbing/x/file").run()?;
    // It is made inside of the sandbox, or refused.
    ensure!(finished.code() == 0 || finished.code() == 125, "{finished}");
    ensure!(fs::read_dir(&outside)?.count() == 0, "something was made outside of the sandbox\n{finished}");
    for target in ["/kernel", "/kernel/sys"] {
        let finished = image.sandbox().with("-v", &volume(&dir, target)).command(&["true"]).run()?;
        finished.refused_with(125)?.says("/proc")?;
    }
    let file = volume(&dir.join("file"), "/kernel-file");
    image.sandbox().with("-v", &file).command(&["true"]).run()?.refused_with(125)?;
    Ok(())
}

fn file_belongs_to_the_user_that_made_it(bed: &Bed) -> Story {
    let dir = source(bed, "dir", "root's", "")?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777))?;
    fs::set_permissions(dir.join("root's"), fs::Permissions::from_mode(0o600))?;
    let script = "umask 027; id -u; echo x > /data/file; mkdir /data/dir; ln -s x /data/link; mknod /data/fifo p; \
        cat \"/data/root's\" 2>/dev/null || echo refused; stat -c '%u %g %a' /data/file /data/dir /data/fifo; \
        stat -c '%u %g' /data/link; rm /data/link";
    bed.busybox()
        .with("-u", "1234:5678")
        .with("-v", &volume(&dir, "/data"))
        .sh(script)
        .run()?
        .succeeds()?
        .prints("1234\nrefused\n1234 5678 640\n1234 5678 750\n1234 5678 640\n1234 5678\n")?;
    let metadata = fs::metadata(dir.join("dir"))?;
    ensure!((metadata.uid(), metadata.gid(), metadata.mode()) == (1234, 5678, 0o040_750), "{metadata:?}");
    Ok(())
}

fn device_nodes_in_a_bind_open_nothing(bed: &Bed) -> Story {
    let dir = source(bed, "dir", "x", "")?;
    let node = dir.join("disk");
    let device = rustix::fs::makedev(7, 0);
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &node,
        rustix::fs::FileType::BlockDevice,
        rustix::fs::Mode::from_raw_mode(0o666),
        device,
    )?;
    let script = "stat -c '%F %t %T' /data/disk; head -c 1 /data/disk 2>&1 || true";
    let finished = bed.busybox().with("-v", &volume(&dir, "/data")).sh(script).run()?.succeeds()?;
    ensure!(finished.out().starts_with("block special file 7 0\n"), "{finished}");
    ensure!(finished.out().contains("not permitted"), "the device could be opened\n{finished}");
    Ok(())
}

fn tmpfs_is_as_asked_for(bed: &Bed) -> Story {
    let script = "stat -c %a /a /b /c; grep -E ' /[abc] ' /proc/mounts | cut -d' ' -f2-4 | sed 's/,size.*//;s/,mode.*//;s/,inode64//' | sort; \
        dd if=/dev/zero of=/b/x bs=1k count=100 2>/dev/null || echo full; echo x > /c/x 2>/dev/null || echo refused; \
        cp /bin/busybox /d/ && /d/busybox echo run; cp /bin/busybox /a/ && /a/busybox echo run 2>/dev/null || echo noexec";
    bed.busybox()
        .with("--tmpfs", "/a")
        .with("--tmpfs", "/b:size=64k,mode=700")
        .with("--mount", "type=tmpfs,target=/c,tmpfs-mode=0750,readonly")
        .with("--tmpfs", "/d:exec")
        .sh(script)
        .run()?
        .succeeds()?
        .prints(
            "1777\n700\n750\n/a tmpfs rw,nosuid,nodev,noexec,relatime\n/b tmpfs rw,nosuid,nodev,noexec,relatime\n\
             /c tmpfs ro,nosuid,nodev,noexec,relatime\nfull\nrefused\nrun\nnoexec\n",
        )?;
    Ok(())
}

fn mount_below_a_mount_comes_after_it(bed: &Bed) -> Story {
    let dir = source(bed, "dir", "file", "content\n")?;
    bed.busybox()
        .with("-v", &volume(&dir, "/outer/inner"))
        .with("--tmpfs", "/outer")
        .sh("ls /outer; cat /outer/inner/file; grep -c ' /outer ' /proc/mounts")
        .run()?
        .succeeds()?
        .prints("inner\ncontent\n1\n")?;
    Ok(())
}

fn read_only_root_keeps_its_mounts_writable(bed: &Bed) -> Story {
    let dir = source(bed, "dir", "x", "")?;
    bed.busybox()
        .option("--read-only")
        .with("--tmpfs", "/run")
        .with("-v", &volume(&dir, "/new/data"))
        .sh("echo a > /run/a && echo b > /new/data/b && cat /run/a /new/data/b; echo x > /new/x 2>/dev/null || echo refused")
        .run()?
        .succeeds()?
        .prints("a\nb\nrefused\n")?;
    Ok(())
}

fn bad_mounts_are_refused(bed: &Bed) -> Story {
    for (option, value, word) in [
        ("-v", "/only", "TARGET"),
        ("-v", "relative/path:/data", "cannot name a volume"),
        ("-v", "/a:relative", "not absolute"),
        ("-v", "/a:/", "`/`"),
        ("-v", "/tmp:/proc/x", "/proc"),
        ("-v", "/tmp:/sys", "/sys"),
        ("-v", "/a:/b:rshared", "rshared"),
        ("--mount", "type=nfs,source=/a,target=/b", "nfs"),
        ("--mount", "type=bind,source=/a,target=/b,consistency=cached", "consistency"),
        ("--tmpfs", "/a:size=huge", "huge"),
    ] {
        let finished = bed.busybox().with(option, value).command(&["true"]).run()?;
        ensure!(finished.code() != 0, "{option} {value} was accepted\n{finished}");
        finished.says(word)?;
    }
    let dir = source(bed, "dir", "x", "")?;
    bed.busybox()
        .with("-v", &volume(&dir, "/data"))
        .with("--tmpfs", "/data/")
        .command(&["true"])
        .run()?
        .refused_with(125)?
        .says("two mounts")?;
    Ok(())
}

fn killed_share_is_an_error_and_no_hang(bed: &Bed) -> Story {
    let dir = source(bed, "dir", "file", "content\n")?;
    let script = "cat /data/file; echo up; until read -r line; do :; done; cat /data/file; echo x > /data/new; \
        ls /data; echo survived";
    let mut running = bed.busybox().with("-v", &volume(&dir, "/data")).held_input().sh(script).start()?;
    running.wait_for_stdout("up\n")?;
    running.wait_for("the file server", file_server_below)?.kill();
    running.write(b"\n")?;
    let finished = running.wait()?.succeeds()?;
    ensure!(finished.out().ends_with("up\nsurvived\n"), "files are still there\n{finished}");
    ensure!(finished.err().contains("/O error"), "the sandbox sees no I/O error\n{finished}");
    finished.says("file server")?;
    ensure!(!dir.join("new").exists(), "something was written");
    Ok(())
}
