//! Block devices.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::guest::Guest;
use crate::image::sha256_hex;
use crate::noise::Noise;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(disk_is_read_byte_for_byte).only(Isolation::Vm),
    body!(what_the_guest_writes_is_in_the_file).only(Isolation::Vm),
    body!(read_only_disk_refuses_writes).only(Isolation::Vm),
    body!(several_disks_keep_their_order_names_and_content).only(Isolation::Vm),
    body!(discards_and_zeroes_reach_the_file).only(Isolation::Vm),
    body!(direct_disk_is_written_by_many_at_once).only(Isolation::Vm),
    body!(driver_that_is_unbound_under_load_loses_nothing_it_was_told).only(Isolation::Vm),
    body!(full_file_system_is_an_error_for_the_guest_only).only(Isolation::Vm),
    body!(limits_of_a_disk_hold).only(Isolation::Vm),
];

const MIB: usize = 1 << 20;

fn disk(path: &Path, id: &str, read_only: bool) -> Value {
    json!({ "path": path, "id": id, "read_only": read_only })
}

/// A disk of the guest's own: `disk` with further fields.
fn disk_with(path: &Path, id: &str, fields: Value) -> Value {
    let mut disk = disk(path, id, false);
    if let (Value::Object(all), Value::Object(new)) = (&mut disk, fields) {
        all.extend(new);
    }
    disk
}

fn disk_is_read_byte_for_byte(bed: &Bed) -> Story {
    let content = Noise::new(1).bytes(8 * MIB);
    let path = bed.write("disk", &content)?;
    let script = "echo sectors $(cat /sys/block/vda/size)\n\
                  echo whole $(sha256sum < /dev/vda)\n\
                  echo part $(dd if=/dev/vda bs=512 skip=77 count=3 2>/dev/null | sha256sum)";
    let guest = Guest::new(bed)?.with(json!({ "disks": [disk(&path, "data", true)] }));
    let ran = guest.run(script)?.passes()?;
    ran.prints(&format!("sectors {}", content.len() / 512))?;
    ran.prints(&format!("whole {}", sha256_hex(&content)))?;
    ran.prints(&format!("part {}", sha256_hex(&content[77 * 512..80 * 512])))
}

fn what_the_guest_writes_is_in_the_file(bed: &Bed) -> Story {
    let mut expected = Noise::new(2).bytes(4 * MIB);
    let path = bed.write("disk", &expected)?;
    let script = "tr '\\0' x < /dev/zero | dd of=/dev/vda bs=4096 seek=100 count=300 iflag=fullblock conv=fsync \
                  2>/dev/null\n\
                  printf end | dd of=/dev/vda bs=1 seek=4194301 conv=fsync 2>/dev/null\n\
                  echo whole $(sha256sum < /dev/vda)";
    expected[100 * 4096..400 * 4096].fill(b'x');
    expected[4 * MIB - 3..].copy_from_slice(b"end");
    let guest = Guest::new(bed)?.with(json!({ "disks": [disk(&path, "data", false)] }));
    let ran = guest.run(script)?.passes()?;
    ran.prints(&format!("whole {}", sha256_hex(&expected)))?;
    ensure!(fs::read(&path)? == expected, "the file has other bytes than the guest's disk");
    Ok(())
}

fn read_only_disk_refuses_writes(bed: &Bed) -> Story {
    let content = Noise::new(3).bytes(MIB);
    let path = bed.write("disk", &content)?;
    let script = "echo read-only $(cat /sys/block/vda/ro)\n\
                  if dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync; then exit 1; fi\n\
                  sha256sum < /dev/vda";
    let guest = Guest::new(bed)?.with(json!({ "disks": [disk(&path, "data", true)] }));
    let ran = guest.run(script)?.passes()?;
    ran.prints("read-only 1")?;
    ran.prints("Operation not permitted")?;
    ran.prints(&sha256_hex(&content))?;
    ensure!(fs::read(&path)? == content, "a read-only disk's file has changed");
    Ok(())
}

