//! The lines that engines write, read without a parser that has to be made first: making that of one verb takes as long
//! as all that `start` or `delete` then do. Whatever is not quite plain (an option twice, a value that starts with a
//! dash, a word that is not known) is not read here, and so is never taken in another sense.

use std::{path::PathBuf, slice};

use super::{
    Arguments, CgroupManager, Create, DEFAULT_SIGNAL, Delete, Global, Kill, LogFormat, Named, Rootless, Run,
    Verb, signal,
};

/// What was typed, if it is plain.
pub(super) fn parse(words: &[String]) -> Option<Arguments> {
    let mut line = Line(words.iter());
    let (mut root, mut log, mut log_format, mut rootless) = (None, None, None, None);
    let (mut debug, mut systemd_cgroup) = (false, false);
    let verb = loop {
        match line.next()? {
            Word::Plain(verb) => break verb,
            Word::Option("--root", value) => set(&mut root, line.path(value)?)?,
            Word::Option("--log", value) => set(&mut log, line.path(value)?)?,
            Word::Option("--log-format", value) => {
                let format = match line.value(value)? {
                    "text" => LogFormat::Text,
                    "json" => LogFormat::Json,
                    _ => return None,
                };
                set(&mut log_format, format)?;
            }
            Word::Option("--rootless", value) => {
                let when = match line.value(value)? {
                    "auto" => Rootless::Auto,
                    "true" => Rootless::True,
                    "false" => Rootless::False,
                    _ => return None,
                };
                set(&mut rootless, when)?;
            }
            Word::Option("--debug", None) => raise(&mut debug)?,
            Word::Option("--systemd-cgroup", None) => raise(&mut systemd_cgroup)?,
            Word::Option(..) => return None,
        }
    };
    let global = Global {
        root,
        log,
        log_format: log_format.unwrap_or(LogFormat::Text),
        debug,
        rootless: rootless.unwrap_or(Rootless::Auto),
        systemd_cgroup,
        cgroup_manager: CgroupManager::Cgroupfs,
    };
    let verb = match verb {
        "create" => Verb::Create(run(&mut line, false)?.create),
        "run" => Verb::Run(run(&mut line, true)?),
        "start" => Verb::Start(Named { id: line.only()? }),
        "state" => Verb::State(Named { id: line.only()? }),
        "kill" => Verb::Kill(kill(&mut line)?),
        "delete" => Verb::Delete(delete(&mut line)?),
        _ => return None,
    };
    Some(Arguments { version: (), global, verb })
}

/// `run`, or what `create` has of it.
fn run(line: &mut Line<'_>, is_run: bool) -> Option<Run> {
    let (mut bundle, mut config, mut pid_file, mut console_socket) = (None, None, None, None);
    let (mut preserve_fds, mut id) = (None, None);
    let (mut no_pivot, mut no_subreaper, mut no_new_keyring) = (false, false, false);
    let (mut detach, mut keep) = (false, false);
    while let Some(word) = line.next() {
        match word {
            Word::Plain(word) => set(&mut id, word.to_owned())?,
            Word::Option("-b" | "--bundle", value) => set(&mut bundle, line.path(value)?)?,
            Word::Option("-f" | "--config", value) => set(&mut config, line.path(value)?)?,
            Word::Option("--pid-file", value) => set(&mut pid_file, line.path(value)?)?,
            Word::Option("--console-socket", value) => set(&mut console_socket, line.path(value)?)?,
            Word::Option("--preserve-fds", value) => {
                set(&mut preserve_fds, line.value(value)?.parse().ok()?)?;
            }
            Word::Option("--no-pivot", None) => raise(&mut no_pivot)?,
            Word::Option("--no-subreaper", None) => raise(&mut no_subreaper)?,
            Word::Option("--no-new-keyring", None) => raise(&mut no_new_keyring)?,
            Word::Option("-d" | "--detach", None) if is_run => raise(&mut detach)?,
            Word::Option("--keep", None) if is_run => raise(&mut keep)?,
            Word::Option(..) => return None,
        }
    }
    let create = Create {
        bundle: bundle.unwrap_or_else(|| ".".into()),
        config: config.unwrap_or_else(|| "config.json".into()),
        pid_file,
        console_socket,
        preserve_fds: preserve_fds.unwrap_or(0),
        no_pivot,
        no_subreaper,
        no_new_keyring,
        id: id?,
    };
    Some(Run { create, detach, keep })
}

fn kill(line: &mut Line<'_>) -> Option<Kill> {
    let (mut all, mut regex, mut id, mut to_send) = (false, false, None, None);
    while let Some(word) = line.next() {
        match word {
            Word::Plain(word) if id.is_none() => id = Some(word.to_owned()),
            Word::Plain(word) => set(&mut to_send, signal(word).ok()?)?,
            Word::Option("-a" | "--all", None) => raise(&mut all)?,
            Word::Option("-r" | "--regex", None) => raise(&mut regex)?,
            Word::Option(..) => return None,
        }
    }
    let to_send = to_send.or_else(|| signal(DEFAULT_SIGNAL).ok())?;
    Some(Kill { all, regex, id: id?, signal: to_send })
}

