//! Patterns for names: those of COPY, which are Go's `path/filepath.Match`, and those of `.dockerignore`.
//!
//! Both are matched by filling a table of pattern × name, so no pattern takes longer than their product.

/// A pattern that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the pattern {0:?} is malformed: {1}")]
pub struct PatternError(String, &'static str);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Letter(char),
    /// `?`
    One,
    /// `[a-z]`, or all but these.
    Class {
        ranges: Vec<(char, char)>,
        negated: bool,
    },
    /// `*`, within a component.
    Star,
    /// `**/`: nothing, or any directories.
    Directories,
    /// `**` at the end: anything.
    Anything,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Glob(Vec<Piece>);

impl Glob {
    /// With `deep`, `**` goes through directories; without, it is two stars.
    fn parse(text: &str, deep: bool) -> Result<Glob, PatternError> {
        let bad = |problem| PatternError(text.to_owned(), problem);
        let mut pieces = Vec::new();
        let mut letters = text.chars().peekable();
        while let Some(letter) = letters.next() {
            pieces.push(match letter {
                '*' if deep && letters.next_if_eq(&'*').is_some() => {
                    let _ = letters.next_if_eq(&'/');
                    match letters.peek() {
                        Some(_) => Piece::Directories,
                        None => Piece::Anything,
                    }
                }
                '*' => Piece::Star,
                '?' => Piece::One,
                '\\' => Piece::Letter(letters.next().ok_or_else(|| bad("a backslash ends it"))?),
                '[' => {
                    let negated = letters.next_if_eq(&'^').is_some();
                    let mut ranges = Vec::new();
                    loop {
                        let open = || bad("a bracket is not closed");
                        let low = match letters.next() {
                            Some('\\') => letters.next().ok_or_else(open)?,
                            Some(']') if ranges.is_empty() => {
                                return Err(bad("there is nothing in the brackets"));
                            }
                            low => low.ok_or_else(open)?,
                        };
                        let high = match letters.next_if_eq(&'-') {
                            Some(_) => match letters.next() {
                                Some('\\') => letters.next().ok_or_else(open)?,
                                Some(']') | None => return Err(open()),
                                Some(high) => high,
                            },
                            None => low,
                        };
                        ranges.push((low, high));
                        if letters.next_if_eq(&']').is_some() {
                            break;
                        }
                    }
                    Piece::Class { ranges, negated }
                }
                letter => Piece::Letter(letter),
            });
        }
        Ok(Glob(pieces))
    }

    fn matches(&self, name: &str) -> bool {
        let letters: Vec<char> = name.chars().collect();
        // Whether the pieces behind match what starts at each letter; the last place is the name's end.
        let mut behind = vec![false; letters.len() + 1];
        if let Some(end) = behind.last_mut() {
            *end = true;
        }
        for piece in self.0.iter().rev() {
            let mut here = vec![false; behind.len()];
            // Of `**/`: whether it matches inside of a component.
            let mut inside = false;
            for at in (0..behind.len()).rev() {
                let letter = letters.get(at).copied();
                let of = |row: &[bool], at: usize| row.get(at).copied().unwrap_or(false);
                let skipped = of(&behind, at);
                let (next_here, next_behind) = (of(&here, at + 1), of(&behind, at + 1));
                let matched = match (piece, letter) {
                    (Piece::Star, Some(letter)) => skipped || letter != '/' && next_here,
                    (Piece::Anything, Some(_)) => skipped || next_here,
                    (Piece::Directories, Some(letter)) => {
                        inside = inside || letter == '/' && next_behind;
                        skipped || inside
                    }
                    (Piece::Star | Piece::Anything | Piece::Directories, None) => skipped,
                    (Piece::Letter(known), Some(letter)) => *known == letter && next_behind,
                    (Piece::One, Some(letter)) => letter != '/' && next_behind,
                    (Piece::Class { ranges, negated }, Some(letter)) => {
                        let within = ranges.iter().any(|(low, high)| (*low..=*high).contains(&letter));
                        letter != '/' && within != *negated && next_behind
                    }
                    (Piece::Letter(_) | Piece::One | Piece::Class { .. }, None) => false,
                };
                if let Some(place) = here.get_mut(at) {
                    *place = matched;
                }
            }
            behind = here;
        }
        behind.first() == Some(&true)
    }
}

/// A pattern of COPY or ADD, for a path from the context's root.
#[derive(Debug, Clone)]
pub struct PathPattern(Glob);

impl PathPattern {
    /// Reads a pattern.
    pub fn parse(text: &str) -> Result<PathPattern, PatternError> {
        Glob::parse(text, false).map(PathPattern)
    }

    /// Whether a path is meant, all of it.
    pub fn matches(&self, path: &str) -> bool {
        self.0.matches(path)
    }

    /// Whether a text is a pattern at all.
    pub fn is_pattern(text: &str) -> bool {
        text.contains(['*', '?', '[', '\\'])
    }
}

/// What `.dockerignore`, or `--exclude`, leaves out.
#[derive(Debug, Clone, Default)]
pub struct Ignore {
    /// With whether they bring back what earlier ones leave out.
    patterns: Vec<(Glob, bool)>,
}

impl Ignore {
    /// Reads a `.dockerignore`.
    pub fn parse(text: &str) -> Result<Ignore, PatternError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        Ignore::of(text.lines().filter(|line| !line.starts_with('#')))
    }

    /// Reads patterns.
    pub fn of<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Ignore, PatternError> {
        let mut patterns = Vec::new();
        for line in lines {
            let line = line.trim();
            let (line, brings_back) = match line.strip_prefix('!') {
                Some(rest) => (rest.trim(), true),
                None => (line, false),
            };
            let cleaned = clean(line);
            if !cleaned.is_empty() {
                patterns.push((Glob::parse(&cleaned, true)?, brings_back));
            }
        }
        Ok(Ignore { patterns })
    }

    /// Whether a path, without a slash in front, is left out. A pattern that matches a directory means all in it.
    pub fn matches(&self, path: &str) -> bool {
        let ends = path.char_indices().filter(|(_, letter)| *letter == '/').map(|(at, _)| at);
        let prefixes: Vec<&str> =
            ends.chain([path.len()]).map(|end| path.get(..end).unwrap_or_default()).collect();
        let mut ignored = false;
        for (glob, brings_back) in &self.patterns {
            // Only what would change the answer is looked at.
            if ignored == *brings_back && prefixes.iter().any(|prefix| glob.matches(prefix)) {
                ignored = !brings_back;
            }
        }
        ignored
    }

    /// Whether something below a directory that is left out may be wanted all the same.
    pub fn brings_back(&self) -> bool {
        self.patterns.iter().any(|(_, brings_back)| *brings_back)
    }
}

