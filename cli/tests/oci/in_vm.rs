//! Containers in virtual machines: the tests of all containers, but for those of what only one kernel can do, and further
//! ones in place of these.

use std::{fs, os::unix::net::UnixListener, process::Stdio};

use serde_json::json;

use crate::{
    Test,
    fixture::{Bundle, await_that, text},
    network::{Cable, Namespace, joined},
    processes::receive,
};

/// Tests that look at a container's processes from outside, share namespaces or devices with it, or run hooks in it.
const OF_ONE_KERNEL: [&str; 29] = [
    // As many machines would take minutes.
    "two_hundred_runs_at_once_all_succeed_and_leave_nothing",
    "working_directory_outside_of_the_root_is_refused",
    // The host's security modules are not the guest's.
    "label_is_given_to_the_kernel_or_refused_by_name",
    "run_of_a_process_that_a_signal_kills_returns_128_and_its_number",
    "exec_goes_where_the_first_process_is_if_controllers_were_handed_down",
    "exec_is_in_the_container",
    "exec_runs_on_its_own_cpus",
    "exec_in_the_background_leaves_its_id",
    "ps_lists_the_processes",
    "preserved_descriptors_are_passed_and_no_others",
    "sockets_of_a_service_manager_are_for_first_processes",
    "root_of_a_user_namespace_is_somebody_else_outside",
    "user_namespace_can_be_joined_with_new_namespaces_in_it",
    "idmapped_mount_shows_other_owners",
    "idmapped_mount_of_a_plain_user_is_refused",
    "idmapped_mount_without_maps_has_those_of_the_container",
    "host_name_of_a_joined_namespace_is_set_unless_it_is_the_callers",
    "groups_of_the_caller_are_kept_in_a_user_namespace",
    "limits_are_changed_while_it_runs",
    "podman_of_a_plain_user_runs_containers",
    // Some of them are the host's.
    "resources_are_in_effect_or_refused_by_name",
    "statistics_tell_what_is_used",
    "running_out_of_memory_is_an_event",
    "hooks_run_in_their_order_with_the_state",
    "hook_that_fails_ends_the_start",
    "process_in_a_joined_user_namespace_cannot_be_looked_into_from_there",
    "hook_of_the_container_has_the_environment_of_the_container",
    "hook_of_the_container_has_no_more_rights_than_it",
    // Nothing of the host's is in the guest to be overwritten or run.
    "own_program_cannot_be_overwritten_through_exec_of_proc_self_exe",
];

/// Those of `all` that are about virtual machines, too, and our own.
pub fn of(all: Vec<Test>) -> Vec<Test> {
    let is_shared = |(name, _): &Test| {
        let (module, name) = name.rsplit_once("::").unwrap();
        let others = ["attacks", "differential", "failures", "seccomp"];
        let is_of_one_kernel = others.iter().any(|other| module.ends_with(other));
        !is_of_one_kernel && !OF_ONE_KERNEL.contains(&name)
    };
    let own: Vec<Test> = crate::tests![
        guest_has_a_kernel_of_its_own,
        exec_is_in_the_guest,
        process_of_exec_is_attended_by_one_that_ends_as_it_does,
        exec_has_a_terminal_whose_size_follows,
        ps_shows_processes_of_the_guest,
        limits_are_in_the_guest_and_on_the_host,
        killing_the_attending_process_ends_all,
        signal_to_the_attending_process_reaches_the_container,
        files_of_the_host_are_there_and_can_be_written,
        hooks_of_the_host_run_around_it,
        read_only_root_is_kept_by_the_host_too,
        interface_is_given_to_one_machine_only,
        network_that_others_use_is_not_taken_over,
        what_a_virtual_machine_cannot_do_is_refused,
        labels_of_the_host_are_dropped_with_a_warning,
        machine_of_run_gets_its_signals,
        ps_shows_many_long_command_lines,
    ];
    all.into_iter().filter(is_shared).chain(own).chain(crate::pods::in_vm()).collect()
}

