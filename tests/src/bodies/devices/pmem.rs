//! Persistent memory: files of the host in the guest's memory. Linux finds them later than the guest's first process
//! starts, so that every script waits.

use std::fs;
use std::path::PathBuf;

use anyhow::ensure;
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::guest::Guest;
use crate::image::sha256_hex;
use crate::noise::Noise;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(pmem_is_read_in_place_and_what_is_read_only_stays_as_it_is).only(Isolation::Vm),
    body!(what_the_guest_writes_to_pmem_and_flushes_is_in_the_file).only(Isolation::Vm),
    body!(layer_on_pmem_is_mounted_without_the_guests_page_cache).only(Isolation::Vm),
    body!(pmem_that_cannot_be_is_refused_by_name).only(Isolation::Vm),
];

const MIB: usize = 1 << 20;

/// At most ten seconds of the guest's own.
const AWAIT: &str = "await() { for i in $(seq 100); do [ -b $1 ] && return; sleep 0.1; done; false; }\n";

fn pmem(path: impl Into<PathBuf>, read_only: bool) -> Value {
    json!({ "path": path.into(), "read_only": read_only })
}

fn pmem_is_read_in_place_and_what_is_read_only_stays_as_it_is(bed: &Bed) -> Story {
    // Not a whole number of pages.
    let content = Noise::new(11).bytes(3 * MIB + 512);
    let path = bed.write("memory", &content)?;
    let script = format!(
        "{AWAIT}await /dev/pmem0\n\
         echo sectors $(cat /sys/block/pmem0/size)\n\
         echo whole $(dd if=/dev/pmem0 bs=512 count={} 2>/dev/null | sha256sum)\n\
         dd if=/dev/zero of=/dev/pmem0 bs=4096 count=1 conv=fsync 2>&1 || true\n\
         echo 3 > /proc/sys/vm/drop_caches\n\
         echo again $(dd if=/dev/pmem0 bs=512 count={} 2>/dev/null | sha256sum)",
        content.len() / 512,
        content.len() / 512
    );
    let guest = Guest::new(bed)?.with(json!({ "pmems": [pmem(&path, true)] }));
    let ran = guest.run(&script)?.passes()?;
    // Rounded up to what a guest can use at once.
    ran.prints(&format!("sectors {}", 16 * MIB / 512))?;
    ran.prints(&format!("whole {}", sha256_hex(&content)))?;
    ran.prints(&format!("again {}", sha256_hex(&content)))?;
    ensure!(fs::read(&path)? == content, "a read-only file has changed");
    Ok(())
}

fn what_the_guest_writes_to_pmem_and_flushes_is_in_the_file(bed: &Bed) -> Story {
    let mut expected = Noise::new(12).bytes(18 * MIB);
    let first = bed.write("first", &Noise::new(13).bytes(2 * MIB))?;
    let path = bed.write("memory", &expected)?;
    let script = format!(
        "{AWAIT}await /dev/pmem0; await /dev/pmem1\n\
         tr '\\0' x < /dev/zero | dd of=/dev/pmem1 bs=4096 seek=100 count=300 iflag=fullblock conv=fsync 2>/dev/null\n\
         echo whole $(sha256sum < /dev/pmem1)"
    );
    expected[100 * 4096..400 * 4096].fill(b'x');
    let pmems = json!([pmem(&first, true), pmem(&path, false)]);
    let ran = Guest::new(bed)?.with(json!({ "pmems": pmems })).run(&script)?.passes()?;
    ran.prints(&format!("whole {}", sha256_hex(&expected)))?;
    ensure!(fs::read(&path)? == expected, "the file has other bytes than the guest's memory");
    Ok(())
}

/// What the guest reads of files is the host's page cache: its own grows by what it reads of directories only.
fn layer_on_pmem_is_mounted_without_the_guests_page_cache(bed: &Bed) -> Story {
    let layer = bed.largest_layer()?;
    let script = format!(
        "{AWAIT}await /dev/pmem0\n\
         mount -t erofs -o ro,dax /dev/pmem0 /mnt\n\
         cached() {{ sed -n 's/^Cached: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; }}\n\
         before=$(cached)\n\
         find /mnt -type f -size +64k | head -n 40 | while read f; do cat \"$f\"; done | wc -c > /tmp/read\n\
         after=$(cached)\n\
         echo read $(cat /tmp/read) grown $((after - before))\n\
         [ $(cat /tmp/read) -gt 4000000 ] && [ $((after - before)) -lt 2000 ]"
    );
    let fields = json!({ "memory_mib": 192, "pmems": [pmem(&layer, true)] });
    Guest::new(bed)?.with(fields).run(&script)?.passes()?;
    Ok(())
}

fn pmem_that_cannot_be_is_refused_by_name(bed: &Bed) -> Story {
    let odd = bed.write("odd", &vec![1; MIB])?;
    let holes = bed.scratch().join("holes");
    fs::File::create(&holes)?.set_len(16 << 20)?;
    for (path, read_only, problem) in [
        (odd, false, "its size is no multiple of 2 MiB from 16 MiB on"),
        (holes, false, "it has holes"),
        (PathBuf::from("/dev/null"), true, "neither a regular file nor a block device"),
        (bed.scratch().join("nowhere"), true, "No such file"),
    ] {
        let guest = Guest::new(bed)?.with(json!({ "pmems": [pmem(&path, read_only)] }));
        let ran = guest.run("true")?;
        let message = ran.last["message"].as_str().unwrap_or_default();
        ensure!(
            ran.last["step"] == "open"
                && message.contains(problem)
                && message.contains(&path.display().to_string()),
            "expected {problem:?}\n{}",
            ran.describe()
        );
    }
    Ok(())
}
