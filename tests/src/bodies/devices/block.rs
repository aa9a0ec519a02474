//! Block devices.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
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
];

const MIB: usize = 1 << 20;

fn disk(path: &PathBuf, id: &str, read_only: bool) -> Value {
    json!({ "path": path, "id": id, "read_only": read_only })
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
