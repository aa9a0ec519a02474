//! `--trace`: every phase of a start, on one clock.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::bed::Bed;
use crate::finished::Finished;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(trace_has_every_mark_in_order),
    body!(trace_of_a_silent_process_lacks_first_output_only),
    body!(trace_table_names_the_phases),
    body!(trace_is_kept_out_of_stdout),
];

const CONTAINER: &[&str] = &[
    "cli-exec",
    "image-ready",
    "rootfs-ready",
    "network-ready",
    "process-start",
    "first-output",
    "process-exit",
    "exit",
    "teardown-done",
];
const VM: &[&str] = &[
    "cli-exec",
    "image-ready",
    "rootfs-ready",
    "network-ready",
    "vmm-spawned",
    "first-guest-instruction",
    "kernel-to-init",
    "agent-ready",
    "process-start",
    "first-output",
    "process-exit",
    "exit",
    "teardown-done",
];

fn expected(isolation: Isolation) -> &'static [&'static str] {
    match isolation {
        Isolation::Container => CONTAINER,
        Isolation::Vm => VM,
    }
}

/// Names and times of the one trace on stderr.
fn marks(finished: &Finished) -> Result<(String, Vec<(String, u64)>)> {
    let err = finished.err();
    let mut traces = err.lines().filter(|line| line.starts_with(r#"{"trace":"#));
    let (trace, none) = (traces.next(), traces.next());
    ensure!(none.is_none(), "more than one trace\n{finished}");
    let document: Value = serde_json::from_str(trace.with_context(|| format!("no trace\n{finished}"))?)?;
    let trace = &document["trace"];
    let isolation = trace["isolation"].as_str().context("a trace says its isolation")?;
    let marks = trace["marks"].as_array().context("a trace has marks")?;
    let read = |mark: &Value| Some((mark["name"].as_str()?.to_owned(), mark["ns"].as_u64()?));
    let marks: Option<Vec<_>> = marks.iter().map(read).collect();
    Ok((isolation.to_owned(), marks.context("a mark has a name and a time")?))
}

fn trace_has_every_mark_in_order(bed: &Bed) -> Story {
    let finished = bed.busybox().option("--trace=json").command(&["echo", "hi"]).run()?.succeeds()?;
    let (isolation, marks) = marks(&finished)?;
    ensure!(isolation == bed.isolation().as_str(), "the trace is of a {isolation}");
    ensure!(marks.is_sorted_by_key(|(_, ns)| *ns), "times go backwards: {marks:?}");
    // `first-output` and `process-exit` race by nature: the pipe is read after it is written.
    let fixed = |name: &&str| *name != "first-output";
    let expected: Vec<&str> = expected(bed.isolation()).iter().copied().filter(fixed).collect();
    let seen: Vec<&str> =
        marks.iter().map(|(name, _)| name.as_str()).filter(|name| expected.contains(name)).collect();
    ensure!(seen == expected, "expected {expected:?}\nin order, saw {marks:?}");
    ensure!(marks.iter().any(|(name, _)| name == "first-output"), "first-output is missing: {marks:?}");
    Ok(())
}

fn trace_of_a_silent_process_lacks_first_output_only(bed: &Bed) -> Story {
    let finished = bed.busybox().option("--trace=json").command(&["true"]).run()?.succeeds()?;
    let (_, marks) = marks(&finished)?;
    let has = |name: &str| marks.iter().any(|(known, _)| known == name);
    ensure!(!has("first-output"), "there was no output: {marks:?}");
    for name in expected(bed.isolation()).iter().filter(|name| **name != "first-output") {
        ensure!(has(name), "{name} is missing: {marks:?}");
    }
    Ok(())
}

fn trace_table_names_the_phases(bed: &Bed) -> Story {
    let finished =
        bed.busybox().option("--trace").command(&["echo", "hi"]).run()?.succeeds()?.prints("hi\n")?;
    for name in expected(bed.isolation()) {
        ensure!(finished.err().contains(name), "{name} is not in the table\n{finished}");
    }
    Ok(())
}

fn trace_is_kept_out_of_stdout(bed: &Bed) -> Story {
    let finished = bed.busybox().option("--trace=json").sh("echo out; echo err >&2; exit 3").run()?;
    let finished = finished.exits_with(3)?.prints("out\n")?;
    ensure!(finished.err().starts_with("err\n"), "the process's own stderr comes first\n{finished}");
    marks(&finished)?;
    Ok(())
}
