//! Real engines as the other side: what they load of our archives, and what they and we get of one registry.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;

use crate::archive::{Packing, tar_of};
use crate::bed::{Bed, Failure, Need, chain, run, test};
use crate::registry::{Registry, pull, push, sample};

const REGISTRY: Need = Need::Tool("docker-registry");
const DOCKER: &[Need] =
    &[Need::Root, Need::Tool("dockerd"), Need::Tool("docker"), Need::Tool("containerd"), REGISTRY];
const PODMAN: &[Need] = &[Need::Root, Need::Tool("podman"), REGISTRY];

pub fn tests() -> Vec<Trial> {
    vec![
        test("saved_archives_are_loaded_by_docker", DOCKER, |bed| {
            loaded(bed, &Docker::start(bed, Driver::Vfs)?)
        }),
        test("saved_archives_are_loaded_by_podman", PODMAN, |bed| loaded(bed, &Podman::new(bed)?)),
        test("docker_and_we_have_the_same_digests", DOCKER, |bed| {
            exchanged(bed, &Docker::start(bed, Driver::Vfs)?)
        }),
        test("podman_and_we_have_the_same_digests", PODMAN, |bed| exchanged(bed, &Podman::new(bed)?)),
    ]
}

/// A command line like Docker's.
pub trait Engine {
    fn run(&self, words: &[&str]) -> Result<String, Failure>;
    /// Options of its `pull` and `push`.
    fn plain_http(&self) -> &'static [&'static str];

    fn id(&self, image: &str) -> Result<String, Failure> {
        let id = self.run(&["image", "inspect", "--format", "{{.Id}}", image])?;
        Ok(id.trim().trim_start_matches("sha256:").to_owned())
    }

    /// What follows the @ of its first digest.
    fn digest(&self, image: &str) -> Result<String, Failure> {
        let digests = self.run(&["image", "inspect", "--format", "{{join .RepoDigests \" \"}}", image])?;
        let digest = digests.split_whitespace().next().and_then(|name| name.split_once('@'));
        Ok(digest.ok_or_else(|| format!("no digest of {image}: {digests:?}"))?.1.to_owned())
    }
}

/// How a daemon keeps images: a whole tree for each layer, or what each layer changes, for overlayfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    Vfs,
    Overlay,
}

/// A daemon in the bed, gone with this.
pub struct Docker {
    daemon: Child,
    socket: String,
    driver: Driver,
    root: PathBuf,
}

