//! Processes of a container: signals, further ones, freezing, terminals, descriptors.

use std::{
    fs,
    os::{fd::AsRawFd, unix::net::UnixListener},
    path::Path,
    process::Stdio,
};

use serde_json::json;

use crate::{
    Test,
    fixture::{Bundle, await_that, program, text},
};

pub fn all() -> Vec<Test> {
    crate::tests![
        exec_goes_where_the_first_process_is_if_controllers_were_handed_down,
        signal_reaches_the_first_process,
        signal_to_all_reaches_all,
        exec_is_in_the_container,
        exec_takes_user_directory_and_environment,
        exec_from_a_file_is_that_process,
        exec_in_the_background_leaves_its_id,
        exec_of_what_is_not_there_fails_as_a_shell_does,
        exec_in_a_paused_container_is_refused,
        paused_container_stands_still,
        ps_lists_the_processes,
        preserved_descriptors_are_passed_and_no_others,
        sockets_of_a_service_manager_are_for_first_processes,
        terminal_is_sent_to_the_console_socket,
        environment_variable_given_twice_has_its_later_value,
        label_is_given_to_the_kernel_or_refused_by_name,
    ]
}

fn signal_reaches_the_first_process() {
    let bundle = Bundle::script("trap 'echo got it; exit 5' USR1; echo ready; while :; do sleep 0.05; done");
    bundle.start();
    bundle.await_output("ready");
    bundle.ok(&["kill", &bundle.id, "SIGUSR1"]);
    bundle.await_output("got it");
    bundle.await_status("stopped");
    assert!(bundle.refused(&["kill", &bundle.id, "TERM"]).contains("container not running"));
}

fn signal_to_all_reaches_all() {
    let child = "trap 'echo child; exit' USR1; echo up; while :; do sleep 0.05; done";
    let script = format!("trap 'echo parent' USR1; sh -c \"{child}\" & while :; do sleep 0.05; done");
    let bundle = Bundle::script(&script);
    bundle.start();
    bundle.await_output("up");
    bundle.ok(&["kill", "--all", &bundle.id, "USR1"]);
    bundle.await_output("child");
    bundle.await_output("parent");
}

fn exec_is_in_the_container() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let first = bundle.state()["pid"].as_i64().unwrap();
    for kind in ["pid", "mnt", "net", "ipc", "uts", "cgroup", "user"] {
        let theirs = fs::read_link(format!("/proc/{first}/ns/{kind}")).unwrap();
        let own = bundle.ok(&["exec", &bundle.id, "readlink", &format!("/proc/self/ns/{kind}")]);
        assert_eq!(own, theirs.to_str().unwrap(), "{kind}");
    }
    assert_eq!(bundle.ok(&["exec", &bundle.id, "hostname"]), "bell");
    assert_eq!(bundle.run(&["exec", &bundle.id, "sh", "-c", "exit 9"]).status.code(), Some(9));
    let cgroup = fs::read_to_string(format!("/proc/{first}/cgroup")).unwrap();
    assert_eq!(bundle.ok(&["exec", &bundle.id, "cat", "/proc/self/cgroup"]), cgroup.trim_end());
}

fn exec_takes_user_directory_and_environment() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let script = "id -u; id -g; id -G; pwd; echo $X";
    let words = [
        "exec",
        "--user",
        "7:8",
        "--additional-gids",
        "9",
        "--cwd",
        "/tmp",
        "--env",
        "X=y",
        &bundle.id,
        "sh",
        "-c",
        script,
    ];
    assert_eq!(bundle.ok(&words), "7\n8\n8 9\n/tmp\ny");
    assert!(bundle.refused(&["exec", "--user", "root", &bundle.id, "id"]).contains("not a number"));
    let set = bundle.ok(&["exec", "--cap", "CAP_SYS_CHROOT", &bundle.id, "cat", "/proc/self/status"]);
    let effective = set.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    assert_eq!(u64::from_str_radix(effective, 16).unwrap() >> 18 & 1, 1);
}

fn exec_from_a_file_is_that_process() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let process = json!({ "user": { "uid": 3, "gid": 4 }, "args": ["sh", "-c", "id -u; env"], "env": ["PATH=/bin"], "cwd": "/" });
    fs::write(bundle.path("process.json"), process.to_string()).unwrap();
    let path = bundle.path("process.json");
    let output = bundle.ok(&["exec", "--process", path.to_str().unwrap(), &bundle.id]);
    assert!(output.starts_with("3\n") && !output.contains("TERM="), "{output}");
    // What it does not say is as for the container's own process.
    let rights = json!({ "args": ["cat", "/proc/self/status"], "env": ["PATH=/bin"], "cwd": "/" });
    fs::write(&path, rights.to_string()).unwrap();
    let of = |status: String| status.lines().find(|line| line.starts_with("CapBnd")).map(str::to_owned);
    let own = of(bundle.ok(&["exec", &bundle.id, "cat", "/proc/self/status"]));
    assert!(own.is_some());
    assert_eq!(of(bundle.ok(&["exec", "--process", path.to_str().unwrap(), &bundle.id])), own);
}

