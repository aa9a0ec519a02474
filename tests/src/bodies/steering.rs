//! A running sandbox is paused, resumed, measured and ended by other commands than the one that runs it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::bed::Bed;
use crate::process::Running;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(paused_sandbox_stands_still_until_it_is_unpaused),
    body!(pausing_twice_is_pausing_once),
    body!(clock_goes_on_during_a_pause),
    body!(paused_sandbox_whose_monitor_is_killed_is_cleaned_up),
    body!(paused_sandbox_is_removed_by_force),
    body!(stop_lets_the_process_end_by_itself).rootless(),
    body!(stop_kills_what_does_not_listen).rootless(),
    body!(stop_ends_a_paused_sandbox),
    body!(kill_sends_the_signal_it_is_told).rootless(),
    body!(stats_move_with_the_work),
    body!(stats_of_each_isolation_have_the_same_figures).comparing_both(),
    body!(steering_of_what_does_not_run_is_refused),
    body!(console_shows_the_guests_kernel).only(Isolation::Vm),
];

/// A sandbox of this name that has said `up`.
fn start<'a>(bed: &'a Bed<'a>, name: &str, script: &str) -> Result<Running> {
    let running = bed.busybox().with("--name", name).sh(&format!("echo up; {script}")).start()?;
    running.wait_for_stdout("up\n")?;
    Ok(running)
}

/// Prints a line for each round.
const TICKING: &str = "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.01; done";

fn status(bed: &Bed, name: &str) -> Result<String> {
    Ok(bed.record(name)?.with_context(|| format!("{name} is not listed"))?.status)
}

/// Removes the sandbox and expects the monitor to say that it was killed.
fn end(bed: &Bed, name: &str, running: Running) -> Story {
    bed.run(&["kill", name])?.succeeds()?;
    running.wait()?.exits_with(137)?;
    Ok(())
}

