//! Pods: containers that share namespaces with a sandbox, and, if that is in a virtual machine, the machine.

use std::{fs, path::PathBuf, process::Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::{
    Test,
    fixture::{self, Bundle, await_that, text},
};

/// Of all isolations.
pub fn all() -> Vec<Test> {
    crate::tests![
        containers_of_a_pod_share_what_their_specs_say,
        containers_of_a_pod_come_and_go_by_themselves,
        containers_of_a_pod_can_have_one_pid_namespace,
    ]
}

/// Of virtual machines.
pub fn in_vm() -> Vec<Test> {
    crate::tests![
        end_of_the_sandbox_is_that_of_its_machine,
        limits_of_a_member_are_those_of_its_cgroup_in_the_guest,
        files_of_a_member_are_given_back_with_it,
        member_that_stops_its_further_processes_does_not_hold_up_the_others,
        pod_that_cannot_be_joined_is_refused_by_name,
    ]
}

const TYPE: &str = "/annotations/io.kubernetes.cri.container-type";
const SANDBOX: &str = "/annotations/io.kubernetes.cri.sandbox-id";

/// Of a kernel, since it runs.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A sandbox as an engine's, with shared memory that is the engine's to make.
fn sandbox(command: &[&str]) -> Bundle {
    let bundle = Bundle::new(command)
        .with(TYPE, json!("sandbox"))
        .with("/annotations/io.kubernetes.cri.sandbox-memory", json!((128 << 20).to_string()));
    fs::create_dir(bundle.path("shm")).unwrap();
    let shared = shared_memory(&bundle);
    bundle.with("/mounts/-", shared)
}

fn shared_memory(sandbox: &Bundle) -> Value {
    json!({ "destination": "/dev/shm", "type": "bind", "source": sandbox.path("shm"), "options": ["bind", "nosuid"] })
}

/// A member of the pod of a sandbox that runs: in its network, IPC and UTS namespaces.
fn member(sandbox: &Bundle, script: &str) -> Bundle {
    let pid = &sandbox.state()["pid"];
    let namespace =
        |kind: &str, name: &str| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{name}") });
    Bundle::script(script)
        .beside(sandbox)
        .with("/hostname", Value::Null)
        .with(TYPE, json!("container"))
        .with(SANDBOX, json!(sandbox.id))
        .with("/linux/namespaces/1", namespace("network", "net"))
        .with("/linux/namespaces/2", namespace("ipc", "ipc"))
        .with("/linux/namespaces/3", namespace("uts", "uts"))
        .with("/mounts/-", shared_memory(sandbox))
}

fn signal(bundle: &Bundle, signal: Signal) {
    let pid = bundle.state()["pid"].as_i64().unwrap();
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

fn containers_of_a_pod_share_what_their_specs_say() {
    let sandbox = sandbox(&["sleep", "1000"]);
    sandbox.start();
    let server = member(
        &sandbox,
        "echo for all > /dev/shm/word; echo mine > /tmp/word; exec busybox httpd -f -p 80 -h /tmp",
    );
    server.start();
    let script = "until busybox wget -qO- http://127.0.0.1/word; do sleep 0.1; done; cat /dev/shm/word; hostname; \
                  test -e /tmp/word || echo own files; echo $$; cat; echo err >&2; exit 7";
    let client = member(&sandbox, script);
    let input = client.path("input");
    fs::write(&input, "typed\n").unwrap();
    let mut run = client.command(&["run", &client.id]);
    let output = run.stdin(fs::File::open(input).unwrap()).output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stdout), text(&output.stderr)),
        (Some(7), "mine\nfor all\nbell\nown files\n1\ntyped".into(), "err".into())
    );
    // In each, and what is written is on the host.
    let name_of = |bundle: &Bundle| bundle.ok(&["exec", &bundle.id, "cat", "/proc/1/comm"]);
    assert_eq!((name_of(&server), name_of(&sandbox)), ("busybox".into(), "sleep".into()));
    let boot = |bundle: &Bundle| bundle.ok(&["exec", &bundle.id, "cat", BOOT_ID]);
    assert_eq!(boot(&server), boot(&sandbox));
    assert_eq!(boot(&server) == fs::read_to_string(BOOT_ID).unwrap().trim_end(), !fixture::in_vm());
    assert_eq!(fs::read_to_string(server.path("rootfs/tmp/word")).unwrap(), "mine\n");
    assert!(!sandbox.path("rootfs/tmp/word").exists() && !client.path("rootfs/tmp/word").exists());
}

