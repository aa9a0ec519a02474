//! Containers whose cgroup others are in: what is done to one is not done to the others.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use serde_json::json;

use crate::{
    Test,
    fixture::{Bundle, await_that, in_vm, text},
};

pub fn all() -> Vec<Test> {
    crate::tests![
        container_in_anothers_cgroup_is_apart_from_it,
        start_that_fails_in_anothers_cgroup_leaves_it_alone,
        processes_in_the_cgroup_before_outlive_the_container,
        cgroup_that_is_frozen_is_refused,
    ]
}

/// A cgroup's directories in all hierarchies.
fn directories(path: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).unwrap().flatten().map(|entry| entry.path());
    // On v2 alone, what is found there are cgroups, in which there is no such path.
    let all =
        hierarchies.chain([root.to_owned()]).map(|hierarchy| hierarchy.join(path.trim_start_matches('/')));
    all.filter(|directory| directory.join("cgroup.procs").exists()).collect()
}

/// One whose processes do not die with the first of them, but with its machine if it has one.
fn without_pid_namespace(command: &[&str]) -> Bundle {
    if in_vm() {
        return Bundle::new(command);
    }
    Bundle::new(command).with("/linux/namespaces", json!([{ "type": "mount" }, { "type": "uts" }]))
}

fn in_cgroup_of(first: &Bundle, command: &[&str]) -> Bundle {
    without_pid_namespace(command).with("/linux/cgroupsPath", json!(format!("/cloche/{}", first.id)))
}

fn container_in_anothers_cgroup_is_apart_from_it() {
    let first = without_pid_namespace(&["sleep", "100"]);
    first.start();
    let second = in_cgroup_of(&first, &["sleep", "200"]);
    second.start();
    assert!(
        second.errors().contains("the container's cgroup is not empty: /sys/fs/cgroup"),
        "{}",
        second.errors()
    );
    let words = ["exec", "--detach", &first.id, "sleep", "300"];
    assert!(
        first
            .command(&words)
            .stdout(fs::File::create(first.path("exec")).unwrap())
            .status()
            .unwrap()
            .success()
    );
    let count = |bundle: &Bundle, what: &str| bundle.ok(&["ps", &bundle.id]).matches(what).count();
    assert_eq!(["sleep 100", "sleep 200", "sleep 300"].map(|what| count(&first, what)), [1, 0, 1]);
    assert_eq!(["sleep 100", "sleep 200", "sleep 300"].map(|what| count(&second, what)), [0, 1, 0]);
    let refusal = first.refused(&["pause", &first.id]);
    assert!(refusal.contains("another container has its cgroup in"), "{refusal}");
    second.ok(&["pause", &second.id]);
    assert_eq!((first.status(), second.status()), ("running".into(), "paused".into()));
    second.ok(&["resume", &second.id]);
    first.ok(&["kill", "--all", &first.id, "KILL"]);
    first.await_status("stopped");
    assert_eq!(second.status(), "running");
    first.ok(&["delete", "--force", &first.id]);
    assert_eq!((second.status(), count(&second, "sleep 200")), ("running".into(), 1));
    second.ok(&["delete", "--force", &second.id]);
    assert_eq!(directories(&format!("/cloche/{}", first.id)), [] as [PathBuf; 0]);
}

fn start_that_fails_in_anothers_cgroup_leaves_it_alone() {
    let first = without_pid_namespace(&["sleep", "100"]);
    first.start();
    let second = in_cgroup_of(&first, &["true"]);
    for verb in ["create", "run"] {
        assert!(second.refused(&[verb, "--pid-file", "/nowhere/pid", &second.id]).contains("/nowhere"));
        assert_eq!(fs::read_dir(second.path("state")).unwrap().count(), 0);
        assert_eq!(first.status(), "running");
    }
    let inside = directories(&format!("/cloche/{}/cloche-{}", first.id, second.id));
    assert_eq!(inside, [] as [PathBuf; 0]);
}

/// A process that is put into a cgroup of its own; both end with it.
struct Stranger {
    process: Child,
    cgroup: PathBuf,
}

impl Stranger {
    fn new(path: &str) -> Self {
        let parts = ["memory", "unified", ""].map(|hierarchy| Path::new("/sys/fs/cgroup").join(hierarchy));
        let hierarchy = parts.into_iter().find(|hierarchy| hierarchy.join("cgroup.procs").exists()).unwrap();
        let cgroup = hierarchy.join(path.trim_start_matches('/'));
        fs::create_dir_all(&cgroup).unwrap();
        let process = Command::new("sleep").arg("100").spawn().unwrap();
        fs::write(cgroup.join("cgroup.procs"), process.id().to_string()).unwrap();
        Self { process, cgroup }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir(&self.cgroup);
    }
}

fn processes_in_the_cgroup_before_outlive_the_container() {
    let bundle = without_pid_namespace(&["sleep", "100"]);
    let path = format!("/cloche/{}", bundle.id);
    let mut stranger = Stranger::new(&path);
    for is_killed_first in [true, false] {
        bundle.start();
        if is_killed_first {
            bundle.ok(&["kill", "--all", &bundle.id, "KILL"]);
            bundle.await_status("stopped");
        }
        bundle.ok(&["delete", "--force", &bundle.id]);
        assert!(stranger.process.try_wait().unwrap().is_none());
        // In the other hierarchies nobody was.
        assert_eq!(directories(&path), [stranger.cgroup.clone()]);
    }
    // A command that is killed halfway has no say in it either.
    bundle.create();
    let record = bundle.path("state").join(&bundle.id).join("state.json");
    let mut known: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    let pid = known["process"]["pid"].as_i64().unwrap();
    known["process"] = json!(null);
    fs::write(&record, known.to_string()).unwrap();
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    await_that("it has ended", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
    });
    bundle.ok(&["delete", "--force", &bundle.id]);
    assert!(stranger.process.try_wait().unwrap().is_none());
    assert_eq!(directories(&path), [stranger.cgroup.clone()]);
}

fn cgroup_that_is_frozen_is_refused() {
    let first = without_pid_namespace(&["sleep", "100"]);
    first.start();
    first.ok(&["pause", &first.id]);
    let second = in_cgroup_of(&first, &["true"]);
    let output = second.run(&["create", &second.id]);
    assert!(!output.status.success() && text(&output.stderr).contains("unexpectedly frozen"), "{output:?}");
    assert_eq!(fs::read_dir(second.path("state")).unwrap().count(), 0);
    first.ok(&["resume", &first.id]);
    assert_eq!(first.status(), "running");
}
