//! The file system device between a driver that does anything and a file server that does too.

use std::{
    collections::VecDeque,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::{
    input::Input,
    queues::{self, Subject},
};
use crate::{
    backends::share::Channel,
    virtio::{
        driver_model::Watched,
        file_system::{FileSystem, MAX_PENDING, MAX_REQUEST_BYTES},
    },
};

/// Of a request that wants no reply.
const NO_REPLY: u64 = u64::MAX;

struct ShareSubject {
    device: FileSystem,
    fd: RawFd,
    /// `None` once it has hung up.
    server: Option<OwnedFd>,
    /// Numbers of requests that the server has and has not answered; the oldest are forgotten.
    asked: VecDeque<u64>,
}

/// The file system device, and a server that answers, babbles, keeps silent or hangs up.
pub fn share_queue(bytes: &[u8]) {
    let (ours, server) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let fd = ours.as_raw_fd();
    let device = FileSystem::new("files", Channel::new(ours).unwrap());
    queues::run(ShareSubject { device, fd, server: Some(server), asked: VecDeque::new() }, bytes);
}

impl ShareSubject {
    /// The server takes all requests that have come. They are as long as they say, and have numbers of the device's.
    fn take_requests(&mut self) {
        let Some(server) = &self.server else { return };
        let mut message = vec![0; MAX_REQUEST_BYTES + 1];
        while let Ok((length, _)) = recv(server, message.as_mut_slice(), RecvFlags::DONTWAIT) {
            if length == 0 {
                return;
            }
            assert!((40..=MAX_REQUEST_BYTES).contains(&length), "a request of {length} bytes");
            assert_eq!(u32::from_le_bytes(message[..4].try_into().unwrap()) as usize, length);
            let number = u64::from_le_bytes(message[8..16].try_into().unwrap());
            if number != NO_REPLY {
                assert!((number as u32 as usize) < MAX_PENDING, "number {number:#x}");
                self.asked.push_back(number);
            }
        }
        let old = self.asked.len().saturating_sub(2 * MAX_PENDING);
        self.asked.drain(..old);
    }

    fn say(&self, message: &[u8]) {
        if let Some(server) = &self.server {
            let _ = send(server, message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }

    fn reply(&self, number: u64, body: usize) {
        let words = [16 + body as u32, 0].map(u32::to_le_bytes).concat();
        self.say(&[words, number.to_le_bytes().to_vec(), vec![0xa5; body]].concat());
    }
}

impl Subject for ShareSubject {
    type Device = FileSystem;

    fn device(&mut self) -> &mut FileSystem {
        &mut self.device
    }

    /// A header: length, opcode, number, and what the device does not look at.
    fn request(&self, input: &mut Input) -> Vec<u8> {
        let mut bytes = input.length().to_le_bytes().to_vec();
        bytes.extend(u32::from(input.u8()).to_le_bytes());
        bytes.extend(input.u64().to_le_bytes());
        bytes.resize(40, 0);
        bytes
    }

    fn host(&mut self, input: &mut Input) {
        match input.u8() % 8 {
            0 | 1 => self.take_requests(),
            what @ 2..=4 => {
                let number = self.asked.pop_front().unwrap_or(0);
                self.reply(number, usize::from(input.u16()) >> (input.u8() % 16));
                if what == 4 {
                    self.reply(number, 0);
                }
            }
            5 => self.reply(input.u64(), usize::from(input.u8())),
            6 => {
                let length = input.below(40);
                self.say(input.bytes(length));
            }
            _ if input.u8() < 32 => self.server = None,
            _ => {}
        }
    }

    fn fd(&self, _input: &mut Input) -> RawFd {
        self.fd
    }

    fn check(&self, watched: &Watched) {
        assert!(watched.fds.len() <= 1, "{:?}", watched.fds);
    }
}
