//! Persistent memory: files of the host in the guest's memory.

use std::fs;
use std::path::PathBuf;

use anyhow::ensure;
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::guest::Guest;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[body!(pmem_that_cannot_be_is_refused_by_name).only(Isolation::Vm)];

const MIB: usize = 1 << 20;

fn pmem(path: impl Into<PathBuf>, read_only: bool) -> Value {
    json!({ "path": path.into(), "read_only": read_only })
}

fn pmem_that_cannot_be_is_refused_by_name(bed: &Bed) -> Story {
    let odd = bed.write("odd", &vec![1; MIB])?;
    let holes = bed.scratch().join("holes");
    fs::File::create(&holes)?.set_len(16 << 20)?;
    for (path, read_only, problem) in [
        (odd, false, "its size is no multiple of 2 MiB from 16 MiB on"),
        (holes, false, "it has holes"),
        (PathBuf::from("/dev/null"), true, "neither a regular file nor a block device"),
        (bed.scratch().join("nowhere"), true, "No such file"),
    ] {
        let guest = Guest::new(bed)?.with(json!({ "pmems": [pmem(&path, read_only)] }));
        let ran = guest.run("true")?;
        let message = ran.last["message"].as_str().unwrap_or_default();
        ensure!(
            ran.last["step"] == "open"
                && message.contains(problem)
                && message.contains(&path.display().to_string()),
            "expected {problem:?}\n{}",
            ran.describe()
        );
    }
    Ok(())
}
