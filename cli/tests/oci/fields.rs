//! Every field of `config.json` in runtime-spec 1.3 (`schema/config-schema.json`, `schema/config-linux.json`, and what
//! these refer to) is in effect, or refused by its name. What another test has is named.

use serde_json::{Value, json};

use crate::{
    Test,
    fixture::{Bundle, in_vm, link_applets, open_to_all, text},
};

pub fn all() -> Vec<Test> {
    crate::tests![
        fields_that_the_process_sees_are_in_effect,
        terminal_has_its_size,
        resources_are_in_effect_or_refused_by_name,
        field_that_is_not_acted_on_is_refused_by_name,
        field_that_asks_for_nothing_here_is_passed_over,
        fields_of_other_tests_are_in_these,
    ]
}

/// Field, value, a shell command in the container, and what it prints. All are asked for at once.
fn seen() -> Vec<(&'static str, Value, &'static str, &'static str)> {
    let capabilities =
        |names: &[&str]| names.iter().map(|name| json!(format!("CAP_{name}"))).collect::<Value>();
    vec![
        ("/hostname", json!("bell-jar"), "hostname", "bell-jar"),
        ("/domainname", json!("garden"), "cat /proc/sys/kernel/domainname", "garden"),
        ("/root/path", json!("rootfs"), "test -e /bin/busybox && echo there", "there"),
        (
            "/root/readonly",
            json!(true),
            "touch /x 2> /dev/null || grep ' / ' /proc/mounts | grep -o ' ro,'",
            " ro,",
        ),
        ("/process/cwd", json!("/proc/sys"), "pwd", "/proc/sys"),
        ("/process/env", json!(["PATH=/bin", "FIELD=value"]), "echo $FIELD", "value"),
        ("/process/user/uid", json!(5), "id -u", "5"),
        ("/process/user/gid", json!(6), "id -g", "6"),
        ("/process/user/umask", json!(0o27), "umask", "0027"),
        ("/process/user/additionalGids", json!([7, 8]), "id -G", "6 7 8"),
        ("/process/noNewPrivileges", json!(true), "grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1"),
        ("/process/oomScoreAdj", json!(501), "cat /proc/self/oom_score_adj", "501"),
        (
            "/process/rlimits",
            json!([{ "type": "RLIMIT_NOFILE", "soft": 99, "hard": 101 }]),
            "ulimit -Sn; ulimit -Hn",
            "99\n101",
        ),
        // Of CHOWN, KILL and SETUID, 0, 5 and 7 (capabilities(7): what a program that is not root's keeps is ambient).
        (
            "/process/capabilities/bounding",
            capabilities(&["CHOWN", "KILL", "SETUID"]),
            "grep CapBnd /proc/self/status",
            "CapBnd:\t00000000000000a1",
        ),
        (
            "/process/capabilities/inheritable",
            capabilities(&["CHOWN", "KILL"]),
            "grep CapInh /proc/self/status",
            "CapInh:\t0000000000000021",
        ),
        (
            "/process/capabilities/permitted",
            capabilities(&["CHOWN", "KILL"]),
            "grep CapPrm /proc/self/status",
            "CapPrm:\t0000000000000020",
        ),
        (
            "/process/capabilities/effective",
            capabilities(&["CHOWN", "KILL"]),
            "grep CapEff /proc/self/status",
            "CapEff:\t0000000000000020",
        ),
        (
            "/process/capabilities/ambient",
            capabilities(&["KILL"]),
            "grep CapAmb /proc/self/status",
            "CapAmb:\t0000000000000020",
        ),
        (
            "/process/ioPriority",
            json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 }),
            "ionice",
            "best-effort: prio 6",
        ),
        // proc(5): its nice value is field 19.
        (
            "/process/scheduler",
            json!({ "policy": "SCHED_BATCH", "nice": 7, "flags": ["SCHED_FLAG_RESET_ON_FORK"] }),
            "cat /proc/1/stat | (read line; set -- ${line##*)}; echo ${17} ${39})",
            "7 3",
        ),
        (
            "/mounts/-",
            json!({ "destination": "/field", "type": "tmpfs", "source": "of", "options": ["size=64k", "noexec"] }),
            "grep ' /field ' /proc/mounts | grep -o '^of /field tmpfs rw,noexec.*,size=64k'",
            "",
        ),
        (
            "/linux/devices",
            json!([{ "path": "/dev/field", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 3, "gid": 4 }]),
            "ls -ln /dev/field | (read mode links uid gid major minor rest; echo $mode $uid $gid $major $minor)",
            "crw-r----- 3 4 1, 5",
        ),
        ("/linux/sysctl", json!({ "kernel.shmmni": "123" }), "cat /proc/sys/kernel/shmmni", "123"),
        ("/linux/maskedPaths", json!(["/proc/version"]), "cat /proc/version | wc -c", "0"),
        (
            "/linux/readonlyPaths",
            json!(["/proc/sys"]),
            "grep ' /proc/sys ' /proc/mounts | grep -o ' ro,'",
            " ro,",
        ),
        (
            "/linux/timeOffsets",
            json!({ "boottime": { "secs": 1_000_000_000, "nanosecs": 5 }, "monotonic": { "secs": 7 } }),
            "read up rest < /proc/uptime; test ${up%.*} -gt 1000000000 && echo later",
            "later",
        ),
        ("/linux/personality", json!({ "domain": "LINUX32" }), "uname -m", "i686"),
        (
            "/linux/rootfsPropagation",
            json!("rshared"),
            "grep -c '^[^ ]* [^ ]* [^ ]* [^ ]* / .* shared:' /proc/self/mountinfo",
            "1",
        ),
        (
            "/linux/seccomp",
            json!({
                "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                "syscalls": [
                    { "names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 123 },
                    {
                        "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 124,
                        "args": [{ "index": 1, "value": 12, "op": "SCMP_CMP_EQ" }],
                    },
                ],
            }),
            "mkdir /field/x 2>&1; kill -12 $$ 2>&1 | grep -o 'Wrong.*'; kill -0 $$ && echo others",
            "mkdir: can't create directory '/field/x': No medium found\nWrong medium type\nothers",
        ),
    ]
}

