//! Bundles of busybox, and the runtime under test: `cloche` (that of `CLOCHE_BIN`, if set) by another name, which is
//! `cloche-vm` if `CLOCHE_TEST_ISOLATION` is `vm`; or the program in `CLOCHE_TEST_RUNTIME`.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 23] = [
    "sh", "cat", "echo", "sleep", "true", "false", "id", "ls", "ps", "kill", "mount", "head", "touch", "env",
    "stty", "tty", "readlink", "pwd", "cp", "mkdir", "chmod", "hostname", "test",
];

/// Whether containers are in virtual machines.
pub fn in_vm() -> bool {
    std::env::var_os("CLOCHE_TEST_ISOLATION").is_some_and(|isolation| isolation == "vm")
}

/// What the runtime under test is called.
pub fn name() -> &'static str {
    if in_vm() { "cloche-vm" } else { "cloche-container" }
}

/// The program that is the runtime, by that name.
pub fn program() -> PathBuf {
    std::env::var_os("CLOCHE_BIN").map_or_else(|| env!("CARGO_BIN_EXE_cloche").into(), PathBuf::from)
}

/// What these tests lack here.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".into());
    }
    (!Path::new(BUSYBOX).exists()).then(|| format!("needs {BUSYBOX} (install busybox-static)"))
}

/// A bundle and a directory for the state of containers made of it.
pub struct Bundle {
    directory: TempDir,
    /// Where the state of containers is.
    state: PathBuf,
    pub id: String,
    pub config: Value,
}

impl Bundle {
    /// One that runs a shell script.
    pub fn script(script: &str) -> Self {
        Self::new(&["sh", "-c", script])
    }

    pub fn new(command: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("rootfs");
        for name in ["bin", "etc", "tmp", "proc"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        let id = format!("oci-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let state = directory.path().join("state");
        Self { directory, state, id, config: config(command) }
    }

    /// Beside the container of another bundle, which has to outlive it.
    pub fn beside(mut self, other: &Self) -> Self {
        self.state.clone_from(&other.state);
        self
    }

    /// Changes the configuration at a JSON pointer whose parent is there.
    pub fn with(mut self, pointer: &str, value: Value) -> Self {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        match self.config.pointer_mut(parent).unwrap_or_else(|| panic!("{parent} is not there")) {
            Value::Array(list) if name == "-" => list.push(value),
            Value::Array(list) => list[name.parse::<usize>().unwrap()] = value,
            parent => parent[name] = value,
        }
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The runtime, with state in this bundle's directory; not run yet.
    pub fn command(&self, words: &[&str]) -> Command {
        self.command_of(runtime(), words)
    }

    /// As [`Bundle::command`], of another runtime.
    pub fn command_of(&self, mut command: Command, words: &[&str]) -> Command {
        fs::write(self.path("config.json"), self.config.to_string()).unwrap();
        command.arg("--root").arg(&self.state).args(words);
        command.current_dir(self.directory.path()).stdin(Stdio::null());
        command
    }

    /// What came of a verb.
    pub fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// The output of a verb that succeeds.
    #[track_caller]
    pub fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        text(&output.stdout)
    }

    /// The message of a verb that fails.
    #[track_caller]
    pub fn refused(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(!output.status.success(), "{words:?} succeeded: {output:?}");
        text(&output.stderr)
    }

    /// Creates the container with its output in a file, as an engine has a log; without holding pipes of this process.
    #[track_caller]
    pub fn create(&self) {
        let output = fs::File::create(self.path("output")).unwrap();
        let errors = fs::File::create(self.path("errors")).unwrap();
        let status = self.command(&["create", &self.id]).stdout(output).stderr(errors).status().unwrap();
        assert!(status.success(), "create: {}", self.errors());
    }

    /// Creates and starts it.
    #[track_caller]
    pub fn start(&self) {
        self.create();
        self.ok(&["start", &self.id]);
    }

    pub fn output(&self) -> String {
        fs::read_to_string(self.path("output")).unwrap()
    }

    pub fn errors(&self) -> String {
        fs::read_to_string(self.path("errors")).unwrap()
    }

    /// The state that the runtime tells.
    #[track_caller]
    pub fn state(&self) -> Value {
        serde_json::from_str(&self.ok(&["state", &self.id])).unwrap()
    }

    #[track_caller]
    pub fn status(&self) -> String {
        self.state()["status"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub fn await_status(&self, status: &str) {
        await_that(&format!("{} is {status}", self.id), || self.status() == status);
    }

    /// Waits until its output has a line.
    #[track_caller]
    pub fn await_output(&self, line: &str) {
        await_that(&format!("the output has {line:?}"), || self.output().lines().any(|found| found == line));
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.command(&["delete", "--force", &self.id]).stderr(Stdio::null()).status();
    }
}

#[track_caller]
pub fn await_that(what: &str, mut is_so: impl FnMut() -> bool) {
    // Emulated machines are slow.
    let deadline = Instant::now() + Duration::from_secs(if in_vm() { 60 } else { 20 });
    while !is_so() {
        assert!(Instant::now() < deadline, "it does not come to be that {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}

/// Whether a program is there; says so if not, and fails where `CLOCHE_TESTS_REQUIRE_ENGINES` is set.
pub fn has(program: &str, package: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|directory| directory.join(program).exists());
    if !found {
        assert!(std::env::var_os("CLOCHE_TESTS_REQUIRE_ENGINES").is_none(), "{program} is not there");
        eprintln!("not run: needs {program} (install {package})");
    }
    found
}

/// More of busybox's applets in a bundle's root file system.
pub fn link_applets(bundle: &Bundle, applets: &[&str]) {
    for applet in applets {
        symlink("busybox", bundle.path("rootfs/bin").join(applet)).unwrap();
    }
}

/// Lets users of a namespace reach the root file system.
pub fn open_to_all(bundle: &Bundle) {
    for path in [bundle.path(""), bundle.path("rootfs")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

fn runtime() -> Command {
    match std::env::var_os("CLOCHE_TEST_RUNTIME") {
        Some(other) => Command::new(other),
        None => {
            let mut command = Command::new(program());
            command.arg0(name());
            command
        }
    }
}

/// What a container could leave on this machine.
pub fn traces() -> Vec<String> {
    let ours = format!("oci-test-{}-", std::process::id());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut found: Vec<String> = mounts.lines().map(str::to_owned).collect();
    let list = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in list(Path::new("/sys/fs/cgroup")).chain([PathBuf::from("/sys/fs/cgroup")]) {
        let left = list(&hierarchy.join("cloche")).map(|path| path.display().to_string());
        found.extend(left.filter(|path| path.contains(&ours)));
    }
    found
}

fn config(command: &[&str]) -> Value {
    let capabilities = json!(["CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETUID", "CAP_SETGID", "CAP_CHOWN"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": command,
            "env": ["PATH=/bin", "TERM=xterm"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
        },
        "root": { "path": "rootfs" },
        "hostname": "bell",
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
        ],
        "annotations": { "org.example.note": "kept" },
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys"],
        },
    })
}
