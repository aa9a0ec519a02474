//! Root file systems of EROFS layers.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use cloche_runtime::{Lower, Rootfs};
use serde_json::json;

use crate::{Need, Test, fixture::Sandbox};

const MKFS: Need = Need::Command("mkfs.erofs");

pub fn tests() -> impl IntoIterator<Item = Test> {
    crate::tests![layers:
        single_layer_is_readable_and_writable needs MKFS,
        upper_layer_covers_the_lower needs MKFS,
        layers_on_tmpfs_are_mounted_through_loop_devices needs MKFS,
        hundred_layers_are_mounted needs MKFS,
        writable_layer_keeps_to_its_size needs MKFS,
        readonly_root_of_layers_cannot_be_written needs MKFS,
        layer_that_is_not_erofs_is_named,
        changes_are_a_layer_while_it_runs_and_after_its_end needs MKFS,
        killed_container_leaves_no_mount_and_no_loop_device needs MKFS,
    ]
}

/// Makes an EROFS image of a directory.
fn image(directory: &Path, image: &Path) -> PathBuf {
    let output =
        Command::new("mkfs.erofs").arg(image).arg(directory).env("PATH", "/usr/sbin:/usr/bin:/bin").output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
    image.to_owned()
}

/// A sandbox whose root is the busybox root as a layer, and further layers that hold one file each.
fn layered(script: &str, further: &[(&str, &str)], store: &Path) -> Sandbox {
    let mut sandbox = Sandbox::script(script);
    let mut lowers = vec![Lower::from(image(&sandbox.path("/"), &store.join("base.erofs")))];
    for (number, (name, content)) in further.iter().enumerate() {
        let tree = store.join(format!("tree{number}"));
        fs::create_dir_all(&tree).unwrap();
        fs::write(tree.join(name), content).unwrap();
        lowers.push(image(&tree, &store.join(format!("{number}.erofs"))).into());
    }
    sandbox.rootfs = Rootfs::Layers { lowers, upper_bytes: Some(8 << 20) };
    sandbox
}

fn single_layer_is_readable_and_writable() {
    let store = tempfile::tempdir_in("/var/tmp").unwrap();
    let script =
        "echo new > /tmp/x && cat /tmp/x; rm /etc/group && ls /etc; cat /proc/self/mountinfo; ls -a /";
    let output = layered(script, &[], store.path()).run().success();
    assert!(output.starts_with("new\npasswd\n"), "{output}");
    let roots: Vec<_> = output.lines().filter(|line| line.split(' ').nth(4) == Some("/")).collect();
    assert!(matches!(roots.as_slice(), [root] if root.contains(" - overlay overlay rw,")), "{output}");
    // Neither the caller's files nor the base of the mounts are to be seen.
    assert!(!output.contains(" - erofs ") && !output.contains(" /var "), "{output}");
    let (_, root) = output.split_once("\n..\n").unwrap();
    for name in ["upper", "work", "root"] {
        assert!(!root.lines().any(|line| line == name), "{output}");
    }
}

fn upper_layer_covers_the_lower() {
    let store = tempfile::tempdir_in("/var/tmp").unwrap();
    let sandbox =
        layered("cat /file /other", &[("file", "low\n"), ("other", "o\n"), ("file", "high\n")], store.path());
    assert_eq!(sandbox.run().success(), "high\no");
}

fn layers_on_tmpfs_are_mounted_through_loop_devices() {
    let store = tempfile::tempdir_in("/dev/shm").unwrap();
    let sandbox = layered("cat /file", &[("file", "on tmpfs\n")], store.path());
    assert_eq!(sandbox.run().success(), "on tmpfs");
}

fn hundred_layers_are_mounted() {
    let store = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut sandbox = layered("cat /file", &[("file", "x\n")], store.path());
    if let Rootfs::Layers { lowers, .. } = &mut sandbox.rootfs {
        let top = lowers[1].path.clone();
        for number in 0..98 {
            let copy = store.path().join(format!("copy{number}"));
            fs::copy(&top, &copy).unwrap();
            lowers.push(copy.into());
        }
        assert_eq!(lowers.len(), 100);
    }
    assert_eq!(sandbox.run().success(), "x");
}

