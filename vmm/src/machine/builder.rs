//! From open files to a machine that is ready to run.
//!
//! ```text
//!   main thread            memory ──▶ jail ──▶ kernel, initramfs, tables ──┐
//!                             ├─▶ thread: VM, irqchip, slots, vCPUs, fds ──┴─▶ registers ──▶ Machine
//!                             └─▶ threads of vCPUs, which wait for theirs
//! ```
//! The two sides are independent, and KVM's is mostly waiting: KVM_CREATE_VM alone waits some 10 ms for the host's RCU.
//! So the jail is closed meanwhile, and all threads are made before it is.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::PathBuf,
    sync::{Arc, Mutex, atomic::AtomicUsize},
    thread,
};

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    bus::Bus,
    cpu,
    cpu_template::{self, LackingFeatures},
    interrupts::Lines,
    kvm::{self as kvm_memory, Slots},
    lifecycle::Gate,
    open::Opened,
    report::Reporter,
    requests::Subject,
    vcpu::{self, Endings, Shared, VcpuThread},
};
use crate::{
    backends::{disk::SECTOR_BYTES, socket::Sockets},
    boot::{
        self, EntryPoint, WriteError, bzimage,
        cmdline::{self, CmdlineTooLong},
        initramfs::{self, InitramfsError, Part},
        kernel::{self, KernelError},
        layout, long_mode, mp_table, pvh,
    },
    config::{MIN_MEMORY_MIB, VmConfig},
    devices::{
        console::Console,
        serial::{self, SerialPort},
    },
    event::Mark,
    guest_memory::{self, GuestMemory, MapError},
    jail::{Jail, JailError, ThreadKind},
    syscalls,
    virtio::{
        balloon::Balloon,
        block::Block,
        console::Terminal,
        counters::DeviceCounters,
        device::{Device, InterruptStatus},
        file_system::FileSystem,
        limiter::Limiter,
        mem::MemoryDevice,
        mmio::{MmioTransport, QUEUE_NOTIFY},
        net::Net,
        pmem::{self, Pmem},
        registers::RegisterPages,
        rng::Rng,
        vsock::Vsock,
        worker::Worker,
    },
};

/// Interrupt lines for virtio devices: of the IOAPIC's 24, those that neither legacy hardware nor its drivers claim.
/// Further devices share them, which the lines' pulses allow: each pulse makes the driver look at all its devices.
const VIRTIO_LINES: [u32; 17] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// A disk's thread needs no more: it moves no data itself.
const DISK_STACK_BYTES: usize = 64 * 1024;

/// A machine that has not run yet.
pub struct Machine {
    /// Holds ioeventfds; closed last.
    pub vm: Arc<VmFd>,
    /// vCPUs by index, and the threads that wait for them.
    pub vcpus: Vec<(VcpuFd, VcpuThread)>,
    /// Devices for the event loop.
    pub workers: Vec<Worker>,
    /// Signalled when the machine ends.
    pub end: EventFd,
    /// Readable when SIGTERM has come.
    pub terminate: OwnedFd,
    /// Signalled when the last vCPU parks.
    pub all_parked: EventFd,
    /// Where clients of the control socket connect.
    pub listener: Option<UnixListener>,
    /// What they can ask about.
    pub subject: Subject,
    /// What has to reach the host when the guest has ended, if it can send anything.
    pub last_words: Option<LastWords>,
}

/// What the guest has sent and the host has not taken yet.
pub struct LastWords {
    /// Makes the socket device take what is in its queue.
    pub doorbell: EventFd,
    /// Bytes that the device has taken and not yet passed on.
    pub buffered: Arc<AtomicUsize>,
}

