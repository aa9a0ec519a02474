//! The surroundings of a test run: which `cloche`, which image store, which isolations, and what the host offers.
//!
//! | variable | meaning |
//! |---|---|
//! | `CLOCHE_BIN` | the binary under test; else `cloche` on `PATH` |
//! | `CLOCHE_ROOT` | the image store |
//! | `CLOCHE_TEST_IMAGES` | directory of `busybox.tar`, `debian.tar` and `workloads.tar`, loaded if the store lacks them |
//! | neither of the two | the default store, which must hold the image `busybox` |
//! | only the second | a temporary store |
//! | `CLOCHE_TEST_CLOUD_KERNEL` | Debian's stock cloud kernel, whose drivers are modules |
//! | `CLOCHE_TESTS_REQUIRE_VM` | `1`: a host without usable KVM is a failure, not a reason to skip |
//! | `CLOCHE_TESTS_TIMEOUT_S` | longest time for one test in seconds |

use std::env;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::plain_user::{self, Ids};
use crate::process::{Input, Running};

/// Where `cloche` keeps images by default.
const DEFAULT_ROOT: &str = "/var/lib/cloche";

/// The two isolations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// A Linux container.
    Container,
    /// A KVM microVM.
    Vm,
}

impl Isolation {
    /// The word of the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Vm => "vm",
        }
    }
}

/// Something that a test cannot do without and a host may lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The rights of root.
    Root,
    /// `/dev/kvm` that can run a stock Linux guest.
    UsableKvm,
    /// The opposite, for tests of what happens without.
    NoUsableKvm,
    /// The `debian` image.
    DebianImage,
    /// The `workloads` image.
    WorkloadsImage,
    /// `CLOCHE_TEST_CLOUD_KERNEL`.
    CloudKernel,
    /// The program `passt`.
    Passt,
    /// The programs `newuidmap` and `newgidmap`.
    NewIdMap,
    /// cgroup v2 with no v1 hierarchy beside it.
    CgroupV2,
    /// A machine whose processor is real, for work that takes minutes on an emulated one.
    RealProcessor,
}

impl Need {
    /// What to call it in a report.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::UsableKvm => "usable KVM",
            Self::NoUsableKvm => "a host without usable KVM",
            Self::DebianImage => "the debian image (CLOCHE_TEST_IMAGES)",
            Self::WorkloadsImage => "the workloads image (scripts/images --workloads)",
            Self::CloudKernel => "Debian's cloud kernel (CLOCHE_TEST_CLOUD_KERNEL)",
            Self::Passt => "passt on PATH",
            Self::NewIdMap => "newuidmap and newgidmap on PATH (uidmap)",
            Self::CgroupV2 => "cgroup v2 without v1 beside it",
            Self::RealProcessor => "a processor that is not emulated",
        }
    }
}

/// The surroundings, looked up once.
#[derive(Debug)]
pub struct World {
    /// The binary under test.
    pub cloche: PathBuf,
    /// Image store.
    pub root: PathBuf,
    /// Debian's cloud kernel, if given.
    pub cloud_kernel: Option<PathBuf>,
    /// How much longer than on an ordinary machine everything takes here.
    pub slowness: u32,
    /// Longest time for one test.
    pub time_out: Duration,
    images: Vec<String>,
    usable_kvm: bool,
    vm_required: bool,
    plain_user: OnceLock<PlainUser>,
    // Last, so that it outlives nothing that lies in it.
    scratch: TempDir,
}

impl World {
    /// Looks around and makes sure that the test images are loaded where their archives are at hand.
    pub fn explore() -> Result<Self> {
        let scratch =
            tempfile::Builder::new().prefix("cloche-tests.").tempdir().context("make a directory")?;
        let cloche = env::var_os("CLOCHE_BIN").map_or_else(|| PathBuf::from("cloche"), PathBuf::from);
        let archives = env::var_os("CLOCHE_TEST_IMAGES").map(PathBuf::from);
        let root = match env::var_os("CLOCHE_ROOT") {
            Some(root) => PathBuf::from(root),
            None if archives.is_some() => scratch.path().join("root"),
            None => PathBuf::from(DEFAULT_ROOT),
        };
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let emulated = processor.contains("QEMU TCG") || processor.contains("QEMU Virtual CPU");
        let slowness = if emulated { 8 } else { 1 };
        let seconds = match env::var("CLOCHE_TESTS_TIMEOUT_S") {
            Ok(text) => text.parse().context("CLOCHE_TESTS_TIMEOUT_S is not a number of seconds")?,
            Err(_) => 60 * u64::from(slowness),
        };
        let mut world = Self {
            cloche,
            root,
            cloud_kernel: env::var_os("CLOCHE_TEST_CLOUD_KERNEL").map(PathBuf::from),
            slowness,
            time_out: Duration::from_secs(seconds),
            images: Vec::new(),
            usable_kvm: kvm_is_usable(&processor),
            vm_required: env::var_os("CLOCHE_TESTS_REQUIRE_VM").is_some_and(|value| value == "1"),
            plain_user: OnceLock::new(),
            scratch,
        };
        world.images = world.loaded_images()?;
        if let Some(archives) = archives {
            world.load_missing(&archives)?;
        }
        ensure!(
            world.has_image("busybox"),
            "the store {} has no image busybox; set CLOCHE_TEST_IMAGES to the folder that scripts/images prints",
            world.root.display()
        );
        Ok(world)
    }

