//! A busybox root file system, specs in the manner of Docker's default, and what a container leaves.

use std::{
    fs,
    io::Read,
    os::{fd::OwnedFd, unix::fs::symlink},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use cloche_runtime::{Container, Exit, ExitStatus, Launch, LaunchError, Oci, Rootfs, Stdio, launch};
use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use tempfile::TempDir;

pub const BUSYBOX: &str = "/bin/busybox";

const APPLETS: [&str; 30] = [
    "cat", "chmod", "dd", "echo", "env", "false", "head", "hostname", "id", "ifconfig", "kill", "ln", "ls",
    "mkdir", "mknod", "mount", "ps", "pwd", "rm", "sh", "sleep", "stat", "tail", "touch", "true", "umount",
    "umask", "wc", "readlink", "tr",
];

/// A container to be started: a root file system and a spec.
pub struct Sandbox {
    pub directory: TempDir,
    pub spec: Value,
    pub rootfs: Rootfs,
    pub id: String,
    pub stdin: String,
    pub user: Option<&'static str>,
    pub approve: Option<&'static dyn Fn(i32) -> bool>,
}

/// What came of a container.
#[derive(Debug)]
pub struct Outcome {
    pub exit: Exit,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Its output, if all went well.
    #[track_caller]
    pub fn success(self) -> String {
        assert_eq!(self.exit.status, ExitStatus::Code(0), "{self:?}");
        self.stdout.trim_end().to_owned()
    }
}

impl Sandbox {
    /// A container that runs `command`.
    pub fn new(command: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("rootfs");
        populate(&root);
        let id = format!("test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self {
            spec: spec(command),
            rootfs: Rootfs::Directory(root),
            directory,
            id,
            stdin: String::new(),
            user: None,
            approve: None,
        }
    }

    /// A container that runs a shell script.
    pub fn script(script: &str) -> Self {
        Self::new(&["sh", "-c", script])
    }

    /// Changes the spec at a JSON pointer, e.g. `/process/cwd`. The parent must be there; `/-` appends to a list.
    pub fn with(mut self, pointer: &str, value: Value) -> Self {
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        match self.spec.pointer_mut(parent).unwrap_or_else(|| panic!("{parent} is not in the spec")) {
            Value::Array(list) if name == "-" => list.push(value),
            parent => parent[name] = value,
        }
        self
    }

    /// A file of the root file system.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.directory.path().join("rootfs").join(inside.trim_start_matches('/'))
    }

    pub fn cgroup_path(&self) -> PathBuf {
        Path::new("/cloche").join(&self.id)
    }

    /// Starts it with pipes for stdout and stderr.
    pub fn start(&self) -> Result<Running<'_>, LaunchError> {
        let spec: Spec = serde_json::from_value(self.spec.clone()).unwrap();
        let (stdin, stdin_writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (stdout, stdout_writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let (stderr, stderr_writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        rustix::io::write(&stdin_writer, self.stdin.as_bytes()).unwrap();
        let stdio = Stdio { stdin, stdout: stdout_writer, stderr: stderr_writer };
        let rootfs = self.rootfs.clone();
        let container = launch(Launch {
            id: &self.id,
            spec: &spec,
            user: self.user,
            filter: None,
            rootfs,
            stdio,
            kill_on_parent_death: true,
            approve: self.approve,
            oci: Oci::default(),
        })?;
        Ok(Running { container, stdout, stderr, _files: &self.directory })
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn run(&self) -> Outcome {
        match self.start() {
            Ok(running) => running.finish(),
            Err(error) => panic!("{}", chain(&error)),
        }
    }

    /// Runs it to its end, and expects that it could not be started.
    #[track_caller]
    pub fn refusal(&self) -> (u8, String) {
        match self.start() {
            Ok(running) => panic!("it started: {:?}", running.finish()),
            Err(error) => (error.exit_code(), chain(&error)),
        }
    }
}

/// A started container.
pub struct Running<'a> {
    pub container: Container,
    /// What it runs on, which must not be removed before its end.
    _files: &'a TempDir,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Running<'_> {
    /// Waits for the first line of its output.
    pub fn read_line(&self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        while rustix::io::read(&self.stdout, &mut byte).unwrap() == 1 && byte != *b"\n" {
            line.push(byte[0]);
        }
        String::from_utf8(line).unwrap()
    }

    /// Waits for its end and removes it.
    pub fn finish(mut self) -> Outcome {
        let exit = self.container.wait().unwrap();
        self.container.delete().unwrap();
        let read = |fd: OwnedFd| {
            let mut text = Vec::new();
            fs::File::from(fd).read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        };
        Outcome { exit, stdout: read(self.stdout), stderr: read(self.stderr) }
    }
}

/// An error with all its causes, as the command line prints it.
pub fn chain(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(chain);
    cause.map_or(error.to_string(), |cause| format!("{error}: {cause}"))
}

/// Makes a root file system of busybox.
pub fn populate(root: &Path) {
    for name in ["bin", "etc", "tmp", "proc"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n")
        .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nme:x:1000:\nmore:x:2000:\n").unwrap();
}

/// A spec like the one that Docker makes by default, with a short seccomp policy.
pub fn spec(command: &[&str]) -> Value {
    let capabilities = json!([
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
    ]);
    json!({
        "ociVersion": "1.2.0",
        "hostname": "bell",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": command,
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                "inheritable": [], "ambient": [],
            },
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
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
                "options": ["ro", "nosuid", "noexec", "nodev"],
            },
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                { "type": "cgroup" },
            ],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "maskedPaths": ["/proc/keys", "/proc/sys/fs", "/proc/kcore", "/sys/firmware", "/nowhere"],
            "readonlyPaths": ["/proc/sys", "/proc/bus", "/nowhere"],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [
                    { "names": ["sethostname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
                    { "names": ["kill"], "action": "SCMP_ACT_ERRNO",
                      "args": [{ "index": 1, "op": "SCMP_CMP_EQ", "value": 10 }] },
                ],
            },
        },
    })
}

/// Finds a program on this machine.
pub fn find_command(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let directories = path.split(':').chain(["/usr/sbin", "/sbin"]).map(PathBuf::from);
    directories.map(|directory| directory.join(name)).find(|path| path.exists())
}

/// Whether this process has CAP_SYS_RESOURCE (capabilities(7)).
pub fn may_raise_limits() -> bool {
    const SYS_RESOURCE: u64 = 1 << 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let held = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    u64::from_str_radix(held, 16).unwrap() & SYS_RESOURCE != 0
}

/// What a container could leave on this machine.
#[derive(Debug, PartialEq, Eq)]
pub struct Traces {
    mounts: String,
    loop_devices: Vec<PathBuf>,
    cgroups: Vec<PathBuf>,
    descriptors: usize,
}

impl Traces {
    pub fn take() -> Self {
        let list = |path: &str| -> Vec<PathBuf> {
            fs::read_dir(path).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
        };
        let is_ours = |path: &PathBuf| {
            path.file_name().unwrap().to_string_lossy().starts_with(&format!("test-{}-", std::process::id()))
        };
        let hierarchies = list("/sys/fs/cgroup").into_iter().chain([PathBuf::from("/sys/fs/cgroup")]);
        let cgroups = hierarchies.flat_map(|hierarchy| list(&hierarchy.join("cloche").to_string_lossy()));
        Self {
            mounts: fs::read_to_string("/proc/self/mountinfo").unwrap(),
            loop_devices: list("/sys/block")
                .into_iter()
                .filter(|path| path.join("loop/backing_file").exists())
                .collect(),
            cgroups: cgroups.filter(is_ours).collect(),
            descriptors: list("/proc/self/fd").len(),
        }
    }

    /// Whether all is as it was. A loop device is let go of by the kernel a moment after its mount is gone.
    pub fn compare(self, before: &Self) -> Result<(), String> {
        let mut now = self;
        for _ in 0..100 {
            if now == *before {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
            now = Self::take();
        }
        Err(format!("left behind: before {before:#?}, after {now:#?}"))
    }
}
