//! Namespaces, mounts and limits that only an engine's configuration asks for.

use std::{
    fs,
    os::unix::{fs::MetadataExt, process::CommandExt},
    process::Stdio,
};

use serde_json::{Value, json};

use crate::{
    Test,
    fixture::{Bundle, await_that, text},
};

pub fn all() -> Vec<Test> {
    crate::tests![
        root_of_a_user_namespace_is_somebody_else_outside,
        device_in_a_user_namespace_has_its_own_numbers_mode_and_owner,
        user_namespace_can_be_joined_with_new_namespaces_in_it,
        map_that_is_missing_is_asked_for,
        idmapped_mount_shows_other_owners,
        idmapped_mount_without_maps_has_those_of_the_container,
        host_name_of_a_joined_namespace_is_set_unless_it_is_the_callers,
        groups_of_the_caller_are_kept_in_a_user_namespace,
        memory_and_swap_are_limited_together,
        clocks_of_a_time_namespace_are_set,
        tmpcopyup_fills_a_tmpfs,
        exec_runs_on_its_own_cpus,
        domain_name_scheduler_and_io_priority_are_set,
        limits_are_changed_while_it_runs,
        statistics_tell_what_is_used,
        running_out_of_memory_is_an_event,
        template_is_what_spec_writes,
        limits_of_the_process_do_not_hinder_what_is_made_for_it,
        idmapped_mount_of_a_plain_user_is_refused,
    ]
}

fn namespaces(kinds: &[&str]) -> Value {
    kinds.iter().map(|kind| json!({ "type": kind })).collect()
}

fn maps(host: u32) -> Value {
    json!([{ "containerID": 0, "hostID": host, "size": 1000 }])
}

