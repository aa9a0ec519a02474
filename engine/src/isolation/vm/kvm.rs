//! Whether this machine's KVM can run a Linux guest, as far as can be told without running one.

use std::{fs, path::Path};

/// Why no VM can run here. Each message ends with what to do.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No device node.
    #[error(
        "there is no /dev/kvm: this machine has no KVM, or its module is not loaded; run `cloche doctor`, or use --isolation container"
    )]
    Missing,
    /// A device node that this user may not open.
    #[error(
        "cannot open /dev/kvm; join the group that owns it, run `cloche doctor`, or use --isolation container"
    )]
    Denied(#[source] std::io::Error),
    /// KVM without hardware virtualisation.
    #[error(
        "/dev/kvm is there, but this CPU shows neither vmx nor svm: its KVM is paravirtual and cannot run a Linux guest; run `cloche doctor`, or use --isolation container"
    )]
    Paravirtual,
}

/// Fails closed: everything that is known to end in no Linux guest is an error.
pub fn check() -> Result<(), KvmError> {
    let device = Path::new("/dev/kvm");
    if !device.exists() {
        return Err(KvmError::Missing);
    }
    fs::File::options().read(true).write(true).open(device).map_err(KvmError::Denied)?;
    if has_hardware_virtualisation(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()) {
        Ok(())
    } else {
        Err(KvmError::Paravirtual)
    }
}

fn has_hardware_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.trim_start().strip_prefix(':'));
    flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_virtualisation_is_a_whole_flag() {
        assert!(has_hardware_virtualisation("processor\t: 0\nflags\t\t: fpu svm sse\n"));
        assert!(has_hardware_virtualisation("flags\t\t: fpu vmx\n"));
        assert!(!has_hardware_virtualisation("flags\t\t: fpu svm_lock\nvmx flags\t: vnmi svm\n"));
        assert!(!has_hardware_virtualisation(""));
    }
}
