//! Runs a command and notes which functions of one program its processes enter: a trap at the first byte of each, that
//! is taken away when it is hit. The only module of this crate with ptrace(2).

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::ptr;

use anyhow::{Context as _, Result, ensure};

/// `int3`.
const TRAP: u8 = 0xcc;
/// Offset of `rip` in `struct user` (sys/user.h), x86_64.
const RIP: libc::c_ulong = 16 * 8;

/// What is known of the program.
struct Traced {
    /// Device and inode.
    identity: (u64, u64),
    entries: Vec<u64>,
    /// The bytes from the first to the last entry, and the same with the traps.
    code: Vec<u8>,
    trapped: Vec<u8>,
}

/// The entries that were hit, in their order.
pub(super) fn hits(program: &Path, mut entries: Vec<u64>, command: &[String]) -> Result<Vec<u64>> {
    entries.sort_unstable();
    let status = fs::metadata(program).with_context(|| format!("look at {}", program.display()))?;
    let mut traced =
        Traced { identity: (status.dev(), status.ino()), entries, code: Vec::new(), trapped: Vec::new() };
    let [word, words @ ..] = command else { anyhow::bail!("no command given") };
    let mut first = Command::new(word);
    first.args(words);
    // SAFETY: the closure makes one system call and touches no memory.
    unsafe { first.pre_exec(|| request(libc::PTRACE_TRACEME, 0, 0, 0).map(drop)) };
    let pid = first.spawn().with_context(|| format!("run {word}"))?.id().cast_signed();
    let mut hits = Vec::new();
    // Where the program lies in each process that runs it.
    let mut bases = HashMap::<i32, Option<u64>>::new();
    wait(pid)?;
    let options = libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_TRACEEXEC
        | libc::PTRACE_O_EXITKILL;
    request(libc::PTRACE_SETOPTIONS, pid, 0, options as libc::c_ulong).context("set options of ptrace")?;
    request(libc::PTRACE_CONT, pid, 0, 0).context("go on")?;
    while let Some((pid, status)) = wait(-1)? {
        if !libc::WIFSTOPPED(status) {
            bases.remove(&pid);
            continue;
        }
        let mut signal = libc::WSTOPSIG(status);
        match status >> 16 {
            libc::PTRACE_EVENT_EXEC => {
                let base = traced.base(pid)?;
                bases.insert(pid, base);
                base.map_or(Ok(()), |base| traced.set_traps(pid, base))?;
                signal = 0;
            }
            0 if signal == libc::SIGTRAP => {
                let base = match bases.get(&pid) {
                    Some(base) => *base,
                    None => *bases.entry(pid).or_insert(traced.base(pid)?),
                };
                if let Some(entry) = base.map(|base| traced.hit(pid, base)).transpose()?.flatten() {
                    hits.push(entry);
                    signal = 0;
                }
            }
            // A new process or thread stops before it does anything.
            0 if signal == libc::SIGSTOP => signal = 0,
            0 => {}
            _ => signal = 0,
        }
        // It may be gone.
        let _ = request(libc::PTRACE_CONT, pid, 0, signal as libc::c_ulong);
    }
    Ok(hits)
}

impl Traced {
    /// Where the program lies in this process, if that runs it.
    fn base(&self, pid: i32) -> Result<Option<u64>> {
        let runs = fs::metadata(format!("/proc/{pid}/exe"));
        if !runs.is_ok_and(|status| (status.dev(), status.ino()) == self.identity) {
            return Ok(None);
        }
        // Lines: FROM-TO PERMISSIONS OFFSET DEVICE INODE PATH.
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("read its mappings")?;
        let line = maps.lines().find(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            words.get(2).is_some_and(|offset| offset.bytes().all(|digit| digit == b'0'))
                && words.get(4).is_some_and(|inode| *inode == self.identity.1.to_string())
        });
        let base = line.and_then(|line| u64::from_str_radix(line.split('-').next()?, 16).ok());
        Ok(Some(base.context("the program is not among its own mappings")?))
    }

    fn first(&self) -> u64 {
        self.entries.first().copied().unwrap_or_default()
    }

    fn set_traps(&mut self, pid: i32, base: u64) -> Result<()> {
        let memory = memory(pid)?;
        let first = self.first();
        if self.code.is_empty() {
            let length = self.entries.last().map_or(0, |last| last - first + 1);
            self.code = vec![0; length as usize];
            memory.read_exact_at(&mut self.code, base + first).context("read its code")?;
            self.trapped = self.code.clone();
            for entry in &self.entries {
                self.trapped[(entry - first) as usize] = TRAP;
            }
        }
        memory.write_all_at(&self.trapped, base + first).context("set traps")
    }

    /// The entry at which it stopped, if at one; from there it can go on.
    fn hit(&self, pid: i32, base: u64) -> Result<Option<u64>> {
        let mut stopped: u64 = 0;
        // PTRACE_PEEKUSER as a system call stores what it reads.
        request(libc::PTRACE_PEEKUSER, pid, RIP, (&raw mut stopped) as libc::c_ulong).context("read rip")?;
        let address = stopped.wrapping_sub(1);
        let entry = address.wrapping_sub(base);
        if self.entries.binary_search(&entry).is_err() {
            return Ok(None);
        }
        let code = [self.code[(entry - self.first()) as usize]];
        memory(pid)?.write_all_at(&code, address).context("take a trap away")?;
        request(libc::PTRACE_POKEUSER, pid, RIP, address).context("set rip")?;
        Ok(Some(entry))
    }
}

fn memory(pid: i32) -> Result<File> {
    let path = format!("/proc/{pid}/mem");
    OpenOptions::new().read(true).write(true).open(&path).with_context(|| format!("open {path}"))
}

/// ptrace(2), as the kernel has it.
fn request(
    request: libc::c_uint,
    pid: i32,
    address: libc::c_ulong,
    data: libc::c_ulong,
) -> io::Result<libc::c_long> {
    // SAFETY: the requests used here read and write another process, but for PTRACE_PEEKUSER, whose `data` is a pointer
    // to a live u64 of its caller's.
    match unsafe { libc::syscall(libc::SYS_ptrace, request, pid, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// Waits for a change of a process, or of any: its id and status, or `None` if there are no more.
fn wait(pid: i32) -> Result<Option<(i32, i32)>> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a live int; no resource usage is asked for.
        let result = unsafe { libc::wait4(pid, &raw mut status, libc::__WALL, ptr::null_mut()) };
        match result {
            -1 => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ECHILD) => return Ok(None),
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error).context("wait for the traced processes"),
            },
            pid => {
                ensure!(pid > 0, "wait4 returned {pid}");
                return Ok(Some((pid, status)));
            }
        }
    }
}
