//! From create to delete.

use std::{
    fs,
    io::Read,
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    Test,
    fixture::{Bundle, await_that, text},
};

pub fn all() -> Vec<Test> {
    crate::tests![
        created_container_waits_and_then_runs,
        state_is_what_the_specification_says,
        run_returns_the_exit_code_and_leaves_nothing,
        run_of_a_process_that_a_signal_kills_returns_128_and_its_number,
        real_time_signal_to_run_reaches_the_process,
        two_hundred_runs_at_once_all_succeed_and_leave_nothing,
        program_that_is_not_there_is_told_at_create,
        id_that_is_taken_is_refused,
        id_that_is_no_name_is_refused,
        running_container_is_deleted_only_by_force,
        container_that_is_not_there_is_named,
        failed_create_leaves_nothing,
        cgroup_that_somebody_else_has_made_anew_is_not_deleted,
        cgroup_path_that_cannot_be_used_is_refused_before_anything_is_made,
        state_is_for_its_owner_only,
        status_is_not_confused_by_others_who_look,
        create_killed_at_any_moment_leaves_what_delete_removes,
        starting_twice_is_refused,
        log_is_json_with_the_error,
        list_shows_all_containers,
        systemd_cgroups_are_refused,
    ]
}

fn created_container_waits_and_then_runs() {
    let bundle = Bundle::script("echo ran; sleep 100");
    bundle.create();
    assert_eq!(bundle.status(), "created");
    assert_eq!(bundle.output(), "");
    bundle.ok(&["start", &bundle.id]);
    bundle.await_output("ran");
    assert_eq!(bundle.status(), "running");
    bundle.ok(&["kill", &bundle.id, "KILL"]);
    bundle.await_status("stopped");
    bundle.ok(&["delete", &bundle.id]);
    assert!(bundle.refused(&["state", &bundle.id]).contains("does not exist"));
}

fn state_is_what_the_specification_says() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.create();
    let state = bundle.state();
    assert_eq!(state["ociVersion"], "1.0.2");
    assert_eq!(state["id"], bundle.id.as_str());
    assert_eq!(state["status"], "created");
    assert_eq!(state["annotations"], json!({ "org.example.note": "kept" }));
    let path = bundle.path("").canonicalize().unwrap();
    assert_eq!(state["bundle"], path.to_str().unwrap());
    assert_eq!(state["rootfs"], path.join("rootfs").to_str().unwrap());
    assert_eq!(state["owner"], "root");
    let pid = state["pid"].as_i64().unwrap();
    assert!(fs::exists(format!("/proc/{pid}")).unwrap());
    bundle.ok(&["kill", &bundle.id, "9"]);
    bundle.await_status("stopped");
    assert_eq!(bundle.state()["pid"], 0);
}

fn run_returns_the_exit_code_and_leaves_nothing() {
    let bundle = Bundle::script("echo out; echo err >&2; exit 7");
    let output = bundle.run(&["run", &bundle.id]);
    assert_eq!(
        (output.status.code(), text(&output.stdout), text(&output.stderr)),
        (Some(7), "out".into(), "err".into())
    );
    assert!(bundle.refused(&["state", &bundle.id]).contains("does not exist"));
}

fn run_of_a_process_that_a_signal_kills_returns_128_and_its_number() {
    let killed = Bundle::script("sh -c 'kill -9 $$'; kill -TERM $$; sleep 5")
        .with("/linux/namespaces", json!([{ "type": "mount" }, { "type": "uts" }]));
    assert_eq!(killed.run(&["run", &killed.id]).status.code(), Some(128 + 15));
}

fn real_time_signal_to_run_reaches_the_process() {
    let bundle = Bundle::script("trap 'exit 5' 40; echo ready; while :; do sleep 0.05; done");
    let mut run = bundle.command(&["run", &bundle.id]).stdout(Stdio::piped()).spawn().unwrap();
    let mut ready = [0; 6];
    run.stdout.take().unwrap().read_exact(&mut ready).unwrap();
    assert!(Command::new("kill").args(["-40", &run.id().to_string()]).status().unwrap().success());
    assert_eq!(run.wait().unwrap().code(), Some(5));
}

