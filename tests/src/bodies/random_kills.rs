//! `kill -9` at moments spread over a sandbox's whole start: whatever the moment, the next command puts things right.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::crash::{file_server_below, init_below, vmm_below};
use crate::bed::Bed;
use crate::noise::Noise;
use crate::process::Running;
use crate::procfs::Process;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(command_line_killed_at_any_moment_leaves_nothing),
    body!(vmm_killed_at_any_moment_leaves_nothing).only(Isolation::Vm),
    body!(file_server_killed_at_any_moment_leaves_nothing).only(Isolation::Vm),
    body!(container_init_killed_at_any_moment_leaves_nothing).only(Isolation::Container),
    body!(load_killed_at_any_moment_leaves_a_sound_store).once(),
];

/// Delays that grow from nothing to about a whole start, each with some chance in it.
fn moments(bed: &Bed) -> Vec<Duration> {
    let mut noise = Noise::new(9);
    let steps = [0, 1, 2, 3, 5, 8, 12, 17, 23, 30, 40, 55, 75, 100, 150, 220];
    steps.iter().map(|step| bed.span(*step) + Duration::from_micros(noise.below(1000))).collect()
}

fn start<'a>(bed: &'a Bed<'a>) -> Result<Running> {
    // With a mount, a VM has a file server.
    let volume = format!("{}:/data", bed.scratch().display());
    bed.busybox().kept("victim").with("-v", &volume).sh("echo up; sleep 1; exit 3").start()
}

/// If the victim got as far as a record, it is one of an ended sandbox. Nothing else is left.
fn is_put_right(bed: &Bed, moment: Duration) -> Story {
    if let Some(record) = bed.record("victim")? {
        ensure!(record.status != "running" && record.status != "starting", "after {moment:?}: {record:?}");
        bed.run(&["rm", "victim"])?.succeeds()?;
    }
    ensure!(bed.records()?.is_empty(), "after {moment:?} records are left");
    bed.is_clean().with_context(|| format!("killed after {moment:?}"))
}

fn command_line_killed_at_any_moment_leaves_nothing(bed: &Bed) -> Story {
    bed.keeps_records();
    for moment in moments(bed) {
        let mut running = start(bed)?;
        thread::sleep(moment);
        running.signal(Signal::KILL)?;
        running.wait_for_end()?;
        is_put_right(bed, moment)?;
        running.wait()?;
    }
    Ok(())
}

/// Waits for a process below the command line, then for the moment, and kills it.
fn killed_at_any_moment(bed: &Bed, what: &str, find: fn(rustix::process::Pid) -> Option<Process>) -> Story {
    bed.keeps_records();
    for moment in moments(bed) {
        let mut running = start(bed)?;
        let victim = running.wait_for(what, find)?;
        thread::sleep(moment);
        victim.kill();
        let finished = running.wait()?;
        // Late kills may come after the end.
        ensure!([3, 125, 137].contains(&finished.code()), "killed after {moment:?}\n{finished}");
        ensure!(!finished.err().contains("panicked"), "killed after {moment:?}\n{finished}");
        is_put_right(bed, moment)?;
    }
    Ok(())
}

fn vmm_killed_at_any_moment_leaves_nothing(bed: &Bed) -> Story {
    killed_at_any_moment(bed, "a VMM process", vmm_below)
}

fn file_server_killed_at_any_moment_leaves_nothing(bed: &Bed) -> Story {
    killed_at_any_moment(bed, "the file server", file_server_below)
}

fn container_init_killed_at_any_moment_leaves_nothing(bed: &Bed) -> Story {
    killed_at_any_moment(bed, "the container's init", init_below)
}

fn load_killed_at_any_moment_leaves_a_sound_store(bed: &Bed) -> Story {
    let mut tree = super::rootfs::base(bed)?;
    tree.file("noise", Noise::new(6).bytes(4 << 20));
    let image = crate::image::Image::new(vec![tree.to_layer()]);
    let archive = bed.write("a.tar", &image.to_docker_archive("killed"))?;
    let archive = archive.to_string_lossy();
    let clean = bed.with_store(&bed.scratch().join("clean"))?;
    clean.run(&["image", "load", "--name", "killed", &archive])?.succeeds()?;
    let expected = names_in(&clean)?;
    let store = bed.with_store(&bed.scratch().join("store"))?;
    for moment in moments(bed) {
        let words = ["image", "load", "--name", "killed", &archive];
        let running = store.start(&words, &crate::process::Input::Null)?;
        thread::sleep(moment / 2);
        running.signal(Signal::KILL)?;
        running.wait()?;
        store.run(&["image", "load", "--name", "killed", &archive])?.succeeds()?;
        let seen = names_in(&store)?;
        ensure!(
            seen == expected,
            "killed after {moment:?}, the store holds {seen:#?} instead of {expected:#?}"
        );
        store.run(&["image", "rm", "killed"])?.succeeds()?;
    }
    Ok(())
}

fn names_in(bed: &Bed) -> Result<Vec<String>> {
    let root = bed.store_root().to_string_lossy().into_owned();
    Ok(bed.store_listing()?.iter().map(|line| line.replacen(&root, "", 1)).collect())
}
