//! The configuration that `spec` writes: a shell with the rights that other runtimes' templates give, too.

use std::{fs, io, path::Path};

use cloche_runtime::cgroup::Layout;
use serde_json::{Value, json};

use crate::error::{Error, of_file};

/// Writes `config.json` into a bundle, unless there is one. A plain user's maps that user to root.
pub fn write(bundle: &Path, rootless: bool) -> Result<(), Error> {
    let path = bundle.join("config.json");
    let text = serde_json::to_vec_pretty(&template(rootless)).unwrap_or_default();
    let created = fs::OpenOptions::new().write(true).create_new(true).open(&path);
    let written = created.and_then(|mut file| io::Write::write_all(&mut file, &text));
    match written {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(Error::Request(format!("File {} exists. Remove it first", path.display())))
        }
        result => result.map_err(of_file("write", path)),
    }
}

fn template(rootless: bool) -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": true,
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "cloche",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            {
                "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            },
            {
                "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            },
            {
                "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
            },
            {
                "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"],
            },
            {
                "destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"],
            },
            {
                "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["nosuid", "noexec", "nodev", "relatime", "ro"],
            },
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                { "type": "cgroup" },
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    });
    // Programs find their v1 cgroups by /proc/self/cgroup, which a namespace would hide; other templates have none either.
    if Layout::detect().is_ok_and(|layout| layout != Layout::V2)
        && let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut()
    {
        namespaces.retain(|namespace| namespace["type"] != "cgroup");
    }
    if rootless {
        let id = |host: u32| json!([{ "containerID": 0, "hostID": host, "size": 1 }]);
        spec["linux"]["uidMappings"] = id(rustix::process::geteuid().as_raw());
        spec["linux"]["gidMappings"] = id(rustix::process::getegid().as_raw());
        if let Some(linux) = spec["linux"].as_object_mut() {
            linux.remove("resources");
        }
        // A plain user has no network namespace to show a sysfs of, no group 5, and no cgroups.
        spec["linux"]["namespaces"] = json!([
            { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" },
            { "type": "user" },
        ]);
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.retain(|mount| mount["type"] != "cgroup");
            for mount in mounts {
                if mount["type"] == "sysfs" {
                    *mount = json!({
                        "destination": "/sys", "type": "none", "source": "/sys",
                        "options": ["rbind", "nosuid", "noexec", "nodev", "ro"],
                    });
                } else if let Some(options) = mount["options"].as_array_mut() {
                    options.retain(|option| option != "gid=5");
                }
            }
        }
    }
    spec
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Spec;

    use super::*;

    #[test]
    fn template_is_a_configuration_that_the_runtime_reads() {
        for rootless in [false, true] {
            let spec: Spec = serde_json::from_value(template(rootless)).unwrap();
            assert_eq!(spec.process().as_ref().unwrap().args().as_deref(), Some(&["sh".to_owned()][..]));
            assert_eq!(spec.linux().as_ref().unwrap().uid_mappings().is_some(), rootless);
        }
    }

    #[test]
    fn configuration_that_is_there_is_not_replaced() {
        let bundle = tempfile::tempdir().unwrap();
        write(bundle.path(), false).unwrap();
        fs::write(bundle.path().join("config.json"), "mine").unwrap();
        assert!(write(bundle.path(), false).unwrap_err().to_string().contains("exists. Remove it first"));
        assert_eq!(fs::read(bundle.path().join("config.json")).unwrap(), b"mine");
    }
}
