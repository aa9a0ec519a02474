//! The device: which queue is served when, and what goes from the guest to the link.

use std::{os::fd::RawFd, sync::Arc};

use tracing::warn;

use super::{
    Limiter, control, features,
    receive::{Received, Receiver},
};
use crate::{
    backends::link::{HEADER_BYTES, Link, MAX_FRAME_BYTES, SendError},
    config::MacAddress,
    virtio::{
        config_space::ConfigSpace,
        device::{Device, Identity, Poller, Progress, Readiness, Running, device_type},
        queue::QueueError,
    },
};

const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;
pub const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE, QUEUE_SIZE, 16];
/// Frames in each direction before other devices have their turn.
const FRAMES_PER_TURN: u16 = QUEUE_SIZE;

/// The configuration space (§5.1.4): address, status, queue pairs, MTU.
const CONFIG_STATUS: usize = 6;
const STATUS_LINK_UP: u16 = 1;

/// Frames that nobody gets.
#[derive(Debug, Default)]
pub struct Dropped {
    /// For the guest: its buffers could not hold them.
    pub received: u64,
    /// From the guest: impossible, or with nowhere to go.
    pub sent: u64,
}

/// The device.
pub struct Net {
    link: Box<dyn Link>,
    config: Arc<ConfigSpace>,
    identity: Identity,
    receiver: Receiver,
    send_limiter: Limiter,
    /// The link took no more: what the guest sends waits until it is writable.
    link_full: bool,
    /// There is nobody at the other end any more.
    link_gone: bool,
    watched: bool,
    pub(super) dropped: Dropped,
}

impl Net {
    /// A device with this address at the end of `link`; the guest is told `mtu`, if there is one.
    pub fn new(
        link: Box<dyn Link>,
        mac: MacAddress,
        mtu: Option<u16>,
        receive_limiter: Limiter,
        send_limiter: Limiter,
    ) -> Self {
        let mut bytes = mac.0.to_vec();
        bytes.extend(STATUS_LINK_UP.to_le_bytes());
        bytes.extend(1u16.to_le_bytes());
        bytes.extend(mtu.unwrap_or_default().to_le_bytes());
        let mtu_feature = if mtu.is_some() { features::MTU } else { 0 };
        let offered = features::MAC | features::STATUS | features::MRG_RXBUF | mtu_feature;
        let identity = Identity {
            device_type: device_type::NETWORK,
            features: offered | features::of_link(link.offloads()),
            queue_sizes: QUEUE_SIZES,
            optional_queues: 1,
            config: bytes.clone(),
        };
        Self {
            link,
            config: Arc::new(ConfigSpace::new(bytes, 0..0)),
            identity,
            receiver: Receiver::new(receive_limiter),
            send_limiter,
            link_full: false,
            link_gone: false,
            watched: false,
            dropped: Dropped::default(),
        }
    }

    /// Moves frames both ways until neither side has one.
    fn pump(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let all_done = self.control(running)?;
        let all_sent = self.transmit(running)?;
        let all_received = self.receive(running)?;
        Ok(if all_done && all_sent && all_received { Progress::Done } else { Progress::More })
    }

