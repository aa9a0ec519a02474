//! What goes wrong while a container is there: nothing is left running that nobody knows of, and nobody waits for ever.

use std::{
    fs,
    io::{Read, Write},
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
        container_whose_first_thread_has_ended_still_runs,
        bundle_that_no_record_can_name_is_refused,
        container_that_stands_still_is_looked_at_often,
        connection_that_says_nothing_does_not_hold_the_gate,
        hook_that_waits_for_its_own_container_is_refused,
        file_that_others_have_prepared_beside_a_pid_file_is_not_written_to,
        processes_of_a_joined_pid_namespace_are_not_all_the_containers,
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
    let script = format!("stty -echo -opost; echo ready; head -c {BYTES}");
    let mut exec = bundle.command(&["exec", "--tty", &bundle.id, "sh", "-c", &script]);
    let mut exec = Bounded(exec.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let (mut input, mut output) = (exec.0.stdin.take().unwrap(), exec.0.stdout.take().unwrap());
    let mut ready = [0; 6];
    output.read_exact(&mut ready).unwrap();
    let writer = std::thread::spawn(move || input.write_all(line.repeat(BYTES / 100).as_bytes()));
    std::thread::sleep(Duration::from_millis(500));
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    assert_eq!(exec.await_end("exec ends"), Some(0));
    assert_eq!(reader.join().unwrap(), BYTES);
    writer.join().unwrap().unwrap();
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

/// First word of this program as one that ends its first thread, and goes on in another.
pub const LEADERLESS: &str = "leaderless";

pub fn be_leaderless() -> ! {
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_millis(300));
        println!("alone");
        std::thread::sleep(Duration::from_secs(100));
        std::process::exit(0)
    });
    crate::syscalls::exit_thread()
}

/// The kernel shows such a process as a zombie.
fn container_whose_first_thread_has_ended_still_runs() {
    let bundle = Bundle::new(&["/bin/test-program", LEADERLESS]);
    fs::copy(std::env::current_exe().unwrap(), bundle.path("rootfs/bin/test-program")).unwrap();
    bundle.start();
    bundle.await_output("alone");
    assert_eq!(bundle.status(), "running");
    assert!(bundle.refused(&["delete", &bundle.id]).contains("in the running state"));
    bundle.ok(&["kill", &bundle.id, "KILL"]);
    bundle.await_status("stopped");
    bundle.ok(&["delete", &bundle.id]);
}

fn bundle_that_no_record_can_name_is_refused() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
    let bundle = Bundle::new(&["true"]);
    let odd = bundle.path("").join(OsStr::from_bytes(b"b\xff"));
    fs::create_dir_all(odd.join("rootfs")).unwrap();
    fs::write(odd.join("config.json"), bundle.config.to_string()).unwrap();
    let output = bundle.command(&["create", "--bundle"]).arg(&odd).arg(&bundle.id).output().unwrap();
    assert!(!output.status.success() && text(&output.stderr).contains("is not UTF-8"), "{output:?}");
    assert!(!bundle.path("state").join(&bundle.id).exists());
}

/// More often than its socket has room for.
fn container_that_stands_still_is_looked_at_often() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.create();
    bundle.ok(&["kill", &bundle.id, "STOP"]);
    for _ in 0..24 {
        let mut state = bundle.command(&["state", &bundle.id]);
        let mut state = Bounded(state.stdout(Stdio::null()).spawn().unwrap());
        assert_eq!(state.await_end("it is looked at"), Some(0));
    }
    bundle.ok(&["kill", &bundle.id, "CONT"]);
    bundle.ok(&["start", &bundle.id]);
    assert_eq!(bundle.status(), "running");
}

fn connection_that_says_nothing_does_not_hold_the_gate() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.create();
    let gate = bundle.path("state").join(&bundle.id).join("start.sock");
    let _silent = std::os::unix::net::UnixStream::connect(gate).unwrap();
    let mut start = Bounded(bundle.command(&["start", &bundle.id]).spawn().unwrap());
    assert_eq!(start.await_end("start ends"), Some(0));
}