fn several_disks_keep_their_order_names_and_content(bed: &Bed) -> Story {
    const DISKS: u64 = 5;
    let contents: Vec<Vec<u8>> = (0..DISKS).map(|number| Noise::new(number).bytes(64 * 1024)).collect();
    let disks = contents.iter().enumerate().map(|(number, content)| {
        let path = bed.write(&format!("disk{number}"), content)?;
        Ok(disk(&path, &format!("serial-{number}"), number % 2 == 0))
    });
    let disks = disks.collect::<Result<Vec<_>>>()?;
    let script = "for letter in a b c d e; do\n\
                  echo vd$letter $(cat /sys/block/vd$letter/serial) $(sha256sum < /dev/vd$letter)\n\
                  done";
    let ran = Guest::new(bed)?.with(json!({ "disks": disks })).run(script)?.passes()?;
    for ((letter, number), content) in ('a'..).zip(0..).zip(&contents) {
        let number: u32 = number;
        ran.prints(&format!("vd{letter} serial-{number} {}", sha256_hex(content)))?;
    }
    Ok(())
}

fn discards_and_zeroes_reach_the_file(bed: &Bed) -> Story {
    let mut expected = Noise::new(4).bytes(4 * MIB);
    let path = bed.write("disk", &expected)?;
    let before = fs::metadata(&path)?.blocks();
    let script = "cd /sys/block/vda/queue\n\
                  echo sizes $(cat logical_block_size physical_block_size minimum_io_size)\n\
                  echo most $(cat discard_max_bytes write_zeroes_max_bytes)\n\
                  blkdiscard -o 1048576 -l 1048576 /dev/vda\n\
                  dd if=/dev/zero of=/dev/vda bs=4096 seek=768 count=1 conv=notrunc,fsync 2>/dev/null\n\
                  echo whole $(sha256sum < /dev/vda)";
    let guest = Guest::new(bed)?.with(json!({ "disks": [disk(&path, "data", false)] }));
    let ran = guest.run(script)?.passes()?;
    ran.prints("sizes 512 4096 4096")?;
    ran.prints("most 4194304 4194304")?;
    expected[MIB..2 * MIB].fill(0);
    expected[3 * MIB..3 * MIB + 4096].fill(0);
    ran.prints(&format!("whole {}", sha256_hex(&expected)))?;
    ensure!(fs::read(&path)? == expected, "the file has other bytes than the guest's disk");
    let after = fs::metadata(&path)?.blocks();
    ensure!(after + 2048 <= before, "a mebibyte was discarded, and {before} blocks became {after}");
    Ok(())
}

fn direct_disk_is_written_by_many_at_once(bed: &Bed) -> Story {
    const WRITERS: usize = 8;
    let path = bed.write("disk", &vec![0; WRITERS * MIB])?;
    let script = "for n in 0 1 2 3 4 5 6 7; do\n\
                  (tr '\\0' $n < /dev/zero | dd of=/dev/vda bs=64k seek=$((n * 16)) count=16 iflag=fullblock \
                  oflag=direct 2>/dev/null) &\n\
                  done; wait; sync\n\
                  echo whole $(sha256sum < /dev/vda)";
    let disk = disk_with(&path, "data", json!({ "direct": true }));
    let ran = Guest::new(bed)?.with(json!({ "disks": [disk] })).run(script)?.passes()?;
    let expected: Vec<u8> = (b'0'..b'8').flat_map(|digit| vec![digit; MIB]).collect();
    ran.prints(&format!("whole {}", sha256_hex(&expected)))?;
    ensure!(fs::read(&path)? == expected, "the file has other bytes than the guest's disk");
    Ok(())
}

