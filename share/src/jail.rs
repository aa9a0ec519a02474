//! Leaving the host behind. What is shared becomes a tree of mounts that is attached nowhere: no path leads into it,
//! and `..` does not lead out of it. Then this process's root becomes an empty, read-only file system.
//!
//! ```text
//!  namespaces ▸ clone what is shared ▸ empty root ▸ working directory: its own /proc/self/fd, cloned as well
//!             ▸ capabilities ▸ limits ▸ no_new_privs ▸ seccomp
//! ```

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use cloche_seccomp::bpf::{self, Comparison, Condition, Decision, Policy, Rule};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
        UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount,
        open_tree, unmount,
    },
    process::{Resource, Rlimit, chdir, chroot, fchdir, getrlimit, pivot_root, setrlimit, umask},
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, remove_capability_from_bounding_set,
        set_capabilities, set_capabilities_secure_bits, set_no_new_privs, set_thread_groups,
    },
};

use crate::{Shared, syscalls};

/// Files that the guest can have this process keep: those it knows and those it has open. Each costs the host's kernel
/// about 2 KiB.
const MAX_FILES: u64 = 1 << 18;

/// What it takes to do on the host what the guest's root asks for: owners and modes, set-ID bits, file capabilities.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP)
    // New files belong to the guest's user.
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

/// The highest capability of Linux 6.x (`CAP_CHECKPOINT_RESTORE`).
const LAST_CAPABILITY: u32 = 40;

/// Why the host could not be left.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A file or directory cannot be shared.
    #[error("cannot share {}", path.display())]
    Open {
        /// The path on the host.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A step failed.
    #[error("cannot {action}")]
    Step {
        /// What was attempted.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

fn step<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step { action, source: source.into() }
}

/// Opens what is shared, in namespaces of this process's own; it must have one thread only.
pub fn open(shares: &[Shared]) -> Result<Vec<OwnedFd>, JailError> {
    syscalls::unshare_namespaces().map_err(step("make namespaces"))?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(step("cut its mounts off from the host's"))?;
    open_trees(shares)
}

/// Clones what is shared. Where it is attached, in this mount namespace, plays no part any more.
pub(crate) fn open_trees(shares: &[Shared]) -> Result<Vec<OwnedFd>, JailError> {
    let trees = shares.iter().map(|share| {
        let failed = |source| JailError::Open { path: share.path.clone(), source };
        let tree = clone_tree(&share.path, share.recursive).map_err(|errno| failed(errno.into()))?;
        syscalls::isolate(tree.as_fd(), share.read_only).map_err(failed)?;
        Ok(tree)
    });
    trees.collect()
}

fn clone_tree(path: &Path, with_submounts: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if with_submounts {
        flags |= OpenTreeFlags::from_bits_retain(libc::AT_RECURSIVE as u32);
    }
    open_tree(CWD, path, flags)
}

/// Gives up everything that is not needed to serve, with additions or not, and one more system call, if there is one.
pub fn enter(with_additions: bool, without: Option<libc::c_long>) -> Result<(), JailError> {
    let descriptors = clone_tree(Path::new("/proc/self/fd"), false).map_err(step("clone /proc/self/fd"))?;
    enter_empty_root().map_err(step("enter an empty root"))?;
    fchdir(&descriptors).map_err(step("change to its descriptors"))?;
    drop(descriptors);
    umask(Mode::empty());
    limit_files().map_err(step("limit its open files"))?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(step("forbid core dumps"))?;
    drop_capabilities().map_err(step("drop capabilities"))?;
    set_no_new_privs(true).map_err(step("set no_new_privs"))?;
    cloche_seccomp::install(&filter(with_additions, without), 0).map_err(step("install its seccomp filter"))
}

fn enter_empty_root() -> Result<(), Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("source", "none"), ("size", "4k"), ("nr_inodes", "1"), ("mode", "555")] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let old = openat(CWD, "/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    fchdir(&root)?;
    match pivot_root(".", ".") {
        // The initial ramfs cannot be pivoted away; it stays covered, and no path leads below a cover.
        Err(Errno::INVAL) => return chroot(".").and_then(|()| chdir("/")),
        result => result?,
    }
    fchdir(&old)?;
    // The name stands for the topmost mount there, until the old root is none of this namespace any more.
    loop {
        match unmount(".", UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno),
        }
    }
    chdir("/")
}

/// As many as the guest may make this process hold, or as the host allows.
fn limit_files() -> Result<(), Errno> {
    let wanted = Rlimit { current: Some(MAX_FILES), maximum: Some(MAX_FILES) };
    setrlimit(Resource::Nofile, wanted).or_else(|_| {
        let maximum = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    })
}

