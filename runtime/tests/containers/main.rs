//! Containers started for real. Needs root and busybox; a test that needs more says what is missing.
//!
//! `launch` wants a single-threaded caller, so the tests run one after the other on the main thread.

mod confinement;
mod files;
mod fixture;
mod layers;
mod limits;
mod process;

use libtest_mimic::{Arguments, Conclusion, Failed, Trial};

/// A test and what it needs beyond root and busybox.
struct Test {
    name: &'static str,
    need: Need,
    body: fn(),
}

/// Something of the machine.
#[derive(Clone, Copy)]
enum Need {
    Nothing,
    Command(&'static str),
    /// A file or device node that may be looked at, but not used.
    File(&'static str),
    /// A root that lacks CAP_SYS_RESOURCE, as in a container.
    FewerRights,
}

impl Need {
    /// What is missing.
    fn missing(self) -> Option<String> {
        let busybox = std::path::Path::new(fixture::BUSYBOX);
        if !rustix::process::geteuid().is_root() {
            return Some("needs root".into());
        }
        if !busybox.exists() {
            return Some(format!("needs {} (install busybox-static)", busybox.display()));
        }
        match self {
            Self::Command(name) if fixture::find_command(name).is_none() => {
                Some(format!("needs the command {name}"))
            }
            Self::File(path) if !std::path::Path::new(path).exists() => Some(format!("needs {path}")),
            Self::FewerRights if fixture::may_raise_limits() => {
                Some("needs a root without CAP_SYS_RESOURCE".into())
            }
            _ => None,
        }
    }
}

/// Lists tests: functions, each with its need if it has one.
macro_rules! tests {
    ($module:ident: $($name:ident $(needs $need:expr)?),* $(,)?) => {
        [$($crate::Test {
            name: concat!(stringify!($module), "::", stringify!($name)),
            need: { #[allow(unused_mut, unused_assignments)] let mut need = $crate::Need::Nothing; $(need = $need;)? need },
            body: $name,
        }),*]
    };
}
use tests;

fn main() {
    if let Some(code) = process::act_as_victim() {
        std::process::exit(code);
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    run(&arguments).exit();
}

fn run(arguments: &Arguments) -> Conclusion {
    let all = process::tests()
        .into_iter()
        .chain(confinement::tests())
        .chain(files::tests())
        .chain(limits::tests())
        .chain(layers::tests());
    let trials = all.map(|Test { name, need, body }| match need.missing() {
        None => Trial::test(name, move || run_checked(body)),
        Some(missing) => Trial::test(name, || Ok(())).with_kind(missing).with_ignored_flag(true),
    });
    libtest_mimic::run(arguments, trials.collect())
}

/// Runs a test, and fails it if it leaves anything behind.
fn run_checked(body: fn()) -> Result<(), Failed> {
    let before = fixture::Traces::take();
    body();
    fixture::Traces::take().compare(&before).map_err(Failed::from)
}
