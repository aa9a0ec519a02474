//! System calls that rustix does not wrap, each behind a safe function. The only module of this crate with
//! `unsafe` code; policy lives with the callers.

#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_long, c_void},
    io,
    mem::{MaybeUninit, size_of},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
};

/// Which side of [`clone3`] this is.
pub enum Cloned {
    /// The new process.
    Child,
    /// The caller.
    Parent {
        /// Process id of the child in the caller's PID namespace.
        pid: i32,
        /// Its pidfd, close-on-exec.
        pidfd: OwnedFd,
    },
}

/// `struct clone_args` of `linux/sched.h`, version 2 (Linux 5.7).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Forks into the new namespaces `flags` (`CLONE_NEW…`) and, on cgroup v2, right into `cgroup`.
///
/// The caller must be single-threaded: only then is every lock free in the child, and allocation allowed.
pub fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    clone3_as(flags, libc::SIGCHLD, cgroup)
}

/// As [`clone3`], but the new process is not the caller's child: it is its parent's.
pub(crate) fn clone3_sibling(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    // clone(2): with CLONE_PARENT, the signal is the one of the caller.
    clone3_as(flags | libc::CLONE_PARENT as u64, 0, cgroup)
}

fn clone3_as(flags: u64, exit_signal: c_int, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: c_int = -1;
    let mut args = CloneArgs {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: exit_signal as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: `args` is a valid `clone_args` of the size given; its one pointer, `pidfd`, points to a live
    // `int`. Without CLONE_VM and without a stack the child runs on its own copy of this stack.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Cloned::Child),
        pid => {
            // SAFETY: the kernel has just stored a new descriptor there, which nothing else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent { pid: pid as i32, pidfd })
        }
    }
}

/// Makes a cgroup namespace whose root is the cgroup that this process is in.
pub(crate) fn unshare_cgroup_namespace() -> io::Result<()> {
    // SAFETY: this flag affects neither memory nor descriptors.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }.into())
}

/// Makes a time namespace, which this process is not in yet.
pub(crate) fn unshare_time_namespace() -> io::Result<()> {
    const CLONE_NEWTIME: c_int = 0x80;
    // SAFETY: this flag affects neither memory nor descriptors.
    check(unsafe { libc::unshare(CLONE_NEWTIME) }.into())
}

/// Sends a signal, also one of those that have no name.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signo: i32) -> io::Result<()> {
    let info = ptr::null::<libc::siginfo_t>();
    // SAFETY: a null `siginfo` is allowed and makes the kernel fill it in.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signo, info, 0) })
}

/// Ends the process at once: no destructors, no flushing of the buffers copied from the parent.
pub(crate) fn exit_now(code: u8) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(code.into()) }
}

/// Sets every signal to its default action and unblocks all, as a new process expects. `execve` resets
/// handlers, but keeps what is ignored, and Rust programs ignore SIGPIPE.
pub(crate) fn reset_signals() {
    // `struct sigaction` as the kernel has it on x86_64: handler, flags, restorer, mask. All zeroes is SIG_DFL. The C
    // library's `sigaction` would leave out two signals that it keeps for itself.
    let default = [0u64; 4];
    for signo in 1..=64 {
        // SAFETY: `default` is a live `sigaction` for a signal set of the size given; no old one is asked for. That
        // SIGKILL and SIGSTOP are refused is harmless.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signo,
                &raw const default,
                ptr::null::<u64>(),
                size_of::<u64>(),
            )
        };
    }
    unblock_signals();
}

/// Lets all signals through.
pub fn unblock_signals() {
    // The kernel's signal set on x86_64 is 8 bytes.
    let none = 0u64;
    // SAFETY: `none` is a live signal set of the size given; no old set is asked for.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            ptr::null::<u64>(),
            size_of::<u64>(),
        )
    };
}

/// Marks every descriptor from `first` up close-on-exec.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: changes descriptor flags only; nothing in Rust relies on their absence.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    check(result)
}