/// Go's `filepath.Clean`, without a slash in front.
fn clean(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." if kept.last().is_some_and(|last| *last != "..") => {
                kept.pop();
            }
            name => kept.push(name),
        }
    }
    kept.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_patterns_are_those_of_go() {
        // From the documentation of `path/filepath.Match`, and its corner cases.
        for (pattern, name, expected) in [
            ("abc", "abc", true),
            ("*", "abc", true),
            ("*c", "abc", true),
            ("a*", "ab/c", false),
            ("a*/b", "abc/b", true),
            ("a*b*c*d*e*/f", "axbxcxdxexxx/f", true),
            ("a*b*c*d*e*/f", "axbxcxdxexxx/fff", false),
            ("a*b?c*x", "abxbbxdbxebxczzy", false),
            ("ab[c]", "abc", true),
            ("ab[e-g]", "abf", true),
            ("ab[^c]", "abc", false),
            ("ab[^e-g]", "abz", true),
            ("a\\*b", "a*b", true),
            ("a?b", "aüb", true),
            ("a?b", "a/b", false),
            ("a[^a]b", "a/b", false),
            ("[\\]a]", "]", true),
            ("[\\-x]", "-", true),
            ("**", "a/b", false),
        ] {
            assert_eq!(PathPattern::parse(pattern).unwrap().matches(name), expected, "{pattern} {name}");
        }
        for bad in ["[]a]", "[a", "[a-", "a\\", "[-", "[^"] {
            assert!(PathPattern::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ignore_file_follows_docker() {
        let ignore = Ignore::parse(
            "# remark\n*.md\n!README.md\n/target/\n**/*.o\nsrc/**/gen\n docs/* \n!docs/keep\nexact\na/../b\n",
        )
        .unwrap();
        for (path, expected) in [
            ("x.md", true),
            ("README.md", false),
            ("sub/x.md", false),
            ("target", true),
            ("target/debug/x", true),
            ("x.o", true),
            ("a/b/x.o", true),
            ("src/gen", true),
            ("src/a/b/gen/x", true),
            ("docs/x", true),
            ("docs/keep", false),
            ("docs", false),
            ("exactly", false),
            ("b", true),
            ("# remark", false),
        ] {
            assert_eq!(ignore.matches(path), expected, "{path}");
        }
        assert!(ignore.brings_back());
    }

    #[test]
    fn everything_but_one_is_a_common_way_to_ignore() {
        let ignore = Ignore::parse("**\n!src\n!a/b/c\n").unwrap();
        for (path, expected) in
            [("x", true), ("x/y", true), ("src", false), ("src/a", false), ("a/b/c", false), ("a/b/d", true)]
        {
            assert_eq!(ignore.matches(path), expected, "{path}");
        }
    }

    #[test]
    fn hostile_pattern_takes_no_longer_than_its_length() {
        let pattern = "*a".repeat(2000);
        assert!(!PathPattern::parse(&pattern).unwrap().matches(&"a".repeat(1999)));
        let ignore = Ignore::parse(&"**/".repeat(1000)).unwrap();
        ignore.matches(&"a/".repeat(1000));
    }
}
