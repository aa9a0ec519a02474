//! Every field of the spec is either acted on or refused by its name.

use std::fmt::Debug;

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxNetwork, LinuxResources, LinuxSeccomp, Mount, Process, User,
};
use serde_json::{Value, json};

use super::*;

/// A spec that asks for nothing special.
fn plain() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": { "user": { "uid": 0, "gid": 0 }, "args": ["true"], "cwd": "/" },
        "linux": { "namespaces": [{ "type": "mount" }, { "type": "uts" }] },
    })
}

fn checked(spec: &Spec) -> Result<(), SpecError> {
    check(spec, false)
}

/// The plain spec with one more value at a path such as `linux/resources`.
fn with(path: &str, value: Value) -> Spec {
    let mut spec = plain();
    let mut at = &mut spec;
    for name in path.split('/') {
        at = match name.parse::<usize>() {
            Ok(0) => {
                *at = json!([{}]);
                &mut at[0]
            }
            _ => &mut at[name],
        };
    }
    *at = value;
    serde_json::from_value(spec).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn refusal(path: &str, value: Value) -> String {
    match checked(&with(path, value)) {
        Err(SpecError::Unsupported(name)) => name,
        other => panic!("{path}: {other:?}"),
    }
}

#[test]
fn plain_spec_is_accepted() {
    assert_eq!(checked(&serde_json::from_value(plain()).unwrap()), Ok(()));
}

#[test]
fn unsupported_field_is_refused_by_its_name() {
    let hook = json!([{ "path": "/bin/hook" }]);
    let fields = [
        ("solaris", json!({})),
        ("windows", json!({ "layerFolders": ["x"] })),
        ("vm", json!({ "kernel": { "path": "/k" } })),
        ("zos", json!({})),
        ("hooks/prestart", hook.clone()),
        ("hooks/createRuntime", hook.clone()),
        ("hooks/createContainer", hook.clone()),
        ("hooks/startContainer", hook.clone()),
        ("hooks/poststart", hook.clone()),
        ("hooks/poststop", hook),
        ("process/terminal", json!(true)),
        ("process/commandLine", json!("cmd")),
        ("process/user/username", json!("ContainerUser")),
        ("linux/netDevices", json!({ "eth0": {} })),
        ("linux/intelRdt", json!({ "closID": "x" })),
        ("linux/memoryPolicy", json!({ "mode": "MPOL_BIND", "nodes": "0" })),
        ("linux/resources/memory/kernel", json!(1)),
        ("linux/resources/memory/checkBeforeUpdate", json!(true)),
        ("linux/resources/memory/useHierarchy", json!(false)),
        ("linux/resources/blockIO/leafWeight", json!(10)),
    ];
    for (path, value) in fields {
        assert_eq!(refusal(path, value), path.replace('/', "."));
    }
}

#[test]
fn unsupported_value_is_refused_by_name_and_value() {
    let cases = [
        ("linux/namespaces", json!([{ "type": "mount", "path": "/ns" }]), "linux.namespaces[mount].path"),
        (
            "linux/seccomp",
            json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "listenerPath": "/s",
                "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_NOTIFY" }],
            }),
            "linux.seccomp action SCMP_ACT_NOTIFY",
        ),
    ];
    for (path, value, name) in cases {
        assert_eq!(refusal(path, value), name);
    }
}

#[test]
fn value_that_asks_for_nothing_is_accepted() {
    let fields = [
        ("hooks", json!({})),
        ("process/terminal", json!(false)),
        ("process/consoleSize", json!({ "height": 24, "width": 80 })),
        ("process/apparmorProfile", json!("")),
        ("linux/mountLabel", json!("")),
        ("linux/uidMappings", json!([])),
        ("linux/rootfsPropagation", json!("rslave")),
        ("linux/rootfsPropagation", json!("shared")),
        ("process/execCPUAffinity", json!({ "initial": "0", "final": "0-1" })),
        ("linux/resources/memory/disableOOMKiller", json!(false)),
        ("linux/resources/memory/kernel", json!(0)),
        ("linux/resources/blockIO", json!({ "weight": 0 })),
        ("linux/resources/network", json!({})),
        ("linux/resources/hugepageLimits", json!([])),
    ];
    for (path, value) in fields {
        assert_eq!(checked(&with(path, value)), Ok(()), "{path}");
    }
}