/// Closes every descriptor from 3 up but `kept`. For a process that will become another program or exit, and never gives
/// back what it owns.
pub fn close_all_but(kept: &[c_int]) -> io::Result<()> {
    let mut kept: Vec<u32> =
        kept.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd >= 3).collect();
    kept.sort_unstable();
    let mut first = 3;
    for end in kept.into_iter().chain([u32::MAX]) {
        if first < end {
            // SAFETY: whatever owns these descriptors in this process is never dropped and not used any more.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, end - 1, 0) })?;
        }
        first = end.saturating_add(1);
    }
    Ok(())
}

/// Has `execve` leave a descriptor open.
pub(crate) fn keep_on_exec(fd: c_int) -> io::Result<()> {
    // SAFETY: changes descriptor flags only.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }.into())
}

/// Replaces the process by the program at `path`. Returns only on failure.
pub(crate) fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(args), pointers(env));
    // SAFETY: `path` and all strings are NUL-terminated and live, and both arrays end in a null pointer.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Joins a new session keyring of this name, so that the caller's keys are out of reach.
pub(crate) fn join_session_keyring(name: &CStr) -> io::Result<()> {
    // SAFETY: `name` is NUL-terminated and live.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    check(result)
}

/// Sets a soft and a hard resource limit of a process; 0 is this one.
pub(crate) fn set_rlimit(
    pid: i32,
    resource: libc::__rlimit_resource_t,
    soft: u64,
    hard: u64,
) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` is a live `rlimit`; the old limit is not asked for.
    check(unsafe { libc::prlimit(pid, resource, &raw const limit, ptr::null_mut()) }.into())
}

/// The soft and the hard resource limit of this process.
pub(crate) fn rlimit(resource: libc::__rlimit_resource_t) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a live `rlimit` to write to.
    check(unsafe { libc::getrlimit(resource, &raw mut limit) }.into())?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// Changes to the properties of a mount, for [`mount_setattr`]: `MOUNT_ATTR_…` bits and an `MS_…` propagation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct MountAttr {
    pub(crate) set: u64,
    pub(crate) clear: u64,
    propagation: u64,
    userns_fd: u64,
}

const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

impl MountAttr {
    /// Sets these attributes and changes nothing else.
    pub(crate) const fn setting(set: u64) -> Self {
        Self { set, clear: 0, propagation: 0, userns_fd: 0 }
    }

    /// Sets this propagation, `MS_…`, and changes nothing else.
    pub(crate) const fn propagating(propagation: u64) -> Self {
        Self { set: 0, clear: 0, propagation, userns_fd: 0 }
    }

    /// Shows files with the owners that a user namespace maps theirs to.
    pub(crate) fn mapping(namespace: BorrowedFd<'_>) -> Self {
        Self { set: MOUNT_ATTR_IDMAP, clear: 0, propagation: 0, userns_fd: namespace.as_raw_fd() as u64 }
    }

    /// Whether applying it would change nothing.
    pub(crate) fn is_noop(&self) -> bool {
        *self == Self::default()
    }
}

/// Changes the mount that `mount` refers to and, if `recursive`, all mounts below it.
pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, attr: MountAttr) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated literal, `attr` a live `mount_attr` of the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    check(result)
}

/// Brings a network interface of this network namespace up.
pub(crate) fn interface_up(name: &CStr) -> io::Result<()> {
    // SAFETY: no pointers; a new descriptor or -1.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor; nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: `ifreq` is plain data, for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.count_bytes() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
        *to = *from as c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
    // SAFETY: SIOCSIFFLAGS reads one `ifreq`, which is live.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into())
}

/// `struct loop_config` of `linux/loop.h` (Linux 5.8).
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// Number of an unused loop device, which the kernel makes if there is none.
pub(crate) fn loop_get_free(control: BorrowedFd<'_>) -> io::Result<u32> {
    const LOOP_CTL_GET_FREE: u64 = 0x4c82;
    // SAFETY: this ioctl takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    check(number.into())?;
    Ok(number as u32)
}

/// Binds `file` read-only to a loop device, which unbinds itself when its last user is gone.
pub(crate) fn loop_configure(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    const LOOP_CONFIGURE: u64 = 0x4c0a;
    const LO_FLAGS_READ_ONLY: u32 = 1;
    const LO_FLAGS_AUTOCLEAR: u32 = 4;
    // SAFETY: `loop_config` is plain data, for which all zeroes is valid.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = file.as_raw_fd() as u32;
    config.info.flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR;
    // SAFETY: LOOP_CONFIGURE reads one `loop_config`, which is live.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) }.into())
}

/// `union bpf_attr` as BPF_PROG_LOAD reads it: the fields up to `kern_version`.
#[repr(C)]
struct BpfProgLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// `union bpf_attr` as BPF_PROG_ATTACH reads it.
#[repr(C)]
struct BpfProgAttach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

/// Loads a program of type BPF_PROG_TYPE_CGROUP_DEVICE.
pub(crate) fn bpf_load_cgroup_device(instructions: &[u64]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let attr = BpfProgLoad {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(instructions.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
    };
    let attr_ptr: *const c_void = (&raw const attr).cast();
    // SAFETY: `attr` is live and of the size given; its pointers lead to live memory, which is only read.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, attr_ptr, size_of::<BpfProgLoad>()) };
    check(fd)?;
    // SAFETY: the kernel has just made this descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as c_int) })
}

/// Attaches a device program to a v2 cgroup, beside those of its ancestors: every one of them must allow.
pub(crate) fn bpf_attach_cgroup_device(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    const BPF_PROG_ATTACH: c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attr = BpfProgAttach {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    let attr_ptr: *const c_void = (&raw const attr).cast();
    // SAFETY: `attr` is live and of the size given.
    check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, attr_ptr, size_of::<BpfProgAttach>()) })
}

fn check(result: c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct sched_attr` of `linux/sched/types.h`, version 1.
#[repr(C)]
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SchedAttr {
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
    pub(crate) util_min: u32,
    pub(crate) util_max: u32,
}

