//! The system calls and instructions that no safe wrapper offers: I/O ports, vsock addresses, pause.
#![allow(unsafe_code)]

use std::{
    arch::asm,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use cloche_protocol::machine::{GuestMark, HOST_CID, io_port};

/// Whether this kernel lets PID 1 use I/O ports, by which the VMM hears that the agent is ready.
pub fn has_io_ports() -> bool {
    let mut granted = false;
    with_port(io_port::MARK, 1, || granted = true);
    granted
}

/// Tells the VMM that `mark` is reached, if this kernel gives access to I/O ports; see [`has_io_ports`].
pub fn mark(mark: GuestMark) {
    with_port(io_port::MARK, 1, || {
        // SAFETY: `with_port` made this port accessible; writing to the VMM's device touches no memory.
        unsafe { asm!("out dx, al", in("dx") io_port::MARK, in("al") mark as u8, options(nomem, nostack)) };
    });
}

/// Ends the VM with `code`. A kernel that gives no access to I/O ports is rebooted instead: the VMM sees a reset.
pub fn exit_machine(code: u32) {
    with_port(io_port::EXIT, 4, || {
        // SAFETY: as in `mark`.
        unsafe { asm!("out dx, eax", in("dx") io_port::EXIT, in("eax") code, options(nomem, nostack)) };
    });
    // SAFETY: reboot(2) with this command takes no pointer.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
}

/// Opens ports to this process for the time of `access` only: a child would inherit them.
fn with_port(first: u16, count: u16, access: impl FnOnce()) {
    // SAFETY: ioperm(2) takes no pointer.
    if unsafe { libc::ioperm(first.into(), count.into(), 1) } == 0 {
        access();
        // SAFETY: as above.
        unsafe { libc::ioperm(first.into(), count.into(), 0) };
    }
}

/// Sets what the kernel reads ahead on this block device, and on the file systems that are mounted from it later.
pub fn set_read_ahead(device: BorrowedFd, bytes: u32) -> io::Result<()> {
    /// linux/fs.h: `_IO(0x12, 98)`; the unit is 512 bytes.
    const BLKRASET: libc::Ioctl = 0x1262;
    // SAFETY: this ioctl takes a number and no pointer.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKRASET, libc::c_ulong::from(bytes / 512)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sleeps until a signal comes.
pub fn pause() {
    // SAFETY: pause(2) takes no argument.
    unsafe { libc::pause() };
}

/// A non-blocking listener on `port` of this guest, close-on-exec.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    /// Whoever asks gets an answer at once, but each further process is four streams.
    const BACKLOG: i32 = 128;
    // SAFETY: socket(2) takes no pointer.
    let fd = unsafe {
        libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by socket(2) and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = address(libc::VMADDR_CID_ANY, port);
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: `address` is a valid sockaddr_vm of `length` bytes that outlives the call.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: listen(2) takes no pointer.
    let result = unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    }
}

/// A connected stream to `port` of the host (vsock(7)), close-on-exec.
pub fn connect_host(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointer.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by socket(2) and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let address = address(HOST_CID, port);
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: `address` is a valid sockaddr_vm of `length` bytes that outlives the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}