fn two_hundred_runs_at_once_all_succeed_and_leave_nothing() {
    let bundle = Bundle::script("exit 0");
    // Made first: each writes the bundle's configuration anew.
    let ids: Vec<_> = (0..200).map(|number| format!("{}-{number}", bundle.id)).collect();
    let mut commands: Vec<_> = ids.iter().map(|id| bundle.command(&["run", id])).collect();
    let spawn =
        |command: &mut Command| command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let running: Vec<_> = commands.iter_mut().map(spawn).collect();
    for child in running {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!((text(&output.stdout), text(&output.stderr)), (String::new(), String::new()));
    }
    let left: Vec<_> =
        fs::read_dir(bundle.path("state")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn program_that_is_not_there_is_told_at_create() {
    let bundle = Bundle::new(&["nowhere"]);
    let output = bundle.run(&["create", &bundle.id]);
    assert_eq!(output.status.code(), Some(127));
    assert!(text(&output.stderr).contains("\"nowhere\": executable file not found in $PATH"), "{output:?}");
    let not_executable = Bundle::new(&["/etc"]);
    assert_eq!(not_executable.run(&["run", &not_executable.id]).status.code(), Some(126));
}

fn id_that_is_taken_is_refused() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.create();
    assert!(bundle.refused(&["create", &bundle.id]).contains("already exists"));
    assert_eq!(bundle.status(), "created");
}

fn id_that_is_no_name_is_refused() {
    let bundle = Bundle::new(&["true"]);
    for id in ["", ".", "..", "../x", "a/b", "a b", "ä"] {
        assert!(bundle.refused(&["create", id]).contains("invalid container ID"), "{id:?}");
        assert!(bundle.refused(&["delete", "--force", id]).contains("invalid container ID"), "{id:?}");
    }
}

fn running_container_is_deleted_only_by_force() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    assert!(bundle.refused(&["delete", &bundle.id]).contains("running state"));
    bundle.ok(&["delete", "--force", &bundle.id]);
    bundle.ok(&["delete", "--force", &bundle.id]);
    assert!(bundle.refused(&["delete", &bundle.id]).contains("does not exist"));
}

fn container_that_is_not_there_is_named() {
    let bundle = Bundle::new(&["true"]);
    for words in
        [&["state", "nobody"][..], &["start", "nobody"], &["kill", "nobody", "9"], &["exec", "nobody", "ls"]]
    {
        assert!(bundle.refused(words).contains("container does not exist: nobody"), "{words:?}");
    }
}

fn failed_create_leaves_nothing() {
    let bundle = Bundle::new(&["true"]).with(
        "/mounts/-",
        json!({
            "destination": "/x", "type": "nosuchfs", "source": "none",
        }),
    );
    assert!(bundle.refused(&["create", &bundle.id]).contains("nosuchfs"));
    assert_eq!(fs::read_dir(bundle.path("state")).unwrap().count(), 0);
    assert_eq!(bundle.ok(&["list", "--quiet"]), "");
}

fn cgroup_that_somebody_else_has_made_anew_is_not_deleted() {
    let path = format!("/cloche/oci-test-{}-shared", std::process::id());
    let ended = Bundle::new(&["true"]).with("/linux/cgroupsPath", json!(path));
    ended.start();
    ended.await_status("stopped");
    let bundle = Bundle::new(&["sleep", "100"]).with("/linux/cgroupsPath", json!(path));
    bundle.start();
    ended.ok(&["delete", "--force", &ended.id]);
    assert_eq!(bundle.status(), "running");
    assert!(bundle.ok(&["ps", &bundle.id]).contains("sleep 100"));
}

