//! The container's files: mounts, devices, and what an image might try with symbolic links.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt, symlink},
};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use serde_json::json;

use crate::{Test, fixture::Sandbox};

pub fn tests() -> impl IntoIterator<Item = Test> {
    crate::tests![files:
        default_devices_are_there_and_work,
        listed_device_gets_its_mode_and_owner,
        bind_mount_shows_its_source_and_keeps_to_its_options,
        bind_mount_of_a_file_makes_its_mount_point,
        readonly_bind_may_cover_submounts,
        mount_options_are_in_force,
        unknown_mount_option_is_explained,
        readonly_root_cannot_be_written,
        caller_files_are_out_of_reach,
        symlink_in_the_image_cannot_lead_a_mount_outside,
        links_that_lead_nowhere_are_followed_inside,
        mounts_reach_the_caller_through_shared_binds_of_a_shared_root,
        root_is_the_first_of_the_mounts,
        proc_behind_a_symlink_is_refused,
        magic_link_is_not_a_mount_point,
        root_propagation_is_the_specs,
        mount_points_made_beforehand_are_those_that_mounting_makes,
    ]
}

fn mount_points_made_beforehand_are_those_that_mounting_makes() {
    let (root, file) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    fs::create_dir(root.path().join("etc")).unwrap();
    symlink("/etc", root.path().join("link")).unwrap();
    let mount = |kind: &str, at: &str| json!({ "destination": at, "type": kind, "source": file.path() });
    let make = |mounts: serde_json::Value| {
        let process = json!({ "user": { "uid": 0, "gid": 0 }, "cwd": "/work/here" });
        let spec = json!({ "ociVersion": "1.2.0", "process": process, "mounts": mounts });
        cloche_runtime::make_mount_points(root.path(), &serde_json::from_value(spec).unwrap()).unwrap()
    };
    assert!(!make(json!([mount("tmpfs", "/data"), mount("bind", "/link/file")])));
    assert!(make(json!([mount("tmpfs", "/dev"), mount("devpts", "/dev/pts"), mount("tmpfs", "/work")])));
    let kind = |path: &str| fs::metadata(root.path().join(path)).ok().map(|found| found.is_dir());
    assert_eq!(
        ["data", "etc/file", "dev", "work/here"].map(kind),
        [Some(true), Some(false), Some(true), Some(true)]
    );
    assert_eq!(kind("dev/pts"), None);
}

fn default_devices_are_there_and_work() {
    let script = "ls /dev; readlink /dev/fd; readlink /dev/ptmx; stat -c '%a %t:%T' /dev/null; \
                  head -c 2 /dev/urandom | wc -c; ls /dev/ptmx; : > /dev/full; echo x > /dev/full || echo full";
    let output = Sandbox::script(script).run().success();
    let expected = "fd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n\
                    /proc/self/fd\npts/ptmx\n666 1:3\n2\n/dev/ptmx\nfull";
    assert_eq!(output, expected);
}

fn listed_device_gets_its_mode_and_owner() {
    let devices = json!([
        { "path": "/dev/deep/er", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 7, "gid": 8 },
        { "path": "/dev/queue", "type": "p", "major": 0, "minor": 0 },
    ]);
    let sandbox = Sandbox::script("stat -c '%F %a %u:%g %t:%T' /dev/deep/er /dev/queue")
        .with("/linux/devices", devices);
    assert_eq!(sandbox.run().success(), "character special file 640 7:8 a:e5\nfifo 666 0:0 0:0");
    let occupied = Sandbox::new(&["true"]).with(
        "/linux/devices",
        json!([
            { "path": "/etc/passwd", "type": "c", "major": 10, "minor": 229 },
        ]),
    );
    assert!(occupied.refusal().1.contains("/etc/passwd: the image has something else there"));
}

fn bind_mount_shows_its_source_and_keeps_to_its_options() {
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("file"), "inside").unwrap();
    let bind = |options: &[&str]| json!({ "destination": "/data/here", "type": "bind", "source": source.path(), "options": options });
    let script = "cat /data/here/file; echo; touch /data/here/new || echo refused";
    let readonly = Sandbox::script(script).with("/mounts/-", bind(&["bind", "ro"]));
    assert_eq!(readonly.run().success(), "inside\nrefused");
    let writable = Sandbox::script(script).with("/mounts/-", bind(&["rbind", "rprivate"]));
    assert_eq!(writable.run().success(), "inside");
    assert!(source.path().join("new").exists());
    let missing = json!({ "destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"] });
    let (code, message) = Sandbox::new(&["true"]).with("/mounts/-", missing).refusal();
    assert_eq!(code, 125);
    assert!(message.starts_with("cannot bind /no/such to /x: the source: No such file"), "{message}");
}

fn bind_mount_of_a_file_makes_its_mount_point() {
    let source = tempfile::NamedTempFile::new().unwrap();
    fs::write(source.path(), "bound").unwrap();
    let bind =
        json!({ "destination": "/run/secrets/key", "source": source.path(), "options": ["bind", "ro"] });
    let sandbox = Sandbox::new(&["cat", "/run/secrets/key"]).with("/mounts/-", bind);
    assert_eq!(sandbox.run().success(), "bound");
}

