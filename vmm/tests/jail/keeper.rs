//! The two processes of a trial besides the test itself: a keeper, which is to the VMM what a monitor is, and the
//! inmate, which locks itself in.
//!
//! ```text
//!   test ──▶ keeper: PID namespace, sockets ──▶ inmate: PID 1, jail, VM or hostile code
//! ```

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            net::{UnixListener, UnixStream},
            process::ExitStatusExt,
        },
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use cloche_vmm::{Event, Jail, VmConfig, config::VsockPort, jail::ThreadKind, jail::table::Table};
use serde::{Deserialize, Serialize};

use crate::{
    conditions,
    hostile::{self, Probe},
    workloads,
};

/// What an inmate is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Task {
    /// Run a workload of [`workloads::ALL`], with one allowance of the table less or none.
    Vm { workload: String, without: Option<(usize, ThreadKind)> },
    /// Run code of [`hostile`] on a thread of this kind, as if the VMM had been taken over.
    Probe { probe: Probe, thread: ThreadKind, without: Option<(usize, ThreadKind)> },
}

/// How it went.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// The VMM's events.
    pub events: Vec<Event>,
    /// Whatever else it said.
    pub words: Vec<String>,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// Its exit code.
    pub code: Option<i32>,
}

impl Report {
    /// The call and the thread that the filter killed it for.
    pub fn violation(&self) -> Option<(u32, ThreadKind)> {
        self.events.iter().find_map(|event| match event {
            Event::Seccomp { call, thread } => Some((*call, *thread)),
            _ => None,
        })
    }
}

/// Runs a task in processes of its own.
pub fn run(task: &Task, user: User) -> Result<Report, Box<dyn std::error::Error>> {
    // On a disk, where /tmp may be in memory: that is another path through a block device.
    let folder = tempfile::tempdir_in("/var/tmp")?;
    // A plain user must reach it when tests run as root.
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let output = Command::new(std::env::current_exe()?)
        .arg(match user {
            User::Own => "keeper",
            User::Plain => "plain-keeper",
        })
        .arg(serde_json::to_string(task)?)
        .arg(folder.path())
        .stdin(Stdio::null())
        .output()?;
    let _ = fs::remove_file(workloads::in_memory(folder.path()));
    let told = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&told).map_err(|_| {
        format!("no report: {}; {told}; {}", output.status, String::from_utf8_lossy(&output.stderr)).into()
    })
}

/// Who the keeper is.
#[derive(Debug, Clone, Copy)]
pub enum User {
    /// Whoever runs the tests.
    Own,
    /// A user without any privileges, who may open `/dev/kvm`. Needs root.
    Plain,
}

/// A keeper's main function that first becomes a plain user, with a `/dev/kvm` that everybody can open.
pub fn plain_keeper(task: &str, folder: &Path) -> io::Result<()> {
    use rustix::{
        fs::{CWD, FileType, Mode, mknodat},
        mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change},
        thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
    };
    #[allow(unsafe_code)]
    // SAFETY: descriptors stay shared, which is what could go wrong.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    if let Ok(device) = fs::metadata("/dev/kvm") {
        let number = std::os::unix::fs::MetadataExt::rdev(&device);
        // The place of the node is covered by the time anybody else looks.
        let place = folder.join("device");
        fs::create_dir(&place)?;
        mount("tmpfs", &place, "tmpfs", MountFlags::empty(), None)?;
        let node = place.join("kvm");
        mknodat(CWD, &node, FileType::CharacterDevice, Mode::from_raw_mode(0o666), number)?;
        fs::set_permissions(&node, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        mount_bind(&node, "/dev/kvm")?;
    }
    const NOBODY_SPECIAL: u32 = 54_321;
    let (uid, gid) =
        (rustix::process::Uid::from_raw(NOBODY_SPECIAL), rustix::process::Gid::from_raw(NOBODY_SPECIAL));
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)?;
    keeper(task, folder)
}