fn driver_that_is_unbound_under_load_loses_nothing_it_was_told(bed: &Bed) -> Story {
    let path = bed.write("disk", &vec![0; 8 * MIB])?;
    // A writer is cut off in the middle, three times. What comes back after the driver is bound anew is intact.
    let script = "set +e; driver=/sys/bus/virtio/drivers/virtio_blk\n\
                  for round in 1 2 3; do\n\
                  (tr '\\0' $round < /dev/zero | dd of=/dev/vda bs=4k count=2000 iflag=fullblock oflag=direct \
                  2>/dev/null; :) &\n\
                  sleep 0.1; echo virtio0 > $driver/unbind; wait; echo virtio0 > $driver/bind\n\
                  tr '\\0' $round < /dev/zero | dd of=/dev/vda bs=64k count=16 iflag=fullblock conv=fsync 2>/dev/null\n\
                  echo round$round $(dd if=/dev/vda bs=64k count=16 2>/dev/null | sha256sum)\n\
                  done; true";
    let disk = disk_with(&path, "data", json!({ "direct": true }));
    let ran = Guest::new(bed)?.with(json!({ "disks": [disk] })).run(script)?.passes()?;
    for (name, digit) in [("round1", b'1'), ("round2", b'2'), ("round3", b'3')] {
        ran.prints(&format!("{name} {}", sha256_hex(&vec![digit; MIB])))?;
    }
    let content = fs::read(&path)?;
    ensure!(content[..MIB] == vec![b'3'; MIB], "the file has other bytes than the guest was told");
    Ok(())
}

fn full_file_system_is_an_error_for_the_guest_only(bed: &Bed) -> Story {
    let small = bed.scratch().join("small");
    fs::create_dir(&small)?;
    mount("cloche-tests", &small, "tmpfs", MountFlags::empty(), c"size=1m").context("mount a small tmpfs")?;
    let story = fill_up(bed, &small);
    unmount(&small, UnmountFlags::empty()).context("unmount the small tmpfs")?;
    story
}

fn fill_up(bed: &Bed, small: &Path) -> Story {
    for fields in [json!({}), json!({ "direct": true })] {
        let path = small.join("disk");
        fs::File::create(&path)?.set_len(8 * MIB as u64)?;
        let other = bed.write("other", &Noise::new(5).bytes(MIB))?;
        let script = "if dd if=/dev/vdb of=/dev/vda bs=64k count=1 seek=100 conv=fsync; then :; else exit 9; fi\n\
                      if tr '\\0' x < /dev/zero | dd of=/dev/vda bs=64k count=64 iflag=fullblock conv=fsync; \
                      then exit 8; fi\n\
                      echo alive $(sha256sum < /dev/vdb)";
        let disks = json!([disk_with(&path, "small", fields), disk(&other, "other", true)]);
        let ran = Guest::new(bed)?.with(json!({ "disks": disks })).run(script)?.passes()?;
        ran.prints("I/O error")?;
        ran.prints(&format!("alive {}", sha256_hex(&fs::read(&other)?)))?;
        fs::remove_file(&path)?;
    }
    Ok(())
}

fn limits_of_a_disk_hold(bed: &Bed) -> Story {
    let path = bed.write("disk", &vec![0; MIB])?;
    // 70 operations, of which 10 are free: 60 at 50 a second.
    let script = "up() { awk '{ print int($1 * 100) }' /proc/uptime; }\n\
                  for disk in vda vdb; do\n\
                  from=$(up); dd if=/dev/$disk of=/dev/null bs=4096 count=70 iflag=direct 2>/dev/null\n\
                  echo $disk $(($(up) - from))\n\
                  done";
    let ops = json!({ "limit": { "ops": { "per_second": 50, "burst": 10 } } });
    let bytes = json!({ "limit": { "bytes": { "per_second": 50 * 4096, "burst": 10 * 4096 } } });
    let disks = json!([disk_with(&path, "ops", ops), disk_with(&path, "bytes", bytes)]);
    let ran = Guest::new(bed)?.with(json!({ "disks": disks })).run(script)?.passes()?;
    for name in ["vda", "vdb"] {
        let hundredths: u32 = ran.value(name)?.parse()?;
        // The partition scan has used some of the burst; an emulated machine may take longer.
        ensure!(
            hundredths >= 110,
            "70 operations took {hundredths} hundredths of a second\n{}",
            ran.describe()
        );
        ensure!(
            hundredths <= 600,
            "70 operations took {hundredths} hundredths of a second\n{}",
            ran.describe()
        );
    }
    Ok(())
}
