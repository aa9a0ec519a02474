//! From a logical line to an instruction: its keyword, flags and forms. Variables stay as they are written.

use super::lines::{Heredoc, Line};
use super::words;

/// A command line, in one of the two forms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A text for the shell.
    Shell(String),
    /// Words, as a JSON array.
    Exec(Vec<String>),
}

/// `--name=value` or `--name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flag {
    /// Without the dashes.
    pub name: String,
    /// Behind the `=`, without quotes.
    pub value: Option<String>,
}

/// What COPY or ADD takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransferSource {
    /// A path or a URL, not expanded.
    Path(String),
    /// A text in the Dockerfile.
    Heredoc(Heredoc),
}

/// COPY or ADD.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Transfer {
    /// Whether it is ADD, which also unpacks and downloads.
    pub is_add: bool,
    /// `--from`.
    pub from: Option<String>,
    /// `--chown`.
    pub chown: Option<String>,
    /// `--chmod`.
    pub chmod: Option<String>,
    /// `--checksum`.
    pub checksum: Option<String>,
    /// `--link`.
    pub link: bool,
    /// `--parents`.
    pub parents: bool,
    /// `--exclude`, each.
    pub exclude: Vec<String>,
    /// `--unpack`.
    pub unpack: Option<bool>,
    /// At least one.
    pub sources: Vec<TransferSource>,
    /// Not expanded.
    pub target: String,
    /// As a JSON array, which allows blanks in names.
    pub is_json: bool,
}

/// `HEALTHCHECK`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// Nothing for `NONE`.
    pub command: Option<Command>,
    /// Nanoseconds, of interval, timeout, start-period and start-interval.
    pub times_ns: [Option<u64>; 4],
    /// `--retries`.
    pub retries: Option<u32>,
}

/// An instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // The names are the language's own.
pub enum Instruction {
    From { base: String, platform: Option<String>, name: Option<String> },
    Run { flags: Vec<Flag>, command: Command, heredocs: Vec<Heredoc> },
    Cmd(Command),
    Entrypoint(Command),
    Shell(Vec<String>),
    Label(Vec<(String, String)>),
    Env(Vec<(String, String)>),
    Arg(Vec<(String, Option<String>)>),
    Expose(String),
    Transfer(Transfer),
    Volume(Vec<String>),
    User(String),
    Workdir(String),
    OnBuild(String),
    StopSignal(String),
    HealthCheck(HealthCheck),
    Maintainer(String),
}

pub(super) fn parse(line: Line, escape: char) -> Result<Instruction, String> {
    let (keyword, rest) = line.text.split_once(char::is_whitespace).unwrap_or((&line.text, ""));
    let keyword = keyword.to_ascii_uppercase();
    let (flags, rest) = flags(rest.trim_start(), escape)?;
    let rest = rest.trim();
    if !["FROM", "RUN", "COPY", "ADD", "HEALTHCHECK"].contains(&keyword.as_str())
        && let Some(flag) = flags.first()
    {
        return Err(format!("{keyword} has no option --{}", flag.name));
    }
    if rest.is_empty() && KEYWORDS.contains(&keyword.as_str()) {
        return Err(format!("{keyword} needs something behind it"));
    }
    match keyword.as_str() {
        "FROM" => from(&flags, rest),
        "RUN" => Ok(Instruction::Run { flags, command: some_command(rest)?, heredocs: line.heredocs }),
        // An empty array takes away what the base has.
        "CMD" => Ok(Instruction::Cmd(command(rest))),
        "ENTRYPOINT" => Ok(Instruction::Entrypoint(command(rest))),
        "SHELL" => match json(rest) {
            Some(words) if !words.is_empty() => Ok(Instruction::Shell(words)),
            _ => Err("SHELL needs a JSON array of strings, such as [\"/bin/sh\", \"-c\"]".into()),
        },
        "LABEL" => Ok(Instruction::Label(pairs(rest, escape, "LABEL")?)),
        "ENV" => {
            let pairs = pairs(rest, escape, "ENV")?;
            match pairs.iter().any(|(name, _)| name.is_empty() || name.contains('$')) {
                true => Err("a variable has no plain name; write NAME=VALUE".into()),
                false => Ok(Instruction::Env(pairs)),
            }
        }
        "ARG" => Ok(Instruction::Arg(arguments(rest, escape)?)),
        "EXPOSE" => Ok(Instruction::Expose(rest.to_owned())),
        "COPY" | "ADD" => transfer(&keyword, &flags, rest, line.heredocs, escape),
        "VOLUME" => {
            let paths = json(rest).unwrap_or_else(|| rest.split_whitespace().map(str::to_owned).collect());
            match paths.is_empty() || paths.iter().any(|path| path.trim().is_empty()) {
                true => Err("VOLUME needs paths that are not empty".into()),
                false => Ok(Instruction::Volume(paths)),
            }
        }
        "USER" => Ok(Instruction::User(rest.to_owned())),
        "WORKDIR" => Ok(Instruction::Workdir(rest.to_owned())),
        "STOPSIGNAL" => Ok(Instruction::StopSignal(rest.to_owned())),
        "MAINTAINER" => Ok(Instruction::Maintainer(rest.to_owned())),
        "HEALTHCHECK" => health_check(&flags, rest),
        "ONBUILD" => on_build(line),
        _ => Err(match nearest(&keyword) {
            Some(known) => format!("there is no instruction {keyword}; do you mean {known}?"),
            None => format!("there is no instruction {keyword}"),
        }),
    }
}

