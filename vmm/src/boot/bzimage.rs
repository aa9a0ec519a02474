//! The zero page of Linux's own boot protocol (Linux `Documentation/arch/x86/{boot,zero-page}.rst`).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::Bytes;

use super::{WriteError, initramfs::Initramfs, layout};
use crate::guest_memory::GuestMemory;

/// A boot loader without an assigned id.
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;

/// The setup header that a vmlinux would have as a bzImage: what a kernel that is entered at its 64-bit entry looks at, or
/// may look at (boot.rst, "The Real-Mode Kernel Header").
pub fn header_of_elf() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        kernel_alignment: 16 << 20,
        ..Default::default()
    }
}

/// Writes the zero page for a kernel with this setup header; the command line is at [`layout::CMDLINE`].
pub fn write_zero_page(
    memory: &GuestMemory,
    header: &setup_header,
    usable: &[(u64, u64)],
    initramfs: Option<Initramfs>,
) -> Result<(), WriteError> {
    let mut params = boot_params { hdr: *header, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE.0 as u32;
    if let Some(initramfs) = initramfs {
        // It lies below 3 GiB, where 32 bits are enough.
        params.hdr.ramdisk_image = initramfs.address.0 as u32;
        params.hdr.ramdisk_size = initramfs.bytes as u32;
    }
    let mut entries = 0;
    for (slot, (addr, size)) in params.e820_table.iter_mut().zip(usable) {
        *slot = boot_e820_entry { addr: *addr, size: *size, r#type: E820_RAM };
        entries += 1;
    }
    params.e820_entries = entries;
    memory.write_obj(params, layout::START_INFO).map_err(|source| WriteError {
        what: "the zero page",
        address: layout::START_INFO.0,
        source: Box::new(source),
    })
}
