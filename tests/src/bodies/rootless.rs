//! A user without any rights but to open `/dev/kvm`: from an image's archive to what runs in a VM or a container.
//! (Many other bodies are told by such a user, too.)

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal};
use serde_json::Value;
use tempfile::TempDir;

use super::crash::vmm_below;
use super::rootfs::base;
use crate::bed::Bed;
use crate::finished::Finished;
use crate::image::Image;
use crate::plain_user::{self, FIRST_SUBORDINATE, ID, Ids};
use crate::process::{Input, Running};
use crate::suite::{Body, Story, body};
use crate::tree::{Tree, What};
use crate::world::{Isolation, Need};

pub const BODIES: &[Body] = &[
    body!(plain_user_runs_vms_from_directories_of_its_own).only(Isolation::Vm),
    body!(plain_user_s_sandbox_is_cleaned_up_after_a_kill).only(Isolation::Vm),
    body!(plain_user_s_files_are_shared_as_its_own).only(Isolation::Vm),
    body!(plain_user_without_further_ids_is_alone_in_its_container).only(Isolation::Container),
    body!(plain_user_s_image_has_its_owners).only(Isolation::Container).needs(&[Need::NewIdMap]),
    body!(plain_user_s_limits_need_a_cgroup).only(Isolation::Container),
    body!(plain_user_s_limits_hold_in_a_cgroup_that_was_given_to_it)
        .only(Isolation::Container)
        .needs(&[Need::CgroupV2]),
    body!(device_nodes_of_an_image_are_left_out_for_a_plain_user).only(Isolation::Container),
    body!(plain_user_s_trees_go_with_their_image).only(Isolation::Container).needs(&[Need::NewIdMap]),
    body!(plain_user_s_volume_is_removed_with_others_files)
        .only(Isolation::Container)
        .needs(&[Need::NewIdMap]),
];

/// The user, with a home and a copy of `cloche` and its kernel.
struct User<'a> {
    bed: &'a Bed<'a>,
    home: TempDir,
    runtime_dir: bool,
}

impl<'a> User<'a> {
    fn new(bed: &'a Bed<'a>) -> Result<Self> {
        // Not in the bed, which only root can enter.
        let home = tempfile::Builder::new().prefix("cloche-user.").tempdir()?;
        let user = Self { bed, home, runtime_dir: true };
        let kernel = bed.run(&["kernel", "path"])?.succeeds()?.out();
        let kernels = user.path("home/.cache/cloche/kernels/default");
        for directory in ["device", "run"] {
            fs::create_dir(user.path(directory))?;
        }
        fs::create_dir_all(&kernels)?;
        fs::copy(kernel.trim(), kernels.join("vmlinux")).context("copy the kernel")?;
        let program = Command::new("sh").args(["-c", "command -v \"$0\""]).arg(&bed.world().cloche).output();
        let found = program.ok().map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        let found = found.filter(|path| !path.is_empty()).map_or(bed.world().cloche.clone(), PathBuf::from);
        fs::copy(&found, user.path("cloche")).with_context(|| format!("copy {}", found.display()))?;
        let archive = Image::new(vec![base(bed)?.to_layer()]).to_docker_archive("busybox");
        fs::write(user.path("busybox.tar"), archive)?;
        fs::set_permissions(user.path(""), Permissions::from_mode(0o755))?;
        for own in ["home", "home/.cache", "home/.cache/cloche", "run"] {
            chown(user.path(own), Some(ID), Some(ID))?;
        }
        let archive = user.path("busybox.tar").display().to_string();
        user.run(&["image", "load", "--name", "busybox", &archive])?.succeeds()?;
        Ok(user)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn start(&self, words: &[&str]) -> Result<Running> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(plain_user::words(&self.path("device"), Ids::Alone, &self.path("cloche"))).args(words);
        command.env_clear().env("HOME", self.path("home"));
        if self.runtime_dir {
            command.env("XDG_RUNTIME_DIR", self.path("run"));
        }
        Running::start(command, &Input::Null, self.bed.deadline())
    }

    fn run(&self, words: &[&str]) -> Result<Finished> {
        self.start(words)?.wait()
    }

    fn records(&self) -> Result<Value> {
        let printed = self.run(&["ps", "-a", "--json"])?.succeeds()?;
        Ok(serde_json::from_slice(&printed.stdout)?)
    }
}

fn owner(path: &Path) -> Result<(u32, u32)> {
    let metadata = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    Ok((metadata.uid(), metadata.gid()))
}

