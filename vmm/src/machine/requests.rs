//! What a control request does to the machine.

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    thread::JoinHandle,
};

use tracing::warn;
use vmm_sys_util::signal::Killable;

use super::{
    kvm::{self, Slots},
    kvm_statistics::KvmStatistics,
    lifecycle::{Effect, Lifecycle},
    report::monotonic_ns,
    vcpu::{Ending, Shared},
};
use crate::{
    config::MEMORY_BLOCK_MIB,
    control::api::{
        Answer, BalloonStats, Info, KvmStats, MachineStats, MemoryDeviceStats, MemoryStats, Outcome,
        RefusalCode, Request, Resize, RunState, Stop,
    },
    devices::console::{CAPACITY, Console},
    guest_memory::{self, GuestMemory},
    syscalls,
    virtio::{
        balloon::{BalloonHandle, BalloonStatistics},
        counters::DeviceCounters,
        mem::{MemoryHandle, MemoryStatistics},
    },
};

/// What can be asked about the machine, and done to it, while it runs.
pub struct Subject {
    /// Its vCPUs and their gate.
    pub shared: Arc<Shared>,
    /// What the guest printed.
    pub console: Arc<Mutex<Console>>,
    /// Its memory.
    pub memory: GuestMemory,
    /// Its balloon.
    pub balloon: Option<BalloonHandle>,
    /// Its memory that can be added.
    pub memory_device: Option<MemoryHandle>,
    /// Its devices' counters, in the order of their addresses.
    pub devices: Vec<Arc<DeviceCounters>>,
    /// KVM's statistics of the machine, if it tells.
    pub kvm: Option<KvmStatistics>,
    /// Its memory in KVM.
    pub slots: Arc<Slots>,
}

impl Subject {
    /// What the guest has: from the start, and what it has plugged of what can be added.
    fn memory_bytes(&self) -> u64 {
        let added_mib = self.memory_device.as_ref().map_or(0, |device| device.statistics().plugged_mib);
        guest_memory::size_bytes(&self.memory) + (u64::from(added_mib) << 20)
    }
}

/// What comes of a request.
#[derive(Debug)]
pub enum Handled {
    /// This is the answer.
    Now(Outcome),
    /// The answer comes once the machine is paused, or goes on instead.
    WhenPaused,
}

/// The machine from the control socket's side.
pub struct Controls {
    subject: Subject,
    lifecycle: Lifecycle,
    threads: Vec<JoinHandle<()>>,
    started_ns: u64,
}

impl Controls {
    /// For a machine whose vCPUs have no threads yet.
    pub fn new(subject: Subject) -> Self {
        Self { subject, lifecycle: Lifecycle::new(), threads: Vec::new(), started_ns: monotonic_ns() }
    }

    /// A vCPU has its thread.
    pub fn add_thread(&mut self, thread: JoinHandle<()>) {
        self.threads.push(thread);
    }

    /// What the machine does.
    pub fn state(&self) -> RunState {
        self.lifecycle.state()
    }

    fn kick(&self) {
        for thread in &self.threads {
            // It fails only for a thread that is no more.
            let _ = thread.kill(kvm::kick_signal());
        }
    }

    /// Makes all vCPUs leave the guest and their threads end.
    pub fn stop_vcpus(&mut self) {
        self.lifecycle.end(monotonic_ns());
        self.subject.shared.gate.stop();
        self.kick();
    }

    /// Waits for the vCPUs' threads.
    pub fn join(self) {
        for (index, thread) in self.threads.into_iter().enumerate() {
            if thread.join().is_err() {
                warn!(index, "a vCPU's thread panicked");
            }
        }
    }

    /// The gate says that the last vCPU has parked. True if the machine is paused now.
    pub fn vcpus_parked(&mut self) -> bool {
        // The news may be older than a resume.
        if self.subject.shared.gate.all_parked() {
            self.lifecycle.parked(monotonic_ns());
        }
        self.state() == RunState::Paused
    }

    /// The state as an answer.
    pub fn state_answer(&self) -> Outcome {
        Outcome::Answer(Answer::State(self.state()))
    }