fn guest_has_a_kernel_of_its_own() {
    let bundle = Bundle::script("cat /proc/sys/kernel/osrelease; cat");
    let mut run = bundle.command(&["run", &bundle.id]);
    let input = fs::File::open("/proc/sys/kernel/osrelease").unwrap();
    let output = text(&run.stdin(input).output().unwrap().stdout);
    let [guest, host] = output.lines().collect::<Vec<_>>()[..] else { panic!("{output}") };
    assert_ne!(guest, host);
}

fn exec_is_in_the_guest() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    assert_eq!(bundle.ok(&["exec", &bundle.id, "hostname"]), "bell");
    let of = |process: &str| {
        let script = format!(
            "readlink /proc/{process}/ns/pid; readlink /proc/{process}/ns/mnt; cat /proc/{process}/cgroup"
        );
        bundle.ok(&["exec", &bundle.id, "sh", "-c", &script])
    };
    assert_eq!(of("self"), of("1"));
    let output = bundle.run(&["exec", &bundle.id, "sh", "-c", "echo out; echo err >&2; exit 9"]);
    assert_eq!(
        (output.status.code(), text(&output.stdout), text(&output.stderr)),
        (Some(9), "out".into(), "err".into())
    );
    let mut echo = bundle.command(&["exec", &bundle.id, "cat"]);
    let input = bundle.path("input");
    // More than all buffers on the way hold.
    let long = "0123456789abcdef".repeat(1 << 16);
    fs::write(&input, &long).unwrap();
    let output = echo.stdin(fs::File::open(input).unwrap()).output().unwrap();
    assert!(output.status.success() && output.stdout == long.as_bytes());
}