/// Why KVM did not give us a machine.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A request failed.
    #[error("{call} failed; run `cloche doctor`")]
    Call {
        /// Which.
        call: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The processor is not what was asked for.
    #[error(transparent)]
    Cpu(#[from] LackingFeatures),
}

/// Why guest memory could not be filled.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel's file.
    #[error("the guest kernel {path:?} cannot be booted")]
    Kernel {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: KernelError,
    },
    /// The initramfs.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineTooLong),
    /// A table in low memory.
    #[error(transparent)]
    Table(#[from] WriteError),
}

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// Eventfds or a thread.
    #[error("setting up {what} failed")]
    Resources {
        /// What for.
        what: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// KVM.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// Guest memory's content.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The process could not be locked in.
    #[error(transparent)]
    Jail(#[from] JailError),
}

/// Builds the machine and closes the jail; the console log stays with the caller.
pub fn build(
    config: &VmConfig,
    opened: Opened,
    jail: &mut Jail,
    console: Arc<Mutex<Console>>,
    reporter: Arc<Reporter>,
) -> Result<Machine, BuildError> {
    let limits = opened.limits(config.vcpus);
    let Opened {
        kvm,
        ports,
        mut kernel,
        initramfs,
        disks,
        pmems,
        links,
        share,
        terminal,
        console_log: _,
        control,
        vsock: host_programs,
    } = opened;
    let regions = layout::memory_regions(config.memory_bytes());
    let mut memory = guest_memory::map(&regions)?;
    let resources = |what| move |source| BuildError::Resources { what, source };
    let mut added = None;
    if let Some(device) = &config.memory_device {
        let start = layout::added_memory_start(&regions);
        let region = guest_memory::map_pluggable(start, u64::from(device.size_mib) << 20)?;
        memory = guest_memory::with_region(&memory, region.clone())?;
        added = Some((region, device.requested_mib));
    }
    let mut pmem_regions = Vec::new();
    for file in &pmems {
        let start = layout::next_file_start(memory.last_addr().0.saturating_add(1));
        let bytes = file.sectors() * SECTOR_BYTES;
        let region =
            guest_memory::map_file(start, file.as_fd(), bytes, pmem::region_bytes(bytes), file.read_only())?;
        memory = guest_memory::with_region(&memory, region.clone())?;
        pmem_regions.push(region);
    }
    let slots = Arc::new(Slots::new(memory.clone()));

    let mut devices = Devices::new(&memory);
    let mut disk_work = Vec::new();
    for (disk, its) in disks.into_iter().zip(&config.disks) {
        let (block, work) = Block::new(disk, &its.id, its.limit).map_err(resources("a block device"))?;
        devices.add(Box::new(block)).map_err(resources("a block device"))?;
        disk_work.extend(work);
    }
    for (file, region) in pmems.into_iter().zip(&pmem_regions) {
        let device = Pmem::new(file, region.start_addr().0, region.len());
        let (device, work) = device.map_err(resources("persistent memory"))?;
        devices.add(Box::new(device)).map_err(resources("persistent memory"))?;
        disk_work.extend(work);
    }
    for (link, net) in links.into_iter().zip(&config.nets) {
        let limiter = |limit| Limiter::new(limit).map_err(resources("a network device"));
        let (receive, send) = (limiter(net.receive_limit)?, limiter(net.send_limit)?);
        let device = Net::new(link, net.mac, net.mtu, receive, send);
        devices.add(Box::new(device)).map_err(resources("a network device"))?;
    }
    let mut balloon = None;
    if let Some(its) = &config.balloon {
        let device =
            Balloon::new(its, config.memory_mib, MIN_MEMORY_MIB).map_err(resources("the balloon"))?;
        balloon = Some(device.handle());
        devices.add(Box::new(device)).map_err(resources("the balloon"))?;
    }
    let mut memory_device = None;
    if let Some((region, requested_mib)) = added {
        let device = MemoryDevice::new(region, Box::new(slots.clone()), requested_mib);
        memory_device = Some(device.handle());
        devices.add(Box::new(device)).map_err(resources("the memory device"))?;
    }
    if config.console.is_some() {
        let device = Terminal::new(console.clone(), terminal);
        devices.add(Box::new(device)).map_err(resources("the console device"))?;
    }
    let mut last_words = None;
    if let Some(vsock) = &config.vsock {
        let device = Vsock::new(vsock.guest_cid, Sockets::new(ports).listening(host_programs));
        let buffered = device.buffered();
        let doorbell = devices.add(Box::new(device)).map_err(resources("the socket device"))?;
        last_words = Some(LastWords { doorbell, buffered });
    }
    if config.rng {
        devices.add(Box::new(Rng)).map_err(resources("the entropy device"))?;
    }
    if let (Some(channel), Some(share)) = (share, &config.share) {
        let device = FileSystem::new(&share.tag, channel);
        devices.add(Box::new(device)).map_err(resources("the file system device"))?;
    }
    let Devices { workers, mut transports, counters, lines, doorbells, interrupts, .. } = devices;
    let (pages, shown) = show_registers(&mut transports).map_err(resources("registers"))?;
    slots.add_registers(pages, shown);
    let serial_line = interrupts.line(serial::INTERRUPT_LINE);
    let end = EventFd::new(EFD_NONBLOCK).map_err(resources("the event loop"))?;
    let wake = end.try_clone().map_err(resources("the event loop"))?;
    let all_parked = EventFd::new(EFD_NONBLOCK).map_err(resources("the event loop"))?;
    let parked = all_parked.try_clone().map_err(resources("the event loop"))?;
    let gate = Gate::new(config.vcpus.into(), parked);
    let bus = Bus::new(SerialPort::new(Box::new(serial_line), console.clone()), transports);
    let shared = Arc::new(Shared::new(bus, Endings::new(wake), reporter.clone(), gate, config.vcpus));
    // Before there are other threads: it blocks the signal for those to come.
    let terminate = syscalls::sigterm_fd().map_err(resources("SIGTERM"))?;
    kvm_memory::install_kick_handler().map_err(resources("the signal of vCPU threads"))?;

    let (Created { vm, vcpus }, threads, start) = thread::scope(|scope| {
        let setting_up = jail.confined(ThreadKind::KvmSetup, || {
            let mut created = Created::default();
            let result = created.create(&kvm, &slots, config, &doorbells);
            reporter.mark(Mark::KvmReady);
            (created, result)
        });
        let setting_up = thread::Builder::new()
            .name("kvm-setup".into())
            .spawn_scoped(scope, setting_up)
            .map_err(resources("a thread"))?;
        let load_jailed = || {
            jail.leave_host()?;
            for work in disk_work {
                let work = jail.confined(ThreadKind::Disk, work);
                let disk = thread::Builder::new().name("disk".into()).stack_size(DISK_STACK_BYTES);
                disk.spawn(work).map_err(resources("a disk's thread"))?;
            }
            let threads = (0..config.vcpus).map(|index| vcpu::spawn(index, jail, &shared));
            let threads: Vec<_> = threads.collect::<Result<_, _>>().map_err(resources("a vCPU's thread"))?;
            jail.close(limits)?;
            let start = load(config, &memory, &mut kernel, initramfs, &lines)?;
            reporter.mark(Mark::KernelLoaded);
            Ok::<_, BuildError>((threads, start))
        };
        let loaded = load_jailed();
        // In any case: a thread whose result nobody takes would have to close it, and has no right to.
        let created = setting_up.join().ok().flatten();
        let (threads, start) = loaded?;
        // A thread without its filter has made `close` fail.
        let panicked = || io::Error::other("its thread panicked");
        let (created, result) = created.ok_or_else(panicked).map_err(resources("the virtual machine"))?;
        result?;
        Ok::<_, BuildError>((created, threads, start))
    })?;
    let vm = vm.ok_or_else(|| io::Error::other("KVM made none")).map_err(resources("the virtual machine"))?;
    if let Some(boot_vcpu) = vcpus.first() {
        cpu::set_registers(boot_vcpu, start.entry, start.page_tables)
            .map_err(|source| CreateError::Call { call: "setting the boot vCPU's registers", source })?;
    }
    let vcpus = vcpus.into_iter().zip(threads).collect();
    let kvm = kvm_memory::vm_statistics(&vm);
    let vm = Arc::new(vm);
    slots.attach(vm.clone());
    interrupts.attach(vm.clone());
    let subject = Subject { shared, console, memory, balloon, memory_device, devices: counters, kvm, slots };
    Ok(Machine { vm, vcpus, workers, end, terminate, all_parked, listener: control, subject, last_words })
}

/// Has drivers read registers from memory, where they can. Returns it, and runs of devices' numbers that have some.
fn show_registers(transports: &mut [MmioTransport]) -> io::Result<(RegisterPages, Vec<Range<usize>>)> {
    let pages = RegisterPages::new(transports.len()).map_err(io::Error::other)?;
    let mut runs: Vec<Range<usize>> = Vec::new();
    let shown = transports.iter_mut().enumerate().filter(|(_, transport)| transport.can_be_shown());
    for (index, transport) in shown {
        transport.show_in(pages.page(index));
        match runs.last_mut().filter(|run| run.end == index) {
            Some(run) => run.end += 1,
            None => runs.push(index..index + 1),
        }
    }
    Ok((pages, runs))
}

/// virtio devices as they are added, each with the next address and interrupt line.
struct Devices<'a> {
    memory: &'a GuestMemory,
    workers: Vec<Worker>,
    transports: Vec<MmioTransport>,
    counters: Vec<Arc<DeviceCounters>>,
    /// Interrupt line of each device.
    lines: Vec<u32>,
    /// Eventfds that a write to a device's doorbell signals, in the order of the devices.
    doorbells: Vec<EventFd>,
    interrupts: Arc<Lines>,
}

impl<'a> Devices<'a> {
    fn new(memory: &'a GuestMemory) -> Self {
        Self {
            memory,
            workers: vec![],
            transports: vec![],
            counters: vec![],
            lines: vec![],
            doorbells: vec![],
            interrupts: Arc::default(),
        }
    }

    /// Adds a device and returns its doorbell.
    fn add(&mut self, device: Box<dyn Device>) -> io::Result<EventFd> {
        let line = VIRTIO_LINES.iter().copied().cycle().nth(self.lines.len()).unwrap_or_default();
        let interrupt = Arc::new(InterruptStatus::new(Box::new(self.interrupts.line(line))));
        let (worker, handle) = Worker::new(device, self.memory.clone(), interrupt)?;
        let doorbell = worker.doorbell().try_clone()?;
        self.doorbells.push(worker.doorbell().try_clone()?);
        self.lines.push(line);
        self.counters.push(handle.counters().clone());
        self.workers.push(worker);
        self.transports.push(MmioTransport::new(handle));
        Ok(doorbell)
    }
}

/// KVM's side: everything but the boot vCPU's registers. What a failure leaves is closed by whoever takes it: the thread
/// that makes it may close nothing.
#[derive(Default)]
struct Created {
    vm: Option<VmFd>,
    vcpus: Vec<VcpuFd>,
}

impl Created {
    fn create(
        &mut self,
        kvm: &Kvm,
        slots: &Slots,
        config: &VmConfig,
        doorbells: &[EventFd],
    ) -> Result<(), CreateError> {
        let failed = |call| move |source| CreateError::Call { call, source };
        let mut cpuid = cpu::machine_cpuid(kvm, config.vcpus).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        cpu_template::apply(&mut cpuid, config.cpu_template)?;
        let vm = self.vm.insert(kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?);
        let read_only = kvm.check_extension(Cap::ReadonlyMem);
        slots.fill(vm, read_only).map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        without_counters(vm).map_err(failed("KVM_ENABLE_CAP"))?;
        if kvm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(layout::KVM_TSS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        }
        vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        if !kvm.check_extension(Cap::TscDeadlineTimer) && kvm.check_extension(Cap::Pit2) {
            // Only to calibrate a local APIC timer that counts at an unknown rate; it costs a kernel thread.
            let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            vm.create_pit2(config).map_err(failed("KVM_CREATE_PIT2"))?;
        }
        for index in 0..config.vcpus {
            self.vcpus.push(vm.create_vcpu(index.into()).map_err(failed("KVM_CREATE_VCPU"))?);
        }
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            vcpu.set_cpuid2(&cpu::for_vcpu(&cpuid, index)).map_err(failed("KVM_SET_CPUID2"))?;
            cpu::set_msrs(vcpu).map_err(failed("KVM_SET_MSRS"))?;
            cpu::set_local_interrupts(vcpu).map_err(failed("KVM_SET_LAPIC"))?;
        }
        let mut address = layout::VIRTIO_MMIO_START + QUEUE_NOTIFY;
        for doorbell in doorbells {
            // One doorbell for all queues of a device: each registration waits for the host's SRCU.
            vm.register_ioevent(doorbell, &IoEventAddress::Mmio(address), NoDatamatch)
                .map_err(failed("KVM_IOEVENTFD"))?;
            address += layout::VIRTIO_MMIO_BYTES;
        }
        Ok(())
    }
}

