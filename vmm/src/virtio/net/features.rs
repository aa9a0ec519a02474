//! Feature bits (virtio 1.2 §5.1.3) and what they mean for the link.

use crate::backends::link::Offloads;

/// The driver may leave checksums to us.
pub const CSUM: u64 = 1 << 0;
/// The driver takes frames without checksum.
pub const GUEST_CSUM: u64 = 1 << 1;
/// The driver changes what it takes while it runs.
pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// The configuration space has an MTU.
pub const MTU: u64 = 1 << 3;
/// The configuration space has an address.
pub const MAC: u64 = 1 << 5;
/// The driver takes large segments.
pub const GUEST_TSO4: u64 = 1 << 7;
/// As before, over IPv6.
pub const GUEST_TSO6: u64 = 1 << 8;
/// As before, with ECN.
pub const GUEST_ECN: u64 = 1 << 9;
/// The driver may send large segments.
pub const HOST_TSO4: u64 = 1 << 11;
/// As before, over IPv6.
pub const HOST_TSO6: u64 = 1 << 12;
/// As before, with ECN.
pub const HOST_ECN: u64 = 1 << 13;
/// A received frame may take several buffers.
pub const MRG_RXBUF: u64 = 1 << 15;
/// The configuration space tells whether the link is up.
pub const STATUS: u64 = 1 << 16;
/// There is a control queue.
pub const CTRL_VQ: u64 = 1 << 17;
/// The driver takes UDP datagrams to be cut, over IPv4.
pub const GUEST_USO4: u64 = 1 << 54;
/// As before, over IPv6.
pub const GUEST_USO6: u64 = 1 << 55;
/// The driver may send UDP datagrams to be cut.
pub const HOST_USO: u64 = 1 << 56;

/// Those that a driver can switch by a command (§5.1.6.5.6.1); the bits are the same.
pub const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;

/// What a link's abilities let the device offer.
pub fn of_link(offloads: Offloads) -> u64 {
    if !offloads.checksum {
        return 0;
    }
    let mut features = CSUM | GUEST_CSUM | CTRL_VQ | CTRL_GUEST_OFFLOADS;
    for (able, bits) in [
        (offloads.tso4, HOST_TSO4 | GUEST_TSO4),
        (offloads.tso6, HOST_TSO6 | GUEST_TSO6),
        (offloads.ecn, HOST_ECN | GUEST_ECN),
        (offloads.uso, HOST_USO | GUEST_USO4 | GUEST_USO6),
    ] {
        if able {
            features |= bits;
        }
    }
    features
}

/// What a driver that accepted these takes unfinished.
pub fn receive_offloads(features: u64) -> Offloads {
    let has = |bit| features & bit != 0;
    Offloads {
        checksum: has(GUEST_CSUM),
        tso4: has(GUEST_TSO4),
        tso6: has(GUEST_TSO6),
        ecn: has(GUEST_ECN),
        // The kernel's tap takes them only together.
        uso: has(GUEST_USO4) && has(GUEST_USO6),
    }
}