    /// True if the guest has nothing more to send and will ring, or the link becomes writable later.
    fn transmit(&mut self, running: &mut Running) -> Result<bool, QueueError> {
        let memory = running.memory;
        let Some(queue) = running.queues.get_mut(TX) else { return Ok(true) };
        if self.link_full {
            return Ok(true);
        }
        queue.disable_doorbell(memory)?;
        for _ in 0..FRAMES_PER_TURN {
            if !self.send_limiter.permits() {
                return Ok(true);
            }
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_doorbell(memory)? {
                    continue;
                }
                return Ok(true);
            };
            let head = chain.head;
            let Some(bytes) = chain.readable.len().checked_sub(HEADER_BYTES) else {
                let problem = "it is shorter than a header of 12 bytes (virtio 1.2 §5.1.6)";
                return Err(QueueError::BadRequest { head, problem });
            };
            let sent = match () {
                () if self.link_gone => Err(SendError::Gone),
                () if bytes > MAX_FRAME_BYTES => Err(SendError::Refused),
                () => self.link.send(chain.readable.slices()),
            };
            match sent {
                Ok(()) => self.send_limiter.charge(bytes),
                Err(SendError::Full) => {
                    queue.undo_pop();
                    self.link_full = true;
                    return Ok(true);
                }
                Err(SendError::Refused) => count_drop(&mut self.dropped.sent, "from the guest"),
                Err(SendError::Gone) => {
                    count_drop(&mut self.dropped.sent, "from the guest");
                    self.lose_link();
                }
            }
            queue.push_used(memory, head, 0)?;
        }
        Ok(false)
    }

    /// True if the link has nothing more for the guest, or the guest has no buffers and will ring.
    fn receive(&mut self, running: &mut Running) -> Result<bool, QueueError> {
        let memory = running.memory;
        let Some(queue) = running.queues.get_mut(RX) else { return Ok(true) };
        if self.link_gone {
            return Ok(true);
        }
        let outcome =
            self.receiver.receive(self.link.as_mut(), queue, memory, FRAMES_PER_TURN, &mut self.dropped)?;
        if outcome == Received::LinkGone {
            self.lose_link();
        }
        Ok(outcome != Received::Turn)
    }

    /// True if there is no further command, and the guest will ring.
    fn control(&mut self, running: &mut Running) -> Result<bool, QueueError> {
        let (memory, features) = (running.memory, running.features);
        let Some(queue) = running.queues.get_mut(CONTROL) else { return Ok(true) };
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop(memory)? else {
                if queue.enable_doorbell(memory)? {
                    continue;
                }
                return Ok(true);
            };
            let head = chain.head;
            let written = control::serve(chain, features, self.link.as_mut())?;
            queue.push_used(memory, head, written)?;
        }
        Ok(false)
    }

    /// What is watched while a driver is there.
    fn fds(&self) -> impl Iterator<Item = RawFd> + use<> {
        let limiters = [self.receiver.limiter().fd(), self.send_limiter.fd()];
        std::iter::once(self.link.fd()).chain(limiters.into_iter().flatten())
    }

    fn lose_link(&mut self) {
        if !self.link_gone {
            warn!("the other end of a network device is gone");
            self.link_gone = true;
            self.config.set_field(CONFIG_STATUS, &0u16.to_le_bytes());
        }
    }
}

impl Device for Net {
    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn config_space(&self) -> Option<Arc<ConfigSpace>> {
        Some(self.config.clone())
    }

    fn start(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.receiver.start(running.features);
        if let Err(error) = self.link.set_receive_offloads(features::receive_offloads(running.features)) {
            // Frames then come finished, which any driver takes.
            warn!(%error, "a tap's offloads could not be set");
        }
        for fd in self.fds() {
            if let Err(error) = running.poller.add(fd) {
                warn!(%error, "a network device could not join the event loop");
                self.lose_link();
            }
        }
        self.watched = true;
        self.pump(running)
    }

    fn queues_ready(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        self.pump(running)
    }

    fn fd_ready(
        &mut self,
        fd: RawFd,
        ready: Readiness,
        running: &mut Running,
    ) -> Result<Progress, QueueError> {
        if fd != self.link.fd() {
            // A limiter's timer.
            return self.pump(running);
        }
        if ready.readable {
            self.receiver.link_readable();
        }
        if ready.writable && self.link_full {
            match self.link.flush() {
                Err(SendError::Full) => {}
                Ok(()) | Err(SendError::Refused) => self.link_full = false,
                Err(SendError::Gone) => {
                    self.link_full = false;
                    self.lose_link();
                }
            }
            return self.pump(running);
        }
        // The guest rings for what it has.
        Ok(if self.receive(running)? { Progress::Done } else { Progress::More })
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        if std::mem::take(&mut self.watched) {
            for fd in self.fds() {
                poller.remove(fd);
            }
        }
        self.link_full = false;
    }
}

/// Counts a frame that is dropped; the first one is told.
pub fn count_drop(counter: &mut u64, direction: &'static str) {
    if *counter == 0 {
        warn!(direction, "a network device drops a frame; further ones are dropped in silence");
    }
    *counter = counter.saturating_add(1);
}
