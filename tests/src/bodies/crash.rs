//! `kill -9` of each process of a running sandbox: the next command reports it and nothing is left.

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::bed::Bed;
use crate::process::Running;
use crate::procfs::{Process, descendants_of};
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(killed_command_line_is_reported_and_cleaned_up).rootless(),
    body!(killed_command_line_of_a_busy_sandbox_is_cleaned_up).rootless(),
    body!(killed_vmm_is_reported_and_cleaned_up).only(Isolation::Vm),
    body!(killed_container_init_is_reported).only(Isolation::Container).rootless(),
    body!(everything_killed_at_once_is_cleaned_up).rootless(),
    body!(file_server_ends_with_whoever_is_killed).only(Isolation::Vm),
    body!(next_run_cleans_up_by_itself).rootless(),
    body!(damaged_record_does_not_stop_other_commands).rootless(),
];

/// Names and statuses are the user's to see, so they are the test's, too.
const VICTIM: &str = "victim";

/// A kept sandbox that has said `up`, so it runs for certain.
fn start<'a>(bed: &'a Bed<'a>, script: &str) -> Result<Running> {
    bed.keeps_records();
    let running = bed.busybox().kept(VICTIM).sh(&format!("echo up; {script}")).start()?;
    running.wait_for_stdout("up\n")?;
    Ok(running)
}

/// The next command says that the victim has ended by force, and the host is clean after it.
fn next_command_reports_and_cleans(bed: &Bed) -> Story {
    let record = bed.record(VICTIM)?.context("the victim is no longer listed")?;
    ensure!(record.status != "running" && record.status != "starting", "the dead one is shown as {record:?}");
    ensure!(record.exit_code == Some(137), "expected exit code 137: {record:?}");
    bed.is_clean()?;
    // And it stays so.
    ensure!(bed.record(VICTIM)?.as_ref() == Some(&record), "the report changes when asked again");
    bed.run(&["rm", VICTIM])?.succeeds()?;
    ensure!(bed.records()?.is_empty(), "records are left");
    Ok(())
}

/// The VMM below this process.
pub fn vmm_below(ancestor: Pid) -> Option<Process> {
    descendants_of(ancestor).into_iter().find(Process::is_vmm)
}

/// The file server below this process.
pub fn file_server_below(ancestor: Pid) -> Option<Process> {
    descendants_of(ancestor).into_iter().find(Process::is_share)
}

/// The container's first process below this one.
pub fn init_below(ancestor: Pid) -> Option<Process> {
    descendants_of(ancestor).into_iter().find(Process::is_init_of_namespace)
}

fn killed_command_line_is_reported_and_cleaned_up(bed: &Bed) -> Story {
    let mut running = start(bed, "sleep 100000")?;
    running.signal(Signal::KILL)?;
    running.wait_for_end()?;
    next_command_reports_and_cleans(bed)?;
    running.wait()?.exits_with(137)?;
    Ok(())
}

fn killed_command_line_of_a_busy_sandbox_is_cleaned_up(bed: &Bed) -> Story {
    let mut running =
        start(bed, "mkdir /x; while :; do echo noise; echo noise > /x/file; (sleep 1000 &) ; done")?;
    running.signal(Signal::KILL)?;
    running.wait_for_end()?;
    next_command_reports_and_cleans(bed)?;
    running.wait()?.exits_with(137)?;
    Ok(())
}

fn killed_vmm_is_reported_and_cleaned_up(bed: &Bed) -> Story {
    let mut running = start(bed, "sleep 100000")?;
    running.wait_for("a VMM process", vmm_below)?.kill();
    let finished = running.wait()?;
    // The command line lives and says so at once.
    finished.refused_with(137)?.says("vmm")?;
    next_command_reports_and_cleans(bed)
}

fn killed_container_init_is_reported(bed: &Bed) -> Story {
    let mut running = start(bed, "sleep 100000")?;
    running.wait_for("the container's init", init_below)?.kill();
    running.wait()?.exits_with(137)?;
    next_command_reports_and_cleans(bed)
}

fn everything_killed_at_once_is_cleaned_up(bed: &Bed) -> Story {
    let running = start(bed, "sleep 100000")?;
    // Top down, so that nobody is there to notice.
    let below = descendants_of(running.pid());
    running.signal(Signal::KILL)?;
    below.iter().for_each(Process::kill);
    running.wait()?.exits_with(137)?;
    next_command_reports_and_cleans(bed)
}

/// Even one that cannot see that its socket has ended, and that has changed its user, which makes the kernel forget whose
/// death it is to die of. Nobody but the kernel ends it: no command runs.
fn file_server_ends_with_whoever_is_killed(bed: &Bed) -> Story {
    let dir = bed.scratch().join("shared");
    std::fs::create_dir(&dir)?;
    std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    for (kills_monitor, kills_vmm) in [(true, false), (false, true), (true, true)] {
        let script = "echo x > /data/file; echo up; sleep 100000";
        let volume = format!("{}:/data", dir.display());
        let mut running = bed.busybox().with("-v", &volume).with("-u", "1000:1000").sh(script).start()?;
        running.wait_for_stdout("up\n")?;
        let vmm = running.wait_for("a VMM process", vmm_below)?;
        let server = running.wait_for("the file server", file_server_below)?;
        kill_process(server.pid, Signal::STOP)?;
        if kills_monitor {
            running.signal(Signal::KILL)?;
        }
        if kills_vmm {
            vmm.kill();
        }
        running.wait_for_end()?;
        let left = bed.processes_left();
        ensure!(left.is_empty(), "monitor killed: {kills_monitor}, VMM killed: {kills_vmm}: {left:?}");
        running.wait()?.exits_with(137)?;
    }
    bed.run(&["ps"])?.succeeds()?;
    Ok(())
}

fn next_run_cleans_up_by_itself(bed: &Bed) -> Story {
    let mut running = start(bed, "sleep 100000")?;
    running.signal(Signal::KILL)?;
    running.wait_for_end()?;
    // Not `ps`: any command finds the dead.
    bed.busybox().command(&["echo", "next"]).run()?.succeeds()?.prints("next\n")?;
    bed.is_clean()?;
    running.wait()?.exits_with(137)?;
    next_command_reports_and_cleans(bed)
}

fn damaged_record_does_not_stop_other_commands(bed: &Bed) -> Story {
    bed.keeps_records();
    bed.busybox().kept("whole").command(&["true"]).run()?.succeeds()?;
    bed.busybox().kept("damaged").command(&["true"]).run()?.succeeds()?;
    let id = bed.record("damaged")?.context("a kept record")?.id;
    let mut damaged = 0;
    for file in bed.state_files()? {
        let of_victim = file.to_string_lossy().contains(&id);
        if of_victim && file.extension().is_some_and(|extension| extension == "json") {
            std::fs::write(&file, b"{\"id\":")?;
            damaged += 1;
        }
    }
    ensure!(damaged > 0, "no record file was found");
    bed.busybox().command(&["echo", "next"]).run()?.succeeds()?.prints("next\n")?;
    ensure!(bed.record("whole")?.is_some(), "the sound record is not listed");
    bed.run(&["rm", "whole"])?.succeeds()?;
    Ok(())
}
