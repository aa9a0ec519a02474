//! The AppArmor profile or SELinux label of the program: the kernel is told before, and gives it at `execve`.

use std::{fs, io, os::fd::OwnedFd, path::Path};

use oci_spec::runtime::Process;

use crate::procfs;

/// Why the program cannot have its label.
#[derive(Debug, thiserror::Error)]
#[error("cannot have the kernel apply {field} {value:?} at execve; is it known to the kernel?")]
pub struct LabelError {
    field: &'static str,
    value: String,
    source: io::Error,
}

/// What the program gets. The file is this process's own, and the caller's `/proc` is gone when it is written to.
pub(crate) struct Label {
    field: &'static str,
    value: String,
    file: OwnedFd,
    text: Vec<u8>,
}

/// Whether AppArmor decides on programs here.
pub(crate) fn has_apparmor() -> bool {
    fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|enabled| enabled.starts_with(b"Y"))
}

/// Whether SELinux decides on programs here.
pub(crate) fn has_selinux() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

impl Label {
    /// To be called by the process itself, while the caller's `/proc` is still there.
    pub(crate) fn open(process: &Process) -> Result<Option<Self>, LabelError> {
        let set = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let (field, value, text, files) = if let Some(profile) = set(process.apparmor_profile()) {
            // Linux 5.8 has a directory for each module; before, the file is the one module's that has it.
            let files = ["self/attr/apparmor/exec", "self/attr/exec"];
            ("process.apparmorProfile", profile.clone(), format!("exec {profile}"), files)
        } else if let Some(label) = set(process.selinux_label()) {
            ("process.selinuxLabel", label.clone(), label, ["self/attr/selinux/exec", "self/attr/exec"])
        } else {
            return Ok(None);
        };
        let [first, second] = files;
        let file = procfs::open(first).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => procfs::open(second),
            _ => Err(error),
        });
        match file {
            Ok(file) => Ok(Some(Self { field, value, file, text: text.into_bytes() })),
            Err(source) => Err(LabelError { field, value, source }),
        }
    }

    pub(crate) fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// From here on, and for children, it is what the next program gets.
    pub(crate) fn set(&self) -> Result<(), LabelError> {
        match rustix::io::write(&self.file, &self.text) {
            Ok(_) => Ok(()),
            Err(errno) => {
                Err(LabelError { field: self.field, value: self.value.clone(), source: errno.into() })
            }
        }
    }
}
