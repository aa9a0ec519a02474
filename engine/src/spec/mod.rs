//! From an image's configuration and a request to the OCI runtime spec that both isolations start from.
//!
//! The defaults are Docker's: capabilities, mounts, masked paths, devices, seccomp. Two are stricter: no_new_privs
//! is on, and there is no network but `lo` yet.

mod seccomp;

use std::path::Path;

use cloche_protocol::boot::share_path;
use cloche_runtime::{Filter, SeccompError};
use cloche_share::Shared;
use oci_spec::{OciSpecError, image::ImageConfiguration, runtime::Spec};
use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};

use crate::{
    request::{Isolation, RunRequest},
    rootless::IdMaps,
    sources::Source,
};

/// Docker's default capabilities (the mask 00000000a80425fb).
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const CPU_PERIOD_US: u64 = 100_000;

/// Why no spec could be made.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Neither the image nor the request says what to run.
    #[error("image `{0}` has no command and none was given; add one after the image's name")]
    NoCommand(String),
    /// The image's working directory is relative.
    #[error("working directory `{0}` of the image is not absolute; set another with -w")]
    RelativeWorkdir(String),
    /// The result is no runtime spec.
    #[error("the runtime spec for this request is not valid")]
    Invalid(#[source] serde_json::Error),
    /// The system-call policy is none.
    #[error("the system-call policy for this request is not valid")]
    Policy(#[source] OciSpecError),
    /// The system-call policy cannot be a filter.
    #[error("the system-call policy for this request cannot be compiled")]
    Filter(#[source] SeccompError),
}

/// What to run: the spec, and the user that only the container's own `/etc/passwd` can resolve.
#[derive(Debug)]
pub struct Workload {
    /// The OCI runtime spec. `process.user` is root; see `user`. `linux.seccomp` is empty; see `filter`.
    pub spec: Spec,
    /// The system-call filter; the bare process has none. It is compiled here for both isolations: in a guest it would
    /// take longer, and every guest would have to.
    pub filter: Option<Filter>,
    /// `user[:group]` as in the image or the request, if any.
    pub user: Option<String>,
    /// The command line, for display.
    pub args: Vec<String>,
    /// What of the host a VM's file server serves, by its number.
    pub shares: Vec<Shared>,
}

/// Where on the host, and whose, a sandbox is to be.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The path of its cgroup. In a VM, which has nothing else in it, only the name counts.
    pub cgroup: &'a Path,
    /// Users of a plain user's container.
    pub users: Option<&'a IdMaps>,
}

/// Makes the spec of sandbox `id`. `sources` are those of the request's mounts, in the same order.
pub fn workload(
    id: &str,
    request: &RunRequest,
    image: &ImageConfiguration,
    sources: &[Source],
    place: &Place<'_>,
) -> Result<Workload, SpecError> {
    let config = image.config().as_ref();
    let args = arguments(request, config);
    if args.is_empty() {
        return Err(SpecError::NoCommand(request.image.clone()));
    }
    let image_workdir = config.and_then(|config| config.working_dir().clone()).filter(|dir| !dir.is_empty());
    let cwd = request.workdir.clone().or(image_workdir).unwrap_or_else(|| "/".into());
    if !cwd.starts_with('/') {
        return Err(SpecError::RelativeWorkdir(cwd));
    }
    let image_user = config.and_then(|config| config.user().clone()).filter(|user| !user.is_empty());
    let user = request.user.clone().or(image_user);
    let hostname = request.hostname.as_deref().unwrap_or(id);
    let image_env = config.and_then(|config| config.env().clone()).unwrap_or_default();
    let env = environment(hostname, &image_env, &request.env);

    let mut spec = match request.isolation {
        Isolation::Process => process_spec(&args, &env, &cwd),
        Isolation::Container | Isolation::Vm => {
            container_spec(hostname, request, process(&args, &env, &cwd), mounts(request.isolation, sources))
        }
    };
    spec["linux"]["cgroupsPath"] = match (request.isolation, place.cgroup.file_name()) {
        (Isolation::Vm, Some(name)) => Path::new("/cloche").join(name),
        _ => place.cgroup.to_owned(),
    }
    .to_string_lossy()
    .into();
    if let Some(users) = place.users {
        add_user_namespace(&mut spec, users);
    }
    let spec: Spec = serde_json::from_value(spec).map_err(SpecError::Invalid)?;
    let filter = match request.isolation {
        Isolation::Process => None,
        Isolation::Container | Isolation::Vm => {
            let policy = seccomp::default_policy(&CAPABILITIES).map_err(SpecError::Policy)?;
            Some(Filter::compile(&policy).map_err(SpecError::Filter)?)
        }
    };
    let shares = sources.iter().filter_map(Source::shared).collect();
    Ok(Workload { spec, filter, user, args, shares })
}

/// Docker's rule: an entry point given replaces the image's and drops its command; a command given replaces the
/// image's command.
fn arguments(request: &RunRequest, config: Option<&oci_spec::image::Config>) -> Vec<String> {
    let image_entrypoint = config.and_then(|config| config.entrypoint().clone()).unwrap_or_default();
    let image_command = config.and_then(|config| config.cmd().clone()).unwrap_or_default();
    let (mut args, default_command) = match &request.entrypoint {
        Some(entrypoint) if entrypoint.is_empty() => (Vec::new(), Vec::new()),
        Some(entrypoint) => (vec![entrypoint.clone()], Vec::new()),
        None => (image_entrypoint, image_command),
    };
    if request.command.is_empty() {
        args.extend(default_command)
    } else {
        args.extend(request.command.clone())
    }
    args
}

/// The image's variables, then the request's over them, after the defaults that both may replace.
fn environment(hostname: &str, image: &[String], request: &[String]) -> Vec<String> {
    let defaults = [format!("PATH={DEFAULT_PATH}"), format!("HOSTNAME={hostname}")];
    let mut merged: Vec<String> = Vec::new();
    for variable in defaults.iter().chain(image).chain(request) {
        let name = variable.split('=').next().unwrap_or_default();
        let same = merged.iter_mut().find(|known| known.split('=').next() == Some(name));
        match same {
            Some(known) => known.clone_from(variable),
            None => merged.push(variable.clone()),
        }
    }
    merged
}

fn process(args: &[String], env: &[String], cwd: &str) -> Value {
    json!({
        "terminal": false,
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": env,
        "cwd": cwd,
    })
}

/// The baseline of `compare`: the image's files as root directory and nothing else but a cgroup to find it by.
fn process_spec(args: &[String], env: &[String], cwd: &str) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": process(args, env, cwd),
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [{"type": "mount"}]},
    })
}

