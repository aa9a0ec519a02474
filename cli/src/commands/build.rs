//! `cloche build` and `cloche builder`.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fs::{self, File},
    io::{self, IsTerminal, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use anyhow::Context;
use cloche_build::{Ended, Input, Observer, Request, Secret, Source};
use cloche_images::{Reference, registry::RegistryOptions};

use super::{
    home, reconciled,
    registry::{options, pull_for_run},
};
use crate::{
    arguments::{Build, BuildProgress, Builder, Global, PullPolicy},
    output, render,
};

/// Bytes of a step's output that are kept until it is known whether they are of interest.
const MAX_KEPT: usize = 256 << 10;

/// Builds an image.
pub fn build(global: &Global, arguments: Build) -> anyhow::Result<ExitCode> {
    let home = home(global)?;
    reconciled(&home)?;
    let names = arguments.tag.iter().map(|name| tag(name)).collect::<anyhow::Result<Vec<_>>>()?;
    let show = match (arguments.quiet, arguments.progress) {
        (true, _) => Show::Nothing,
        (false, BuildProgress::Plain) => Show::Everything,
        (false, BuildProgress::Auto) if io::stderr().is_terminal() => Show::Failures,
        (false, BuildProgress::Auto) => Show::Everything,
    };
    let observer = Printer {
        global,
        pull: arguments.pull,
        registry: options(&arguments.registry)?,
        show,
        steps: Mutex::default(),
        pulled: Mutex::default(),
    };
    let request = Request {
        isolation: arguments.isolation.into(),
        input: input(&arguments.context, arguments.file)?,
        target: arguments.target,
        platform: arguments.platform,
        arguments: arguments.build_arg.into_iter().filter_map(argument).collect(),
        labels: arguments.label.iter().map(|label| pair(label)).collect(),
        names,
        secrets: arguments.secret.iter().map(|text| secret(text)).collect::<anyhow::Result<_>>()?,
        no_cache: arguments.no_cache,
        no_cache_stages: arguments.no_cache_filter.iter().map(|name| name.to_ascii_lowercase()).collect(),
        memory_bytes: arguments.memory.map(|bytes| bytes.0),
        kernel: arguments.kernel,
        program: std::env::current_exe().context("cannot find this program, which runs the steps")?,
        home,
    };
    let built = match cloche_build::build(&request, &observer) {
        Ok(built) => built,
        Err(failure) => {
            // As `docker build`: whatever a step's command exits with, the build's own code is 1.
            eprintln!("cloche: {:#}", anyhow::Error::new(failure));
            return Ok(ExitCode::FAILURE);
        }
    };
    if let Some(path) = &arguments.iidfile {
        fs::write(path, built.id.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{}", built.id);
    Ok(ExitCode::SUCCESS)
}

fn tag(name: &str) -> anyhow::Result<Reference> {
    let reference: Reference = name.parse()?;
    anyhow::ensure!(reference.digest().is_none(), "{name} has a digest; a name that is given has a tag");
    Ok(reference)
}

/// Where the context and the Dockerfile are.
fn input(context: &Path, file: Option<PathBuf>) -> anyhow::Result<Input> {
    let is_stdin = |path: &Path| path.as_os_str() == "-";
    let from_stdin = file.as_deref().is_some_and(is_stdin);
    anyhow::ensure!(
        !(from_stdin && is_stdin(context)),
        "stdin can be the context or the Dockerfile, not both; name a file for one of them"
    );
    if is_stdin(context) {
        anyhow::ensure!(
            !io::stdin().is_terminal(),
            "stdin is a terminal; pipe an archive or a Dockerfile into it"
        );
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned().context("cannot read stdin")?);
        return Ok(Input { source: Source::Stream(stdin), file, text: None });
    }
    let text = match from_stdin {
        true => Some(io::read_to_string(io::stdin()).context("cannot read the Dockerfile from stdin")?),
        false => None,
    };
    let file = file.filter(|_| !from_stdin);
    if context.is_file() {
        let archive = File::open(context).with_context(|| format!("cannot open {}", context.display()))?;
        return Ok(Input { source: Source::Stream(archive), file, text });
    }
    Ok(Input { source: Source::Directory(context.to_owned()), file, text })
}

/// As Docker: a name without a value takes that which is set here.
fn argument(text: String) -> Option<(String, String)> {
    match text.split_once('=') {
        Some((name, value)) => Some((name.to_owned(), value.to_owned())),
        None => std::env::var(&text).ok().map(|value| (text, value)),
    }
}

fn pair(text: &str) -> (String, String) {
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    (name.to_owned(), value.to_owned())
}

/// `id=NAME[,src=FILE|,env=VARIABLE]`.
fn secret(text: &str) -> anyhow::Result<(String, Secret)> {
    let mut fields: BTreeMap<&str, &str> = BTreeMap::new();
    for field in text.split(',') {
        let (name, value) = field.split_once('=').unwrap_or((field, ""));
        let name = match name {
            "source" => "src",
            "id" | "src" | "env" | "type" => name,
            other => anyhow::bail!("--secret has no field {other}; it has id, src and env"),
        };
        fields.insert(name, value);
    }
    let id = fields.get("id").filter(|id| !id.is_empty()).context("--secret needs id=NAME")?;
    let kind = fields.get("type").copied();
    let secret = match (fields.get("src"), fields.get("env"), kind) {
        (Some(path), None, None | Some("file")) => Secret::File(path.into()),
        (Some(name), None, Some("env")) | (None, Some(name), None | Some("env")) => variable(name)?,
        // As Docker: a variable of that name, or else a file.
        (None, None, None) => match std::env::var(id) {
            Ok(value) => Secret::Value(value.into_bytes()),
            Err(_) => Secret::File(id.into()),
        },
        _ => anyhow::bail!("--secret {text}: give either src=FILE or env=VARIABLE"),
    };
    Ok(((*id).to_owned(), secret))
}

fn variable(name: &str) -> anyhow::Result<Secret> {
    let value =
        std::env::var(name).with_context(|| format!("cannot take a secret from the variable {name}"))?;
    Ok(Secret::Value(value.into_bytes()))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Show {
    Nothing,
    /// Commands' output of steps that fail.
    Failures,
    Everything,
}

/// Prints what goes on, on stderr.
struct Printer<'a> {
    global: &'a Global,
    pull: PullPolicy,
    registry: RegistryOptions,
    show: Show,
    steps: Mutex<HashMap<usize, Running>>,
    /// Images that were asked for in their registries.
    pulled: Mutex<Vec<String>>,
}

struct Running {
    since: Instant,
    kept: Kept,
}

/// The last of a step's output: that is where it says why it failed.
#[derive(Default)]
struct Kept {
    lines: VecDeque<String>,
    bytes: usize,
    /// Lines that are not here any more.
    dropped: usize,
}

impl Kept {
    fn push(&mut self, line: &str) {
        self.bytes += line.len() + 1;
        self.lines.push_back(line.to_owned());
        while self.bytes > MAX_KEPT
            && let Some(first) = self.lines.pop_front()
        {
            self.bytes -= first.len() + 1;
            self.dropped += 1;
        }
    }

    /// What there is to show.
    fn shown(&self) -> impl Iterator<Item = String> {
        let note = (self.dropped > 0).then(|| {
            format!("({} lines before these are not shown; --progress=plain shows all)", self.dropped)
        });
        note.into_iter().chain(self.lines.iter().map(|line| output::tame(line, &['\t']).to_string()))
    }
}

impl Printer<'_> {
    fn say(&self, step: usize, text: &str) {
        if self.show != Show::Nothing {
            // One write a line, so that steps at once do not mix.
            let _ = io::stderr().write_all(format!("#{step} {}\n", output::tame(text, &['\t'])).as_bytes());
        }
    }

    fn steps(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Running>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Printer<'_> {
    fn started(&self, step: usize, title: &str) {
        self.steps().insert(step, Running { since: Instant::now(), kept: Kept::default() });
        let first = title.lines().next().unwrap_or_default();
        self.say(step, first);
    }

    fn output(&self, step: usize, line: &[u8]) {
        let line = String::from_utf8_lossy(line);
        if self.show == Show::Everything {
            let seconds =
                self.steps().get(&step).map_or(0.0, |running| running.since.elapsed().as_secs_f64());
            self.say(step, &format!("{seconds:.3} {line}"));
            return;
        }
        if let Some(running) = self.steps().get_mut(&step) {
            running.kept.push(&line);
        }
    }

    fn ended(&self, step: usize, how: Ended) {
        let Some(running) = self.steps().remove(&step) else { return };
        let seconds = running.since.elapsed().as_secs_f64();
        match how {
            Ended::Cached => self.say(step, "CACHED"),
            Ended::Done => self.say(step, &format!("DONE {seconds:.1}s")),
            Ended::Failed => {
                for line in running.kept.shown() {
                    match self.show {
                        Show::Nothing => eprintln!("{line}"),
                        _ => self.say(step, &line),
                    }
                }
                self.say(step, "FAILED");
            }
        }
    }

    fn warn(&self, text: &str) {
        if self.show != Show::Nothing {
            eprintln!("cloche: {text}");
        }
    }

    fn image(&self, name: &str, is_missing: bool) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let wanted = match self.pull {
            PullPolicy::Never => false,
            PullPolicy::Missing => is_missing,
            PullPolicy::Always => !is_missing,
        };
        // Stages wait for each other here, so that none is pulled twice.
        let mut pulled = self.pulled.lock().unwrap_or_else(PoisonError::into_inner);
        if !wanted || pulled.iter().any(|known| known == name) {
            return Ok(());
        }
        pull_for_run(self.global, name, &self.registry)
            .map_err(Box::<dyn std::error::Error + Send + Sync>::from)?;
        pulled.push(name.to_owned());
        Ok(())
    }
}

/// Looks after what builds keep.
pub fn builder(global: &Global, verb: &Builder) -> anyhow::Result<ExitCode> {
    match verb {
        Builder::Prune => {
            let home = home(global)?;
            let steps = super::image::store(global)?.prune_steps()?;
            let caches = cloche_build::prune_cache_mounts(&home).context("cannot remove caches of RUN")?;
            println!("Deleted: {} steps, {} caches of RUN", steps.steps, caches.count);
            println!("Freed: {}", render::bytes(steps.bytes + caches.bytes));
            Ok(ExitCode::SUCCESS)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_of_a_steps_output_is_kept() {
        let mut kept = Kept::default();
        let lines = MAX_KEPT / 100 + 7;
        for number in 0..lines {
            kept.push(&format!("{number:099}"));
        }
        kept.push("why\x1b[2J");
        assert!(kept.bytes <= MAX_KEPT);
        let shown: Vec<String> = kept.shown().collect();
        assert!(shown.first().unwrap().starts_with("(7 lines before"), "{:?}", shown.first());
        assert!(shown.last().unwrap().starts_with("why") && !shown.last().unwrap().contains('\x1b'));
        assert_eq!(shown.len(), lines + 1 - 7 + 1);
    }
}