fn exec_in_the_background_leaves_its_id() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let path = bundle.path("pid");
    let words = ["exec", "--detach", "--pid-file", path.to_str().unwrap(), &bundle.id, "sleep", "100"];
    assert!(bundle.command(&words).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    let pid = fs::read_to_string(path).unwrap();
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert_eq!(command, "sleep\u{0}100\u{0}");
}

fn exec_of_what_is_not_there_fails_as_a_shell_does() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    assert_eq!(bundle.run(&["exec", &bundle.id, "nowhere"]).status.code(), Some(255));
    assert_eq!(bundle.run(&["exec", &bundle.id, "/etc"]).status.code(), Some(255));
    assert!(bundle.refused(&["exec", &bundle.id]).contains("what to run is missing"));
}

fn exec_in_a_paused_container_is_refused() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    bundle.ok(&["pause", &bundle.id]);
    assert!(bundle.refused(&["exec", &bundle.id, "true"]).contains("cannot exec in a paused container"));
    bundle.ok(&["resume", &bundle.id]);
    bundle.ok(&["exec", &bundle.id, "true"]);
}

fn paused_container_stands_still() {
    let bundle = Bundle::script("while :; do echo tick; sleep 0.01; done");
    bundle.start();
    bundle.await_output("tick");
    bundle.ok(&["pause", &bundle.id]);
    assert_eq!(bundle.status(), "paused");
    let before = bundle.output().len();
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(bundle.output().len(), before);
    bundle.ok(&["resume", &bundle.id]);
    await_that("it goes on", || bundle.output().len() > before);
    assert!(bundle.refused(&["resume", &bundle.id]).contains("not paused"));
    bundle.ok(&["pause", &bundle.id]);
    bundle.ok(&["delete", "--force", &bundle.id]);
}

fn ps_lists_the_processes() {
    let bundle = Bundle::script("sleep 99 & echo up; wait");
    bundle.start();
    bundle.await_output("up");
    let pids: Vec<i64> = serde_json::from_str(&bundle.ok(&["ps", "--format", "json", &bundle.id])).unwrap();
    assert_eq!(pids.len(), 2);
    assert!(pids.contains(&bundle.state()["pid"].as_i64().unwrap()));
    let table = bundle.ok(&["ps", &bundle.id]);
    assert!(table.lines().count() == 3 && table.contains("sleep 99"), "{table}");
}

fn preserved_descriptors_are_passed_and_no_others() {
    let bundle = Bundle::script("ls /proc/self/fd; cat <&4");
    fs::write(bundle.path("data"), "from outside\n").unwrap();
    let data = fs::File::open(bundle.path("data")).unwrap();
    let path = bundle.path("").display().to_string();
    // 4 is passed, 3 is missing, 5 is open but not asked for.
    let program = program().display().to_string();
    let script = format!(
        "exec -a cloche-container {program} --root {path}/state run --bundle {path} --preserve-fds 2 {} 4<{path}/data 5</dev/null",
        bundle.id
    );
    bundle.command(&["list"]).output().unwrap();
    let output = std::process::Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(text(&output.stdout), "0\n1\n2\n3\n4\nfrom outside", "{output:?} {}", data.as_raw_fd());
}

/// sd_listen_fds(3).
fn sockets_of_a_service_manager_are_for_first_processes() {
    let look = "echo \"fds: $LISTEN_FDS\"; test -e /proc/$$/fd/3; echo $?";
    let with_socket = |bundle: &Bundle, words: &str| {
        bundle.command(&["list"]).output().unwrap();
        let (program, path) = (program().display().to_string(), bundle.path("").display().to_string());
        let script = format!("exec -a cloche-container {program} --root {path}/state {words} 3</dev/null");
        let mut bash = std::process::Command::new("bash");
        text(&bash.args(["-c", &script]).env("LISTEN_FDS", "1").output().unwrap().stdout)
    };
    let first = Bundle::script(look);
    let run = format!("run --bundle {} {}", first.path("").display(), first.id);
    assert_eq!(with_socket(&first, &run), "fds: 1\n0");
    let running = Bundle::new(&["sleep", "100"]);
    running.start();
    assert_eq!(with_socket(&running, &format!("exec {} sh -c '{look}'", running.id)), "fds: \n1");
}