/// All but the system-call policy.
fn container_spec(hostname: &str, request: &RunRequest, mut process: Value, mounts: Vec<Value>) -> Value {
    process["noNewPrivileges"] = true.into();
    process["rlimits"] = rlimits();
    process["capabilities"] =
        json!({"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES});
    json!({
        "ociVersion": "1.2.0",
        "process": process,
        "root": {"path": "rootfs", "readonly": request.read_only},
        "hostname": hostname,
        "mounts": mounts,
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"},
                {"type": "cgroup"},
            ],
            "resources": resources(request),
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys",
                "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list",
                "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// What makes a plain user root of its container, and of nothing else.
fn add_user_namespace(spec: &mut Value, users: &IdMaps) {
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "user"}));
    }
    spec["linux"]["uidMappings"] = json!(users.uids);
    spec["linux"]["gidMappings"] = json!(users.gids);
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        let is_bind = mount["type"] == "bind";
        let Some(options) = mount["options"].as_array_mut() else { continue };
        if is_bind {
            // No cgroup of root's forbids what device nodes in it open.
            options.push("nodev".into());
        }
        if !users.has_group(TTY_GROUP) {
            options.retain(|option| option != "gid=5");
        }
    }
}

/// Whose terminals are, in `default_mounts`.
const TTY_GROUP: u32 = 5;

/// The caller's own limits. A container on the host would inherit them anyway; a guest's kernel would derive other ones
/// from its own size.
fn rlimits() -> Value {
    let known = [
        ("RLIMIT_AS", Resource::As),
        ("RLIMIT_CORE", Resource::Core),
        ("RLIMIT_CPU", Resource::Cpu),
        ("RLIMIT_DATA", Resource::Data),
        ("RLIMIT_FSIZE", Resource::Fsize),
        ("RLIMIT_LOCKS", Resource::Locks),
        ("RLIMIT_MEMLOCK", Resource::Memlock),
        ("RLIMIT_MSGQUEUE", Resource::Msgqueue),
        ("RLIMIT_NICE", Resource::Nice),
        ("RLIMIT_NOFILE", Resource::Nofile),
        ("RLIMIT_NPROC", Resource::Nproc),
        ("RLIMIT_RSS", Resource::Rss),
        ("RLIMIT_RTPRIO", Resource::Rtprio),
        ("RLIMIT_RTTIME", Resource::Rttime),
        ("RLIMIT_SIGPENDING", Resource::Sigpending),
        ("RLIMIT_STACK", Resource::Stack),
    ];
    let limits = known.map(|(name, resource)| {
        let limit = getrlimit(resource);
        let or_infinity = |value: Option<u64>| value.unwrap_or(u64::MAX);
        json!({"type": name, "soft": or_infinity(limit.current), "hard": or_infinity(limit.maximum)})
    });
    limits.to_vec().into()
}

/// Docker's own, and then those of the request. What a container takes from the host, a guest finds in its share.
fn mounts(isolation: Isolation, sources: &[Source]) -> Vec<Value> {
    let Value::Array(mut all) = default_mounts() else { unreachable!("it is an array") };
    all.extend(sources.iter().map(|source| match (isolation, source.share) {
        (Isolation::Vm, Some(number)) => source.to_spec(&share_path(number)),
        _ => source.to_spec(&source.path),
    }));
    all
}