fn containers_of_a_pod_come_and_go_by_themselves() {
    let sandbox = sandbox(&["sleep", "1000"]);
    sandbox.start();
    let beat = "trap 'echo bye; exit 3' TERM; echo up; while :; do echo beat; sleep 0.1; done";
    let (one, other) = (member(&sandbox, beat), member(&sandbox, beat));
    one.create();
    assert_eq!((one.status(), one.output()), ("created".into(), String::new()));
    one.ok(&["start", &one.id]);
    other.start();
    let goes_on = |bundle: &Bundle| {
        let before = bundle.output().len();
        await_that("it goes on", || bundle.output().len() > before);
    };
    one.await_output("up");
    one.ok(&["pause", &one.id]);
    assert_eq!((one.status(), other.status()), ("paused".into(), "running".into()));
    let before = one.output();
    goes_on(&other);
    goes_on(&other);
    assert_eq!(one.output(), before);
    one.ok(&["resume", &one.id]);
    goes_on(&one);
    one.ok(&["kill", &one.id, "TERM"]);
    one.await_status("stopped");
    one.await_output("bye");
    one.ok(&["delete", &one.id]);
    // And not by itself.
    other.ok(&["kill", &other.id, "KILL"]);
    other.await_status("stopped");
    other.ok(&["delete", &other.id]);
    assert_eq!(sandbox.status(), "running");
    one.start();
    one.await_output("up");
    // Not even started.
    other.create();
    other.ok(&["delete", "--force", &other.id]);
    let wrong = member(&sandbox, "true").with("/process/args", json!(["nowhere"]));
    assert_eq!(wrong.run(&["run", &wrong.id]).status.code(), Some(127));
    one.ok(&["delete", "--force", &one.id]);
    assert_eq!(sandbox.ok(&["exec", &sandbox.id, "echo", "well"]), "well");
}

fn containers_of_a_pod_can_have_one_pid_namespace() {
    let sandbox = sandbox(&["sleep", "1000"]);
    sandbox.start();
    let path = format!("/proc/{}/ns/pid", sandbox.state()["pid"]);
    let joined = |script: &str| {
        member(&sandbox, script).with("/linux/namespaces/0", json!({ "type": "pid", "path": path }))
    };
    let one = joined("cat /proc/1/comm; echo \"not 1: $(test $$ = 1 || echo so)\"; sleep 99 & exec sleep 98");
    one.start();
    one.await_output("not 1: so");
    assert!(one.output().starts_with("sleep\n"), "{}", one.output());
    let two = joined("ls /proc | busybox grep -c '^[0-9]'");
    // With the shell's own and its pipe's, and those of the other and the sandbox.
    assert!(two.ok(&["run", &two.id]).parse::<u32>().unwrap() >= 5);
    one.ok(&["kill", &one.id, "KILL"]);
    one.await_status("stopped");
    one.ok(&["delete", &one.id]);
    let left = || {
        sandbox.ok(&["exec", &sandbox.id, "sh", "-c", "cat /proc/[0-9]*/cmdline"]).contains("sleep\u{0}99")
    };
    await_that("nothing of it is left", || !left());
    assert_eq!(sandbox.status(), "running");
}

fn end_of_the_sandbox_is_that_of_its_machine() {
    let ends: [fn(&Bundle); 3] = [
        |sandbox| drop(sandbox.ok(&["kill", &sandbox.id, "KILL"])),
        |sandbox| signal(sandbox, Signal::USR1),
        |sandbox| drop(sandbox.ok(&["delete", "--force", &sandbox.id])),
    ];
    for end in ends {
        let sandbox = sandbox(&["sh", "-c", "trap 'exit 0' USR1; echo up; while :; do sleep 0.1; done"]);
        sandbox.start();
        sandbox.await_output("up");
        let (created, started) = (member(&sandbox, "true"), member(&sandbox, "echo up; sleep 1000"));
        created.create();
        let output = fs::File::create(started.path("output")).unwrap();
        let mut run =
            started.command(&["run", &started.id]).stdout(output).stderr(Stdio::null()).spawn().unwrap();
        started.await_output("up");
        end(&sandbox);
        assert_eq!(run.wait().unwrap().code(), Some(137));
        created.await_status("stopped");
        created.ok(&["delete", &created.id]);
    }
}

