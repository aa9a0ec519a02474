//! Hosts on which a VMM makes calls that it does not make on most: what some entries of the table are for.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
};

use cloche_seccomp::bpf::{Comparison, Condition, Decision, Policy, Rule, assemble};

use crate::allocator;

/// Makes this process's host the one that a workload of this name is about. No other thread may be there yet.
pub fn apply(workload: &str) -> io::Result<()> {
    match workload {
        "full-heap" => allocator::grow_always(),
        "clock-of-the-kernel" => take_clock_away()?,
        "lesser-host" => refuse_what_some_hosts_lack()?,
        "tap" => {
            #[allow(unsafe_code)]
            // SAFETY: descriptors stay shared, which is what could go wrong.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
        }
        _ => {}
    }
    Ok(())
}

/// A host whose kernel has no clock that programs can read without asking it: of its code in this process (vdso(7)),
/// the clock's now makes the system call.
fn take_clock_away() -> io::Result<()> {
    let missing = |what: &str| io::Error::other(format!("this process's vDSO has no {what}"));
    let maps = fs::read_to_string("/proc/self/maps")?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).ok_or_else(|| missing("mapping"))?;
    let (start, rest) = line.split_once('-').ok_or_else(|| missing("start"))?;
    let end = rest.split(' ').next().unwrap_or_default();
    let address = |text: &str| u64::from_str_radix(text, 16).map_err(io::Error::other);
    let (start, end) = (address(start)?, address(end)?);
    let memory = File::options().read(true).write(true).open("/proc/self/mem")?;
    let mut image = vec![0; (end - start) as usize];
    memory.read_exact_at(&mut image, start)?;
    let clock = find_symbol(&image, b"__vdso_clock_gettime").ok_or_else(|| missing("clock"))?;
    // mov eax, SYS_clock_gettime; syscall; ret
    let [low, high, ..] = libc::SYS_clock_gettime.to_le_bytes();
    memory.write_all_at(&[0xb8, low, high, 0, 0, 0x0f, 0x05, 0xc3], start + clock)
}

/// The value of a symbol in an ELF file that has a table of dynamic symbols (elf(5)).
fn find_symbol(image: &[u8], name: &[u8]) -> Option<u64> {
    const DYNAMIC_SYMBOLS: u32 = 11;
    const SYMBOL_BYTES: usize = 24;
    let half = |at: usize| Some(u16::from_le_bytes(image.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_le_bytes(image.get(at..at + 8)?.try_into().ok()?) as usize);
    let (sections, bytes, count) = (long(40)?, usize::from(half(58)?), usize::from(half(60)?));
    let header = |index: usize| sections + index * bytes;
    let symbols = (0..count).map(header).find(|at| word(at + 4) == Some(DYNAMIC_SYMBOLS))?;
    let (first, length) = (long(symbols + 24)?, long(symbols + 32)?);
    let names = long(header(word(symbols + 40)? as usize) + 24)?;
    (first..first + length).step_by(SYMBOL_BYTES).find_map(|symbol| {
        let its_name = image.get(names + word(symbol)? as usize..)?;
        let is_it = its_name.strip_prefix(name)?.first() == Some(&0);
        is_it.then(|| long(symbol + 8)).flatten().map(|value| value as u64)
    })
}

/// A host with a file system that neither makes holes nor tells what is cached, and whose KVM has no deadline timer. A
/// filter answers for it; where the jail's own does not allow a call, that counts.
fn refuse_what_some_hosts_lack() -> io::Result<()> {
    const CHECK_EXTENSION: u64 = 0xae03;
    const TSC_DEADLINE_TIMER: u64 = 72;
    let refused = |call: libc::c_long, arguments: &[(u8, u64)], errno: i32| {
        let conditions = arguments
            .iter()
            .map(|(argument, value)| Condition { argument: *argument, comparison: Comparison::Equal(*value) })
            .collect();
        let action = libc::SECCOMP_RET_ERRNO | errno as u32;
        let rules = vec![Rule { conditions, action }];
        (call as u32, Decision::Match { rules, otherwise: libc::SECCOMP_RET_ALLOW })
    };
    // By number.
    let calls = vec![
        refused(libc::SYS_ioctl, &[(1, CHECK_EXTENSION), (2, TSC_DEADLINE_TIMER)], 0),
        (libc::SYS_fallocate as u32, Decision::Always(libc::SECCOMP_RET_ERRNO | libc::EOPNOTSUPP as u32)),
        refused(libc::SYS_preadv2, &[(5, libc::RWF_NOWAIT as u64)], libc::EOPNOTSUPP),
    ];
    let allow = libc::SECCOMP_RET_ALLOW;
    rustix::thread::set_no_new_privs(true)?;
    cloche_seccomp::install(&assemble(&Policy { calls, default: allow, newer: allow }), 0)
}