pub(crate) fn in_user_namespace(script: &str) -> Bundle {
    let bundle = Bundle::script(script)
        .with("/linux/namespaces", namespaces(&["user", "pid", "network", "ipc", "uts", "mount", "cgroup"]))
        .with("/linux/uidMappings", maps(100_000))
        .with("/linux/gidMappings", maps(200_000))
        .with("/mounts/-", json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs" }))
        .with("/mounts/-", json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" }));
    // Whoever root is outside has to reach the root file system.
    for name in ["dev", "sys"] {
        fs::create_dir(bundle.path("rootfs").join(name)).unwrap();
    }
    for path in [bundle.path(""), bundle.path("rootfs")] {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    bundle
}

fn root_of_a_user_namespace_is_somebody_else_outside() {
    let bundle = in_user_namespace(
        "id -u; cat /proc/self/uid_map; echo x > /dev/null && echo null; touch /tmp/f; sleep 100",
    );
    bundle.start();
    bundle.await_output("null");
    let output = bundle.output();
    assert_eq!(output.split_whitespace().collect::<Vec<_>>(), ["0", "0", "100000", "1000", "null"]);
    let pid = bundle.state()["pid"].as_i64().unwrap();
    let process = fs::metadata(format!("/proc/{pid}")).unwrap();
    assert_eq!((process.uid(), process.gid()), (100_000, 200_000));
    assert_eq!(
        bundle
            .ok(&["exec", &bundle.id, "sh", "-c", "id -u; cat /proc/self/uid_map | head -c 12"])
            .lines()
            .next(),
        Some("0")
    );
}

fn device_in_a_user_namespace_has_its_own_numbers_mode_and_owner() {
    let device = json!([
        { "path": "/dev/made", "type": "c", "major": 1, "minor": 5, "fileMode": 438, "uid": 5, "gid": 6 },
        { "path": "/dev/pipe", "type": "p" },
    ]);
    let bundle = in_user_namespace("ls -ln /dev/made; head -c 1 /dev/made > /tmp/x && echo read; test -p /dev/pipe && echo pipe; ls /proc/self")
        .with("/linux/devices", device);
    let output = bundle.ok(&["run", &bundle.id]);
    let words: Vec<_> = output.split_whitespace().take(6).collect();
    assert_eq!(words, ["crw-rw-rw-", "1", "5", "6", "1,", "5"], "{output}");
    assert!(output.contains("\nread\npipe\n") && output.contains("status"), "{output}");
    let bundle = in_user_namespace("true").with(
        "/linux/devices",
        json!([{ "path": "/dev/x", "type": "c", "major": 1, "minor": 5, "uid": 5000 }]),
    );
    assert!(bundle.refused(&["run", &bundle.id]).contains("cannot make the device node /dev/x"));
}

fn user_namespace_can_be_joined_with_new_namespaces_in_it() {
    let pod = in_user_namespace("sleep 100");
    pod.start();
    let pid = pod.state()["pid"].as_i64().unwrap();
    let path = |kind: &str, file: &str| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") });
    let mut joined = namespaces(&["pid", "mount", "uts"]);
    joined.as_array_mut().unwrap().extend([path("user", "user"), path("network", "net"), path("ipc", "ipc")]);
    let bundle = Bundle::script("id -u; readlink /proc/self/ns/user; readlink /proc/self/ns/net; echo $$")
        .with("/linux/namespaces", joined);
    fs::create_dir(bundle.path("rootfs/dev")).unwrap();
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(bundle.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let output = bundle.ok(&["run", &bundle.id]);
    let link = |kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap().display().to_string();
    assert_eq!(output, format!("0\n{}\n{}\n1", link("user"), link("net")));
}

fn map_that_is_missing_is_asked_for() {
    let kinds = ["user", "pid", "network", "ipc", "uts", "mount"];
    let bundle = Bundle::new(&["true"]).with("/linux/namespaces", namespaces(&kinds));
    assert!(
        bundle.refused(&["create", &bundle.id]).contains("needs linux.uidMappings and linux.gidMappings")
    );
}

fn idmapped_mount_shows_other_owners() {
    let bundle = Bundle::script("ls -ln /data");
    fs::create_dir(bundle.path("data")).unwrap();
    fs::write(bundle.path("data/file"), "").unwrap();
    std::os::unix::fs::chown(bundle.path("data/file"), Some(5), Some(6)).unwrap();
    let source = bundle.path("data").display().to_string();
    let bundle = bundle.with(
        "/mounts/-",
        json!({
            "destination": "/data", "type": "bind", "source": source, "options": ["rbind"],
            "uidMappings": [{ "containerID": 5, "hostID": 2005, "size": 1 }],
            "gidMappings": [{ "containerID": 6, "hostID": 2006, "size": 1 }],
        }),
    );
    let output = bundle.ok(&["run", &bundle.id]);
    let line = output.lines().find(|line| line.ends_with("file")).unwrap();
    assert_eq!(line.split_whitespace().skip(2).take(2).collect::<Vec<_>>(), ["2005", "2006"]);
}

fn idmapped_mount_without_maps_has_those_of_the_container() {
    let bundle = in_user_namespace("ls -ln /data");
    fs::create_dir(bundle.path("rootfs/data")).unwrap();
    fs::create_dir(bundle.path("data")).unwrap();
    fs::write(bundle.path("data/file"), "").unwrap();
    std::os::unix::fs::chown(bundle.path("data/file"), Some(5), Some(6)).unwrap();
    let mount = json!({
        "destination": "/data", "type": "bind", "source": bundle.path("data"), "options": ["rbind", "idmap"],
    });
    let bundle = bundle.with("/mounts/-", mount);
    let output = bundle.ok(&["run", &bundle.id]);
    let line = output.lines().find(|line| line.ends_with("file")).unwrap();
    assert_eq!(line.split_whitespace().skip(2).take(2).collect::<Vec<_>>(), ["5", "6"]);
}

fn host_name_of_a_joined_namespace_is_set_unless_it_is_the_callers() {
    let pod = Bundle::new(&["sleep", "100"]).with("/hostname", json!("pod"));
    pod.start();
    let joining = |pid: &Value| {
        let mut joined = namespaces(&["pid", "mount", "ipc", "network"]);
        joined.as_array_mut().unwrap().push(json!({ "type": "uts", "path": format!("/proc/{pid}/ns/uts") }));
        Bundle::new(&["hostname"]).with("/linux/namespaces", joined).with("/hostname", json!("joined"))
    };
    let bundle = joining(&pod.state()["pid"]);
    assert_eq!(bundle.ok(&["run", &bundle.id]), "joined");
    assert_eq!(pod.ok(&["exec", &pod.id, "hostname"]), "joined");
    let own = joining(&json!(std::process::id()));
    let refusal = own.refused(&["run", &own.id]);
    assert!(refusal.contains("hostname is set without a UTS namespace other than the caller's"), "{refusal}");
}

/// As an engine's option to keep groups has it: what they may read on the host, the container may.
fn groups_of_the_caller_are_kept_in_a_user_namespace() {
    let groups_with = |annotations: Value| {
        let bundle = in_user_namespace("id -G").with("/annotations", annotations);
        // The groups are this thread's, and those of what it starts.
        let run = std::thread::spawn(move || {
            rustix::thread::set_thread_groups(&[rustix::process::Gid::from_raw(54_321)]).unwrap();
            bundle.ok(&["run", &bundle.id])
        });
        run.join().unwrap()
    };
    // Nobody's, since the map has it not.
    assert_eq!(groups_with(json!({ "run.oci.keep_original_groups": "1" })), "0 65534");
    assert_eq!(groups_with(json!({})), "0");
}

/// As engines do it when they are told a limit of memory alone.
fn memory_and_swap_are_limited_together() {
    let limits = json!({ "memory": { "limit": 128 << 20, "swap": 256 << 20 } });
    let bundle = Bundle::script("echo up").with("/linux/resources", limits);
    assert_eq!(bundle.ok(&["run", &bundle.id]), "up");
}

fn clocks_of_a_time_namespace_are_set() {
    let kinds = ["pid", "network", "ipc", "uts", "mount", "time"];
    let bundle = Bundle::new(&["cat", "/proc/uptime"]).with("/linux/namespaces", namespaces(&kinds)).with(
        "/linux/timeOffsets",
        json!({ "boottime": { "secs": 1_000_000_000 }, "monotonic": { "secs": 7 } }),
    );
    let uptime = bundle.ok(&["run", &bundle.id]);
    let seconds: f64 = uptime.split_whitespace().next().unwrap().parse().unwrap();
    assert!(seconds > 1e9, "{uptime}");
}

fn tmpcopyup_fills_a_tmpfs() {
    let bundle = Bundle::script("cat /etc/note; echo changed > /etc/note; mount | grep -c ' /etc '");
    fs::write(bundle.path("rootfs/etc/note"), "from the image\n").unwrap();
    let bundle = bundle.with(
        "/mounts/-",
        json!({
            "destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "nodev"],
        }),
    );
    fs::copy(bundle.path("rootfs/bin/busybox"), bundle.path("rootfs/bin/grep")).unwrap();
    assert_eq!(bundle.ok(&["run", &bundle.id]), "from the image\n1");
    assert_eq!(fs::read_to_string(bundle.path("rootfs/etc/note")).unwrap(), "from the image\n");
}

fn exec_runs_on_its_own_cpus() {
    let affinity = json!({ "initial": "0", "final": "0" });
    let bundle = Bundle::new(&["sleep", "100"]).with("/process/execCPUAffinity", affinity);
    bundle.start();
    let allowed = |process: &str| {
        let status = bundle.ok(&["exec", &bundle.id, "cat", &format!("/proc/{process}/status")]);
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        line.unwrap().trim().to_owned()
    };
    assert_eq!(allowed("self"), "0");
    // It is not for the first process.
    if std::thread::available_parallelism().unwrap().get() > 1 {
        assert_ne!(allowed("1"), "0");
    }
}

fn domain_name_scheduler_and_io_priority_are_set() {
    let bundle = Bundle::new(&["sleep", "100"])
        .with("/domainname", json!("garden"))
        .with("/process/scheduler", json!({ "policy": "SCHED_BATCH", "nice": 5 }))
        .with("/process/ioPriority", json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 0 }));
    bundle.start();
    assert_eq!(bundle.ok(&["exec", &bundle.id, "cat", "/proc/sys/kernel/domainname"]), "garden");
    let stat = bundle.ok(&["exec", &bundle.id, "cat", "/proc/1/stat"]);
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    // proc(5): nice is field 19, policy field 41, counted from the state, which is 3.
    assert_eq!((fields[16], fields[38]), ("5", "3"));
}

fn limits_are_changed_while_it_runs() {
    let devices = json!([{ "allow": false, "access": "rwm" }]);
    let bundle =
        Bundle::new(&["sleep", "100"]).with("/linux/resources", json!({ "devices": devices.clone() }));
    bundle.start();
    bundle.ok(&["update", "--memory", "64m", "--pids-limit", "50", "--cpu-share", "512", &bundle.id]);
    // With the memory limit that is there already.
    bundle.ok(&["update", "--memory-swap", "64m", &bundle.id]);
    // Engines send all of the configuration's resources, of which the devices stay as they are.
    let update = |devices| json!({ "pids": { "limit": 30 }, "devices": devices }).to_string();
    fs::write(bundle.path("limits"), update(json!([{ "allow": true, "access": "rwm" }]))).unwrap();
    let limits = bundle.path("limits").display().to_string();
    assert!(
        bundle.refused(&["update", "--resources", &limits, &bundle.id]).contains("device rules are fixed")
    );
    fs::write(&limits, update(devices)).unwrap();
    let stats: Value = serde_json::from_str(&bundle.ok(&["events", "--stats", &bundle.id])).unwrap();
    assert_eq!(stats["data"]["memory"]["usage"]["limit"], 64 << 20);
    assert_eq!(stats["data"]["pids"]["limit"], 50);
    // Of memory and swap together, beside the memory as it is; not every kernel counts swap.
    let swap = bundle.run(&["update", "--memory-swap", "96m", &bundle.id]);
    assert!(swap.status.success() || text(&swap.stderr).contains("not account for swap"), "{swap:?}");
    bundle.ok(&["update", "--resources", bundle.path("limits").to_str().unwrap(), &bundle.id]);
    let stats: Value = serde_json::from_str(&bundle.ok(&["events", "--stats", &bundle.id])).unwrap();
    assert_eq!(stats["data"]["pids"]["limit"], 30);
    // Also where the limit's controller was not in use before.
    let pid = bundle.state()["pid"].as_i64().unwrap();
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let shares = |path: &str| fs::read_to_string(path).is_ok_and(|shares| shares.trim() == "512");
    let v1 = cgroups.lines().find_map(|line| line.split_once(":cpu:").or(line.split_once(":cpu,cpuacct:")));
    match v1 {
        Some((_, path)) => assert!(shares(&format!("/sys/fs/cgroup/cpu{path}/cpu.shares")), "{cgroups}"),
        None => assert!(cgroups.starts_with("0::"), "{cgroups}"),
    }
    assert!(bundle.refused(&["update", "--memory", "lots", &bundle.id]).contains("`lots` is no size"));
}

fn statistics_tell_what_is_used() {
    let bundle = Bundle::script("x=0; while [ $x -lt 20000 ]; do x=$((x+1)); done; echo done; sleep 100");
    bundle.start();
    bundle.await_output("done");
    let stats: Value = serde_json::from_str(&bundle.ok(&["events", "--stats", &bundle.id])).unwrap();
    assert_eq!((&stats["type"], &stats["id"]), (&json!("stats"), &json!(bundle.id)));
    assert!(stats["data"]["cpu"]["usage"]["total"].as_u64().unwrap() > 1_000_000, "{stats}");
    assert!(stats["data"]["memory"]["usage"]["usage"].as_u64().unwrap() > 4096, "{stats}");
    assert_eq!(stats["data"]["pids"]["current"], 1);
    assert!(stats["data"]["memory"]["cache"].is_u64(), "{stats}");
    for list in ["ioServiceBytesRecursive", "ioServicedRecursive"] {
        let devices = stats["data"]["blkio"][list].as_array().unwrap();
        assert!(devices.iter().all(|device| device["op"].is_string() && device["value"].is_u64()), "{stats}");
    }
    // Where the kernel tells of pressure, and there is a v2 cgroup to ask.
    let unified = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
    let own = unified.map(|root| format!("{root}/cloche/{}", bundle.id));
    if own.iter().any(|own| fs::read(format!("{own}/cpu.pressure")).is_ok()) {
        for resource in ["cpu", "memory", "blkio"] {
            let total = &stats["data"][resource]["psi"]["some"]["total"];
            assert!(total.is_u64(), "{resource}: {stats}");
        }
    }
}

fn running_out_of_memory_is_an_event() {
    let script = "read go < /tmp/go; x=0123456789abcdef; while :; do x=$x$x; done";
    let bundle = Bundle::script(&format!(
        "echo up; sleep 1; sh -c '{}'; sleep 100",
        script.replace("read go < /tmp/go; ", "")
    ))
    .with("/linux/resources", json!({ "memory": { "limit": 32 << 20, "swap": 32 << 20 } }));
    bundle.create();
    let events = fs::File::create(bundle.path("events")).unwrap();
    let words = ["events", "--interval", "50s", &bundle.id];
    let mut watcher = bundle.command(&words).stdout(events).stderr(Stdio::null()).spawn().unwrap();
    let read = || fs::read_to_string(bundle.path("events")).unwrap();
    await_that("it is watched", || read().contains("\"stats\""));
    bundle.ok(&["start", &bundle.id]);
    await_that("it is told", || read().contains("\"oom\""));
    bundle.ok(&["delete", "--force", &bundle.id]);
    assert!(watcher.wait().unwrap().success());
    assert!(text(read().as_bytes()).lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
}

fn template_is_what_spec_writes() {
    let bundle = Bundle::new(&["true"]);
    fs::create_dir(bundle.path("new")).unwrap();
    let path = bundle.path("new").display().to_string();
    bundle.ok(&["spec", "--bundle", &path]);
    assert!(bundle.refused(&["spec", "--bundle", &path]).contains("exists. Remove it first"));
    let mut config: Value =
        serde_json::from_slice(&fs::read(bundle.path("new/config.json")).unwrap()).unwrap();
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = json!(["echo", "hi"]);
    config["root"]["path"] = bundle.path("rootfs").to_str().unwrap().into();
    fs::write(bundle.path("new/config.json"), config.to_string()).unwrap();
    let id = format!("{}-template", bundle.id);
    assert_eq!(bundle.ok(&["run", "--bundle", &path, &id]), "hi");
}

fn limits_of_the_process_do_not_hinder_what_is_made_for_it() {
    let limit = |kind: &str, most: u32| json!({ "type": kind, "soft": most, "hard": most });
    let mut bundle = in_user_namespace("ulimit -n; ulimit -f; sleep 100")
        .with("/process/rlimits", json!([limit("RLIMIT_NOFILE", 16), limit("RLIMIT_FSIZE", 0)]));
    for number in 0..20 {
        let destination = format!("/tmp/mounted{number}");
        bundle = bundle
            .with("/mounts/-", json!({ "destination": destination, "type": "tmpfs", "source": "tmpfs" }));
    }
    bundle.create();
    // Its output is a file, to which it may not write.
    assert!(bundle.ok(&["start", &bundle.id]).is_empty());
    let shown = bundle.ok(&["exec", &bundle.id, "sh", "-c", "ulimit -n; ulimit -f"]);
    assert_eq!(shown.lines().collect::<Vec<_>>(), ["16", "0"]);
}

fn idmapped_mount_of_a_plain_user_is_refused() {
    const USER: u32 = 54_323;
    let own = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
    let bundle = Bundle::new(&["true"])
        .with(
            "/linux",
            json!({
                "namespaces": namespaces(&["user", "pid", "mount", "uts"]), "uidMappings": own, "gidMappings": own,
            }),
        )
        .with(
            "/mounts",
            json!([{
                "destination": "/data", "type": "bind", "source": "/", "options": ["bind", "ro"],
                "uidMappings": own, "gidMappings": own,
            }]),
        );
    for path in ["", "rootfs"] {
        std::os::unix::fs::chown(bundle.path(path), Some(USER), Some(USER)).unwrap();
    }
    let output = bundle.command(&["run", &bundle.id]).uid(USER).gid(USER).output().unwrap();
    assert!(text(&output.stderr).contains("mounts[].uidMappings for a user who is not root"), "{output:?}");
}
