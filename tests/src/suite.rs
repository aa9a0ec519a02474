//! From bodies to trials: registration, needs, the order of a test, and the summary.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::bed::Bed;
use crate::bodies;
use crate::leftovers;
use crate::plain_user::Ids;
use crate::world::{Isolation, Need, World};

/// What a body returns: it ends at the first thing that does not hold.
pub type Story = Result<()>;

/// Where a body runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Runs {
    /// Under each isolation: `container::name`, `vm::name`.
    UnderEach,
    /// Under one of them only.
    Under(Isolation),
    /// Once, since isolation does not matter: `host::name`.
    Once,
    /// Once, comparing both isolations: `parity::name`.
    ComparingBoth,
}

/// A registered body.
#[derive(Debug, Clone, Copy)]
pub struct Body {
    name: &'static str,
    story: fn(&Bed) -> Story,
    runs: Runs,
    /// Whether a plain user tells it, too: `rootless::name`.
    rootless: bool,
    needs: &'static [Need],
}

impl Body {
    /// A body that runs under each isolation.
    pub const fn new(name: &'static str, story: fn(&Bed) -> Story) -> Self {
        Self { name, story, runs: Runs::UnderEach, rootless: false, needs: &[] }
    }

    /// Runs under this isolation only.
    pub const fn only(mut self, isolation: Isolation) -> Self {
        self.runs = Runs::Under(isolation);
        self
    }

    /// Also runs as a plain user whose containers have users of their own.
    pub const fn rootless(mut self) -> Self {
        self.rootless = true;
        self
    }

    /// Runs once: isolation does not matter.
    pub const fn once(mut self) -> Self {
        self.runs = Runs::Once;
        self
    }

    /// Runs once and compares both isolations.
    pub const fn comparing_both(mut self) -> Self {
        self.runs = Runs::ComparingBoth;
        self
    }

    /// Needs these things of the host.
    pub const fn needs(mut self, needs: &'static [Need]) -> Self {
        self.needs = needs;
        self
    }

    fn trials(self, selection: Selection, run: &Arc<Run>) -> Vec<Trial> {
        let mut trials = Vec::new();
        let mut add = |prefix: &str, isolation, needs_kvm: bool| {
            let mut needs = vec![Need::Root];
            needs.extend(needs_kvm.then_some(Need::UsableKvm));
            let user = (prefix == ROOTLESS).then_some(Ids::Many);
            needs.extend(user.map(|_| Need::NewIdMap));
            needs.extend(self.needs);
            let name = format!("{prefix}::{}", self.name);
            let run = Arc::clone(run);
            trials.push(Trial::ignorable_test(name, move || run.try_body(self, isolation, user, &needs)));
        };
        for (isolation, chosen) in
            [(Isolation::Container, selection.container), (Isolation::Vm, selection.vm)]
        {
            let runs_here = self.runs == Runs::UnderEach || self.runs == Runs::Under(isolation);
            if chosen && runs_here {
                add(isolation.as_str(), isolation, isolation == Isolation::Vm);
            }
        }
        if self.rootless && selection.container {
            add(ROOTLESS, Isolation::Container, false);
        }
        match self.runs {
            Runs::Once if selection.container => add("host", Isolation::Container, false),
            Runs::ComparingBoth if selection.container && selection.vm => {
                add("parity", Isolation::Container, true);
            }
            _ => {}
        }
        trials
    }
}

/// Prefix of stories that a plain user tells.
const ROOTLESS: &str = "rootless";

/// Registers a function under its own name.
macro_rules! body {
    ($story:ident) => {
        crate::suite::Body::new(stringify!($story), $story)
    };
}
pub(crate) use body;

/// Which isolations were asked for.
#[derive(Debug, Clone, Copy)]
struct Selection {
    container: bool,
    vm: bool,
}

