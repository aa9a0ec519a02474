//! Hooks: when they run, where, and with what on stdin.

use std::{fs, process::Stdio, time::Duration};

use serde_json::{Value, json};

use crate::{
    Test,
    fixture::{Bundle, await_that, text},
};

pub fn all() -> Vec<Test> {
    crate::tests![
        hooks_run_in_their_order_with_the_state,
        hook_that_fails_ends_the_start,
        poststart_hook_that_fails_in_run_leaves_nothing,
        exec_waits_until_the_container_is_created,
        process_in_a_joined_user_namespace_cannot_be_looked_into_from_there,
        hook_of_the_container_has_the_environment_of_the_container,
        hook_of_the_container_has_no_more_rights_than_it,
        poststop_hook_that_fails_is_told_and_all_is_removed,
    ]
}

fn hook(script: &str) -> Value {
    json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
}

fn hooks_run_in_their_order_with_the_state() {
    let bundle = Bundle::new(&["sleep", "100"]);
    let log = bundle.path("log").display().to_string();
    let note = |kind: &str| hook(&format!("echo {kind} $(cat) >> {log}"));
    let mut hooks = json!({});
    for kind in ["prestart", "createRuntime", "createContainer", "poststart", "poststop"] {
        hooks[kind] = note(kind);
    }
    hooks["startContainer"] = hook("cat > /started");
    let bundle = bundle.with("/hooks", hooks);
    bundle.create();
    let pid = bundle.state()["pid"].clone();
    bundle.ok(&["start", &bundle.id]);
    bundle.ok(&["delete", "--force", &bundle.id]);
    let log = fs::read_to_string(log).unwrap();
    let seen: Vec<(&str, Value)> = log
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(kind, state)| (kind, serde_json::from_str(state).unwrap()))
        .collect();
    let expected = [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("createContainer", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ];
    for ((kind, state), (expected_kind, status)) in seen.iter().zip(expected) {
        assert_eq!((*kind, state["status"].as_str().unwrap()), (expected_kind, status), "{state}");
        assert_eq!(state["id"], bundle.id.as_str());
        assert_eq!(state["pid"], if status == "stopped" { json!(0) } else { pid.clone() });
    }
    assert_eq!(seen.len(), expected.len());
    let started = fs::read_to_string(bundle.path("rootfs/started")).unwrap();
    let started: Value = serde_json::from_str(&started).unwrap();
    assert_eq!((&started["status"], &started["pid"]), (&json!("created"), &pid));
}

fn hook_that_fails_ends_the_start() {
    for kind in ["prestart", "createRuntime", "createContainer", "startContainer", "poststart"] {
        let bundle =
            Bundle::new(&["sleep", "100"]).with("/hooks", json!({ kind: hook("echo oh no; exit 4") }));
        let output = bundle.run(&["run", &bundle.id]);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{kind}");
        assert!(message.contains(&format!("error running hook #0 of {kind}")), "{message}");
        assert!(message.contains("exit status 4: oh no"), "{message}");
    }
}

fn poststart_hook_that_fails_in_run_leaves_nothing() {
    for words in [&["run"][..], &["run", "--detach"]] {
        let bundle = Bundle::new(&["sleep", "100"]).with("/hooks", json!({ "poststart": hook("exit 4") }));
        let output = bundle.path("output");
        let file = || fs::File::create(&output).unwrap();
        let words = [words, &[&bundle.id]].concat();
        let status = bundle.command(&words).stdout(file()).stderr(file()).status().unwrap();
        assert!(!status.success());
        assert_eq!(fs::read_dir(bundle.path("state")).unwrap().count(), 0, "{words:?}");
    }
}

/// During a createRuntime hook its first process is there already, but still in the caller's root.
fn exec_waits_until_the_container_is_created() {
    let bundle = Bundle::new(&["sleep", "100"]);
    let (begun, go_on) = (bundle.path("begun"), bundle.path("go_on"));
    let script =
        format!("touch {}; while [ ! -e {} ]; do sleep 0.02; done", begun.display(), go_on.display());
    let bundle = bundle.with("/hooks", json!({ "createRuntime": hook(&script) }));
    let errors = fs::File::create(bundle.path("errors")).unwrap();
    let mut create =
        bundle.command(&["create", &bundle.id]).stdout(Stdio::null()).stderr(errors).spawn().unwrap();
    await_that("the hook runs", || begun.exists());
    let listing = fs::File::create(bundle.path("listing")).unwrap();
    let mut exec = bundle.command(&["exec", &bundle.id, "/bin/ls", "/"]).stdout(listing).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(exec.try_wait().unwrap().is_none(), "exec did not wait");
    fs::write(go_on, "").unwrap();
    assert!(create.wait().unwrap().success(), "{}", bundle.errors());
    assert!(exec.wait().unwrap().success());
    assert_eq!(text(&fs::read(bundle.path("listing")).unwrap()), "bin\ndev\netc\nproc\ntmp");
}

