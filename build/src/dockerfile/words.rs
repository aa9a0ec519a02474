//! Quotes, escapes and `$variables`, as Dockerfiles have them: a shell's, but only these.
//!
//! `$name`, `${name}`, `${name:-word}` and its kin with `+` and `?`, `${name#pattern}` with `##`, `%`, `%%`, and
//! `${name/pattern/replacement}` with `//`. Patterns have `*`, `?` and the backslash.

use std::iter::Peekable;
use std::str::Chars;

/// A value of more is a mistake, or somebody doubling a variable line by line.
const MAX_EXPANDED_BYTES: usize = 1 << 20;
/// `${a:-${b:-${c…`.
const MAX_DEPTH: usize = 32;

/// Says what a variable's value is, if it has one.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Takes quotes and escapes away and puts values in, without splitting.
pub fn expand(text: &str, escape: char, lookup: Lookup<'_>) -> Result<String, String> {
    let mut lexer = Lexer { input: text.chars().peekable(), escape, lookup, bytes: 0 };
    Ok(lexer.until(None, 0)?.text)
}

/// As [`expand`], and splits at white space that is not quoted, that of values included.
pub fn expand_words(text: &str, escape: char, lookup: Lookup<'_>) -> Result<Vec<String>, String> {
    let mut lexer = Lexer { input: text.chars().peekable(), escape, lookup, bytes: 0 };
    Ok(lexer.until(None, 0)?.words())
}

/// A heredoc's text: values are put in, quotes are letters.
pub fn expand_heredoc(text: &str, escape: char, lookup: Lookup<'_>) -> Result<String, String> {
    let mut lexer = Lexer { input: text.chars().peekable(), escape, lookup, bytes: 0 };
    let mut out = String::new();
    while let Some(letter) = lexer.input.next() {
        match letter {
            '$' => out.push_str(&lexer.dollar(0)?),
            _ if letter == escape && matches!(lexer.input.peek(), Some('$')) => {
                out.extend(lexer.input.next());
            }
            _ => out.push(letter),
        }
        lexer.bound(out.len())?;
    }
    Ok(out)
}

/// A word without its quotes and escapes; nothing if a quote is not closed.
pub fn unquote(word: &str, escape: char) -> Option<String> {
    let mut out = String::new();
    let mut quote = None;
    let mut letters = word.chars();
    while let Some(letter) = letters.next() {
        match quote {
            Some(open) if letter == open => quote = None,
            Some('\'') => out.push(letter),
            _ if letter == escape => out.extend(letters.next()),
            None if letter == '\'' || letter == '"' => quote = Some(letter),
            _ => out.push(letter),
        }
    }
    quote.is_none().then_some(out)
}

/// Splits at white space that is neither quoted nor escaped; quotes and escapes stay.
pub fn raw(text: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match quote {
            None if letter.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            None if letter == '\'' || letter == '"' => quote = Some(letter),
            Some(open) if letter == open => quote = None,
            _ => {}
        }
        word.push(letter);
        if letter == escape && quote != Some('\'') {
            word.extend(letters.next());
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

struct Lexer<'a> {
    input: Peekable<Chars<'a>>,
    escape: char,
    lookup: Lookup<'a>,
    bytes: usize,
}

/// What was read: the text, and where its words end.
#[derive(Default)]
struct Read {
    text: String,
    /// Bytes of the text that are white space between words.
    splits: Vec<usize>,
    /// Where quotes make a word even if there is nothing in it.
    empty: Vec<usize>,
}

impl Read {
    fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        let mut start = 0;
        for &end in self.splits.iter().chain([&self.text.len()]) {
            let word = self.text.get(start..end).unwrap_or_default();
            if !word.is_empty() || self.empty.contains(&start) {
                words.push(word.to_owned());
            }
            let blank = self.text.get(end..).and_then(|rest| rest.chars().next());
            start = end + blank.map_or(0, char::len_utf8);
        }
        words
    }
}

