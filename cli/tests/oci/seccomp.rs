//! Seccomp policies as engines rely on them, above all those where somebody else decides on calls.

use std::{
    fs,
    io::IoSliceMut,
    mem::MaybeUninit,
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt as _, net::UnixListener},
    },
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

use crate::{
    Test,
    fixture::{Bundle, text},
    syscalls,
};

pub fn all() -> Vec<Test> {
    crate::tests![
        notified_call_is_decided_by_whoever_has_the_listener,
        listener_of_a_created_container_is_handed_over_at_its_start,
        calls_on_the_way_to_the_program_may_be_notified,
        start_hooks_share_the_listener_and_do_not_get_it,
        start_without_anybody_who_decides_fails_and_leaves_nothing,
        policy_that_cannot_be_notified_of_is_refused,
        return_value_for_an_action_without_one_is_refused,
        program_of_32_bits_runs_if_its_architecture_is_listed,
    ]
}

/// Somebody who decides on calls: those of `mkdir` fail, all others go on. Yields what it was told of each listener.
fn decide(bundle: &Bundle) -> Receiver<Value> {
    let socket = UnixListener::bind(bundle.path("agent")).unwrap();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        while let Ok((connection, _)) = socket.accept() {
            let (state, listener) = receive(connection.into());
            let _ = tell.send(state);
            std::thread::spawn(move || {
                while let Ok((id, number)) = syscalls::receive(&listener) {
                    let errno = if i64::from(number) == libc::SYS_mkdir { libc::ENOMEDIUM } else { 0 };
                    let _ = syscalls::answer(&listener, id, errno);
                }
            });
        }
    });
    told
}

fn receive(connection: OwnedFd) -> (Value, OwnedFd) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut text = [0; 16384];
    let received =
        recvmsg(&connection, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let mut fds: Vec<OwnedFd> = control
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        })
        .collect();
    assert_eq!(fds.len(), 1);
    (serde_json::from_slice(&text[..received.unwrap().bytes]).unwrap(), fds.remove(0))
}

fn notifying(bundle: Bundle, calls: &[&str]) -> Bundle {
    let policy = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": bundle.path("agent"),
        "listenerMetadata": "a note",
        "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
        "syscalls": [{ "names": calls, "action": "SCMP_ACT_NOTIFY" }],
    });
    bundle.with("/linux/seccomp", policy)
}

const PATIENCE: Duration = Duration::from_secs(20);

fn notified_call_is_decided_by_whoever_has_the_listener() {
    for no_new_privileges in [false, true] {
        let bundle = notifying(Bundle::script("mkdir /tmp/x; echo $?; sleep 100"), &["mkdir"])
            .with("/process/noNewPrivileges", json!(no_new_privileges));
        let told = decide(&bundle);
        let output = std::fs::File::create(bundle.path("output")).unwrap();
        let errors = std::fs::File::create(bundle.path("errors")).unwrap();
        let mut run = bundle.command(&["run", "--detach", &bundle.id]);
        assert!(run.stdout(output).stderr(errors).status().unwrap().success(), "{}", bundle.errors());
        bundle.await_output("1");
        assert!(bundle.errors().contains("No medium found"), "{}", bundle.errors());
        let state = told.recv_timeout(PATIENCE).unwrap();
        assert_eq!(state["ociVersion"], "1.0.2");
        assert_eq!(state["fds"], json!(["seccompFd"]));
        assert_eq!(state["metadata"], "a note");
        assert_eq!(state["state"]["id"], bundle.id.as_str());
        assert_eq!(state["state"]["status"], "creating");
        assert_eq!(state["pid"], bundle.state()["pid"]);
        let exec = bundle.run(&["exec", &bundle.id, "mkdir", "/tmp/y"]);
        assert!(text(&exec.stderr).contains("No medium found"), "{exec:?}");
        let exec = told.recv_timeout(PATIENCE).unwrap();
        assert_eq!((&exec["state"]["status"], &exec["state"]["pid"]), (&json!("running"), &state["pid"]));
        assert_ne!(exec["pid"], state["pid"]);
    }
}

fn listener_of_a_created_container_is_handed_over_at_its_start() {
    let bundle = notifying(Bundle::script("mkdir /tmp/x; echo $?; sleep 100"), &["mkdir"]);
    let told = decide(&bundle);
    bundle.create();
    assert!(told.try_recv().is_err());
    bundle.ok(&["start", &bundle.id]);
    bundle.await_output("1");
    let state = told.recv_timeout(PATIENCE).unwrap();
    assert_eq!(state["state"]["status"], "created");
    assert_eq!(state["pid"], bundle.state()["pid"]);
}

fn calls_on_the_way_to_the_program_may_be_notified() {
    for no_new_privileges in [false, true] {
        let calls = ["capset", "execve", "read", "close", "openat", "sendmsg"];
        let bundle = notifying(Bundle::new(&["echo", "ran"]), &calls)
            .with("/process/noNewPrivileges", json!(no_new_privileges));
        let _told = decide(&bundle);
        assert_eq!(bundle.ok(&["run", &bundle.id]), "ran");
    }
}

