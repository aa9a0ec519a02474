//! The parts of KVM for which kvm-ioctls has no safe wrapper: handing guest memory to a VM, interrupting a running
//! vCPU, what KVM leaves in the shared `kvm_run` page when it gives up, and the descriptors of its statistics.
#![allow(unsafe_code)]

use std::{
    cell::Cell,
    fs::File,
    io,
    ops::Range,
    os::fd::{AsRawFd, FromRawFd, RawFd},
    ptr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_run, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::kvm_statistics::KvmStatistics;
use crate::{
    boot::layout,
    guest_memory::{GuestMemory, Part},
    virtio::{
        mem::ChunkSlots,
        registers::{PAGE_BYTES, RegisterPages},
    },
};

// One page of registers is one device's place.
const _: () = assert!(PAGE_BYTES as u64 == layout::VIRTIO_MMIO_BYTES);

/// Guest memory in KVM: a slot for each part of it, whether that is there or not, in the order of their addresses.
pub struct Slots {
    memory: GuestMemory,
    /// Registers that the guest reads from memory, and which devices have some.
    registers: OnceLock<(RegisterPages, Vec<Range<usize>>)>,
    vm: OnceLock<Arc<VmFd>>,
    logs_dirty_pages: AtomicBool,
}

impl Slots {
    /// No machine has the memory yet.
    pub fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            registers: OnceLock::new(),
            vm: OnceLock::new(),
            logs_dirty_pages: AtomicBool::new(false),
        }
    }

    /// Pages that the guest may read: registers of virtio devices, by runs of their numbers. Only the first call counts.
    pub fn add_registers(&self, pages: RegisterPages, devices: Vec<Range<usize>>) {
        let _ = self.registers.set((pages, devices));
    }

    /// Makes all memory that is there the machine's, and the pages of registers, if KVM has read-only memory.
    pub fn fill(&self, vm: &VmFd, read_only: bool) -> Result<(), kvm_ioctls::Error> {
        self.present().try_for_each(|slot| slot.set(vm, slot.part.bytes, 0))?;
        let after_memory = u32::try_from(self.all().count()).unwrap_or(u32::MAX);
        let registers = self.registers.get().into_iter().filter(|_| read_only);
        let runs = registers.flat_map(|(pages, devices)| devices.iter().map(move |run| (pages, run)));
        (after_memory..).zip(runs).try_for_each(|(number, (pages, run))| {
            let offset = run.start * PAGE_BYTES;
            let start =
                GuestAddress(layout::VIRTIO_MMIO_START + run.start as u64 * layout::VIRTIO_MMIO_BYTES);
            let bytes = run.len() * PAGE_BYTES;
            let part = Part { start, offset, bytes, present: true };
            let host_address = pages.as_ptr() as u64 + offset as u64;
            Slot { number, part, host_address, read_only: true }.set(vm, bytes, 0)
        })
    }

    /// What [`Slots::fill`] was given; only the first call counts.
    pub fn attach(&self, vm: Arc<VmFd>) {
        let _ = self.vm.set(vm);
    }

    fn all(&self) -> impl Iterator<Item = Slot> + '_ {
        let parts = self.memory.iter().flat_map(|region| {
            let host_address = region.as_ptr() as u64;
            let read_only = region.is_read_only();
            region.parts().map(move |part| (host_address + part.offset as u64, part, read_only))
        });
        (0..).zip(parts).map(|(number, (host_address, part, read_only))| Slot {
            number,
            part,
            host_address,
            read_only,
        })
    }

    fn present(&self) -> impl Iterator<Item = Slot> + '_ {
        self.all().filter(|slot| slot.part.present)
    }

    fn vm(&self) -> Result<&VmFd, kvm_ioctls::Error> {
        self.vm.get().map(AsRef::as_ref).ok_or(kvm_ioctls::Error::new(libc::EBADF))
    }

    fn flags(&self) -> u32 {
        if self.logs_dirty_pages.load(Ordering::Relaxed) { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }
    }

    /// Has KVM note which pages the guest writes to, or not any more; a guest may run meanwhile (Linux
    /// `Documentation/virt/kvm/api.rst` §4.35: flags can be changed).
    pub fn log_dirty_pages(&self, enabled: bool) -> Result<(), kvm_ioctls::Error> {
        if self.logs_dirty_pages() != enabled {
            let flags = if enabled { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            let vm = self.vm()?;
            self.present().try_for_each(|slot| slot.set(vm, slot.part.bytes, flags))?;
            self.logs_dirty_pages.store(enabled, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether it does.
    pub fn logs_dirty_pages(&self) -> bool {
        self.logs_dirty_pages.load(Ordering::Relaxed)
    }

    /// Pages that the guest has written to since the last call, while they are noted.
    pub fn take_dirty_pages(&self) -> Result<u64, kvm_ioctls::Error> {
        let vm = self.vm()?;
        let mut pages = 0;
        for slot in self.present() {
            let bitmap = vm.get_dirty_log(slot.number, slot.part.bytes)?;
            pages += bitmap.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        }
        Ok(pages)
    }

    fn set_chunk(&self, start: GuestAddress, present: bool) -> io::Result<()> {
        let set = || {
            let slot = self.all().find(|slot| slot.part.start == start);
            let slot = slot.ok_or(kvm_ioctls::Error::new(libc::EINVAL))?;
            // A slot without a size is none (Linux `Documentation/virt/kvm/api.rst` §4.35).
            slot.set(self.vm()?, if present { slot.part.bytes } else { 0 }, self.flags())
        };
        set().map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

impl ChunkSlots for Slots {
    fn insert(&self, start: GuestAddress) -> io::Result<()> {
        self.set_chunk(start, true)
    }

    fn remove(&self, start: GuestAddress) -> io::Result<()> {
        self.set_chunk(start, false)
    }
}

/// One slot.
struct Slot {
    number: u32,
    part: Part,
    host_address: u64,
    read_only: bool,
}

impl Slot {
    fn set(&self, vm: &VmFd, bytes: usize, flags: u32) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: self.number,
            flags: flags | if self.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: self.part.start.0,
            memory_size: bytes as u64,
            userspace_addr: self.host_address,
        };
        // SAFETY: the part is mapped with at least this size until the process ends, does not overlap another one
        // (GuestMemory's invariant; registers lie where no memory is), and nobody in this process holds references into
        // it but to atomic words of registers, which the guest cannot write. `self.registers` keeps those mapped.
        unsafe { vm.set_user_memory_region(region) }
    }
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
