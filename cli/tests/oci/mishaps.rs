//! What goes wrong while a container is there: nothing is left running that nobody knows of, and nobody waits for ever.

use std::{
    fs,
    io::Read,
    os::unix::{fs::chown, process::CommandExt},
    process::{Child, Stdio},
    time::Duration,
};

use serde_json::json;

use crate::{
    Test,
    fixture::{Bundle, await_that, in_vm, text},
};

pub fn all() -> Vec<Test> {
    crate::tests![
        run_that_fails_leaves_no_container,
        run_keeps_the_exit_code_if_a_poststop_hook_fails,
        exec_that_fails_leaves_no_process,
        exec_of_a_whole_process_takes_no_other_options,
        start_of_a_paused_container_is_refused,
        terminal_takes_input_while_nobody_reads_its_output,
        terminal_is_let_go_though_something_left_behind_prints,
        update_waits_until_the_container_is_created,
        plain_users_process_is_killed_without_a_cgroup,
    ]
}

/// Ends it if it does not by itself.
struct Bounded(Child);

impl Bounded {
    #[track_caller]
    fn await_end(&mut self, what: &str) -> Option<i32> {
        await_that(what, || self.0.try_wait().unwrap().is_some());
        self.0.wait().unwrap().code()
    }
}

impl Drop for Bounded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run_that_fails_leaves_no_container() {
    let bundle = Bundle::script("echo much; sleep 100").with("/process/terminal", json!(true));
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = bundle.command(&["run", &bundle.id]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("cannot carry the terminal"), "{output:?}");
    assert!(bundle.refused(&["state", &bundle.id]).contains("does not exist"));
}

fn run_keeps_the_exit_code_if_a_poststop_hook_fails() {
    let hook = json!([{ "path": "/bin/sh", "args": ["sh", "-c", "exit 1"] }]);
    let bundle = Bundle::script("exit 7").with("/hooks", json!({ "poststop": hook }));
    let output = bundle.run(&["run", &bundle.id]);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert!(text(&output.stderr).contains("hook #0 of poststop"), "{output:?}");
}

fn exec_that_fails_leaves_no_process() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let words = ["exec", "--detach", "--pid-file", "/nowhere/pid", &bundle.id, "sleep", "200"];
    let errors = fs::File::create(bundle.path("errors")).unwrap();
    let status = bundle.command(&words).stdout(Stdio::null()).stderr(errors).status().unwrap();
    assert!(!status.success() && bundle.errors().contains("/nowhere"));
    await_that("the process is gone", || !bundle.ok(&["ps", &bundle.id]).contains("sleep 200"));
}

fn exec_of_a_whole_process_takes_no_other_options() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let process =
        json!({ "args": ["tty"], "env": ["PATH=/bin"], "cwd": "/", "user": { "uid": 0, "gid": 0 } });
    fs::write(bundle.path("process"), process.to_string()).unwrap();
    let path = bundle.path("process").display().to_string();
    for option in ["--no-new-privs", "--user=1", "--cap=CAP_KILL", "--cwd=/tmp", "--env=A=1"] {
        assert!(
            bundle.refused(&["exec", "--process", &path, option, &bundle.id]).contains("cannot be used with")
        );
    }
    // Engines say so beside the process.
    assert_eq!(bundle.ok(&["exec", "--process", &path, "--tty", &bundle.id]), "/dev/pts/0");
}

fn start_of_a_paused_container_is_refused() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.create();
    bundle.ok(&["pause", &bundle.id]);
    assert!(bundle.refused(&["start", &bundle.id]).contains("resume it first"));
    bundle.ok(&["resume", &bundle.id]);
    bundle.ok(&["start", &bundle.id]);
    assert_eq!(bundle.status(), "running");
}

/// A program that waits for its output to be read takes no input meanwhile, which must not keep anybody from reading.
fn terminal_takes_input_while_nobody_reads_its_output() {
    const BYTES: usize = 400_000;
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let line = "x".repeat(99) + "\n";
    fs::write(bundle.path("input"), line.repeat(BYTES / 100)).unwrap();
    let script = format!("stty -echo -opost; head -c {BYTES}");
    let mut exec = bundle.command(&["exec", "--tty", &bundle.id, "sh", "-c", &script]);
    let input = fs::File::open(bundle.path("input")).unwrap();
    let mut exec = Bounded(exec.stdin(input).stdout(Stdio::piped()).spawn().unwrap());
    let mut output = exec.0.stdout.take().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    assert_eq!(exec.await_end("exec ends"), Some(0));
    // What came before echo was off stands there twice.
    assert!(reader.join().unwrap() >= BYTES);
}

fn terminal_is_let_go_though_something_left_behind_prints() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let script = "trap '' HUP; (while :; do echo more; done) & sleep 0.2";
    let mut exec = bundle.command(&["exec", "--tty", &bundle.id, "sh", "-c", script]);
    let mut exec = Bounded(exec.stdout(Stdio::null()).spawn().unwrap());
    assert_eq!(exec.await_end("exec ends"), Some(0));
}

fn update_waits_until_the_container_is_created() {
    let bundle = Bundle::new(&["sleep", "100"]);
    let (begun, go_on) = (bundle.path("begun"), bundle.path("go_on"));
    let script =
        format!("touch {}; while [ ! -e {} ]; do sleep 0.02; done", begun.display(), go_on.display());
    let hook = json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
    let bundle = bundle.with("/hooks", json!({ "createRuntime": hook }));
    let mut create = bundle.command(&["create", &bundle.id]);
    let mut create = Bounded(create.stdout(Stdio::null()).spawn().unwrap());
    await_that("the hook runs", || begun.exists());
    let mut update = Bounded(bundle.command(&["update", "--pids-limit", "20", &bundle.id]).spawn().unwrap());
    std::thread::sleep(Duration::from_millis(300));
    assert!(update.0.try_wait().unwrap().is_none(), "update did not wait");
    fs::write(go_on, "").unwrap();
    assert_eq!(create.await_end("create ends"), Some(0));
    assert_eq!(update.await_end("update ends"), Some(0));
    assert_eq!(bundle.status(), "created");
}

/// Where a user may make no cgroups, its containers have none: that of their first process is all there is to kill by.
fn plain_users_process_is_killed_without_a_cgroup() {
    if in_vm() {
        return;
    }
    const USER: u32 = 54_321;
    let own = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
    let bundle = Bundle::new(&["sleep", "100"])
        .with("/mounts", json!([{ "destination": "/dev", "type": "tmpfs", "source": "tmpfs" }]))
        .with(
            "/linux",
            json!({
                "namespaces": [{ "type": "user" }, { "type": "mount" }, { "type": "uts" }],
                "uidMappings": own,
                "gidMappings": own,
            }),
        );
    for path in ["", "rootfs"] {
        chown(bundle.path(path), Some(USER), Some(USER)).unwrap();
    }
    let run = |words: &[&str]| {
        let mut command = bundle.command(words);
        command.uid(USER).gid(USER).output().unwrap()
    };
    let started = bundle
        .command(&["run", "--detach", &bundle.id])
        .uid(USER)
        .gid(USER)
        .stdout(Stdio::null())
        .stderr(fs::File::create(bundle.path("errors")).unwrap())
        .status();
    assert!(started.unwrap().success(), "{}", bundle.errors());
    assert!(run(&["kill", &bundle.id, "KILL"]).status.success());
    bundle.await_status("stopped");
    assert!(run(&["delete", &bundle.id]).status.success());
}
