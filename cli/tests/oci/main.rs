//! The OCI runtime's command line, as engines use it. Needs root and busybox; says so where they are missing.

mod attacks;
mod differential;
mod engines;
mod failures;
mod fields;
mod fixture;
mod hooks;
mod hostile;
mod in_vm;
mod life;
mod mishaps;
mod network;
mod pods;
mod processes;
mod seccomp;
mod sharing;
mod spaces;
mod syscalls;
mod words;

use libtest_mimic::{Arguments, Failed, Trial};

/// A test by its name.
pub type Test = (&'static str, fn());

/// Lists tests: functions of this module.
macro_rules! tests {
    ($($name:ident),* $(,)?) => { vec![$((concat!(module_path!(), "::", stringify!($name)), $name as fn())),*] };
}
use tests;

fn main() {
    if std::env::args().nth(1).is_some_and(|word| word == mishaps::LEADERLESS) {
        mishaps::be_leaderless();
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let all = of_containers();
    let all = if fixture::in_vm() { in_vm::of(all) } else { all };
    let missing = fixture::missing();
    let trials = all.into_iter().map(|(name, body)| match &missing {
        None => Trial::test(name, move || checked(body)),
        Some(missing) => Trial::test(name, || Ok(())).with_kind(missing).with_ignored_flag(true),
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

/// The tests of containers.
fn of_containers() -> Vec<Test> {
    [
        life::all(),
        processes::all(),
        spaces::all(),
        hooks::all(),
        hostile::all(),
        attacks::all(),
        failures::all(),
        mishaps::all(),
        sharing::all(),
        fields::all(),
        words::all(),
        seccomp::all(),
        network::all(),
        pods::all(),
        engines::all(),
        differential::all(),
    ]
    .concat()
}

/// Runs a test, and fails it if it leaves anything behind.
fn checked(body: fn()) -> Result<(), Failed> {
    let before = fixture::traces();
    body();
    for _ in 0..100 {
        if fixture::traces() == before {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Err(format!("left behind: before {before:#?}, after {:#?}", fixture::traces()).into())
}