#[cfg(feature = "user-namespaces")]
#[test]
fn contradiction_is_refused_with_its_reason() {
    let cases = [
        ("ociVersion", json!("2.0.0"), "ociVersion \"2.0.0\""),
        ("process", Value::Null, "process is missing"),
        ("linux", Value::Null, "linux is missing"),
        ("process/args", json!([]), "process.args is empty"),
        ("process/cwd", json!("tmp"), "not an absolute path"),
        ("process/execCPUAffinity", json!({ "final": "1-70000" }), "\"1-70000\" is no list of CPUs"),
        ("process/user/uid", json!(u32::MAX), "4294967295 is no id"),
        ("process/user/additionalGids", json!([1, u32::MAX]), "4294967295 is no id"),
        ("linux/namespaces", json!([]), "no mount namespace"),
        ("linux/namespaces", json!([{ "type": "mount" }, { "type": "mount" }]), "twice"),
        ("linux/rootfsPropagation", json!("sideways"), "sideways"),
        ("linux/namespaces", json!([{ "type": "mount" }, { "type": "user" }]), "needs linux.uidMappings"),
        ("linux/uidMappings", json!([{ "hostID": 0, "containerID": 0, "size": 1 }]), "need a user namespace"),
        ("linux/timeOffsets", json!({ "monotonic": { "secs": 1 } }), "needs a new time namespace"),
    ];
    for (path, value, reason) in cases {
        let error = checked(&with(path, value)).unwrap_err().to_string();
        assert!(error.contains(reason), "{path}: {error}");
    }
    for (field, module, is_on) in [
        ("process/apparmorProfile", "AppArmor", labels::has_apparmor()),
        ("process/selinuxLabel", "SELinux", labels::has_selinux()),
        ("linux/mountLabel", "SELinux", labels::has_selinux()),
    ] {
        let expected = format!("{} is set, and {module} is off on this machine", field.replace('/', "."));
        let expected = if is_on { Ok(()) } else { Err(SpecError::Invalid(expected)) };
        assert_eq!(checked(&with(field, json!("label"))), expected);
    }
    let mut shared = with("hostname", json!("name"));
    assert_eq!(checked(&shared), Ok(()));
    let mut linux = shared.linux().clone().unwrap();
    linux.set_namespaces(Some(vec![linux.namespaces().clone().unwrap()[0].clone()]));
    shared.set_linux(Some(linux));
    assert!(checked(&shared).unwrap_err().to_string().contains("hostname"));
}

/// Names of a struct's fields, private ones included, as its `Debug` prints them.
fn fields(value: &impl Debug) -> String {
    let printed = format!("{value:#?}");
    let names = printed.lines().filter_map(|line| {
        let (name, _) = line.strip_prefix("    ")?.split_once(':')?;
        (!name.starts_with([' ', '"', '}', ']'])).then_some(name)
    });
    names.collect::<Vec<_>>().join(" ")
}

/// Fails when a new version of `oci-spec` knows more fields: each must be acted on or refused first.
#[test]
fn fields_of_the_specs_types_are_those_that_were_considered() {
    assert_eq!(
        fields(&Spec::default()),
        "version root mounts process hostname domainname hooks annotations linux solaris windows vm zos uid_mappings \
         gid_mappings"
    );
    assert_eq!(
        fields(&Hooks::default()),
        "prestart create_runtime create_container start_container poststart poststop"
    );
    assert_eq!(fields(&Mount::default()), "destination typ source options uid_mappings gid_mappings");
    assert_eq!(
        fields(&Process::default()),
        "terminal console_size user args command_line env cwd capabilities rlimits no_new_privileges \
         apparmor_profile oom_score_adj selinux_label io_priority scheduler exec_cpu_affinity"
    );
    assert_eq!(fields(&User::default()), "uid gid umask additional_gids username");
    assert_eq!(
        fields(&Linux::default()),
        "net_devices uid_mappings gid_mappings sysctl resources cgroups_path namespaces devices seccomp \
         rootfs_propagation masked_paths readonly_paths mount_label intel_rdt memory_policy personality time_offsets"
    );
    assert_eq!(
        fields(&LinuxResources::default()),
        "devices memory cpu pids block_io hugepage_limits network rdma unified"
    );
    assert_eq!(
        fields(&LinuxMemory::default()),
        "limit reservation swap kernel kernel_tcp swappiness disable_oom_killer use_hierarchy check_before_update"
    );
    assert_eq!(
        fields(&LinuxCpu::default()),
        "shares quota idle burst period realtime_runtime realtime_period cpus mems"
    );
    assert_eq!(
        fields(&LinuxBlockIo::default()),
        "weight leaf_weight weight_device throttle_read_bps_device throttle_write_bps_device \
         throttle_read_iops_device throttle_write_iops_device"
    );
    assert_eq!(fields(&LinuxNetwork::default()), "class_id priorities");
    assert_eq!(
        fields(&LinuxSeccomp::default()),
        "default_action default_errno_ret architectures flags listener_path listener_metadata syscalls"
    );
}

/// As the guest agent is built.
#[cfg(not(feature = "user-namespaces"))]
#[test]
fn user_namespace_is_refused_where_it_is_left_out() {
    let namespaces = serde_json::json!([{ "type": "mount" }, { "type": "user" }]);
    let spec: Spec = serde_json::from_value(serde_json::json!({
        "ociVersion": "1.2.0",
        "process": { "user": { "uid": 0, "gid": 0 }, "args": ["x"], "cwd": "/" },
        "linux": { "namespaces": namespaces },
    }))
    .unwrap();
    assert_eq!(checked(&spec), Err(SpecError::Unsupported("linux.namespaces[user]".into())));
}
