//! Commands about what sandboxes have changed: `commit`.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use cloche_images::Reference;

use super::{home, image::store, reconciled};
use crate::arguments::{Commit, Global};

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
