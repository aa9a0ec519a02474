//! What is measured, in the order in which it is done. Both sides go by this list.

/// Bytes of the disk.
pub const DISK_BYTES: u64 = 64 << 20;

/// Over what a stream goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// TCP through the guest's network device.
    Network,
    /// A stream of its socket device.
    Sockets,
}

/// What is done.
#[derive(Debug, Clone, Copy)]
pub enum Work {
    /// Operations on the disk past the guest's page cache, one after the other in each thread.
    Disk {
        /// Whether it is written, or read.
        write: bool,
        /// Of one operation.
        bytes: usize,
        /// At random places, or in order.
        random: bool,
        /// By each thread.
        operations: u64,
        /// At the same time.
        threads: u64,
    },
    /// Bytes from the guest.
    Send {
        /// Over what.
        over: Carrier,
        /// How many.
        bytes: u64,
    },
    /// Bytes to the guest.
    Receive {
        /// Over what.
        over: Carrier,
        /// How many.
        bytes: u64,
    },
}

/// A row of the table.
#[derive(Debug)]
pub struct Phase {
    /// Its name.
    pub name: &'static str,
    /// What is done.
    pub work: Work,
}

const SMALL: usize = 4 << 10;
const LARGE: usize = 1 << 20;
const LARGE_OPERATIONS: u64 = DISK_BYTES / LARGE as u64;
const STREAM_BYTES: u64 = 64 << 20;

const fn disk(
    name: &'static str,
    write: bool,
    (bytes, operations, threads): (usize, u64, u64),
    random: bool,
) -> Phase {
    Phase { name, work: Work::Disk { write, bytes, random, operations, threads } }
}

/// All of them.
pub const PHASES: &[Phase] = &[
    disk("disk, 4 KiB reads at random", false, (SMALL, 2000, 1), true),
    disk("disk, 4 KiB reads, 16 at a time", false, (SMALL, 250, 16), true),
    disk("disk, 1 MiB reads in order", false, (LARGE, LARGE_OPERATIONS, 1), false),
    disk("disk, 4 KiB writes at random", true, (SMALL, 2000, 1), true),
    disk("disk, 1 MiB writes in order", true, (LARGE, LARGE_OPERATIONS, 1), false),
    Phase { name: "TCP, guest to host", work: Work::Send { over: Carrier::Network, bytes: STREAM_BYTES } },
    Phase { name: "TCP, host to guest", work: Work::Receive { over: Carrier::Network, bytes: STREAM_BYTES } },
    Phase { name: "vsock, guest to host", work: Work::Send { over: Carrier::Sockets, bytes: STREAM_BYTES } },
    Phase {
        name: "vsock, host to guest",
        work: Work::Receive { over: Carrier::Sockets, bytes: STREAM_BYTES },
    },
];

impl Phase {
    /// Over what it goes, if it is a stream.
    pub fn carrier(&self) -> Option<Carrier> {
        match self.work {
            Work::Send { over, .. } | Work::Receive { over, .. } => Some(over),
            Work::Disk { .. } => None,
        }
    }

    /// Operations of the disk, or MiB of a stream: by what exits are counted.
    pub fn units(&self) -> u64 {
        match self.work {
            Work::Disk { operations, threads, .. } => operations * threads,
            Work::Send { bytes, .. } | Work::Receive { bytes, .. } => bytes >> 20,
        }
    }

    /// Whether operations a second say more than bytes a second.
    pub fn is_small(&self) -> bool {
        matches!(self.work, Work::Disk { bytes: SMALL, .. })
    }

    /// All bytes that it moves.
    pub fn bytes(&self) -> u64 {
        match self.work {
            Work::Disk { bytes, operations, threads, .. } => bytes as u64 * operations * threads,
            Work::Send { bytes, .. } | Work::Receive { bytes, .. } => bytes,
        }
    }
}
