//! The device's queues.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    time::Duration,
};

use tracing::warn;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::timerfd::TimerFd;

use super::{
    handle::{BalloonHandle, CONFIG_BYTES},
    pages,
};
use crate::{
    config::BalloonConfig,
    guest_memory::{self, GuestMemory},
    virtio::{
        config_space::ConfigSpace,
        device::{Device, Identity, Poller, Progress, Readiness, Running, device_type},
        queue::{Buffers, Chain, QueueError, VirtQueue},
    },
};

/// Feature bits (§5.5.3).
mod feature {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const PAGE_REPORTING: u64 = 1 << 5;
}

const QUEUE_SIZE: u16 = 128;
/// Inflate, deflate, and those of two features. A driver numbers the queues that it has, so that the last one's number
/// depends on whether it has the third (Linux `virtio_balloon.c`, `init_vqs`; §5.5.2 is read so by all of them).
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE; 4];
const OPTIONAL_QUEUES: usize = 2;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const FIRST_OPTIONAL: usize = 2;

/// Chains of a queue before other devices have their turn: each may cost many system calls.
const CHAINS_PER_TURN: u16 = 16;
/// Bytes of page numbers that one chain may have: 1,024 pages, each of which may be a system call of its own. Linux
/// sends a quarter of it at most.
const MAX_NUMBERS_BYTES: usize = 4 << 10;
/// Bytes of statistics that are looked at. There are ten entries of ten bytes.
const MAX_STATISTICS_BYTES: usize = 1 << 10;
const STATISTIC_BYTES: usize = 10;

/// The device.
pub struct Balloon {
    handle: BalloonHandle,
    features: u64,
    /// Rings when the guest is to be asked for statistics.
    timer: Option<(TimerFd, Duration)>,
    /// The chain that asks for statistics when it is returned.
    statistics: Option<u16>,
    watched: bool,
}

impl Balloon {
    /// A device for a guest with `memory_mib`, of which `least_mib` stay with it.
    pub fn new(config: &BalloonConfig, memory_mib: u32, least_mib: u32) -> io::Result<Self> {
        let mut features = 0;
        let mut timer = None;
        if config.deflate_on_oom {
            features |= feature::DEFLATE_ON_OOM;
        }
        if config.free_page_reporting {
            features |= feature::PAGE_REPORTING;
        }
        if let Some(seconds) = config.statistics_interval_s {
            features |= feature::STATS_VQ;
            let new = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
            timer = Some((new, Duration::from_secs(seconds.get().into())));
        }
        let handle = BalloonHandle::new(config.target_mib, memory_mib.saturating_sub(least_mib));
        Ok(Self { handle, features, timer, statistics: None, watched: false })
    }

    /// Steers the device.
    pub fn handle(&self) -> BalloonHandle {
        self.handle.clone()
    }

    fn statistics_queue(running: &Running) -> Option<usize> {
        (running.features & feature::STATS_VQ != 0).then_some(FIRST_OPTIONAL)
    }

    fn reporting_queue(running: &Running) -> Option<usize> {
        let before = Self::statistics_queue(running).map_or(0, |_| 1);
        (running.features & feature::PAGE_REPORTING != 0).then_some(FIRST_OPTIONAL + before)
    }

    fn serve(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let memory = running.memory;
        let reporting = Self::reporting_queue(running);
        let statistics = Self::statistics_queue(running);
        let mut all = true;
        all &= each_chain(running.queue(INFLATE), memory, |chain| inflate(chain, memory))?;
        all &= each_chain(running.queue(DEFLATE), memory, |_| Ok(()))?;
        if let Some(index) = reporting {
            all &= each_chain(running.queue(index), memory, report)?;
        }
        if let Some(index) = statistics {
            self.take_statistics(running.queue(index), memory)?;
        }
        Ok(if all { Progress::Done } else { Progress::More })
    }

