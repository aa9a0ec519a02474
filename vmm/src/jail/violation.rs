//! What happens on a system call that is not in the table: the kernel does not do it, and sends SIGSYS instead. The
//! handler here names the call and dies.
//!
//! A filter could kill at once, but then nobody would learn of the call. A thread that blocks SIGSYS is killed at once,
//! and so is one that makes a second such call in the handler, which is how the handler ends.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::RawFd,
    sync::atomic::{AtomicI32, Ordering},
};

use libc::{c_int, c_long, c_void, siginfo_t};

use super::ThreadKind;

/// Where the handler writes; -1 is nowhere.
static EVENTS: AtomicI32 = AtomicI32::new(-1);

/// A filter's return value for a call that is not allowed on threads of this kind.
pub fn action(kind: ThreadKind) -> u32 {
    // The lower half arrives in the handler as `si_errno` (seccomp(2)).
    libc::SECCOMP_RET_TRAP | kind as u32
}

/// Installs the handler. The event, [`crate::Event::Seccomp`], is written to `events`.
pub fn report_to(events: Option<RawFd>) -> io::Result<()> {
    EVENTS.store(events.unwrap_or(-1), Ordering::Relaxed);
    // SAFETY: an all-zero sigaction is valid; what matters is set below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_violation as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` is a live sigaction with a handler of the kind that SA_SIGINFO asks for; the old one is not
    // asked for.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The part of `siginfo_t` that SIGSYS has (sigaction(2)): after signal, errno and code, the address of the call, its
/// number and its architecture.
#[repr(C)]
struct SysInfo {
    signo: c_int,
    errno: c_int,
    code: c_int,
    call_addr: *const c_void,
    call: c_int,
}

/// `si_code` of a SIGSYS that a filter has sent.
const SYS_SECCOMP: c_int = 1;

extern "C" fn on_violation(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t of 128 bytes, aligned to 8; `SysInfo` is its beginning.
    let info = unsafe { info.cast::<SysInfo>().read() };
    if info.code != SYS_SECCOMP {
        return;
    }
    let mut line = Line::default();
    // A line of its own, whatever another thread was writing.
    line.text(b"\n{\"type\":\"seccomp\",\"call\":");
    line.number(info.call.unsigned_abs());
    line.text(b",\"thread\":\"");
    let kind = ThreadKind::ALL.into_iter().find(|kind| *kind as c_int == info.errno);
    line.text(kind.unwrap_or(ThreadKind::Main).name().as_bytes());
    line.text(b"\"}\n");
    // SAFETY: `line` is live memory; write(2) is async-signal-safe, and a bad descriptor is an error.
    unsafe { libc::write(EVENTS.load(Ordering::Relaxed), line.bytes.as_ptr().cast(), line.length) };
    loop {
        // No thread may do this, and SIGSYS is blocked here: the kernel kills the process.
        // SAFETY: without a path there is nothing to start.
        unsafe { libc::syscall(libc::SYS_execve as c_long, 0, 0, 0) };
    }
}

/// Text without allocation: another thread may hold the allocator's lock.
struct Line {
    bytes: [u8; 96],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 96], length: 0 }
    }
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = *byte;
                self.length += 1;
            }
        }
    }

    fn number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        while divisor > 1 && number < divisor {
            divisor /= 10;
        }
        while divisor > 0 {
            self.text(&[b'0' + (number / divisor % 10) as u8]);
            divisor /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_holds_numbers_as_they_are_written() {
        for number in [0, 7, 10, 319, 1_000_000, u32::MAX] {
            let mut line = Line::default();
            line.number(number);
            assert_eq!(&line.bytes[..line.length], number.to_string().as_bytes());
        }
    }
}
