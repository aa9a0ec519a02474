//! Memory that is added while the guest runs.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::bed::Bed;
use crate::bodies::devices::balloon::{TOTAL, wait_for_console, wait_for_resident};
use crate::guest::{Guest, RunningGuest};
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(small_guest_grows_uses_its_memory_and_gives_it_back).only(Isolation::Vm),
    body!(memory_requested_at_the_start_is_there_and_disks_read_into_it).only(Isolation::Vm),
];

/// What the guest uses of the memory that it gets.
const USED_MIB: u64 = 200;

fn wait_for_plugged(bed: &Bed, guest: &RunningGuest, what: &str, enough: impl Fn(u64) -> bool) -> Story {
    let deadline = bed.deadline().min(Instant::now() + bed.span(6_000));
    loop {
        let answer = guest.ask(json!("stats"))?;
        let memory = &answer["stats"]["memory"];
        let plugged_mib = memory["device"]["plugged_mib"].as_u64().context("it has a memory device")?;
        if enough(plugged_mib) {
            let size = (64 + plugged_mib) << 20;
            ensure!(memory["size_bytes"] == size, "{memory} has not {size} bytes in all");
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{what}: {memory}; {}",
            guest.ask(json!({ "console": { "bytes": 4000 } }))?
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Boots small, grows sixfold, fills that, frees it and shrinks: the host has its memory back each time.
fn small_guest_grows_uses_its_memory_and_gives_it_back(bed: &Bed) -> Story {
    let script = format!(
        "{TOTAL}first=$(total)\n\
         echo small\n\
         until [ $(total) -ge $((first + 320 * 1000)) ]; do sleep 0.1; done\n\
         mount -t tmpfs -o size=300m big /mnt\n\
         dd if=/dev/zero of=/mnt/file bs=1M count={USED_MIB} 2>/dev/null\n\
         echo digest $(sha256sum < /mnt/file)\n\
         rm /mnt/file\n\
         echo freed\n\
         until [ $(total) -le $((first + 70 * 1000)) ]; do sleep 0.1; done\n\
         echo small again\n\
         while [ ! -e /tmp/never ]; do sleep 1; done"
    );
    let fields = json!({ "memory_mib": 64, "memory_device": { "size_mib": 384 } });
    let guest = Guest::new(bed)?.with(fields).controlled().start(&script)?;
    wait_for_console(bed, &guest, "small")?;
    let refused = guest.ask(json!({ "resize": { "memory_mib": 450 } })).err().context("that is too much")?;
    ensure!(refused.to_string().contains("allowed: 64 to 448, above 64 in steps of 4"), "{refused}");
    wait_for_plugged(bed, &guest, "the start", |now| now == 0)?;
    guest.ask(json!({ "resize": { "memory_mib": 64 + 320 + 4 } }))?;
    wait_for_plugged(bed, &guest, "growing", |now| now == 324)?;
    wait_for_resident(bed, &guest, "using memory that was added", |now| now > USED_MIB)?;
    wait_for_console(bed, &guest, "freed")?;
    guest.ask(json!({ "resize": { "memory_mib": 64 } }))?;
    // The kernel keeps blocks in which it has something of its own.
    wait_for_plugged(bed, &guest, "shrinking", |now| now <= 64)?;
    wait_for_resident(bed, &guest, "giving added memory back", |now| now < 110)?;
    wait_for_console(bed, &guest, "small again")?;
    guest.ask(json!({ "stop": "orderly" }))?;
    let ran = guest.wait()?;
    ensure!(ran.reason() == "stopped", "the VM was to be stopped\n{}", ran.describe());
    // sha256 of 200 MiB of zeros.
    let digest = crate::image::sha256_hex(&vec![0; (USED_MIB as usize) << 20]);
    ran.prints(&format!("digest {digest}"))
}

/// More is read than the guest has at its start, so that buffers of the disk are in memory that was added.
fn memory_requested_at_the_start_is_there_and_disks_read_into_it(bed: &Bed) -> Story {
    let content = crate::noise::Noise::new(7).bytes(150 << 20);
    let path = bed.write("disk", &content)?;
    let script = format!(
        "{TOTAL}until [ $(total) -ge 300000 ]; do sleep 0.1; done\n\
         mount -t tmpfs -o size=250m big /mnt\n\
         dd if=/dev/vda of=/mnt/file bs=1M iflag=direct 2>/dev/null\n\
         sha256sum < /mnt/file"
    );
    let fields = json!({
        "memory_mib": 64,
        "memory_device": { "size_mib": 256, "requested_mib": 256 },
        "disks": [{ "path": path, "id": "data", "read_only": true }],
    });
    let ran = Guest::new(bed)?.with(fields).run(&script)?.passes()?;
    ran.prints(&crate::image::sha256_hex(&content))
}
