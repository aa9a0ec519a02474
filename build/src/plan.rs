//! Which stages are needed for what is asked for, and all of them at once as far as they do not wait for each other.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use cloche_images::Store;

use crate::context::Context;
use crate::dockerfile::{Dockerfile, Instruction, Place, Stage, words};
use crate::stage::{Finished, run_stage};
use crate::{BuildFailure, Built, Observer, Request, StepError, mounts, time};

/// What all stages share.
pub(crate) struct Build<'a> {
    pub(crate) request: &'a Request,
    pub(crate) observer: &'a dyn Observer,
    pub(crate) store: &'a Store,
    pub(crate) context: Context,
    pub(crate) file: Dockerfile,
    /// ARGs before the first FROM, and what every build has; in FROM they all are there.
    pub(crate) global: BTreeMap<String, String>,
    /// SOURCE_DATE_EPOCH.
    pub(crate) epoch: Option<u64>,
    /// Directory of what sandboxes of this build mount.
    pub(crate) scratch: mounts::Scratch<'a>,
    pub(crate) next_step: AtomicUsize,
    /// Build arguments that an ARG has asked for.
    pub(crate) used: Mutex<BTreeSet<String>>,
    /// The stages that lead to what is asked for, with their bases.
    needed: BTreeMap<usize, String>,
    given_up: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    finished: BTreeMap<usize, Arc<Finished>>,
    /// Sandboxes that run now.
    running: Vec<Arc<OwnedFd>>,
    most_running: usize,
}

/// A stage or image that files are taken from.
pub(crate) enum From {
    Stage(usize),
    Image(String),
}

