//! The other commands: what they print, and that they agree with what runs.

use std::fs::File;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};

use crate::bed::Bed;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(two_sandboxes_live_side_by_side).rootless(),
    body!(isolation_shown_is_the_one_observed).rootless(),
    body!(required_isolation_holds_or_nothing_runs).rootless(),
    body!(ended_sandbox_stays_listed_until_removed).rootless(),
    body!(running_sandbox_is_removed_by_force_only).rootless(),
    body!(compare_measures_and_prints_json),
    body!(both_isolations_live_side_by_side).comparing_both(),
    body!(doctor_reports_json).once(),
    body!(help_and_completion_are_there).once(),
    body!(kernel_command_knows_its_kernel).only(Isolation::Vm),
    body!(reader_that_has_left_is_no_crash).once(),
    body!(statistics_without_a_reader_end).once(),
    body!(output_that_cannot_be_written_is_an_error).once(),
];

fn two_sandboxes_live_side_by_side(bed: &Bed) -> Story {
    let mut first =
        bed.busybox().held_input().with("--name", "first").sh("echo up; cat; hostname; exit 1").start()?;
    first.wait_for_stdout("up\n")?;
    let mut second =
        bed.busybox().held_input().with("--name", "second").sh("echo up; cat; exit 2").start()?;
    second.wait_for_stdout("up\n")?;
    let listed = bed.records()?;
    ensure!(listed.len() == 2, "two sandboxes run, these are listed: {listed:?}");
    ensure!(listed.iter().all(|record| record.status == "running"), "not all run: {listed:?}");
    first.write(b"to the first\n")?;
    second.write(b"to the second\n")?;
    second.wait()?.exits_with(2)?.prints("up\nto the second\n")?;
    let left = bed.record("first")?.context("the first is still listed")?;
    ensure!(left.status == "running", "the end of one changed the other: {left:?}");
    first.close_input();
    first.wait()?.exits_with(1)?.prints_some("up\nto the first\n")?;
    Ok(())
}

fn isolation_shown_is_the_one_observed(bed: &Bed) -> Story {
    let mut running = bed.busybox().held_input().with("--name", "seen").sh("echo up; cat").start()?;
    running.wait_for_stdout("up\n")?;
    let record = bed.record("seen")?.context("a running sandbox is listed")?;
    ensure!(record.isolation.as_deref() == Some(bed.isolation().as_str()), "not what runs: {record:?}");
    let listing = bed.run(&["ps"])?.succeeds()?;
    ensure!(listing.out().contains("seen") && listing.out().contains(bed.isolation().as_str()), "{listing}");
    running.close_input();
    running.wait()?.succeeds()?;
    Ok(())
}

fn required_isolation_holds_or_nothing_runs(bed: &Bed) -> Story {
    let own = bed.isolation().as_str();
    let other = match bed.isolation() {
        Isolation::Container => "vm",
        Isolation::Vm => "container",
    };
    bed.busybox().with("--require", own).command(&["echo", "ran"]).run()?.succeeds()?.prints("ran\n")?;
    let refused = bed.busybox().with("--require", other).command(&["echo", "ran"]).run()?;
    refused.refused_with(125)?.prints("")?.says("--require")?;
    Ok(())
}

fn ended_sandbox_stays_listed_until_removed(bed: &Bed) -> Story {
    bed.keeps_records();
    bed.busybox().kept("ended").sh("exit 7").run()?.exits_with(7)?;
    let record = bed.record("ended")?.context("without --rm the record stays")?;
    ensure!(record.status == "exited" && record.exit_code == Some(7), "not as it ended: {record:?}");
    let running_only = bed.run(&["ps"])?.succeeds()?;
    ensure!(!running_only.out().contains("ended"), "`ps` without -a lists the ended\n{running_only}");
    // The name is taken until then.
    bed.busybox().kept("ended").command(&["true"]).run()?.refused_with(125)?.says("ended")?;
    bed.run(&["rm", "ended"])?.succeeds()?;
    ensure!(bed.record("ended")?.is_none(), "the record is still there");
    bed.run(&["rm", "ended"])?.refused()?.says("ended")?;
    Ok(())
}

fn running_sandbox_is_removed_by_force_only(bed: &Bed) -> Story {
    let running = bed.busybox().with("--name", "busy").sh("echo up; sleep 100000").start()?;
    running.wait_for_stdout("up\n")?;
    bed.run(&["rm", "busy"])?.refused()?.says("running")?;
    bed.run(&["rm", "-f", "busy"])?.succeeds()?;
    running.wait()?.exits_with(137)?;
    ensure!(bed.record("busy")?.is_none(), "the record is still there");
    bed.is_clean()
}

