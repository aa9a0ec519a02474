//! Kernel files, and guests whose kernel or first process fails.

use std::fs;

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::bed::Bed;
use crate::guest::{Guest, Ran};
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(vmlinux_without_a_pvh_entry_boots).only(Isolation::Vm),
    body!(panic_of_the_kernel_ends_the_machine_and_is_told).only(Isolation::Vm),
    body!(kernel_that_finds_no_init_fails_a_run_with_its_own_words).only(Isolation::Vm),
    body!(guest_that_never_reports_is_ended).only(Isolation::Vm),
];

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

fn panic_of_the_kernel_ends_the_machine_and_is_told(bed: &Bed) -> Story {
    let no_init =
        Guest::new(bed)?.with(json!({ "cmdline_extra": "rdinit=/missing" })).run("echo never printed")?;
    panicked(&no_init, "no-init", "No working init found.")?;
    // The script itself is the first process; its status 7 is the second byte of the code, see wait(2).
    let no_more_init = Guest::new(bed)?
        .with(json!({ "cmdline_extra": "rdinit=/script" }))
        .run("#!/bin/busybox sh\nexit 7\n")?;
    panicked(&no_more_init, "init-died", "Attempted to kill init! exitcode=0x00000700")
}

/// Expects that the kernel panicked with this, and that its own words are there to be shown.
fn panicked(ran: &Ran, cause: &str, message: &str) -> Story {
    ensure!(ran.reason() == "kernel-panic", "the kernel was to panic\n{}", ran.describe());
    let reason = &ran.last["reason"];
    let told = reason["message"].as_str().unwrap_or_default();
    ensure!(reason["cause"] == cause && told.starts_with(message), "not so told\n{}", ran.describe());
    let line = format!("Kernel panic - not syncing: {message}");
    shows(ran, &line)
}

/// Expects this at the end of the console, in the last event as in the log.
fn shows(ran: &Ran, text: &str) -> Story {
    let tail = ran.last["console_tail"].as_str().unwrap_or_default();
    ensure!(tail.contains(text), "{text:?} is not in the event's tail {tail:?}\n{}", ran.describe());
    ensure!(ran.console.contains(text), "{text:?} is not in the log\n{}", ran.describe());
    Ok(())
}

/// What `cloche run` makes of it: of our kernel, each path that ends with `/init` gets another end, so that it does not
/// find the agent, which is `/init` of its initramfs, nor what it tries after that.
fn kernel_that_finds_no_init_fails_a_run_with_its_own_words(bed: &Bed) -> Story {
    const NAME: &[u8] = b"/init\0";
    let path = bed.run(&["kernel", "path"])?.succeeds()?.out();
    let mut kernel = fs::read(path.trim_end())?;
    let found: Vec<usize> = kernel
        .windows(NAME.len())
        .enumerate()
        .filter(|(_, bytes)| *bytes == NAME)
        .map(|(at, _)| at)
        .collect();
    ensure!(!found.is_empty(), "it has no name of a first process");
    for at in found {
        kernel[at..at + NAME.len()].copy_from_slice(b"/none\0");
    }
    let copy = bed.write("vmlinux", &kernel)?.to_string_lossy().into_owned();
    let run = bed.busybox().with("--kernel", &copy).command(&["true"]).run()?.refused_with(125)?;
    run.says("the guest kernel panicked")?
        .says("no program to start")?
        .says("guest console:")?
        .says("Kernel panic - not syncing: No working init found.")?;
    Ok(())
}

/// It runs and prints, but its agent is never ready, for it has none.
fn guest_that_never_reports_is_ended(bed: &Bed) -> Story {
    const PATIENCE_MS: u64 = 5000;
    let ran = Guest::new(bed)?
        .with(json!({ "start_timeout_ms": PATIENCE_MS }))
        .run("echo something else to do; exec sleep 100000")?;
    let reason = json!({ "kind": "start-timeout", "timeout_ms": PATIENCE_MS });
    ensure!(ran.last["reason"] == reason, "it was to be ended\n{}", ran.describe());
    ensure!(ran.status().is_none(), "the script came to its end\n{}", ran.describe());
    shows(&ran, "something else to do")
}