fn start_hooks_share_the_listener_and_do_not_get_it() {
    let script = "ls /proc/self/fd | cat > /tmp/fds; mkdir /tmp/x 2> /tmp/error; true";
    let bundle = notifying(Bundle::script("cat /tmp/fds /tmp/error"), &["mkdir"]).with(
        "/hooks",
        json!({ "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"] }] }),
    );
    let told = decide(&bundle);
    let output = bundle.ok(&["run", &bundle.id]);
    // ls has the directory open, too.
    assert!(output.starts_with("0\n1\n2\n3\nmkdir: "), "{output}");
    assert!(output.contains("No medium found"), "{output}");
    assert!(told.recv_timeout(PATIENCE).is_ok() && told.try_recv().is_err());
}

fn start_without_anybody_who_decides_fails_and_leaves_nothing() {
    let bundle = notifying(Bundle::script("echo ran > /tmp/ran"), &["mkdir"]);
    let message = bundle.refused(&["run", &bundle.id]);
    assert!(message.contains("failed to connect with seccomp agent"), "{message}");
    assert!(bundle.refused(&["state", &bundle.id]).contains("does not exist"));
    bundle.create();
    assert!(bundle.refused(&["start", &bundle.id]).contains("failed to connect with seccomp agent"));
    bundle.await_status("stopped");
    assert!(!bundle.path("rootfs/tmp/ran").exists());
}

fn policy_that_cannot_be_notified_of_is_refused() {
    let bundle = notifying(Bundle::new(&["true"]), &["write"]);
    let message = bundle.refused(&["run", &bundle.id]);
    assert!(message.contains("SCMP_ACT_NOTIFY cannot be used for the write syscall"), "{message}");
    let bundle = notifying(Bundle::new(&["true"]), &["mkdir"]).with("/linux/seccomp/listenerPath", json!(""));
    let message = bundle.refused(&["run", &bundle.id]);
    assert!(message.contains("SCMP_ACT_NOTIFY needs linux.seccomp.listenerPath"), "{message}");
    // Without such an action, the path asks for nothing.
    let bundle = notifying(Bundle::new(&["true"]), &["mkdir"]).with("/linux/seccomp/syscalls", json!([]));
    bundle.ok(&["run", &bundle.id]);
}

fn return_value_for_an_action_without_one_is_refused() {
    let rule = json!([{ "names": ["mkdir"], "action": "SCMP_ACT_KILL", "errnoRet": 5 }]);
    let bundle = Bundle::new(&["true"])
        .with("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": rule }));
    let message = bundle.refused(&["run", &bundle.id]);
    assert!(message.contains("errnoRet 5 for SCMP_ACT_KILL, which returns no value"), "{message}");
}

/// A program of 32 bits that writes a line and exits: an ELF header, one segment, and what it does by `int 0x80`.
fn program_of_32_bits() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    let code: &[&[u8]] = &[
        &[0xb8, 4, 0, 0, 0, 0xbb, 1, 0, 0, 0, 0xb9], // eax = write, ebx = stdout, ecx = the line
        &(BASE + HEADERS + 31).to_le_bytes(),
        &[0xba, 3, 0, 0, 0, 0xcd, 0x80],             // edx = its length
        &[0xb8, 1, 0, 0, 0, 0x31, 0xdb, 0xcd, 0x80], // eax = exit, ebx = 0
        b"32\n",
    ];
    let code = code.concat();
    let size = HEADERS + u32::try_from(code.len()).unwrap();
    let ident = [0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // An executable for the 386, with one program header behind this one.
    let header = [0x0003_0002, 1, BASE + HEADERS, 52, 0, 0, 0x0020_0034, 1, 0];
    let segment = [1, 0, BASE, BASE, size, size, 5, 0x1000];
    let words = header.iter().chain(&segment).flat_map(|word: &u32| word.to_le_bytes());
    ident.into_iter().chain(words).chain(code).collect()
}

fn program_of_32_bits_runs_if_its_architecture_is_listed() {
    let run = |architectures: &[&str]| {
        let policy = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": architectures,
            "syscalls": [{
                // What the start itself needs, and the program.
                "names": ["execve", "execveat", "write", "exit", "exit_group", "close", "close_range", "capset", "prctl", "fstat"],
                "action": "SCMP_ACT_ALLOW",
            }],
        });
        let bundle = Bundle::new(&["/bin/thirty-two"]).with("/linux/seccomp", policy);
        let program = bundle.path("rootfs/bin/thirty-two");
        fs::write(&program, program_of_32_bits()).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let on_host = std::process::Command::new(&program).output();
        on_host.is_ok().then(|| bundle.run(&["run", &bundle.id]))
    };
    let Some(output) = run(&["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]) else {
        eprintln!("not tested: this kernel runs no programs of 32 bits");
        return;
    };
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(0), "32"), "{output:?}");
    let killed = run(&["SCMP_ARCH_X86_64"]).unwrap();
    // SIGSYS.
    assert_eq!((killed.status.code(), text(&killed.stdout).as_str()), (Some(128 + 31), ""), "{killed:?}");
}