impl Build<'_> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `--from=NAME` or FROM NAME means to a stage: an earlier one by its name or number, or an image.
    pub(crate) fn from(&self, name: &str, before: usize) -> From {
        find_stage(&self.file, name, before).map_or_else(|| From::Image(name.to_owned()), From::Stage)
    }

    /// A stage's result, once it is there.
    pub(crate) fn wait_for(&self, stage: usize) -> Result<Arc<Finished>, StepError> {
        // A trigger of a base image can name any stage; it is known only now.
        if !self.needed.contains_key(&stage) {
            return Err(StepError::Text(format!(
                "stage {stage} of this file is not built: no instruction of a stage that is needed names it, only a \
                 trigger of the base image does"
            )));
        }
        let mut state = self.state();
        loop {
            if let Some(finished) = state.finished.get(&stage) {
                return Ok(Arc::clone(finished));
            }
            self.go_on()?;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Fails once another stage has.
    pub(crate) fn go_on(&self) -> Result<(), StepError> {
        if self.given_up.load(Ordering::Relaxed) { Err(StepError::GivenUp) } else { Ok(()) }
    }

    /// Waits until not too many sandboxes run.
    pub(crate) fn may_run(&self) -> Result<(), StepError> {
        let mut state = self.state();
        while state.most_running == 0 {
            self.go_on()?;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.go_on()?;
        state.most_running -= 1;
        Ok(())
    }

    /// A sandbox's process has started, and is to be killed if another stage fails.
    pub(crate) fn runs(&self, process: &Arc<OwnedFd>) {
        self.state().running.push(Arc::clone(process));
        if self.go_on().is_err() {
            self.give_up();
        }
    }

    /// Its process has ended, or has not started.
    pub(crate) fn has_run(&self, process: Option<&Arc<OwnedFd>>) {
        let mut state = self.state();
        state.running.retain(|known| !process.is_some_and(|process| Arc::ptr_eq(known, process)));
        state.most_running += 1;
        self.changed.notify_all();
    }

    fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
        let state = self.state();
        for process in &state.running {
            let _ = rustix::process::pidfd_send_signal(process, rustix::process::Signal::KILL);
        }
        self.changed.notify_all();
    }

    /// Puts the values of global arguments in.
    pub(crate) fn expand_global(&self, text: &str) -> Result<String, String> {
        words::expand(text, self.file.escape, &|name| self.global.get(name).cloned())
    }
}

fn find_stage(file: &Dockerfile, name: &str, before: usize) -> Option<usize> {
    let lower = name.to_ascii_lowercase();
    let by_name = file.stages.iter().take(before).position(|stage| stage.name.as_ref() == Some(&lower));
    by_name.or_else(|| name.parse().ok().filter(|index| *index < before))
}

/// The stages that a stage takes something from.
fn needs(file: &Dockerfile, index: usize, stage: &Stage, base: &str) -> Result<Vec<usize>, BuildFailure> {
    // FROM knows names only: a number is an image's.
    let base = match base.parse::<usize>() {
        Ok(_) => None,
        Err(_) => find_stage(file, base, index),
    };
    let mut found: Vec<usize> = base.into_iter().collect();
    for step in &stage.steps {
        let fail = |problem: String| BuildFailure::Step {
            place: step.place.clone(),
            source: Box::new(StepError::Text(problem)),
        };
        match &step.instruction {
            Instruction::Transfer(transfer) => {
                if let Some(from) = &transfer.from {
                    if from.contains('$') {
                        let problem = "--from cannot have variables; name a stage of this file, which can: FROM $IMAGE AS NAME";
                        return Err(fail(problem.into()));
                    }
                    found.extend(find_stage(file, from, index));
                }
            }
            Instruction::Run { flags, .. } => {
                for from in mounts::sources(flags).map_err(fail)? {
                    found.extend(find_stage(file, &from, index));
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

fn platform(text: &str) -> Result<(), String> {
    match text {
        "linux/amd64" | "linux/x86_64" | "linux" => Ok(()),
        other => Err(format!("the platform {other} is not supported; this machine runs linux/amd64")),
    }
}

fn global_arguments(file: &Dockerfile, request: &Request) -> Result<BTreeMap<String, String>, BuildFailure> {
    let target = request.target.clone().unwrap_or_else(|| "default".into());
    let mut global: BTreeMap<String, String> = [("TARGETSTAGE".to_owned(), target)].into();
    for side in ["BUILD", "TARGET"] {
        for (name, value) in [
            ("PLATFORM", "linux/amd64"),
            ("OS", "linux"),
            ("ARCH", "amd64"),
            ("OSVERSION", ""),
            ("VARIANT", ""),
        ] {
            global.insert(format!("{side}{name}"), value.to_owned());
        }
    }
    for (place, name, default) in &file.arguments {
        let given = request.arguments.get(name).cloned();
        let value = match (given, default) {
            (Some(given), _) => Some(given),
            (None, Some(default)) => {
                let lookup = |name: &str| global.get(name).cloned();
                let expanded = words::expand(default, file.escape, &lookup);
                let fail = |problem| BuildFailure::Step {
                    place: place.clone(),
                    source: Box::new(StepError::Text(problem)),
                };
                Some(expanded.map_err(fail)?)
            }
            (None, None) => None,
        };
        if let Some(value) = value {
            global.insert(name.clone(), value);
        }
    }
    Ok(global)
}

/// Builds what is asked for.
pub(crate) fn build(request: &Request, observer: &dyn Observer) -> Result<Built, BuildFailure> {
    if let Some(given) = &request.platform {
        platform(given).map_err(BuildFailure::Request)?;
    }
    let store = Store::open(request.home.images())?;
    let id = {
        // Until the image is in the index, nobody may delete its layers.
        let _hold = store.hold()?;
        let id = build_held(request, observer, &store);
        if id.is_err() {
            // What was killed has left something that the next command would clean up.
            let _ = cloche_engine::sandboxes::Sandboxes::new(request.home.sandboxes()).reconcile();
        }
        id?
    };
    store.tidy()?;
    Ok(Built { id })
}

fn build_held(
    request: &Request,
    observer: &dyn Observer,
    store: &Store,
) -> Result<cloche_images::Digest, BuildFailure> {
    let context = Context::open(&request.input, store)?;
    let file = Dockerfile::parse(&context.dockerfile)?;
    let global = global_arguments(&file, request)?;
    let target = match &request.target {
        None => file.stages.len() - 1,
        Some(name) => find_stage(&file, name, file.stages.len()).ok_or_else(|| {
            let names: Vec<&str> = file.stages.iter().filter_map(|stage| stage.name.as_deref()).collect();
            BuildFailure::Request(format!("there is no stage {name}; there are {}", names.join(", ")))
        })?,
    };
    let mut build = Build {
        epoch: time::epoch().map_err(BuildFailure::Request)?,
        scratch: mounts::scratch(&request.home, observer).map_err(BuildFailure::Request)?,
        next_step: AtomicUsize::new(1),
        used: Mutex::new(file.arguments.iter().map(|(_, name, _)| name.clone()).collect()),
        needed: BTreeMap::new(),
        given_up: AtomicBool::new(false),
        state: Mutex::new(State {
            most_running: thread::available_parallelism().map_or(1, usize::from),
            ..State::default()
        }),
        changed: Condvar::new(),
        request,
        observer,
        store,
        context,
        file,
        global,
    };
    build.needed = needed(&build, target)?;
    run_all(&build)?;
    let finished = build.wait_for(target).map_err(|_| BuildFailure::GivenUp)?;
    let used = build.used.lock().unwrap_or_else(PoisonError::into_inner);
    let unused: Vec<&str> = (request.arguments.keys().map(String::as_str))
        .filter(|name| !used.contains(*name) && !crate::stage::is_predefined(name))
        .collect();
    if !unused.is_empty() {
        observer.warn(&format!("no ARG asks for the build arguments {}", unused.join(", ")));
    }
    finished.commit(store, &request.names, &request.labels).map_err(BuildFailure::Image)
}

/// The stages that lead to one, with their bases.
fn needed(build: &Build<'_>, target: usize) -> Result<BTreeMap<usize, String>, BuildFailure> {
    let mut found = BTreeMap::new();
    let mut pending = vec![target];
    while let Some(index) = pending.pop() {
        let Some(stage) = build.file.stages.get(index).filter(|_| !found.contains_key(&index)) else {
            continue;
        };
        let fail = |problem: String| step_failure(&stage.place, problem);
        let base = build.expand_global(&stage.base).map_err(fail)?;
        if base.is_empty() {
            let problem = format!("{} has no value here; give it one with --build-arg", stage.base);
            return Err(fail(problem));
        }
        if let Some(given) = &stage.platform {
            let given = build.expand_global(given).map_err(fail)?;
            platform(&given).map_err(fail)?;
        }
        pending.extend(needs(&build.file, index, stage, &base)?);
        found.insert(index, base);
    }
    Ok(found)
}

fn step_failure(place: &Place, problem: String) -> BuildFailure {
    BuildFailure::Step { place: place.clone(), source: Box::new(StepError::Text(problem)) }
}

fn run_all(build: &Build<'_>) -> Result<(), BuildFailure> {
    let failures = Mutex::new(Vec::new());
    let note = &|failure| failures.lock().unwrap_or_else(PoisonError::into_inner).push(failure);
    thread::scope(|scope| {
        for (&index, base) in &build.needed {
            scope.spawn(move || match run_stage(build, index, base) {
                Ok(finished) => {
                    build.state().finished.insert(index, Arc::new(finished));
                    build.changed.notify_all();
                }
                Err(failure) => {
                    note(failure);
                    build.give_up();
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    // The first is the cause; the others gave up because of it.
    let is_cause = |failure: &BuildFailure| match failure {
        BuildFailure::GivenUp => false,
        BuildFailure::Step { source, .. } => !matches!(source.as_ref(), StepError::GivenUp),
        _ => true,
    };
    match failures.into_iter().find(is_cause) {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}
