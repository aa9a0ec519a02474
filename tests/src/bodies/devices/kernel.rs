//! Kernel files.

use std::fs;

use anyhow::Context as _;
use serde_json::json;

use crate::bed::Bed;
use crate::guest::Guest;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[body!(vmlinux_without_a_pvh_entry_boots).only(Isolation::Vm)];

/// As kernels that are built for Firecracker may be: of ours, the note that tells of the PVH entry gets another type.
fn vmlinux_without_a_pvh_entry_boots(bed: &Bed) -> Story {
    const PVH_ENTRY: u32 = 18;
    const NONE: u32 = 99;
    let path = bed.run(&["kernel", "path"])?.succeeds()?.out();
    let mut kernel = fs::read(path.trim_end())?;
    // The name's length, the entry's, the type, the name.
    let note = [&[PVH_ENTRY.to_le_bytes()][..], &[*b"Xen\0"]].concat().concat();
    let at = kernel.windows(note.len()).position(|bytes| bytes == note).context("it has no PVH entry")?;
    kernel[at..at + 4].copy_from_slice(&NONE.to_le_bytes());
    let copy = bed.write("vmlinux", &kernel)?;
    let ran = Guest::new(bed)?.with(json!({ "kernel": copy, "vcpus": 2 })).run("echo processors $(nproc)")?;
    ran.passes()?.prints("processors 2")
}
