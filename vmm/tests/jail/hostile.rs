//! A VMM that was taken over: code of the attacker's choice runs on a thread of each kind.
//!
//! Two walls are tested apart. In the filter, any call that is not in the table must kill, and be reported by name. And
//! without the filter, in the empty root and the namespaces alone, nothing of the host must be in reach.

use std::{
    fs, io,
    net::{TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd, RawFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    },
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use cloche_vmm::{
    Jail,
    jail::{Limits, ThreadKind, exit_on_panic, table::Table},
};
use serde::{Deserialize, Serialize};

/// What is tried.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Probe {
    /// One system call, in the filter.
    Call { number: i64, arguments: [u64; 6] },
    /// A panic, in the filter.
    Panic,
    /// Nothing, on a thread that the others wait for: it starts late.
    Late,
    /// Everything in [`attempts`], in the jail but for its filter.
    Everything(Host),
    /// Nothing, in the closed jail, until the keeper has looked at it.
    Wait,
}

/// What the host has that must be out of reach.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Host {
    /// A process of the same user.
    pub process: i32,
    /// A TCP port of 127.0.0.1 where somebody listens.
    pub port: u16,
    /// An abstract unix socket where somebody listens.
    pub socket: String,
    /// A file that everybody can read.
    pub file: String,
    /// The key of shared memory that everybody can read (shmget(2)).
    pub memory: i32,
}

const NO_LIMITS: Limits = Limits { file_bytes: 1 << 20, more_files: 16 };

/// Closes the jail as a VMM does, and runs the probe in it.
pub fn run(
    probe: &Probe,
    thread: ThreadKind,
    table: Table,
    kept: &[RawFd],
) -> Result<(), Box<dyn std::error::Error>> {
    let mut jail = Jail::with_table(table);
    jail.enter(kept, Some(1))?;
    jail.become_nobody(Some(1))?;
    match probe {
        Probe::Call { number, arguments } => {
            let (number, arguments) = (*number, *arguments);
            on_thread(&mut jail, thread, Duration::ZERO, move || {
                system_call(number, arguments);
            })?;
        }
        Probe::Panic => {
            exit_on_panic("inmate");
            on_thread(&mut jail, thread, Duration::ZERO, || panic!("as was asked for"))?;
        }
        Probe::Late => on_thread(&mut jail, thread, Duration::from_millis(200), || {})?,
        Probe::Everything(host) => {
            jail.leave_host()?;
            for (name, result) in attempts(host, kept) {
                // The events' pipe takes it as it takes a panic's message.
                println!("{name}: {}", result.unwrap_or_else(|error| format!("failed: {error}")));
            }
        }
        Probe::Wait => {
            jail.leave_host()?;
            jail.close(NO_LIMITS)?;
            let socket = kept.last().copied().unwrap_or(-1);
            // Until the keeper hangs up. The socket is non-blocking for a VM's sake; an epoll waits for it.
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
            let event = (&raw mut event).addr() as u64;
            let epoll = system_call(libc::SYS_epoll_create1, [0; 6]) as u64;
            let watch = [epoll, libc::EPOLL_CTL_ADD as u64, socket as u64, event, 0, 0];
            system_call(libc::SYS_epoll_ctl, watch);
            println!("ready");
            system_call(libc::SYS_epoll_wait, [epoll, event, 1, u64::MAX, 0, 0]);
        }
    }
    Ok(())
}

/// Closes the jail as a VMM does, with one thread of this kind that does `work`; it starts so much later.
fn on_thread(
    jail: &mut Jail,
    kind: ThreadKind,
    later: Duration,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut work = Some(work);
    let mut threads = Vec::new();
    let mut start = |jail: &mut Jail| {
        if let Some(work) = work.take() {
            let confined = jail.confined(kind, work);
            threads.push(std::thread::spawn(move || {
                std::thread::sleep(later);
                confined()
            }));
        }
    };
    if kind == ThreadKind::KvmSetup {
        start(jail);
    }
    jail.leave_host()?;
    if [ThreadKind::Vcpu, ThreadKind::Disk].contains(&kind) {
        start(jail);
    }
    jail.close(NO_LIMITS)?;
    for thread in threads {
        let _ = thread.join();
    }
    if let Some(work) = work.take() {
        work();
    }
    Ok(())
}

