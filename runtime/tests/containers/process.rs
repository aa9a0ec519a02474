//! The process: how it starts, ends, and what it finds itself to be.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use cloche_runtime::{ExitStatus, cgroup::Cgroup};
use serde_json::json;

use crate::{Need, Test, fixture::Sandbox};

pub fn tests() -> impl IntoIterator<Item = Test> {
    crate::tests![process:
        exit_code_is_passed_on,
        signal_that_killed_it_is_passed_on,
        command_that_cannot_be_run_is_127_or_126_and_named,
        own_program_cannot_be_run,
        output_streams_are_apart_and_stdin_is_read,
        environment_and_working_directory_are_the_specs,
        working_directory_that_is_missing_is_made,
        working_directory_outside_of_the_root_is_refused,
        user_and_groups_are_the_specs,
        user_by_name_is_looked_up_in_the_container,
        standard_streams_can_be_opened_by_the_user,
        home_is_taken_from_passwd,
        rlimit_is_set,
        rlimit_that_cannot_be_raised_is_named needs Need::FewerRights,
        signals_are_at_their_defaults,
        signal_reaches_the_process,
        refused_spec_leaves_nothing,
        killed_parent_takes_the_container_along,
    ]
}

fn exit_code_is_passed_on() {
    for code in [0, 1, 42, 255] {
        let outcome = Sandbox::script(&format!("exit {code}")).run();
        assert_eq!(outcome.exit.status, ExitStatus::Code(code));
        assert!(!outcome.exit.oom_killed);
    }
}

fn signal_that_killed_it_is_passed_on() {
    // The first process of a PID namespace is immune against its own signals, but not against its parent's.
    let sandbox = Sandbox::script("echo ready; sleep 100");
    let running = sandbox.start().unwrap();
    assert_eq!(running.read_line(), "ready");
    running.container.signal(9).unwrap();
    assert_eq!(running.finish().exit.status, ExitStatus::Signal(9));
}

