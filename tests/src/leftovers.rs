//! What a test may have left on the host: mounts, loop devices, cgroups, network namespaces and links, processes.
//!
//! A [`Snapshot`] is taken before and after; what is new after a moment of grace is a leftover. Tests run one after
//! another, so nothing else that is ours is under way.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::procfs;

/// How deep the search for cgroups goes.
const CGROUP_DEPTH: usize = 6;

/// What is on the host, each thing as one line for people.
#[derive(Debug, Clone, Default)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Looks around. Reaps orphans that have ended.
    pub fn take() -> Self {
        let mut seen = BTreeSet::new();
        mounts(&mut seen);
        loop_devices(&mut seen);
        cgroups(Path::new("/sys/fs/cgroup"), CGROUP_DEPTH, &mut seen);
        for (directory, what) in [("/run/netns", "network namespace"), ("/sys/class/net", "network link")] {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                seen.insert(format!("{what} {}", entry.file_name().display()));
            }
        }
        seen.extend(procfs::live_descendants().iter().map(ToString::to_string));
        Self(seen)
    }

    /// What is there now and was not then, of what is called `kind` or, if that is empty, of all. The kernel takes some
    /// things down in the background, so this waits up to `grace` for the list to become empty.
    pub fn new_since(&self, grace: Duration, kind: &str) -> Vec<String> {
        let deadline = Instant::now() + grace;
        loop {
            let now = Self::take();
            let new: Vec<String> =
                now.0.difference(&self.0).filter(|line| line.starts_with(kind)).cloned().collect();
            if new.is_empty() || Instant::now() >= deadline {
                return new;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Kills every process below this one, so that one test's leftovers do not fail the next.
pub fn kill_processes() {
    for process in procfs::live_descendants() {
        process.kill();
    }
}

fn mounts(seen: &mut BTreeSet<String>) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in table.lines() {
        // proc(5): ID parent major:minor root POINT options [tags…] - TYPE SOURCE options
        let Some((front, back)) = line.split_once(" - ") else { continue };
        let point = front.split(' ').nth(4).unwrap_or_default();
        let mut back = back.split(' ');
        let (kind, source) = (back.next().unwrap_or_default(), back.next().unwrap_or_default());
        seen.insert(format!("mount of {kind} {source} on {point}"));
    }
}

fn loop_devices(seen: &mut BTreeSet<String>) {
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        if let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file")) {
            seen.insert(format!("loop device {} of {}", entry.file_name().display(), file.trim_end()));
        }
    }
}

fn cgroups(directory: &Path, depth: usize, seen: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        // The parent of all sandboxes' cgroups stays.
        if path.to_string_lossy().contains("cloche") && !path.ends_with("cloche") {
            seen.insert(format!("cgroup {}", path.display()));
        }
        if depth > 0 {
            cgroups(&path, depth - 1, seen);
        }
    }
}

/// Files and per-sandbox directories in the state directory. The top-level directories and the lock files in them,
/// which are empty, stay by design: removing them would race with the next command.
pub fn in_state_directory(state: &Path) -> Vec<String> {
    let mut found = Vec::new();
    walk(state, 0, &mut found);
    found
}

fn walk(directory: &Path, depth: usize, found: &mut Vec<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if depth > 0 {
                found.push(format!("state directory {}", path.display()));
            }
            walk(&path, depth + 1, found);
        } else if depth > 1 || entry.metadata().is_ok_and(|metadata| metadata.len() > 0) {
            found.push(format!("state file {}", path.display()));
        }
    }
}