fn fields_that_the_process_sees_are_in_effect() {
    let rows = seen();
    let script: String =
        rows.iter().map(|(field, _, command, _)| format!("echo '== {field}'; {command}\n")).collect();
    let mut bundle = Bundle::new(&["sh", "-c", &script])
        .with("/process/user", json!({}))
        .with("/linux/namespaces/-", json!({ "type": "time" }));
    link_applets(&bundle, &["grep", "ionice", "uname", "wc"]);
    open_to_all(&bundle);
    for (field, value, ..) in &rows {
        bundle = bundle.with(field, value.clone());
    }
    let output = bundle.run(&["run", &bundle.id]);
    let printed = text(&output.stdout);
    let mut sections =
        printed.split("== ").skip(1).map(|section| section.split_once('\n').unwrap_or((section, "")));
    for (field, _, command, expected) in &rows {
        let (name, found) = sections.next().unwrap_or_else(|| panic!("{field} is missing: {output:?}"));
        assert_eq!(name, *field);
        // What has no value here is to be there.
        if expected.is_empty() {
            assert!(!found.trim().is_empty(), "{field}: {command} finds nothing: {output:?}");
        } else {
            assert_eq!(found.trim_end(), *expected, "{field}: {command}: {}", text(&output.stderr));
        }
    }
}

fn terminal_has_its_size() {
    let bundle = Bundle::new(&["stty", "size"])
        .with("/process/terminal", json!(true))
        .with("/process/consoleSize", json!({ "height": 33, "width": 111 }));
    assert_eq!(bundle.ok(&["run", &bundle.id]), "33 111");
}

/// Field, value, name in the message if it is refused, and files of v1 and v2 with what they have then, one of several.
type Resource = (&'static str, Value, &'static str, &'static str, &'static str);

