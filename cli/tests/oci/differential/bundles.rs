//! The bundles of the table: each is the plain one with one thing changed.

use std::fs;

use serde_json::{Value, json};

use crate::fixture::{Bundle, open_to_all};

/// A bundle of the table.
pub struct Case {
    pub name: &'static str,
    pub change: fn(Bundle) -> Bundle,
}

macro_rules! cases {
    ($($name:ident: $change:expr,)*) => { &[$(Case { name: stringify!($name), change: $change }),*] };
}

const ALL: [&str; 5] = ["pid", "network", "ipc", "uts", "mount"];

fn without(bundle: Bundle, kind: &str) -> Bundle {
    let kinds = ALL.iter().filter(|one| **one != kind);
    bundle.with("/linux/namespaces", kinds.map(|kind| json!({ "type": kind })).collect())
}

fn with_namespace(bundle: Bundle, kind: &str) -> Bundle {
    bundle.with("/linux/namespaces/-", json!({ "type": kind }))
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

fn bind(bundle: Bundle, options: &[&str]) -> Bundle {
    fs::create_dir_all(bundle.path("outside/below")).unwrap();
    fs::write(bundle.path("outside/file"), "x").unwrap();
    let source = bundle.path("outside").display().to_string();
    bundle.with("/mounts/-", mount("/mounted", "bind", &source, options))
}

fn capabilities(bundle: Bundle, sets: Value) -> Bundle {
    bundle.with("/process/capabilities", sets)
}

fn limits(bundle: Bundle, resources: Value) -> Bundle {
    bundle
        .with("/linux/resources", resources)
        .with("/mounts/-", mount("/sys", "sysfs", "sysfs", &["ro"]))
        .with("/mounts/-", mount("/sys/fs/cgroup", "cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev"]))
}

fn hooked(bundle: Bundle) -> Bundle {
    let file = bundle.path("rootfs/hooks").display().to_string();
    let say = |name: &str, file: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", format!("cat > /dev/null; echo {name} >> {file}")] }]);
    bundle.with(
        "/hooks",
        json!({
            "prestart": say("prestart", &file),
            "createRuntime": say("createRuntime", &file),
            "createContainer": say("createContainer", &file),
            "startContainer": say("startContainer", "/hooks"),
        }),
    )
}