fn cgroup_path_that_cannot_be_used_is_refused_before_anything_is_made() {
    let bundle = Bundle::new(&["true"]).with("/linux/cgroupsPath", json!("/x/../y"));
    assert!(bundle.refused(&["create", &bundle.id]).contains("\"/x/../y\" is not usable"));
    assert!(!bundle.path("state").join(&bundle.id).exists());
    // A record with such a path is removed nevertheless.
    let bundle = Bundle::new(&["true"]);
    bundle.start();
    bundle.await_status("stopped");
    let record = bundle.path("state").join(&bundle.id).join("state.json");
    let text = fs::read_to_string(&record).unwrap();
    let own = format!("/cloche/{}", bundle.id);
    fs::write(&record, text.replace(&own, "/x/../y")).unwrap();
    bundle.ok(&["delete", "--force", &bundle.id]);
    assert!(!record.exists());
    for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let _ = fs::remove_dir(hierarchy.path().join(own.trim_start_matches('/')));
    }
    let _ = fs::remove_dir(format!("/sys/fs/cgroup{own}"));
}

fn state_is_for_its_owner_only() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.create();
    let state = bundle.path("state");
    let directory = state.join(&bundle.id);
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&state), mode(&directory)), (0o700, 0o700));
    for file in ["config.json", "state.json", "lock"] {
        assert_eq!(mode(&directory.join(file)), 0o600, "{file}");
    }
}

fn status_is_not_confused_by_others_who_look() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.create();
    let lock = fs::File::open(bundle.path("state").join(&bundle.id).join("lock")).unwrap();
    rustix::fs::fcntl_lock(&lock, rustix::fs::FlockOperation::LockShared).unwrap();
    assert_eq!(bundle.status(), "created");
}

fn create_killed_at_any_moment_leaves_what_delete_removes() {
    for step in 0..40 {
        let bundle = Bundle::new(&["sleep", "100"]);
        let mut create = bundle
            .command(&["create", &bundle.id])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_micros(step * 400));
        create.kill().unwrap();
        create.wait().unwrap();
        // One that dies with its creator is seen to run until it is dead.
        await_that("nothing of it runs", || {
            let state = bundle.run(&["state", &bundle.id]);
            let state =
                state.status.success().then(|| serde_json::from_slice::<Value>(&state.stdout).unwrap());
            state.is_none_or(|state| ["created", "stopped"].contains(&state["status"].as_str().unwrap()))
        });
        bundle.ok(&["delete", "--force", &bundle.id]);
        assert!(bundle.refused(&["state", &bundle.id]).contains("does not exist"));
    }
}

fn starting_twice_is_refused() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    assert!(bundle.refused(&["start", &bundle.id]).contains("in the running state"));
    bundle.ok(&["kill", &bundle.id, "KILL"]);
    bundle.await_status("stopped");
    assert!(bundle.refused(&["start", &bundle.id]).contains("in the stopped state"));
}

fn log_is_json_with_the_error() {
    let bundle = Bundle::new(&["true"]);
    let log = bundle.path("log");
    bundle.refused(&["--log", log.to_str().unwrap(), "--log-format", "json", "state", "nobody"]);
    let line: serde_json::Value = serde_json::from_str(fs::read_to_string(log).unwrap().trim()).unwrap();
    assert_eq!(line["level"], "error");
    assert_eq!(line["msg"], "container does not exist: nobody");
    assert!(line["time"].as_str().unwrap().ends_with('Z'));
}

fn list_shows_all_containers() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let listed: serde_json::Value = serde_json::from_str(&bundle.ok(&["list", "--format", "json"])).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["id"], bundle.id.as_str());
    assert_eq!(listed[0]["status"], "running");
    let table = bundle.ok(&["list"]);
    assert!(table.starts_with("ID ") && table.lines().nth(1).unwrap().starts_with(&bundle.id), "{table}");
}

fn systemd_cgroups_are_refused() {
    let bundle = Bundle::new(&["true"]);
    assert!(
        bundle
            .refused(&["--systemd-cgroup", "run", &bundle.id])
            .contains("--systemd-cgroup is not supported")
    );
}