    /// A directory for this run, removed at its end.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// What a plain user needs: a copy of `cloche` and an image store with `busybox`, its own, made on first use.
    pub fn plain_user(&self) -> Result<&PlainUser> {
        if let Some(user) = self.plain_user.get() {
            return Ok(user);
        }
        let place = self.scratch.path().join("plain-user");
        let user = PlainUser {
            cloche: place.join("cloche"),
            root: place.join("store"),
            device: place.join("device"),
        };
        // Whoever may pass need not be able to list.
        for (directory, mode) in
            [(self.scratch.path(), 0o711), (&place, 0o755), (&user.root, 0o700), (&user.device, 0o755)]
        {
            fs::create_dir_all(directory)?;
            fs::set_permissions(directory, fs::Permissions::from_mode(mode))?;
        }
        chown(&user.root, Some(plain_user::ID), Some(plain_user::ID))?;
        let program = Command::new("sh").args(["-c", "command -v \"$0\""]).arg(&self.cloche).output()?;
        let program = String::from_utf8_lossy(&program.stdout).trim().to_owned();
        fs::copy(&program, &user.cloche).with_context(|| format!("copy {program}"))?;
        let archive = place.join("busybox.tar");
        self.cloche(&["image", "save", "-o", &archive.to_string_lossy(), "busybox"])?;
        let mut load = user.command(Ids::Alone)?;
        load.arg("--root").arg(&user.root).args(["image", "load", "--name", "busybox"]).arg(&archive);
        Running::start(load, &Input::Null, Instant::now() + self.time_out)?.wait()?.succeeds()?;
        fs::remove_file(archive)?;
        Ok(self.plain_user.get_or_init(|| user))
    }

    /// Whether the host lacks this.
    pub fn lacks(&self, need: Need) -> bool {
        match need {
            Need::Root => !rustix::process::geteuid().is_root(),
            Need::UsableKvm => !self.usable_kvm,
            Need::NoUsableKvm => self.usable_kvm,
            Need::DebianImage => !self.has_image("debian"),
            Need::WorkloadsImage => !self.has_image("workloads"),
            Need::CloudKernel => self.cloud_kernel.is_none(),
            Need::Passt => {
                !Command::new("passt").arg("--version").output().is_ok_and(|ran| ran.status.success())
            }
            Need::NewIdMap => {
                let found = |name: &str| {
                    let path = env::var_os("PATH").unwrap_or_default();
                    env::split_paths(&path).any(|directory| directory.join(name).is_file())
                };
                !["newuidmap", "newgidmap"].into_iter().all(found)
            }
            Need::CgroupV2 => !Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
            Need::RealProcessor => self.slowness > 1,
        }
    }

    /// Whether to fail for want of this instead of skipping.
    pub fn insists_on(&self, need: Need) -> bool {
        need == Need::UsableKvm && self.vm_required
    }

    fn has_image(&self, name: &str) -> bool {
        self.images.iter().any(|image| short_name(image) == name)
    }

    fn load_missing(&mut self, archives: &Path) -> Result<()> {
        for name in ["busybox", "debian", "workloads"] {
            let archive = archives.join(format!("{name}.tar"));
            if archive.exists() && !self.has_image(name) {
                let archive = archive.to_string_lossy();
                self.cloche(&["image", "load", "--name", name, &archive])?;
            }
        }
        self.images = self.loaded_images()?;
        Ok(())
    }

    fn loaded_images(&self) -> Result<Vec<String>> {
        names_in(&serde_json::from_str(&self.cloche(&["image", "ls", "--json"])?)?)
    }

    fn cloche(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.cloche);
        command
            .arg("--root")
            .arg(&self.root)
            .arg("--state")
            .arg(self.scratch.path().join("setup"))
            .args(arguments);
        let deadline = Instant::now() + self.time_out * 5;
        Ok(Running::start(command, &Input::Null, deadline)?.wait()?.succeeds()?.out())
    }
}

/// A plain user's `cloche` and images.
#[derive(Debug)]
pub struct PlainUser {
    cloche: PathBuf,
    /// Its image store.
    pub root: PathBuf,
    device: PathBuf,
}

impl PlainUser {
    /// The user's `cloche`, ready for options.
    pub fn command(&self, ids: Ids) -> Result<Command> {
        let mut command = Command::new(env::current_exe()?);
        command.args(plain_user::words(&self.device, ids, &self.cloche));
        Ok(command)
    }
}

/// Every name in what `cloche image ls --json` prints.
pub fn names_in(listing: &Value) -> Result<Vec<String>> {
    let images =
        listing.as_array().with_context(|| format!("`image ls --json` is not an array: {listing}"))?;
    let names = images.iter().filter_map(|image| image["names"].as_array()).flatten();
    Ok(names.filter_map(Value::as_str).map(str::to_owned).collect())
}

/// `docker.io/library/busybox:latest` is `busybox` to its friends.
fn short_name(reference: &str) -> &str {
    let name = reference.rsplit('/').next().unwrap_or(reference);
    name.split(['@', ':']).next().unwrap_or(name)
}

/// Hardware virtualisation and a device to use it by. A paravirtual `/dev/kvm`, on a processor that shows neither
/// flag, cannot run a stock Linux guest. This is found out without `cloche`, whose own finding is under test.
fn kvm_is_usable(processor: &str) -> bool {
    let flags = processor.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let virtualises = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    virtualises && fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_name_of_full_reference_is_its_last_word() {
        assert_eq!(short_name("docker.io/library/busybox:latest"), "busybox");
        assert_eq!(short_name("127.0.0.1:5000/debian@sha256:00"), "debian");
        assert_eq!(short_name("debian"), "debian");
    }

    #[test]
    fn kvm_without_processor_flag_is_not_usable() {
        assert!(!kvm_is_usable("flags\t: fpu vme de pse\n"));
    }
}
