//! The start info of a PVH boot (Xen's `xen/include/public/arch-x86/hvm/start_info.h`).

use super::{WriteError, initramfs::Initramfs, layout, write};
use crate::guest_memory::GuestMemory;

const MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;
const MEMORY_TYPE_RAM: u32 = 1;

/// Writes start info, module list and memory map; the command line is at [`layout::CMDLINE`].
pub fn write_start_info(
    memory: &GuestMemory,
    usable: &[(u64, u64)],
    initramfs: Option<Initramfs>,
) -> Result<(), WriteError> {
    let modules = u32::from(initramfs.is_some());
    let mut info = Vec::new();
    for word in [MAGIC, VERSION, 0, modules] {
        info.extend(word.to_le_bytes());
    }
    // Without an RSDP: there is no ACPI.
    for address in [layout::MODULE_LIST.0 * u64::from(modules), layout::CMDLINE.0, 0, layout::MEMORY_MAP.0] {
        info.extend(address.to_le_bytes());
    }
    // There are at most three ranges.
    info.extend((usable.len() as u32).to_le_bytes());
    info.extend([0; 4]);
    write(memory, "the PVH start info", layout::START_INFO, &info)?;

    let mut map = Vec::new();
    for (start, bytes) in usable {
        map.extend(start.to_le_bytes());
        map.extend(bytes.to_le_bytes());
        map.extend(MEMORY_TYPE_RAM.to_le_bytes());
        map.extend([0; 4]);
    }
    write(memory, "the PVH memory map", layout::MEMORY_MAP, &map)?;

    let Some(initramfs) = initramfs else { return Ok(()) };
    let module: Vec<u8> =
        [initramfs.address.0, initramfs.bytes, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    write(memory, "the PVH module list", layout::MODULE_LIST, &module)
}

#[cfg(test)]
mod tests {
    use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::guest_memory;

    #[test]
    fn start_info_written_points_to_map_and_module() {
        let memory = guest_memory::map(&layout::memory_regions(2 << 20)).unwrap();
        let initramfs = Initramfs { address: GuestAddress(0x18_0000), bytes: 5 };
        write_start_info(&memory, &[(0, 7), (8, 9)], Some(initramfs)).unwrap();
        let word = |address: u64| memory.read_obj::<u32>(GuestAddress(address)).unwrap();
        let long = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        let info = layout::START_INFO.0;
        let at = |offset: usize| info + offset as u64;
        assert_eq!(word(at(std::mem::offset_of!(hvm_start_info, magic))), 0x336e_c578);
        assert_eq!(word(at(std::mem::offset_of!(hvm_start_info, nr_modules))), 1);
        assert_eq!(word(at(std::mem::offset_of!(hvm_start_info, memmap_entries))), 2);
        let map = long(at(std::mem::offset_of!(hvm_start_info, memmap_paddr)));
        let second = map + size_of::<hvm_memmap_table_entry>() as u64;
        assert_eq!((long(second), long(second + 8), word(second + 16)), (8, 9, 1));
        let module = long(at(std::mem::offset_of!(hvm_start_info, modlist_paddr)));
        assert_eq!(long(module + std::mem::offset_of!(hvm_modlist_entry, paddr) as u64), 0x18_0000);
        assert_eq!(long(module + std::mem::offset_of!(hvm_modlist_entry, size) as u64), 5);
    }
}