fn resources() -> Vec<Resource> {
    let rate = json!([{ "major": 1, "minor": 0, "rate": 1_048_576 }]);
    vec![
        (
            "memory/limit",
            json!(67_108_864),
            "memory",
            "memory.limit_in_bytes 67108864",
            "memory.max 67108864",
        ),
        (
            "memory/reservation",
            json!(33_554_432),
            "memory",
            "memory.soft_limit_in_bytes 33554432",
            "memory.low 33554432",
        ),
        ("memory/swappiness", json!(13), "memory.swappiness", "memory.swappiness 13", ""),
        (
            "memory/disableOOMKiller",
            json!(true),
            "memory.disableOOMKiller",
            "memory.oom_control oom_kill_disable 1",
            "",
        ),
        (
            "memory/kernelTCP",
            json!(8_388_608),
            "memory.kernelTCP",
            "memory.kmem.tcp.limit_in_bytes 8388608",
            "",
        ),
        ("cpu/shares", json!(512), "cpu", "cpu.shares 512", "cpu.weight 20"),
        ("cpu/quota", json!(50_000), "cpu", "cpu.cfs_quota_us 50000", "cpu.max 50000 100000"),
        ("cpu/period", json!(50_000), "cpu", "cpu.cfs_period_us 50000", "cpu.max max 50000"),
        ("cpu/idle", json!(1), "cpu.idle", "cpu.idle 1", "cpu.idle 1"),
        ("cpu/cpus", json!("0"), "cpu.cpus", "cpuset.cpus 0", "cpuset.cpus 0"),
        ("cpu/mems", json!("0"), "cpu.cpus", "cpuset.mems 0", "cpuset.mems 0"),
        ("cpu/realtimePeriod", json!(900_000), "cpu.realtimePeriod", "cpu.rt_period_us 900000", ""),
        ("cpu/realtimeRuntime", json!(1000), "cpu.realtimeRuntime", "cpu.rt_runtime_us 1000", ""),
        ("pids/limit", json!(77), "pids", "pids.max 77", "pids.max 77"),
        (
            "blockIO/weight",
            json!(123),
            "blockIO.weight",
            "blkio.bfq.weight 123",
            "io.bfq.weight default 123|io.weight default 1142",
        ),
        (
            "blockIO/weightDevice",
            json!([{ "major": 1, "minor": 0, "weight": 200 }]),
            "blockIO.weightDevice",
            "blkio.bfq.weight_device 1:0 200",
            "io.bfq.weight 1:0 200|io.weight 1:0 200",
        ),
        (
            "blockIO/throttleReadBpsDevice",
            rate.clone(),
            "blockIO.throttleReadBpsDevice",
            "blkio.throttle.read_bps_device 1:0 1048576",
            "io.max 1:0 rbps=1048576",
        ),
        (
            "blockIO/throttleWriteBpsDevice",
            rate.clone(),
            "blockIO.throttleWriteBpsDevice",
            "blkio.throttle.write_bps_device 1:0 1048576",
            "io.max 1:0 rbps=max wbps=1048576",
        ),
        (
            "blockIO/throttleReadIOPSDevice",
            rate.clone(),
            "blockIO.throttleReadIOPSDevice",
            "blkio.throttle.read_iops_device 1:0 1048576",
            "io.max 1:0 rbps=max wbps=max riops=1048576",
        ),
        (
            "blockIO/throttleWriteIOPSDevice",
            rate,
            "blockIO.throttleWriteIOPSDevice",
            "blkio.throttle.write_iops_device 1:0 1048576",
            "io.max 1:0 rbps=max wbps=max riops=max wiops=1048576",
        ),
        (
            "hugepageLimits",
            json!([{ "pageSize": "2MB", "limit": 4_194_304 }]),
            "hugepageLimits",
            "hugetlb.2MB.limit_in_bytes 4194304",
            "hugetlb.2MB.max 4194304",
        ),
        ("network/classID", json!(1_048_577), "network.classID", "net_cls.classid 1048577", ""),
        (
            "network/priorities",
            json!([{ "name": "lo", "priority": 3 }]),
            "network.priorities",
            "net_prio.ifpriomap lo 3",
            "",
        ),
        ("rdma", json!({ "mlx5_1": { "hcaHandles": 3 } }), "rdma", "rdma.max mlx5_1", "rdma.max mlx5_1"),
        ("unified", json!({ "memory.high": "67108864" }), "unified", "", "memory.high 67108864"),
    ]
}

/// What of it a kernel has is a matter of the kernel.
fn resources_are_in_effect_or_refused_by_name() {
    for (field, value, name, v1, v2) in resources() {
        let known: Vec<_> = [v1, v2].iter().flat_map(|all| all.split('|')).collect();
        let known: Vec<_> =
            known.iter().map(|what| what.split_once(' ').unwrap_or(("none", "nothing"))).collect();
        let files: String =
            known.iter().map(|(file, _)| format!("/sys/fs/cgroup/*/{file} /sys/fs/cgroup/{file} ")).collect();
        let script = format!("for file in {files}; do test -f $file && cat $file; done; true");
        let (group, last) = field.split_once('/').map_or((field, None), |(group, last)| (group, Some(last)));
        let value = last.map_or(value.clone(), |last| json!({ last: value }));
        let bundle = Bundle::script(&script)
            .with(
                "/mounts/-",
                json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup" }),
            )
            .with("/linux/namespaces/-", json!({ "type": "cgroup" }))
            .with("/linux/resources", json!({ group: value }));
        let output = bundle.run(&["run", &bundle.id]);
        let (printed, errors) = (text(&output.stdout), text(&output.stderr));
        if output.status.success() {
            let printed = printed.replace('\t', " ");
            let is_there = |expected: &str| printed.lines().any(|line| line.starts_with(expected));
            assert!(
                known.iter().any(|(_, expected)| is_there(expected)),
                "{field}: {known:?}, not {printed:?}"
            );
        } else {
            let is_named = errors.contains(&format!("linux.resources.{name}"));
            // Or by the file that the kernel does not have, or does not let be written.
            let is_of_a_file = known.iter().any(|(file, _)| errors.contains(&format!("/{file}")));
            assert!(is_named || is_of_a_file, "{field}: {errors}");
        }
    }
}