    /// The driver answers a request for statistics, at first without one.
    fn take_statistics(
        &mut self,
        queue: Option<&mut VirtQueue>,
        memory: &GuestMemory,
    ) -> Result<(), QueueError> {
        let Some(queue) = queue else { return Ok(()) };
        // §5.5.6.3: there is one buffer. A driver that sends more gets the rest back when it is asked next.
        while self.statistics.is_none() {
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_doorbell(memory)? {
                    continue;
                }
                return Ok(());
            };
            let bytes = chain.readable.prefix(MAX_STATISTICS_BYTES).to_vec();
            self.handle.guest_tells(bytes.chunks_exact(STATISTIC_BYTES).filter_map(|entry| {
                let (tag, value) = entry.split_first_chunk::<2>()?;
                Some((u16::from_le_bytes(*tag), u64::from_le_bytes(value.try_into().ok()?)))
            }));
            self.statistics = Some(chain.head);
        }
        Ok(())
    }

    fn ask_for_statistics(&mut self, running: &mut Running) -> Result<(), QueueError> {
        let memory = running.memory;
        if let Some((timer, interval)) = &mut self.timer
            && let Err(error) = timer.reset(*interval, None)
        {
            warn!(%error, "the balloon's timer could not be set");
        }
        let Some(index) = Self::statistics_queue(running) else { return Ok(()) };
        if let (Some(queue), Some(head)) = (running.queue(index), self.statistics.take()) {
            queue.push_used(memory, head, 0)?;
        }
        Ok(())
    }
}

/// Handles and returns chains. True if there are no more, and the guest will ring.
fn each_chain(
    queue: Option<&mut VirtQueue>,
    memory: &GuestMemory,
    handle: impl Fn(&Chain) -> Result<(), QueueError>,
) -> Result<bool, QueueError> {
    let Some(queue) = queue else { return Ok(true) };
    for _ in 0..CHAINS_PER_TURN {
        let Some(chain) = queue.pop(memory)? else {
            if queue.enable_doorbell(memory)? {
                continue;
            }
            return Ok(true);
        };
        handle(&chain)?;
        queue.push_used(memory, chain.head, 0)?;
    }
    Ok(false)
}

/// §5.5.6: page numbers, 32 bits each.
fn inflate(chain: &Chain, memory: &GuestMemory) -> Result<(), QueueError> {
    let numbers: &Buffers = &chain.readable;
    if numbers.len() > MAX_NUMBERS_BYTES {
        let problem = "it has more than 4096 bytes of page numbers";
        return Err(QueueError::BadRequest { head: chain.head, problem });
    }
    let numbers = numbers
        .to_vec()
        .chunks_exact(4)
        .filter_map(|number| Some(u32::from_le_bytes(number.try_into().ok()?)))
        .collect();
    for (start, bytes) in pages::ranges(numbers) {
        discard(start, bytes, memory);
    }
    Ok(())
}

/// A range that is not all memory is the driver's mistake, and nothing of it is given back: that harms only itself.
fn discard(start: GuestAddress, bytes: usize, memory: &GuestMemory) {
    if let Ok(slice) = memory.get_slice(start, bytes) {
        guest_memory::discard(&slice);
    }
}

/// §5.5.6.6: ranges of memory that the driver does not use, and keeps away from until they are returned.
fn report(chain: &Chain) -> Result<(), QueueError> {
    for slice in chain.writable.slices() {
        guest_memory::discard(slice);
    }
    Ok(())
}

impl Device for Balloon {
    fn identity(&self) -> Identity {
        Identity {
            device_type: device_type::BALLOON,
            features: self.features,
            queue_sizes: QUEUE_SIZES,
            optional_queues: OPTIONAL_QUEUES,
            config: vec![0; CONFIG_BYTES],
        }
    }

    fn config_space(&self) -> Option<Arc<ConfigSpace>> {
        Some(self.handle.config().clone())
    }

    fn start(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        if let Some((timer, interval)) = &mut self.timer
            && running.features & feature::STATS_VQ != 0
        {
            let set =
                timer.reset(*interval, None).map_err(|error| io::Error::from_raw_os_error(error.errno()));
            match set.and_then(|()| running.poller.add(timer.as_raw_fd())) {
                Ok(()) => self.watched = true,
                Err(error) => warn!(%error, "the balloon's timer could not be set"),
            }
        }
        self.serve(running)
    }

    fn queues_ready(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.serve(running)
    }

    fn fd_ready(&mut self, _: RawFd, _: Readiness, running: &mut Running) -> Result<Progress, QueueError> {
        // An idle balloon's timer is the only one. Nobody reads it: setting it again takes its bell back.
        self.ask_for_statistics(running)?;
        self.serve(running)
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        if let (true, Some((timer, _))) = (std::mem::take(&mut self.watched), &self.timer) {
            poller.remove(timer.as_raw_fd());
        }
        self.statistics = None;
        self.handle.driver_gone();
    }
}
