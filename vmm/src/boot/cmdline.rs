//! The kernel command line.
//!
//! | option | why |
//! |---|---|
//! | `console=ttyS0` | the serial port is the only console; what goes wrong is read there |
//! | `quiet` | each character on it is a VM exit: only warnings and worse |
//! | `reboot=t` | a triple fault is the shortest way out, and needs no ACPI and no keyboard controller |
//! | `panic=-1` | a panic ends the machine at once instead of hanging it |
//! | `rootfstype=ramfs` | the initramfs is unpacked into the plainest file system there is, page by page |
//! | `8250.nr_uarts=1` | spares the search for three serial ports that are not there |
//! | `8250.skip_txen_test=1` | and a test for a bug that our port does not have |
//! | `noreplace-smp` | one vCPU only: the kernel does not patch its lock prefixes away, 7,100 writes to code |
//! | `virtio_mmio.device=…` | one for each device: there is no ACPI, device tree or PCI to find it by |
//!
//! Left out on purpose: `no_timer_check` and `tsc=reliable`, which a kernel that finds KVM's clock implies;
//! `mitigations=`, which is the user's to turn off.

use super::{layout, options};

/// Bytes of a command line that Linux keeps on x86, the final NUL included (`COMMAND_LINE_SIZE`).
pub const MAX_BYTES: usize = 2048;

/// A command line that Linux would cut off.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the kernel command line would have {bytes} bytes, and the kernel keeps {}; use fewer disks or options",
    MAX_BYTES - 1
)]
pub struct CmdlineTooLong {
    bytes: usize,
}

/// Builds the command line; `interrupts` has the interrupt line of each virtio-mmio device in the order of their
/// addresses. `extra` comes last, because for most options the last one wins.
pub fn build(vcpus: u8, interrupts: &[u32], extra: &str) -> Result<String, CmdlineTooLong> {
    let mut line = String::from(options::OPTIONS);
    if vcpus == 1 {
        line.push(' ');
        line.push_str(options::ONE_VCPU);
    }
    let mut address = layout::VIRTIO_MMIO_START;
    for interrupt in interrupts {
        line.push_str(&format!(
            " virtio_mmio.device={}K@{address:#x}:{interrupt}",
            layout::VIRTIO_MMIO_BYTES / 1024
        ));
        address += layout::VIRTIO_MMIO_BYTES;
    }
    let extra = extra.trim();
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    if line.len() >= MAX_BYTES {
        return Err(CmdlineTooLong { bytes: line.len() });
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MAX_DISKS, MAX_NETS};

    #[test]
    fn build_with_devices_names_address_and_interrupt_of_each() {
        let line = build(2, &[5, 6], " debug ").unwrap();
        assert!(
            line.ends_with(" virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 debug"),
            "{line}"
        );
        assert!(!line.contains("noreplace-smp"));
        assert!(build(1, &[], "").unwrap().ends_with(" noreplace-smp"));
    }

    #[test]
    fn build_with_most_devices_fits() {
        build(1, &[23; MAX_DISKS + MAX_NETS + 6], "").unwrap();
    }

    #[test]
    fn build_over_2047_bytes_fails() {
        let base = build(1, &[], "").unwrap().len() + 1;
        assert_eq!(build(1, &[], &"x".repeat(2047 - base)).unwrap().len(), 2047);
        assert_eq!(build(1, &[], &"x".repeat(2048 - base)), Err(CmdlineTooLong { bytes: 2048 }));
    }
}
