//! The block device (virtio 1.2 §5.2): one request queue on the event loop, which never waits for the disk.
//!
//! ```text
//!   queue ─▶ Request ─▶ Operation ─┬─ at once, or some in each turn ───┬─▶ status byte, used ring
//!     ▲ limits: a timer            └─ IoThread … eventfd ─▶ Pending ───┘
//!     └───────────────────────────────────── room for more ◀───────────┘
//! ```
//!
//! Requests under way are bounded by the queue's size, whatever the driver publishes. Operations that have begun are
//! finished when the driver resets the device, and the reset waits for them (virtio 1.2 §2.4.2: after it, the device
//! touches nothing of the driver's); those that have not begun are given up. Their results are nobody's then.
//!
//! More queues would not help: all are served by one thread.

mod request;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::RawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::warn;

use self::request::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS, Meaning, Request, status_of, wire};
use super::{
    device::{Device, Identity, Poller, Progress, Readiness, Running, device_type},
    limiter::Limiter,
    queue::{QueueError, VirtQueue},
    under_way::UnderWay,
};
use crate::{
    backends::disk::{Disk, IoThread, Operation, SECTOR_BYTES, Work},
    config::{LimitConfig, MAX_DISK_ID_BYTES},
    guest_memory::{GuestMemory, transfer::GuestByte},
};

const QUEUE_SIZE: u16 = 128;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];
/// How long requests after a turn's first are served before others have their turn.
const TURN: Duration = Duration::from_millis(5);
/// Failed operations that are logged at most: a guest can make them fail for ever.
const MAX_LOGGED_ERRORS: u32 = 5;

/// Feature bits (§5.2.3).
mod feature {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// The device.
pub struct Block {
    disk: Arc<Disk>,
    id: [u8; MAX_DISK_ID_BYTES],
    /// No thread where nothing waits.
    requests: UnderWay<Pending>,
    /// One that nothing waits for, and that is too large for one turn.
    large: Option<(Pending, Operation)>,
    limit: Limiter,
    /// The guest's memory, for what outlives a call. Set by the first request.
    memory: Option<Arc<GuestMemory>>,
    logged_errors: u32,
}

/// A request whose operation is under way.
struct Pending {
    head: u16,
    /// Bytes of data that the device will have written if it succeeds.
    written: usize,
    status: GuestByte,
}

impl Block {
    /// A device for this disk, which its driver knows by `id` (shortened to [`MAX_DISK_ID_BYTES`] bytes), and what a
    /// thread has to do for it, if it needs one.
    pub fn new(disk: Disk, id: &str, limit: Option<LimitConfig>) -> io::Result<(Self, Option<Work>)> {
        let mut padded = [0; MAX_DISK_ID_BYTES];
        for (to, from) in padded.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        let disk = Arc::new(disk);
        let io = if disk.never_waits() { None } else { Some(IoThread::new(disk.clone())?) };
        let (thread, work) = io.unzip();
        let block = Self {
            requests: UnderWay::new(thread),
            large: None,
            disk,
            id: padded,
            limit: Limiter::new(limit)?,
            memory: None,
            logged_errors: 0,
        };
        Ok((block, work))
    }

    /// Takes requests until there are none, a bound is met, or others have to have their turn.
    fn serve(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let guest = running.memory;
        let durable = running.features & feature::FLUSH == 0;
        let memory = self.memory.get_or_insert_with(|| Arc::new(guest.clone())).clone();
        let Some(queue) = running.queue(0) else { return Ok(Progress::Done) };
        if let Some((pending, mut operation)) = self.large.take() {
            match self.disk.try_now(&mut operation) {
                Some(result) => {
                    let status = self.status_of(&operation, &result);
                    pending.answer(status, guest, queue)?;
                }
                None => {
                    self.large = Some((pending, operation));
                    return Ok(Progress::More);
                }
            }
        }
        let mut budget = QUEUE_SIZE;
        // When the first request was answered: most turns have no second one, and need no clock.
        let mut begun: Option<Instant> = None;
        loop {
            queue.disable_doorbell(guest)?;
            loop {
                if self.requests.count() >= usize::from(QUEUE_SIZE) || !self.limit.permits() {
                    // The eventfd or the timer goes on.
                    return Ok(Progress::Done);
                }
                let Some(chain) = queue.pop(guest)? else { break };
                // A disk in memory works at once, which takes its time as well.
                if budget == 0 || begun.is_some_and(|begun| begun.elapsed() > TURN) {
                    queue.put_back(&chain);
                    return Ok(Progress::More);
                }
                if budget < QUEUE_SIZE {
                    begun.get_or_insert_with(Instant::now);
                }
                let head = chain.head;
                let mut request = Request::parse(chain)?;
                self.begin(head, &mut request, &memory, durable, queue)?;
                if self.large.is_some() {
                    return Ok(Progress::More);
                }
                budget -= 1;
            }
            if !queue.enable_doorbell(guest)? {
                return Ok(Progress::Done);
            }
        }
    }