/// Takes away counters, of which AMD's processors have four without a bit in CPUID; before there is a vCPU (Linux
/// Documentation/virt/kvm/api.rst, KVM_CAP_PMU_CAPABILITY). EINVAL is the answer of a KVM that gives guests none anyway,
/// and of one before Linux 5.18, where they stay.
fn without_counters(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let args = [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0];
    match vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, args, ..Default::default() }) {
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        other => other,
    }
}

/// How the boot vCPU starts.
struct Start {
    entry: EntryPoint,
    page_tables: Option<vm_memory::GuestAddress>,
}

/// Guest memory's side.
fn load(
    config: &VmConfig,
    memory: &GuestMemory,
    kernel: &mut File,
    initramfs: Vec<Part>,
    lines: &[u32],
) -> Result<Start, LoadError> {
    let regions = layout::memory_regions(config.memory_bytes());
    let low_memory_bytes = regions.first().map_or(0, |(_, bytes)| *bytes);
    let usable = layout::usable_ranges(&regions);
    let line = cmdline::build(config.vcpus, lines, &config.cmdline_extra)?;
    let kernel = kernel::load(memory, kernel, low_memory_bytes)
        .map_err(|source| LoadError::Kernel { path: config.kernel.clone(), source })?;
    let initramfs = initramfs::load(memory, initramfs, kernel.start..kernel.end, kernel.initramfs_limit)?;
    boot::write_cmdline(memory, &line)?;
    let interrupts = lines.iter().copied().chain([serial::INTERRUPT_LINE]);
    mp_table::write(memory, config.vcpus, interrupts)?;
    let page_tables = match (kernel.entry, kernel.setup_header) {
        (EntryPoint::Linux64 { .. }, Some(header)) => {
            bzimage::write_zero_page(memory, &header, &usable, initramfs)?;
            long_mode::write_gdt(memory, long_mode::descriptor::CODE_64)?;
            Some(long_mode::write_page_tables(memory)?)
        }
        _ => {
            pvh::write_start_info(memory, &usable, initramfs)?;
            long_mode::write_gdt(memory, long_mode::descriptor::CODE_32)?;
            None
        }
    };
    Ok(Start { entry: kernel.entry, page_tables })
}