const KEYWORDS: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// A keyword that one letter more, less, other or swapped makes of this one.
fn nearest(keyword: &str) -> Option<&'static str> {
    let close = |known: &str| {
        let (a, b) = (keyword.as_bytes(), known.as_bytes());
        let front = a.iter().zip(b).take_while(|(a, b)| a == b).count();
        let back = a.iter().rev().zip(b.iter().rev()).take_while(|(a, b)| a == b).count();
        let shorter = a.len().min(b.len());
        let differ = shorter.saturating_sub(front + back);
        let longer = a.len().max(b.len());
        longer - shorter <= 1 && (differ <= 1 || differ == 2 && a.len() == b.len())
    };
    KEYWORDS.into_iter().find(|known| close(known))
}

/// Splits the flags off that stand before anything else.
fn flags(text: &str, escape: char) -> Result<(Vec<Flag>, &str), String> {
    let mut flags = Vec::new();
    let mut rest = text;
    while rest.starts_with("--") {
        let end = flag_end(rest, escape);
        let (word, after) = rest.split_at(end);
        if word == "--" {
            return Ok((flags, after.trim_start()));
        }
        let plain = words::unquote(word, escape).ok_or_else(|| format!("a quote in {word} is not closed"))?;
        let plain = plain.strip_prefix("--").unwrap_or(&plain);
        let (name, value) = match plain.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (plain, None),
        };
        flags.push(Flag { name: name.to_owned(), value });
        rest = after.trim_start();
    }
    Ok((flags, rest))
}

fn flag_end(text: &str, escape: char) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, letter) in text.char_indices() {
        match quote {
            _ if escaped => escaped = false,
            None if letter.is_whitespace() => return at,
            None if letter == '\'' || letter == '"' => quote = Some(letter),
            Some(open) if letter == open => quote = None,
            _ => escaped = letter == escape && quote != Some('\''),
        }
    }
    text.len()
}

/// A JSON array of strings, and nothing else.
fn json(text: &str) -> Option<Vec<String>> {
    text.starts_with('[').then(|| serde_json::from_str(text).ok()).flatten()
}

fn command(text: &str) -> Command {
    json(text).map_or_else(|| Command::Shell(text.to_owned()), Command::Exec)
}

/// For what needs something to run.
fn some_command(text: &str) -> Result<Command, String> {
    match command(text) {
        Command::Exec(words) if words.is_empty() => Err("the array has no command in it".into()),
        command => Ok(command),
    }
}