fn plain_user_runs_vms_from_directories_of_its_own(bed: &Bed) -> Story {
    let mut user = User::new(bed)?;
    let script = "id -u; echo told >&2; exit 3";
    let words = ["run", "--require", "vm", "--name", "kept", "busybox", "sh", "-c", script];
    user.run(&words)?.exits_with(3)?.prints("0\n")?.says("told")?;
    for (place, mode) in [("home/.local/share/cloche", 0o700), ("run/cloche/sandboxes", 0o700)] {
        ensure!(owner(&user.path(place))? == (ID, ID), "{place} is somebody else's");
        let open = fs::metadata(user.path(place))?.mode() & 0o777 & !mode;
        ensure!(place.starts_with("home") || open == 0, "{place} is open to others: {open:o}");
    }
    let records = user.records()?;
    ensure!(records[0]["exit_code"] == 3 && records[0]["name"] == "kept", "{records}");
    user.run(&["rm", "kept"])?.succeeds()?;
    // Without a runtime directory, also after `su`, which leaves another user's.
    user.runtime_dir = false;
    user.run(&["run", "--rm", "busybox", "sh", "-c", "true"])?.succeeds()?;
    ensure!(user.path("home/.local/state/cloche/sandboxes").is_dir(), "the state is elsewhere");
    Ok(())
}

fn plain_user_s_sandbox_is_cleaned_up_after_a_kill(bed: &Bed) -> Story {
    let user = User::new(bed)?;
    let words = ["run", "--name", "victim", "busybox", "sh", "-c", "echo up; sleep 100000"];
    let mut running = user.start(&words)?;
    running.wait_for_stdout("up\n")?;
    let vmm = running.wait_for("a VMM process", vmm_below)?;
    ensure!(owner(&process_directory(vmm.pid))?.0 == ID, "its VMM is another user's");
    let records = user.records()?;
    ensure!(records[0]["status"] == "running" && records[0]["isolation"] == "vm", "{records}");
    user.run(&["pause", "victim"])?.succeeds()?;
    ensure!(user.records()?[0]["status"] == "paused", "it cannot be paused");
    running.signal(Signal::KILL)?;
    running.wait_for_end()?;
    let records = user.records()?;
    ensure!(records[0]["status"] == "exited" && records[0]["exit_code"] == 137, "{records}");
    running.wait()?.exits_with(137)?;
    user.run(&["rm", "victim"])?.succeeds()?;
    bed.is_clean()
}

fn process_directory(pid: Pid) -> PathBuf {
    format!("/proc/{}", pid.as_raw_nonzero()).into()
}

fn plain_user_s_files_are_shared_as_its_own(bed: &Bed) -> Story {
    let user = User::new(bed)?;
    let shared = user.path("home/shared");
    fs::create_dir(&shared)?;
    fs::write(shared.join("of-root"), "root's\n")?;
    fs::set_permissions(shared.join("of-root"), Permissions::from_mode(0o600))?;
    fs::write(shared.join("own"), "own\n")?;
    for own in [&shared, &shared.join("own")] {
        chown(own, Some(ID), Some(ID))?;
    }
    let volume = format!("{}:/data", shared.display());
    let script =
        "cat /data/own; echo new > /data/new; cat /data/of-root || echo refused; stat -c %u /data/own";
    let words = ["run", "--rm", "-v", &volume, "busybox", "sh", "-c", script];
    user.run(&words)?.succeeds()?.prints("own\nrefused\n0\n")?;
    ensure!(owner(&shared.join("new"))? == (ID, ID), "the new file is somebody else's");
    // There is no other user whom a file could belong to.
    let words = ["run", "--rm", "-u", "1000", "-v", &volume, "busybox", "touch", "/data/others"];
    let finished = user.run(&words)?;
    ensure!(finished.code() != 0 && !shared.join("others").exists(), "a file of nobody's\n{finished}");
    Ok(())
}

/// A bed of a plain user's.
fn plain<'a>(bed: &'a Bed<'_>, ids: Ids) -> Result<Bed<'a>> {
    Bed::of_plain_user(bed.world(), Isolation::Container, ids)
}

fn plain_user_without_further_ids_is_alone_in_its_container(bed: &Bed) -> Story {
    let bed = plain(bed, Ids::Alone)?;
    let script = "id -u; id -g; tr -s ' ' < /proc/self/uid_map; touch /f && chown 1 /f || echo refused";
    let finished = bed.busybox().sh(script).run()?.succeeds()?;
    finished.prints(&format!("0\n0\n 0 {ID} 1\nrefused\n"))?;
    let other = bed.busybox().with("-u", "1").command(&["true"]).run()?;
    other.refused_with(125)?.says("user namespace")?;
    bed.check_out()
}

/// The base image, and above it these.
fn above_base(bed: &Bed, layers: &[Tree]) -> Result<Image> {
    let base = base(bed)?.to_layer();
    Ok(Image::new(std::iter::once(base).chain(layers.iter().map(Tree::to_layer)).collect()))
}

