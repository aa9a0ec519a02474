//! Hundreds of streams that programs of the host have opened, each with a guest that does not keep to its credit.

use super::{CHUNK, Case};
use crate::{
    assembler::Width,
    driver::{Device, FIRST_HOST_PORT, Guest, NEXT, Packet, WRITE},
    machine::{Host, Limits, Setting},
};

/// With those that the guest ignores, as many as the device keeps.
const STREAMS: u32 = 480;
/// More than a socket and the device's buffer for it hold: 12 times 32 KiB.
const ROUNDS: u32 = 14;

/// The case.
pub fn of_the_host() -> Case {
    let mut case =
        super::case("streams_of_the_host_flooded_with_forged_credit", host_streams).setting(Setting {
            // What the device buffers for all streams together, 32 MiB, and a descriptor for each of 512 streams and 64
            // programs.
            limits: Limits { heap_bytes: 44 << 20, fds: 60 + 512 + 64 },
            host: Host::Dials(STREAMS),
            ..Setting::default()
        });
    // Each stream takes the first data; hardly any takes all.
    case.served_bytes = (STREAMS * CHUNK) as usize..=(STREAMS * ROUNDS * CHUNK) as usize;
    case
}

/// Lets all programs of the host in that ask, which the host then does not read; sends to all of them at once with
/// forged credit; and then does with each whatever comes to mind.
fn host_streams(guest: &mut Guest) {
    let (receive, send) = (Device::Vsock.queues()[0], Device::Vsock.requests());
    let stream = Packet { guest_port: 52, port: FIRST_HOST_PORT, room: u32::MAX, ..Packet::default() };
    // The lower half of the host's port.
    let port = send.buffer() + 20;
    let each = |guest: &mut Guest, packet: &Packet, buffers: u16| {
        guest.packet(send.buffer(), packet);
        guest.descriptor(send, 0, send.buffer(), 44, if buffers > 1 { NEXT } else { 0 }, 1);
        guest.descriptor(send, 1, 0x60_0000, CHUNK, 0, 0);
        guest.repeat(STREAMS, |guest| {
            guest.request(send, 0);
            guest.increment16(port);
        });
    };
    guest.start(Device::Vsock);
    guest.packet(send.buffer(), &Packet { op: 2, ..stream.clone() });
    guest.descriptor(send, 0, send.buffer(), 44, 0, 0);
    guest.descriptor(receive, 0, receive.buffer(), 512, WRITE, 0);
    guest.repeat(STREAMS, |guest| {
        guest.request(receive, 0);
        guest.expect(Width::Two, receive.buffer() + 30, 1, "a request of the host");
        guest.request(send, 0);
        guest.increment16(port);
    });
    for round in 0..ROUNDS {
        let forwarded = [0, u32::MAX, 1 << 31, 1][round as usize % 4];
        each(guest, &Packet { op: 5, bytes: CHUNK, forwarded, ..stream.clone() }, 2);
    }
    guest.prove(Device::Rng);
    for (op, flags) in [(7, 0), (6, 0), (2, 0), (4, 1), (5, 0), (1, 0), (4, 3), (3, 0), (5, 0)] {
        each(guest, &Packet { op, flags, ..stream.clone() }, 1);
    }
    guest.prove(Device::Rng);
    guest.prove(Device::Vsock);
}
