//! Signals to `cloche run` are signals to the sandbox's process.

use rustix::process::Signal;

use crate::bed::Bed;
use crate::suite::{Body, Story, body};

pub const BODIES: &[Body] = &[
    body!(sigterm_is_forwarded).rootless(),
    body!(sigint_is_forwarded),
    body!(other_signals_are_forwarded),
    body!(unhandled_sigterm_leaves_pid_1_alone),
    body!(every_one_of_many_signals_arrives_until_the_last).rootless(),
    body!(signal_during_the_start_ends_it_cleanly).rootless(),
];

/// Waits in the background so that the trap runs at once.
fn trap(name: &str, code: i32) -> String {
    format!("trap 'echo got {name}; exit {code}' {name}; echo ready; while :; do sleep 1000 & wait; done")
}

fn forwarded(bed: &Bed, signal: Signal, name: &str, code: i32) -> Story {
    let running = bed.busybox().sh(&trap(name, code)).start()?;
    running.wait_for_stdout("ready\n")?;
    running.signal(signal)?;
    running.wait()?.exits_with(code)?.prints(&format!("ready\ngot {name}\n"))?;
    Ok(())
}

fn sigterm_is_forwarded(bed: &Bed) -> Story {
    forwarded(bed, Signal::TERM, "TERM", 7)
}

fn sigint_is_forwarded(bed: &Bed) -> Story {
    forwarded(bed, Signal::INT, "INT", 130)
}

fn other_signals_are_forwarded(bed: &Bed) -> Story {
    for (signal, name) in
        [(Signal::HUP, "HUP"), (Signal::QUIT, "QUIT"), (Signal::USR1, "USR1"), (Signal::USR2, "USR2")]
    {
        forwarded(bed, signal, name, 9)?;
    }
    Ok(())
}

fn unhandled_sigterm_leaves_pid_1_alone(bed: &Bed) -> Story {
    // pid_namespaces(7): the first process gets only what it has a handler for. Docker's users know it.
    let mut running = bed.busybox().held_input().sh("echo ready; read line; echo $line").start()?;
    running.wait_for_stdout("ready\n")?;
    running.signal(Signal::TERM)?;
    running.write(b"still here\n")?;
    running.wait()?.succeeds()?.prints("ready\nstill here\n")?;
    Ok(())
}

fn every_one_of_many_signals_arrives_until_the_last(bed: &Bed) -> Story {
    let script = "n=0; trap 'n=$((n+1)); echo got $n' USR1; trap 'exit 3' TERM; echo ready; \
                  while :; do sleep 1000 & wait; done";
    let running = bed.busybox().sh(script).start()?;
    running.wait_for_stdout("ready\n")?;
    for count in 1..=10 {
        running.signal(Signal::USR1)?;
        running.wait_for_stdout(&format!("got {count}\n"))?;
    }
    running.signal(Signal::TERM)?;
    running.wait()?.exits_with(3)?;
    Ok(())
}

fn signal_during_the_start_ends_it_cleanly(bed: &Bed) -> Story {
    // Whatever the moment: before the process runs the start is given up, after it the trap answers. Nobody hangs.
    for delay in [0, 2, 5, 10, 20, 50, 100, 200] {
        let running = bed.busybox().sh(&trap("TERM", 7)).start()?;
        std::thread::sleep(bed.span(delay));
        running.signal(Signal::TERM)?;
        // A shell between its start and its trap ignores the signal, being PID 1: knock again.
        let finished = running.knock_until_end(Signal::TERM, bed.span(300))?;
        anyhow::ensure!([7, 125, 130, 143].contains(&finished.code()), "after {delay} ms:\n{finished}");
        bed.is_clean()?;
    }
    Ok(())
}
