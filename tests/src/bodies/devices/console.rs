//! The console device.

use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, ensure};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::json;

use crate::bed::Bed;
use crate::guest::Guest;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(console_device_prints_and_takes_what_is_typed).only(Isolation::Vm),
    body!(output_of_the_console_device_is_kept_without_a_terminal).only(Isolation::Vm),
];

/// Linux waits for the device with its only vCPU spinning, so that many short lines would take their time here.
fn console_device_prints_and_takes_what_is_typed(bed: &Bed) -> Story {
    let (mut terminal, theirs) = UnixStream::pair()?;
    // The VMM inherits it by its number.
    fcntl_setfd(&theirs, FdFlags::empty())?;
    let script = "exec 3<>/dev/hvc0\n\
                  stty -F /dev/hvc0 raw -echo\n\
                  echo 'who is there?' >&3\n\
                  read -r answer <&3\n\
                  echo \"hello $answer\" >&3\n\
                  seq 20000 > /tmp/numbers; cat /tmp/numbers >&3\n\
                  echo the end >&3";
    let guest =
        Guest::new(bed)?.with(json!({ "console": { "socket_fd": theirs.as_raw_fd() } })).start(script)?;
    drop(theirs);
    terminal.set_read_timeout(Some(bed.deadline().saturating_duration_since(std::time::Instant::now())))?;
    let mut seen = Vec::new();
    let mut typed = false;
    let mut buffer = [0; 4096];
    while !seen.ends_with(b"the end\n") {
        let read = terminal.read(&mut buffer).context("the guest says no more")?;
        ensure!(read > 0, "the console ended after {:?}", String::from_utf8_lossy(&seen));
        seen.extend(buffer.iter().take(read));
        if !typed && seen.ends_with(b"there?\n") {
            terminal.write_all(b"it is me\n")?;
            typed = true;
        }
    }
    let ran = guest.wait()?.passes()?;
    let numbers: String = (1..=20000).map(|number| format!("{number}\n")).collect();
    let expected = format!("who is there?\nhello it is me\n{numbers}the end\n");
    ensure!(seen == expected.as_bytes(), "the terminal saw other bytes\n{}", ran.describe());
    Ok(())
}

fn output_of_the_console_device_is_kept_without_a_terminal(bed: &Bed) -> Story {
    let ran =
        Guest::new(bed)?.with(json!({ "console": {} })).run("echo printed on hvc0 > /dev/hvc0")?.passes()?;
    ran.prints("printed on hvc0")
}