fn plain_user_s_image_has_its_owners(bed: &Bed) -> Story {
    let mut owned = Tree::default();
    owned.directory("made-in").mode = 0o1777;
    owned.file("own", "").owner = (0, 0);
    owned.file("daemons", "").owner = (1, 2);
    owned.file("last", "").owner = (65_536, 65_536);
    let mut beyond = owned.clone();
    beyond.file("beyond", "").owner = (65_537, 0);
    let (owned, beyond) = (above_base(bed, &[owned])?, above_base(bed, &[beyond])?);
    let many = plain(bed, Ids::Many)?;
    let script = "stat -c '%u %g' /own /daemons /last; id -u; touch /made-in/it; stat -c %u /made-in/it";
    let image = many.generate("owned", &owned)?;
    let finished = image.sandbox().with("-u", "7").sh(script).run()?.succeeds()?;
    finished.prints("0 0\n1 2\n65536 65536\n7\n7\n")?;
    drop(image);
    let image = many.generate("beyond", &beyond)?;
    image.sandbox().command(&["true"]).run()?.refused_with(125)?.says("/beyond")?.says("/etc/subuid")?;
    drop(image);
    many.check_out()?;
    let alone = plain(bed, Ids::Alone)?;
    let image = alone.generate("owned", &owned)?;
    image.sandbox().sh("stat -c '%u %g' /own /daemons /last").run()?.succeeds()?.prints("0 0\n0 0\n0 0\n")?;
    drop(image);
    alone.check_out()
}

fn plain_user_s_limits_need_a_cgroup(bed: &Bed) -> Story {
    let bed = plain(bed, Ids::Alone)?;
    for (option, value) in [("--memory", "64m"), ("--cpus", "0.5"), ("--pids-limit", "10")] {
        let finished = bed.busybox().with(option, value).command(&["true"]).run()?;
        finished.refused_with(125)?.says("systemd-run --user")?;
    }
    bed.check_out()
}

/// A v2 cgroup for one command, in which its user may make others, as systemd's `Delegate=yes` makes it (kernel:
/// cgroup-v2.rst, "Delegation Containment"). Once it has handed controllers down, no other process gets in.
struct Delegated(PathBuf);

impl Delegated {
    fn new(name: &str) -> Result<Self> {
        let top = PathBuf::from(format!("/sys/fs/cgroup/cloche-tests-{name}-{}", std::process::id()));
        let delegated = Self(top.join("user"));
        fs::create_dir_all(&delegated.0)?;
        for directory in [Path::new("/sys/fs/cgroup"), &top] {
            let path = directory.join("cgroup.subtree_control");
            fs::write(&path, "+cpu +memory +pids").with_context(|| format!("write to {}", path.display()))?;
        }
        for name in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            chown(delegated.0.join(name), Some(ID), Some(ID))?;
        }
        Ok(delegated)
    }

    /// The same command in it.
    fn with(&self, command: &Command) -> Command {
        let mut inside = Command::new("sh");
        inside.args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#]).arg(&self.0);
        inside.arg(command.get_program()).args(command.get_args());
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        inside
    }

    /// The names of the cgroups in it.
    fn below(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.0)?.collect::<Result<Vec<_>, _>>()?;
        let directories = entries.into_iter().filter(|entry| entry.path().is_dir());
        Ok(directories.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        for name in self.below().unwrap_or_default() {
            let _ = fs::remove_dir(self.0.join(name));
        }
        let _ = fs::remove_dir(&self.0);
        let _ = self.0.parent().map(fs::remove_dir);
    }
}

