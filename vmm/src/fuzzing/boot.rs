//! Files that become guest memory: what a machine's builder does with a kernel and an initramfs.

use std::{
    cell::RefCell,
    fs::File,
    io::{Seek, Write},
};

use vm_memory::GuestMemoryBackend;
use vmm_sys_util::tempfile::TempFile;

use crate::{
    boot::{self, EntryPoint, bzimage, initramfs, kernel, layout, long_mode, mp_table, pvh},
    guest_memory::{self, GuestMemory},
};

const MEMORY_BYTES: u64 = 4 << 20;

thread_local! {
    static PLACE: RefCell<(GuestMemory, File)> = RefCell::new((
        guest_memory::map(&layout::memory_regions(MEMORY_BYTES)).unwrap(),
        TempFile::new().unwrap().into_file(),
    ));
}

/// Loads a kernel from `bytes` and uses its last bytes as an initramfs.
pub fn kernel_file(bytes: &[u8]) {
    PLACE.with_borrow_mut(|(memory, file)| {
        file.set_len(0).unwrap();
        file.rewind().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        let Ok(kernel) = kernel::load(memory, file, MEMORY_BYTES) else { return };
        assert!(kernel.end <= MEMORY_BYTES);
        let part = initramfs::Part::Bytes(&bytes[bytes.len() / 2..]);
        let Ok(initramfs) =
            initramfs::load(memory, vec![part], kernel.start..kernel.end, kernel.initramfs_limit)
        else {
            return;
        };
        if let Some(initramfs) = initramfs {
            let end = initramfs.address.0 + initramfs.bytes;
            assert!(initramfs.address.0 >= kernel.end || end <= kernel.start);
            assert!(initramfs.address.0 >= layout::HIGH_MEMORY_START);
            assert!(memory.check_range(initramfs.address, initramfs.bytes as usize));
        }
        let usable = layout::usable_ranges(&layout::memory_regions(MEMORY_BYTES));
        boot::write_cmdline(memory, "console=ttyS0").unwrap();
        mp_table::write(memory, 1, [4, 5]).unwrap();
        if let (EntryPoint::Linux64 { .. }, Some(header)) = (kernel.entry, kernel.setup_header) {
            bzimage::write_zero_page(memory, &header, &usable, initramfs).unwrap();
            long_mode::write_page_tables(memory).unwrap();
        } else {
            pvh::write_start_info(memory, &usable, initramfs).unwrap();
        }
        long_mode::write_gdt(memory, long_mode::descriptor::CODE_32).unwrap();
    });
}

pub fn seeds() -> Vec<Vec<u8>> {
    vec![elf(18), elf(99), bzimage_file()]
}

/// An ELF file with one small segment and a note of this type; 18 is that of a PVH entry.
fn elf(note_type: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4, 4, note_type, u32::from_le_bytes(*b"Xen\0"), 0x10_0000u32] {
        note.extend(word.to_le_bytes());
    }
    let code = [0xf4; 32];
    let note_at = 64 + 2 * 56u64;
    let code_at = note_at + note.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(0x10_0000u64.to_le_bytes());
    file.extend(64u64.to_le_bytes());
    file.extend([0; 12]);
    for half in [64u16, 56, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for (kind, offset, address, size) in
        [(1u32, code_at, 0x10_0000u64, code.len() as u64), (4, note_at, 0, note.len() as u64)]
    {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        // Linked to run high, as kernels are.
        for word in [offset, 0xffff_ffff_8000_0000 + address, address, size, size, 4] {
            file.extend(word.to_le_bytes());
        }
    }
    file.extend(note);
    file.extend(code);
    file
}

/// A bzImage with one setup sector, a 64-bit entry and a few bytes of code.
fn bzimage_file() -> Vec<u8> {
    let mut file = vec![0; 0x400];
    file[0x1f1] = 1;
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    file[0x211] = 1;
    file[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    file[0x236] = 1;
    file[0x258..0x260].copy_from_slice(&0x10_0000_u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x1_0000_u32.to_le_bytes());
    file.extend([0xf4; 0x240]);
    file
}