fn process_of_exec_is_attended_by_one_that_ends_as_it_does() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let path = bundle.path("pid");
    let script = "trap 'exit 6' TERM; echo up > /tmp/up; while :; do sleep 0.05; done";
    let words = ["exec", "--detach", "--pid-file", path.to_str().unwrap(), &bundle.id, "sh", "-c", script];
    assert!(bundle.command(&words).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    let pid: i32 = fs::read_to_string(path).unwrap().parse().unwrap();
    await_that("it runs", || bundle.path("rootfs/tmp/up").exists());
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    await_that("it has ended", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
    assert_eq!(bundle.status(), "running");
}

fn exec_has_a_terminal_whose_size_follows() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let socket = bundle.path("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let script = "tty; while [ \"$(stty size)\" != '31 101' ]; do sleep 0.02; done; echo resized; read line; \
                  echo got $line; exit 3";
    let words = [
        "exec",
        "--tty",
        "--detach",
        "--console-socket",
        socket.to_str().unwrap(),
        &bundle.id,
        "sh",
        "-c",
        script,
    ];
    assert!(bundle.command(&words).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    let (stream, _) = listener.accept().unwrap();
    let master = receive(&stream);
    let mut shown = Vec::new();
    let mut show_until = |word: &str| {
        await_that(&format!("the terminal shows {word}"), || {
            let mut buffer = [0; 256];
            // EIO: nobody has it any more.
            let count = rustix::io::read(&master, &mut buffer).unwrap_or(0);
            shown.extend(&buffer[..count]);
            text(&shown).contains(word)
        });
    };
    show_until("/dev/pts/");
    let size = rustix::termios::Winsize { ws_row: 31, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&master, size).unwrap();
    show_until("resized");
    rustix::io::write(&master, b"hello\r").unwrap();
    show_until("got hello");
}

fn ps_shows_processes_of_the_guest() {
    let bundle = Bundle::script("sleep 99 & echo up; wait");
    bundle.start();
    bundle.await_output("up");
    let pids: Vec<i64> = serde_json::from_str(&bundle.ok(&["ps", "--format", "json", &bundle.id])).unwrap();
    assert_eq!(pids.len(), 2);
    let table = bundle.ok(&["ps", &bundle.id]);
    assert!(table.lines().count() == 3 && table.contains("sleep 99"), "{table}");
    assert!(bundle.refused(&["ps", &bundle.id, "-o", "pid"]).contains("options of ps(1)"));
}

fn limits_are_in_the_guest_and_on_the_host() {
    let bundle = Bundle::new(&["sleep", "100"])
        .with(
            "/linux/resources",
            json!({ "memory": { "limit": 64 << 20 }, "pids": { "limit": 50 }, "cpu": { "shares": 512 } }),
        )
        .with("/linux/namespaces/-", json!({ "type": "cgroup" }))
        .with("/mounts/-", json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup" }));
    bundle.start();
    let inside = |file: &str| bundle.ok(&["exec", &bundle.id, "cat", &format!("/sys/fs/cgroup/{file}")]);
    assert_eq!((inside("memory.max"), inside("pids.max")), ((64 << 20).to_string(), "50".into()));
    let pid = bundle.state()["pid"].as_i64().unwrap();
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned();
    let host =
        |file: &str| fs::read_to_string(format!("/sys/fs/cgroup{path}/{file}")).unwrap().trim().to_owned();
    // The machine with all it needs.
    assert!(host("memory.max").parse::<u64>().unwrap() > 128 << 20);
    let weight = host("cpu.weight");
    bundle.ok(&["update", "--memory", "32m", "--pids-limit", "40", "--cpu-share", "2048", &bundle.id]);
    assert_eq!((inside("memory.max"), inside("pids.max")), ((32 << 20).to_string(), "40".into()));
    assert_ne!(host("cpu.weight"), weight);
    assert!(
        bundle.refused(&["update", "--memory", "100g", &bundle.id]).contains("memory of the virtual machine")
    );
    let stats: serde_json::Value =
        serde_json::from_str(&bundle.ok(&["events", "--stats", &bundle.id])).unwrap();
    assert!(stats["data"]["cpu"]["usage"]["total"].as_u64().unwrap() > 1_000_000, "{stats}");
}

fn killing_the_attending_process_ends_all() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let pid = bundle.state()["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    bundle.await_status("stopped");
    let cgroup = format!("/sys/fs/cgroup/cloche/{}/cgroup.procs", bundle.id);
    await_that("its VMM is gone", || fs::read_to_string(&cgroup).is_ok_and(|listed| listed.is_empty()));
    bundle.ok(&["delete", &bundle.id]);
}

fn signal_to_the_attending_process_reaches_the_container() {
    let bundle = Bundle::script("trap 'echo got it; exit 5' USR2; echo ready; while :; do sleep 0.05; done");
    bundle.start();
    bundle.await_output("ready");
    let pid = bundle.state()["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::USR2).unwrap();
    bundle.await_output("got it");
    bundle.await_status("stopped");
}

fn files_of_the_host_are_there_and_can_be_written() {
    let bundle = Bundle::script(
        "cat /etc/single; echo changed > /data/file; echo no > /shut/file || echo refused; echo root > /etc/made; \
         chmod 600 /etc/made; ls -ln /data/owned",
    );
    for name in ["data", "shut"] {
        fs::create_dir(bundle.path(name)).unwrap();
    }
    fs::write(bundle.path("single"), "one file\n").unwrap();
    fs::write(bundle.path("data/owned"), "").unwrap();
    std::os::unix::fs::chown(bundle.path("data/owned"), Some(5), Some(6)).unwrap();
    let bind = |name: &str, destination: &str, mode: &str| {
        json!({
            "destination": destination, "type": "bind", "source": bundle.path(name), "options": ["rbind", "rprivate", mode],
        })
    };
    let binds =
        [bind("single", "/etc/single", "ro"), bind("data", "/data", "rw"), bind("shut", "/shut", "ro")];
    let bundle = binds.into_iter().fold(bundle, |bundle, bind| bundle.with("/mounts/-", bind));
    let output = bundle.ok(&["run", &bundle.id]);
    assert!(output.starts_with("one file\nrefused\n"), "{output}");
    let owners: Vec<_> = output.lines().last().unwrap().split_whitespace().skip(2).take(2).collect();
    assert_eq!(owners, ["5", "6"]);
    assert_eq!(fs::read_to_string(bundle.path("data/file")).unwrap(), "changed\n");
    assert_eq!(fs::read_to_string(bundle.path("rootfs/etc/made")).unwrap(), "root\n");
}

fn hooks_of_the_host_run_around_it() {
    let bundle = Bundle::new(&["true"]);
    let log = bundle.path("log").display().to_string();
    let note = |kind: &str| {
        let script = format!("grep -q '\"pid\":[0-9]' && echo {kind} >> {log}");
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
    };
    let mut hooks = json!({});
    for kind in ["prestart", "createRuntime", "poststart", "poststop"] {
        hooks[kind] = note(kind);
    }
    let bundle = bundle.with("/hooks", hooks);
    bundle.ok(&["run", &bundle.id]);
    assert_eq!(fs::read_to_string(&log).unwrap(), "prestart\ncreateRuntime\npoststart\npoststop\n");
    let failing =
        json!({ "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo oh no; exit 4"] }] });
    let bundle = Bundle::new(&["true"]).with("/hooks", failing);
    assert!(bundle.refused(&["run", &bundle.id]).contains("exit status 4: oh no"));
    assert_eq!(bundle.ok(&["list", "--quiet"]), "");
}

fn read_only_root_is_kept_by_the_host_too() {
    let script = "mount -o remount,bind,rw / && echo remounted; echo x > /made || echo kept; touch /new/here && echo mounted";
    let capabilities = json!(["CAP_SYS_ADMIN"]);
    let bundle = Bundle::script(script)
        .with("/root/readonly", json!(true))
        .with("/mounts/-", json!({ "destination": "/new", "type": "tmpfs", "source": "tmpfs" }))
        .with(
            "/process/capabilities",
            json!({ "bounding": capabilities, "effective": capabilities, "permitted": capabilities }),
        );
    assert_eq!(bundle.ok(&["run", &bundle.id]), "remounted\nkept\nmounted");
    assert!(!bundle.path("rootfs/made").exists());
}

fn interface_is_given_to_one_machine_only() {
    let bundle = Bundle::script("exec busybox httpd -f -p 80 -h /bin");
    let cable = Cable::new(&bundle);
    let bundle = joined(bundle, &cable);
    bundle.start();
    let other = joined(Bundle::new(&["true"]), &cable);
    assert!(other.refused(&["run", &other.id]).contains("is in use by process"));
    // Whose network is as it was.
    await_that("it serves", || cable.outside.run("busybox wget -qO- http://10.77.0.2/sh").status.success());
}

fn network_that_others_use_is_not_taken_over() {
    let bundle = Bundle::new(&["true"]);
    let cable = Cable::new(&bundle);
    let bundle = joined(bundle, &cable);
    let mut user = cable.inside.command(&["sleep", "100"]).spawn().unwrap();
    let is_in_it =
        || fs::read_to_string(format!("/proc/{}/comm", user.id())).is_ok_and(|name| name == "sleep\n");
    await_that("there is a user", is_in_it);
    assert!(bundle.refused(&["run", &bundle.id]).contains(&format!("process {} (sleep)", user.id())));
    assert_eq!(cable.inside.ok("busybox wget -qO- http://10.77.0.1/word"), "outside");
    user.kill().unwrap();
    user.wait().unwrap();
    bundle.ok(&["run", &bundle.id]);
    for host in ["/proc/1/ns/net", "/proc/self/ns/net"] {
        let bundle =
            Bundle::new(&["true"]).with("/linux/namespaces/1", json!({ "type": "network", "path": host }));
        assert!(bundle.refused(&["run", &bundle.id]).contains(&format!("{host} is the host's")));
    }
}

fn what_a_virtual_machine_cannot_do_is_refused() {
    let joined = json!({ "type": "cgroup", "path": "/proc/1/ns/cgroup" });
    let bundle = Bundle::new(&["true"]).with("/linux/namespaces/-", joined);
    assert!(bundle.refused(&["run", &bundle.id]).contains("/proc/1/ns/cgroup"));
    let inside = json!({ "createContainer": [{ "path": "/bin/true" }] });
    let bundle = Bundle::new(&["true"]).with("/hooks", inside);
    assert!(bundle.refused(&["run", &bundle.id]).contains("hooks.createContainer is not supported"));
    let network = Namespace::new();
    network.ok("ip link add eth0 type dummy");
    let bundle = Bundle::new(&["true"])
        .with("/linux/namespaces/1", json!({ "type": "network", "path": network.path() }));
    assert!(
        bundle
            .refused(&["run", &bundle.id])
            .contains("interface eth0 of its network namespace is of the kind dummy")
    );
    let pod = json!({ "io.kubernetes.cri.container-type": "container" });
    let bundle = Bundle::new(&["true"]).with("/annotations", pod);
    assert!(bundle.refused(&["create", &bundle.id]).contains("pod"));
    assert_eq!(bundle.ok(&["list", "--quiet"]), "");
}

/// Engines label every container of a host that has a security module.
fn labels_of_the_host_are_dropped_with_a_warning() {
    let bundle = Bundle::new(&["echo", "ran"]).with("/process/apparmorProfile", json!("docker-default"));
    let output = bundle.run(&["run", &bundle.id]);
    assert!(output.status.success() && text(&output.stdout) == "ran", "{output:?}");
    assert!(
        text(&output.stderr).contains("process.apparmorProfile \"docker-default\" is not applied"),
        "{output:?}"
    );
}

/// `run` collects the signals that it passes on; the VMM kicks its vCPUs by one of them.
fn machine_of_run_gets_its_signals() {
    let bundle = Bundle::new(&["sleep", "100"]);
    let mut run = bundle.command(&["run", &bundle.id]).stdout(Stdio::null()).spawn().unwrap();
    await_that("it runs", || {
        bundle.run(&["state", &bundle.id]).status.success() && bundle.status() == "running"
    });
    let attendant = bundle.state()["pid"].as_i64().unwrap();
    let children = fs::read_to_string(format!("/proc/{attendant}/task/{attendant}/children")).unwrap();
    let blocked = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).unwrap();
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        (field("Name:"), u64::from_str_radix(&field("SigBlk:"), 16).unwrap())
    };
    let vmm = children.split_whitespace().next().unwrap();
    let tasks = fs::read_dir(format!("/proc/{vmm}/task")).unwrap();
    // The kernel's own threads have no thread's name of ours.
    let is_ours = |(name, _): &(String, u64)| !name.starts_with("kvm-");
    let blocked: Vec<_> = tasks.flatten().map(blocked).filter(is_ours).collect();
    // The first real-time signals: those that the C library leaves to programs.
    assert!(blocked.iter().any(|(name, _)| name.starts_with("vcpu")), "{blocked:?}");
    assert!(blocked.iter().all(|(_, signals)| signals >> 34 & 1 == 0), "{blocked:?}");
    bundle.ok(&["kill", &bundle.id, "KILL"]);
    run.wait().unwrap();
}

/// More than one answer of the agent would hold.
fn ps_shows_many_long_command_lines() {
    let bundle = Bundle::script(
        "busybox mkfifo /dev/never; x=$(printf '\\001'); while [ ${#x} -lt 2000 ]; do x=$x$x; done; n=0; \
         while [ $n -lt 40 ]; do sh -c 'read a < /dev/never' $n $x & n=$((n+1)); done; echo up; wait",
    );
    bundle.start();
    bundle.await_output("up");
    let listed = bundle.ok(&["ps", &bundle.id]);
    assert_eq!(listed.lines().count(), 42, "{listed}");
    assert!(listed.contains("never"), "{listed}");
}
