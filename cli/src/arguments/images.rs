//! What can be typed about images and registries.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use cloche_images::Change;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PullPolicy {
    /// If it is not here
    Missing,
    /// Each time, as it may have changed there
    Always,
    /// Not at all
    Never,
}

#[derive(Debug, Args)]
pub struct Registry {
    /// `false` lets a registry on this machine do without encryption, or with any certificate; others never
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_missing_value = "true")]
    pub tls_verify: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche pull debian:bookworm
  cloche pull quay.io/podman/hello@sha256:…
  cloche pull --tls-verify=false localhost:5000/app
  cloche pull --all-tags busybox

Names are Docker's: `debian` is docker.io/library/debian:latest. Logins are those of `cloche login` and `docker login`
(~/.docker/config.json and its credential helpers). Certificate authorities: the system's, and /etc/docker/certs.d/HOST
or /etc/containers/certs.d/HOST. A pull that was broken off goes on where it ended. Proxies: HTTPS_PROXY and NO_PROXY.
Mirrors, which are asked first: CLOCHE_REGISTRY_MIRRORS='docker.io=https://mirror.example', any number of them with
blanks between; else docker.io's in /etc/docker/daemon.json (registry-mirrors).")]
pub struct Pull {
    #[command(flatten)]
    pub registry: Registry,
    /// Get all that a repository has, under each of its tags
    #[arg(short, long)]
    pub all_tags: bool,
    /// Fail unless this is the platform that images run on here: linux/amd64
    #[arg(long, value_name = "OS[/ARCH]", value_parser = platform)]
    pub platform: Option<String>,
    /// Print nothing but the images' digests
    #[arg(short, long)]
    pub quiet: bool,
    /// Names
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche push ghcr.io/me/app:v1
  cloche push --tls-verify=false localhost:5000/app

Where an image goes is in its name; `cloche tag` gives it another. What the registry has is not sent again. An image
that was pulled, or loaded with a manifest, has the same digest there.")]
pub struct Push {
    #[command(flatten)]
    pub registry: Registry,
    /// Print nothing but the images' digests
    #[arg(short, long)]
    pub quiet: bool,
    /// Names
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

/// Only one platform's images run here; what Docker's users write for it is understood.
fn platform(text: &str) -> Result<String, String> {
    match text.to_ascii_lowercase().as_str() {
        "linux" | "amd64" | "linux/amd64" | "linux/x86_64" | "linux/x86-64" => Ok("linux/amd64".to_owned()),
        _ => Err(format!("images for {text} do not run here, only those for linux/amd64")),
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche search nginx                                 # on docker.io
  cloche search --tls-verify=false localhost:5000/app

docker.io has a search of its own; other registries, if they have none, must let their repositories be listed.")]
pub struct Search {
    #[command(flatten)]
    pub registry: Registry,
    /// Show so many at most
    #[arg(long, value_name = "NUMBER", default_value_t = 25, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub limit: u32,
    /// Do not cut long descriptions
    #[arg(long)]
    pub no_trunc: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Part of a name, after a registry's host if it is not docker.io's
    #[arg(value_name = "[HOST/]TERM")]
    pub term: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche login                                        # docker.io; asks for user and password
  echo \"$TOKEN\" | cloche login -u me --password-stdin ghcr.io")]
pub struct Login {
    #[command(flatten)]
    pub registry: Registry,
    /// User
    #[arg(short, long)]
    pub username: Option<String>,
    /// Read the password from stdin
    #[arg(long)]
    pub password_stdin: bool,
    /// Host of the registry, and port if any
    #[arg(default_value = "docker.io")]
    pub server: String,
}

#[derive(Debug, Args)]
pub struct Logout {
    /// Host of the registry, and port if any
    #[arg(default_value = "docker.io")]
    pub server: String,
}

#[derive(Debug, Subcommand)]
pub enum Image {
    /// Get images from their registries
    Pull(Pull),
    /// Put images into their registries
    Push(Push),
    /// Load images from an archive or a directory
    Load(Load),
    /// Save images to an archive or a directory
    Save(Save),
    /// Make an image of the file system in a tar archive
    Import(Import),
    /// Give an image one more name
    Tag(Tag),
    /// List images
    #[command(visible_alias = "list")]
    Ls(ImageLs),
    /// Remove images
    Rm(ImageNames),
    /// Print everything about images, as JSON
    Inspect(ImageNames),
    /// Show how an image was made
    History(History),
    /// Show what each layer adds, changes and hides, and the bytes that nobody sees
    Layers(Layers),
    /// Look whether images are what they were when they came
    #[command(after_help = "\
Every blob must have its digest, and every layer's file system must be what comes of its archive: each is read and
converted once more.")]
    Verify {
        /// Names or ids (default: all)
        images: Vec<String>,
    },
    /// Remove images that have no name, and downloads that were broken off
    Prune {
        /// Remove all that no running sandbox uses
        #[arg(short, long)]
        all: bool,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche load busybox.tar
  docker save debian | cloche load
  cloche load --name app ./oci-layout

Made by `docker save`, skopeo, umoci, buildah, podman: docker-archives and OCI layouts. All of it is loaded, or nothing.")]
pub struct Load {
    /// A tar (plain, gzip, zstd, bzip2, xz), a directory, or - for stdin
    #[arg(default_value = "-", hide_default_value = true)]
    pub file: PathBuf,
    /// The same, as Docker has it
    #[arg(short, long, value_name = "FILE", conflicts_with = "file")]
    pub input: Option<PathBuf>,
    /// Name for an image that the archive does not name
    #[arg(long)]
    pub name: Option<String>,
    /// Print nothing but the images' names
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ArchiveFormat {
    /// An OCI layout with docker save's manifest.json in it
    OciArchive,
    /// What only docker save's readers know
    DockerArchive,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche save -o debian.tar debian
  cloche save debian busybox | ssh host docker load
  cloche save --directory ./layout debian
  cloche save --format docker-archive debian | ssh old-host docker load

The archive is an OCI layout with docker save's manifest.json in it, so every tool loads it. Manifests in it are those
that the images came with. A docker-archive has layers that are not compressed, as Docker before version 25 writes them.")]
pub struct Save {
    /// Write to a file instead of stdout
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Write to a new directory instead
    #[arg(long, value_name = "DIR", conflicts_with = "output")]
    pub directory: Option<PathBuf>,
    /// Form of the archive
    #[arg(long, value_name = "FORM", default_value = "oci-archive", conflicts_with = "directory")]
    pub format: ArchiveFormat,
    /// Names or ids; a name is saved with the image
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  debootstrap bookworm ./root && tar -C ./root -c . | cloche import - debian:mine
  cloche import -c 'CMD [\"nginx\"]' -c 'ENV A=1 B=2' -c 'EXPOSE 80' root.tar.zst web

Changes: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR. SOURCE_DATE_EPOCH sets the image's time.")]
pub struct Import {
    /// Change the configuration, as an instruction of a Dockerfile does
    #[arg(short, long, value_name = "INSTRUCTION")]
    pub change: Vec<Change>,
    /// Remark for the image's history
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub message: String,
    /// A tar (plain, gzip, zstd, bzip2, xz), or - for stdin
    pub file: PathBuf,
    /// Name for the image
    pub name: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  cloche tag debian localhost:5000/debian:mine")]
pub struct Tag {
    /// Name or id
    pub image: String,
    /// The new name
    pub name: String,
}

#[derive(Debug, Args)]
pub struct ImageLs {
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct ImageNames {
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

#[derive(Debug, Args)]
pub struct History {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Do not cut long steps
    #[arg(long)]
    pub no_trunc: bool,
    /// Name or id
    pub image: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche image layers debian
  cloche image layers --html layers.html debian

ADDED and CHANGED count files of the layer, HIDDEN files of lower layers that it removes. WASTED are bytes of the layer
that upper layers change or remove: they travel and are stored, and nobody sees them.")]
pub struct Layers {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Write a picture, too, as a web page that needs nothing else
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Name or id
    pub image: String,
}

#[derive(Debug, Subcommand)]
pub enum System {
    /// Show what takes how much space
    Df {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}