pub const CASES: &[Case] = cases! {
    plain: |bundle| bundle,
    pids_of_the_host: |bundle| without(bundle, "pid"),
    network_of_the_host: |bundle| without(bundle, "network"),
    ipc_of_the_host: |bundle| without(bundle, "ipc"),
    names_of_the_host: |bundle| without(bundle.with("/hostname", Value::Null), "uts"),
    cgroup_namespace: |bundle| with_namespace(bundle, "cgroup"),
    cgroup_view_with_a_namespace: |bundle| limits(with_namespace(bundle, "cgroup"), json!({})),
    cgroup_view_without_one: |bundle| limits(bundle, json!({})),
    user_namespace: |bundle| {
        let maps = json!([{ "containerID": 0, "hostID": 300_000, "size": 1000 }, { "containerID": 2000, "hostID": 400_000, "size": 5 }]);
        let bundle = bundle.with("/linux/uidMappings", maps.clone()).with("/linux/gidMappings", maps);
        open_to_all(&bundle);
        with_namespace(bundle, "user")
    },
    user_namespace_of_root_itself: |bundle| {
        let maps = json!([{ "containerID": 0, "hostID": 0, "size": 65536 }]);
        with_namespace(bundle.with("/linux/uidMappings", maps.clone()).with("/linux/gidMappings", maps), "user")
    },
    rootfs_is_slave: |bundle| bundle.with("/linux/rootfsPropagation", json!("rslave")),
    rootfs_is_private: |bundle| bundle.with("/linux/rootfsPropagation", json!("private")),
    rootfs_is_read_only: |bundle| bundle.with("/root/readonly", json!(true)),
    paths_are_masked: |bundle| {
        fs::create_dir(bundle.path("rootfs/hidden")).unwrap();
        fs::write(bundle.path("rootfs/hidden/file"), "secret").unwrap();
        bundle.with("/linux/maskedPaths", json!(["/hidden", "/proc/kcore", "/proc/scsi", "/nowhere"]))
    },
    file_is_masked: |bundle| {
        fs::create_dir(bundle.path("rootfs/hidden")).unwrap();
        fs::write(bundle.path("rootfs/hidden/file"), "secret").unwrap();
        bundle.with("/linux/maskedPaths", json!(["/hidden/file"]))
    },
    paths_are_read_only: |bundle| {
        fs::create_dir(bundle.path("rootfs/closed")).unwrap();
        bundle.with("/linux/readonlyPaths", json!(["/closed", "/proc/sys", "/nowhere"]))
    },
    no_path_is_protected: |bundle| {
        bundle.with("/linux/maskedPaths", json!([])).with("/linux/readonlyPaths", json!([]))
    },
    bind_with_all_options: |bundle| bind(bundle, &["bind", "ro", "nosuid", "nodev", "noexec", "noatime"]),
    bind_of_a_tree: |bundle| bind(bundle, &["rbind", "rw"]),
    bind_that_propagates: |bundle| bind(bundle, &["rbind", "rslave"]),
    bind_of_a_file: |bundle| {
        fs::write(bundle.path("alone"), "alone").unwrap();
        let source = bundle.path("alone").display().to_string();
        bundle.with("/mounts/-", mount("/etc/alone", "bind", &source, &["bind", "ro"]))
    },
    tmpfs_with_options: |bundle| {
        bundle.with("/mounts/-", mount("/mounted", "tmpfs", "tmpfs", &["nosuid", "noexec", "mode=700", "size=1m"]))
    },
    file_systems_of_the_kernel: |bundle| {
        bundle
            .with("/mounts/-", mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]))
            .with("/mounts/-", mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]))
            .with("/mounts/-", mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]))
    },
    limits_of_resources: |bundle| {
        bundle.with(
            "/process/rlimits",
            json!([
                { "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 },
                { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
                { "type": "RLIMIT_NPROC", "soft": 500, "hard": 600 },
                { "type": "RLIMIT_STACK", "soft": 1_048_576, "hard": 2_097_152 },
            ]),
        )
    },
    no_capabilities: |bundle| capabilities(bundle, json!({})),
    capabilities_in_all_sets: |bundle| {
        let set = json!(["CAP_KILL", "CAP_CHOWN"]);
        capabilities(bundle, json!({ "bounding": set, "effective": set, "permitted": set, "inheritable": set, "ambient": set }))
    },
    capabilities_in_the_bounding_set: |bundle| capabilities(bundle, json!({ "bounding": ["CAP_CHOWN", "CAP_SYS_CHROOT"] })),
    ambient_capabilities_of_a_user: |bundle| {
        let set = json!(["CAP_NET_BIND_SERVICE"]);
        capabilities(bundle, json!({ "bounding": set, "effective": set, "permitted": set, "inheritable": set, "ambient": set }))
            .with("/process/user", json!({ "uid": 1000, "gid": 1000 }))
    },
    capabilities_of_a_user: |bundle| bundle.with("/process/user", json!({ "uid": 1000, "gid": 1000 })),
    new_privileges: |bundle| bundle.with("/process/noNewPrivileges", json!(false)),
    seccomp: |bundle| {
        bundle.with(
            "/linux/seccomp",
            json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{ "names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }],
            }),
        )
    },
    seccomp_and_new_privileges: |bundle| {
        bundle.with("/process/noNewPrivileges", json!(false)).with(
            "/linux/seccomp",
            json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{ "names": ["mknod", "mknodat"], "action": "SCMP_ACT_ERRNO" }],
            }),
        )
    },
    devices: |bundle| {
        bundle
            .with("/linux/devices", json!([
                { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 3, "gid": 4 },
                { "path": "/dev/below/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o600 },
            ]))
            .with("/linux/resources", json!({ "devices": [{ "allow": false, "access": "rwm" }] }))
    },
    fifo_device: |bundle| bundle.with("/linux/devices", json!([{ "path": "/dev/pipe", "type": "p", "fileMode": 0o644 }])),
    sysctls: |bundle| {
        bundle.with("/linux/sysctl", json!({ "kernel.shmmax": "12345678", "net.ipv4.ip_forward": "1", "fs.mqueue.msg_max": "11" }))
    },
    memory_limit: |bundle| limits(bundle, json!({ "memory": { "limit": 67_108_864 } })),
    pids_and_processor_limits: |bundle| {
        limits(bundle, json!({ "pids": { "limit": 100 }, "cpu": { "shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0" } }))
    },
    additional_groups: |bundle| {
        bundle.with("/process/user", json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 20, 1001] }))
    },
    mask_of_modes: |bundle| bundle.with("/process/user", json!({ "uid": 0, "gid": 0, "umask": 0o077 })),
    terminal: |bundle| {
        bundle.with("/process/terminal", json!(true)).with("/process/consoleSize", json!({ "height": 31, "width": 97 }))
    },
    hooks: hooked,
    score_for_the_oom_killer: |bundle| bundle.with("/process/oomScoreAdj", json!(321)),
    personality: |bundle| bundle.with("/linux/personality", json!({ "domain": "LINUX32" })),
    priority_of_io: |bundle| {
        bundle.with("/process/ioPriority", json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 }))
    },
    domain_name: |bundle| bundle.with("/domainname", json!("example.org")),
    environment: |bundle| {
        bundle.with("/process/env", json!(["PATH=/nowhere:/bin", "A=1", "B=", "A=2", "TERM=x"]))
    },
    home_is_given: |bundle| bundle.with("/process/env", json!(["PATH=/bin", "HOME=/given"])),
    directory_that_is_missing: |bundle| bundle.with("/process/cwd", json!("/made/for/it")),
};
