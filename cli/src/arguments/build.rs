//! What can be typed about builds.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum};
use cloche_engine::request::Bytes;

use super::{IsolationName, PullPolicy, Registry};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BuildProgress {
    /// As plain; on a terminal, without the output of commands that succeed
    Auto,
    /// A line for each thing that happens
    Plain,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche build -t app .
  cloche build -t app:v1 -t app:latest -f docker/Dockerfile --target release .
  cloche build --isolation container --build-arg VERSION=2 -t app .
  tar -C src -c . | cloche build -t app -
  echo 'FROM busybox' | cloche build -
  cloche build --secret id=token,src=token.txt -t app .

The language is Docker's: https://docs.docker.com/reference/dockerfile. Each RUN is a sandbox of its own under the
chosen isolation; what comes out, and what is remembered of it, is the same under both. A RUN's only network
interface is `lo` for now. Steps whose result is known are not repeated; `cloche builder prune` forgets the results.

With SOURCE_DATE_EPOCH set, the same input gives the same image, digest by digest.

Not supported, and refused by name: --network=host, RUN --security=insecure and --mount=type=ssh, Git repositories,
platforms other than linux/amd64.")]
pub struct Build {
    /// What stands between the commands of RUN and this machine
    #[arg(long, env = "CLOCHE_ISOLATION", value_name = "KIND", default_value = "vm", hide_env_values = true,
        value_parser = isolation())]
    pub isolation: IsolationName,
    /// Network of RUN: `none`; `default` is the same for now
    #[arg(long, value_name = "KIND", default_value = "default", value_parser = network)]
    pub network: String,
    /// Name for the image; any number of them
    #[arg(short, long, value_name = "NAME")]
    pub tag: Vec<String>,
    /// The Dockerfile, or - for stdin [default: Dockerfile in the context]
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Stage to build, by name or number (default: the last)
    #[arg(long, value_name = "STAGE")]
    pub target: Option<String>,
    /// Value for an ARG; NAME alone takes its value from here
    #[arg(long, value_name = "NAME[=VALUE]")]
    pub build_arg: Vec<String>,
    /// Label for the image
    #[arg(long, value_name = "NAME=VALUE")]
    pub label: Vec<String>,
    /// Secret for RUN --mount=type=secret
    #[arg(long, value_name = "id=NAME[,src=FILE|,env=VARIABLE]")]
    pub secret: Vec<String>,
    /// Repeat all steps
    #[arg(long)]
    pub no_cache: bool,
    /// Repeat all steps of a stage
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    pub no_cache_filter: Vec<String>,
    /// Platform to build for: linux/amd64
    #[arg(long, value_name = "OS/ARCH")]
    pub platform: Option<String>,
    /// Memory limit of a RUN, such as 512m or 2g; in a VM 1g by default, or half of this machine's if that is less
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<Bytes>,
    /// Guest kernel for RUN in a VM
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Write the image's id to a file
    #[arg(long, value_name = "FILE")]
    pub iidfile: Option<PathBuf>,
    /// Print nothing but the image's id
    #[arg(short, long)]
    pub quiet: bool,
    /// How to show what happens, on stderr
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub progress: BuildProgress,
    /// Ask the registries for newer base images; --pull=WHEN says when to [default: missing]
    #[arg(long, env = "CLOCHE_PULL", value_name = "WHEN", default_value = "missing", hide_env_values = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "always", hide_default_value = true)]
    pub pull: PullPolicy,
    #[command(flatten)]
    pub registry: Registry,
    /// Directory, archive (plain, gzip, zstd, bzip2, xz), or - for an archive or a Dockerfile on stdin
    #[arg(value_name = "CONTEXT")]
    pub context: PathBuf,
}

/// A step's changes are read from its sandbox, so there must be one.
fn isolation() -> impl TypedValueParser<Value = IsolationName> {
    PossibleValuesParser::new(["container", "vm"]).map(|name| match name.as_str() {
        "container" => IsolationName::Container,
        _ => IsolationName::Vm,
    })
}

/// What every sandbox has is `lo` alone, and so both are the same.
fn network(text: &str) -> Result<String, String> {
    match text {
        "none" | "default" => Ok(text.to_owned()),
        "host" => Err("a step has a network of its own under either isolation; write none or default".into()),
        _ => Err("only none and default are supported".into()),
    }
}

#[derive(Debug, Subcommand)]
pub enum Builder {
    /// Forget the results of all steps, and empty the caches of RUN --mount=type=cache
    Prune,
}
