//! Dockerfiles: text becomes instructions, each with the line that it starts on.
//!
//! ```text
//!   text ──▶ lines (directives, continuations, heredocs) ──▶ instruction (flags, words, forms) ──▶ Dockerfile
//!            words (quotes and $variables) is called later, when the variables are known
//! ```
//!
//! The language is that of <https://docs.docker.com/reference/dockerfile/>. What a Dockerfile says wrong is a
//! [`SyntaxError`] that has the line and its text; nothing here panics, and all of it is linear in the text.

mod instruction;
mod lines;
pub mod words;

use std::fmt;

pub use instruction::{Command, Flag, HealthCheck, Instruction, Transfer, TransferSource};
pub use lines::Heredoc;

/// A Dockerfile of more is none that anybody has written.
pub const MAX_BYTES: usize = 4 << 20;

/// Where an instruction stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The line it starts on, from 1.
    pub line: usize,
    /// That line.
    pub text: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 160;
        let mut letters = self.text.chars();
        let start: String = letters.by_ref().take(SHOWN).collect();
        let rest = if letters.next().is_some() { "…" } else { "" };
        write!(f, "line {}: {start}{rest}", self.line)
    }
}

/// What is wrong with a Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Dockerfile {place}\n  {problem}")]
pub struct SyntaxError {
    /// Where.
    pub place: Place,
    /// What.
    pub problem: String,
}

/// One instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Where it stands.
    pub place: Place,
    /// As it is written, continuations joined; for a step's title.
    pub written: String,
    /// What it says.
    pub instruction: Instruction,
}

/// From one FROM to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Where its FROM stands.
    pub place: Place,
    /// The base: an image, an earlier stage, or `scratch`. Not expanded.
    pub base: String,
    /// `--platform`. Not expanded.
    pub platform: Option<String>,
    /// `AS`, in lower case.
    pub name: Option<String>,
    /// What follows the FROM.
    pub steps: Vec<Step>,
}

/// A Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dockerfile {
    /// Backslash, or what the directive `escape` says.
    pub escape: char,
    /// ARGs before the first FROM: names and defaults, not expanded.
    pub arguments: Vec<(Place, String, Option<String>)>,
    /// In their order; at least one.
    pub stages: Vec<Stage>,
}

impl Dockerfile {
    /// Reads a Dockerfile.
    pub fn parse(text: &str) -> Result<Dockerfile, SyntaxError> {
        let lines = lines::split(text)?;
        let mut dockerfile = Dockerfile { escape: lines.escape, arguments: Vec::new(), stages: Vec::new() };
        for line in lines.lines {
            let place = line.place.clone();
            let fail = |problem: String| SyntaxError { place: place.clone(), problem };
            let written = line.text.clone();
            let instruction = instruction::parse(line, lines.escape).map_err(fail)?;
            match (instruction, dockerfile.stages.last_mut()) {
                (Instruction::From { base, platform, name }, _) => {
                    if let Some(name) = &name
                        && dockerfile.stages.iter().any(|stage| stage.name.as_ref() == Some(name))
                    {
                        return Err(fail(format!("there is an earlier stage called {name}")));
                    }
                    dockerfile.stages.push(Stage { place, base, platform, name, steps: Vec::new() });
                }
                (Instruction::Arg(pairs), None) => {
                    let named = pairs.into_iter().map(|(name, default)| (place.clone(), name, default));
                    dockerfile.arguments.extend(named);
                }
                (_, None) => {
                    return Err(fail(
                        "the first instruction must be FROM; only ARG may stand before it".into(),
                    ));
                }
                (instruction, Some(stage)) => stage.steps.push(Step { place, written, instruction }),
            }
        }
        if dockerfile.stages.is_empty() {
            let place = Place { line: 1, text: text.lines().next().unwrap_or_default().to_owned() };
            return Err(SyntaxError { place, problem: "there is no FROM in it".into() });
        }
        Ok(dockerfile)
    }

    /// Reads one trigger, as ONBUILD leaves it in an image.
    pub fn parse_trigger(text: &str) -> Result<Step, SyntaxError> {
        let place = Place { line: 0, text: text.lines().next().unwrap_or_default().to_owned() };
        let fail = |problem: &str| SyntaxError { place: place.clone(), problem: problem.into() };
        let lines = lines::split_plain(text)?;
        let mut lines = lines.lines.into_iter();
        let (Some(line), None) = (lines.next(), lines.next()) else {
            return Err(fail("a trigger is one instruction"));
        };
        let written = line.text.clone();
        let instruction = instruction::parse(line, '\\')
            .map_err(|problem| SyntaxError { place: place.clone(), problem })?;
        if matches!(instruction, Instruction::From { .. } | Instruction::OnBuild(_)) {
            return Err(fail("this instruction cannot be a trigger"));
        }
        Ok(Step { place, written, instruction })
    }
}

#[cfg(test)]
mod tests;
