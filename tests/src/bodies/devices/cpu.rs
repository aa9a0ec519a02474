//! The processor.

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::bed::Bed;
use crate::guest::Guest;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[body!(guest_sees_the_processor_of_its_template).only(Isolation::Vm)];

fn guest_sees_the_processor_of_its_template(bed: &Bed) -> Story {
    let script = "sed -n 's/^flags[^:]*: /flags /p' /proc/cpuinfo | sort -u";
    let seen = |template: &str| Guest::new(bed)?.with(json!({ "cpu_template": template })).run(script);
    let ran = seen("x86-64-v2")?.passes()?;
    let flags: Vec<&str> = ran.value("flags")?.split(' ').collect();
    for feature in ["ssse3", "sse4_1", "sse4_2", "popcnt", "cx16", "lahf_lm", "hypervisor", "x2apic"] {
        ensure!(flags.contains(&feature), "{feature} is missing\n{}", ran.describe());
    }
    for feature in ["avx", "xsave", "fma", "bmi1", "avx2", "aes", "rdrand", "adx", "sha_ni", "abm"] {
        ensure!(!flags.contains(&feature), "{feature} is there\n{}", ran.describe());
    }
    // Its fourth level is more than some hosts have: then it says what they lack.
    let ran = seen("x86-64-v4")?;
    if ran.last["type"] == "failed" {
        let message = ran.last["message"].as_str().unwrap_or_default();
        let named = message.contains("lacks") && message.contains("x86-64-v4");
        ensure!(named && ran.last["step"] == "create-vm", "it says {message:?}");
    } else {
        ensure!(ran.passes()?.value("flags")?.contains("avx512f"), "avx512f is missing");
    }
    let refused = seen("z80").err().context("there is no such template")?;
    ensure!(format!("{refused:#}").contains("x86-64-v3"), "the list of names is missing: {refused:#}");
    Ok(())
}
