//! What can be typed, and nothing about what it does.

mod build;
mod changes;
mod images;

use std::path::PathBuf;

pub use build::*;
pub use changes::*;
pub use images::*;

use clap::{Args, Parser, Subcommand, ValueEnum};
use cloche_engine::{
    mounts::MountRequest,
    request::{Bytes, Isolation},
};

/// Run one OCI image under either isolation, a Linux container or a KVM microVM, and measure the difference.
#[derive(Debug, Parser)]
#[command(name = "cloche", version, max_term_width = 110, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Arguments {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// `cloche run` alone.
#[derive(Debug, Parser)]
#[command(name = "cloche")]
struct Starting {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: StartingVerb,
}

#[derive(Debug, Subcommand)]
enum StartingVerb {
    Run(Box<Run>),
}

impl Arguments {
    /// What was typed. Anything wrong with it is told, and ends the process.
    ///
    /// A parser of all verbs takes a good part of a millisecond to make, and `run` is in a hurry. So that one gets a
    /// parser of its own; whatever that does not take is for the whole one to take, explain or refuse.
    pub fn of_command_line() -> Self {
        if std::env::args_os().nth(1).is_some_and(|verb| verb == "run")
            && let Ok(Starting { global, verb: StartingVerb::Run(run) }) = Starting::try_parse()
        {
            return Self { global, verb: Verb::Run(run) };
        }
        Self::parse()
    }
}

const EXAMPLES: &str = "\
Examples:
  cloche pull debian:bookworm
  cloche image load busybox.tar
  cloche run busybox sh -c 'uname -r; id'                          # in a microVM, the default
  cloche run --isolation container busybox sh -c 'uname -r; id'    # in a container
  cloche build -t app .
  cloche compare busybox -- true
  cloche doctor";

#[derive(Debug, Args)]
pub struct Global {
    /// Directory of the image store [default: /var/lib/cloche, or ~/.local/share/cloche]
    #[arg(long, global = true, env = "CLOCHE_ROOT", value_name = "DIR", hide_env_values = true)]
    pub root: Option<PathBuf>,
    /// Directory of what is running [default: /run/cloche, or $XDG_RUNTIME_DIR/cloche]
    #[arg(long, global = true, env = "CLOCHE_STATE", value_name = "DIR", hide_env_values = true)]
    pub state: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a command in a new sandbox
    Run(Box<Run>),
    /// Run the same command as a bare process, in a container and in a VM, and compare
    Compare(Compare),
    /// List sandboxes
    Ps(Ps),
    /// Show what running sandboxes use
    Stats(Stats),
    /// Stop everything in sandboxes, until they are unpaused
    Pause(SandboxList),
    /// Let paused sandboxes go on
    #[command(visible_alias = "resume")]
    Unpause(SandboxList),
    /// Ask sandboxes to end, and kill those that do not
    Stop(Stop),
    /// Send sandboxes a signal
    Kill(Kill),
    /// Print the end of what a VM's guest printed on its console
    Console(ConsoleArguments),
    /// Remove sandboxes
    Rm(Rm),
    /// Make an image of a sandbox and what it has changed
    Commit(Commit),
    /// List what a sandbox has changed of its image's files
    Diff(Diff),
    /// Write a sandbox's whole root file system to a tar archive
    Export(Export),
    /// Build an image from a Dockerfile
    Build(Box<Build>),
    /// Get images from their registries
    Pull(Pull),
    /// Put images into their registries
    Push(Push),
    /// Look for images in a registry
    Search(Search),
    /// Prove to a registry who you are, for `pull` and `push`
    Login(Login),
    /// Forget who you are to a registry
    Logout(Logout),
    /// Load images from an archive or a directory
    Load(Load),
    /// Save images to an archive or a directory
    Save(Save),
    /// Make an image of the file system in a tar archive
    Import(Import),
    /// Give an image one more name
    Tag(Tag),
    /// List images
    Images(ImageLs),
    /// Remove images
    Rmi(ImageNames),
    /// Show how an image was made
    History(History),
    /// Manage images
    #[command(subcommand)]
    Image(Image),
    /// Look after what builds keep
    #[command(subcommand)]
    Builder(Builder),
    /// See to what Cloche keeps on disk
    #[command(subcommand)]
    System(System),
    /// Manage volumes
    #[command(subcommand, visible_alias = "volumes")]
    Volume(Volume),
    /// Manage guest kernels
    #[command(subcommand)]
    Kernel(Kernel),
    /// Say what this machine can run, what slows it, and what to do about it
    Doctor(Doctor),
    /// Print completions for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum IsolationName {
    /// Linux namespaces, cgroups and seccomp on this machine's kernel
    Container,
    /// A KVM microVM with a kernel of its own
    Vm,
    /// No isolation: the baseline of `compare`
    #[value(hide = true)]
    Process,
}

