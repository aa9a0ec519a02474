//! What the container cannot see and cannot do.

use serde_json::json;

use crate::{
    Need, Test,
    fixture::{Outcome, Sandbox},
};

pub fn tests() -> impl IntoIterator<Item = Test> {
    crate::tests![confinement:
        capabilities_are_the_specs,
        capabilities_that_nobody_has_cannot_be_granted needs Need::FewerRights,
        ambient_capabilities_survive_a_change_of_user,
        seccomp_filter_is_in_force_with_no_new_privs,
        seccomp_filter_is_in_force_without_no_new_privs,
        process_is_first_in_its_pid_namespace,
        network_has_loopback_only_and_it_works,
        host_name_is_its_own,
        cgroup_is_the_root_of_its_view,
        only_standard_descriptors_are_open,
        masked_paths_show_nothing,
        readonly_paths_cannot_be_written,
        devices_that_are_not_allowed_cannot_be_opened needs Need::File("/dev/loop-control"),
        sysctl_is_the_containers_own,
        sysctl_of_the_machine_is_refused,
        namespace_of_another_process_is_joined,
        session_keyring_is_its_own needs Need::File("/proc/keys"),
        process_that_is_not_approved_never_runs,
    ]
}

/// A line of `/proc/self/status`.
#[track_caller]
fn status(outcome: Outcome, key: &str) -> String {
    let output = outcome.success();
    let line = output.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t"));
    line.unwrap_or_else(|| panic!("no {key} in {output}")).to_owned()
}

fn capabilities_are_the_specs() {
    let read = || Sandbox::new(&["cat", "/proc/self/status"]).run();
    for (set, expected) in
        [("CapBnd", 0xa804_25fbu64), ("CapPrm", 0xa804_25fb), ("CapEff", 0xa804_25fb), ("CapInh", 0)]
    {
        assert_eq!(status(read(), set), format!("{expected:016x}"));
    }
    let none = Sandbox::new(&["cat", "/proc/self/status"]).with("/process/capabilities", json!({})).run();
    assert_eq!(status(none, "CapEff"), "0000000000000000");
}

fn capabilities_that_nobody_has_cannot_be_granted() {
    let all = json!(["CAP_SYS_RESOURCE", "CAP_CHOWN"]);
    let sandbox = Sandbox::new(&["true"]).with("/process/capabilities/permitted", all);
    let (code, message) = sandbox.refusal();
    assert_eq!(code, 125);
    assert!(message.starts_with("cannot grant CAP_SYS_RESOURCE: "), "{message}");
}

fn ambient_capabilities_survive_a_change_of_user() {
    let chown = json!(["CAP_CHOWN"]);
    let sets = json!({ "bounding": chown, "permitted": chown, "effective": chown, "inheritable": chown, "ambient": chown });
    for no_new_privileges in [false, true] {
        let outcome = Sandbox::new(&["cat", "/proc/self/status"])
            .with("/process/capabilities", sets.clone())
            .with("/process/noNewPrivileges", json!(no_new_privileges))
            .with("/process/user", json!({ "uid": 1000, "gid": 1000 }))
            .run();
        assert_eq!(status(outcome, "CapEff"), "0000000000000001");
    }
}

fn check_filter(no_new_privileges: bool) {
    let sandbox = |script| Sandbox::script(script).with("/process/noNewPrivileges", json!(no_new_privileges));
    assert_eq!(status(sandbox("cat /proc/self/status").run(), "Seccomp"), "2");
    let privileges = status(sandbox("cat /proc/self/status").run(), "NoNewPrivs");
    assert_eq!(privileges, u8::from(no_new_privileges).to_string());
    let output = sandbox("hostname x 2>&1; kill -USR1 $$ 2>&1; kill -CONT $$ && echo sent").run().stdout;
    let expected = "hostname: sethostname: Function not implemented\n\
                    sh: can't kill pid 1: Operation not permitted\nsent\n";
    assert_eq!(output, expected);
}

fn seccomp_filter_is_in_force_with_no_new_privs() {
    check_filter(true);
}

fn seccomp_filter_is_in_force_without_no_new_privs() {
    check_filter(false);
}

fn process_is_first_in_its_pid_namespace() {
    // Not by a pipe, whose other end may be there already or not.
    let output =
        Sandbox::script("echo $$; ps -o pid,comm >/dev/shm/seen; wc -l </dev/shm/seen").run().success();
    // A heading, sh and ps.
    assert_eq!(output, "1\n3");
}

fn network_has_loopback_only_and_it_works() {
    let output = Sandbox::script("cat /proc/net/dev | tail -n +3; ifconfig lo").run().success();
    let (devices, details) = output.split_once("lo        Link").unwrap();
    assert_eq!(devices.lines().count(), 1, "{output}");
    assert!(devices.trim_start().starts_with("lo:"), "{output}");
    assert!(details.contains("127.0.0.1") && details.contains("UP LOOPBACK RUNNING"), "{output}");
}

fn host_name_is_its_own() {
    let sandbox = Sandbox::new(&["hostname"]).with("/domainname", json!("garden"));
    assert_eq!(sandbox.run().success(), "bell");
    let domain = Sandbox::new(&["cat", "/proc/sys/kernel/domainname"]).with("/domainname", json!("garden"));
    assert_eq!(domain.run().success(), "garden");
}