fn compare_measures_and_prints_json(bed: &Bed) -> Story {
    let own = bed.isolation().as_str();
    let kinds = format!("process,{own}");
    let words = ["compare", "--isolation", &kinds, "-n", "2"];
    let report = bed.json(&[&words, &["--json", "busybox", "--", "true"][..]].concat())?;
    ensure!(report.to_string().contains(own), "the report lacks {own}: {report}");
    let table = bed.run(&[&words, &["busybox", "--", "true"][..]].concat())?.succeeds()?;
    let head = table.out().to_lowercase();
    ensure!(head.contains(own) && head.contains("process"), "the table lacks a column\n{table}");
    bed.is_clean()
}

fn both_isolations_live_side_by_side(bed: &Bed) -> Story {
    let mut running = Vec::new();
    for isolation in ["container", "vm"] {
        let sandbox = bed.busybox().isolation(Some(isolation)).with("--name", isolation).held_input();
        let sandbox = sandbox.sh("echo up; cat").start()?;
        sandbox.wait_for_stdout("up\n")?;
        running.push(sandbox);
    }
    for isolation in ["container", "vm"] {
        let record = bed.record(isolation)?.context("a running sandbox is listed")?;
        ensure!(record.isolation.as_deref() == Some(isolation), "not what runs: {record:?}");
    }
    for sandbox in running {
        sandbox.wait()?.succeeds()?;
    }
    Ok(())
}

fn doctor_reports_json(bed: &Bed) -> Story {
    // Its exit code says whether all is well, which is not this story's matter.
    let finished = bed.run(&["doctor", "--json"])?;
    let report: serde_json::Value =
        serde_json::from_slice(&finished.stdout).with_context(|| format!("not JSON\n{finished}"))?;
    ensure!(report.to_string().to_lowercase().contains("kvm"), "nothing about KVM in {report}");
    bed.run(&["doctor"])?.prints_some("KVM")?;
    Ok(())
}

fn help_and_completion_are_there(bed: &Bed) -> Story {
    let help = bed.run(&["--help"])?.succeeds()?;
    for command in ["run", "ps", "rm", "image", "kernel", "compare", "doctor", "completion"] {
        ensure!(help.out().contains(command), "{command} is not in the help\n{help}");
    }
    let run_help = bed.run(&["run", "--help"])?.succeeds()?;
    run_help.prints_some("--isolation")?.prints_some("--require")?;
    for shell in ["bash", "zsh", "fish"] {
        bed.run(&["completion", shell])?.succeeds()?.prints_some("cloche")?;
    }
    bed.run(&["--version"])?.succeeds()?.prints_some("cloche ")?;
    Ok(())
}

fn kernel_command_knows_its_kernel(bed: &Bed) -> Story {
    let path = bed.run(&["kernel", "path"])?.succeeds()?.out();
    let path = path.trim_end();
    ensure!(std::path::Path::new(path).is_file(), "`kernel path` prints {path:?}, which is no file");
    bed.run(&["kernel", "ls"])?.succeeds()?;
    bed.busybox()
        .with("--kernel", path)
        .command(&["echo", "booted"])
        .run()?
        .succeeds()?
        .prints("booted\n")?;
    Ok(())
}

fn reader_that_has_left_is_no_crash(bed: &Bed) -> Story {
    let mut child =
        bed.cloche().args(["image", "ls"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // Gone before the first word; both of them, since a complaint has nowhere to go either.
    drop((child.stdout.take(), child.stderr.take()));
    let status = child.wait()?;
    ensure!(status.success(), "`cloche image ls | true` ended with {status}");
    Ok(())
}

fn statistics_without_a_reader_end(bed: &Bed) -> Story {
    let mut child = bed.cloche().arg("stats").stdout(Stdio::piped()).spawn()?;
    drop(child.stdout.take());
    while child.try_wait()?.is_none() {
        if Instant::now() >= bed.deadline() {
            child.kill()?;
            child.wait()?;
            bail!("`cloche stats | true` did not end");
        }
        sleep(bed.span(20));
    }
    Ok(())
}

fn output_that_cannot_be_written_is_an_error(bed: &Bed) -> Story {
    let full = File::options().write(true).open("/dev/full")?;
    let output = bed.cloche().args(["image", "ls"]).stdout(full).stderr(Stdio::piped()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && said.contains("cannot write to stdout"), "{output:?}");
    Ok(())
}
