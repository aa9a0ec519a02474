//! The entropy device (virtio 1.2 §5.4): one queue of buffers to fill with random bytes.

use super::{
    device::{Device, Identity, Progress, Running, device_type},
    queue::QueueError,
};
use crate::backends::entropy;

const QUEUE_SIZE: u16 = 16;
const QUEUE_SIZES: &[u16] = &[QUEUE_SIZE];
/// Bytes given for one request; the driver asks again if it wants more (§5.4.6.1: filling less is allowed).
const MAX_BYTES: usize = 4096;

/// The device.
pub struct Rng;

impl Device for Rng {
    fn identity(&self) -> Identity {
        Identity {
            device_type: device_type::ENTROPY,
            features: 0,
            queue_sizes: QUEUE_SIZES,
            optional_queues: 0,
            config: Vec::new(),
        }
    }

    fn queues_ready(&mut self, running: &mut Running) -> Result<Progress, QueueError> {
        let memory = running.memory;
        let Some(queue) = running.queue(0) else { return Ok(Progress::Done) };
        let mut budget = QUEUE_SIZE;
        loop {
            queue.disable_doorbell(memory)?;
            while let Some(mut chain) = queue.pop(memory)? {
                if chain.writable.is_empty() {
                    let problem = "it has no room for random bytes (virtio 1.2 §5.4.6)";
                    return Err(QueueError::BadRequest { head: chain.head, problem });
                }
                let bytes = entropy::bytes(chain.writable.len().min(MAX_BYTES));
                chain.writable.write(&bytes);
                queue.push_used(memory, chain.head, bytes.len() as u32)?;
                budget -= 1;
                if budget == 0 {
                    return Ok(Progress::More);
                }
            }
            if !queue.enable_doorbell(memory)? {
                return Ok(Progress::Done);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::driver_model::{Driver, Part, memory, ring};

    #[test]
    fn request_is_filled_with_random_bytes() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        driver.add(&[Part::Writable(64)]);
        driver.add(&[Part::Writable(8000)]);
        ring(&mut Rng, &mut [driver.queue()], &memory).unwrap();
        let (_, bytes, written) = driver.take_used().unwrap();
        assert_eq!(written, 64);
        assert!(bytes.iter().any(|byte| *byte != 0));
        let (_, _, written) = driver.take_used().unwrap();
        assert_eq!(written as usize, MAX_BYTES);
    }

    #[test]
    fn request_without_room_fails_the_queue() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        driver.add(&[Part::Readable(b"x")]);
        let error = ring(&mut Rng, &mut [driver.queue()], &memory).unwrap_err();
        assert!(matches!(error, QueueError::BadRequest { .. }));
    }
}