fn plain_user_s_limits_hold_in_a_cgroup_that_was_given_to_it(bed: &Bed) -> Story {
    let bed = plain(bed, Ids::Alone)?;
    let start = |delegated: &Delegated, words: &[&str]| {
        let mut command = bed.cloche();
        command.args(["run", "--isolation", "container"]).args(words);
        Running::start(delegated.with(&command), &Input::Null, bed.deadline())
    };
    let limits = ["--memory", "64m", "--pids-limit", "20", "--cpus", "0.5"];
    let script = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max; cat /proc/self/cgroup";
    let limited = Delegated::new("limited")?;
    let words = [&limits[..], &["--rm", "busybox", "sh", "-c", script]].concat();
    let finished = start(&limited, &words)?.wait()?;
    finished.succeeds()?.prints("67108864\n20\n50000 100000\n0::/\n")?;
    let script = "x=0123456789abcdef; while :; do x=$x$x; done";
    let words = ["--rm", "--memory", "32m", "busybox", "sh", "-c", script];
    let exhausted = Delegated::new("exhausted")?;
    start(&exhausted, &words)?.wait()?.exits_with(137)?;
    // A limit on processes alone, which the kernel would let a cgroup hand down that has processes.
    let counted = Delegated::new("counted")?;
    let words = ["--rm", "--pids-limit", "9", "busybox", "cat", "/sys/fs/cgroup/pids.max"];
    start(&counted, &words)?.wait()?.succeeds()?.prints("9\n")?;
    let words = ["--rm", "--name", "paused", "busybox", "sh", "-c", "echo up; sleep 100000"];
    let paused = Delegated::new("paused")?;
    let mut running = start(&paused, &words)?;
    running.wait_for_stdout("up\n")?;
    bed.run(&["pause", "paused"])?.succeeds()?;
    bed.run(&["unpause", "paused"])?.succeeds()?;
    running.signal(Signal::KILL)?;
    running.wait_for_end()?;
    bed.run(&["rm", "--force", "paused"])?;
    running.wait()?.exits_with(137)?;
    for delegated in [limited, exhausted, counted, paused] {
        // Where the command itself was, and what sandboxes' cgroups are below.
        let left = delegated.below()?;
        let stays = |name: &String| name == "cloche" || name.starts_with("cloche-monitor-");
        ensure!(left.iter().all(stays), "{left:?} are left");
        // Fails if anything is in it.
        fs::remove_dir(delegated.0.join("cloche"))?;
    }
    bed.check_out()
}

fn device_nodes_of_an_image_are_left_out_for_a_plain_user(bed: &Bed) -> Story {
    let (mut lower, mut upper) = (Tree::default(), Tree::default());
    lower.directory("nodes");
    lower.file("nodes/disk", "a file of the lower layer");
    upper.directory("nodes");
    upper.add("nodes/disk", 0o666, What::Character(1, 3));
    upper.file("nodes/file", "");
    let image = above_base(bed, &[lower, upper])?;
    let bed = plain(bed, Ids::Alone)?;
    let image = bed.generate("nodes", &image)?;
    let finished = image.sandbox().sh("ls /nodes").run()?.succeeds()?;
    finished.prints("file\n")?.says("1 device nodes")?;
    // Unpacked already, there is nothing to tell.
    image
        .sandbox()
        .sh("ls /nodes; mknod /nodes/disk c 1 3 || echo refused")
        .run()?
        .prints("file\nrefused\n")?;
    drop(image);
    bed.check_out()
}

/// Directories of unpacked layers.
fn trees(bed: &Bed) -> Vec<PathBuf> {
    let list = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let maps = list(&bed.store_root().join("trees")).filter(|path| path.is_dir());
    maps.flat_map(|map| list(&map).collect::<Vec<_>>()).collect()
}

fn plain_user_s_trees_go_with_their_image(bed: &Bed) -> Story {
    let mut files = Tree::default();
    let private = files.directory("private");
    (private.mode, private.owner) = (0o700, (33, 33));
    files.file("private/file", "").owner = (33, 33);
    let image = above_base(bed, &[files])?;
    let bed = plain(bed, Ids::Many)?;
    let before = trees(&bed);
    let image = bed.generate("private", &image)?;
    image.sandbox().with("-u", "33").sh("cat /private/file").run()?.succeeds()?;
    ensure!(trees(&bed).len() > before.len(), "nothing was unpacked");
    let usage = bed.json(&["system", "df", "--json"])?;
    let row = usage.as_array().into_iter().flatten().find(|row| row["kind"].to_string().contains("unpacked"));
    ensure!(
        row.is_some_and(|row| row["count"].as_u64() > Some(0) && row["bytes"].as_u64() > Some(100_000)),
        "{usage:#}"
    );
    let running = image.sandbox().sh("echo up; sleep 100000").start()?;
    running.wait_for_stdout("up\n")?;
    bed.run(&["image", "rm", "private"])?.succeeds()?;
    ensure!(trees(&bed).len() > before.len(), "a running container's root file system was removed");
    running.signal(Signal::KILL)?;
    running.wait()?;
    bed.run(&["image", "prune"])?.succeeds()?;
    ensure!(trees(&bed) == before, "left: {:?}", trees(&bed));
    bed.check_out()
}

fn plain_user_s_volume_is_removed_with_others_files(bed: &Bed) -> Story {
    let bed = plain(bed, Ids::Many)?;
    let script = "mkdir /data/of && touch /data/of/seven && chown -R 7 /data/of && chmod 700 /data/of";
    bed.busybox().with("-v", "plain-data:/data").sh(script).run()?.succeeds()?;
    let file = bed.store_root().join("volumes/plain-data/data/of");
    ensure!(owner(&file)?.0 == FIRST_SUBORDINATE + 6, "the directory is {}'s", owner(&file)?.0);
    bed.run(&["volume", "rm", "plain-data"])?.succeeds()?;
    ensure!(!file.exists(), "it is left");
    bed.check_out()
}
