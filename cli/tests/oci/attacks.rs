//! Attacks on other runtimes that became known, tried on this one. Each tells of what a runtime that falls for it would
//! show.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use rustix::fs::{CWD, FileType, Mode, RenameFlags, makedev, mknodat, renameat_with};
use serde_json::json;

use crate::{
    Test,
    fixture::{Bundle, link_applets, text},
};

pub fn all() -> Vec<Test> {
    crate::tests![
        mount_raced_with_symbolic_links_stays_in_the_root,
        masked_path_is_never_shown_by_a_null_device_of_the_containers,
        console_is_not_shown_at_the_end_of_a_symbolic_link,
        kernel_parameters_are_written_to_the_kernel_whatever_the_container_mounts,
        release_agent_is_out_of_reach,
        groups_of_the_caller_are_not_the_containers,
        first_process_cannot_look_into_what_joins_it,
        root_without_capabilities_cannot_look_into_what_enters_a_user_namespace,
        device_that_no_rule_speaks_of_is_not_opened,
        tmpcopyup_does_not_copy_what_the_kernel_tells,
    ]
}

/// Exchanges two files over and over, until it is dropped.
struct Swapping(Arc<AtomicBool>, Option<JoinHandle<()>>);

impl Swapping {
    fn start(one: &Path, other: &Path) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let (one, other, seen) = (one.to_owned(), other.to_owned(), is_over.clone());
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) {
                renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).unwrap();
            }
        });
        Self(is_over, Some(thread))
    }
}

impl Drop for Swapping {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        self.1.take().map(JoinHandle::join);
    }
}

/// CVE-2021-30465: two containers share a volume. While one of them starts, the other one exchanges a directory of the
/// volume, on which something is mounted, for a link to the host's root. A runtime that looks the path up twice mounts
/// there, and a later mount shows the host's files.
fn mount_raced_with_symbolic_links_stays_in_the_root() {
    let volume = tempfile::tempdir().unwrap();
    let secret = tempfile::tempdir().unwrap();
    fs::write(secret.path().join("secret"), "of the host").unwrap();
    let (place, link) = (volume.path().join("place"), volume.path().join("link"));
    fs::create_dir(&place).unwrap();
    symlink(format!("../../../../../../../..{}", secret.path().display()), &link).unwrap();
    let script = "cat /volume/place/secret; ls /volume/place; cut -d' ' -f5 /proc/self/mountinfo";
    let bundle = Bundle::script(script)
        .with(
            "/mounts/-",
            json!({ "destination": "/volume", "type": "bind", "source": volume.path(), "options": ["rbind"] }),
        )
        .with(
            "/mounts/-",
            json!({ "destination": "/volume/place", "type": "tmpfs", "source": "tmpfs", "options": ["nodev"] }),
        );
    fs::copy(bundle.path("rootfs/bin/busybox"), bundle.path("rootfs/bin/cut")).unwrap();
    let swapping = Swapping::start(&place, &link);
    let mut started = 0;
    for _ in 0..40 {
        let output = bundle.run(&["run", &bundle.id]);
        started += usize::from(output.status.success());
        let shown = text(&output.stdout);
        assert!(!shown.contains("of the host") && !shown.contains("secret"), "{output:?}");
    }
    drop(swapping);
    assert!(started > 0);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(secret.path().to_str().unwrap()), "{mounts}");
}