impl Lexer<'_> {
    fn bound(&mut self, added: usize) -> Result<(), String> {
        if self.bytes + added > MAX_EXPANDED_BYTES {
            return Err(format!("with all variables replaced, it has more than {MAX_EXPANDED_BYTES} bytes"));
        }
        Ok(())
    }

    /// Reads up to `stop`, which is consumed, or to the end.
    fn until(&mut self, stop: Option<char>, depth: usize) -> Result<Read, String> {
        if depth > MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} substitutions inside each other"));
        }
        let mut read = Read::default();
        while let Some(&letter) = self.input.peek() {
            self.bound(read.text.len())?;
            self.input.next();
            match letter {
                _ if stop == Some(letter) => return Ok(read),
                '\'' => self.single_quoted(&mut read)?,
                '"' => self.double_quoted(&mut read, depth)?,
                '$' => {
                    let value = self.dollar(depth)?;
                    for letter in value.chars() {
                        read.push(letter, stop.is_none());
                    }
                }
                _ if letter == self.escape => match self.input.next() {
                    Some(next) => read.text.push(next),
                    // As the last letter it stands for itself.
                    None => read.text.push(letter),
                },
                _ => read.push(letter, stop.is_none()),
            }
        }
        match stop {
            Some(stop) => Err(format!("a substitution has no end; write {stop} behind it")),
            None => Ok(read),
        }
    }

    fn single_quoted(&mut self, read: &mut Read) -> Result<(), String> {
        let start = read.text.len();
        loop {
            match self.input.next() {
                None => return Err("a single quote (') is not closed".into()),
                Some('\'') => break,
                Some(letter) => read.text.push(letter),
            }
        }
        read.note_empty(start);
        Ok(())
    }

    fn double_quoted(&mut self, read: &mut Read, depth: usize) -> Result<(), String> {
        let start = read.text.len();
        loop {
            match self.input.next() {
                None => return Err("a double quote (\") is not closed".into()),
                Some('"') => break,
                Some('$') => {
                    let value = self.dollar(depth)?;
                    read.text.push_str(&value);
                    self.bound(read.text.len())?;
                }
                Some(letter) if letter == self.escape => match self.input.peek() {
                    Some(&next) if next == '"' || next == '$' || next == self.escape => {
                        read.text.extend(self.input.next());
                    }
                    Some(_) => read.text.push(letter),
                    None => return Err("a double quote (\") is not closed".into()),
                },
                Some(letter) => read.text.push(letter),
            }
        }
        read.note_empty(start);
        Ok(())
    }

    /// Behind a `$`.
    fn dollar(&mut self, depth: usize) -> Result<String, String> {
        if self.input.peek() != Some(&'{') {
            return Ok(match self.name() {
                name if name.is_empty() => "$".into(),
                name => self.value(&name)?.unwrap_or_default(),
            });
        }
        self.input.next();
        let name = self.name();
        if name.is_empty() {
            return Err("`${` is not followed by a variable's name".into());
        }
        let value = self.value(&name)?;
        let Some(operator) = self.input.next() else {
            return Err(format!("the substitution of {name} has no end; write }} behind it"));
        };
        match operator {
            '}' => Ok(value.unwrap_or_default()),
            ':' => {
                let operator = self.input.next().unwrap_or(' ');
                let value = value.filter(|value| !value.is_empty());
                self.default(&name, operator, ":", value, depth)
            }
            '-' | '+' | '?' => self.default(&name, operator, "", value, depth),
            '#' | '%' => {
                let greedy = self.input.next_if_eq(&operator).is_some();
                let pattern = self.pattern(&['}'], depth)?;
                self.input.next();
                let letters: Vec<char> = value.unwrap_or_default().chars().collect();
                Ok(pattern.strip(&letters, operator == '#', greedy))
            }
            '/' => {
                let all = self.input.next_if_eq(&'/').is_some();
                let pattern = self.pattern(&['/', '}'], depth)?;
                let replacement = match self.input.next() {
                    Some('/') => self.until(Some('}'), depth + 1)?.text,
                    _ => String::new(),
                };
                let letters: Vec<char> = value.unwrap_or_default().chars().collect();
                let replaced = pattern.replace(&letters, &replacement, all);
                self.bound(replaced.len())?;
                Ok(replaced)
            }
            other => Err(format!("{other:?} is no way to substitute {name}")),
        }
    }

    fn default(
        &mut self,
        name: &str,
        operator: char,
        colon: &str,
        value: Option<String>,
        depth: usize,
    ) -> Result<String, String> {
        if !"-+?".contains(operator) {
            return Err(format!("{:?} is no way to substitute {name}", format!("{colon}{operator}")));
        }
        let word = self.until(Some('}'), depth + 1)?.text;
        match (operator, value) {
            ('-', value) => Ok(value.unwrap_or(word)),
            ('+', Some(_)) => Ok(word),
            ('+', None) => Ok(String::new()),
            (_, Some(value)) => Ok(value),
            (_, None) if word.is_empty() => Err(format!("the variable {name} must have a value")),
            (_, None) => Err(format!("the variable {name} must have a value: {word}")),
        }
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        match self.input.peek() {
            Some(&first) if first == '_' || first.is_ascii_alphabetic() => {
                while let Some(letter) =
                    self.input.next_if(|letter| *letter == '_' || letter.is_ascii_alphanumeric())
                {
                    name.push(letter);
                }
            }
            Some(first) if first.is_ascii_digit() => {
                while let Some(letter) = self.input.next_if(char::is_ascii_digit) {
                    name.push(letter);
                }
            }
            // A shell's own, which have no value here.
            Some(first) if "@*#?-$!".contains(*first) => name.extend(self.input.next()),
            _ => {}
        }
        name
    }

    fn value(&mut self, name: &str) -> Result<Option<String>, String> {
        let value = (self.lookup)(name);
        let added = value.as_ref().map_or(0, String::len);
        self.bound(added)?;
        self.bytes += added;
        Ok(value)
    }

    /// A pattern, up to one of these, which is left.
    fn pattern(&mut self, stops: &[char], depth: usize) -> Result<Pattern, String> {
        let mut pattern = Vec::new();
        loop {
            match self.input.peek().copied() {
                None => return Err("a substitution has no end; write } behind it".into()),
                Some(letter) if stops.contains(&letter) => return Ok(Pattern(pattern)),
                Some(letter) => {
                    self.input.next();
                    match letter {
                        '*' => pattern.push(Piece::Any),
                        '?' => pattern.push(Piece::One),
                        '\\' => pattern.push(Piece::Letter(self.input.next().unwrap_or('\\'))),
                        '$' => pattern.extend(self.dollar(depth + 1)?.chars().map(Piece::Letter)),
                        '\'' | '"' => {
                            let mut read = Read::default();
                            match letter {
                                '\'' => self.single_quoted(&mut read)?,
                                _ => self.double_quoted(&mut read, depth)?,
                            }
                            pattern.extend(read.text.chars().map(Piece::Letter));
                        }
                        letter => pattern.push(Piece::Letter(letter)),
                    }
                }
            }
        }
    }
}

