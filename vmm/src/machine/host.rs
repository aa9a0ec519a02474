//! What the host has.

use rustix::system::sysinfo;

/// The host's memory in bytes.
pub fn memory_bytes() -> u64 {
    let info = sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}