/// Waits until it has printed more.
fn wait_for_more(bed: &Bed, running: &Running) -> Story {
    let (before, patience) = (running.printed(), Instant::now() + bed.span(10_000));
    while running.printed() == before {
        ensure!(Instant::now() < patience, "nothing more was printed");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn paused_sandbox_stands_still_until_it_is_unpaused(bed: &Bed) -> Story {
    let running = start(bed, "still", TICKING)?;
    wait_for_more(bed, &running)?;
    bed.run(&["pause", "still"])?.succeeds()?.prints("still\n")?;
    ensure!(status(bed, "still")? == "paused", "it is shown as {}", status(bed, "still")?);
    // What was on its way arrives.
    std::thread::sleep(bed.span(200));
    let before = running.printed();
    std::thread::sleep(bed.span(300));
    ensure!(running.printed() == before, "it went on during the pause");
    bed.run(&["unpause", "still"])?.succeeds()?.prints("still\n")?;
    ensure!(status(bed, "still")? == "running", "it is shown as {}", status(bed, "still")?);
    wait_for_more(bed, &running)?;
    end(bed, "still", running)
}

fn pausing_twice_is_pausing_once(bed: &Bed) -> Story {
    let running = start(bed, "twice", TICKING)?;
    for command in ["pause", "pause", "unpause", "unpause"] {
        bed.run(&[command, "twice"])?.succeeds()?;
    }
    wait_for_more(bed, &running)?;
    end(bed, "twice", running)
}

fn clock_goes_on_during_a_pause(bed: &Bed) -> Story {
    // As for a frozen process, time passes: the sandbox's wall clock stays the host's.
    let mut running = bed
        .busybox()
        .with("--name", "clock")
        .held_input()
        .sh("echo up; read line; date +at%s; cat /proc/uptime")
        .start()?;
    running.wait_for_stdout("up\n")?;
    bed.run(&["pause", "clock"])?.succeeds()?;
    std::thread::sleep(Duration::from_secs(3));
    bed.run(&["unpause", "clock"])?.succeeds()?;
    let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    running.write(b"go\n")?;
    let finished = running.wait()?.succeeds()?;
    let inside: u64 = finished
        .out()
        .lines()
        .find_map(|line| line.strip_prefix("at")?.parse().ok())
        .with_context(|| format!("no time\n{finished}"))?;
    ensure!(inside.abs_diff(host) <= 2, "the clock inside says {inside}, the host's {host}\n{finished}");
    Ok(())
}

fn paused_sandbox_whose_monitor_is_killed_is_cleaned_up(bed: &Bed) -> Story {
    bed.keeps_records();
    let mut running = bed.busybox().kept("frozen").sh("echo up; sleep 100000").start()?;
    running.wait_for_stdout("up\n")?;
    bed.run(&["pause", "frozen"])?.succeeds()?;
    running.signal(Signal::KILL)?;
    running.wait_for_end()?;
    let record = bed.record("frozen")?.context("it is no longer listed")?;
    ensure!(record.status == "exited" && record.exit_code == Some(137), "it is shown as {record:?}");
    bed.is_clean()?;
    bed.run(&["rm", "frozen"])?.succeeds()?;
    running.wait()?.exits_with(137)?;
    Ok(())
}

fn paused_sandbox_is_removed_by_force(bed: &Bed) -> Story {
    let running = start(bed, "cold", "sleep 100000")?;
    bed.run(&["pause", "cold"])?.succeeds()?;
    bed.run(&["rm", "cold"])?.refused()?.says("running")?;
    bed.run(&["rm", "-f", "cold"])?.succeeds()?;
    running.wait()?.exits_with(137)?;
    bed.is_clean()
}

const POLITE: &str = "trap 'echo bye; exit 7' TERM; trap 'echo usr; exit 8' USR1; echo ready; \
                      while :; do sleep 1000 & wait; done";

fn stop_lets_the_process_end_by_itself(bed: &Bed) -> Story {
    let running = start(bed, "polite", POLITE)?;
    running.wait_for_stdout("ready\n")?;
    bed.run(&["stop", "-t", "60", "polite"])?.succeeds()?.prints("polite\n")?;
    // When `stop` is back, it is over.
    running.wait()?.exits_with(7)?.prints("up\nready\nbye\n")?;
    let running = start(bed, "polite", POLITE)?;
    running.wait_for_stdout("ready\n")?;
    bed.run(&["stop", "-t", "60", "-s", "USR1", "polite"])?.succeeds()?;
    running.wait()?.exits_with(8)?;
    Ok(())
}

fn stop_kills_what_does_not_listen(bed: &Bed) -> Story {
    let running = start(bed, "deaf", "trap '' TERM; echo deaf; while :; do sleep 1000 & wait; done")?;
    running.wait_for_stdout("deaf\n")?;
    bed.run(&["stop", "-t", "1", "deaf"])?.succeeds()?;
    running.wait()?.exits_with(137)?;
    Ok(())
}

fn stop_ends_a_paused_sandbox(bed: &Bed) -> Story {
    let running = start(bed, "dozing", POLITE)?;
    running.wait_for_stdout("ready\n")?;
    bed.run(&["pause", "dozing"])?.succeeds()?;
    bed.run(&["stop", "-t", "60", "dozing"])?.succeeds()?;
    running.wait()?.exits_with(7)?;
    Ok(())
}

fn kill_sends_the_signal_it_is_told(bed: &Bed) -> Story {
    for (signal, code) in [("USR1", 8), ("SIGTERM", 7), ("10", 8)] {
        let running = start(bed, "target", POLITE)?;
        running.wait_for_stdout("ready\n")?;
        bed.run(&["kill", "-s", signal, "target"])?.succeeds()?;
        running.wait()?.exits_with(code).with_context(|| signal.to_owned())?;
    }
    let running = start(bed, "target", POLITE)?;
    bed.run(&["kill", "-s", "NONSENSE", "target"])?.refused()?.says("NONSENSE")?;
    bed.run(&["kill", "target"])?.succeeds()?;
    running.wait()?.exits_with(137)?;
    Ok(())
}

/// What `stats --json` says of one sandbox.
fn stats(bed: &Bed, name: &str) -> Result<Value> {
    let mut samples = bed.json(&["stats", "--no-stream", "--json", name])?;
    ensure!(samples.as_array().map(Vec::len) == Some(1), "not one sample: {samples}");
    Ok(samples[0].take())
}

fn figure(sample: &Value, name: &str) -> Result<f64> {
    sample[name]["value"].as_f64().with_context(|| format!("{name} is {} in {sample}", sample[name]))
}

fn stats_move_with_the_work(bed: &Bed) -> Story {
    let idle = start(bed, "idle", "sleep 100000")?;
    let busy = start(bed, "busy", "while :; do :; done")?;
    let (of_idle, of_busy) = (stats(bed, "idle")?, stats(bed, "busy")?);
    let (rest, work) = (figure(&of_idle, "cpu_percent")?, figure(&of_busy, "cpu_percent")?);
    ensure!(work > 10.0 && work > 2.0 * rest, "busy: {work} %, idle: {rest} %");
    let memory = figure(&of_busy, "memory_bytes")?;
    ensure!(memory > 0.0 && memory <= figure(&of_busy, "memory_limit_bytes")?, "memory: {memory}");
    // The shell, and what the guest's agent or the host's kernel counts besides.
    let pids = figure(&of_busy, "pids")?;
    ensure!((1.0..10.0).contains(&pids), "pids: {pids}");
    let later = stats(bed, "busy")?;
    ensure!(figure(&later, "cpu_ns")? > figure(&of_busy, "cpu_ns")?, "CPU time stands still");
    let table = bed.run(&["stats", "--no-stream"])?.succeeds()?;
    let text = table.out();
    for word in ["CPU %", "MEM USAGE / LIMIT", "NET I/O", "BLOCK I/O", "PIDS", "idle", "busy"] {
        ensure!(text.contains(word), "{word} is not in the table\n{table}");
    }
    // A paused one uses nothing more.
    bed.run(&["pause", "busy"])?.succeeds()?;
    let paused = stats(bed, "busy")?;
    ensure!(paused["status"] == "paused", "it is shown as {paused}");
    ensure!(figure(&paused, "cpu_percent")? < work / 2.0, "paused, but at work: {paused}");
    end(bed, "idle", idle)?;
    end(bed, "busy", busy)
}

fn stats_of_each_isolation_have_the_same_figures(bed: &Bed) -> Story {
    let mut keys = Vec::new();
    for isolation in [Isolation::Container, Isolation::Vm] {
        let bed = bed.under(isolation)?;
        let running = start(&bed, "one", "sleep 100000")?;
        let sample = stats(&bed, "one")?;
        ensure!(sample["isolation"] == isolation.as_str(), "not what runs: {sample}");
        let sample = sample.as_object().context("no object")?;
        for (name, figure) in sample.iter().filter(|(_, figure)| figure.is_object()) {
            if let Some(reason) = figure.get("unknown") {
                ensure!(reason.as_str().is_some_and(|reason| !reason.is_empty()), "{name}: no reason");
            }
        }
        keys.push(sample.keys().filter(|key| *key != "vm").cloned().collect::<Vec<_>>());
        end(&bed, "one", running)?;
    }
    ensure!(keys.first() == keys.last(), "the figures differ: {keys:?}");
    Ok(())
}

fn steering_of_what_does_not_run_is_refused(bed: &Bed) -> Story {
    for command in ["pause", "unpause", "stop", "kill"] {
        bed.run(&[command, "nobody"])?.refused()?.says("nobody")?;
    }
    bed.run(&["stats", "--no-stream", "nobody"])?.refused()?.says("nobody")?;
    bed.keeps_records();
    bed.busybox().kept("over").command(&["true"]).run()?.succeeds()?;
    for command in ["pause", "unpause", "stop", "kill"] {
        bed.run(&[command, "over"])?.refused()?.says("exited")?;
    }
    Ok(())
}

fn console_shows_the_guests_kernel(bed: &Bed) -> Story {
    let running = start(bed, "talker", "sleep 100000")?;
    // The kernel is quiet by default; that it can be asked is what counts.
    bed.run(&["console", "talker"])?.succeeds()?.says_nothing()?;
    end(bed, "talker", running)?;
    bed.run(&["console", "talker"])?.refused()?.says("talker")?;
    Ok(())
}