    /// Answers a request, or lets the disk's thread do it.
    fn begin(
        &mut self,
        head: u16,
        request: &mut Request,
        memory: &Arc<GuestMemory>,
        durable: bool,
        queue: &mut VirtQueue,
    ) -> Result<(), QueueError> {
        let written = request.read_bytes();
        let meaning = request.meaning(&self.disk, &self.id, memory, durable);
        self.limit.charge(match &meaning {
            Meaning::Answer { .. } => 0,
            Meaning::Operation(operation) => operation.moved_bytes() as usize,
        });
        let (status, written) = match meaning {
            Meaning::Answer { status, written } => (status, written),
            Meaning::Operation(mut operation) => match self.disk.try_now(&mut operation) {
                Some(result) => (self.status_of(&operation, &result), written),
                None => match request.status_byte(memory) {
                    Some(status) => {
                        let pending = Pending { head, written, status };
                        match self.requests.has_thread() {
                            true => self.requests.submit(pending, operation),
                            false => self.large = Some((pending, operation)),
                        }
                        return Ok(());
                    }
                    None => (wire::IO_ERROR, 0),
                },
            },
        };
        request.answer(status);
        queue.push_used(memory, head, used_bytes(status, written))
    }

    fn status_of(&mut self, operation: &Operation, result: &io::Result<()>) -> u8 {
        if let Err(error) = result {
            self.log(error, &format_args!("{operation:?}"));
        }
        status_of(result)
    }

    fn log(&mut self, error: &io::Error, what: &dyn std::fmt::Display) {
        self.logged_errors = self.logged_errors.saturating_add(1);
        if self.logged_errors <= MAX_LOGGED_ERRORS {
            let id = String::from_utf8_lossy(&self.id);
            warn!(%error, id = id.trim_end_matches('\0'), "a disk failed: {what}");
        }
    }

    /// Tells the driver of everything that its thread has done.
    fn finish(&mut self, running: &mut Running) -> Result<(), QueueError> {
        let guest = running.memory;
        let Some(queue) = running.queue(0) else { return Ok(()) };
        while let Some((pending, result)) = self.requests.next_done() {
            if let Err(error) = &result {
                self.log(error, &"a request on its thread");
            }
            pending.answer(status_of(&result), guest, queue)?;
        }
        Ok(())
    }
}

impl Pending {
    fn answer(self, status: u8, guest: &GuestMemory, queue: &mut VirtQueue) -> Result<(), QueueError> {
        self.status.write(status);
        queue.push_used(guest, self.head, used_bytes(status, self.written))
    }
}

/// §2.7.8.2 counts bytes from the front, so the status byte only counts if all before it was written.
fn used_bytes(status: u8, written: usize) -> u32 {
    let bytes = if status == wire::OK { written.saturating_add(1) } else { 0 };
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

impl Device for Block {
    fn identity(&self) -> Identity {
        let changes =
            if self.disk.read_only() { feature::RO } else { feature::DISCARD | feature::WRITE_ZEROES };
        let block = self.disk.block_bytes();
        let blocks = self.disk.physical_block_bytes() / block.max(1);
        let block_sectors = block / SECTOR_BYTES as u32;
        // §5.2.4, field by field.
        let mut config = self.disk.sectors().to_le_bytes().to_vec();
        let mut word = |value: u32| config.extend(value.to_le_bytes());
        word(0); // size_max: unused
        word(u32::from(QUEUE_SIZE - 2)); // seg_max: a request also needs header and status
        word(0); // geometry: unused
        word(block); // blk_size
        // topology: physical_block_exp, alignment_offset, min_io_size; opt_io_size is unknown
        word(blocks.checked_ilog2().unwrap_or(0) | blocks.clamp(1, 0xffff) << 16);
        word(0);
        word(1 << 16); // writeback: unused; num_queues
        word(MAX_SEGMENT_SECTORS); // max_discard_sectors
        word(MAX_SEGMENTS); // max_discard_seg
        word(block_sectors); // discard_sector_alignment
        word(MAX_SEGMENT_SECTORS); // max_write_zeroes_sectors
        word(MAX_SEGMENTS); // max_write_zeroes_seg
        word(1); // write_zeroes_may_unmap
        Identity {
            device_type: device_type::BLOCK,
            features: feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY | feature::FLUSH | changes,
            queue_sizes: QUEUE_SIZES,
            optional_queues: 0,
            config,
        }
    }

    fn start(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.requests.start();
        self.serve(running)
    }

    fn watch(&mut self, poller: &mut dyn Poller) -> io::Result<()> {
        let fds = [self.requests.fd(), self.limit.fd()];
        fds.into_iter().flatten().try_for_each(|fd| poller.add(fd))
    }

    fn queues_ready(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.serve(running)
    }

    fn fd_ready(&mut self, fd: RawFd, _: Readiness, running: &mut Running) -> Result<Progress, QueueError> {
        if self.requests.take_notice(fd) {
            self.finish(running)?;
        }
        self.serve(running)
    }

    fn fd_ready_while_stopped(&mut self, fd: RawFd, _: Readiness, _: &mut dyn Poller) {
        if self.requests.take_notice(fd) {
            while self.requests.next_done().is_some() {}
        }
    }

    fn stop(&mut self, _: &mut dyn Poller) {
        self.large = None;
        self.requests.stop();
    }

    fn is_idle(&self) -> bool {
        self.requests.count() == 0
    }
}
