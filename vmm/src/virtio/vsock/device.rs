//! The device's queues: packets from the guest go to the muxer, packets from the muxer into the guest's buffers.

use std::{
    os::fd::RawFd,
    sync::{Arc, atomic::AtomicUsize},
};

use super::{
    Connector,
    muxer::Muxer,
    packet::{HEADER_BYTES, Header},
};
use crate::virtio::{
    device::{Device, Identity, Poller, Progress, Readiness, Running, device_type},
    queue::{Buffers, Chain, QueueError},
};

const QUEUE_SIZE: u16 = 128;
const RX: usize = 0;
const TX: usize = 1;
/// The third is the event queue, on which there is nothing to say: it tells of a change of the context id.
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE, QUEUE_SIZE, 16];
/// Packets in each direction before other devices have their turn.
const PACKETS_PER_TURN: u16 = 2 * QUEUE_SIZE;

/// The device.
pub struct Vsock<C: Connector> {
    guest_cid: u32,
    muxer: Muxer<C>,
}

impl<C: Connector> Vsock<C> {
    /// A device for a guest with this context id.
    pub fn new(guest_cid: u32, connector: C) -> Self {
        Self { guest_cid, muxer: Muxer::new(guest_cid, connector) }
    }

    /// Bytes that the guest has sent and the host has not taken yet.
    pub fn buffered(&self) -> Arc<AtomicUsize> {
        self.muxer.buffered()
    }

    /// Moves packets both ways until neither side has one.
    fn pump(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let mut budget = PACKETS_PER_TURN;
        loop {
            let mut idle = self.take_from_guest(running, &mut budget)?;
            idle &= self.give_to_guest(running, &mut budget)?;
            if budget == 0 {
                return Ok(Progress::More);
            }
            if idle {
                return Ok(Progress::Done);
            }
        }
    }

    /// True if the guest has nothing more to send, and will ring when it has.
    fn take_from_guest(&mut self, running: &mut Running, budget: &mut u16) -> Result<bool, QueueError> {
        let memory = running.memory;
        let Some(queue) = running.queues.get_mut(TX) else { return Ok(true) };
        queue.disable_doorbell(memory)?;
        while *budget > 0 {
            let Some(chain) = queue.pop(memory)? else {
                return Ok(!queue.enable_doorbell(memory)?);
            };
            *budget -= 1;
            let head = chain.head;
            let (header, data) = parse(chain)?;
            self.muxer.receive(&header, data, running.poller);
            queue.push_used(memory, head, 0)?;
        }
        Ok(false)
    }

    /// True if there is nothing more for the guest, or no buffer for it and the guest will ring when there is one.
    fn give_to_guest(&mut self, running: &mut Running, budget: &mut u16) -> Result<bool, QueueError> {
        let memory = running.memory;
        let Some(queue) = running.queues.get_mut(RX) else { return Ok(true) };
        while *budget > 0 && self.muxer.has_packet() {
            let Some(mut chain) = queue.pop(memory)? else {
                // Only now is it of interest when buffers come.
                return Ok(!queue.enable_doorbell(memory)?);
            };
            *budget -= 1;
            if chain.writable.len() < HEADER_BYTES {
                let problem = "it has no room for a packet header (virtio 1.2 §5.10.6)";
                return Err(QueueError::BadRequest { head: chain.head, problem });
            }
            match self.muxer.send(&mut chain.writable, running.poller) {
                Some(written) => queue.push_used(memory, chain.head, written)?,
                None => queue.undo_pop(),
            }
        }
        Ok(!self.muxer.has_packet())
    }
}

fn parse(mut chain: Chain) -> Result<(Header, Buffers), QueueError> {
    let head = chain.head;
    let bad = |problem| QueueError::BadRequest { head, problem };
    let bytes = chain
        .readable
        .read::<HEADER_BYTES>()
        .ok_or_else(|| bad("it is shorter than a packet header (virtio 1.2 §5.10.6)"))?;
    let header = Header::decode(&bytes);
    let data = chain
        .readable
        .take(header.len as usize)
        .ok_or_else(|| bad("it is shorter than its header says (virtio 1.2 §5.10.6)"))?;
    Ok((header, data))
}

impl<C: Connector> Device for Vsock<C> {
    fn identity(&self) -> Identity {
        Identity {
            device_type: device_type::SOCKET,
            // Streams need no feature bit (§5.10.3).
            features: 0,
            queue_sizes: QUEUE_SIZES,
            config: u64::from(self.guest_cid).to_le_bytes().to_vec(),
        }
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
        self.muxer.ready(fd, ready, running.poller);
        self.pump(running)
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        self.muxer.reset(poller);
    }
}
