//! What is in guest memory when the first instruction runs. Functions from files and numbers to bytes and addresses:
//! nothing here knows KVM or a device.

pub mod bzimage;
pub mod cmdline;
pub mod initramfs;
pub mod kernel;
pub mod layout;
pub mod long_mode;
pub mod mp_table;
pub mod options;
pub mod pvh;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::guest_memory::GuestMemory;

/// State in which the boot vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPoint {
    /// 32-bit protected mode without paging, `ebx` at the start info (Xen's `docs/misc/pvh.pandoc`).
    Pvh {
        /// First instruction.
        entry: GuestAddress,
    },
    /// 64-bit mode with identity-mapped low 4 GiB, `rsi` at the zero page
    /// (Linux `Documentation/arch/x86/boot.rst`, 64-bit boot protocol).
    Linux64 {
        /// First instruction.
        entry: GuestAddress,
    },
}

/// A structure that boot code put in low memory did not fit there: a defect of [`layout`].
#[derive(Debug, thiserror::Error)]
#[error("writing {what} at {address:#x} of guest memory failed")]
pub struct WriteError {
    what: &'static str,
    address: u64,
    #[source]
    source: Box<GuestMemoryError>,
}

fn write(
    memory: &GuestMemory,
    what: &'static str,
    address: GuestAddress,
    bytes: &[u8],
) -> Result<(), WriteError> {
    memory.write_slice(bytes, address).map_err(|source| WriteError {
        what,
        address: address.0,
        source: Box::new(source),
    })
}

/// Writes the NUL-terminated command line.
pub fn write_cmdline(memory: &GuestMemory, line: &str) -> Result<(), WriteError> {
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    write(memory, "the kernel command line", layout::CMDLINE, &bytes)
}
