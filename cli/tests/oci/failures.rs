//! Starts that fail, at one step after the other: which one it was is said, and nothing is left of those before it.

use std::{fs, path::Path, time::Duration};

use serde_json::{Value, json};

use crate::{
    Test,
    fixture::{Bundle, await_that, traces},
};

pub fn all() -> Vec<Test> {
    crate::tests![failed_start_names_its_step_and_undoes_all, mutated_configuration_is_refused_or_right]
}

/// Where in the configuration what is asked for that cannot be, and what is then said.
fn steps(bundle: &Bundle) -> Vec<(&'static str, Value, &'static str)> {
    let hook = json!([{ "path": "/bin/sh", "args": ["sh", "-c", "echo no; exit 3"] }]);
    let user = json!([{ "containerID": 0, "hostID": 1000, "size": 10 }, { "containerID": 5, "hostID": 2000, "size": 10 }]);
    let tmpfs = |options: Value| json!({ "destination": "/new", "type": "tmpfs", "source": "tmpfs", "options": options });
    let bind = |source: &Path| json!({ "destination": "/new", "type": "bind", "source": source, "options": ["bind"] });
    let action = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        { "names": ["read"], "action": "SCMP_ACT_KILL", "args": [{ "index": 9, "value": 1, "op": "SCMP_CMP_EQ" }] },
    ] });
    let namespaces = |kind: &str, path: &str| json!({ "type": kind, "path": path });
    vec![
        ("/ociVersion", json!("2.0.0"), "ociVersion \"2.0.0\""),
        ("/root/path", json!("nowhere"), "cannot find the rootfs"),
        ("/process/args", json!([]), "process.args is empty"),
        ("/process/args", json!(["a\0b"]), "process.args contains a NUL byte"),
        ("/linux/seccomp", action, "compares argument 9"),
        ("/linux/sysctl", json!({ "kernel.core_pattern": "x" }), "cannot set the sysctl kernel.core_pattern"),
        (
            "/linux/sysctl",
            json!({ "net.ipv4.ip_forward": "many" }),
            "cannot set the sysctl net.ipv4.ip_forward to",
        ),
        ("/linux/resources", json!({ "cpu": { "cpus": "5000" } }), "cpuset.cpus"),
        ("/linux/resources", json!({ "devices": [{ "allow": true, "access": "x" }] }), "the device rule"),
        ("/linux/namespaces/2", namespaces("ipc", "/nowhere"), "cannot join the ipc namespace /nowhere"),
        ("/linux/namespaces/0", namespaces("pid", "/nowhere"), "cannot join the pid namespace /nowhere"),
        ("/linux/namespaces/-", json!({ "type": "user" }), "needs linux.uidMappings"),
        ("/linux/uidMappings", user, "linux.uidMappings and linux.gidMappings need a user namespace"),
        ("/hostname", json!("x".repeat(65)), "cannot set the host name"),
        ("/domainname", json!("x".repeat(65)), "cannot set the domain name"),
        ("/hooks", json!({ "prestart": hook }), "hook #0 of prestart: /bin/sh failed: exit status 3: no"),
        (
            "/hooks",
            json!({ "createRuntime": hook }),
            "hook #0 of createRuntime: /bin/sh failed: exit status 3: no",
        ),
        (
            "/hooks",
            json!({ "createContainer": hook }),
            "hook #0 of createContainer: /bin/sh failed: exit status 3: no",
        ),
        ("/mounts/-", bind(Path::new("/nowhere")), "cannot bind /nowhere to /new: the source"),
        ("/mounts/-", bind(&bundle.path("rootfs/bin/busybox").join("x")), "the source"),
        ("/mounts/-", tmpfs(json!(["size=lots"])), "cannot mount tmpfs at /new"),
        ("/mounts/-", tmpfs(json!(["remount"])), "option \"remount\""),
        (
            "/linux/devices",
            json!([{ "path": "/bin/busybox", "type": "c", "major": 1, "minor": 3 }]),
            "cannot make the device node /bin/busybox: the image has something else there",
        ),
        (
            "/linux/devices",
            json!([{ "path": "/bin/busybox/x", "type": "c", "major": 1, "minor": 3 }]),
            "cannot make the device node /bin/busybox/x",
        ),
        ("/process/cwd", json!("/bin/busybox"), "cannot change to the working directory /bin/busybox"),
        (
            "/process/rlimits",
            json!([{ "type": "RLIMIT_NOFILE", "soft": 10, "hard": 1u64 << 40 }]),
            "RLIMIT_NOFILE",
        ),
        ("/process/oomScoreAdj", json!(-2000), "OOM score adjustment"),
        (
            "/process/scheduler",
            json!({ "policy": "SCHED_FIFO", "priority": 1000 }),
            "cannot set process.scheduler",
        ),
        ("/process/ioPriority", json!({ "class": "IOPRIO_CLASS_BE", "priority": 9 }), "process.ioPriority"),
        ("/process/user/uid", json!(u32::MAX), "4294967295 is no id"),
        ("/process/terminal", json!(true), "nobody takes it"),
        ("/process/args", json!(["nowhere"]), "\"nowhere\": executable file not found"),
        ("/process/args", json!(["/etc"]), "\"/etc\": is a directory"),
    ]
}