/// The keeper's main function.
pub fn keeper(task: &str, folder: &Path) -> io::Result<()> {
    enter_new_pid_namespace()?;
    // Something that an inmate must not get.
    let forgotten = fs::File::open("/proc/self/exe")?;
    rustix::io::fcntl_setfd(&forgotten, rustix::io::FdFlags::empty())?;
    let task: Task = serde_json::from_str(task)?;
    let (mut ours, theirs) = UnixStream::pair()?;
    theirs.set_nonblocking(true)?;
    let control = folder.join("control");
    let listener = UnixListener::bind(&control)?;
    // The inmate inherits them under the same numbers.
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty())?;
    let mut inmate = Command::new("/proc/self/exe")
        .arg("inmate")
        .arg(serde_json::to_string(&task)?)
        .arg(folder)
        .arg(theirs.as_raw_fd().to_string())
        .arg(listener.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop((theirs, listener));
    let mut text = String::new();
    match &task {
        Task::Vm { workload, .. } => workloads::keep(workload, &mut ours, &inmate, &control)?,
        Task::Probe { probe: Probe::Wait, .. } => text = look_at(&mut inmate)?,
        Task::Probe { .. } => {}
    }
    drop(ours);
    inmate.stdout.take().map(|mut stdout| stdout.read_to_string(&mut text)).transpose()?;
    inmate.stderr.take().map(|mut stderr| stderr.read_to_string(&mut text)).transpose()?;
    let status = inmate.wait()?;
    let mut report = Report { events: vec![], words: vec![], signal: status.signal(), code: status.code() };
    for line in text.lines().filter(|line| !line.is_empty()) {
        match serde_json::from_str(line) {
            Ok(event) => report.events.push(event),
            Err(_) => report.words.push(line.into()),
        }
    }
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// What /proc says of an inmate that has closed its jail.
fn look_at(inmate: &mut Child) -> io::Result<String> {
    let mut ready = [0; 6];
    inmate.stdout.as_mut().map(|stdout| stdout.read_exact(&mut ready)).transpose()?;
    let folder = Path::new("/proc").join(inmate.id().to_string());
    let mut seen = fs::read_to_string(folder.join("status"))?;
    seen += &fs::read_to_string(folder.join("limits"))?;
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        // A PID namespace is only its children's, not the keeper's own.
        let (its, own) =
            (fs::read_link(folder.join("ns").join(kind))?, Path::new("/proc/self/ns").join(kind));
        seen += &format!("{kind} {}\n", if its == fs::read_link(own)? { "shared" } else { "apart" });
    }
    let namespace = fs::metadata(folder.join("ns/pid"))?;
    seen += &format!("namespace {}\n", std::os::unix::fs::MetadataExt::ino(&namespace));
    for entry in fs::read_dir(folder.join("fd"))? {
        seen += &format!("open {}\n", fs::read_link(entry?.path())?.display());
    }
    Ok(seen)
}

fn enter_new_pid_namespace() -> io::Result<()> {
    let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
    let mut namespaces = rustix::thread::UnshareFlags::NEWPID;
    if !uid.is_root() {
        namespaces |= rustix::thread::UnshareFlags::NEWUSER;
    }
    #[allow(unsafe_code)]
    // SAFETY: descriptors stay shared, which is what could go wrong.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }?;
    if !uid.is_root() {
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("0 {} 1", uid.as_raw()))?;
        fs::write("/proc/self/gid_map", format!("0 {} 1", gid.as_raw()))?;
    }
    Ok(())
}

/// The inmate's main function: what it does in the jail comes out on its standard output.
pub fn inmate(
    task: &str,
    folder: &Path,
    socket: i32,
    listener: i32,
) -> Result<(), Box<dyn std::error::Error>> {
    match serde_json::from_str(task)? {
        Task::Vm { workload, without } => {
            let table = without.map_or_else(Table::default, |(index, kind)| Table::without(index, kind));
            let kernel = folder.join("kernel");
            let mut config = VmConfig::new(1, 32, &kernel);
            config.start_timeout_ms = Some(5000);
            config.events_fd = Some(1);
            config.control_fd = Some(listener);
            let guest = workloads::configure(&workload, &mut config, folder, socket)?;
            fs::write(&kernel, guest.elf())?;
            if let Some(vsock) = &mut config.vsock {
                vsock.ports = vec![VsockPort { port: 7, fd: socket }];
            }
            conditions::apply(&workload)?;
            // How the VM ended is in the events.
            let _ = cloche_vmm::run(config, b"embedded", Jail::with_table(table));
            Ok(())
        }
        Task::Probe { probe, thread, without } => {
            let table = without.map_or_else(Table::default, |(index, kind)| Table::without(index, kind));
            hostile::run(&probe, thread, table, &[listener, socket])
        }
    }
}

/// Reads what the guest sends until it has `bytes`, slowly.
pub fn receive(from: &mut UnixStream, bytes: usize) -> io::Result<usize> {
    from.set_read_timeout(Some(Duration::from_secs(3)))?;
    let mut buffer = vec![0; 1 << 20];
    let mut received = 0;
    while received < bytes {
        match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => received += count,
        }
    }
    Ok(received)
}

/// Sends bytes to the guest; nobody may be there.
pub fn send(to: &mut UnixStream, bytes: &[u8]) {
    let _ = to.write_all(bytes);
}
