//! One hostile guest in a VMM process of its own, and what that process took.
//!
//! ```text
//!   test ── this binary again, with a kernel's path ──▶ VMM process: cloche_vmm::run, watched from a thread
//!        ◀── a line of JSON, its log, its exit status ──
//! ```

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use cloche_vmm::{
    Jail, VmConfig,
    config::{ConsoleConfig, DiskConfig, NetConfig, PmemConfig, VsockConfig},
};
use libtest_mimic::Failed;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use serde::{Deserialize, Serialize};

use crate::{
    allocator,
    driver::{ADDED_BYTES, ANSWERED, BABBLED, ECHO, Guest, INSULT, REQUESTED_BLOCKS, SERVED},
};

/// By which this program knows that it is to be the VMM.
pub const VMM_ARGUMENT: &str = "--hostile-guest";

/// Whatever the guest does, its machine has ended after this.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a VMM process may take over what it had before the guest ran.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub heap_bytes: usize,
    pub fds: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // Most of it is the machine itself: eventfds, vCPUs, the console's 64 KiB, two frames of 64 KiB.
        Self { heap_bytes: 320 << 10, fds: 90 }
    }
}

/// What the VMM process says of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    /// How `cloche_vmm::run` ended.
    end: End,
    heap_growth: usize,
    fds_before: usize,
    fds_at_most: usize,
    fds_after: usize,
    threads_before: usize,
    threads_at_most: usize,
    threads_after: usize,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    Exit(u32),
    TripleFault,
    Other(String),
}

/// A guest that ran.
pub struct Ended {
    pub end: End,
    /// The VMM's log.
    pub log: String,
    /// Bytes that the host took of streams.
    pub served_bytes: usize,
}

/// How a guest is run.
pub struct Setting {
    pub vcpus: u8,
    pub limits: Limits,
    pub host: Host,
}

/// What listens on the host's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// Connections wait to be taken, until there are too many.
    Listens,
    /// The first connection is taken and, when it is full, read to its end.
    ReadsSlowly,
    /// All are taken and dropped.
    TakesAll,
    /// Programs of the host open this many streams into the guest, each once the one before is let in, and then
    /// [`UNANSWERED`] that the guest ignores. They take what comes when all are there, after a while.
    Dials(u32),
}

/// Streams into the guest that nobody answers.
pub const UNANSWERED: usize = 200;

impl Default for Setting {
    fn default() -> Self {
        Self { vcpus: 1, limits: Limits::default(), host: Host::Listens }
    }
}

/// Runs a guest and checks its VMM process.
pub fn run(guest: &Guest, setting: &Setting) -> Result<Ended, Failed> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("kernel"), guest.image())?;
    let mut disk = b"SECTOR00".to_vec();
    disk.resize(64 << 10, 0x5a);
    fs::write(folder.path().join("disk"), disk)?;
    let (ours, theirs) = UnixStream::pair()?;
    theirs.set_nonblocking(true)?;
    // The VMM inherits it under the same number.
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
    let dialled = UnixListener::bind(folder.path().join("vsock"))?;
    rustix::io::fcntl_setfd(&dialled, rustix::io::FdFlags::empty())?;
    let (file_server, files) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::fcntl_setfd(&files, rustix::io::FdFlags::empty())?;
    let serving_files = thread::spawn(move || serve_files(&file_server));
    let cable = UnixListener::bind(folder.path().join("net"))?;
    let echoing = thread::spawn(move || echo(&cable));
    let served = Arc::new(AtomicUsize::new(0));
    let ended = Arc::new(AtomicBool::new(false));
    let serving = {
        let (served, host) = (served.clone(), setting.host);
        let ended = ended.clone();
        let programs = folder.path().join("vsock");
        thread::spawn(move || serve(ours, host, &programs, &served, &ended))
    };

    let mut child = Command::new(std::env::current_exe()?)
        .args([VMM_ARGUMENT, &setting.vcpus.to_string()])
        .arg(folder.path())
        .arg(theirs.as_raw_fd().to_string())
        .arg(dialled.as_raw_fd().to_string())
        .arg(files.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop((theirs, dialled, files));
    let output = reader(child.stdout.take());
    let errors = reader(child.stderr.take());
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Err(format!("the VMM hangs; its log: {}", text(errors)).into());
        }
        thread::sleep(Duration::from_millis(5));
    };
    let (output, log) = (text(output), text(errors));
    if !status.success() {
        return Err(format!("the VMM died ({status}); its log: {log}").into());
    }
    ended.store(true, Ordering::Relaxed);
    // It has ended, unless the VMM never came to it.
    drop(UnixStream::connect(folder.path().join("net")));
    echoing.join().map_err(|_| "the cable's other end failed")?;
    serving.join().map_err(|_| "the server failed")?;
    serving_files.join().map_err(|_| "the file server failed")?;
    let report: Report =
        serde_json::from_str(&output).map_err(|error| format!("{error}: {output:?} {log}"))?;
    check(&report, setting).map_err(|problem| format!("{problem}; {report:?}; its log: {log}"))?;
    Ok(Ended { end: report.end, log, served_bytes: served.load(Ordering::Relaxed) })
}

