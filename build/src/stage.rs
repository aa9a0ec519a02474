//! One stage: its instructions, one after the other.

use std::collections::BTreeMap;
use std::io::{self, Seek};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cloche_images::{
    Bounded, BuildError, CachedStep, Digest, FileKind, Image, LayerWriter, Reference, ResolveError, Store,
    StoreError, StoredLayer, View, ports, timestamp,
};
use serde_json::{Value, json};

use crate::config::Config;
use crate::dockerfile::{
    Dockerfile, Heredoc, Instruction, Place, Step, SyntaxError, Transfer, TransferSource, words,
};
use crate::draft::{Draft, digest_of};
use crate::key::Key;
use crate::patterns::{Ignore, PatternError};
use crate::plan::{Build, From};
use crate::transfer::{How, Source, TransferError, absolute, base_name, transfer};
use crate::tree::Tree;
use crate::{BuildFailure, Ended, owner, time};

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// It cannot be done as it stands there.
    #[error("{0}")]
    Text(String),
    /// The command of a RUN failed.
    #[error("`{command}` exited with code {code}")]
    Run {
        /// What was run.
        command: String,
        /// How it ended, as a shell has it.
        code: u8,
    },
    /// The sandbox of a RUN failed.
    #[error("the sandbox could not run it: {0}")]
    Sandbox(String),
    /// A trigger of the base image is malformed.
    #[error("the base image has a trigger (ONBUILD) that cannot be carried out")]
    Trigger(#[source] Box<SyntaxError>),
    /// Something cannot be copied.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// A pattern is none.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// A file cannot be downloaded.
    #[error("cannot add it")]
    Fetch(#[from] cloche_images::registry::FetchError),
    /// There is no such image.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The image cannot be had from its registry.
    #[error("cannot get the image {0}")]
    Pull(String, #[source] Box<dyn std::error::Error + Send + Sync>),
    /// The store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No layer can be made of it.
    #[error(transparent)]
    Layer(#[from] BuildError),
    /// A file cannot be read or written.
    #[error("{0}")]
    Io(String, #[source] io::Error),
    /// Another stage failed.
    #[error("it was given up, because another stage failed")]
    GivenUp,
}

impl StepError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> StepError {
        let what = what.into();
        move |source| StepError::Io(what, source)
    }
}

/// Arguments that need no ARG, and change no key: how to reach a proxy is not what is built.
const PREDEFINED: [&str; 5] = ["HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"];

/// Whether an argument may be given without an ARG.
pub(crate) fn is_predefined(name: &str) -> bool {
    PREDEFINED
        .iter()
        .any(|known| known.eq_ignore_ascii_case(name) && (name == *known || name.to_lowercase() == name))
}

/// A stage that is done.
#[derive(Debug, Clone)]
pub(crate) struct Finished {
    pub(crate) layers: Vec<StoredLayer>,
    key: Digest,
    config: Config,
    history: Vec<Value>,
    created: String,
    /// ARGs in force, which a stage on top of this one has, too.
    arguments: BTreeMap<String, String>,
}

impl Finished {
    pub(crate) fn commit(
        &self,
        store: &Store,
        names: &[Reference],
        labels: &[(String, String)],
    ) -> Result<Digest, BuildError> {
        let mut config = self.config.clone();
        for (name, value) in labels {
            config.set_label(name, value);
        }
        let layers: Vec<String> = self.layers.iter().map(|layer| layer.diff_id().to_string()).collect();
        let bytes = config.finish(&layers, &self.history, &self.created);
        store.put_image(&bytes, &self.layers, names)
    }
}

/// A stage at work.
pub(crate) struct Stage<'a, 'b> {
    pub(crate) build: &'a Build<'b>,
    index: usize,
    pub(crate) done: Finished,
    view: Option<Arc<View>>,
    uses_cache: bool,
    /// Of the instruction at hand.
    pub(crate) step: usize,
}

/// Carries out a stage.
pub(crate) fn run_stage(build: &Build<'_>, index: usize, base: &str) -> Result<Finished, BuildFailure> {
    let Some(stage) = build.file.stages.get(index) else { return Err(BuildFailure::GivenUp) };
    let name = match &stage.name {
        Some(name) => name.clone(),
        None => format!("stage-{index}"),
    };
    let uses_cache = !build.request.no_cache && !build.request.no_cache_stages.contains(&name);
    let number = build.next_step.fetch_add(1, Ordering::Relaxed);
    let count = stage.steps.len() + 1;
    build.observer.started(number, &format!("[{name} 1/{count}] FROM {base}"));
    let begun = begin(build, index, base);
    build.observer.ended(number, if begun.is_ok() { Ended::Done } else { Ended::Failed });
    let failed = |place: &Place| {
        let place = place.clone();
        move |source| BuildFailure::Step { place, source: Box::new(source) }
    };
    let done = begun.map_err(failed(&stage.place))?;
    let mut at_work = Stage { build, index, done, view: None, uses_cache, step: number };
    for text in at_work.done.config.take_triggers() {
        let trigger = Dockerfile::parse_trigger(&text);
        let trigger =
            trigger.map_err(|error| StepError::Trigger(Box::new(error))).map_err(failed(&stage.place))?;
        at_work.carry_out(&trigger, &format!("[{name} trigger] ")).map_err(failed(&stage.place))?;
    }
    for (index, step) in stage.steps.iter().enumerate() {
        at_work.carry_out(step, &format!("[{name} {}/{count}] ", index + 2)).map_err(failed(&step.place))?;
    }
    Ok(at_work.done)
}

fn begin(build: &Build<'_>, index: usize, base: &str) -> Result<Finished, StepError> {
    if base == "scratch" {
        let created = timestamp(build.epoch.unwrap_or(0));
        return Ok(Finished {
            layers: Vec::new(),
            key: Key::new("scratch", None).digest(),
            config: Config::scratch(),
            history: Vec::new(),
            created,
            arguments: BTreeMap::new(),
        });
    }
    if base.parse::<usize>().is_err()
        && let From::Stage(stage) = build.from(base, index)
    {
        let mut done = (*build.wait_for(stage)?).clone();
        done.config.begin_stage();
        return Ok(done);
    }
    let image = image(build, base)?;
    let config = Config::of(image.raw_config())
        .ok_or_else(|| StepError::Text(format!("the configuration of {base} is no object")))?;
    let mut key = Key::new("image", None);
    key.bytes(image.id.as_bytes());
    Ok(Finished {
        layers: build.store.layers_under(&image)?,
        key: key.digest(),
        history: config.history(),
        created: config.created().unwrap_or_else(|| timestamp(0)),
        config,
        arguments: BTreeMap::new(),
    })
}

fn image(build: &Build<'_>, name: &str) -> Result<Image, StepError> {
    let get = |is_missing| {
        build.observer.image(name, is_missing).map_err(|error| StepError::Pull(name.to_owned(), error))
    };
    get(false)?;
    match build.store.resolve(name) {
        Err(ResolveError::NotFound(_)) => {
            get(true)?;
            Ok(build.store.resolve(name)?)
        }
        result => Ok(result?),
    }
}

impl Stage<'_, '_> {
    fn carry_out(&mut self, step: &Step, prefix: &str) -> Result<(), StepError> {
        self.build.go_on()?;
        self.step = self.build.next_step.fetch_add(1, Ordering::Relaxed);
        // The text of heredocs is not part of the title.
        self.build.observer.started(self.step, &format!("{prefix}{}", step.written));
        let how = self.apply(step);
        self.build.observer.ended(
            self.step,
            match &how {
                Ok(true) => Ended::Cached,
                Ok(false) => Ended::Done,
                Err(_) => Ended::Failed,
            },
        );
        how.map(|_| ())
    }

    /// Carries out an instruction; tells whether its result was known.
    fn apply(&mut self, step: &Step) -> Result<bool, StepError> {
        match &step.instruction {
            Instruction::Transfer(transfer) => self.transfer(transfer, &step.written),
            Instruction::Run { flags, command, heredocs } => {
                crate::sandbox::run(self, flags, command, heredocs)
            }
            Instruction::Workdir(path) => self.workdir(path),
            _ => {
                let written = self.change_config(step)?;
                let mut key = Key::new("configuration", Some(self.done.key));
                key.text(&written);
                self.finish_step(&key, &written, |_| Ok(None))
            }
        }
    }

    /// A variable's value: ENV goes before ARG.
    pub(crate) fn variable(&self, name: &str) -> Option<String> {
        self.done.config.variable(name).or_else(|| self.done.arguments.get(name).cloned())
    }

    pub(crate) fn done_config(&self) -> Config {
        self.done.config.clone()
    }

    /// ARGs in force.
    pub(crate) fn arguments(&self) -> &BTreeMap<String, String> {
        &self.done.arguments
    }

    pub(crate) fn expand(&self, text: &str) -> Result<String, StepError> {
        let lookup = |name: &str| self.variable(name);
        words::expand(text, self.build.file.escape, &lookup).map_err(StepError::Text)
    }

    /// Changes the configuration, and tells what has changed, as the history has it.
    fn change_config(&mut self, step: &Step) -> Result<String, StepError> {
        let expand_pairs = |pairs: &[(String, String)]| {
            let expand = |(name, value): &(String, String)| Ok((self.expand(name)?, self.expand(value)?));
            pairs.iter().map(expand).collect::<Result<Vec<_>, StepError>>()
        };
        let shown = |pairs: &[(String, String)]| {
            pairs.iter().map(|(name, value)| format!(" {name}={value}")).collect::<String>()
        };
        let as_json = |words: &[String]| json!(words).to_string();
        Ok(match &step.instruction {
            Instruction::Env(pairs) => {
                let pairs = expand_pairs(pairs)?;
                pairs.iter().for_each(|(name, value)| self.done.config.set_env(name, value));
                format!("ENV{}", shown(&pairs))
            }
            Instruction::Label(pairs) => {
                let pairs = expand_pairs(pairs)?;
                pairs.iter().for_each(|(name, value)| self.done.config.set_label(name, value));
                format!("LABEL{}", shown(&pairs))
            }
            Instruction::Arg(pairs) => self.declare(pairs)?,
            Instruction::Cmd(command) => {
                self.done.config.set_command(command);
                format!("CMD {}", as_json(&self.done.config.words(command)))
            }
            Instruction::Entrypoint(command) => {
                self.done.config.set_entrypoint(command);
                format!("ENTRYPOINT {}", as_json(&self.done.config.words(command)))
            }
            Instruction::Shell(words) => {
                self.done.config.set_shell(words);
                format!("SHELL {}", as_json(words))
            }
            Instruction::User(user) => {
                let user = self.expand(user)?;
                if user.trim().is_empty() {
                    return Err(StepError::Text("USER has no value here".into()));
                }
                self.done.config.set_user(&user);
                format!("USER {user}")
            }
            Instruction::Expose(text) => {
                let lookup = |name: &str| self.variable(name);
                let words =
                    words::expand_words(text, self.build.file.escape, &lookup).map_err(StepError::Text)?;
                let mut all = Vec::new();
                for word in &words {
                    let bad = || format!("{word:?} is no port; write 80, 80/udp or 8000-8010/tcp");
                    all.extend(ports(word).ok_or_else(|| StepError::Text(bad()))?);
                }
                self.done.config.expose(all);
                format!("EXPOSE {}", words.join(" "))
            }
            Instruction::Volume(paths) => {
                let paths = paths.iter().map(|path| self.expand(path)).collect::<Result<Vec<_>, _>>()?;
                self.done.config.add_volumes(paths.clone());
                format!("VOLUME {}", as_json(&paths))
            }
            Instruction::StopSignal(signal) => {
                let signal = self.expand(signal)?;
                if cloche_engine::signals::by_name(&signal).is_none() {
                    return Err(StepError::Text(format!("{signal:?} is no signal; write SIGTERM or 15")));
                }
                self.done.config.set_stop_signal(&signal);
                format!("STOPSIGNAL {signal}")
            }
            Instruction::HealthCheck(check) => {
                self.done.config.set_health_check(check);
                step.written.clone()
            }
            Instruction::OnBuild(text) => {
                self.done.config.add_trigger(text);
                format!("ONBUILD {text}")
            }
            Instruction::Maintainer(name) => {
                self.done.config.set_author(name);
                format!("MAINTAINER {name}")
            }
            Instruction::From { .. }
            | Instruction::Run { .. }
            | Instruction::Transfer(_)
            | Instruction::Workdir(_) => String::new(),
        })
    }

    /// `ARG`
    fn declare(&mut self, pairs: &[(String, Option<String>)]) -> Result<String, StepError> {
        let mut shown = "ARG".to_owned();
        for (name, default) in pairs {
            self.build.used.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(name.clone());
            let value = match (self.build.request.arguments.get(name), default) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => Some(self.expand(default)?),
                (None, None) => self.build.global.get(name).cloned(),
            };
            shown.push_str(&format!(" {name}"));
            if let Some(value) = value {
                shown.push_str(&format!("={value}"));
                self.done.arguments.insert(name.clone(), value);
            }
        }
        Ok(shown)
    }

    /// What the layers so far hold.
    pub(crate) fn view(&mut self) -> Result<Arc<View>, StepError> {
        if let Some(view) = &self.view {
            return Ok(Arc::clone(view));
        }
        let view = Arc::new(self.build.store.view(&self.done.layers)?);
        self.view = Some(Arc::clone(&view));
        Ok(view)
    }

    /// The key of a step that makes files.
    pub(crate) fn key(&self, kind: &str) -> Key {
        let mut key = Key::new(kind, Some(self.done.key));
        if let Some(epoch) = self.build.epoch {
            key.text(&format!("epoch {epoch}"));
        }
        key
    }

    /// The time of files that come to be now, and the latest that any may have.
    pub(crate) fn times(&self) -> (i64, Option<i64>) {
        let epoch = self.build.epoch.map(|epoch| epoch as i64);
        (epoch.unwrap_or_else(|| time::now() as i64), epoch)
    }

    /// Takes a step's result if it is known, or makes it; tells which.
    pub(crate) fn finish_step(
        &mut self,
        key: &Key,
        written: &str,
        make: impl FnOnce(&mut Self) -> Result<Option<StoredLayer>, StepError>,
    ) -> Result<bool, StepError> {
        let key = key.digest();
        let known = self.uses_cache.then(|| self.build.store.cached_step(key)).flatten();
        let is_known = known.is_some();
        let step = match known {
            Some(step) => step,
            None => {
                let layer = make(self)?;
                let step = CachedStep { created: time::now(), layer };
                self.build.store.cache_step(key, &step)?;
                step
            }
        };
        let created = timestamp(self.build.epoch.unwrap_or(step.created));
        let mut entry = json!({"created": created, "created_by": written, "comment": "cloche build"});
        match step.layer {
            Some(layer) => {
                self.done.layers.push(layer);
                self.view = None;
            }
            None => {
                if let Some(entry) = entry.as_object_mut() {
                    entry.insert("empty_layer".into(), json!(true));
                }
            }
        }
        self.done.history.push(entry);
        self.done.created = created;
        self.done.key = key;
        Ok(is_known)
    }

    /// Writes a draft as a layer.
    fn write(&self, draft: Draft<'_>) -> Result<StoredLayer, StepError> {
        let (_, latest) = self.times();
        let mut writer: LayerWriter = self.build.store.write_layer()?;
        draft.write(&mut writer, latest)?;
        Ok(self.build.store.add_layer(writer)?)
    }

    /// `WORKDIR`, which makes the directory.
    fn workdir(&mut self, path: &str) -> Result<bool, StepError> {
        let path = self.expand(path)?;
        if path.is_empty() {
            return Err(StepError::Text("WORKDIR has no value here".into()));
        }
        let path = absolute(&self.done.config.workdir(), &path);
        let path = if path == "/" { path } else { path.trim_end_matches('/').to_owned() };
        self.done.config.set_workdir(&path);
        let view = self.view()?;
        let owner = match self.done.config.user() {
            Some(user) => owner::owner(&view, &user).map_err(StepError::Text)?,
            None => (0, 0),
        };
        let (now, _) = self.times();
        let how = How { owner: Some(owner), mode: None, exclude: Ignore::default(), parents: false, now };
        let mut draft = Draft::new(&view, false);
        let failed = |source| StepError::Io(format!("cannot make the directory {path}"), source);
        let resolved = draft.resolve(path.as_bytes()).map_err(failed)?;
        draft.make_directories(&resolved, &how.parent()).map_err(failed)?;
        let mut key = self.key("workdir");
        key.text(&path);
        draft.describe(&mut key).map_err(failed)?;
        self.finish_step(&key, &format!("WORKDIR {path}"), |stage| match draft.is_empty() {
            true => Ok(None),
            false => stage.write(draft).map(Some),
        })
    }

    /// A stage's or an image's files, for `--from`.
    pub(crate) fn tree_of(&self, name: &str) -> Result<Arc<Tree>, StepError> {
        let layers = match self.build.from(name, self.index) {
            From::Stage(stage) => self.build.wait_for(stage)?.layers.clone(),
            From::Image(name) if name == "scratch" => Vec::new(),
            From::Image(name) => self.build.store.layers_under(&image(self.build, &name)?)?,
        };
        Ok(Arc::new(Tree::Layers(self.build.store.view(&layers)?)))
    }

    /// `COPY` and `ADD`
    fn transfer(&mut self, asked: &Transfer, written: &str) -> Result<bool, StepError> {
        let view = self.view()?;
        let (now, _) = self.times();
        let chown = asked.chown.as_deref().map(|text| self.expand(text)).transpose()?;
        let owner = chown.map(|text| owner::owner(&view, &text).map_err(StepError::Text)).transpose()?;
        let chmod = asked.chmod.as_deref().map(|text| self.expand(text)).transpose()?;
        let mode = chmod.map(|text| owner::mode(&text).map_err(StepError::Text)).transpose()?;
        let exclude = asked.exclude.iter().map(|text| self.expand(text)).collect::<Result<Vec<_>, _>>()?;
        let exclude = Ignore::of(exclude.iter().map(String::as_str))?;
        let how = How { owner, mode, exclude, parents: asked.parents, now };
        let target = match asked.is_json {
            true => asked.target.clone(),
            false => self.expand(&asked.target)?,
        };
        if target.is_empty() {
            return Err(StepError::Text("the target has no value here".into()));
        }
        let target = absolute(&self.done.config.workdir(), &target);
        let sources = self.sources(asked, now)?;
        let mut draft = Draft::new(&view, asked.link);
        transfer(&mut draft, &sources, &target, &how)?;
        let mut key = self.key(if asked.is_add { "add" } else { "copy" });
        key.text(&target);
        draft.describe(&mut key).map_err(StepError::io("cannot read what is to be copied"))?;
        self.finish_step(&key, written, |stage| stage.write(draft).map(Some))
    }

    fn sources(&self, asked: &Transfer, now: i64) -> Result<Vec<Source>, StepError> {
        let (tree, whence) = match &asked.from {
            Some(from) => (self.tree_of(from)?, format!("{from}'s files")),
            None => (Arc::clone(&self.build.context.tree), "the context".to_owned()),
        };
        let mut sources = Vec::new();
        for source in &asked.sources {
            match source {
                TransferSource::Heredoc(_) if asked.checksum.is_some() => {
                    return Err(no_checksum("a heredoc"));
                }
                TransferSource::Heredoc(heredoc) => sources.push(self.text_source(heredoc, now)?),
                TransferSource::Path(path) => {
                    let path = if asked.is_json { path.clone() } else { self.expand(path)? };
                    if path.is_empty() {
                        return Err(StepError::Text("a source has no value here".into()));
                    }
                    if asked.is_add {
                        sources.push(self.added(asked, &path, &tree, &whence, now)?);
                    } else if path.contains("://") {
                        return Err(StepError::Text(format!(
                            "{path} is a URL; COPY takes files, ADD takes URLs"
                        )));
                    } else {
                        sources.push(Source::Path(Arc::clone(&tree), path, whence.clone()));
                    }
                }
            }
        }
        Ok(sources)
    }

    fn text_source(&self, heredoc: &Heredoc, now: i64) -> Result<Source, StepError> {
        let content = match heredoc.expand {
            true => {
                let lookup = |name: &str| self.variable(name);
                words::expand_heredoc(&heredoc.content, self.build.file.escape, &lookup)
                    .map_err(StepError::Text)?
            }
            false => heredoc.content.clone(),
        };
        Ok(Source::Text(heredoc.name.clone(), content.into_bytes().into(), 0o644, now))
    }

    /// A source of ADD: what is at a URL, what is in an archive, or a file.
    fn added(
        &self,
        asked: &Transfer,
        path: &str,
        tree: &Arc<Tree>,
        whence: &str,
        now: i64,
    ) -> Result<Source, StepError> {
        if path.starts_with("git@")
            || path.starts_with("git://")
            || path.contains("://") && path.split('#').next().is_some_and(|url| url.ends_with(".git"))
        {
            return Err(StepError::Text(format!("{path} is a Git repository; clone it into the context")));
        }
        if path.starts_with("http://") || path.starts_with("https://") {
            return self.downloaded(asked, path, now);
        }
        if asked.checksum.is_some() {
            return Err(no_checksum(path));
        }
        if path.contains("://") {
            return Err(StepError::Text(format!(
                "{path} is a URL of a kind that is not supported; https is, and http to this machine"
            )));
        }
        let failed = |source| StepError::Io(format!("cannot read {path}"), source);
        let is_archive = asked.unpack != Some(false);
        if let Some(item) = tree.resolve(path.as_bytes()).map_err(failed)?
            && item.info.kind == FileKind::File
            && is_archive
        {
            let mut spool = Bounded::new(self.build.store.spool()?);
            io::copy(&mut tree.open(&item).map_err(failed)?, &mut spool).map_err(failed)?;
            let mut spool = spool.into_inner();
            spool.rewind().map_err(failed)?;
            if let Some(source) = self.unpacked(spool, path)? {
                return Ok(source);
            }
        }
        Ok(Source::Path(Arc::clone(tree), path.to_owned(), whence.to_owned()))
    }

    /// What is in an archive; nothing if it is none.
    fn unpacked(&self, file: std::fs::File, path: &str) -> Result<Option<Source>, StepError> {
        let is_archive = self.build.store.is_archive(&file);
        if !is_archive.map_err(StepError::io(format!("cannot read {path}")))? {
            return Ok(None);
        }
        let view = self.build.store.view_of_archive(file)?;
        Ok(Some(Source::Unpacked(Arc::new(Tree::Layers(view)))))
    }

    fn downloaded(&self, asked: &Transfer, url: &str, now: i64) -> Result<Source, StepError> {
        let mut spool = self.build.store.spool()?;
        let failed = |source| StepError::Io(format!("cannot keep what came from {url}"), source);
        let modified = cloche_images::registry::fetch(url, spool.try_clone().map_err(failed)?)?;
        spool.rewind().map_err(failed)?;
        if let Some(expected) = &asked.checksum {
            let expected = self.expand(expected)?;
            let expected: Digest = expected.parse().map_err(|_| {
                StepError::Text(format!("--checksum={expected} is no digest: sha256: and 64 digits"))
            })?;
            let actual = digest_of(&mut &spool).map_err(failed)?;
            if actual != expected {
                return Err(StepError::Text(format!(
                    "{url} has the digest {actual}, expected was {expected}"
                )));
            }
            spool.rewind().map_err(failed)?;
        }
        if asked.unpack == Some(true)
            && let Some(source) = self.unpacked(spool.try_clone().map_err(failed)?, url)?
        {
            return Ok(source);
        }
        let path = url.split(['?', '#']).next().unwrap_or(url);
        let after_scheme = path.split_once("://").map_or("", |(_, rest)| rest);
        let name = after_scheme.split_once('/').map(|(_, path)| base_name(path)).unwrap_or_default();
        if name.is_empty() {
            return Err(StepError::Text(format!(
                "{url} does not say what the file is called; end it with a name"
            )));
        }
        let tree = self.build.store.view_of_file(
            spool,
            name.as_bytes(),
            0o600,
            modified.as_deref().and_then(http_date).unwrap_or(now),
        )?;
        Ok(Source::Path(Arc::new(Tree::Layers(tree)), name, url.to_owned()))
    }
}

fn no_checksum(source: &str) -> StepError {
    StepError::Text(format!("--checksum is for files that are downloaded, and {source} is not"))
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` in seconds since 1970 (RFC 9110 §5.6.7); the older forms are not looked at.
fn http_date(text: &str) -> Option<i64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split([' ', ':']).collect();
    let [_, day, month, year, hour, minute, second, "GMT"] = words.as_slice() else { return None };
    let number = |text: &str| text.parse::<i64>().ok().filter(|number| (0..10_000).contains(number));
    let month = MONTHS.iter().position(|known| known == month)? as i64 + 1;
    let (day, year) = (number(day)?, number(year)?);
    // Days since 1970, counted from 1 March, where leap days come last.
    let (shifted_year, shifted_month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * shifted_year + shifted_year / 4 - shifted_year / 100
        + shifted_year / 400
        + (153 * shifted_month + 2) / 5
        + day
        - 1
        - 719_468;
    Some(days * 86_400 + number(hour)? * 3600 + number(minute)? * 60 + number(second)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn http_date_is_that_of_the_standard() {
        assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(http_date("Thu, 29 Feb 2024 00:00:00 GMT"), Some(1_709_164_800));
        for bad in ["", "yesterday", "Sun, 06 Nox 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:37 CET"] {
            assert_eq!(http_date(bad), None, "{bad}");
        }
    }

    #[test]
    fn proxies_need_no_arg() {
        assert!(is_predefined("HTTP_PROXY") && is_predefined("http_proxy"));
        assert!(!is_predefined("Http_Proxy") && !is_predefined("PROXY"));
    }
}