fn from(flags: &[Flag], rest: &str) -> Result<Instruction, String> {
    let mut platform = None;
    for flag in flags {
        match (flag.name.as_str(), &flag.value) {
            ("platform", Some(value)) => platform = Some(value.clone()),
            _ => return Err(format!("FROM has no option --{}; it has --platform=", flag.name)),
        }
    }
    let words: Vec<&str> = rest.split_whitespace().collect();
    let (base, name) = match words.as_slice() {
        [base] => (*base, None),
        [base, word, name] if word.eq_ignore_ascii_case("AS") => (*base, Some(name.to_ascii_lowercase())),
        _ => return Err("write FROM IMAGE, or FROM IMAGE AS NAME".into()),
    };
    if let Some(name) = &name {
        let is_name = name.starts_with(|first: char| first.is_ascii_lowercase())
            && name.chars().all(|letter| letter.is_ascii_alphanumeric() || "_.-".contains(letter));
        if !is_name {
            return Err(format!(
                "{name:?} cannot name a stage: a letter, and then letters, digits, `_`, `.` and `-`"
            ));
        }
    }
    Ok(Instruction::From { base: base.to_owned(), platform, name })
}

/// `NAME=VALUE…`, or the older `NAME VALUE` in which the rest is the value.
fn pairs(rest: &str, escape: char, keyword: &str) -> Result<Vec<(String, String)>, String> {
    let words = words::raw(rest, escape);
    if !words.first().is_some_and(|first| first.contains('=')) {
        let Some((name, value)) = rest.split_once(char::is_whitespace) else {
            return Err(format!("{keyword} {rest} has no value; write NAME=VALUE"));
        };
        return Ok(vec![(name.to_owned(), value.trim_start().to_owned())]);
    }
    let pair = |word: &String| {
        let bad = || format!("`{word}` is no NAME=VALUE; a value with blanks needs quotes");
        word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())).ok_or_else(bad)
    };
    words.iter().map(pair).collect()
}

fn arguments(rest: &str, escape: char) -> Result<Vec<(String, Option<String>)>, String> {
    let argument = |word: &String| {
        let (name, default) = match word.split_once('=') {
            Some((name, default)) => (name, Some(default.to_owned())),
            None => (word.as_str(), None),
        };
        let is_name = name.starts_with(|first: char| first == '_' || first.is_ascii_alphabetic())
            && name.chars().all(|letter| {
                letter == '_' || letter == '.' || letter == '-' || letter.is_ascii_alphanumeric()
            });
        if !is_name {
            return Err(format!("`{word}` is no argument; write NAME or NAME=DEFAULT"));
        }
        Ok((name.to_owned(), default))
    };
    words::raw(rest, escape).iter().map(argument).collect()
}

fn transfer(
    keyword: &str,
    flags: &[Flag],
    rest: &str,
    heredocs: Vec<Heredoc>,
    escape: char,
) -> Result<Instruction, String> {
    let is_add = keyword == "ADD";
    let mut made = Transfer { is_add, ..Transfer::default() };
    for flag in flags {
        let needed = || flag.value.clone().ok_or_else(|| format!("--{} needs a value", flag.name));
        match flag.name.as_str() {
            "from" if !is_add => made.from = Some(needed()?),
            "chown" => made.chown = Some(needed()?),
            "chmod" => made.chmod = Some(needed()?),
            "link" => made.link = truth(flag)?,
            "exclude" => made.exclude.push(needed()?),
            "parents" if !is_add => made.parents = truth(flag)?,
            "checksum" if is_add => made.checksum = Some(needed()?),
            "unpack" if is_add => made.unpack = Some(truth(flag)?),
            other => return Err(format!("{keyword} has no option --{other} here")),
        }
    }
    let (mut words, is_json) = match json(rest) {
        Some(words) => (words, true),
        None => (words::raw(rest, escape), false),
    };
    let target = words.pop().filter(|_| !words.is_empty());
    made.target = target.ok_or_else(|| format!("{keyword} needs a source and a target"))?;
    made.is_json = is_json;
    let mut heredocs = heredocs.into_iter();
    for word in words {
        made.sources.push(match super::lines::heredoc(&word, escape) {
            Some(_) if !is_json => match heredocs.next() {
                Some(heredoc) => TransferSource::Heredoc(heredoc),
                None => return Err(format!("the heredoc {word} has no text")),
            },
            _ => TransferSource::Path(word),
        });
    }
    if heredocs.next().is_some() {
        return Err("the target cannot be a heredoc".into());
    }
    Ok(Instruction::Transfer(made))
}