fn writable_layer_keeps_to_its_size() {
    let store = tempfile::tempdir_in("/var/tmp").unwrap();
    let sandbox = layered("dd if=/dev/zero of=/big bs=1M count=9 2>&1; ls -s /big", &[], store.path());
    let output = sandbox.run().success();
    assert!(output.contains("No space left on device"), "{output}");
}

fn readonly_root_of_layers_cannot_be_written() {
    let store = tempfile::tempdir_in("/var/tmp").unwrap();
    let sandbox = layered("touch /x || echo refused", &[], store.path()).with("/root/readonly", json!(true));
    assert_eq!(sandbox.run().success(), "refused");
}

fn layer_that_is_not_erofs_is_named() {
    let mut sandbox = Sandbox::new(&["true"]);
    let junk = sandbox.directory.path().join("junk");
    fs::write(&junk, vec![7; 65536]).unwrap();
    sandbox.rootfs = Rootfs::Layers { lowers: vec![junk.clone().into()], upper_bytes: None };
    let (code, message) = sandbox.refusal();
    assert_eq!(code, 125);
    assert!(message.starts_with(&format!("cannot mount the layer {} as EROFS", junk.display())), "{message}");
    sandbox.rootfs = Rootfs::Layers { lowers: vec![PathBuf::from("/no/such").into()], upper_bytes: None };
    assert!(sandbox.refusal().1.contains("cannot mount the layer /no/such as EROFS: No such file"));
    sandbox.rootfs = Rootfs::Layers { lowers: vec![], upper_bytes: None };
    assert_eq!(sandbox.refusal().1, "cannot make a root file system of no layers");
}

fn changes_are_a_layer_while_it_runs_and_after_its_end() {
    let store = tempfile::tempdir_in("/var/tmp").unwrap();
    let script =
        "trap 'touch /late; exit' TERM; rm /etc/group; rm -r /tmp; mkdir /tmp; echo x > /tmp/x; mv /etc/passwd /new; ln /new /tmp/new
        chown 5:6 /new; echo ready; while :; do sleep 0.02; done";
    let sandbox = layered(script, &[], store.path());
    let mut running = sandbox.start().unwrap();
    assert_eq!(running.read_line(), "ready");
    let listed = |changes: Option<std::io::Result<cloche_runtime::Changes>>| {
        let mut changes = changes.unwrap().unwrap();
        let archive = store.path().join("changes.tar");
        std::io::copy(&mut changes, &mut fs::File::create(&archive).unwrap()).unwrap();
        let output = Command::new("tar").args(["--numeric-owner", "-tvf"]).arg(&archive).output().unwrap();
        let lines = String::from_utf8(output.stdout).unwrap();
        let line = |line: &str| {
            let words: Vec<_> = line.split_whitespace().collect();
            format!("{} {} {}", words[0], words[1], words[5..].join(" "))
        };
        lines.lines().map(line).collect::<Vec<_>>()
    };
    let expected = [
        "drwxr-xr-x 0/0 etc/",
        "---------- 0/0 etc/.wh.group",
        "---------- 0/0 etc/.wh.passwd",
        "-rw-r--r-- 5/6 new",
        "drwxr-xr-x 0/0 tmp/",
        "---------- 0/0 tmp/.wh..wh..opq",
        "hrw-r--r-- 5/6 tmp/new link to new",
        "-rw-r--r-- 0/0 tmp/x",
    ];
    assert_eq!(listed(running.container.changes()), expected);
    running.container.signal(15).unwrap();
    running.container.wait().unwrap();
    let after = listed(running.container.changes());
    assert_eq!(after.len(), expected.len() + 1, "{after:?}");
    assert!(after.contains(&"-rw-r--r-- 0/0 late".to_owned()), "{after:?}");
    running.container.delete().unwrap();
}

fn killed_container_leaves_no_mount_and_no_loop_device() {
    let store = tempfile::tempdir_in("/dev/shm").unwrap();
    let sandbox = layered("echo ready; sleep 100", &[], store.path());
    let running = sandbox.start().unwrap();
    assert_eq!(running.read_line(), "ready");
    running.container.kill().unwrap();
    // The harness looks for traces.
    running.finish();
}