/// Runs the suite and prints what was skipped and why.
pub fn run(mut arguments: Vec<String>) -> Result<ExitCode> {
    let selection = take_selection(&mut arguments)?;
    let mut arguments = Arguments::from_iter(arguments);
    // Leftovers are looked for on the whole host, so one test runs at a time.
    arguments.test_threads = Some(1);
    if arguments.list {
        let run = Arc::new(Run { world: None, skipped: Mutex::default() });
        return Ok(libtest_mimic::run(&arguments, trials(selection, &run)).exit_code());
    }
    // Orphans of a test become children of this process and thereby findable.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("become a subreaper")?;
    let run = Arc::new(Run { world: Some(World::explore()?), skipped: Mutex::default() });
    let conclusion = libtest_mimic::run(&arguments, trials(selection, &run));
    run.print_skipped();
    Ok(conclusion.exit_code())
}

fn trials(selection: Selection, run: &Arc<Run>) -> Vec<Trial> {
    bodies::all().into_iter().flat_map(|body| body.trials(selection, run)).collect()
}

/// Takes `--isolation WORD` or `--isolation=WORD` out of the arguments; the rest is libtest's.
fn take_selection(arguments: &mut Vec<String>) -> Result<Selection> {
    let Some(at) = arguments.iter().position(|word| word.starts_with("--isolation")) else {
        return Ok(Selection { container: true, vm: true });
    };
    let word = arguments.remove(at);
    let value = match word.strip_prefix("--isolation=") {
        Some(value) => value.to_owned(),
        None if at < arguments.len() => arguments.remove(at),
        None => bail!("--isolation needs container, vm or both"),
    };
    match value.as_str() {
        "container" => Ok(Selection { container: true, vm: false }),
        "vm" => Ok(Selection { container: false, vm: true }),
        "both" => Ok(Selection { container: true, vm: true }),
        other => bail!("--isolation is container, vm or both, not {other}"),
    }
}

/// One run of the suite.
struct Run {
    /// `None` when tests are only listed.
    world: Option<World>,
    skipped: Mutex<BTreeMap<&'static str, u32>>,
}

impl Run {
    fn try_body(
        &self,
        body: Body,
        isolation: Isolation,
        user: Option<Ids>,
        needs: &[Need],
    ) -> Result<Completion, Failed> {
        let Some(world) = &self.world else { return Ok(Completion::ignored_with("listing only")) };
        if let Some(missing) = needs.iter().find(|need| world.lacks(**need)) {
            let name = missing.as_str();
            if world.insists_on(*missing) {
                return Err(format!("needs {name}, and CLOCHE_TESTS_REQUIRE_VM=1 insists on it").into());
            }
            let mut skipped = self.skipped.lock().unwrap_or_else(PoisonError::into_inner);
            *skipped.entry(name).or_default() += 1;
            return Ok(Completion::ignored_with(format!("needs {name}")));
        }
        match tell(body, world, isolation, user) {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => {
                // At once, since the list at the end does not come if the run is cut short.
                eprintln!("{}: {error:#}", body.name);
                Err(Failed::from(format!("{error:#}")))
            }
        }
    }

    fn print_skipped(&self) {
        let skipped = self.skipped.lock().unwrap_or_else(PoisonError::into_inner);
        for (need, count) in skipped.iter() {
            println!("skipped: {count} for want of {need}");
        }
    }
}

fn tell(body: Body, world: &World, isolation: Isolation, user: Option<Ids>) -> Story {
    let bed = match user {
        Some(ids) => Bed::of_plain_user(world, isolation, ids)?,
        None => Bed::new(world, isolation)?,
    };
    let story = (body.story)(&bed);
    let left = bed.check_out();
    if left.is_err() || story.is_err() {
        leftovers::kill_processes();
    }
    match (story, left) {
        (Ok(()), left) => left.context("after the test"),
        (Err(story), Ok(())) => Err(story),
        (Err(story), Err(left)) => bail!("{story:#}\nand after the test: {left:#}"),
    }
}