fn default_mounts() -> Value {
    json!([
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs",
            "options": ["nosuid", "noexec", "nodev", "ro"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["ro", "nosuid", "noexec", "nodev"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
    ])
}

fn resources(request: &RunRequest) -> Value {
    let mut resources = json!({"devices": devices()});
    if let Some(bytes) = request.memory_bytes {
        // Memory and swap together: no swap, as in a VM whose kernel has none.
        resources["memory"] = json!({"limit": bytes, "swap": bytes});
    }
    if let Some(millicpus) = request.millicpus {
        resources["cpu"] = json!({"quota": millicpus * CPU_PERIOD_US / 1000, "period": CPU_PERIOD_US});
    }
    if let Some(pids) = request.pids {
        resources["pids"] = json!({"limit": pids});
    }
    resources
}

/// No device but those of every container: null, zero, full, random, urandom, tty, console, ptmx, pts; nodes of any
/// kind may be made but not opened.
fn devices() -> Value {
    let mut rules = vec![
        json!({"allow": false, "access": "rwm"}),
        json!({"allow": true, "type": "c", "access": "m"}),
        json!({"allow": true, "type": "b", "access": "m"}),
    ];
    let characters = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)];
    for (major, minor) in characters {
        rules.push(json!({"allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm"}));
    }
    rules.push(json!({"allow": true, "type": "c", "major": 136, "access": "rwm"}));
    Value::Array(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(isolation: Isolation) -> RunRequest {
        RunRequest {
            image: "busybox".into(),
            isolation,
            require: None,
            command: vec!["true".into()],
            entrypoint: None,
            env: Vec::new(),
            workdir: None,
            user: None,
            hostname: None,
            name: None,
            interactive: false,
            remove: false,
            read_only: false,
            mounts: Vec::new(),
            memory_bytes: Some(64 << 20),
            millicpus: Some(1500),
            pids: Some(10),
            kernel: None,
        }
    }

    fn place(users: Option<&IdMaps>) -> Place<'_> {
        Place { cgroup: Path::new("/cloche/x"), users }
    }

    #[test]
    fn workload_of_both_isolations_is_the_same_spec() {
        let image = ImageConfiguration::default();
        let container =
            workload("0123456789ab", &request(Isolation::Container), &image, &[], &place(None)).unwrap();
        let vm = workload("0123456789ab", &request(Isolation::Vm), &image, &[], &place(None)).unwrap();
        assert_eq!(container.spec, vm.spec);
        let filters = [&container, &vm].map(|made| made.filter.as_ref().unwrap().to_bytes());
        assert_eq!(filters[0], filters[1]);
    }

    #[test]
    fn plain_users_workload_has_users_of_its_own_and_no_group_that_they_lack() {
        let one = serde_json::from_value(json!([{"containerID": 0, "hostID": 1000, "size": 1}])).unwrap();
        let users = IdMaps { uids: Vec::clone(&one), gids: one };
        let image = ImageConfiguration::default();
        let made = workload("x", &request(Isolation::Container), &image, &[], &place(Some(&users))).unwrap();
        let spec = serde_json::to_value(&made.spec).unwrap();
        assert_eq!(spec["linux"]["uidMappings"][0]["hostID"], 1000);
        assert!(!spec["mounts"].to_string().contains("gid=5"));
        assert!(spec["linux"]["namespaces"].to_string().contains("user"));
    }

    #[test]
    fn workload_limits_reach_the_spec() {
        let made = workload("x", &request(Isolation::Vm), &ImageConfiguration::default(), &[], &place(None))
            .unwrap();
        let spec = serde_json::to_value(&made.spec).unwrap();
        let resources = &spec["linux"]["resources"];
        assert_eq!(resources["memory"]["limit"], 64 << 20);
        assert_eq!(resources["cpu"]["quota"], 150_000);
        assert_eq!(resources["pids"]["limit"], 10);
    }

    #[test]
    fn environment_request_wins_over_image_and_defaults() {
        let merged = environment("h", &["PATH=/image".into(), "A=1".into()], &["A=2".into(), "B".into()]);
        assert_eq!(merged, ["PATH=/image", "HOSTNAME=h", "A=2", "B"]);
    }

    #[test]
    fn arguments_follow_docker() {
        let config: oci_spec::image::Config =
            serde_json::from_value(json!({"Entrypoint": ["/e"], "Cmd": ["c"]})).unwrap();
        let mut asked = request(Isolation::Vm);
        assert_eq!(arguments(&asked, Some(&config)), ["/e", "true"]);
        asked.command.clear();
        assert_eq!(arguments(&asked, Some(&config)), ["/e", "c"]);
        asked.entrypoint = Some("/other".into());
        assert_eq!(arguments(&asked, Some(&config)), ["/other"]);
    }
}