fn drop_capabilities() -> Result<(), Errno> {
    match set_thread_groups(&[]) {
        // A plain user's namespace has no say in groups (user_namespaces(7)). They stay, and so do their rights.
        Err(Errno::PERM) => {}
        result => result?,
    }
    // With a change of user, capabilities stay as they are: see `operations::as_caller`.
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED,
    )?;
    for number in 0..=LAST_CAPABILITY {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if !CAPABILITIES.contains(capability) {
            match remove_capability_from_bounding_set(capability) {
                // An older kernel does not know it.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
    set_capabilities(
        None,
        CapabilitySets {
            effective: CAPABILITIES,
            permitted: CAPABILITIES,
            inheritable: CapabilitySet::empty(),
        },
    )
}

/// System calls of [`crate::run`]'s loop; any other ends the process. `tests/filter.rs` shows that each is needed: who
/// needs one more has its guest do what takes it.
const ALLOWED: [libc::c_long; 38] = [
    // The socket, and what it said on stdout before.
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_write,
    // Files by descriptor.
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_getdents64,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    // Files by a directory and a name.
    libc::SYS_openat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_readlinkat,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_getxattr,
    libc::SYS_setxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    // The guest's users.
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_capget,
    libc::SYS_capset,
    // Memory, and the end.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_sigaltstack,
    libc::SYS_exit_group,
];

/// What it takes besides to have shares come and go: see `additions`.
const FOR_ADDITIONS: [libc::c_long; 3] = [libc::SYS_ppoll, libc::SYS_accept4, libc::SYS_recvmsg];

/// Those of which only some are allowed.
const LIMITED: [libc::c_long; 2] = [libc::SYS_fcntl, libc::SYS_mmap];

/// All that a server may call.
#[doc(hidden)]
pub fn allowed_calls() -> Vec<libc::c_long> {
    ALLOWED.into_iter().chain(FOR_ADDITIONS).chain(LIMITED).collect()
}

fn filter(with_additions: bool, without: Option<libc::c_long>) -> Vec<libc::sock_filter> {
    use Comparison::{Equal, MaskedEqual};
    let allow = libc::SECCOMP_RET_ALLOW;
    let kill = libc::SECCOMP_RET_KILL_PROCESS;
    let only = |argument, comparisons: &[Comparison]| {
        let rule = |comparison: &Comparison| Rule {
            conditions: vec![Condition { argument, comparison: *comparison }],
            action: allow,
        };
        Decision::Match { rules: comparisons.iter().map(rule).collect(), otherwise: kill }
    };
    let not_executable = [MaskedEqual { mask: libc::PROT_EXEC as u64, value: 0 }];
    // Descriptors may be duplicated (and looked at, as the standard library's debug builds do). Not F_SETOWN and
    // F_SETSIG: with root's user id they would send any signal to any process.
    let duplicate = [Equal(libc::F_DUPFD_CLOEXEC as u64), Equal(libc::F_GETFD as u64)];
    let added = FOR_ADDITIONS.into_iter().filter(|_| with_additions);
    let mut calls: Vec<(u32, Decision)> =
        ALLOWED.into_iter().chain(added).map(|call| (call as u32, Decision::Always(allow))).collect();
    calls.extend([
        (libc::SYS_fcntl as u32, only(1, &duplicate)),
        // Memory may be mapped, but never to be executed.
        (libc::SYS_mmap as u32, only(2, &not_executable)),
    ]);
    calls.retain(|(call, _)| without != Some((*call).into()));
    calls.sort_by_key(|(call, _)| *call);
    bpf::assemble(&Policy { calls, default: kill, newer: kill })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_compiles_and_names_each_call_once() {
        assert!(filter(true, None).len() > allowed_calls().len());
        let distinct: std::collections::BTreeSet<_> = allowed_calls().into_iter().collect();
        assert_eq!(distinct.len(), allowed_calls().len());
    }

    #[test]
    fn filter_keeps_signals_and_code_out_of_reach() {
        use cloche_seccomp::interpreter::{Call, run};
        const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
        let program = filter(false, None);
        let answer = |number: libc::c_long, args| {
            let call = Call { number: number as u32, architecture: AUDIT_ARCH_X86_64, args };
            run(&program, &call).0
        };
        let fcntl = |command: i32| answer(libc::SYS_fcntl, [0, command as u64, 0, 0, 0, 0]);
        assert_eq!(fcntl(libc::F_DUPFD_CLOEXEC), libc::SECCOMP_RET_ALLOW);
        // linux/fcntl.h: F_SETFL, F_SETOWN, F_SETSIG, F_SETOWN_EX.
        for command in [4, 8, 10, 15] {
            assert_eq!(fcntl(command), libc::SECCOMP_RET_KILL_PROCESS, "{command}");
        }
        let map = |protection: i32| answer(libc::SYS_mmap, [0, 4096, protection as u64, 0, 0, 0]);
        assert_eq!(map(libc::PROT_READ | libc::PROT_WRITE), libc::SECCOMP_RET_ALLOW);
        assert_eq!(map(libc::PROT_READ | libc::PROT_EXEC), libc::SECCOMP_RET_KILL_PROCESS);
        for call in [libc::SYS_mprotect, libc::SYS_kill].into_iter().chain(FOR_ADDITIONS) {
            assert_eq!(answer(call, [1, 4096, 1, 0, 0, 0]), libc::SECCOMP_RET_KILL_PROCESS);
        }
        // Through the x32 ABI, even a call that is allowed otherwise.
        let x32 = libc::SYS_fstat | i64::from(bpf::X32_SYSCALL_BIT);
        assert_eq!(answer(x32, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
    }
}