fn cgroup_is_the_root_of_its_view() {
    let sandbox = Sandbox::script("cat /proc/self/cgroup; ls /sys/fs/cgroup; touch /sys/fs/cgroup/x 2>&1");
    let output = sandbox.run().stdout;
    assert!(!output.contains(&sandbox.id), "{output}");
    assert!(output.contains("Read-only file system"), "{output}");
    assert!(output.contains("memory") || output.contains("cgroup.procs"), "{output}");
}

fn only_standard_descriptors_are_open() {
    // ls has the directory itself open, as 3.
    assert_eq!(Sandbox::new(&["ls", "/proc/self/fd"]).run().success(), "0\n1\n2\n3");
}

fn masked_paths_show_nothing() {
    let script = "wc -c < /proc/keys; ls /proc/sys/fs /sys/firmware; touch /sys/firmware/x 2>&1; head -c 1 /proc/kcore | wc -c";
    let sandbox = Sandbox::script(script).with("/linux/maskedPaths/-", json!("/etc/passwd"));
    let output = sandbox.run().success();
    assert!(output.starts_with("0\n/proc/sys/fs:\n\n/sys/firmware:\n"), "{output}");
    assert!(output.ends_with("Read-only file system\n0"), "{output}");
}

fn readonly_paths_cannot_be_written() {
    let script =
        "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /etc/passwd; echo 1 > /etc/other && echo written";
    let outcome = Sandbox::script(script).with("/linux/readonlyPaths/-", json!("/etc/passwd")).run();
    assert_eq!(outcome.stderr.matches("Read-only file system").count(), 2, "{outcome:?}");
    assert_eq!(outcome.success(), "written");
}

fn devices_that_are_not_allowed_cannot_be_opened() {
    // /dev/loop-control is 10:237. Making a node is allowed, opening it is not.
    let script = "mknod /tmp/d c 10 237 && cat < /tmp/d; echo x > /dev/null && head -c 1 /dev/zero | wc -c";
    let outcome = Sandbox::script(script).run();
    assert!(outcome.stderr.contains("Operation not permitted"), "{outcome:?}");
    assert_eq!(outcome.success(), "1");
    let allowed = json!({ "allow": true, "type": "c", "major": 10, "minor": 237, "access": "rw" });
    let outcome = Sandbox::script("mknod /tmp/d c 10 237 && : < /tmp/d && echo opened")
        .with("/linux/resources/devices/-", allowed)
        .run();
    assert_eq!(outcome.success(), "opened");
}

fn sysctl_is_the_containers_own() {
    let sysctl = json!({ "net.ipv4.ip_forward": "1", "kernel.shmmax": "4096" });
    let sandbox = Sandbox::script("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax");
    assert_eq!(sandbox.with("/linux/sysctl", sysctl).run().success(), "1\n4096");
    assert_ne!(std::fs::read_to_string("/proc/sys/kernel/shmmax").unwrap(), "4096\n");
}

fn sysctl_of_the_machine_is_refused() {
    let sysctl = json!({ "kernel.core_pattern": "|/tmp/x" });
    let (code, message) = Sandbox::new(&["true"]).with("/linux/sysctl", sysctl).refusal();
    assert_eq!(code, 125);
    assert!(message.starts_with("cannot set the sysctl kernel.core_pattern: "), "{message}");
}

fn namespace_of_another_process_is_joined() {
    let sandbox = Sandbox::script("echo ready; sleep 100");
    let first = sandbox.start().unwrap();
    assert_eq!(first.read_line(), "ready");
    let of_first = |kind: &str| format!("/proc/{}/ns/{kind}", first.container.pid());
    let names = |script: &str| {
        let namespaces = json!([
            { "type": "mount" }, { "type": "pid", "path": of_first("pid") }, { "type": "network", "path": of_first("net") },
            { "type": "ipc", "path": of_first("ipc") }, { "type": "uts" },
        ]);
        Sandbox::script(script).with("/linux/namespaces", namespaces).run().success()
    };
    let expected = ["pid", "net", "ipc"]
        .map(|kind| std::fs::read_link(of_first(kind)).unwrap().to_string_lossy().into_owned());
    let seen = names("for kind in pid net ipc; do readlink /proc/self/ns/$kind; done");
    assert_eq!(seen.lines().collect::<Vec<_>>(), expected);
    assert_ne!(names("echo $$"), "1");
    // This process itself makes its next child where it always did.
    assert_eq!(Sandbox::script("echo $$").run().success(), "1");
    first.container.signal(9).unwrap();
    first.finish();
}

fn session_keyring_is_its_own() {
    let sandbox = Sandbox::new(&["cat", "/proc/keys"]).with("/linux/maskedPaths", json!([]));
    assert!(sandbox.run().success().contains(&format!("cloche.{}", sandbox.id)));
}

fn process_that_is_not_approved_never_runs() {
    let source = tempfile::tempdir().unwrap();
    let bind = json!({ "destination": "/data", "source": source.path(), "options": ["bind"] });
    let mut sandbox = Sandbox::new(&["touch", "/data/ran"]).with("/mounts/-", bind);
    sandbox.approve = Some(&|pid| std::fs::read_link(format!("/proc/{pid}/ns/pid")).is_err());
    let (code, message) = sandbox.refusal();
    assert_eq!((code, message.as_str()), (125, "the container's process is not isolated as required"));
    assert!(!source.path().join("ran").exists());
    sandbox.approve = Some(&|pid| {
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap();
        namespace(&pid.to_string()) != namespace("self")
    });
    sandbox.run().success();
    assert!(source.path().join("ran").exists());
}
