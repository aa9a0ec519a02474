//! What a running process really is, read from the kernel and not from what was asked for.

use std::fs;

use crate::request::Isolation;

/// The isolation that holds process `pid`: a VM if it has one open, a container if its PID and mount namespaces are
/// not ours, else a bare process. `None` if it is gone or hidden from us.
pub fn isolation(pid: i32) -> Option<Isolation> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let owns_vm = descriptors
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| target.as_os_str() == "anon_inode:kvm-vm");
    if owns_vm {
        return Some(Isolation::Vm);
    }
    let namespace = |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
    let pid = pid.to_string();
    let apart = ["pid", "mnt"].map(|kind| Some(namespace(&pid, kind)? != namespace("self", kind)?));
    Some(if apart == [Some(true); 2] { Isolation::Container } else { Isolation::Process })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn isolation_of_own_process_is_none() {
        assert_eq!(isolation(std::process::id() as i32), Some(Isolation::Process));
        assert_eq!(isolation(i32::MAX), None);
    }
}