fn check(report: &Report, setting: &Setting) -> Result<(), String> {
    let limits = setting.limits;
    if report.heap_growth > limits.heap_bytes {
        return Err(format!("its memory grew by {} bytes", report.heap_growth));
    }
    if report.fds_at_most > report.fds_before + limits.fds {
        return Err(format!("it had {} file descriptors", report.fds_at_most));
    }
    if report.fds_after > report.fds_before {
        return Err("file descriptors were left open".into());
    }
    // Besides its vCPUs' there are the disk's, the one that makes the VM, and one of KVM's own.
    if report.threads_at_most > report.threads_before + usize::from(setting.vcpus) + 3 {
        return Err(format!("it had {} threads", report.threads_at_most));
    }
    if report.threads_after > report.threads_before {
        return Err("threads were left".into());
    }
    Ok(())
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn text(reader: thread::JoinHandle<String>) -> String {
    reader.join().unwrap_or_default()
}

/// The other end of the network cable: frames that ask for it go back. All others are dropped, since a guest that
/// takes none back would stop what it sends.
fn echo(listener: &UnixListener) {
    let Ok((mut stream, _)) = listener.accept() else { return };
    loop {
        let mut length = [0; 4];
        if stream.read_exact(&mut length).is_err() {
            return;
        }
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        if stream.read_exact(&mut frame).is_err() {
            return;
        }
        let asks = frame.starts_with(&ECHO.to_le_bytes());
        if asks && stream.write_all(&[length.as_slice(), &frame].concat()).is_err() {
            return;
        }
    }
}

/// A file server that has no files, and no manners.
fn serve_files(socket: &OwnedFd) {
    let mut message = vec![0; 1 << 20];
    while let Ok((length @ 1.., _)) = recv(socket, message.as_mut_slice(), RecvFlags::empty()) {
        let Some(header) = message.get(..length).and_then(|message| message.first_chunk::<40>()) else {
            return;
        };
        let [opcode, number] = [&header[4..8], &header[8..16]];
        // Length, error, number, and so many bytes more.
        let reply = |number: &[u8], more: usize| {
            let words = [16 + more as u32, 0].map(u32::to_le_bytes).concat();
            [words, number.to_vec(), vec![0xa5; more]].concat()
        };
        let replies = match u32::from_le_bytes(opcode.try_into().unwrap_or_default()) {
            ANSWERED => vec![reply(number, 0)],
            BABBLED => vec![
                reply(&[0xff; 8], 0),
                reply(&[0; 8], 100_000),
                reply(&u64::from(u32::MAX).to_le_bytes(), 1),
                reply(number, 100_000),
                reply(number, 0),
            ],
            INSULT => vec![vec![1; 5]],
            _ => vec![],
        };
        for reply in replies {
            if send(socket, &reply, SendFlags::NOSIGNAL).is_err() {
                return;
            }
        }
    }
}

fn serve(mut stream: UnixStream, host: Host, programs: &Path, served: &AtomicUsize, ended: &AtomicBool) {
    match host {
        Host::Dials(count) => served.store(dial(programs, count), Ordering::Relaxed),
        Host::Listens => {
            while !ended.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(5));
            }
        }
        Host::ReadsSlowly => {
            thread::sleep(Duration::from_millis(300));
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes);
            served.store(bytes.len(), Ordering::Relaxed);
        }
        Host::TakesAll => {
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
    }
}

/// Opens the streams, and returns how many bytes came on all of them.
fn dial(programs: &Path, count: u32) -> usize {
    let connect = || -> std::io::Result<UnixStream> {
        let mut stream = UnixStream::connect(programs)?;
        stream.write_all(b"CONNECT 52\n")?;
        Ok(stream)
    };
    let mut streams = Vec::new();
    for _ in 0..count {
        let Ok(mut stream) = connect() else { break };
        let mut byte = [0];
        // "OK", and the port that the stream comes from.
        while stream.read_exact(&mut byte).is_ok() && byte != *b"\n" {}
        streams.push(stream);
    }
    let unanswered: Vec<_> = (0..UNANSWERED).map_while(|_| connect().ok()).collect();
    thread::sleep(Duration::from_millis(500));
    let mut bytes = Vec::new();
    for mut stream in streams {
        // One that was reset has nothing more to say.
        let _ = stream.read_to_end(&mut bytes);
    }
    drop(unanswered);
    bytes.len()
}