impl Read {
    fn push(&mut self, letter: char, splits: bool) {
        if splits && letter.is_whitespace() {
            self.splits.push(self.text.len());
        }
        self.text.push(letter);
    }

    fn note_empty(&mut self, start: usize) {
        if self.text.len() == start {
            self.empty.push(start);
        }
    }
}

enum Piece {
    Letter(char),
    One,
    Any,
}

struct Pattern(Vec<Piece>);

impl Pattern {
    /// Lengths of the beginnings of `text` that match, ascending.
    fn prefixes(&self, text: &[char]) -> Vec<usize> {
        // Which places of the pattern can be reached after so many letters; no backtracking.
        let mut states = vec![false; self.0.len() + 1];
        if let Some(first) = states.first_mut() {
            *first = true;
        }
        self.close(&mut states);
        let mut found = Vec::new();
        for count in 0..=text.len() {
            if states.last() == Some(&true) {
                found.push(count);
            }
            let Some(letter) = text.get(count) else { break };
            let mut next = vec![false; states.len()];
            for (at, piece) in self.0.iter().enumerate() {
                if states.get(at) != Some(&true) {
                    continue;
                }
                let to = match piece {
                    Piece::Any => at,
                    Piece::One => at + 1,
                    Piece::Letter(known) if known == letter => at + 1,
                    Piece::Letter(_) => continue,
                };
                next.iter_mut().skip(to).take(1).for_each(|state| *state = true);
            }
            self.close(&mut next);
            if next.iter().all(|state| !state) {
                break;
            }
            states = next;
        }
        found
    }

    /// A star may stand for nothing.
    fn close(&self, states: &mut [bool]) {
        for (at, piece) in self.0.iter().enumerate() {
            if matches!(piece, Piece::Any) && states.get(at) == Some(&true) {
                states.iter_mut().skip(at + 1).take(1).for_each(|state| *state = true);
            }
        }
    }

    fn strip(&self, text: &[char], front: bool, greedy: bool) -> String {
        if front {
            let lengths = self.prefixes(text);
            let length = if greedy { lengths.last() } else { lengths.first() }.copied().unwrap_or(0);
            return text.get(length..).unwrap_or_default().iter().collect();
        }
        // Values are bounded and so are patterns; a suffix is a prefix of the letters from the back.
        let reversed: Vec<char> = text.iter().rev().copied().collect();
        let pieces = self.0.iter().rev().map(|piece| match piece {
            Piece::Letter(letter) => Piece::Letter(*letter),
            Piece::One => Piece::One,
            Piece::Any => Piece::Any,
        });
        let stripped = Pattern(pieces.collect()).strip(&reversed, true, greedy);
        stripped.chars().rev().collect()
    }

    fn replace(&self, text: &[char], replacement: &str, all: bool) -> String {
        let mut out = String::new();
        let mut at = 0;
        while at < text.len() {
            let rest = text.get(at..).unwrap_or_default();
            match self.prefixes(rest).last().copied().filter(|length| *length > 0) {
                Some(length) => {
                    out.push_str(replacement);
                    at += length;
                    if !all {
                        break;
                    }
                }
                None => {
                    out.extend(rest.first());
                    at += 1;
                }
            }
            if out.len() > MAX_EXPANDED_BYTES {
                // The caller's bound says so in words.
                return out;
            }
        }
        out.extend(text.get(at..).unwrap_or_default());
        out
    }
}
