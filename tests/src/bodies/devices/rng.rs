//! The entropy device.

use anyhow::ensure;
use serde_json::json;

use crate::bed::Bed;
use crate::guest::Guest;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[body!(entropy_device_gives_different_bytes_each_time).only(Isolation::Vm)];

fn entropy_device_gives_different_bytes_each_time(bed: &Bed) -> Story {
    let script = "echo driver $(cat /sys/class/misc/hw_random/rng_current)\n\
                  for name in first second; do\n\
                  echo $name $(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | od -An -tx1 | tr -d ' \\n')\n\
                  done";
    let ran = Guest::new(bed)?.with(json!({ "rng": true })).run(script)?.passes()?;
    ensure!(ran.value("driver")?.starts_with("virtio_rng"), "another source of entropy\n{}", ran.describe());
    let (first, second) = (ran.value("first")?, ran.value("second")?);
    ensure!(first.len() == 128 && second.len() == 128, "64 bytes were asked for\n{}", ran.describe());
    ensure!(first != second, "the same 64 bytes twice\n{}", ran.describe());
    Ok(())
}
