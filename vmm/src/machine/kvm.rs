//! The parts of KVM for which kvm-ioctls has no safe wrapper: handing guest memory to a VM, interrupting a running
//! vCPU, what KVM leaves in the shared `kvm_run` page when it gives up, and the descriptors of its statistics.
#![allow(unsafe_code)]

use std::{
    cell::Cell,
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, RawFd},
    ptr,
};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_run, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::kvm_statistics::KvmStatistics;
use crate::guest_memory::GuestMemory;

/// Makes all of `memory` the guest's, one slot for each region.
pub fn set_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), kvm_ioctls::Error> {
    set_slots(vm, memory, 0)
}

/// Has KVM note which pages the guest writes to, or not any more; a guest may run meanwhile (Linux
/// `Documentation/virt/kvm/api.rst` §4.35: flags can be changed).
pub fn log_dirty_pages(vm: &VmFd, memory: &GuestMemory, enabled: bool) -> Result<(), kvm_ioctls::Error> {
    set_slots(vm, memory, if enabled { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
}

/// Pages that the guest has written to since the last call, while they are noted.
pub fn take_dirty_pages(vm: &VmFd, memory: &GuestMemory) -> Result<u64, kvm_ioctls::Error> {
    let mut pages = 0;
    for (slot, region) in (0..).zip(memory.iter()) {
        let size = usize::try_from(region.len()).unwrap_or(usize::MAX);
        let bitmap = vm.get_dirty_log(slot, size)?;
        pages += bitmap.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
    }
    Ok(pages)
}

fn set_slots(vm: &VmFd, memory: &GuestMemory, flags: u32) -> Result<(), kvm_ioctls::Error> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let Ok(host_address) = region.get_host_address(vm_memory::MemoryRegionAddress(0)) else { continue };
        let region = kvm_userspace_memory_region {
            slot,
            flags,
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

/// KVM's statistics of a vCPU; see [`KvmStatistics`].
pub fn vcpu_statistics(vcpu: &VcpuFd) -> Option<KvmStatistics> {
    statistics(vcpu.as_raw_fd())
}

/// KVM's statistics of a machine; see [`KvmStatistics`].
pub fn vm_statistics(vm: &VmFd) -> Option<KvmStatistics> {
    statistics(vm.as_raw_fd())
}

fn statistics(of: RawFd) -> Option<KvmStatistics> {
    // linux/kvm.h: _IO(KVMIO, 0xce).
    const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
    // SAFETY: the ioctl takes no argument and returns a new file descriptor or an error.
    let fd = unsafe { libc::ioctl(of, KVM_GET_STATS_FD, 0) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel has just made it for us.
    Some(KvmStatistics::new(unsafe { File::from_raw_fd(fd) }))
}