/// The VMM process: `VCPUS FOLDER SOCKET LISTENER FILES` are its arguments.
pub fn vmm(
    vcpus: &str,
    folder: &Path,
    socket: &str,
    listener: &str,
    files: &str,
) -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    // A panic in any thread is the end, and a failed test.
    let report_panic = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report_panic(panic);
        std::process::abort();
    }));
    let config = config(vcpus.parse()?, folder, socket.parse()?, listener.parse()?, files.parse()?);
    let watch = Watch::new();
    let (fds_before, threads_before) = (count("fd"), count("task"));
    let before = allocator::live();
    let ran = cloche_vmm::run(config, b"", Jail::none());
    let heap_growth = allocator::peak().saturating_sub(before);
    // It opens a descriptor whenever it counts them.
    let (fds_at_most, threads_at_most) = watch.stop();
    // A disk's thread is told to end, and nobody waits for it.
    let patience = Instant::now() + Duration::from_secs(5);
    while (count("fd") > fds_before || count("task") > threads_before) && Instant::now() < patience {
        thread::sleep(Duration::from_millis(1));
    }
    let report = Report {
        end: match ran {
            Ok(cloche_vmm::ExitReason::GuestExit { code }) => End::Exit(code),
            Ok(cloche_vmm::ExitReason::TripleFault) => End::TripleFault,
            Ok(other) => End::Other(other.to_string()),
            Err(error) => End::Other(format!("{error}: {:?}", std::error::Error::source(&error))),
        },
        heap_growth,
        fds_before,
        fds_after: count("fd"),
        threads_before,
        threads_after: count("task"),
        fds_at_most,
        threads_at_most,
    };
    Ok(std::io::stdout().write_all(&serde_json::to_vec(&report)?)?)
}

fn config(vcpus: u8, folder: &Path, socket: i32, listener: i32, files: i32) -> VmConfig {
    let mut config = VmConfig::new(vcpus, 32, folder.join("kernel"));
    // JSON, so that fields which a test does not care about may come and go.
    let disk = serde_json::json!({ "path": folder.join("disk"), "id": "disk" });
    config.disks = serde_json::from_value::<DiskConfig>(disk).into_iter().collect();
    let ports = serde_json::json!([{ "port": SERVED, "fd": socket }]);
    let vsock = serde_json::json!({ "guest_cid": 3, "listen_fd": listener, "ports": ports });
    config.vsock = serde_json::from_value::<VsockConfig>(vsock).ok();
    let net = serde_json::json!({
        "backend": { "socket-path": folder.join("net") },
        "mac": "02:00:00:00:00:01",
    });
    config.nets = serde_json::from_value::<NetConfig>(net).into_iter().collect();
    config.rng = true;
    let balloon = serde_json::json!({ "free_page_reporting": true, "statistics_interval_s": 1 });
    config.balloon = serde_json::from_value(balloon).ok();
    config.share = serde_json::from_value(serde_json::json!({ "tag": "files", "socket_fd": files })).ok();
    let memory = serde_json::json!({ "size_mib": ADDED_BYTES >> 20, "requested_mib": 4 * REQUESTED_BLOCKS });
    config.memory_device = serde_json::from_value(memory).ok();
    config.console = Some(ConsoleConfig::default());
    let pmem = serde_json::json!({ "path": folder.join("disk"), "read_only": true });
    config.pmems = serde_json::from_value::<PmemConfig>(pmem).into_iter().collect();
    config
}

/// Entries of a directory of `/proc/self`, the one that reading it opens not counted.
fn count(what: &str) -> usize {
    let entries = fs::read_dir(PathBuf::from("/proc/self").join(what)).map_or(0, Iterator::count);
    entries - usize::from(what == "fd")
}

/// Looks at this process again and again while its guest runs.
struct Watch {
    fds: Arc<AtomicUsize>,
    threads: Arc<AtomicUsize>,
    stopped: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Watch {
    fn new() -> Self {
        let fds = Arc::new(AtomicUsize::new(0));
        let threads = Arc::new(AtomicUsize::new(0));
        let stopped = Arc::new(AtomicBool::new(false));
        let (its_fds, its_threads, its_stopped) = (fds.clone(), threads.clone(), stopped.clone());
        let thread = thread::spawn(move || {
            while !its_stopped.load(Ordering::Relaxed) {
                its_fds.fetch_max(count("fd"), Ordering::Relaxed);
                its_threads.fetch_max(count("task"), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(2));
            }
        });
        Self { fds, threads, stopped, thread }
    }

    /// The most descriptors and threads that were seen.
    fn stop(self) -> (usize, usize) {
        self.stopped.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        (self.fds.load(Ordering::Relaxed), self.threads.load(Ordering::Relaxed))
    }
}
