//! What can be typed as an OCI runtime's command line, and nothing about what it does.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// An OCI runtime: runs bundles as Linux containers, for engines and for people.
#[derive(Debug, Parser)]
#[command(name = super::NAME, version = VERSION, max_term_width = 110, after_help = EXAMPLES,
    arg_required_else_help = true)]
pub struct Arguments {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\nspec: 1.2.0");

const EXAMPLES: &str = "\
Examples:
  cloche-container spec                               # writes a config.json; put files into ./rootfs
  cloche-container run hello                          # the bundle in this directory, in the foreground
  cloche-container create --bundle /b c1 && cloche-container start c1
  cloche-container exec -t c1 sh; cloche-container kill c1 TERM; cloche-container delete c1
  podman --runtime $(command -v cloche-container) run busybox true
  ctr run --runc-binary cloche-container docker.io/library/busybox:latest c1

It is `cloche` by another name: ln -s cloche cloche-container";

#[derive(Debug, Args)]
pub struct Global {
    /// Directory of the containers' state (default: /run/cloche-container, or in $XDG_RUNTIME_DIR for a plain user)
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// File to write log messages to, besides stderr
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Format of the log file
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Log what is done, too
    #[arg(long)]
    pub debug: bool,
    /// Refused: cgroups are made in the cgroup file system only
    #[arg(long)]
    pub systemd_cgroup: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create a container, which then waits to be started
    Create(Create),
    /// Start a container that was created
    Start {
        /// The container's id
        id: String,
    },
    /// Print the state of a container
    State {
        /// The container's id
        id: String,
    },
    /// Send a signal to a container's first process
    Kill {
        /// Send it to all processes of the container
        #[arg(short, long)]
        all: bool,
        /// The container's id
        id: String,
        /// Name or number
        #[arg(default_value = "TERM", value_parser = signal)]
        signal: i32,
    },
    /// Remove a container that is not running
    Delete {
        /// Kill it first if it runs, and be content if it is not there
        #[arg(short, long)]
        force: bool,
        /// The container's id
        id: String,
    },
    /// Create and start a container, and wait for its end
    Run(Run),
    /// Run a further process in a container
    Exec(Box<Exec>),
    /// List containers
    List {
        /// Output format
        #[arg(short, long, default_value = "table")]
        format: Format,
        /// Print ids only
        #[arg(short, long)]
        quiet: bool,
    },
    /// List the processes of a container, as ps(1) prints them
    Ps {
        /// Output format: ps's table, or the process ids as JSON
        #[arg(short, long, default_value = "table")]
        format: Format,
        /// The container's id
        id: String,
        /// Options for ps (default: -ef)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Stop all processes of a container until it is resumed
    Pause {
        /// The container's id
        id: String,
    },
    /// Let a paused container go on
    Resume {
        /// The container's id
        id: String,
    },
}

#[derive(Debug, Args)]
pub struct Create {
    /// Directory of the bundle
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// Name of the configuration in the bundle
    #[arg(short = 'f', long, value_name = "FILE", default_value = "config.json")]
    pub config: PathBuf,
    /// File to write the id of the container's process to
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Unix socket to send the container's terminal to
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Number of open descriptors from 3 up that the container's process gets
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub preserve_fds: u32,
    /// Accepted for engines that pass it: the root is left by pivot_root wherever the kernel can, which is everywhere but
    /// in an initial ramfs
    #[arg(long)]
    pub no_pivot: bool,
    /// Leave the caller's session keyring to the container
    #[arg(long)]
    pub no_new_keyring: bool,
    /// The container's id, which must not be taken
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub create: Create,
    /// Leave it running
    #[arg(short, long)]
    pub detach: bool,
    /// Keep the container's state when it has ended
    #[arg(long)]
    pub keep: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche-container exec c1 ps
  cloche-container exec -t --env TERM=xterm --user 1000:1000 c1 sh
  cloche-container exec --process process.json --detach --pid-file pid c1

Exit status: that of the process, or 128 + N if signal N killed it; 255 if it could not be run, 126 if it cannot be
executed, 127 if it was not found.")]
pub struct Exec {
    /// File with the whole process, as `process` in a configuration
    #[arg(short, long, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Give it a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// User, by numbers
    #[arg(short, long, value_name = "UID[:GID]")]
    pub user: Option<String>,
    /// Further groups
    #[arg(short = 'g', long, value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// Further environment variable
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Further capability
    #[arg(short, long, value_name = "CAPABILITY")]
    pub cap: Vec<String>,
    /// Do not let it gain privileges
    #[arg(long)]
    pub no_new_privs: bool,
    /// AppArmor profile
    #[arg(long, value_name = "PROFILE")]
    pub apparmor: Option<String>,
    /// SELinux label
    #[arg(long, value_name = "LABEL")]
    pub process_label: Option<String>,
    /// Leave it running
    #[arg(short, long)]
    pub detach: bool,
    /// File to write the id of the process to
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Unix socket to send its terminal to
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Number of open descriptors from 3 up that it gets
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub preserve_fds: u32,
    /// Cgroup below the container's to run in
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<String>,
    /// Do not mind if the container is paused
    #[arg(long)]
    pub ignore_paused: bool,
    /// The container's id
    pub id: String,
    /// Command and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// A signal by name or number.
fn signal(text: &str) -> Result<i32, String> {
    cloche_engine::signals::by_name(text)
        .ok_or_else(|| format!("`{text}` is no signal; write one such as TERM, SIGUSR1 or 9"))
}
