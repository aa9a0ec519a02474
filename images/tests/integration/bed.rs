//! What tests stand on: what they need of the machine, commands, mounts, and a scratch directory.

use std::error::Error;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cloche_images::{Image, LoadError, LoadOptions, Loaded, NoProgress, Store};
use libtest_mimic::{Completion, Trial};
use rustix::mount::{MountFlags, UnmountFlags};
use sha2::{Digest, Sha256};

pub type Failure = Box<dyn Error>;

/// Set in the process that has its own mount namespace.
const INNER: &str = "CLOCHE_TEST_IN_MOUNT_NAMESPACE";

/// What a test needs of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Root,
    Tool(&'static str),
    /// The archives that `scripts/images` makes, in the folder that `CLOCHE_TEST_IMAGES` names.
    RealImages,
    /// A kernel that mounts EROFS.
    Erofs,
}

impl Need {
    /// Why the need is not met, if it is not.
    fn missing(self) -> Option<String> {
        match self {
            Need::Root if !rustix::process::geteuid().is_root() => Some("root".to_owned()),
            Need::Root if std::env::var_os(INNER).is_none() => Some("unshare, of util-linux".to_owned()),
            Need::Tool(tool) if find_tool(tool).is_none() => Some(format!("the program {tool}")),
            Need::RealImages if real_image("busybox").is_none() || real_image("debian").is_none() => {
                Some("CLOCHE_TEST_IMAGES, the folder that scripts/images prints".to_owned())
            }
            Need::Erofs if !knows_erofs() => Some("EROFS in the kernel".to_owned()),
            _ => None,
        }
    }
}

/// A test that is ignored, with the reason, if the machine lacks something.
pub fn test(name: &str, needs: &'static [Need], body: fn(&Bed) -> Result<(), Failure>) -> Trial {
    Trial::ignorable_test(name, move || {
        if let Some(missing) = needs.iter().find_map(|need| need.missing()) {
            return Ok(Completion::ignored_with(format!("needs {missing}")));
        }
        let bed = Bed::new()?;
        body(&bed)?;
        Ok(Completion::Completed)
    })
}

/// Runs this program once more in a mount namespace of its own, so that no mount outlives it. Returns where that is
/// not possible or not needed.
pub fn enter_mount_namespace() {
    if std::env::var_os(INNER).is_some() || !rustix::process::geteuid().is_root() {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--"]).arg(program);
    // Only if it fails does this return.
    let _ = command.args(std::env::args_os().skip(1)).env(INNER, "1").exec();
}

fn find_tool(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(tool)).find(|path| path.is_file())
}

fn knows_erofs() -> bool {
    let _ = Command::new("modprobe").arg("erofs").output();
    fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.contains("erofs"))
}

/// An archive of `docker save`'s form.
pub fn real_image(name: &str) -> Option<PathBuf> {
    let path = Path::new(&std::env::var_os("CLOCHE_TEST_IMAGES")?).join(format!("{name}.tar"));
    path.is_file().then_some(path)
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Runs a command, whose failure fails the test with all it printed.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, Failure> {
    let output = Command::new(program).args(arguments).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !output.status.success() {
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        return Err(format!("{program} {}: {}\n{out}{err}", arguments.join(" "), output.status).into());
    }
    Ok(text(&output.stdout))
}

/// A scratch directory with a store in it.
pub struct Bed {
    scratch: tempfile::TempDir,
    pub store: Store,
}

impl Bed {
    fn new() -> Result<Bed, Failure> {
        let scratch = tempfile::Builder::new().prefix("cloche-images-test-").tempdir()?;
        let store = Store::open(&scratch.path().join("store"))?;
        Ok(Bed { scratch, store })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Writes a file into the scratch directory.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<PathBuf, Failure> {
        let path = self.path(name);
        fs::write(&path, content)?;
        Ok(path)
    }

    pub fn try_load(&self, path: &Path) -> Result<Vec<Loaded>, LoadError> {
        self.store.load(path, &LoadOptions::default(), &NoProgress)
    }

    /// Loads an archive that holds one image.
    pub fn load(&self, path: &Path) -> Result<Image, Failure> {
        let loaded = self.try_load(path).map_err(|error| chain(&error))?;
        let [image] = loaded.as_slice() else { return Err(format!("loaded {loaded:?}").into()) };
        Ok(self.store.resolve(&image.id.to_string())?)
    }

    /// Mounts a blob read-only, straight from the file where the kernel can (Linux 6.12), else by a loop device.
    pub fn mount_erofs(&self, blob: &Path, name: &str) -> Result<Mount, Failure> {
        let target = self.path(name);
        fs::create_dir_all(&target)?;
        let flags = MountFlags::RDONLY;
        match rustix::mount::mount(blob, &target, "erofs", flags, None) {
            Ok(()) => {}
            Err(rustix::io::Errno::NOTBLK) => {
                let (blob, target) = (blob.display().to_string(), target.display().to_string());
                run("mount", &["-t", "erofs", "-o", "ro,loop", &blob, &target])?;
            }
            Err(error) => return Err(format!("mount {}: {error}", blob.display()).into()),
        }
        Ok(Mount { target })
    }

    /// Mounts an image's merged file system, with the layers as devices beside it, or as one disk on which all lie one
    /// behind the other.
    pub fn mount_image(&self, image: &Image, name: &str, shape: Shape) -> Result<Mount, Failure> {
        let files = self.store.root_fs(image)?;
        if shape == Shape::OneDisk {
            let disk = self.path(&format!("{name}.disk"));
            let mut whole = fs::File::create(&disk)?;
            for part in std::iter::once(&files.metadata).chain(&files.layers) {
                std::io::copy(&mut fs::File::open(part)?, &mut whole)?;
            }
            return self.mount_erofs(&disk, name);
        }
        let target = self.path(name);
        fs::create_dir_all(&target)?;
        let options: Vec<String> =
            files.layers.iter().map(|layer| format!("device={}", layer.display())).collect();
        let options = std::ffi::CString::new(options.join(","))?;
        rustix::mount::mount(&files.metadata, &target, "erofs", MountFlags::RDONLY, options.as_c_str())
            .map_err(|error| format!("mount {}: {error}", files.metadata.display()))?;
        Ok(Mount { target })
    }
}

/// How a merged file system is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Devices,
    OneDisk,
}

/// An error and all its causes.
pub fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |error: &&dyn Error| (*error).source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// A mount, gone with this.
pub struct Mount {
    pub target: PathBuf,
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.target, UnmountFlags::DETACH);
    }
}
