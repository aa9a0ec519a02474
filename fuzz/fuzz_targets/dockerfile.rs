//! Any bytes as a Dockerfile, and as the patterns and variables in one.
//!
//! The language's modules are taken as they are: the rest of their crate needs an engine, which has no place here.
#![no_main]
#![allow(dead_code, unused_imports)]

#[path = "../../build/src/dockerfile/mod.rs"]
mod dockerfile;
#[path = "../../build/src/patterns.rs"]
mod patterns;

use dockerfile::{Dockerfile, Instruction, TransferSource, words};
use patterns::{Ignore, PathPattern};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let lookup = |name: &str| (name.len() % 2 == 0).then(|| name.repeat(3));
    let _ = words::expand_words(text, '\\', &lookup);
    let _ = words::expand_heredoc(text, '`', &lookup);
    let (pattern, name) = text.split_once('\n').unwrap_or((text, text));
    if let Ok(pattern) = PathPattern::parse(pattern) {
        pattern.matches(name);
    }
    if let Ok(ignore) = Ignore::parse(text) {
        ignore.matches(name);
    }
    let _ = Dockerfile::parse_trigger(text);
    let Ok(file) = Dockerfile::parse(text) else { return };
    for step in file.stages.iter().flat_map(|stage| &stage.steps) {
        assert!(step.place.line >= 1 && step.place.line <= text.lines().count());
        let _ = words::expand(&step.written, file.escape, &lookup);
        match &step.instruction {
            // What a base image hands on must be read by those who build on it.
            Instruction::OnBuild(trigger) if file.escape == '\\' => {
                Dockerfile::parse_trigger(trigger).expect("a trigger that was accepted is one");
            }
            Instruction::Transfer(transfer) => {
                for source in &transfer.sources {
                    if let TransferSource::Heredoc(heredoc) = source {
                        let _ = words::expand_heredoc(&heredoc.content, file.escape, &lookup);
                    }
                }
            }
            _ => {}
        }
    }
});