fn command_that_cannot_be_run_is_127_or_126_and_named() {
    let cases: [(&str, u8, &str); 7] = [
        ("nosuch", 127, r#"cannot run "nosuch": executable file not found in $PATH (/usr/bin:/bin)"#),
        ("/bin/nosuch", 127, r#"cannot run "/bin/nosuch": no such file or directory"#),
        ("", 127, r#"cannot run "": executable file not found in $PATH (/usr/bin:/bin)"#),
        ("/etc", 126, r#"cannot run "/etc": is a directory: permission denied"#),
        ("/etc/passwd", 126, r#"cannot run "/etc/passwd": permission denied"#),
        ("/etc/passwd/x", 126, r#"cannot run "/etc/passwd/x": a part of its path is not a directory"#),
        (
            "/script",
            127,
            r#"cannot run "/script": its interpreter, or the dynamic linker that it names, was not found: no such file or directory"#,
        ),
    ];
    for (command, code, message) in cases {
        let sandbox = Sandbox::new(&[command]);
        fs::write(sandbox.path("script"), "#!/bin/nosuch\n").unwrap();
        fs::set_permissions(sandbox.path("script"), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(sandbox.refusal(), (code, message.to_owned()));
    }
    let nonsense = Sandbox::new(&["nonsense"]);
    fs::write(nonsense.path("bin/nonsense"), "\u{7f}ELF, or not").unwrap();
    assert_eq!(nonsense.refusal().0, 126);
    fs::set_permissions(nonsense.path("bin/nonsense"), fs::Permissions::from_mode(0o755)).unwrap();
    let (code, message) = nonsense.refusal();
    assert_eq!(code, 126);
    assert!(message.contains("exec format error"), "{message}");
}

fn own_program_cannot_be_run() {
    let (code, message) = Sandbox::new(&["/proc/self/exe"]).refusal();
    assert_eq!((code, message.as_str()), (126, r#"cannot run "/proc/self/exe": permission denied"#));
}

fn output_streams_are_apart_and_stdin_is_read() {
    let mut sandbox = Sandbox::script("cat; echo err >&2; echo out");
    sandbox.stdin = "in\n".into();
    let outcome = sandbox.run();
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("in\nout\n", "err\n"));
}

fn environment_and_working_directory_are_the_specs() {
    let outcome = Sandbox::script("pwd; env")
        .with("/process/cwd", json!("/etc"))
        .with("/process/env", json!(["PATH=/bin", "HOME=/h", "A=b c", "A=again"]))
        .run();
    let output = outcome.success();
    assert!(output.starts_with("/etc\n"), "{output}");
    for expected in ["PATH=/bin", "HOME=/h", "A=again"] {
        assert!(output.lines().any(|line| line == expected), "{output}");
    }
    assert!(!output.contains("CARGO"), "{output}");
}

fn working_directory_that_is_missing_is_made() {
    let sandbox = Sandbox::script("pwd; umask").with("/process/cwd", json!("/not/there"));
    assert_eq!(sandbox.run().success(), "/not/there\n0022");
}

fn working_directory_outside_of_the_root_is_refused() {
    // CVE-2024-21626: a descriptor that the runtime happens to have open.
    for number in 3..12 {
        let sandbox = Sandbox::new(&["pwd"]).with("/process/cwd", json!(format!("/proc/self/fd/{number}")));
        assert_eq!(sandbox.refusal().0, 125);
    }
}

fn user_and_groups_are_the_specs() {
    let user = json!({ "uid": 1000, "gid": 1000, "additionalGids": [2000, 3000], "umask": 0o027 });
    let sandbox =
        Sandbox::script("id; umask; touch /tmp/x; cat /proc/self/status").with("/process/user", user);
    fs::set_permissions(sandbox.path("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    let output = sandbox.run().success();
    assert!(output.starts_with("uid=1000(me) gid=1000(me) groups=2000(more),3000\n0027\n"), "{output}");
    // What a user who is not root keeps after execve are the ambient capabilities, of which there are none.
    assert!(output.contains("CapEff:\t0000000000000000\n"), "{output}");
    let root = Sandbox::new(&["id", "-G"]).run().success();
    assert_eq!(root, "0");
}

fn user_by_name_is_looked_up_in_the_container() {
    let id = |user| {
        let mut sandbox = Sandbox::script("id; echo $HOME");
        sandbox.user = Some(user);
        sandbox
    };
    assert_eq!(id("me").run().success(), "uid=1000(me) gid=1000(me)\n/home/me");
    assert_eq!(id("me:more").run().success(), "uid=1000(me) gid=2000(more)\n/home/me");
    assert_eq!(id("7:8").run().success(), "uid=7 gid=8\n/");
    let (code, message) = id("nobody").refusal();
    assert_eq!(code, 125);
    assert!(message.starts_with("user `nobody` is not in the image's /etc/passwd"), "{message}");
    // The image cannot make the runtime read one of its own open files.
    let sandbox = id("me");
    fs::remove_file(sandbox.path("etc/passwd")).unwrap();
    std::os::unix::fs::symlink("/proc/self/fd/0", sandbox.path("etc/passwd")).unwrap();
    assert_eq!(sandbox.refusal().0, 125);
}

fn standard_streams_can_be_opened_by_the_user() {
    let sandbox = Sandbox::script("echo out > /dev/stdout; echo err > /proc/self/fd/2; : < /dev/stdin")
        .with("/process/user", json!({ "uid": 1000, "gid": 1000 }));
    let outcome = sandbox.run();
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
    outcome.success();
}

fn home_is_taken_from_passwd() {
    for (uid, home) in [(0, "/root"), (1000, "/home/me"), (7, "/")] {
        let sandbox = Sandbox::script("echo $HOME").with("/process/user", json!({ "uid": uid, "gid": 0 }));
        assert_eq!(sandbox.run().success(), home);
    }
}

fn rlimit_is_set() {
    let limit = json!([{ "type": "RLIMIT_NOFILE", "soft": 64, "hard": 128 }]);
    let sandbox = Sandbox::script("ulimit -Sn; ulimit -Hn").with("/process/rlimits", limit);
    assert_eq!(sandbox.run().success(), "64\n128");
}

fn rlimit_that_cannot_be_raised_is_named() {
    let limit = json!([{ "type": "RLIMIT_NOFILE", "soft": 64, "hard": 1_u64 << 40 }]);
    let (code, message) = Sandbox::new(&["true"]).with("/process/rlimits", limit).refusal();
    assert_eq!(code, 125);
    assert!(message.contains("RLIMIT_NOFILE") && message.contains("1099511627776"), "{message}");
}

fn signals_are_at_their_defaults() {
    // Rust programs, such as this test, ignore SIGPIPE.
    let status = Sandbox::new(&["cat", "/proc/self/status"]).run().success();
    for expected in ["SigIgn:\t0000000000000000", "SigBlk:\t0000000000000000", "SigCgt:\t0000000000000000"] {
        assert!(status.contains(expected), "{status}");
    }
}

fn signal_reaches_the_process() {
    let script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.01; done";
    let sandbox = Sandbox::script(script);
    let running = sandbox.start().unwrap();
    assert_eq!(running.read_line(), "ready");
    running.container.signal(15).unwrap();
    let outcome = running.finish();
    assert_eq!((outcome.exit.status, outcome.stdout.as_str()), (ExitStatus::Code(3), "caught\n"));
}

fn refused_spec_leaves_nothing() {
    let (code, message) = Sandbox::new(&["true"]).with("/process/terminal", json!(true)).refusal();
    assert_eq!((code, message.as_str()), (125, "not supported yet: process.terminal"));
}

const VICTIM: &str = "CLOCHE_TEST_VICTIM";

/// In a process that [`killed_parent_takes_the_container_along`] has made: starts a container and waits to be killed.
pub fn act_as_victim() -> Option<i32> {
    std::env::var_os(VICTIM)?;
    let sandbox = Sandbox::script("echo ready; sleep 100");
    let running = sandbox.start().unwrap();
    assert_eq!(running.read_line(), "ready");
    println!("{} {} {}", running.container.pid(), sandbox.id, sandbox.directory.path().display());
    std::thread::sleep(Duration::from_secs(100));
    Some(1)
}

fn killed_parent_takes_the_container_along() {
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .env(VICTIM, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(victim.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let mut words = line.split_whitespace();
    let (pid, id, directory) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
    let process = format!("/proc/{pid}/comm");
    assert!(fs::exists(&process).unwrap());
    victim.kill().unwrap();
    victim.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while fs::exists(&process).unwrap() {
        assert!(Instant::now() < deadline, "the container outlives its parent");
        std::thread::sleep(Duration::from_millis(5));
    }
    // What the next command does about the leftovers.
    let cgroup = Cgroup::open(&std::path::Path::new("/cloche").join(id)).unwrap();
    assert!(cgroup.paths().count() > 0);
    cgroup.kill_all().unwrap();
    cgroup.delete().unwrap();
    fs::remove_dir_all(directory).unwrap();
}