fn readonly_bind_may_cover_submounts() {
    let source = tempfile::tempdir().unwrap();
    fs::create_dir(source.path().join("sub")).unwrap();
    let bind = |options: &[&str]| {
        json!([
            { "destination": "/tree", "source": source.path(), "options": ["bind"] },
            { "destination": "/tree/sub", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/copy", "source": "/sys/fs", "options": options },
        ])
    };
    // /sys/fs has mounts below it wherever there are cgroups.
    let script = "awk '$5 ~ \"^/copy/\" { print $6 }' /proc/self/mountinfo | tr ',' '\\n'";
    let count = |options: &[&str]| {
        let sandbox = Sandbox::script(script).with("/mounts", bind(options));
        std::os::unix::fs::symlink("busybox", sandbox.path("bin/awk")).unwrap();
        let output = sandbox.run().success();
        (
            output.lines().filter(|word| *word == "rw").count(),
            output.lines().filter(|word| *word == "ro").count(),
        )
    };
    let (writable, _) = count(&["rbind", "ro"]);
    assert!(writable > 0);
    let (writable, readonly) = count(&["rbind", "rro"]);
    assert!(writable == 0 && readonly > 0);
}

fn mount_options_are_in_force() {
    let tmpfs = json!({
        "destination": "/scratch", "type": "tmpfs", "source": "scratch",
        "options": ["size=64k", "mode=750", "uid=5", "noexec", "noatime", "rslave"],
    });
    let script = "stat -c '%a %u' /scratch; dd if=/dev/zero of=/scratch/f bs=1k count=65 2>/dev/null || echo full; mount";
    let output = Sandbox::script(script).with("/mounts/-", tmpfs).run().success();
    assert!(output.starts_with("750 5\nfull\n"), "{output}");
    let line = output.lines().find(|line| line.contains("/scratch")).unwrap();
    assert!(
        line.starts_with("scratch on /scratch type tmpfs (rw,noexec,noatime,size=64k,mode=750,uid=5"),
        "{line}"
    );
}

fn unknown_mount_option_is_explained() {
    let tmpfs = json!({ "destination": "/x", "type": "tmpfs", "source": "x", "options": ["colour=red"] });
    let (_, message) = Sandbox::new(&["true"]).with("/mounts/-", tmpfs).refusal();
    assert!(
        message.starts_with("cannot mount tmpfs at /x: set the option \"colour\": tmpfs: Unknown parameter"),
        "{message}"
    );
    let unknown = json!({ "destination": "/x", "type": "nosuchfs", "source": "x" });
    let (_, message) = Sandbox::new(&["true"]).with("/mounts/-", unknown).refusal();
    assert!(
        message.starts_with("cannot mount nosuchfs at /x: ask the kernel for this file system"),
        "{message}"
    );
}

fn readonly_root_cannot_be_written() {
    let script = "touch /x || echo refused; touch /dev/shm/x && echo written";
    let sandbox =
        Sandbox::script(script).with("/root/readonly", json!(true)).with("/process/cwd", json!("/made"));
    assert_eq!(sandbox.run().success(), "refused\nwritten");
}

fn caller_files_are_out_of_reach() {
    // Nothing but the container's own mounts is in its mount namespace.
    let outside = tempfile::tempdir().unwrap();
    let path = outside.path().display();
    let script = format!("cat /proc/self/mountinfo; cd ..; pwd; ls -d /../..{path} {path}");
    let output = Sandbox::script(&script).run();
    let roots = output.stdout.lines().filter(|line| line.split(' ').nth(4) == Some("/")).count();
    assert_eq!(roots, 1, "{output:?}");
    assert!(output.stdout.ends_with("\n/\n"), "{output:?}");
    assert_eq!(output.stderr.matches("No such file").count(), 2, "{output:?}");
    // The escape from a plain chroot.
    let script = "mkdir /tmp/d; cd /; exec chroot /tmp/d /bin/sh";
    let sandbox = Sandbox::script(script);
    assert_ne!(sandbox.run().exit.status, cloche_runtime::ExitStatus::Code(0));
}

fn symlink_in_the_image_cannot_lead_a_mount_outside() {
    let outside = tempfile::tempdir().unwrap();
    let tmpfs = json!({ "destination": "/link/made", "type": "tmpfs", "source": "x" });
    let sandbox = Sandbox::script("ls -d /link/made; readlink /link").with("/mounts/-", tmpfs);
    symlink(outside.path(), sandbox.path("link")).unwrap();
    // Followed inside of the root, where the directory is made.
    assert_eq!(sandbox.run().success(), format!("/link/made\n{}", outside.path().display()));
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    let up = Sandbox::script("ls /up")
        .with("/mounts/-", json!({ "destination": "/up/proof", "type": "tmpfs", "source": "x" }));
    symlink("../../../../../..", up.path("up")).unwrap();
    assert!(up.run().success().contains("proof"));
    assert!(!fs::exists("/proof").unwrap());
}

fn proc_behind_a_symlink_is_refused() {
    // CVE-2019-19921: masked paths would be looked for somewhere else.
    let sandbox = Sandbox::new(&["true"]);
    fs::remove_dir(sandbox.path("proc")).unwrap();
    fs::create_dir(sandbox.path("elsewhere")).unwrap();
    symlink("elsewhere", sandbox.path("proc")).unwrap();
    let (code, message) = sandbox.refusal();
    assert_eq!(code, 125);
    assert!(
        message
            .contains("/proc: it must be mounted on ordinary directory, and no symbolic link may lead there"),
        "{message}"
    );
}

fn magic_link_is_not_a_mount_point() {
    for destination in ["/proc/self/cwd/x", "/proc/self/fd/3", "/link"] {
        let tmpfs = json!({ "destination": destination, "type": "tmpfs", "source": "x" });
        let sandbox = Sandbox::new(&["true"]).with("/mounts/-", tmpfs);
        symlink("/proc/self/fd/4", sandbox.path("link")).unwrap();
        assert_eq!(sandbox.refusal().0, 125, "{destination}");
    }
}

fn root_propagation_is_the_specs() {
    let sandbox =
        Sandbox::script("cat /proc/self/mountinfo").with("/linux/rootfsPropagation", json!("unbindable"));
    let output = sandbox.run().success();
    let root = output.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
    assert!(root.contains(" unbindable "), "{root}");
    let metadata = fs::metadata("/").unwrap();
    assert!(metadata.dev() > 0);
}

fn root_is_the_first_of_the_mounts() {
    let output = Sandbox::script("cat /proc/self/mountinfo").run().success();
    let first = output.lines().next().unwrap();
    assert_eq!(first.split(' ').nth(4), Some("/"), "{output}");
}

fn links_that_lead_nowhere_are_followed_inside() {
    let tmpfs = |at: &str| json!({ "destination": at, "type": "tmpfs", "source": "made" });
    let sandbox = Sandbox::script("cat /proc/self/mountinfo")
        .with("/mounts/-", tmpfs("/one/below"))
        .with("/mounts/-", tmpfs("relative/./at"))
        .with("/mounts/-", tmpfs("/../../odd/../plain"));
    symlink("../../two", sandbox.path("one")).unwrap();
    symlink("/there/three", sandbox.path("two")).unwrap();
    let output = sandbox.run().success();
    let made = output.lines().filter(|line| line.contains(" - tmpfs made "));
    let places: BTreeSet<_> = made.filter_map(|line| line.split(' ').nth(4)).collect();
    assert_eq!(places.into_iter().collect::<Vec<_>>(), ["/plain", "/relative/at", "/there/three/below"]);
    // A file to which an image's link leads, as /etc/resolv.conf often does.
    let source = tempfile::NamedTempFile::new().unwrap();
    fs::write(source.path(), "bound").unwrap();
    let bind =
        json!({ "destination": "/etc/resolv.conf", "source": source.path(), "options": ["bind", "ro"] });
    let sandbox = Sandbox::new(&["cat", "/run/resolve/stub.conf"]).with("/mounts/-", bind);
    let _ = fs::remove_file(sandbox.path("etc/resolv.conf"));
    symlink("../run/resolve/stub.conf", sandbox.path("etc/resolv.conf")).unwrap();
    assert_eq!(sandbox.run().success(), "bound");
    let endless = Sandbox::new(&["true"]).with("/mounts/-", tmpfs("/endless/below"));
    symlink("endless", endless.path("endless")).unwrap();
    let (code, message) = endless.refusal();
    assert_eq!(code, 125);
    assert!(message.contains("/endless/below") && message.contains("symbolic links"), "{message}");
}

/// A file system that this process has mounted.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn shared_tmpfs() -> Self {
        let mounted = Self(tempfile::tempdir().unwrap());
        let path = mounted.0.path();
        rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), None).unwrap();
        rustix::mount::mount_change(path, MountPropagationFlags::SHARED).unwrap();
        mounted
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        while rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH).is_ok() {}
    }
}

fn mounts_reach_the_caller_through_shared_binds_of_a_shared_root() {
    let here = Mounted::shared_tmpfs();
    fs::create_dir(here.0.path().join("sub")).unwrap();
    let arrives = |root: &str, option: &str| {
        let bind = json!({ "destination": "/data", "source": here.0.path(), "options": ["rbind", option] });
        let all = json!(["CAP_SYS_ADMIN"]);
        let sandbox = Sandbox::script("mount -t tmpfs made /data/sub && echo > /data/sub/file")
            .with("/mounts/-", bind)
            .with("/linux/rootfsPropagation", json!(root))
            .with("/process/capabilities", json!({ "bounding": all, "effective": all, "permitted": all }));
        sandbox.run().success();
        let file = here.0.path().join("sub/file");
        let arrived = file.exists();
        let _ = rustix::mount::unmount(here.0.path().join("sub"), UnmountFlags::DETACH);
        let _ = fs::remove_file(file);
        arrived
    };
    assert!(arrives("shared", "shared"));
    assert!(arrives("rshared", "rshared"));
    assert!(!arrives("shared", "rprivate"));
    assert!(!arrives("shared", "rslave"));
    assert!(!arrives("rprivate", "rshared"));
}