/// CVE-2025-31133: files are masked by the container's `/dev/null`, which here is a link to a file of the kernel's, or
/// nothing at all. A runtime that follows it gives the container that file, writable, or masks nothing.
fn masked_path_is_never_shown_by_a_null_device_of_the_containers() {
    let volume = tempfile::tempdir().unwrap();
    let (null, link) = (volume.path().join("null"), volume.path().join("other"));
    let bundle = || {
        Bundle::script("cat /etc/masked")
            .with(
                "/mounts/1",
                json!({ "destination": "/dev", "type": "bind", "source": volume.path(), "options": ["rbind"] }),
            )
            .with("/mounts/2", json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" }))
            .with("/linux/maskedPaths", json!(["/etc/masked"]))
    };
    let run = |bundle: &Bundle| {
        fs::write(bundle.path("rootfs/etc/masked"), "masked").unwrap();
        bundle.run(&["run", &bundle.id])
    };
    for target in ["/proc/sys/kernel/core_pattern", "/nowhere", "/etc/masked", "zero"] {
        let _ = fs::remove_file(&null);
        symlink(target, &null).unwrap();
        let output = run(&bundle());
        assert!(text(&output.stdout).is_empty(), "{target}: {output:?}");
        assert!(
            !output.status.success() && text(&output.stderr).contains("cannot mask"),
            "{target}: {output:?}"
        );
    }
    // A regular file would be writable, and what one container writes there others read.
    fs::remove_file(&null).unwrap();
    fs::write(&null, "no device").unwrap();
    assert!(text(&run(&bundle()).stderr).contains("is not the null device"));
    fs::remove_file(&null).unwrap();
    mknodat(CWD, &null, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 3)).unwrap();
    symlink("/proc/sys/kernel/core_pattern", &link).unwrap();
    let (mut masked, mut refused) = (0, 0);
    let swapping = Swapping::start(&null, &link);
    for _ in 0..40 {
        let output = run(&bundle());
        assert!(text(&output.stdout).is_empty(), "{output:?}");
        if output.status.success() { masked += 1 } else { refused += 1 }
    }
    drop(swapping);
    // Both were met, so the race was one.
    assert!(masked > 0 && refused > 0, "{masked} {refused}");
}

/// CVE-2025-52565: the terminal is shown at `/dev/console`, which the image has as a link to a file of the kernel's.
fn console_is_not_shown_at_the_end_of_a_symbolic_link() {
    let bundle = Bundle::script("cat /proc/self/mountinfo").with("/process/terminal", json!(true));
    let mut bundle = bundle;
    // No tmpfs: /dev is the image's.
    bundle.config["mounts"].as_array_mut().unwrap().remove(1);
    fs::create_dir_all(bundle.path("rootfs/dev")).unwrap();
    symlink("/proc/sys/kernel/core_pattern", bundle.path("rootfs/dev/console")).unwrap();
    let message = bundle.refused(&["run", &bundle.id]);
    assert!(message.contains("cannot mount /dev/console for the container's terminal"), "{message}");
    fs::remove_file(bundle.path("rootfs/dev/console")).unwrap();
    let output = bundle.ok(&["run", &bundle.id]);
    let shown = output.lines().filter(|line| line.contains(" /dev/console "));
    assert_eq!(shown.count(), 1, "{output}");
}

/// CVE-2025-52881: what is written to `/proc` goes somewhere else, since the container has something else mounted there.
fn kernel_parameters_are_written_to_the_kernel_whatever_the_container_mounts() {
    let bundle = Bundle::script("cat /proc/sys/net/ipv4/ip_forward; sleep 100")
        .with("/linux/sysctl", json!({ "net.ipv4.ip_forward": "1" }))
        .with("/linux/readonlyPaths", json!([]))
        .with(
            "/mounts/-",
            json!({ "destination": "/proc/sys", "type": "tmpfs", "source": "tmpfs", "options": ["mode=777"] }),
        );
    bundle.start();
    let pid = bundle.state()["pid"].to_string();
    let words = ["--target", &pid, "--net", "cat", "/proc/sys/net/ipv4/ip_forward"];
    let seen = Command::new("nsenter").args(words).output().unwrap();
    assert_eq!(text(&seen.stdout), "1", "{seen:?}");
    // Nor may a directory of somebody's stand for a part of /proc.
    let directory = tempfile::tempdir().unwrap();
    for destination in ["/proc/sys", "/proc/self/attr", "/proc/1"] {
        let bundle = Bundle::new(&["true"]).with(
            "/mounts/-",
            json!({ "destination": destination, "type": "bind", "source": directory.path(), "options": ["rbind"] }),
        );
        let message = bundle.refused(&["run", &bundle.id]);
        assert!(message.contains("which is the kernel's"), "{destination}: {message}");
    }
}