fn terminal_is_sent_to_the_console_socket() {
    let bundle = Bundle::script("tty; stty size; echo to console >/dev/console; sleep 100")
        .with("/process/terminal", json!(true))
        .with("/process/consoleSize", json!({ "height": 30, "width": 100 }));
    assert!(bundle.refused(&["create", &bundle.id]).contains("give --console-socket"));
    let listener = UnixListener::bind(bundle.path("socket")).unwrap();
    let socket = bundle.path("socket");
    bundle.ok(&["create", "--console-socket", socket.to_str().unwrap(), &bundle.id]);
    let (stream, _) = listener.accept().unwrap();
    let master = receive(&stream);
    bundle.ok(&["start", &bundle.id]);
    let mut shown = Vec::new();
    await_that("the terminal shows all", || {
        let mut buffer = [0; 256];
        let count = rustix::io::read(&master, &mut buffer).unwrap();
        shown.extend(&buffer[..count]);
        text(&shown).contains("to console")
    });
    let shown = text(&shown).replace('\r', "");
    assert_eq!(shown, "/dev/pts/0\n30 100\nto console");
    bundle.ok(&["delete", "--force", &bundle.id]);
}

/// The terminal that was sent.
pub fn receive(stream: &std::os::unix::net::UnixStream) -> std::os::fd::OwnedFd {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut data = [0; 64];
    recvmsg(stream, &mut [std::io::IoSliceMut::new(&mut data)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .unwrap();
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fd.expect("a descriptor")
}

fn environment_variable_given_twice_has_its_later_value() {
    let bundle =
        Bundle::new(&["sleep", "100"]).with("/process/env", json!(["PATH=/bin", "A=1", "AB=2", "A=3"]));
    bundle.start();
    let env = bundle.ok(&["exec", "--env", "AB=4", &bundle.id, "env"]);
    let lines: Vec<_> = env.lines().filter(|line| line.starts_with('A')).collect();
    assert_eq!(lines, ["A=3", "AB=4"]);
}

/// cgroup v2 takes processes only at the leaves, once a cgroup has controllers in its `cgroup.subtree_control`.
fn exec_goes_where_the_first_process_is_if_controllers_were_handed_down() {
    let root = Path::new("/sys/fs/cgroup");
    let root = if root.join("cgroup.controllers").exists() { root.to_owned() } else { root.join("unified") };
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    let Some(controller) = controllers.split_whitespace().next() else {
        eprintln!("not tested: the cgroup v2 hierarchy of this machine has no controllers");
        return;
    };
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let pid = bundle.state()["pid"].to_string();
    let own = root.join("cloche").join(&bundle.id);
    fs::create_dir(own.join("first")).unwrap();
    fs::write(own.join("first/cgroup.procs"), &pid).unwrap();
    let mut enabled = Vec::new();
    for directory in [&root, &root.join("cloche"), &own] {
        let file = directory.join("cgroup.subtree_control");
        if !fs::read_to_string(&file).unwrap().split_whitespace().any(|listed| listed == controller) {
            fs::write(&file, format!("+{controller}")).unwrap();
            enabled.push(file);
        }
    }
    let output = bundle.run(&["exec", &bundle.id, "cat", "/proc/self/cgroup"]);
    bundle.ok(&["delete", "--force", &bundle.id]);
    for file in enabled.iter().rev().filter(|file| file.exists()) {
        fs::write(file, format!("-{controller}")).unwrap();
    }
    let listed = text(&output.stdout);
    let expected = format!("0::/cloche/{}/first", bundle.id);
    assert!(listed.lines().any(|line| line == expected), "{output:?}");
}

/// A machine without AppArmor refuses a profile; one with it knows best which profiles there are.
fn label_is_given_to_the_kernel_or_refused_by_name() {
    let is_on = fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|on| on.starts_with(b"Y"));
    let with =
        |profile: &str| Bundle::new(&["sleep", "100"]).with("/process/apparmorProfile", json!(profile));
    for field in ["process/selinuxLabel", "linux/mountLabel"] {
        if !fs::exists("/sys/fs/selinux/enforce").unwrap() {
            let bundle = Bundle::new(&["true"]).with(&format!("/{field}"), json!("a:b:c:s0"));
            let name = field.replace('/', ".");
            let expected = format!("{name} is set, and SELinux is off on this machine");
            assert!(bundle.refused(&["run", &bundle.id]).contains(&expected));
        }
    }
    let bundle = with("cloche-no-such-profile");
    let message = bundle.refused(&["run", &bundle.id]);
    if !is_on {
        assert!(message.contains("process.apparmorProfile is set, and AppArmor is off"), "{message}");
        return;
    }
    let unknown = "process.apparmorProfile \"cloche-no-such-profile\" at execve";
    assert!(message.contains(unknown) && message.contains("No such file"), "{message}");
    let bundle = with("unconfined");
    bundle.start();
    let attr = ["exec", &bundle.id, "cat", "/proc/1/attr/current"];
    assert_eq!(bundle.ok(&attr), "unconfined");
    let words = ["exec", "--apparmor", "cloche-no-such-profile", &bundle.id, "true"];
    assert!(bundle.refused(&words).contains(unknown));
}