fn delete(line: &mut Line<'_>) -> Option<Delete> {
    let (mut force, mut regex, mut id) = (false, false, None);
    while let Some(word) = line.next() {
        match word {
            Word::Plain(word) => set(&mut id, word.to_owned())?,
            Word::Option("-f" | "--force", None) => raise(&mut force)?,
            Word::Option("--regex", None) => raise(&mut regex)?,
            Word::Option(..) => return None,
        }
    }
    Some(Delete { force, regex, id: id? })
}

/// The words that are left.
struct Line<'a>(slice::Iter<'a, String>);

#[derive(Clone, Copy)]
enum Word<'a> {
    /// Its name, and the value that is in the same word, as in `--root=/run`.
    Option(&'a str, Option<&'a str>),
    Plain(&'a str),
}

impl<'a> Line<'a> {
    fn next(&mut self) -> Option<Word<'a>> {
        let word = self.0.next()?;
        Some(match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => Word::Option(name, Some(value)),
            // No option and no id is empty, and then it is none that is known.
            _ if word.starts_with('-') || word.is_empty() => Word::Option(word, None),
            _ => Word::Plain(word),
        })
    }

    /// An option's value: what was in its own word, or the next one.
    fn value(&mut self, own: Option<&'a str>) -> Option<&'a str> {
        let next = own.or_else(|| self.0.next().map(String::as_str).filter(|word| !word.starts_with('-')));
        next.filter(|value| !value.is_empty())
    }

    fn path(&mut self, own: Option<&'a str>) -> Option<PathBuf> {
        self.value(own).map(PathBuf::from)
    }

    /// The one word that is left.
    fn only(&mut self) -> Option<String> {
        match (self.next(), self.next()) {
            (Some(Word::Plain(word)), None) => Some(word.to_owned()),
            _ => None,
        }
    }
}

/// Sets what is not set yet.
fn set<Value>(place: &mut Option<Value>, value: Value) -> Option<()> {
    place.is_none().then(|| *place = Some(value))
}

fn raise(flag: &mut bool) -> Option<()> {
    (!std::mem::replace(flag, true)).then_some(())
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches as _;

    use super::*;
    use crate::oci::arguments::command;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    /// As the whole parser reads it; `None` if it does not.
    fn whole(words: &[String]) -> Option<String> {
        let name = ["cloche-container".to_owned()];
        let matches = command("cloche-container").try_get_matches_from(name.iter().chain(words)).ok()?;
        Arguments::from_arg_matches(&matches).ok().map(|arguments| format!("{arguments:?}"))
    }

    #[test]
    fn lines_of_engines_are_plain() {
        for line in [
            "--root /run/r --log /l --log-format json create --bundle /b --pid-file /p --console-socket /s c1",
            "--systemd-cgroup create --bundle /b --pid-file /p --no-new-keyring --preserve-fds 2 c1",
            "--root=/run/r --log-format=text run -b /b -d c1",
            "run --keep --no-pivot c1",
            "--debug start c1",
            "state c1",
            "kill c1 KILL",
            "kill --all c1 9",
            "kill c1",
            "delete --force c1",
            "delete c1",
        ] {
            let words = words(line);
            let plain = parse(&words).map(|arguments| format!("{arguments:?}"));
            assert!(plain.is_some(), "{line}");
            assert_eq!(plain, whole(&words), "{line}");
        }
    }

    #[test]
    fn what_is_plain_is_what_the_whole_parser_takes_it_for() {
        const WORDS: [&str; 48] = [
            "--root",
            "--root=/r",
            "--log",
            "--log=",
            "--log-format",
            "--log-format=json",
            "json",
            "text",
            "--debug",
            "--debug=1",
            "--rootless",
            "--rootless=true",
            "auto",
            "--systemd-cgroup",
            "--bundle",
            "-b",
            "--bundle=-b",
            "-b=/b",
            "-b/b",
            "--config",
            "-f",
            "--pid-file",
            "--console-socket",
            "--preserve-fds",
            "--preserve-fds=3",
            "7",
            "+7",
            "-1",
            "4294967296",
            "--no-pivot",
            "--no-subreaper",
            "--no-new-keyring",
            "-d",
            "--detach",
            "--keep",
            "-dk",
            "-a",
            "--all",
            "--force",
            "--regex",
            "TERM",
            "SIGRTMIN+3",
            "--",
            "-",
            "",
            "--help",
            "c1",
            "/b=c",
        ];
        const VERBS: [&str; 8] = ["create", "run", "start", "state", "kill", "delete", "pause", "exec"];
        let mut state = 1u64;
        let mut below = |bound: usize| {
            // Knuth's MMIX generator.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % bound
        };
        let mut plain_lines = 0;
        for _ in 0..20_000 {
            let (before, after) = (below(3), below(4));
            let mut line: Vec<String> = Vec::new();
            line.extend((0..before).map(|_| WORDS[below(15)].to_owned()));
            line.push(VERBS[below(VERBS.len())].to_owned());
            line.extend((0..after).map(|_| WORDS[below(WORDS.len())].to_owned()));
            if below(4) > 0 {
                line.insert(line.len() - below(after + 1), "c1".to_owned());
            }
            if let Some(plain) = parse(&line) {
                plain_lines += 1;
                assert_eq!(Some(format!("{plain:?}")), whole(&line), "{line:?}");
            }
        }
        assert!(plain_lines > 500, "only {plain_lines} lines were plain");
    }
}