fn limits_of_a_member_are_those_of_its_cgroup_in_the_guest() {
    let sandbox = sandbox(&["sleep", "1000"]);
    sandbox.start();
    let limits = json!({
        "memory": { "limit": 64 << 20 }, "pids": { "limit": 50 }, "cpu": { "quota": 50_000, "period": 100_000 },
    });
    let one = member(&sandbox, "sleep 1000")
        .with("/linux/resources", limits)
        .with("/linux/namespaces/-", json!({ "type": "cgroup" }))
        .with("/mounts/-", json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup" }));
    one.start();
    let inside = |file: &str| one.ok(&["exec", &one.id, "cat", &format!("/sys/fs/cgroup/{file}")]);
    let found = ["memory.max", "pids.max", "cpu.max"].map(inside);
    assert_eq!(found, [(64 << 20).to_string(), "50".into(), "50000 100000".into()]);
    one.ok(&["update", "--memory", "32m", "--cpu-quota", "20000", &one.id]);
    assert_eq!(["memory.max", "cpu.max"].map(inside), [(32 << 20).to_string(), "20000 100000".into()]);
    assert_eq!(one.ok(&["ps", "--format", "json", &one.id]).matches(',').count(), 0);
    for (limits, why) in [
        (json!({ "memory": { "limit": 1_u64 << 40 } }), "memory of the virtual machine"),
        (json!({ "cpu": { "cpus": "0" } }), "linux.resources.cpu.cpus"),
    ] {
        let refused = member(&sandbox, "true").with("/linux/resources", limits);
        let told = refused.refused(&["run", &refused.id]);
        assert!(told.contains(why), "{told}");
    }
}

/// Descriptors that the file server of a sandbox's machine has open.
fn open_files(sandbox: &Bundle) -> usize {
    let listed = fs::read_to_string(format!("/sys/fs/cgroup/cloche/{}/cgroup.procs", sandbox.id)).unwrap();
    let process = |pid: &str| PathBuf::from("/proc").join(pid);
    let is_server = |pid: &&str| {
        fs::read(process(pid).join("cmdline")).is_ok_and(|words| words.starts_with(b"cloche\0share\0"))
    };
    let server = listed.lines().find(is_server).unwrap();
    fs::read_dir(process(server).join("fd")).unwrap().count()
}

fn files_of_a_member_are_given_back_with_it() {
    let sandbox = sandbox(&["sleep", "1000"]);
    sandbox.start();
    // What the sandbox itself has looked at stays.
    sandbox.ok(&["exec", &sandbox.id, "true"]);
    let before = open_files(&sandbox);
    let ends: [fn(&Bundle); 3] = [
        |member| drop(member.ok(&["kill", &member.id, "KILL"])),
        |member| signal(member, Signal::KILL),
        |member| drop(member.ok(&["delete", "--force", &member.id])),
    ];
    for (number, end) in ends.into_iter().enumerate() {
        let one = member(&sandbox, "cat /bin/sh > /tmp/copy; echo up; exec sleep 1000 < /tmp/copy");
        fs::create_dir(one.path("data")).unwrap();
        let data = one.path("data");
        let one = one.with(
            "/mounts/-",
            json!({ "destination": "/data", "type": "bind", "source": data, "options": ["rbind", "ro"] }),
        );
        one.start();
        one.await_output("up");
        assert!(open_files(&sandbox) > before + 4);
        end(&one);
        if number < 2 {
            one.await_status("stopped");
            one.ok(&["delete", &one.id]);
        }
        // At once: an engine unmounts them now.
        assert_eq!(open_files(&sandbox), before);
    }
}

fn pod_that_cannot_be_joined_is_refused_by_name() {
    let plain = Bundle::new(&["sleep", "1000"]);
    plain.start();
    let elsewhere = sandbox(&["sleep", "1000"]);
    let sandbox = sandbox(&["sleep", "1000"]).beside(&plain);
    sandbox.start();
    let refused = |pointer: &str, value: Value| {
        let bundle = member(&sandbox, "true").with(pointer, value);
        bundle.refused(&["run", &bundle.id])
    };
    for (pointer, value, why) in [
        (SANDBOX, json!("nobody"), "there is no such container"),
        (SANDBOX, json!(elsewhere.id), "there is no such container"),
        (SANDBOX, json!(plain.id), "is no pod's sandbox"),
        (SANDBOX, json!(""), "is missing"),
        (
            "/linux/namespaces/2/path",
            json!(format!("/proc/{}/ns/ipc", plain.state()["pid"])),
            "of its sandbox",
        ),
        ("/linux/namespaces/4/path", json!(format!("/proc/{}/ns/mnt", sandbox.state()["pid"])), "[mnt].path"),
        ("/linux/namespaces/1/path", json!("/proc/1/ns/net"), "/proc/1/ns/net"),
    ] {
        let told = refused(pointer, value);
        assert!(told.contains(why), "{why}: {told}");
    }
    let one = member(&sandbox, "sleep 1000");
    one.start();
    sandbox.ok(&["pause", &sandbox.id]);
    assert!(refused("/hostname", Value::Null).contains("is paused"));
    assert!(one.refused(&["exec", &one.id, "true"]).contains("is paused"));
    assert!(one.refused(&["kill", &one.id, "TERM"]).contains("is paused"));
    sandbox.ok(&["resume", &sandbox.id]);
    assert_eq!(one.ok(&["exec", &one.id, "echo", "well"]), "well");
    // Prepared while it runs.
    let late = member(&sandbox, "true");
    sandbox.ok(&["kill", &sandbox.id, "KILL"]);
    sandbox.await_status("stopped");
    assert!(late.refused(&["run", &late.id]).contains("the sandbox is stopped"));
}

/// A further process is in the container before it is its program, and the guest's agent waits for it to become that.
fn member_that_stops_its_further_processes_does_not_hold_up_the_others() {
    let sandbox = sandbox(&["sleep", "1000"]);
    sandbox.start();
    let hostile = member(&sandbox, "echo up; while :; do kill -STOP -1; done");
    hostile.start();
    hostile.await_output("up");
    let output = hostile.run(&["exec", &hostile.id, "true"]);
    let told = text(&output.stderr);
    assert!(output.status.success() || told.contains("its program did not run within"), "{output:?}");
    assert_eq!(sandbox.ok(&["exec", &sandbox.id, "echo", "here"]), "here");
    hostile.ok(&["delete", "--force", &hostile.id]);
    assert_eq!(sandbox.status(), "running");
}