/// Sets the scheduling policy of this thread; the size is filled in here.
pub(crate) fn sched_setattr(attr: &SchedAttr) -> io::Result<()> {
    let attr = SchedAttr { size: size_of::<SchedAttr>() as u32, ..*attr };
    // SAFETY: `attr` is live and of the size that it says.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) })
}

/// Sets the I/O priority of this thread.
pub(crate) fn ioprio_set(priority: u32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: c_int = 1;
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) })
}

/// Sets the execution domain of this process.
pub(crate) fn set_personality(persona: u64) -> io::Result<()> {
    // SAFETY: numbers only; the domains used here do not change how memory is laid out for the caller.
    check(unsafe { libc::syscall(libc::SYS_personality, persona) })
}

/// Joins the namespaces of these kinds (`CLONE_NEW…`) that the process of a pidfd is in, all or none.
pub(crate) fn join_namespaces(pidfd: BorrowedFd<'_>, kinds: u64) -> io::Result<()> {
    // SAFETY: affects neither memory nor descriptors of this process; the flags are namespaces only.
    check(unsafe { libc::syscall(libc::SYS_setns, pidfd.as_raw_fd(), kinds as c_int) })
}

/// Blocks these signals for the calling thread and returns a non-blocking descriptor that yields them (signalfd(2)).
pub fn signal_descriptor(signals: &[i32]) -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is writable memory of the right type; sigemptyset initialises it.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised by sigemptyset just above.
    let mut set = unsafe { set.assume_init() };
    for signo in signals {
        // SAFETY: `set` is an initialised signal set.
        unsafe { libc::sigaddset(&raw mut set, *signo) };
    }
    // SAFETY: `set` is initialised; the old mask is not asked for.
    let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by signalfd(2) and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
