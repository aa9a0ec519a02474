//! The parts of KVM for which kvm-ioctls has no safe wrapper: handing guest memory to a VM, interrupting a running
//! vCPU, what KVM leaves in the shared `kvm_run` page when it gives up, and KVM's statistics.
#![allow(unsafe_code)]

use std::{
    cell::Cell,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::fs::FileExt,
    },
    ptr,
};

use kvm_bindings::{kvm_run, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::guest_memory::GuestMemory;

/// Makes all of `memory` the guest's, one slot for each region.
pub fn set_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), kvm_ioctls::Error> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let Ok(host_address) = region.get_host_address(vm_memory::MemoryRegionAddress(0)) else { continue };
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host_address as u64,
        };
        // SAFETY: the region is mapped with exactly this size until the process ends, does not overlap another one
        // (GuestMemory's invariant), and nobody in this process holds references into it.
        unsafe { vm.set_user_memory_region(region) }?;
    }
    Ok(())
}

thread_local! {
    /// The `kvm_run` page of the vCPU that runs on this thread.
    static RUNNING: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that makes a vCPU thread leave `KVM_RUN`.
pub fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Installs the handler of [`kick_signal`], for the process.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        RUNNING.with(|running| {
            let run = running.get();
            if !run.is_null() {
                // SAFETY: a thread sets RUNNING only while its VcpuFd, which maps the page, is alive (`Kickable`).
                let flag = unsafe { &raw mut (*run).immediate_exit };
                // SAFETY: as above; the kernel reads this byte when it enters and leaves KVM_RUN, hence volatile.
                unsafe { flag.write_volatile(1) };
            }
        });
    }
    register_signal_handler(kick_signal(), on_kick)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// While it lives, [`kick_signal`] ends this thread's current or next `KVM_RUN`.
///
/// The flag is set in the page that the kernel reads, so a signal that comes just before `KVM_RUN` is not lost.
pub struct Kickable<'a> {
    /// The vCPU of this thread.
    pub vcpu: &'a mut VcpuFd,
}

impl<'a> Kickable<'a> {
    /// Makes this thread's vCPU kickable.
    pub fn new(vcpu: &'a mut VcpuFd) -> Self {
        RUNNING.set(vcpu.get_kvm_run());
        Self { vcpu }
    }
}

impl Drop for Kickable<'_> {
    fn drop(&mut self) {
        RUNNING.set(ptr::null_mut());
    }
}

/// `suberror` of the last `KVM_EXIT_INTERNAL_ERROR`.
pub fn internal_suberror(vcpu: &mut VcpuFd) -> u32 {
    // SAFETY: every field of this union is plain integers, valid for any bytes; the caller has seen the exit reason
    // that makes it this one.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
}

/// How often the vCPU has left the guest, exits that KVM handled by itself included. `None` where KVM does not tell:
/// it has binary statistics since Linux 5.14.
pub fn exit_count(vcpu: &VcpuFd) -> Option<u64> {
    // linux/kvm.h: _IO(KVMIO, 0xce).
    const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
    // SAFETY: the ioctl takes no argument and returns a new file descriptor or an error.
    let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just made it for us.
    let stats = unsafe { File::from_raw_fd(fd) };
    statistic(&stats, b"exits")
}

/// A single-valued statistic by its name (Linux `Documentation/virt/kvm/api.rst` §4.133: a header, descriptors of one
/// size, and 64-bit values; numbers are in the host's byte order).
fn statistic(stats: &File, name: &[u8]) -> Option<u64> {
    const DESCRIPTOR_BYTES: usize = 16;
    const MAX_NAME_BYTES: usize = 256;
    const MAX_DESCRIPTORS: usize = 1024;
    let [_flags, name_size, count, _id, descriptors, data] = words(stats, 0)?;
    let size = DESCRIPTOR_BYTES + (name_size as usize).min(MAX_NAME_BYTES);
    let mut table = vec![0; size * (count as usize).min(MAX_DESCRIPTORS)];
    stats.read_exact_at(&mut table, descriptors.into()).ok()?;
    for descriptor in table.chunks_exact(size) {
        // Flags (4), exponent (2), size (2), offset (4), bucket size (4), name.
        let (head, its_name) = descriptor.split_at_checked(DESCRIPTOR_BYTES)?;
        if its_name.strip_prefix(name).is_some_and(|rest| rest.first().is_none_or(|byte| *byte == 0)) {
            let offset = u32::from_ne_bytes(head.get(8..12)?.try_into().ok()?);
            let mut value = [0; 8];
            stats.read_exact_at(&mut value, u64::from(data) + u64::from(offset)).ok()?;
            return Some(u64::from_ne_bytes(value));
        }
    }
    None
}

fn words<const N: usize>(file: &File, offset: u64) -> Option<[u32; N]> {
    let mut bytes = vec![0; N * 4];
    file.read_exact_at(&mut bytes, offset).ok()?;
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_ne_bytes(bytes.try_into().ok()?);
    }
    Some(words)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn stats_file(names: &[&str], values: &[u64]) -> File {
        const NAME_BYTES: usize = 8;
        let descriptors = 24u32;
        let data = descriptors + names.len() as u32 * (16 + NAME_BYTES as u32);
        let mut bytes = Vec::new();
        for word in [0, NAME_BYTES as u32, names.len() as u32, 0, descriptors, data] {
            bytes.extend(word.to_ne_bytes());
        }
        for (index, name) in names.iter().enumerate() {
            bytes.extend([0; 8]);
            bytes.extend((index as u32 * 8).to_ne_bytes());
            bytes.extend([0; 4]);
            let mut padded = name.as_bytes().to_vec();
            padded.resize(NAME_BYTES, 0);
            bytes.extend(padded);
        }
        values.iter().for_each(|value| bytes.extend(value.to_ne_bytes()));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn statistic_is_found_by_its_whole_name() {
        let file = stats_file(&["io_exit", "exits_x", "exits", "halt"], &[1, 2, 3, 4]);
        assert_eq!(statistic(&file, b"exits"), Some(3));
        assert_eq!(statistic(&file, b"exit"), None);
        assert_eq!(statistic(&tempfile::tempfile().unwrap(), b"exits"), None);
    }
}
