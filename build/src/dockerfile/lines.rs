//! From text to logical lines: parser directives, comments, continuations, heredocs.

use super::{MAX_BYTES, Place, SyntaxError, words};

/// A text of several lines behind an instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heredoc {
    /// Its delimiter, which is a file's name where a file is made of it.
    pub name: String,
    /// The file descriptor before `<<`, 0 if none is.
    pub descriptor: u32,
    /// Whether variables in it are replaced: not if the delimiter is quoted.
    pub expand: bool,
    /// Its lines, without leading tabs if it was `<<-`.
    pub content: String,
}

/// One instruction's text.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) place: Place,
    /// Continuations joined, no white space around.
    pub(super) text: String,
    pub(super) heredocs: Vec<Heredoc>,
}

#[derive(Debug)]
pub(super) struct Lines {
    pub(super) escape: char,
    pub(super) lines: Vec<Line>,
}

/// A whole file.
pub(super) fn split(text: &str) -> Result<Lines, SyntaxError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let escape = directives(text)?;
    join(text, escape)
}

/// An instruction alone: what looks like a directive is a comment.
pub(super) fn split_plain(text: &str) -> Result<Lines, SyntaxError> {
    join(text, '\\')
}

/// The escape character, of the directives on top: `# name=value`, up to the first line that is none.
fn directives(text: &str) -> Result<char, SyntaxError> {
    let mut escape = None;
    let mut seen: Vec<String> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let Some((name, value)) = directive(line) else { break };
        let fail = |problem: String| {
            Err(SyntaxError { place: Place { line: index + 1, text: line.to_owned() }, problem })
        };
        if seen.contains(&name) {
            return fail(format!("the directive {name} stands here a second time"));
        }
        match name.as_str() {
            // A frontend to fetch, and a linter's settings: neither changes what the instructions mean.
            "syntax" | "check" => {}
            "escape" => match value {
                "\\" | "`" => escape = value.chars().next(),
                _ => return fail(format!("{value:?} cannot be the escape character; \\ and ` can")),
            },
            _ => break,
        }
        seen.push(name);
    }
    Ok(escape.unwrap_or('\\'))
}

fn directive(line: &str) -> Option<(String, &str)> {
    let (name, value) = line.trim_start().strip_prefix('#')?.split_once('=')?;
    let (name, value) = (name.trim(), value.trim());
    let is_name = name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.chars().all(|letter| letter.is_ascii_alphanumeric());
    (is_name && !value.is_empty()).then(|| (name.to_ascii_lowercase(), value))
}

fn join(text: &str, escape: char) -> Result<Lines, SyntaxError> {
    let mut lines = Vec::new();
    let mut source = text.split_inclusive('\n').enumerate();
    while let Some((index, raw)) = source.next() {
        let first = raw.trim();
        if first.is_empty() || first.starts_with('#') {
            continue;
        }
        let place = Place { line: index + 1, text: first.to_owned() };
        if text.len() > MAX_BYTES {
            let problem = format!("the file has {} bytes; at most {MAX_BYTES} are read", text.len());
            return Err(SyntaxError { place, problem });
        }
        let mut joined = String::new();
        let mut piece = trim_newline(raw).trim_start();
        loop {
            let Some(kept) = continued(piece, escape) else {
                joined.push_str(piece);
                break;
            };
            joined.push_str(kept);
            // Comments and empty lines between continued ones are not there.
            let next = source.by_ref().find(|(_, raw)| {
                let trimmed = raw.trim();
                !trimmed.is_empty() && !trimmed.starts_with('#')
            });
            match next {
                Some((_, raw)) => piece = trim_newline(raw),
                None => break,
            }
        }
        let joined = joined.trim().to_owned();
        if joined.contains('\0') {
            return Err(SyntaxError { place, problem: "there is a NUL byte in it".into() });
        }
        let mut heredocs = announced(&joined, escape);
        for (heredoc, chomp) in &mut heredocs {
            read_heredoc(heredoc, *chomp, &mut source)
                .map_err(|problem| SyntaxError { place: place.clone(), problem })?;
        }
        if !joined.is_empty() {
            let heredocs = heredocs.into_iter().map(|(heredoc, _)| heredoc).collect();
            lines.push(Line { place, text: joined, heredocs });
        }
    }
    Ok(Lines { escape, lines })
}

fn read_heredoc<'a>(
    heredoc: &mut Heredoc,
    chomp: bool,
    source: &mut impl Iterator<Item = (usize, &'a str)>,
) -> Result<(), String> {
    for (_, raw) in source {
        let line = if chomp { raw.trim_start_matches('\t') } else { raw };
        if trim_newline(line) == heredoc.name {
            return Ok(());
        }
        heredoc.content.push_str(line);
    }
    Err(format!("the heredoc has no end; write {} on a line of its own", heredoc.name))
}

fn trim_newline(line: &str) -> &str {
    let line = line.strip_suffix('\n').unwrap_or(line);
    line.strip_suffix('\r').unwrap_or(line)
}

/// What comes before the escape character at a line's end. Two of them are no continuation, and white space after one
/// does not count.
fn continued(line: &str, escape: char) -> Option<&str> {
    let kept = line.trim_end_matches([' ', '\t']).strip_suffix(escape)?;
    (!kept.ends_with(escape)).then_some(kept)
}

/// The heredocs that a line announces, empty yet, and whether tabs are taken from their lines.
fn announced(line: &str, escape: char) -> Vec<(Heredoc, bool)> {
    let mut rest = line;
    let keyword = loop {
        let (word, after) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        rest = after.trim_start();
        if !word.eq_ignore_ascii_case("ONBUILD") {
            break word;
        }
    };
    let takes = ["RUN", "COPY", "ADD"].iter().any(|known| keyword.eq_ignore_ascii_case(known));
    if !takes || !line.contains("<<") {
        return Vec::new();
    }
    words::raw(rest, escape).iter().filter_map(|word| heredoc(word, escape)).collect()
}

/// `[N]<<[-]NAME`, the name quoted or not.
pub(super) fn heredoc(word: &str, escape: char) -> Option<(Heredoc, bool)> {
    let (descriptor, rest) = word.split_once("<<")?;
    let descriptor = match descriptor {
        "" => 0,
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().ok()?,
        _ => return None,
    };
    let (chomp, name) = match rest.strip_prefix('-') {
        Some(name) => (true, name),
        None => (false, rest),
    };
    // `<<<` is a shell's here-string.
    if name.is_empty() || name.contains('<') {
        return None;
    }
    let plain = words::unquote(name, escape)?;
    if plain.is_empty() || plain.contains('\n') {
        return None;
    }
    let expand = plain == name;
    Some((Heredoc { name: plain, descriptor, expand, content: String::new() }, chomp))
}
