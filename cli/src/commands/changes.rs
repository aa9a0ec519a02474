//! Commands about what sandboxes have changed: `commit`, `diff`, `export`.

use std::{
    io::{self, BufWriter, Write},
    process::ExitCode,
};

use anyhow::{Context, ensure};
use cloche_images::{Difference, Reference};

use super::{
    home,
    image::{store, write_archive},
    reconciled,
};
use crate::arguments::{Commit, Diff, Export, Global};

/// Makes an image of a sandbox.
pub fn commit(global: &Global, arguments: &Commit) -> anyhow::Result<ExitCode> {
    let name = arguments.name.as_deref().map(str::parse::<Reference>).transpose()?;
    let has_digest = name.as_ref().is_some_and(|name| name.digest().is_some());
    ensure!(!has_digest, "a name that is given to an image has a tag, and no digest");
    let changes = reconciled(&home(global)?)?.changes(&arguments.sandbox, arguments.pause.pause)?;
    let record = changes.record.clone();
    let commit = cloche_images::Commit {
        image: &record.image_id,
        sandbox: &record.id,
        settings: &record.settings,
        name: name.as_ref(),
        changes: &arguments.change,
        author: &arguments.author,
        message: &arguments.message,
    };
    let committed = store(global)?.commit_sandbox(changes, &commit);
    println!("{}", committed.with_context(|| format!("cannot commit sandbox {}", record.id))?);
    Ok(ExitCode::SUCCESS)
}

/// Lists what a sandbox has changed.
pub fn diff(global: &Global, arguments: &Diff) -> anyhow::Result<ExitCode> {
    let changes = reconciled(&home(global)?)?.changes(&arguments.sandbox, false)?;
    let image = changes.record.image_id.clone();
    let mut output = BufWriter::new(io::stdout().lock());
    for (path, difference) in store(global)?.diff_sandbox(&image, changes)? {
        let letter = match difference {
            Difference::Added => 'A',
            Difference::Changed => 'C',
            Difference::Deleted => 'D',
        };
        // A name may be made to steer a terminal.
        writeln!(output, "{letter} /{}", shown(&path))?;
    }
    output.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// A path as it is, but for what is no text or no letter.
fn shown(path: &[u8]) -> String {
    let mut text = String::new();
    for chunk in path.utf8_chunks() {
        for letter in chunk.valid().chars() {
            match letter.is_control() {
                true => text.extend(letter.escape_default()),
                false => text.push(letter),
            }
        }
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
    }
    text
}

/// Writes a sandbox's root file system to an archive.
pub fn export(global: &Global, arguments: &Export) -> anyhow::Result<ExitCode> {
    let (store, sandboxes) = (store(global)?, reconciled(&home(global)?)?);
    write_archive(arguments.output.as_deref(), |output| {
        let pause = arguments.pause.pause;
        cloche_engine::changes::export(&sandboxes, &store, &arguments.sandbox, pause, output)?;
        Ok(output.flush()?)
    })?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_shown_without_what_steers_a_terminal() {
        assert_eq!(shown("a/é b".as_bytes()), "a/é b");
        assert_eq!(shown(b"a\x1b[2J\xff\n"), "a\\u{1b}[2J\\xff\\n");
    }
}