fn hook_that_waits_for_its_own_container_is_refused() {
    let bundle = Bundle::new(&["sleep", "100"]);
    let (said, state) = (bundle.path("said").display().to_string(), bundle.path("state"));
    let script = format!(
        "exec -a {} {} --root {} delete {} > {said} 2>&1",
        crate::fixture::name(),
        crate::fixture::program().display(),
        state.display(),
        bundle.id,
    );
    let hook = json!([{ "path": "/bin/bash", "args": ["bash", "-c", format!("({script}); true")] }]);
    let bundle = bundle.with("/hooks", json!({ "createRuntime": hook }));
    let mut create = bundle.command(&["create", &bundle.id]);
    let mut create = Bounded(create.stdout(Stdio::null()).spawn().unwrap());
    assert_eq!(create.await_end("create ends"), Some(0));
    let said = fs::read_to_string(said).unwrap();
    assert!(said.contains("in the creating state"), "{said}");
    assert_eq!(bundle.status(), "created");
}

/// Beside a file in a directory that others can write to.
fn file_that_others_have_prepared_beside_a_pid_file_is_not_written_to() {
    let bundle = Bundle::new(&["sleep", "100"]);
    let victim = bundle.path("victim");
    fs::write(&victim, "precious").unwrap();
    std::os::unix::fs::symlink(&victim, bundle.path(".pid.new")).unwrap();
    let pid = bundle.path("pid");
    let status = bundle
        .command(&["create", "--pid-file", pid.to_str().unwrap(), &bundle.id])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(fs::read_to_string(victim).unwrap(), "precious");
    let written: i64 = fs::read_to_string(&pid).unwrap().parse().unwrap();
    assert_eq!(bundle.state()["pid"].as_i64(), Some(written));
    assert!(fs::symlink_metadata(pid).unwrap().is_file());
}

/// Where a user may make no cgroups, its containers have none: a PID namespace that is another container's tells nothing.
fn processes_of_a_joined_pid_namespace_are_not_all_the_containers() {
    if in_vm() {
        return;
    }
    const USER: u32 = 54_322;
    let own = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
    let bundle = |namespaces: serde_json::Value| {
        let mut linux = json!({ "namespaces": namespaces });
        if linux["namespaces"][0]["path"].is_null() {
            linux["uidMappings"] = own.clone();
            linux["gidMappings"] = own.clone();
        }
        let bundle = Bundle::new(&["sleep", "100"])
            .with("/mounts", json!([{ "destination": "/dev", "type": "tmpfs", "source": "tmpfs" }]))
            .with("/linux", linux);
        for path in ["", "rootfs"] {
            chown(bundle.path(path), Some(USER), Some(USER)).unwrap();
        }
        bundle
    };
    let run = |bundle: &Bundle, words: &[&str]| {
        let mut command = bundle.command(words);
        let errors = fs::File::create(bundle.path("errors")).unwrap();
        command.uid(USER).gid(USER).stdout(Stdio::null()).stderr(errors);
        assert!(command.status().unwrap().success(), "{words:?}: {}", bundle.errors());
    };
    let pod = bundle(json!([{ "type": "user" }, { "type": "pid" }, { "type": "mount" }, { "type": "uts" }]));
    run(&pod, &["run", "--detach", &pod.id]);
    let pid = pod.state()["pid"].as_i64().unwrap();
    let path = |kind: &str| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{kind}") });
    let guest = bundle(json!([path("user"), path("pid"), { "type": "mount" }, { "type": "uts" }]));
    run(&guest, &["run", "--detach", &guest.id]);
    let first = guest.state()["pid"].clone();
    let mut listed = guest.command(&["ps", "--format", "json", &guest.id]);
    let listed = listed.uid(USER).gid(USER).output().unwrap();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&listed.stdout).unwrap(), json!([first]));
    run(&guest, &["kill", "--all", &guest.id, "KILL"]);
    guest.await_status("stopped");
    assert_eq!(pod.status(), "running");
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