fn failed_start_names_its_step_and_undoes_all() {
    let plain = Bundle::new(&["sleep", "100"]);
    let before = traces();
    let config = plain.config.clone();
    let mut bundle = plain;
    for (pointer, value, expected) in steps(&bundle) {
        bundle.config = config.clone();
        bundle = bundle.with(pointer, value);
        let message = bundle.refused(&["create", &bundle.id]);
        assert!(message.contains(expected), "{pointer}: expected {expected:?}, found {message:?}");
        nothing_is_left(&bundle, &before, expected);
    }
    // What only the command line asks for, and what comes after the process was let go on.
    bundle.config = config.clone();
    for (option, file) in [("--pid-file", "/nowhere/pid"), ("--console-socket", "/nowhere/socket")] {
        bundle = bundle.with("/process/terminal", json!(option == "--console-socket"));
        let message = bundle.refused(&["create", option, file, &bundle.id]);
        assert!(message.contains("/nowhere"), "{message}");
        nothing_is_left(&bundle, &before, option);
    }
    bundle.config = config;
    for kind in ["startContainer", "poststart"] {
        let hook = json!({ kind: [{ "path": "/bin/sh", "args": ["sh", "-c", "echo no; exit 3"] }] });
        bundle = bundle.with("/hooks", hook);
        let message = bundle.refused(&["run", "--detach", &bundle.id]);
        assert!(
            message.contains(&format!("hook #0 of {kind}: /bin/sh failed: exit status 3: no")),
            "{message}"
        );
        nothing_is_left(&bundle, &before, kind);
    }
}

/// Neither state nor cgroups nor mounts nor processes.
#[track_caller]
fn nothing_is_left(bundle: &Bundle, before: &[String], after: &str) {
    let state = fs::read_dir(bundle.path("state")).into_iter().flatten().count();
    assert_eq!(state, 0, "state is left after: {after}");
    // A process on its way to the program has the words of the command that made it; one that arrived, its own.
    let has_id = |process: &Path| {
        let cmdline = fs::read(process.join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&cmdline).contains(&bundle.id)
    };
    let processes = || fs::read_dir("/proc").unwrap().flatten().filter(|entry| has_id(&entry.path())).count();
    await_that(&format!("no process is left after: {after}"), || processes() == 0);
    await_that(&format!("nothing is left after: {after}"), || traces() == before);
}

/// Numbers that look random, the same ones at each run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

/// Pointers to all that is in a value.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    let mut enter = |name: &str, value: &Value| {
        let at = format!("{at}/{}", name.replace('~', "~0").replace('/', "~1"));
        pointers(value, &at, found);
        found.push(at);
    };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| enter(name, value)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(index, value)| enter(&index.to_string(), value))
        }
        _ => {}
    }
}

fn mutate(config: &mut Value, numbers: &mut Numbers) -> String {
    let mut places = Vec::new();
    pointers(config, "", &mut places);
    // Another root would be the machine's.
    places.retain(|place| !place.starts_with("/root"));
    let place = places[numbers.below(places.len())].clone();
    let values = [
        Value::Null,
        json!(true),
        json!(-1),
        json!(0),
        json!(1u64 << 40),
        json!(1.5),
        json!(""),
        json!("x"),
        json!("/"),
        json!(".."),
        json!("a\0b"),
        json!("/proc/self/fd/3"),
        json!("y".repeat(5000)),
        json!([]),
        json!({}),
        json!([null]),
        json!(["x", "x"]),
    ];
    let choice = numbers.below(values.len() + 4);
    let what = match values.get(choice) {
        Some(value) => {
            *config.pointer_mut(&place).unwrap() = value.clone();
            value.to_string()
        }
        None => {
            let (parent, name) = place.rsplit_once('/').unwrap();
            match config.pointer_mut(parent).unwrap() {
                Value::Object(fields) => drop(fields.remove(&name.replace("~1", "/").replace("~0", "~"))),
                Value::Array(list) if choice.is_multiple_of(2) => drop(list.remove(name.parse().unwrap())),
                Value::Array(list) => {
                    let twice = list[name.parse::<usize>().unwrap()].clone();
                    list.push(twice);
                }
                _ => {}
            }
            "removed or repeated".to_owned()
        }
    };
    format!("{place}: {}", what.chars().take(60).collect::<String>())
}