impl Docker {
    pub fn start(bed: &Bed, driver: Driver) -> Result<Docker, Failure> {
        let path = |name: &str| bed.path(name).display().to_string();
        let socket = format!("unix://{}", path("docker.sock"));
        let log = fs::File::create(bed.path("dockerd.log"))?;
        // Neither networks nor mounts: no container is run.
        let daemon = Command::new("dockerd")
            .args(["--host", &socket, "--data-root", &path("docker"), "--exec-root", &path("docker-exec")])
            .args(["--pidfile", &path("docker.pid"), "--storage-driver"])
            .arg(match driver {
                Driver::Vfs => "vfs",
                Driver::Overlay => "overlay2",
            })
            .args(["--bridge", "none", "--iptables=false", "--ip6tables=false"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        let docker = Docker { daemon, socket, driver, root: bed.path("docker") };
        let patience = Instant::now() + Duration::from_secs(120);
        while docker.run(&["version"]).is_err() {
            if Instant::now() > patience {
                return Err(format!(
                    "dockerd does not start: {}",
                    fs::read_to_string(bed.path("dockerd.log"))?
                )
                .into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(docker)
    }

    /// The directories that an image consists of, the uppermost first.
    pub fn directories(&self, image: &str) -> Result<Vec<PathBuf>, Failure> {
        let inspect = |format: &str| self.run(&["image", "inspect", "--format", format, image]);
        if self.driver == Driver::Overlay {
            let list =
                inspect("{{with .GraphDriver.Data}}{{.UpperDir}}:{{with .LowerDir}}{{.}}{{end}}{{end}}")?;
            let paths = list.trim().split(':').filter(|path| !path.is_empty() && *path != "<no value>");
            return Ok(paths.map(PathBuf::from).collect());
        }
        // OCI image-spec: config.md#layer-chainid, by which the daemon names what it has unpacked.
        let layers: Vec<String> = serde_json::from_str(&inspect("{{json .RootFS.Layers}}")?)?;
        let chain = layers.into_iter().reduce(|below, layer| {
            format!("sha256:{}", crate::bed::sha256(format!("{below} {layer}").as_bytes()))
        });
        let chain = chain.ok_or("an image without layers")?.replace(':', "/");
        let name = fs::read_to_string(self.root.join("image/vfs/layerdb").join(chain).join("cache-id"))?;
        Ok(vec![self.root.join("vfs/dir").join(name)])
    }
}

impl Engine for Docker {
    fn run(&self, words: &[&str]) -> Result<String, Failure> {
        run("docker", &[&["--host", &self.socket], words].concat())
    }

    fn plain_http(&self) -> &'static [&'static str] {
        &[]
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        // In order, so that it ends its containerd.
        if let Some(pid) = rustix::process::Pid::from_raw(self.daemon.id() as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.daemon.wait();
    }
}

struct Podman {
    storage: Vec<String>,
}

impl Podman {
    fn new(bed: &Bed) -> Result<Podman, Failure> {
        let path = |name: &str| bed.path(name).display().to_string();
        let (root, run_root, temporary) = (path("storage"), path("runroot"), path("libpod"));
        let storage =
            ["--root", &root, "--runroot", &run_root, "--tmpdir", &temporary, "--storage-driver", "vfs"];
        Ok(Podman { storage: storage.map(str::to_owned).to_vec() })
    }
}

impl Engine for Podman {
    fn run(&self, words: &[&str]) -> Result<String, Failure> {
        let storage: Vec<&str> = self.storage.iter().map(String::as_str).collect();
        run("podman", &[&storage[..], words].concat())
    }

    fn plain_http(&self) -> &'static [&'static str] {
        &["--tls-verify=false"]
    }
}

fn expect_same(what: &str, one: &str, other: &str) -> Result<(), Failure> {
    if one == other { Ok(()) } else { Err(format!("{what}: {one} is not {other}").into()) }
}

/// Both forms of our archives, of layers as they come.
fn loaded(bed: &Bed, engine: &dyn Engine) -> Result<(), Failure> {
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let name = format!("localhost/app-{packing:?}:1").to_lowercase();
        let image = bed.load(&bed.write("in.tar", &tar_of(&sample(&name, packing).oci_files()?))?)?;
        let names = [name.clone()];
        for classic in [true, false] {
            let path = bed.path("out.tar");
            let mut file = fs::File::create(&path)?;
            let saved = match classic {
                true => bed.store.save_for_docker(&names, &mut file),
                // Docker 20.10 knows no zstd.
                false if packing == Packing::Zstd => continue,
                false => bed.store.save(&names, &mut file),
            };
            saved.map_err(|error| chain(&error))?;
            engine.run(&["load", "--input", &path.display().to_string()])?;
            expect_same(&format!("{packing:?}, classic: {classic}"), &engine.id(&name)?, &image.id.hex())?;
            engine.run(&["rmi", &name])?;
        }
    }
    Ok(())
}

/// One image is pushed by us and pulled by the engine, and one the other way round.
fn exchanged(bed: &Bed, engine: &dyn Engine) -> Result<(), Failure> {
    let registry = Registry::plain(bed)?;
    let with = |verb, name: &str| engine.run(&[&[verb], engine.plain_http(), &[name]].concat());
    let ours = registry.image("ours:1");
    let image = bed.load(&bed.write("in.tar", &tar_of(&sample(&ours, Packing::Gzip).oci_files()?))?)?;
    let pushed = push(&bed.store, &ours).map_err(|error| chain(&error))?;
    with("pull", &ours)?;
    expect_same("the digest that they see", &engine.digest(&ours)?, &pushed.digest.to_string())?;
    expect_same("the image that they have", &engine.id(&ours)?, &image.id.hex())?;

    let theirs = registry.image("theirs:1");
    engine.run(&["tag", &ours, &theirs])?;
    with("push", &theirs)?;
    let store = cloche_images::Store::open(&bed.path("other"))?;
    let pulled = pull(&store, &theirs).map_err(|error| chain(&error))?;
    expect_same(
        "the digest that the registry has",
        &pulled.digest.to_string(),
        &registry.digest("theirs:1")?,
    )?;
    let layers = |image: cloche_images::Image| -> Vec<PathBuf> {
        image.layers.iter().filter_map(|layer| layer.erofs.file_name().map(Into::into)).collect()
    };
    let same = layers(store.resolve(&theirs)?) == layers(image);
    if same { Ok(()) } else { Err("they pushed other layers than they pulled".into()) }
}
