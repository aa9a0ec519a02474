//! Processors: what they are, how many there are, and how much memory they have between them.

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::bed::Bed;
use crate::bodies::devices::balloon::wait_for_console;
use crate::guest::Guest;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(guest_sees_the_processor_of_its_template).only(Isolation::Vm),
    body!(four_processors_are_busy_at_the_same_time).only(Isolation::Vm),
    body!(machines_of_all_sizes_boot).only(Isolation::Vm),
];

/// Four loops on four processors, whether the host has as many or not: each moves while the others do.
fn four_processors_are_busy_at_the_same_time(bed: &Bed) -> Story {
    let script = r#"
echo processors $(nproc)
echo flags $(sed -n 's/^flags[^:]*: / /p' /proc/cpuinfo | head -n 1) end
cat >/tmp/work <<'WORK'
rounds=0
while :; do rounds=$((rounds + 1)); echo $rounds >/tmp/rounds.$1; done
WORK
rounds() { until read n </tmp/rounds.$1 && [ -n "$n" ]; do sleep 0.1; done 2>/dev/null; echo $n; }
for cpu in 0 1 2 3; do taskset $((1 << cpu)) sh /tmp/work $cpu & done
for cpu in 0 1 2 3; do rounds $cpu; done >/tmp/before
sleep 1
cpu=0
while read before; do
    until [ $(rounds $cpu) -gt $((before + 20)) ]; do sleep 0.1; done
    cpu=$((cpu + 1))
done </tmp/before
echo all four move
while [ ! -e /tmp/never ]; do sleep 1; done
"#;
    let fields = json!({ "vcpus": 4, "memory_mib": 128 });
    let guest = Guest::new(bed)?.with(fields).controlled().start(script)?;
    wait_for_console(bed, &guest, "all four move")?;
    let stats = guest.ask(json!("stats"))?["stats"].clone();
    guest.ask(json!({ "stop": "orderly" }))?;
    let ran = guest.wait()?;
    ensure!(ran.value("processors")? == "4", "{}", ran.describe());
    let flags = ran.value("flags")?;
    ensure!(!flags.contains(" svm ") && !flags.contains(" vmx "), "guests could have guests: {flags}");
    let vcpus = stats["vcpus"].as_array().context("each vCPU has statistics")?;
    let busy = |vcpu: &&serde_json::Value| vcpu["cpu_ns"].as_u64().is_some_and(|ns| ns > 50_000_000);
    ensure!(vcpus.iter().filter(busy).count() == 4, "{stats}");
    Ok(())
}

/// 32 vCPUs; 32 MiB; and all the memory that the host has, of which a guest takes what it touches.
fn machines_of_all_sizes_boot(bed: &Bed) -> Story {
    let script = "echo processors $(nproc)\n\
                  sed -n 's/^MemTotal: *\\([0-9]*\\) kB/memory \\1/p' /proc/meminfo";
    let host_mib = memory_mib()?;
    for (vcpus, memory_mib) in [(32, 256), (1, 32), (1, host_mib)] {
        let fields = json!({ "vcpus": vcpus, "memory_mib": memory_mib });
        let ran = Guest::new(bed)?.with(fields).run(script)?.passes()?;
        ensure!(ran.value("processors")? == vcpus.to_string(), "{}", ran.describe());
        let seen_kib: u64 = ran.value("memory")?.parse()?;
        let most_kib = memory_mib * 1024;
        // The kernel keeps some for itself.
        let least_kib = most_kib * 9 / 10 - 20 * 1024;
        ensure!((least_kib..=most_kib).contains(&seen_kib), "{seen_kib} KiB of {memory_mib} MiB");
    }
    for (fields, allowed) in [
        (json!({ "vcpus": 33 }), "allowed: 1 to 32"),
        (json!({ "vcpus": 0 }), "allowed: 1 to 32"),
        (json!({ "memory_mib": 31 }), "32"),
        (json!({ "memory_mib": host_mib + 1 }), "give the guest less memory"),
    ] {
        let refused = Guest::new(bed)?.with(fields.clone()).run(script)?;
        let message = refused.last["message"].as_str().unwrap_or_default();
        ensure!(refused.last["step"] == "validate" && message.contains(allowed), "{fields}: {message:?}");
    }
    Ok(())
}

/// Memory of this host.
fn memory_mib() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line =
        text.lines().find(|line| line.starts_with("MemTotal:")).context("no total in /proc/meminfo")?;
    let kib: u64 = line.split_whitespace().nth(1).context("no number in it")?.parse()?;
    Ok(kib >> 10)
}

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
