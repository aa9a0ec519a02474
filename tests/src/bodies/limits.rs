//! Memory, process and processor limits.

use std::path::Path;

use anyhow::{Context as _, ensure};

use super::crash::{file_server_below, vmm_below};
use crate::bed::Bed;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(process_over_its_memory_limit_dies_and_says_so),
    body!(children_over_the_memory_limit_take_the_sandbox_down),
    body!(files_count_towards_the_memory_limit),
    body!(memory_below_the_limit_is_usable),
    body!(pids_limit_stops_a_fork_bomb),
    body!(cpu_limit_is_visible_inside_or_acts),
    body!(processes_of_a_vm_are_in_a_cgroup_that_its_size_limits).only(Isolation::Vm),
    body!(vm_over_the_limit_of_its_processes_ends_and_says_so).only(Isolation::Vm),
    body!(mistaken_memory_sizes_are_refused),
    body!(mistaken_processor_and_pids_values_are_refused),
];

// Memory is taken bit by bit: a single large request may be refused at once where the whole machine is small.

fn process_over_its_memory_limit_dies_and_says_so(bed: &Bed) -> Story {
    let greedy = "bit=$(head -c 4194304 /dev/zero | tr '\\0' x); while :; do all=$all$bit; done";
    bed.busybox().with("--memory", "64m").sh(greedy).run()?.exits_with(137)?.says("memory limit")?;
    Ok(())
}

fn children_over_the_memory_limit_take_the_sandbox_down(bed: &Bed) -> Story {
    // Each `dd` fills a buffer of its block size and holds it, since nobody reads its pipe.
    let greedy = "for i in $(seq 20); do dd if=/dev/zero bs=8M count=1 | sleep 1000 & done 2>/dev/null; \
                  wait; echo survived";
    let sandbox = bed.busybox().with("--memory", "64m").sh(greedy);
    sandbox.run()?.exits_with(137)?.prints("")?.says("memory limit")?;
    Ok(())
}

fn files_count_towards_the_memory_limit(bed: &Bed) -> Story {
    // /dev/shm is a tmpfs of the sandbox: its pages are charged to the sandbox, and full is full either way.
    let script = "dd if=/dev/zero of=/dev/shm/a bs=1M count=500 2>/dev/null; echo $?";
    let finished = bed.busybox().with("--memory", "64m").sh(script).run()?;
    let dead = finished.code() == 137 && finished.err().contains("memory limit");
    let full = finished.code() == 0 && finished.out() != "0\n";
    ensure!(dead || full, "500 MiB of files fitted into 64 MiB of memory\n{finished}");
    Ok(())
}

fn memory_below_the_limit_is_usable(bed: &Bed) -> Story {
    bed.busybox()
        .with("--memory", "128m")
        .sh("dd if=/dev/zero of=/dev/null bs=64M count=1 2>/dev/null && echo fine")
        .run()?
        .succeeds()?
        .prints("fine\n")?
        .says_nothing()?;
    Ok(())
}

fn pids_limit_stops_a_fork_bomb(bed: &Bed) -> Story {
    let script = "for i in $(seq 40); do sleep 1000 & done; echo all started";
    let finished = bed.busybox().with("--pids-limit", "16").sh(script).run()?;
    ensure!(finished.code() != 0 && !finished.out().contains("all started"), "40 processes ran\n{finished}");
    finished.says("can't fork")?;
    bed.busybox().with("--pids-limit", "64").sh(script).run()?.succeeds()?.prints("all started\n")?;
    Ok(())
}

fn cpu_limit_is_visible_inside_or_acts(bed: &Bed) -> Story {
    match bed.isolation() {
        // A machine has whole processors: the count is rounded up.
        Isolation::Vm => {
            bed.busybox().with("--cpus", "0.5").command(&["nproc"]).run()?.succeeds()?.prints("1\n")?;
        }
        // Half a processor for about a second of processor time takes about two seconds. Compared with itself
        // unlimited, and loosely, since the machine may be busy.
        Isolation::Container => {
            let work = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
            let time = |cpus: Option<&str>| -> anyhow::Result<std::time::Duration> {
                let sandbox = cpus.map_or(bed.busybox(), |cpus| bed.busybox().with("--cpus", cpus));
                let start = std::time::Instant::now();
                sandbox.sh(work).run()?.succeeds()?;
                Ok(start.elapsed())
            };
            let (free, limited) = (time(None)?, time(Some("0.1"))?);
            ensure!(limited > free * 2, "a tenth of a processor took {limited:?}, a whole one {free:?}");
        }
    }
    Ok(())
}

