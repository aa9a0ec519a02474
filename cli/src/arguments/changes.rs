//! What can be typed about what sandboxes have changed.

use std::path::PathBuf;

use clap::Args;
use cloche_images::Change;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche run --name base -v \"$PWD:/from:ro\" debian cp -r /from /site
  cloche commit -m 'with the site' -c 'WORKDIR /site' base web:v1

The same under both isolations, while the sandbox runs and after its end, unless it was run with --rm. What is in volumes
and other mounts is not in the image. Changes: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR.
SOURCE_DATE_EPOCH sets the image's time.")]
pub struct Commit {
    /// Who made it, such as \"Jo <jo@example.org>\"
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub author: String,
    /// Remark for the image's history
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub message: String,
    /// Change the configuration, as an instruction of a Dockerfile does
    #[arg(short, long, value_name = "INSTRUCTION")]
    pub change: Vec<Change>,
    #[command(flatten)]
    pub pause: Pause,
    /// Id, beginning of an id, or name
    pub sandbox: String,
    /// Name for the image
    #[arg(value_name = "IMAGE")]
    pub name: Option<String>,
}

#[derive(Debug, Args)]
pub struct Pause {
    /// `false` lets a sandbox that runs go on while it is read
    #[arg(short, long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1,
        require_equals = true, default_missing_value = "true")]
    pub pause: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Each line is A (added), C (changed; of a directory, also what is in it) or D (deleted), and a path. What is in volumes and
other mounts is not looked at.")]
pub struct Diff {
    /// Id, beginning of an id, or name
    pub sandbox: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cloche export -o root.tar web
  cloche export web | cloche import - flat:v1

Needs root, since it mounts the image's layers. The same under both isolations, while the sandbox runs and after its end,
unless it was run with --rm. What is in volumes and other mounts is not in the archive.")]
pub struct Export {
    /// Write to a file instead of stdout
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub pause: Pause,
    /// Id, beginning of an id, or name
    pub sandbox: String,
}
