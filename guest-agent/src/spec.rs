//! Reading the OCI runtime spec that came with the boot.
//!
//! The types are `oci-spec`'s but for the outer two, of which only what `cloche-runtime` acts on is read: every byte of
//! this program is copied at every start of a VM, and the rest is much of what there is: other systems' sections, an
//! affinity that is checked with a regular expression. A field that is not here is refused by its name, not ignored.

use std::{collections::HashMap, path::PathBuf};

use oci_spec::runtime::{
    Box as Cells, Linux, LinuxCapabilities, LinuxIOPriority, Mount, PosixRlimit, Process, Root, Scheduler,
    Spec, User,
};
use serde::Deserialize;

/// As in runtime-spec `config.md`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    #[serde(rename = "ociVersion")]
    version: String,
    root: Option<Root>,
    mounts: Option<Vec<Mount>>,
    process: Option<ConfigProcess>,
    hostname: Option<String>,
    domainname: Option<String>,
    annotations: Option<HashMap<String, String>>,
    linux: Option<Linux>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct ConfigProcess {
    terminal: Option<bool>,
    console_size: Option<Cells>,
    user: User,
    args: Option<Vec<String>>,
    env: Option<Vec<String>>,
    cwd: PathBuf,
    capabilities: Option<LinuxCapabilities>,
    rlimits: Option<Vec<PosixRlimit>>,
    no_new_privileges: Option<bool>,
    apparmor_profile: Option<String>,
    selinux_label: Option<String>,
    oom_score_adj: Option<i32>,
    io_priority: Option<LinuxIOPriority>,
    scheduler: Option<Scheduler>,
}

/// Reads `config.json`.
pub fn read(json: &[u8]) -> Result<Spec, serde_json::Error> {
    let config: Config = serde_json::from_slice(json)?;
    // What is not set here is nothing by default.
    let mut spec = Spec::default();
    spec.set_version(config.version)
        .set_root(config.root)
        .set_mounts(config.mounts)
        .set_process(config.process.map(process))
        .set_hostname(config.hostname)
        .set_domainname(config.domainname)
        .set_annotations(config.annotations)
        .set_linux(config.linux);
    Ok(spec)
}

/// Reads a process of a running container.
pub fn read_process(json: &str) -> Result<Process, serde_json::Error> {
    serde_json::from_str(json).map(process)
}

fn process(config: ConfigProcess) -> Process {
    let mut process = Process::default();
    process
        .set_terminal(config.terminal)
        .set_console_size(config.console_size)
        .set_user(config.user)
        .set_args(config.args)
        .set_env(config.env)
        .set_cwd(config.cwd)
        .set_capabilities(config.capabilities)
        .set_rlimits(config.rlimits)
        .set_no_new_privileges(config.no_new_privileges)
        .set_apparmor_profile(config.apparmor_profile)
        .set_selinux_label(config.selinux_label)
        .set_oom_score_adj(config.oom_score_adj)
        .set_io_priority(config.io_priority)
        .set_scheduler(config.scheduler);
    process
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Every field that is read, at least as far as the types here go.
    fn full() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "root": { "path": "rootfs", "readonly": true },
            "hostname": "h",
            "domainname": "d",
            "annotations": { "a": "b" },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"] }],
            "process": {
                "terminal": false,
                "user": { "uid": 1, "gid": 2, "umask": 18, "additionalGids": [3] },
                "args": ["a", "b"],
                "env": ["A=1"],
                "cwd": "/x",
                "capabilities": { "bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"] },
                "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 1, "hard": 2 }],
                "noNewPrivileges": true,
                "apparmorProfile": "",
                "selinuxLabel": "",
                "oomScoreAdj": 5,
                "consoleSize": { "height": 25, "width": 80 },
                "ioPriority": { "class": "IOPRIO_CLASS_IDLE", "priority": 0 },
                "scheduler": { "policy": "SCHED_BATCH" },
            },
            "linux": { "namespaces": [{ "type": "mount" }], "maskedPaths": ["/proc/kcore"] },
        })
    }

    fn same_as_oci_spec(config: &Value) {
        let whole: Spec = serde_json::from_value(config.clone()).unwrap();
        assert_eq!(read(config.to_string().as_bytes()).unwrap(), whole);
    }

    #[test]
    fn spec_read_is_the_one_that_oci_spec_reads() {
        same_as_oci_spec(&full());
        same_as_oci_spec(&serde_json::to_value(Spec::default()).unwrap());
    }

    #[test]
    fn spec_with_only_what_is_required_has_nothing_else() {
        let config = json!({
            "ociVersion": "1.2.0",
            "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/" },
        });
        same_as_oci_spec(&config);
    }

    #[test]
    fn field_that_is_not_acted_on_is_refused_by_name() {
        for (at, field) in [("", "windows"), ("", "hooks"), ("/process", "execCPUAffinity")] {
            let mut config = full();
            config.pointer_mut(at).unwrap()[field] = json!({ "initial": "0" });
            let error = read(config.to_string().as_bytes()).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