fn truth(flag: &Flag) -> Result<bool, String> {
    match flag.value.as_deref() {
        None | Some("true" | "1") => Ok(true),
        Some("false" | "0") => Ok(false),
        Some(other) => Err(format!("--{}={other} is neither true nor false", flag.name)),
    }
}

fn health_check(flags: &[Flag], rest: &str) -> Result<Instruction, String> {
    let (kind, command_line) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let mut made = HealthCheck { command: None, times_ns: [None; 4], retries: None };
    if kind.eq_ignore_ascii_case("NONE") {
        if !flags.is_empty() || !command_line.trim().is_empty() {
            return Err("HEALTHCHECK NONE takes nothing more".into());
        }
        return Ok(Instruction::HealthCheck(made));
    }
    if !kind.eq_ignore_ascii_case("CMD") || command_line.trim().is_empty() {
        return Err("write HEALTHCHECK NONE, or HEALTHCHECK [OPTIONS] CMD COMMAND".into());
    }
    const TIMES: [&str; 4] = ["interval", "timeout", "start-period", "start-interval"];
    for flag in flags {
        let value = flag.value.as_deref().ok_or_else(|| format!("--{} needs a value", flag.name))?;
        let place = TIMES.iter().position(|known| *known == flag.name);
        match place.and_then(|place| made.times_ns.get_mut(place)) {
            Some(time) => {
                let ns = duration_ns(value);
                let ns =
                    ns.ok_or_else(|| format!("--{}={value} is no time; write 30s or 1m30s", flag.name))?;
                // Docker's own bound; 0 stands for its default.
                if ns != 0 && ns < 1_000_000 {
                    return Err(format!("--{}={value} is less than 1 ms", flag.name));
                }
                *time = Some(ns);
            }
            None if flag.name == "retries" => {
                let retries = value.parse().ok().filter(|retries| *retries <= i32::MAX as u32);
                made.retries =
                    Some(retries.ok_or_else(|| format!("--retries={value} is no number from 0 on"))?);
            }
            None => return Err(format!("HEALTHCHECK has no option --{}", flag.name)),
        }
    }
    made.command = Some(some_command(command_line.trim())?);
    Ok(Instruction::HealthCheck(made))
}

/// Go's notation: `1h2m3.5s`, with ms, us, µs and ns.
fn duration_ns(text: &str) -> Option<u64> {
    if text == "0" {
        return Some(0);
    }
    let mut rest = text;
    let mut sum = 0f64;
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
        let (number, after) = rest.split_at(digits);
        let unit_end = after.find(|letter: char| letter.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let factor = match unit {
            "h" => 3600e9,
            "m" => 60e9,
            "s" => 1e9,
            "ms" => 1e6,
            "us" | "µs" => 1e3,
            "ns" => 1.0,
            _ => return None,
        };
        sum += number.parse::<f64>().ok()? * factor;
        rest = after;
    }
    (!text.is_empty() && sum.is_finite() && sum < i64::MAX as f64).then_some(sum.round() as u64)
}

fn on_build(line: Line) -> Result<Instruction, String> {
    let rest = line.text.split_once(char::is_whitespace).map_or("", |(_, rest)| rest).trim();
    let keyword = rest.split(char::is_whitespace).next().unwrap_or_default().to_ascii_uppercase();
    if ["ONBUILD", "FROM", "MAINTAINER"].contains(&keyword.as_str()) {
        return Err(format!("{keyword} cannot be a trigger"));
    }
    // What it says is looked at now, so that the image it ends up in can be built on.
    let mut trigger = rest.to_owned();
    for heredoc in &line.heredocs {
        trigger.push('\n');
        trigger.push_str(&heredoc.content);
        trigger.push_str(&heredoc.name);
    }
    let inner = Line { place: line.place.clone(), text: rest.to_owned(), heredocs: line.heredocs };
    parse(inner, '\\')?;
    Ok(Instruction::OnBuild(trigger))
}