#[allow(unsafe_code)]
fn system_call(number: i64, [a, b, c, d, e, f]: [u64; 6]) -> i64 {
    // SAFETY: the calls of these tests are refused, or harmless, or end this process, which is what it is for.
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

/// As a call of the C library tells: what it returned, or why it failed.
fn tried(number: i64, arguments: [u64; 6]) -> Result<String, io::Error> {
    match system_call(number, arguments) {
        -1 => Err(io::Error::last_os_error()),
        done => Ok(format!("returned {done}")),
    }
}

fn address(text: &std::ffi::CStr) -> u64 {
    text.as_ptr().addr() as u64
}

/// Names, and what came of each. All must fail.
fn attempts(host: &Host, kept: &[RawFd]) -> Vec<(&'static str, Result<String, io::Error>)> {
    let done = |result: io::Result<()>| result.map(|()| "done".to_owned());
    let process = host.process as u64;
    let root = c"/";
    let none = [0u64; 6];
    let victim = [process, 0, 0, 0, 0, 0];
    let attach = [libc::PTRACE_ATTACH as u64, process, 0, 0, 0, 0];
    let mut byte = 0u8;
    let piece = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let piece = (&raw const piece).addr() as u64;
    let abstract_socket = SocketAddr::from_abstract_name(&host.socket)
        .and_then(|address| UnixStream::connect_addr(&address))
        .map(drop);
    let foreign = (3..4096).find(|fd| !kept.contains(fd) && rustix_is_open(*fd));
    let names: Vec<String> = fs::read_dir("/")
        .map(|entries| entries.flatten().map(|entry| entry.path().display().to_string()).collect())
        .unwrap_or_default();
    let absent = |found: Option<String>| found.ok_or_else(|| io::ErrorKind::NotFound.into());
    let capabilities = (0..64).find(|capability| {
        system_call(libc::SYS_prctl, [libc::PR_CAPBSET_READ as u64, *capability, 0, 0, 0, 0]) == 1
    });
    vec![
        ("read a file of everybody's", fs::read(&host.file).map(|_| "done".into())),
        ("read it from further up", fs::read(format!("../../../..{}", host.file)).map(|_| "done".into())),
        ("find anything in the root directory", absent(names.first().cloned())),
        ("make a file", done(fs::write("/file", "x"))),
        ("make a directory", done(fs::create_dir("/directory"))),
        ("look at processes", fs::read_dir("/proc").map(|_| "done".into())),
        ("open a device", fs::File::open("/dev/kvm").map(|_| "done".into())),
        ("make a device", tried(libc::SYS_mknod, [address(c"/null"), 0o20666, 0x103, 0, 0, 0])),
        ("run a program", tried(libc::SYS_execve, [address(c"/bin/sh"), 0, 0, 0, 0, 0])),
        ("leave the root directory", tried(libc::SYS_chroot, [address(root), 0, 0, 0, 0, 0])),
        ("mount", tried(libc::SYS_mount, [address(c"x"), address(root), address(c"tmpfs"), 0, 0, 0])),
        ("unmount", tried(libc::SYS_umount2, [address(root), libc::MNT_DETACH as u64, 0, 0, 0, 0])),
        ("make a mount namespace", tried(libc::SYS_unshare, [libc::CLONE_NEWNS as u64, 0, 0, 0, 0, 0])),
        ("make a network namespace", tried(libc::SYS_unshare, [libc::CLONE_NEWNET as u64, 0, 0, 0, 0, 0])),
        ("connect to a port", done(TcpStream::connect(("127.0.0.1", host.port)).map(drop))),
        ("connect to an abstract socket", done(abstract_socket)),
        ("find an interface of the network", find_interface()),
        ("attach shared memory", tried(libc::SYS_shmget, [host.memory as u64, 0, 0, 0, 0, 0])),
        ("open a file by its number", tried(libc::SYS_open_by_handle_at, [0, address(root), 0, 0, 0, 0])),
        ("signal a process", tried(libc::SYS_kill, victim)),
        ("signal all processes", tried(libc::SYS_kill, [u64::MAX, 0, 0, 0, 0, 0])),
        ("trace a process", tried(libc::SYS_ptrace, attach)),
        ("open a process", tried(libc::SYS_pidfd_open, victim)),
        ("take a process's descriptor", take_descriptor(host.process)),
        ("read a process's memory", tried(libc::SYS_process_vm_readv, [process, piece, 1, piece, 1, 0])),
        ("find a descriptor that was not given", absent(foreign.map(|fd| fd.to_string()))),
        ("become another user", tried(libc::SYS_setuid, [1, 0, 0, 0, 0, 0])),
        ("join a group", tried(libc::SYS_setgroups, [0; 6])),
        ("find a capability in the bounding set", absent(capabilities.map(|found| found.to_string()))),
        ("gain all capabilities", gain_capabilities()),
        ("raise a limit", raise_limit()),
        ("rename the host", tried(libc::SYS_sethostname, [address(c"x"), 1, 0, 0, 0, 0])),
        ("load a kernel module", tried(libc::SYS_init_module, none)),
    ]
}

fn rustix_is_open(fd: RawFd) -> bool {
    system_call(libc::SYS_fcntl, [fd as u64, libc::F_GETFD as u64, 0, 0, 0, 0]) >= 0
}

/// An interface other than the first of a network namespace, which is its own loopback.
fn find_interface() -> Result<String, io::Error> {
    /// netdevice(7): finds an interface's name by its number, which is behind 16 bytes for the name.
    const SIOCGIFNAME: u64 = 0x8910;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let named = |index: u32| {
        let mut request = [0u8; 40];
        request[16..20].copy_from_slice(&index.to_ne_bytes());
        let arguments = [socket.as_raw_fd() as u64, SIOCGIFNAME, request.as_mut_ptr().addr() as u64, 0, 0, 0];
        system_call(libc::SYS_ioctl, arguments) == 0
    };
    let found = (2..100).find(|index| named(*index));
    found.map(|index| format!("number {index}")).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// By the process's own number in this PID namespace, whatever that is there.
fn take_descriptor(process: i32) -> Result<String, io::Error> {
    let process = system_call(libc::SYS_pidfd_open, [process as u64, 0, 0, 0, 0, 0]);
    tried(libc::SYS_pidfd_getfd, [process as u64, 0, 0, 0, 0, 0])
}

fn gain_capabilities() -> Result<String, io::Error> {
    let all = rustix::thread::CapabilitySet::all();
    let sets = rustix::thread::CapabilitySets { effective: all, permitted: all, inheritable: all };
    rustix::thread::set_capabilities(None, sets)?;
    Ok("done".into())
}

fn raise_limit() -> Result<String, io::Error> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let more = now.maximum.unwrap_or(1 << 20) + 1;
    setrlimit(Resource::Nofile, Rlimit { current: now.current, maximum: Some(more) })?;
    Ok("done".into())
}

impl Drop for Decoys {
    fn drop(&mut self) {
        system_call(libc::SYS_shmctl, [self.shared as u64, libc::IPC_RMID as u64, 0, 0, 0, 0]);
    }
}

/// A host's things, for [`Probe::Everything`]; they last as long as this does.
pub struct Decoys {
    pub host: Host,
    shared: i64,
    _port: std::net::TcpListener,
    _socket: std::os::unix::net::UnixListener,
}

impl Decoys {
    /// Lays them out.
    pub fn new(folder: &Path) -> io::Result<Self> {
        let port = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        // Of each test, since they run at the same time.
        static DECOYS: AtomicU32 = AtomicU32::new(0);
        let number = DECOYS.fetch_add(1, Ordering::Relaxed);
        let socket = format!("cloche-jail-test-{}-{number}", std::process::id());
        let listener =
            std::os::unix::net::UnixListener::bind_addr(&SocketAddr::from_abstract_name(&socket)?)?;
        let file = folder.join("everybodys");
        fs::write(&file, "x")?;
        let memory = (0x6000_0000 | (std::process::id() & 0xff_ffff) << 4 | number & 0xf) as i32;
        let flags = (libc::IPC_CREAT | 0o666) as u64;
        let shared = system_call(libc::SYS_shmget, [memory as u64, 4096, flags, 0, 0, 0]);
        if shared < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            host: Host {
                process: std::process::id() as i32,
                port: port.local_addr()?.port(),
                socket,
                file: file.display().to_string(),
                memory,
            },
            shared,
            _port: port,
            _socket: listener,
        })
    }
}