fn processes_of_a_vm_are_in_a_cgroup_that_its_size_limits(bed: &Bed) -> Story {
    bed.keeps_records();
    // Read-only, since what may be written to a file system in memory adds to the limit.
    let volume = format!("{}:/data:ro", bed.scratch().display());
    let sandbox = bed.busybox().kept("limited").with("--memory", "96m").with("-v", &volume).held_input();
    let mut running = sandbox.sh("echo up; cat").start()?;
    running.wait_for_stdout("up\n")?;
    let id = bed.record("limited")?.context("it runs")?.id;
    let vmm = running.wait_for("a VMM process", vmm_below)?;
    let server = running.wait_for("the file server", file_server_below)?;
    for process in [&vmm, &server] {
        let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", process.pid.as_raw_nonzero()))?;
        let path = format!("/cloche/{id}");
        let of_memory = cgroups.lines().find(|line| line.starts_with("0::/c") || line.contains(":memory:"));
        ensure!(of_memory.is_some_and(|line| line.ends_with(&path)), "{process} is in\n{cgroups}");
    }
    let mount = Path::new("/sys/fs/cgroup");
    let first = |files: [String; 2]| {
        let found = files.iter().find_map(|file| std::fs::read_to_string(mount.join(file)).ok());
        found.and_then(|text| text.trim().parse::<u64>().ok()).with_context(|| format!("none of {files:?}"))
    };
    let memory =
        first([format!("cloche/{id}/memory.max"), format!("memory/cloche/{id}/memory.limit_in_bytes")])?
            >> 20;
    // The guest has 96 MiB and what its kernel takes of that, the VMM 128; streams may wait, and a file server may have
    // many files open.
    ensure!((96 + 128 + 64..1300).contains(&memory), "its limit is {memory} MiB");
    let pids = first([format!("cloche/{id}/pids.max"), format!("pids/cloche/{id}/pids.max")])?;
    ensure!((3..100).contains(&pids), "it may have {pids} processes");
    running.close_input();
    running.wait()?.succeeds()?;
    ensure!(!mount.join(format!("cloche/{id}")).exists(), "its cgroup is left");
    Ok(())
}

fn vm_over_the_limit_of_its_processes_ends_and_says_so(bed: &Bed) -> Story {
    bed.keeps_records();
    let running = bed.busybox().kept("greedy").sh("echo up; sleep 100000").start()?;
    running.wait_for_stdout("up\n")?;
    let id = bed.record("greedy")?.context("it runs")?.id;
    let limit = Path::new("/sys/fs/cgroup").join(format!("cloche/{id}/memory.max"));
    if limit.exists() {
        // No guest comes near the real limit, so the limit comes near it.
        std::fs::write(limit, "4M")?;
        running.wait()?.exits_with(137)?.says("more than their limit of")?;
    } else {
        // v1 refuses a limit that is exceeded already.
        running.signal(rustix::process::Signal::TERM)?;
        running.wait()?;
    }
    bed.is_clean()
}

fn mistaken_memory_sizes_are_refused(bed: &Bed) -> Story {
    for size in ["0", "0m", "1m", "10t", "18446744073709551616", "-1", "many", "64q", ""] {
        let finished = bed.busybox().option(&format!("--memory={size}")).command(&["true"]).run()?;
        finished.refused().with_context(|| format!("memory {size:?}"))?.says("memory")?;
    }
    Ok(())
}

fn mistaken_processor_and_pids_values_are_refused(bed: &Bed) -> Story {
    for (option, value, word) in [
        ("--cpus", "0", "cpus"),
        ("--cpus", "-1", "cpus"),
        ("--cpus", "NaN", "cpus"),
        ("--cpus", "100000", "cpus"),
        ("--pids-limit", "0", "pids"),
        ("--pids-limit", "some", "pids"),
    ] {
        let option = format!("{option}={value}");
        bed.busybox().option(&option).command(&["true"]).run()?.refused().context(option)?.says(word)?;
    }
    Ok(())
}
