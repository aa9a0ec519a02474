//! Hooks: when they run, where, and with what on stdin.

use std::fs;

use serde_json::{Value, json};

use crate::{Test, fixture::Bundle};

pub fn all() -> Vec<Test> {
    crate::tests![
        hooks_run_in_their_order_with_the_state,
        hook_that_fails_ends_the_start,
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
    assert!(bundle.refused(&["delete", &bundle.id]).contains("of poststop"));
    assert!(fs::exists(trace).unwrap());
    assert!(bundle.refused(&["state", &bundle.id]).contains("does not exist"));
}