/// Root of the other container's user namespace has all rights over processes in it that can be dumped; this one still
/// has the caller's files.
fn process_in_a_joined_user_namespace_cannot_be_looked_into_from_there() {
    let pod = crate::spaces::in_user_namespace("sleep 100");
    pod.start();
    let pod_pid = pod.state()["pid"].as_i64().unwrap();
    let look = |pid: &str| format!("nsenter --user --target {pod_pid} readlink /proc/{pid}/root");
    let bundle = Bundle::new(&["true"]);
    let seen = bundle.path("seen").display().to_string();
    let script = format!(
        "pid=$(grep -o '\"pid\":[0-9]*'); pid=${{pid#*:}}; {{ {} && echo seen || echo hidden; {}; }} > {seen} 2>&1",
        look("$pid"),
        look(&pod_pid.to_string()),
    );
    let joined = json!([
        { "type": "user", "path": format!("/proc/{pod_pid}/ns/user") },
        { "type": "pid", "path": format!("/proc/{pod_pid}/ns/pid") },
        { "type": "mount" },
    ]);
    let mut config = bundle.config.clone();
    config.as_object_mut().unwrap().remove("hostname");
    let mut bundle = bundle;
    bundle.config = config;
    let bundle =
        bundle.with("/linux/namespaces", joined).with("/hooks", json!({ "createRuntime": hook(&script) }));
    bundle.run(&["run", &bundle.id]);
    let seen = fs::read_to_string(seen).unwrap();
    assert!(seen.contains("hidden") && !seen.contains("seen"), "{seen}");
    // The same look at a process of the container's own shows that it could have seen something.
    assert_eq!(seen.lines().last(), Some("/"), "{seen}");
}

fn hook_of_the_container_has_the_environment_of_the_container() {
    let bundle = Bundle::new(&["true"])
        .with("/process/env/-", json!("OWN=container"))
        .with("/hooks", json!({ "startContainer": hook("env > /tmp/env") }));
    let status = bundle.command(&["run", &bundle.id]).env("SECRET", "of the caller").status().unwrap();
    assert!(status.success());
    let env = fs::read_to_string(bundle.path("rootfs/tmp/env")).unwrap();
    assert!(env.lines().any(|line| line == "OWN=container"), "{env}");
    assert!(!env.contains("SECRET"), "{env}");
}

fn hook_of_the_container_has_no_more_rights_than_it() {
    let bundle = Bundle::new(&["true"])
        .with("/hooks", json!({ "startContainer": hook("cat /proc/self/status > /tmp/status; readlink /proc/self/exe > /tmp/exe") }));
    bundle.ok(&["run", &bundle.id]);
    let status = fs::read_to_string(bundle.path("rootfs/tmp/status")).unwrap();
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    // Chown, kill, setgid, setuid, net_bind_service.
    assert_eq!(u64::from_str_radix(&field("CapEff:"), 16).unwrap(), 0x4e1);
    assert_eq!(field("CapBnd:"), field("CapEff:"));
    assert_eq!(field("NoNewPrivs:"), "1");
    // The image's own shell.
    assert_eq!(fs::read_to_string(bundle.path("rootfs/tmp/exe")).unwrap().trim(), "/bin/busybox");
}

fn poststop_hook_that_fails_is_told_and_all_is_removed() {
    let bundle = Bundle::new(&["true"]);
    let trace = bundle.path("trace").display().to_string();
    let hooks = json!([hook("exit 1")[0], hook(&format!("touch {trace}"))[0]]);
    let bundle = bundle.with("/hooks", json!({ "poststop": hooks }));
    bundle.create();
    let output = bundle.run(&["delete", &bundle.id]);
    assert!(output.status.success() && text(&output.stderr).contains("hook #0 of poststop"), "{output:?}");
    assert!(fs::exists(trace).unwrap());
    assert!(bundle.refused(&["state", &bundle.id]).contains("does not exist"));
}
