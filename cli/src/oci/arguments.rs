//! What can be typed as an OCI runtime's command line, and nothing about what it does.

mod plain;

use std::{path::PathBuf, time::Duration};

use clap::{
    ArgAction, Args, Command, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum,
    error::{ContextKind, ContextValue, ErrorKind},
};

/// Open Container Initiative runtime: runs bundles as Linux containers, or each in a virtual machine, for engines and
/// for people
#[derive(Debug, Parser)]
#[command(version = VERSION, disable_version_flag = true, max_term_width = 110, arg_required_else_help = true)]
pub struct Arguments {
    /// Print version
    #[arg(short, short_alias = 'V', long, action = ArgAction::Version)]
    version: (),
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

impl Arguments {
    /// What was typed. Anything wrong with it is told, and ends the process.
    ///
    /// Making the parser of all verbs takes longer than most of what engines ask for. So their lines are read without one
    /// ([`plain`]), and `exec`, of which they write more, gets a parser of that verb alone; whatever these do not take is
    /// for the whole one to take, explain or refuse.
    pub fn of_command_line(name: &'static str) -> Self {
        let words = || std::env::args_os().skip(1);
        let all: Option<Vec<String>> = words().map(|word| word.into_string().ok()).collect();
        all.and_then(|words| plain::parse(&words))
            .or_else(|| words().any(|word| word == "exec").then(exec_alone).flatten())
            .unwrap_or_else(|| {
                let matches = command(name).try_get_matches().unwrap_or_else(|error| leave(name, &error));
                Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
            })
    }
}

/// The arguments, if they are for `exec` and nothing is wrong with them. This parser knows the same words as the whole one
/// and fewer verbs, so it takes nothing in another sense.
fn exec_alone() -> Option<Arguments> {
    let command = Global::augment_args(Command::new("cloche"));
    let command = command.subcommand(Exec::augment_args(Command::new("exec")));
    let matches = command.try_get_matches().ok()?;
    let global = Global::from_arg_matches(&matches).ok()?;
    let exec = Exec::from_arg_matches(matches.subcommand()?.1).ok()?;
    Some(Arguments { version: (), global, verb: Verb::Exec(Box::new(exec)) })
}

/// Says what is wrong with the arguments, or the help that they ask for.
fn leave(name: &str, error: &clap::Error) -> ! {
    let asks_for_help =
        std::env::args_os().skip(1).any(|word| ["-h", "--help", "help"].iter().any(|help| word == *help));
    if error.kind() == ErrorKind::InvalidSubcommand
        && asks_for_help
        && let Some(ContextValue::String(unknown)) = error.get(ContextKind::InvalidSubcommand)
    {
        eprintln!("No help topic for '{unknown}'; {name} --help lists the commands");
        std::process::exit(2);
    }
    error.exit()
}

/// As engines read it: dockerd looks for `version` and `commit:`. The commit is that which `CLOCHE_COMMIT` named at build.
const VERSION: &str =
    concat!("version ", env!("CARGO_PKG_VERSION"), "\ncommit: ", env!("CLOCHE_COMMIT"), "\nspec: 1.3.0");

/// The command line of the runtime of this name.
fn command(name: &'static str) -> Command {
    let page = |of: &str| {
        format!(
            "{{before-help}}NAME:\n   {of} - {{about}}\n\n{{usage-heading}} {{usage}}\n\n{{all-args}}{{after-help}}"
        )
    };
    let command = Arguments::command().name(name).after_help(EXAMPLES.replace("cloche-container", name));
    let verbs: Vec<String> = command.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
    verbs.into_iter().fold(command.help_template(page(name)), |command, verb| {
        let page = page(&format!("{name} {verb}"));
        command.mut_subcommand(verb, |verb| verb.help_template(page))
    })
}

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
    /// Directory of the containers' state (default: /run and this runtime's name; in $XDG_RUNTIME_DIR for a plain user)
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// File to write log messages to; of these, only why a command failed is then on stderr, too
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Format of the log file
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Log what is done, too
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true",
        hide_default_value = true, hide_possible_values = true, value_name = "BOOL")]
    pub debug: bool,
    /// Do without cgroups that may not be made: auto, true, or false; true for whoever is not root, and false for root
    #[arg(
        long,
        value_name = "WHEN",
        default_value = "auto",
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub rootless: Rootless,
    /// Refused: cgroups are made in the cgroup file system only
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Who makes cgroups; refused but for cgroupfs
    #[arg(long, value_name = "MANAGER", default_value = "cgroupfs")]
    pub cgroup_manager: CgroupManager,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CgroupManager {
    Cgroupfs,
    Systemd,
    Disabled,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rootless {
    Auto,
    True,
    False,
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
    Start(Named),
    /// Print the state of a container
    State(Named),
    /// Send a signal to a container's first process
    Kill(Kill),
    /// Remove a container that is not running
    Delete(Delete),
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
    Pause(Named),
    /// Let a paused container go on
    Resume(Named),
    /// Change the limits of a container
    Update(Box<Update>),
    /// Print what a container uses, and when it runs out of memory, as lines of JSON
    Events {
        /// Print one report and exit
        #[arg(long)]
        stats: bool,
        /// Time between reports, such as 5s or 500ms
        #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
        interval: Duration,
        /// The container's id
        id: String,
    },
    /// Write a configuration to start from
    Spec {
        /// Directory of the bundle
        #[arg(short, long, value_name = "DIR", default_value = ".")]
        bundle: PathBuf,
        /// With a user namespace, in which the caller becomes root; a plain user also needs a cgroup to make others in
        #[arg(long)]
        rootless: bool,
    },
    /// Print what this runtime can do, as JSON
    Features,
    /// Refused: the processes of a container are not saved
    Checkpoint(Unsupported),
    /// Refused: the processes of a container are not saved
    Restore(Unsupported),
}

#[derive(Debug, Args)]
pub struct Unsupported {
    /// Whatever is asked of it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Named {
    /// The container's id
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Kill {
    /// Send it to all processes of the container
    #[arg(short, long)]
    pub all: bool,
    /// Take the id for a regular expression, and send it to all containers that it matches
    #[arg(short, long)]
    pub regex: bool,
    /// The container's id
    pub id: String,
    /// Name or number
    #[arg(default_value = DEFAULT_SIGNAL, value_parser = signal)]
    pub signal: i32,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// Kill it first if it runs, and be content if it is not there
    #[arg(short, long)]
    pub force: bool,
    /// Take the id for a regular expression, and remove all containers that it matches
    #[arg(long)]
    pub regex: bool,
    /// The container's id
    pub id: String,
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
    /// Accepted for engines that pass it: this runtime reaps what it has started, and nothing else, in any case
    #[arg(long)]
    pub no_subreaper: bool,
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

Exit status: that of the process, or 128 + N if signal N killed it; 255 if it could not be run.")]
pub struct Exec {
    /// File with the whole process, as `process` in a configuration
    #[arg(short, long, value_name = "FILE", conflicts_with_all = OF_PROCESS)]
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
    /// Cgroup below the container's to run in, of these controllers or of all
    #[arg(long, value_name = "[CONTROLLER,…:]PATH")]
    pub cgroup: Vec<String>,
    /// Do not mind if the container is paused
    #[arg(long)]
    pub ignore_paused: bool,
    /// The container's id
    pub id: String,
    /// Command and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche-container update --memory 64m --cpu-quota 50000 c1
  echo '{\"pids\": {\"limit\": 100}}' | cloche-container update --resources - c1

Sizes may have a suffix k, m, g, t; -1 is no limit.")]
pub struct Update {
    /// File with limits as `linux.resources` in a configuration, or - for stdin
    #[arg(short, long, value_name = "FILE", conflicts_with_all = LIMITS)]
    pub resources: Option<PathBuf>,
    /// Relative share of block I/O, 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    pub blkio_weight: Option<u16>,
    /// CPU period in microseconds
    #[arg(long, value_name = "TIME")]
    pub cpu_period: Option<u64>,
    /// CPU time in microseconds for each period
    #[arg(long, value_name = "TIME", allow_negative_numbers = true)]
    pub cpu_quota: Option<i64>,
    /// CPU time in microseconds that may be saved up
    #[arg(long, value_name = "TIME")]
    pub cpu_burst: Option<u64>,
    /// Relative share of CPU time
    #[arg(long, value_name = "SHARES")]
    pub cpu_share: Option<u64>,
    /// Run only where nobody else wants to: 1, or 0
    #[arg(long, value_name = "NUMBER")]
    pub cpu_idle: Option<i64>,
    /// Period of real-time scheduling in microseconds
    #[arg(long, value_name = "TIME")]
    pub cpu_rt_period: Option<u64>,
    /// Real-time scheduling in microseconds for each period
    #[arg(long, value_name = "TIME")]
    pub cpu_rt_runtime: Option<i64>,
    /// CPUs to run on, such as 0-1
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes to use
    #[arg(long, value_name = "LIST")]
    pub cpuset_mems: Option<String>,
    /// Memory
    #[arg(short, long, value_name = "SIZE", value_parser = size, allow_negative_numbers = true)]
    pub memory: Option<i64>,
    /// Memory that is reclaimed last
    #[arg(long, value_name = "SIZE", value_parser = size, allow_negative_numbers = true)]
    pub memory_reservation: Option<i64>,
    /// Memory and swap together
    #[arg(long, value_name = "SIZE", value_parser = size, allow_negative_numbers = true)]
    pub memory_swap: Option<i64>,
    /// Processes and threads
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub pids_limit: Option<i64>,
    /// The container's id
    pub id: String,
}

const DEFAULT_SIGNAL: &str = "TERM";

/// What a whole process of `exec` has of its own. Not `tty`: engines say that beside it.
const OF_PROCESS: [&str; 9] =
    ["user", "additional_gids", "cwd", "env", "cap", "no_new_privs", "apparmor", "process_label", "command"];

const LIMITS: [&str; 14] = [
    "blkio_weight",
    "cpu_period",
    "cpu_quota",
    "cpu_burst",
    "cpu_share",
    "cpu_idle",
    "cpu_rt_period",
    "cpu_rt_runtime",
    "cpuset_cpus",
    "cpuset_mems",
    "memory",
    "memory_reservation",
    "memory_swap",
    "pids_limit",
];

/// Bytes, with a suffix or without.
fn size(text: &str) -> Result<i64, String> {
    let refused = || format!("`{text}` is no size; write one such as 64m, 1g, 4096 or -1");
    let lower = text.trim().to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let (number, shift) = match lower.as_bytes().last() {
        Some(b'k') => (&lower[..lower.len() - 1], 10),
        Some(b'm') => (&lower[..lower.len() - 1], 20),
        Some(b'g') => (&lower[..lower.len() - 1], 30),
        Some(b't') => (&lower[..lower.len() - 1], 40),
        _ => (lower, 0),
    };
    let number: i64 = number.parse().map_err(|_| refused())?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes >= -1).ok_or_else(refused)
}

/// A time with its unit.
fn duration(text: &str) -> Result<Duration, String> {
    let refused = || format!("`{text}` is no time; write one such as 5s or 500ms");
    let (number, unit) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => (number, 1),
        (None, Some(number)) => (number, 1000),
        _ => return Err(refused()),
    };
    let milliseconds = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    milliseconds.filter(|time| *time > 0).map(Duration::from_millis).ok_or_else(refused)
}

/// A signal by name or number.
fn signal(text: &str) -> Result<i32, String> {
    // 0 asks only whether there is a process (kill(2)).
    let number = if text == "0" { Some(0) } else { cloche_engine::signals::by_name(text) };
    number.ok_or_else(|| format!("`{text}` is no signal; write one such as TERM, SIGUSR1 or 9"))
}