    /// Carries out a request.
    pub fn handle(&mut self, request: Request) -> Handled {
        Handled::Now(match request {
            Request::Info => Outcome::Answer(Answer::Info(self.info())),
            Request::Pause => return self.pause(),
            Request::Resume => {
                if self.lifecycle.resume(monotonic_ns()) == Effect::Release {
                    self.subject.shared.gate.release();
                }
                self.state_answer()
            }
            Request::Stop(Stop::Orderly) => {
                self.subject.shared.endings.end(Ending::Stopped);
                Outcome::Answer(Answer::State(RunState::Ending))
            }
            Request::Stop(Stop::Kill) => syscalls::kill_own_process(),
            Request::Stats => Outcome::Answer(Answer::Stats(Box::new(self.stats()))),
            Request::Resize(resize) => self.resize(resize),
            Request::Console { bytes } => {
                let console = self.subject.console.lock().unwrap_or_else(PoisonError::into_inner);
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX).min(CAPACITY);
                Outcome::Answer(Answer::Console(console.tail(bytes)))
            }
            Request::DirtyLog { enabled } => self.log_dirty_pages(enabled),
        })
    }

    fn log_dirty_pages(&mut self, enabled: bool) -> Outcome {
        if let Err(error) = self.subject.slots.log_dirty_pages(enabled) {
            return Outcome::refused(
                RefusalCode::Host,
                format!("KVM_SET_USER_MEMORY_REGION failed: {error}"),
            );
        }
        self.state_answer()
    }

    fn pause(&mut self) -> Handled {
        if self.lifecycle.pause() == Effect::Hold {
            let parked = self.subject.shared.gate.hold();
            self.kick();
            if parked {
                self.vcpus_parked();
            }
        }
        match self.state() {
            RunState::Pausing => Handled::WhenPaused,
            _ => Handled::Now(self.state_answer()),
        }
    }

    fn info(&self) -> Info {
        let Subject { shared, devices, .. } = &self.subject;
        Info {
            vmm_version: env!("CARGO_PKG_VERSION").into(),
            state: self.state(),
            vcpus: u8::try_from(shared.vcpus.len()).unwrap_or(u8::MAX),
            memory_mib: u32::try_from(self.subject.memory_bytes() >> 20).unwrap_or(u32::MAX),
            agent_ready: shared.agent_ready.load(Ordering::Acquire),
            devices: devices.iter().map(|device| device.name().to_owned()).collect(),
        }
    }

    fn stats(&self) -> MachineStats {
        let Subject { shared, memory, balloon, memory_device, devices, kvm, slots, console: _ } =
            &self.subject;
        let now = monotonic_ns();
        let mut counted = KvmStats {
            machine: kvm.as_ref().map(KvmStatistics::values).unwrap_or_default(),
            ..KvmStats::default()
        };
        for statistics in shared.vcpus.iter().filter_map(|vcpu| vcpu.kvm()) {
            for (name, value) in statistics.values() {
                let sum = counted.vcpus.entry(name).or_default();
                *sum = sum.saturating_add(value);
            }
        }
        MachineStats {
            uptime_ns: now.saturating_sub(self.started_ns),
            paused_ns: self.lifecycle.paused_ns(now),
            cpu_ns: syscalls::process_cpu_ns(),
            vcpus: shared.vcpus.iter().map(|vcpu| vcpu.snapshot()).collect(),
            kvm: counted,
            memory: MemoryStats {
                size_bytes: self.subject.memory_bytes(),
                resident_bytes: guest_memory::resident_bytes(memory),
                dirty_pages: slots.logs_dirty_pages().then(|| slots.take_dirty_pages().ok()).flatten(),
                balloon: balloon.as_ref().map(|balloon| {
                    let BalloonStatistics { target_mib, actual_mib, guest } = balloon.statistics();
                    let guest = guest.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
                    BalloonStats { target_mib, actual_mib, guest }
                }),
                device: memory_device.as_ref().map(|device| {
                    let MemoryStatistics { size_mib, requested_mib, plugged_mib } = device.statistics();
                    MemoryDeviceStats { size_mib, requested_mib, plugged_mib }
                }),
            },
            devices: devices.iter().map(|device| device.snapshot()).collect(),
        }
    }

    fn resize(&self, resize: Resize) -> Outcome {
        let Resize { memory_mib, vcpus } = resize;
        if let Some(vcpus) = vcpus {
            let message = format!(
                "vcpus cannot become {vcpus}: a guest without ACPI takes no further vCPU while it runs; start it anew"
            );
            return Outcome::refused(RefusalCode::Unsupported, message);
        }
        match memory_mib {
            Some(memory_mib) => self.resize_memory(memory_mib),
            None => Outcome::refused(RefusalCode::BadRequest, "resize names neither memory_mib nor vcpus"),
        }
    }

    /// More than at the start comes of the memory device, less goes to the balloon. The guest is asked, and gets no
    /// answer out of it: how far it is, the statistics tell.
    fn resize_memory(&self, memory_mib: u32) -> Outcome {
        let Subject { balloon, memory_device, .. } = &self.subject;
        let start_mib = guest_memory::size_bytes(&self.subject.memory) >> 20;
        let start_mib = u32::try_from(start_mib).unwrap_or(u32::MAX);
        if balloon.is_none() && memory_device.is_none() {
            let message = format!(
                "memory_mib cannot become {memory_mib}: this machine has neither a balloon nor memory to add"
            );
            return Outcome::refused(RefusalCode::Unsupported, message);
        }
        let least_mib = start_mib.saturating_sub(balloon.as_ref().map_or(0, BalloonHandle::most_mib));
        let most_mib =
            start_mib.saturating_add(memory_device.as_ref().map_or(0, |device| device.statistics().size_mib));
        let added_mib = memory_mib.saturating_sub(start_mib);
        if !(least_mib..=most_mib).contains(&memory_mib) || !added_mib.is_multiple_of(MEMORY_BLOCK_MIB) {
            let steps = match memory_device {
                Some(_) => format!(", above {start_mib} in steps of {MEMORY_BLOCK_MIB}"),
                None => String::new(),
            };
            let message =
                format!("memory_mib cannot become {memory_mib}; allowed: {least_mib} to {most_mib}{steps}");
            return Outcome::refused(RefusalCode::Unsupported, message);
        }
        if let Some(balloon) = balloon {
            balloon.set_target_mib(start_mib.saturating_sub(memory_mib));
        }
        if let Some(device) = memory_device {
            device.set_requested_mib(added_mib);
        }
        self.state_answer()
    }
}
