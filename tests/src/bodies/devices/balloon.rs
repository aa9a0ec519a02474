//! The memory balloon.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::bed::Bed;
use crate::guest::{Guest, RunningGuest};
use crate::procfs::resident_mib;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(balloon_takes_memory_from_the_guest_and_gives_it_back).only(Isolation::Vm),
    body!(what_the_guest_frees_is_reported_and_the_hosts_again).only(Isolation::Vm),
    body!(balloon_of_the_start_is_inflated_and_statistics_come).only(Isolation::Vm),
];

/// What the guest takes and frees.
const MIB: u64 = 100;

/// A function of the shell: memory that the guest has, in KiB.
pub(super) const TOTAL: &str = "total() { sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; }\n";

/// Waits until the VMM's resident memory is as it should be; returns it in MiB.
pub(super) fn wait_for_resident(
    bed: &Bed,
    guest: &RunningGuest,
    what: &str,
    enough: impl Fn(u64) -> bool,
) -> Result<u64> {
    let deadline = bed.deadline().min(Instant::now() + bed.span(6_000));
    loop {
        let now = resident_mib(guest.vmm.pid()).with_context(|| format!("the VMM is gone before {what}"))?;
        if enough(now) {
            return Ok(now);
        }
        ensure!(
            Instant::now() < deadline,
            "{what}: the VMM still has {now} MiB; {}; {}",
            guest.ask(json!({ "console": { "bytes": 2000 } }))?,
            guest.ask(json!("stats"))?["stats"]["memory"],
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(super) fn wait_for_console(bed: &Bed, guest: &RunningGuest, text: &str) -> Story {
    let deadline = bed.deadline().min(Instant::now() + bed.span(6_000));
    loop {
        let console = guest.ask(json!({ "console": { "bytes": 4096 } }))?["console"].to_string();
        if console.contains(text) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the guest has not said {text:?}: {console}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn balloon_takes_memory_from_the_guest_and_gives_it_back(bed: &Bed) -> Story {
    let script = format!(
        "{TOTAL}first=$(total)\n\
         dd if=/dev/zero of=/tmp/file bs=1M count={MIB} 2>/dev/null\n\
         rm /tmp/file\n\
         echo memory was taken and freed\n\
         until [ $(total) -lt $((first - 150000)) ]; do sleep 0.1; done\n\
         echo given back\n\
         until [ $(total) -ge $first ]; do sleep 0.1; done\n\
         dd if=/dev/zero of=/tmp/file bs=1M count={MIB} 2>/dev/null\n\
         echo taken again\n\
         while [ ! -e /tmp/never ]; do sleep 1; done"
    );
    let fields = json!({ "memory_mib": 256, "balloon": {} });
    let guest = Guest::new(bed)?.with(fields).controlled().start(&script)?;
    // A balloon that grows while the guest fills its memory would leave it without.
    wait_for_console(bed, &guest, "memory was taken and freed")?;
    wait_for_resident(bed, &guest, "having taken memory", |now| now > MIB)?;
    guest.ask(json!({ "resize": { "memory_mib": 96 } }))?;
    // The balloon is full by the guest's account before it is asked to shrink.
    wait_for_console(bed, &guest, "given back")?;
    wait_for_resident(bed, &guest, "giving memory back", |now| now < MIB)?;
    guest.ask(json!({ "resize": { "memory_mib": 256 } }))?;
    wait_for_resident(bed, &guest, "taking memory again", |now| now > MIB)?;
    wait_for_console(bed, &guest, "taken again")?;
    guest.ask(json!({ "stop": "orderly" }))?;
    let ran = guest.wait()?;
    ensure!(ran.reason() == "stopped", "the VM was to be stopped\n{}", ran.describe());
    Ok(())
}

fn what_the_guest_frees_is_reported_and_the_hosts_again(bed: &Bed) -> Story {
    let script = format!(
        "dd if=/dev/zero of=/tmp/file bs=1M count={MIB} 2>/dev/null\n\
         rm /tmp/file\n\
         while [ ! -e /tmp/never ]; do sleep 1; done"
    );
    let fields = json!({ "memory_mib": 256, "balloon": { "free_page_reporting": true } });
    let guest = Guest::new(bed)?.with(fields).controlled().start(&script)?;
    wait_for_resident(bed, &guest, "taking memory", |now| now > MIB)?;
    wait_for_resident(bed, &guest, "freeing memory", |now| now < MIB - 30)?;
    guest.ask(json!({ "stop": "orderly" }))?;
    let ran = guest.wait()?;
    ensure!(ran.reason() == "stopped", "the VM was to be stopped\n{}", ran.describe());
    Ok(())
}

fn balloon_of_the_start_is_inflated_and_statistics_come(bed: &Bed) -> Story {
    let script = format!(
        "{TOTAL}until [ $(total) -lt 140000 ]; do sleep 0.1; done\n\
         while [ ! -e /tmp/never ]; do sleep 1; done"
    );
    let balloon = json!({ "target_mib": 128, "statistics_interval_s": 1 });
    let fields = json!({ "memory_mib": 256, "balloon": balloon });
    let guest = Guest::new(bed)?.with(fields).controlled().start(&script)?;
    let deadline = bed.deadline().min(Instant::now() + bed.span(6_000));
    loop {
        let answer = guest.ask(json!("stats"))?;
        let balloon = &answer["stats"]["memory"]["balloon"];
        let total = balloon["guest"]["total-bytes"].as_u64().unwrap_or(u64::MAX);
        if balloon["target_mib"] == 128 && balloon["actual_mib"] == 128 && total < 140 << 20 {
            break;
        }
        ensure!(Instant::now() < deadline, "the balloon is at {balloon}");
        std::thread::sleep(Duration::from_millis(200));
    }
    let refused = guest.ask(json!({ "resize": { "memory_mib": 16 } })).err().context("16 MiB are too few")?;
    ensure!(refused.to_string().contains("allowed: 32 to 256"), "{refused}");
    guest.ask(json!({ "stop": "orderly" }))?;
    guest.wait()?;
    Ok(())
}
