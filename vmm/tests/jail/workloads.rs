//! What VMs do, so that between them every line of the table is needed.

use std::{
    fs,
    io::{self, Read},
    os::{fd::RawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use cloche_vmm::{
    VmConfig,
    config::{
        BalloonConfig, ConsoleConfig, DiskConfig, InitramfsPart, NetBackend, NetConfig, ShareConfig,
        VsockConfig,
    },
    control::{
        api::{Answer, Request, Stop},
        client::ask,
    },
};

use crate::{
    guest::Guest,
    keeper::{receive, send},
};

/// Names of all workloads.
pub const ALL: &[&str] = &[
    "exit",
    "devices",
    "network",
    "slow-reader",
    "spinning-vcpus",
    "stopped",
    "triple-fault",
    "broken-queue",
    "lost-vcpu",
    "unusable-kernel",
    "controlled",
    "balloon",
    "talkative",
    "share",
    "full-heap",
    "clock-of-the-kernel",
    "lesser-host",
    TAP,
];

/// The one that needs a host with tap devices.
pub const TAP: &str = "tap";

const PATIENCE: Duration = Duration::from_secs(5);

/// Feature bits of block devices (virtio 1.2 §5.2.3).
const FLUSH: u32 = 1 << 9;
const DISCARD: u32 = 1 << 13;
const WRITE_ZEROES: u32 = 1 << 14;

/// The feature bit of network devices whose driver takes frames without checksums (§5.1.3).
const GUEST_CHECKSUM: u32 = 1 << 1;

const REQUEST: u16 = 1;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
/// More than a socket takes at once, and less than it and the device's buffer take.
const MUCH: usize = 6 * 60_000;
const PONG: &[u8] = b"pong";

/// A file that belongs to the trial of this folder, on a tmpfs.
pub fn in_memory(folder: &Path) -> PathBuf {
    Path::new("/dev/shm").join(folder.file_name().unwrap_or_default())
}

/// The guest of a workload, and its machine.
pub fn configure(name: &str, config: &mut VmConfig, folder: &Path, socket: RawFd) -> io::Result<Guest> {
    let mut guest = Guest::default();
    // The kernel's own mark, and some console.
    guest.out(0x5c0, 1);
    guest.out(0x3f8, b'x');
    match name {
        "exit" => {
            // An interrupt from a vCPU's thread: the serial port's, when it is ready for more.
            guest.out(0x3f9, 2);
            guest.out(0x3f8, b'y');
            guest.exit(0);
        }
        "devices" | "full-heap" | "clock-of-the-kernel" | "lesser-host" => {
            let path = folder.join("disk");
            fs::write(&path, vec![0; 1 << 16])?;
            // A file in memory needs no thread, one on a disk does.
            fs::write(in_memory(folder), vec![0; 1 << 16])?;
            config.disks = vec![DiskConfig::new(path, "file"), DiskConfig::new(in_memory(folder), "memory")];
            config.vsock = Some(VsockConfig { guest_cid: 3, listen_fd: None, ports: vec![] });
            config.rng = true;
            config.console_log = Some(folder.join("console"));
            let archive = folder.join("archive");
            fs::write(&archive, vec![7; 5000])?;
            config.initramfs = vec![InitramfsPart::Embedded, InitramfsPart::File(archive)];
            for disk in [0, 1] {
                guest.start_with(disk, 1, FLUSH | DISCARD | WRITE_ZEROES);
                [1, 4, 0, 11, 13].into_iter().for_each(|kind| guest.block(disk, kind));
            }
            guest.start(3, 1);
            guest.entropy(3);
            guest.start(2, 3);
            // The response, the answer to what is sent, and the end.
            guest.vsock_receive(2);
            guest.vsock_send(2, REQUEST, 0, 0);
            guest.await_used(2, 0);
            guest.vsock_receive(2);
            guest.vsock_send(2, DATA, 0, 100);
            guest.await_used(2, 0);
            guest.vsock_receive(2);
            guest.vsock_send(2, SHUTDOWN, 3, 0);
            guest.await_used(2, 0);
            (0..4).for_each(|d| guest.reset(d));
            guest.exit(0);
        }
        "slow-reader" => {
            config.vsock = Some(VsockConfig { guest_cid: 3, listen_fd: None, ports: vec![] });
            guest.start(0, 3);
            guest.vsock_receive(0);
            guest.vsock_send(0, REQUEST, 0, 0);
            guest.await_used(0, 0);
            (0..6).for_each(|_| guest.vsock_send(0, DATA, 0, (MUCH / 6) as u32));
            guest.exit(0);
        }
        "network" => {
            config.nets = vec![network(NetBackend::SocketFd(socket))?];
            guest.start(0, 2);
            guest.receive_frame(0);
            guest.exit(0);
        }
        "spinning-vcpus" => {
            config.vcpus = 2;
            config.start_timeout_ms = Some(100);
            guest.instructions(&[0xeb, 0xfe]);
        }
        "stopped" => {
            config.vsock = Some(VsockConfig { guest_cid: 3, listen_fd: None, ports: vec![] });
            guest.start(0, 3);
            guest.vsock_receive(0);
            guest.vsock_send(0, REQUEST, 0, 0);
            guest.vsock_send(0, DATA, 0, 1);
            guest.instructions(&[0xf4, 0xeb, 0xfd]);
        }
        "triple-fault" => guest.instructions(&[0x0f, 0x0b]),
        "broken-queue" => {
            config.rng = true;
            guest.start(0, 1);
            // More buffers than the queue has (virtio 1.2 §2.7.13.3).
            guest.store(0x40_4000, 100 << 16);
            guest.store(0xd000_0050, 0);
            guest.exit(0);
        }
        // Code in device memory cannot be fetched: jmp 0xd0000000.
        "lost-vcpu" => guest.instructions(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]),
        "unusable-kernel" => {
            config.kernel = folder.join("not-a-kernel");
            fs::write(&config.kernel, b"\x1f\x8b no kernel")?;
        }
        // out 0x80, al, for ever
        "controlled" => guest.instructions(&[0xe6, 0x80, 0xeb, 0xfc]),
        "talkative" => {
            config.console = Some(ConsoleConfig::default());
            guest.start(0, 2);
            guest.print_zeros(0);
            guest.instructions(&[0xf4, 0xeb, 0xfd]);
        }
        "balloon" => {
            config.balloon = Some(BalloonConfig::default());
            guest.start(0, 2);
            guest.inflate(0);
            guest.exit(0);
        }
        "share" => {
            config.share = Some(ShareConfig { tag: "files".into(), socket_fd: socket });
            guest.start(0, 2);
            guest.ask_file_server(0);
            guest.exit(0);
        }
        TAP => {
            config.nets = vec![network(NetBackend::TapName("tap0".into()))?];
            guest.start_with(0, 2, GUEST_CHECKSUM);
            guest.send_frame(0);
            guest.exit(0);
        }
        other => panic!("there is no workload {other}"),
    }
    Ok(guest)
}

fn network(backend: NetBackend) -> io::Result<NetConfig> {
    let mac = "02:00:00:00:00:01".parse().map_err(io::Error::other)?;
    Ok(NetConfig { backend, mac, mtu: None, receive_limit: None, send_limit: None })
}

/// The monitor's part in a workload.
pub fn keep(name: &str, socket: &mut UnixStream, inmate: &Child, control: &Path) -> io::Result<()> {
    match name {
        "devices" | "full-heap" | "clock-of-the-kernel" | "lesser-host" => {
            receive(socket, 100)?;
            send(socket, PONG);
        }
        "share" => {
            let mut request = [0; 40];
            socket.set_read_timeout(Some(PATIENCE))?;
            if socket.read_exact(&mut request).is_ok() {
                // Length, no error, and the request's number.
                let [length, error] = [16u32, 0].map(u32::to_le_bytes);
                send(socket, &[&length, &error, &request[8..16]].concat());
            }
        }
        "talkative" => {
            let deadline = Instant::now() + PATIENCE;
            // Each zero is shown as several characters, which are more than fit where text starts to be put.
            let all = |answer: &Answer| matches!(answer, Answer::Console(text) if text.len() > 4 << 16);
            while Instant::now() < deadline {
                match ask(control, Request::Console { bytes: 1 << 16 }, PATIENCE) {
                    Ok(answer) if !all(&answer) => std::thread::sleep(Duration::from_millis(10)),
                    _ => break,
                }
            }
            let _ = ask(control, Request::Stop(Stop::Kill), PATIENCE);
        }
        "network" => {
            // Its length in front of a frame.
            send(socket, &60u32.to_be_bytes());
            send(socket, &[0xff; 60]);
        }
        "slow-reader" => {
            // It is there, but nobody takes it.
            rustix::net::recv(&*socket, &mut [0], rustix::net::RecvFlags::PEEK)?;
            std::thread::sleep(Duration::from_millis(300));
            receive(socket, MUCH)?;
        }
        "stopped" if receive(socket, 1)? == 1 => {
            let pid = rustix::process::Pid::from_child(inmate);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        "controlled" => {
            let requests = [
                Request::Info,
                Request::DirtyLog { enabled: true },
                Request::Stats,
                Request::Pause,
                Request::Resume,
                Request::Stop(Stop::Kill),
            ];
            for request in requests {
                // A VMM that was killed answers no more.
                if ask(control, request, PATIENCE).is_err() {
                    break;
                }
            }
        }
        _ => {}
    }
    Ok(())
}