fn field_that_is_not_acted_on_is_refused_by_name() {
    let fields = [
        ("/ociVersion", json!("2.0.0")),
        ("/solaris", json!({})),
        ("/windows", json!({ "layerFolders": ["x"] })),
        ("/vm", json!({ "kernel": { "path": "/k" } })),
        ("/zos", json!({})),
        ("/freebsd", json!({})),
        ("/process/commandLine", json!("cmd")),
        ("/process/user/username", json!("ContainerUser")),
        ("/linux/netDevices", json!({ "eth0": { "name": "eth1" } })),
        ("/linux/intelRdt", json!({ "closID": "x", "schemata": ["L3:0=f"], "enableMonitoring": true })),
        (
            "/linux/memoryPolicy",
            json!({ "mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"] }),
        ),
        ("/linux/resources", json!({ "memory": { "kernel": 1 } })),
        ("/linux/resources", json!({ "memory": { "useHierarchy": false } })),
        ("/linux/resources", json!({ "memory": { "checkBeforeUpdate": true } })),
        ("/linux/resources", json!({ "blockIO": { "leafWeight": 10 } })),
        (
            "/linux/resources",
            json!({ "blockIO": { "weightDevice": [{ "major": 8, "minor": 0, "leafWeight": 1 }] } }),
        ),
    ];
    let affinity = [("/process/execCPUAffinity", json!({ "final": "0" }))];
    for (field, value) in fields.into_iter().chain(affinity.into_iter().filter(|_| in_vm())) {
        // The innermost name.
        let mut name = field.trim_start_matches('/').replace('/', ".");
        let mut inner = &value;
        while field.starts_with("/linux/resources")
            && let Value::Object(fields) = inner
        {
            let (key, value) = fields.iter().next().unwrap();
            (name, inner) = (format!("{name}.{key}"), value);
        }
        let name = name.replace("weightDevice", "leafWeight");
        let bundle = Bundle::new(&["true"]).with(field, value.clone());
        let message = bundle.refused(&["run", &bundle.id]);
        assert!(message.contains(&name), "{name}: {message}");
    }
}

/// spec.md#extensibility, and what is not for a process without a terminal.
fn field_that_asks_for_nothing_here_is_passed_over() {
    let bundle = Bundle::new(&["echo", "ran"])
        .with("/unheardOf", json!({ "x": 1 }))
        .with("/linux/unheardOf", json!("x"))
        .with("/process/unheardOf", json!([1]))
        .with("/process/consoleSize", json!({ "height": 1, "width": 1 }))
        .with("/annotations", json!({ "org.example.unheard-of": "x" }));
    assert_eq!(bundle.ok(&["run", &bundle.id]), "ran");
}

/// The fields that are not above, and the tests of what they do.
const ELSEWHERE: [(&str, &str); 15] = [
    ("annotations", "life::state_is_what_the_specification_says"),
    ("hooks", "hooks::hooks_run_in_their_order_with_the_state"),
    ("linux.cgroupsPath", "sharing::container_in_anothers_cgroup_is_apart_from_it"),
    ("linux.mountLabel", "processes::label_is_given_to_the_kernel_or_refused_by_name"),
    ("linux.namespaces", "spaces::user_namespace_can_be_joined_with_new_namespaces_in_it"),
    ("linux.resources.devices", "differential::bundles_look_the_same_as_under_runc_or_crun"),
    ("linux.seccomp.listenerPath", "seccomp::notified_call_is_decided_by_whoever_has_the_listener"),
    ("linux.uidMappings", "spaces::root_of_a_user_namespace_is_somebody_else_outside"),
    ("linux.gidMappings", "spaces::root_of_a_user_namespace_is_somebody_else_outside"),
    ("mounts.uidMappings", "spaces::idmapped_mount_shows_other_owners"),
    ("process.apparmorProfile", "processes::label_is_given_to_the_kernel_or_refused_by_name"),
    ("process.args", "life::run_returns_the_exit_code_and_leaves_nothing"),
    ("process.execCPUAffinity", "spaces::exec_runs_on_its_own_cpus"),
    ("process.selinuxLabel", "processes::label_is_given_to_the_kernel_or_refused_by_name"),
    ("process.terminal", "processes::terminal_is_sent_to_the_console_socket"),
];

fn fields_of_other_tests_are_in_these() {
    let all: Vec<_> = crate::of_containers().into_iter().map(|(name, _)| name).collect();
    for (field, test) in ELSEWHERE {
        assert!(
            all.iter().any(|name| name.ends_with(&format!("::{test}"))),
            "{field}: there is no test {test}"
        );
    }
}
