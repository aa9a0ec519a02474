//! The few system calls for which no crate that this one uses has a safe wrapper.
#![allow(unsafe_code)]

use std::{
    io,
    ops::Range,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

/// Takes ownership of a file descriptor that this process inherited, and keeps it from being inherited further.
///
/// Fails with `EBADF` if it is not open. The caller must not use `fd` in any other way afterwards.
pub fn take_inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD takes an integer and touches no memory.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, as fcntl has just shown, and the configuration names it for this process to own.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Blocks SIGTERM for this thread and those that it starts, and returns a non-blocking file descriptor that becomes
/// readable when it comes.
pub fn sigterm_fd() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero sigset_t is plain data; sigemptyset below initialises it.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a live sigset_t.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: `set` is a live, initialised sigset_t, and SIGTERM a signal.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGTERM) };
    // SAFETY: `set` is initialised, and the old mask is not asked for.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd has just returned it, so it is open and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The clock of one thread's CPU time, which other threads of the process can read.
#[derive(Debug, Clone, Copy)]
pub struct ThreadClock(libc::clockid_t);

impl ThreadClock {
    /// The calling thread's.
    pub fn own() -> Self {
        // Linux `include/linux/posix-timers_types.h`: the complement of the thread's id, then three bits: of a thread
        // (4), scheduler's precision (2).
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        Self((!tid << 3) | 4 | 2)
    }

    /// CPU time in nanoseconds; 0 if the thread is gone.
    pub fn cpu_ns(&self) -> u64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a live timespec.
        let result = unsafe { libc::clock_gettime(self.0, &raw mut time) };
        if result != 0 {
            return 0;
        }
        // A clock of CPU time is never negative.
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    }
}

/// CPU time of this process in nanoseconds.
pub fn process_cpu_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Ends this process as SIGKILL would. It cannot send itself that signal: it is the first process of its PID namespace,
/// and its filter has no `kill`.
pub fn kill_own_process() -> ! {
    std::process::exit(137)
}

/// Where in this executable's file a constant is; `None` if it is somewhere else. Where the linker has put it does not
/// matter.
pub fn offset_in_executable(constant: &[u8]) -> Option<u64> {
    let range = constant.as_ptr_range();
    let mut search = Search { wanted: range.start.addr()..range.end.addr(), offset: None };
    // SAFETY: the callback is given a live description of each object, and this live `search`.
    unsafe { libc::dl_iterate_phdr(Some(look_for_constant), (&raw mut search).cast()) };
    search.offset
}

struct Search {
    wanted: Range<usize>,
    offset: Option<u64>,
}

/// For dl_iterate_phdr(3), with a [`Search`]. The executable comes first, and is all that is looked at.
unsafe extern "C" fn look_for_constant(
    object: *mut libc::dl_phdr_info,
    _: usize,
    search: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: `offset_in_executable` has passed a `Search`, and does not use it meanwhile.
    let search = unsafe { &mut *search.cast::<Search>() };
    // SAFETY: dl_iterate_phdr passes a live description.
    let object = unsafe { &*object };
    // SAFETY: it has so many program headers there, for as long as the object is loaded.
    let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, object.dlpi_phnum.into()) };
    search.offset = headers
        .iter()
        // What may have been written to is not what the file has.
        .filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0)
        .find_map(|header| {
            let start = object.dlpi_addr.wrapping_add(header.p_vaddr) as usize;
            let end = start.wrapping_add(header.p_filesz as usize);
            let is_inside = start <= search.wanted.start && search.wanted.end <= end;
            is_inside.then(|| header.p_offset + (search.wanted.start - start) as u64)
        });
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    static CONSTANT: [u8; 5000] = [7; 5000];

    #[test]
    fn offset_in_executable_is_where_the_file_has_the_constant() {
        let offset = offset_in_executable(&CONSTANT).unwrap();
        let mut found = vec![0; CONSTANT.len()];
        let executable = std::fs::File::open("/proc/self/exe").unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&executable, &mut found, offset).unwrap();
        assert!(found == CONSTANT);
    }

    #[test]
    fn offset_in_executable_of_other_memory_is_none() {
        assert_eq!(offset_in_executable(&vec![7_u8; 5000]), None);
    }
}