/// CVE-2022-0492: a program that the kernel runs on the host, as root, when a v1 cgroup has no process any more.
fn release_agent_is_out_of_reach() {
    let script = "
        ls -d /sys/fs/cgroup/release_agent /sys/fs/cgroup/*/release_agent 2> /dev/null
        for name in memory rdma cpu pids misc perf_event; do
            mount -t cgroup -o $name none /tmp && echo mounted $name
            unshare -U -r -m -C sh -c \"mount -t cgroup -o $name none /tmp && echo x > /tmp/release_agent && echo wrote\"
        done
        echo tried";
    let bundle = Bundle::script(script)
        .with("/mounts/-", json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs" }))
        .with("/mounts/-", json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup" }))
        .with("/linux/namespaces/-", json!({ "type": "cgroup" }));
    fs::create_dir(bundle.path("rootfs/sys")).unwrap();
    fs::copy(bundle.path("rootfs/bin/busybox"), bundle.path("rootfs/bin/unshare")).unwrap();
    let before = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}/release_agent")).ok();
    let agents = ["memory", "cpu", "pids"].map(before);
    assert_eq!(bundle.ok(&["run", &bundle.id]), "tried");
    assert_eq!(["memory", "cpu", "pids"].map(before), agents);
}

/// Groups that whoever calls the runtime is in would open files to the container.
fn groups_of_the_caller_are_not_the_containers() {
    let line = "head -n 100 /proc/self/status";
    let in_group = |bundle: &Bundle, words: &[&str]| {
        let command = bundle.command(words);
        let mut with_group = Command::new("setpriv");
        with_group.args(["--groups", "4242", "bash", "-c", "exec -a cloche-container \"$0\" \"$@\""]);
        with_group.arg(command.get_program()).args(command.get_args());
        with_group.current_dir(command.get_current_dir().unwrap());
        let output = with_group.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let groups =
            text(&output.stdout).lines().find_map(|line| line.strip_prefix("Groups:").map(str::to_owned));
        groups.unwrap().trim().to_owned()
    };
    let user = json!({ "uid": 1000, "gid": 1000, "additionalGids": [7] });
    let bundle = Bundle::script(line).with("/process/user", user);
    assert_eq!(in_group(&bundle, &["run", &bundle.id]), "7");
    let bundle = crate::spaces::in_user_namespace(line);
    assert_eq!(in_group(&bundle, &["run", &bundle.id]), "");
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    assert_eq!(in_group(&bundle, &["exec", &bundle.id, "sh", "-c", line]), "");
}

/// What joins a container has, until it is the container's, files of the host. A first process that may trace others, as
/// root of the host may, sees them; one with the usual rights does not.
fn first_process_cannot_look_into_what_joins_it() {
    let look = "
        echo ready
        while :; do
          for process in /proc/[0-9]*; do
            case $(readlink $process/exe) in
              */busybox | '') ;;
              *) echo seen; ls -l $process/fd $process/cwd $process/exe ;;
            esac
          done
        done 2> /dev/null";
    let join = |bundle: &Bundle, times: usize| {
        bundle.start();
        bundle.await_output("ready");
        for _ in 0..times {
            let _ = bundle.run(&["exec", &bundle.id, "true"]);
            if bundle.output().contains("seen") {
                break;
            }
        }
        bundle.output()
    };
    let bundle = Bundle::script(look);
    assert_eq!(join(&bundle, 60), "ready\n");
    bundle.ok(&["delete", "--force", &bundle.id]);
    let may_trace = json!(["CAP_KILL", "CAP_SYS_PTRACE"]);
    let mut bundle = Bundle::script(look);
    for set in ["bounding", "effective", "permitted"] {
        bundle = bundle.with(&format!("/process/capabilities/{set}"), may_trace.clone());
    }
    assert!(join(&bundle, 600).contains("seen"));
}