/// A configuration that is changed anywhere is refused with a reason, or is what the container then is.
fn mutated_configuration_is_refused_or_right() {
    let mut bundle = Bundle::script("hostname; pwd; cat /proc/self/status")
        .with("/process/rlimits", json!([{ "type": "RLIMIT_CORE", "soft": 0, "hard": 0 }]))
        .with("/process/user", json!({ "uid": 5, "gid": 6, "umask": 18, "additionalGids": [7] }))
        .with("/process/oomScoreAdj", json!(100))
        .with("/linux/sysctl", json!({ "net.ipv4.ip_forward": "1" }))
        .with("/linux/devices", json!([{ "path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438 }]))
        .with(
            "/linux/resources",
            json!({
                "devices": [{ "allow": false, "access": "rwm" }, { "allow": true, "type": "c", "major": 1, "access": "r" }],
                "memory": { "limit": 1 << 28 },
                "pids": { "limit": 100 },
            }),
        )
        .with(
            "/linux/seccomp",
            json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{ "names": ["reboot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1 }],
            }),
        );
    let config = bundle.config.clone();
    let args = config["process"]["args"].clone();
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let (mut ran, mut refused) = (0, 0);
    for _ in 0..150 {
        bundle.config = config.clone();
        let mut what = mutate(&mut bundle.config, &mut numbers);
        if numbers.below(3) == 0 {
            what += &format!(", {}", mutate(&mut bundle.config, &mut numbers));
        }
        let mut run = bundle.command(&["run", &bundle.id]);
        let output = Patient::output(&mut run, &what);
        let (shown, said) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(!said.contains("panicked") && !said.contains("defect"), "{what}: {said}");
        assert!(output.status.code().is_some(), "{what}: {output:?}");
        assert_eq!(fs::read_dir(bundle.path("state")).into_iter().flatten().count(), 0, "{what}");
        if !output.status.success() {
            assert!(
                !said.trim().is_empty() || bundle.config["process"]["args"] != args,
                "{what}: {output:?}"
            );
            refused += 1;
            continue;
        }
        ran += 1;
        if bundle.config["process"]["args"] == args {
            is_right(&bundle.config, &shown, &what);
        }
    }
    assert!(ran > 20 && refused > 20, "{ran} {refused}");
}

/// Runs a command for a while.
struct Patient;

impl Patient {
    fn output(command: &mut std::process::Command, what: &str) -> std::process::Output {
        use std::process::Stdio;
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while child.try_wait().unwrap().is_none() {
            if std::time::Instant::now() > deadline {
                let _ = child.kill();
                panic!("{what}: it does not end");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        child.wait_with_output().unwrap()
    }
}

fn is_right(config: &Value, shown: &str, what: &str) {
    let line = |key: &str| shown.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t"));
    let process = &config["process"];
    let id = |name: &str| process["user"][name].as_u64().unwrap_or(0).to_string();
    assert_eq!(line("Uid").unwrap().split('\t').next(), Some(id("uid").as_str()), "{what}");
    assert_eq!(line("Gid").unwrap().split('\t').next(), Some(id("gid").as_str()), "{what}");
    let groups = process["user"]["additionalGids"].as_array().cloned().unwrap_or_default();
    let groups: Vec<_> = groups.iter().map(|gid| gid.to_string()).collect();
    let mut shown_groups: Vec<_> = line("Groups").unwrap().split_whitespace().map(str::to_owned).collect();
    shown_groups.dedup();
    assert!(groups.iter().all(|group| shown_groups.contains(group)), "{what}: {shown_groups:?}");
    assert!(shown_groups.len() <= groups.len(), "{what}: {shown_groups:?}");
    let confined = u8::from(process["noNewPrivileges"] == true).to_string();
    assert_eq!(line("NoNewPrivs"), Some(confined.as_str()), "{what}");
    let filtered = if config["linux"]["seccomp"].is_object() { "2" } else { "0" };
    assert_eq!(line("Seccomp"), Some(filtered), "{what}");
    // A user other than root has none unless they are ambient.
    assert_eq!(line("CapAmb"), Some("0000000000000000"), "{what}");
    let bounding = process["capabilities"]["bounding"].as_array().map_or(0, |listed| {
        let mut names: Vec<_> = listed.iter().map(Value::to_string).collect();
        names.sort();
        names.dedup();
        names.len()
    });
    let held = u64::from_str_radix(line("CapBnd").unwrap(), 16).unwrap().count_ones() as usize;
    assert!(held <= bounding, "{what}: {held} of {bounding}");
    let host = config["hostname"].as_str().filter(|name| !name.is_empty());
    if let Some(host) = host {
        assert_eq!(shown.lines().next(), Some(host), "{what}");
    }
    assert!(shown.lines().nth(1).unwrap().starts_with('/'), "{what}");
}