impl From<IsolationName> for Isolation {
    fn from(name: IsolationName) -> Self {
        match name {
            IsolationName::Container => Self::Container,
            IsolationName::Vm => Self::Vm,
            IsolationName::Process => Self::Process,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TraceFormat {
    /// For people
    Table,
    /// One line, for scripts
    Json,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche run busybox echo hi
  cloche run --isolation container -m 64m --cpus 0.5 busybox sh
  echo data | cloche run -i busybox sha256sum
  cloche run --trace busybox true

Exit status: that of the command, or 128 + N if signal N killed it; 125 if Cloche failed, 126 if the command
cannot be executed, 127 if it was not found.")]
pub struct Run {
    /// What stands between the command and this machine
    #[arg(long, env = "CLOCHE_ISOLATION", value_name = "KIND", default_value = "vm", hide_env_values = true)]
    pub isolation: IsolationName,
    /// Fail unless the running sandbox is observed to have this isolation
    #[arg(long, value_name = "KIND")]
    pub require: Option<IsolationName>,
    /// Memory limit, such as 64m or 2g
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<Bytes>,
    /// CPU limit, such as 0.5 or 2
    #[arg(long, value_name = "NUMBER", value_parser = millicpus)]
    pub cpus: Option<u64>,
    /// Limit on processes and threads
    #[arg(long, value_name = "NUMBER")]
    pub pids_limit: Option<u64>,
    /// Set an environment variable; NAME alone takes its value from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Forward stdin
    #[arg(short, long)]
    pub interactive: bool,
    /// Forget the sandbox when it ends
    #[arg(long)]
    pub rm: bool,
    /// Name of the sandbox
    #[arg(long)]
    pub name: Option<String>,
    /// Host name (default: the sandbox's id)
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Replace the image's entry point
    #[arg(long, value_name = "COMMAND")]
    pub entrypoint: Option<String>,
    /// Make the root file system read-only
    #[arg(long)]
    pub read_only: bool,
    /// Mount a file or directory of this machine, made if missing, or a volume; :ro forbids writing
    #[arg(short, long, value_name = "SOURCE:TARGET[:ro]", value_parser = MountRequest::parse_volume)]
    pub volume: Vec<MountRequest>,
    /// Mount as described: type=bind|volume|tmpfs,source=…,target=…[,readonly]
    #[arg(long, value_name = "FIELD=VALUE,…", value_parser = MountRequest::parse_mount)]
    pub mount: Vec<MountRequest>,
    /// Mount an empty file system in memory, such as /run:size=64m,mode=755
    #[arg(long, value_name = "TARGET[:OPTION,…]", value_parser = MountRequest::parse_tmpfs)]
    pub tmpfs: Vec<MountRequest>,
    /// Guest kernel to boot: a vmlinux or bzImage (default: that of `cloche kernel path`)
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// When to get the image from its registry
    #[arg(long, env = "CLOCHE_PULL", value_name = "WHEN", default_value = "missing", hide_env_values = true)]
    pub pull: PullPolicy,
    #[command(flatten)]
    pub registry: Registry,
    /// Print when each step of the start and end happened, on stderr
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub trace: Option<TraceFormat>,
    /// Name or id of the image
    pub image: String,
    /// Command and arguments (default: the image's)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// A decimal number of CPUs, in thousandths.
fn millicpus(text: &str) -> Result<u64, String> {
    match text.parse::<f64>() {
        Ok(cpus) if cpus.is_finite() && (0.0..=1e6).contains(&cpus) => Ok((cpus * 1000.0).round() as u64),
        _ => Err(format!("`{text}` is not a number of CPUs; write one such as 0.5 or 2")),
    }
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  cloche compare -n 20 busybox -- true")]
pub struct Compare {
    /// Counted runs of each isolation, after one warm-up
    #[arg(short = 'n', long, value_name = "NUMBER", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub runs: u32,
    /// What to compare
    #[arg(long, value_name = "KIND,…", value_delimiter = ',', default_value = "process,container,vm")]
    pub isolation: Vec<IsolationName>,
    /// Memory limit, such as 64m or 2g
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Guest kernel to boot
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Name or id of the image
    pub image: String,
    /// Command and arguments (default: the image's)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Ps {
    /// Show those that have ended, too
    #[arg(short, long)]
    pub all: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
CPU % is of one CPU of this machine. A VM's figures are those of its whole VMM process, its memory included. `-` is a
figure that cannot be known here; --json says why, and has all that a VM tells of its devices, vCPUs and exits.")]
pub struct Stats {
    /// Print one sample and exit
    #[arg(long)]
    pub no_stream: bool,
    /// Print JSON; without --no-stream one array a line
    #[arg(long)]
    pub json: bool,
    /// Ids, beginnings of ids, or names (default: all that run)
    #[arg(value_name = "SANDBOX")]
    pub sandboxes: Vec<String>,
}

#[derive(Debug, Args)]
pub struct SandboxList {
    /// Ids, beginnings of ids, or names
    #[arg(required = true, value_name = "SANDBOX")]
    pub sandboxes: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Stop {
    /// Seconds to wait before it is killed
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    pub time: u32,
    /// Signal to ask with (default: the image's, or TERM)
    #[arg(short, long, value_name = "SIGNAL", value_parser = signal)]
    pub signal: Option<i32>,
    /// Ids, beginnings of ids, or names
    #[arg(required = true, value_name = "SANDBOX")]
    pub sandboxes: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Kill {
    /// Name or number of the signal
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL", value_parser = signal)]
    pub signal: i32,
    /// Ids, beginnings of ids, or names
    #[arg(required = true, value_name = "SANDBOX")]
    pub sandboxes: Vec<String>,
}

/// A signal by name or number.
fn signal(text: &str) -> Result<i32, String> {
    cloche_engine::signals::by_name(text)
        .ok_or_else(|| format!("`{text}` is no signal; write one such as TERM, SIGUSR1 or 9"))
}

#[derive(Debug, Args)]
pub struct ConsoleArguments {
    /// Bytes to print at most
    #[arg(short = 'n', long, value_name = "NUMBER", default_value_t = 65536)]
    pub bytes: u32,
    /// Id, beginning of an id, or name
    pub sandbox: String,
}

#[derive(Debug, Args)]
pub struct Rm {
    /// Kill those that run
    #[arg(short, long)]
    pub force: bool,
    /// Ids, beginnings of ids, or names
    #[arg(required = true, value_name = "SANDBOX")]
    pub sandboxes: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Volume {
    /// Make volumes; one that is there already stays as it is
    Create {
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// List volumes
    #[command(visible_alias = "list")]
    Ls {
        /// Print JSON
        #[arg(long, conflicts_with = "quiet")]
        json: bool,
        /// Print names only
        #[arg(short, long)]
        quiet: bool,
    },
    /// Print everything about volumes, as JSON
    Inspect {
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove volumes with all that is in them
    Rm {
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove all volumes that no running sandbox uses
    Prune,
}

#[derive(Debug, Subcommand)]
pub enum Kernel {
    /// Build the guest kernel from Debian's kernel source, unless it is built already
    Build {
        /// `default` has CPU mitigations on; `no-mitigations` is for measuring what they cost
        #[arg(long, default_value = "default", value_parser = ["default", "no-mitigations"])]
        profile: String,
    },
    /// List the guest kernels built
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the path of the guest kernel that VMs boot
    Path,
}

#[derive(Debug, Args)]
pub struct Doctor {
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    pub json: bool,
    /// Print nothing; exit with 0 if VMs run here, with 1 if not
    #[arg(short, long)]
    pub quiet: bool,
}
