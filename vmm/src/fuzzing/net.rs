//! The network device between a driver that does anything and a cable whose other end does too.

use std::{
    collections::VecDeque,
    io,
    os::fd::RawFd,
    sync::{Arc, Mutex},
};

use vm_memory::VolatileSlice;

use super::{
    input::Input,
    queues::{self, Subject},
};
use crate::{
    backends::{
        frame_socket::scatter,
        link::{HEADER_BYTES, Link, MAX_FRAME_BYTES, Offloads, ReceiveError, SendError},
    },
    config::MacAddress,
    guest_memory::transfer::Room,
    virtio::{driver_model::Watched, limiter::Limiter, net::Net},
};

const LINK_FD: RawFd = 100;

#[derive(Default)]
struct Cable {
    to_guest: VecDeque<usize>,
    accepts: u8,
    gone: bool,
}

struct CableEnd(Arc<Mutex<Cable>>);

impl Link for CableEnd {
    fn fd(&self) -> RawFd {
        LINK_FD
    }

    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true, ecn: true, uso: true }
    }

    fn set_receive_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, into: &Room) -> Result<usize, ReceiveError> {
        let mut cable = self.0.lock().unwrap();
        if cable.gone {
            return Err(ReceiveError::Gone);
        }
        let bytes = cable.to_guest.pop_front().ok_or(ReceiveError::Empty)?;
        scatter(&[&vec![7; bytes]], into.slices());
        let room: usize = into.slices().map(|slice| slice.len()).sum();
        Ok(bytes.min(room))
    }

    fn send(&mut self, frame: &[VolatileSlice]) -> Result<(), SendError> {
        let mut cable = self.0.lock().unwrap();
        let bytes: usize = frame.iter().map(VolatileSlice::len).sum();
        assert!((HEADER_BYTES..=HEADER_BYTES + MAX_FRAME_BYTES).contains(&bytes), "{bytes} bytes were sent");
        match cable.accepts {
            0 => Err(SendError::Full),
            _ if cable.gone => Err(SendError::Gone),
            255 => Err(SendError::Refused),
            _ => {
                cable.accepts -= 1;
                Ok(())
            }
        }
    }
}

struct NetSubject {
    net: Net,
    cable: Arc<Mutex<Cable>>,
}

/// The network device.
pub fn net_queue(bytes: &[u8]) {
    let cable = Arc::new(Mutex::new(Cable { accepts: 200, ..Cable::default() }));
    let limiter = || Limiter::new(None).unwrap();
    let mac = MacAddress([2, 0, 0, 0, 0, 1]);
    let mtu = bytes.len().is_multiple_of(2).then_some(9000);
    let net = Net::new(Box::new(CableEnd(cable.clone())), mac, mtu, limiter(), limiter());
    queues::run(NetSubject { net, cable }, bytes);
}

impl Subject for NetSubject {
    type Device = Net;

    fn device(&mut self) -> &mut Net {
        &mut self.net
    }

    /// The header of a frame, or a command for the control queue.
    fn request(&self, input: &mut Input) -> Vec<u8> {
        let mut bytes = vec![input.u8() % 8, input.u8() % 2];
        bytes.extend(input.u64().to_le_bytes());
        bytes.extend([0; 50]);
        bytes
    }

    fn host(&mut self, input: &mut Input) {
        let mut cable = self.cable.lock().unwrap();
        match input.u8() % 8 {
            0..=4 if cable.to_guest.len() < 64 => {
                let bytes = HEADER_BYTES + input.length() as usize % (2 * MAX_FRAME_BYTES);
                cable.to_guest.push_back(bytes);
            }
            5 => cable.accepts = input.u8(),
            6 => cable.to_guest.push_back(input.below(HEADER_BYTES)),
            7 => cable.gone |= input.u8() == 0,
            _ => {}
        }
    }

    fn fd(&self, _input: &mut Input) -> RawFd {
        LINK_FD
    }

    fn check(&self, watched: &Watched) {
        assert!(watched.fds.len() <= 1, "{:?}", watched.fds);
    }
}