/// Over a user namespace that root has made, every process of user 0 outside of it has all capabilities, such as that of a
/// container which sees the machine's processes. Before its users are mapped, the first process is still root of the
/// machine, among its files.
fn root_without_capabilities_cannot_look_into_what_enters_a_user_namespace() {
    let bundle = crate::spaces::in_user_namespace("true");
    let seen = bundle.path("seen");
    let script = "
        pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/')
        setpriv --bounding-set=-all --inh-caps=-all --ambient-caps=-all \\
          sh -c \"grep CapEff /proc/self/status; ls -d /proc/$pid/root/; ls -l /proc/$pid/fd\" > \"$0\" 2>&1
        echo $pid >> \"$0\"";
    let hook = json!([{
        "path": "/bin/sh", "args": ["sh", "-c", script, seen.display().to_string()], "env": ["PATH=/usr/bin:/bin"],
    }]);
    let bundle = bundle.with("/hooks", json!({ "createRuntime": hook }));
    bundle.ok(&["run", &bundle.id]);
    let seen = fs::read_to_string(seen).unwrap();
    let lines: Vec<_> = seen.lines().collect();
    assert_eq!(lines.first(), Some(&"CapEff:\t0000000000000000"), "{seen}");
    assert!(lines.last().is_some_and(|pid| pid.parse::<u32>().is_ok_and(|pid| pid > 1)), "{seen}");
    assert!(seen.contains("/root/': Permission denied") && !seen.contains("->"), "{seen}");
}

/// A configuration without rules for devices, and a container that may make nodes: none of them leads anywhere.
fn device_that_no_rule_speaks_of_is_not_opened() {
    // The kernel's log can be opened for writing by whoever gets at it.
    let script = "mknod /tmp/kmsg c 1 11; true > /tmp/kmsg && echo opened; true > /dev/null && echo null";
    let mut bundle = Bundle::script(script);
    link_applets(&bundle, &["mknod"]);
    for set in ["bounding", "effective", "permitted"] {
        bundle = bundle.with(&format!("/process/capabilities/{set}"), json!(["CAP_MKNOD"]));
    }
    let run = |bundle: &Bundle| bundle.run(&["run", &bundle.id]);
    let output = run(&bundle);
    assert_eq!(text(&output.stdout), "null", "{output:?}");
    assert!(text(&output.stderr).contains("Operation not permitted"), "{output:?}");
    let _ = fs::remove_file(bundle.path("rootfs/tmp/kmsg"));
    let fuse = json!({ "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" });
    let bundle = bundle.with("/linux/resources", json!({ "devices": [fuse] }));
    assert_eq!(text(&run(&bundle).stdout), "null");
    let _ = fs::remove_file(bundle.path("rootfs/tmp/kmsg"));
    let bundle = bundle.with("/linux/resources", json!({ "devices": [{ "allow": true, "access": "rwm" }] }));
    assert_eq!(text(&run(&bundle).stdout), "opened\nnull");
}

/// Engines have the runtime copy what the image has at `/var/tmp` and the like, with all rights of root, before anything is
/// masked. An image may lead it into the kernel's files.
fn tmpcopyup_does_not_copy_what_the_kernel_tells() {
    let bundle = Bundle::script("ls /var/tmp/ /var/tmp/proc")
        .with("/mounts/-", json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] }))
        .with(
            "/mounts/-",
            json!({ "destination": "/var/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"] }),
        );
    fs::create_dir(bundle.path("rootfs/var")).unwrap();
    fs::write(bundle.path("rootfs/tmp/of-the-image"), "").unwrap();
    let lead_to = |target: &str| {
        let _ = fs::remove_file(bundle.path("rootfs/var/tmp"));
        symlink(target, bundle.path("rootfs/var/tmp")).unwrap();
    };
    for (target, reason) in [("/sys/kernel", "files of the kernel's"), ("/proc/sys", "it leads into /proc")] {
        lead_to(target);
        let message = bundle.refused(&["run", &bundle.id]);
        assert!(message.contains(reason), "{target}: {message}");
    }
    lead_to("/tmp");
    assert!(bundle.run(&["run", &bundle.id]).stdout.starts_with(b"/var/tmp/:\nof-the-image\n"));
}
