//! PID 1 of a Cloche guest: it prepares the kernel's file systems, starts the container that came with the boot and
//! those that the host asks for later, carries their stdio and signals over vsock, and reports how they ended.
//!
//! The boundary: what a container is, is `cloche-runtime`'s business, the same code as on the host; what goes over the
//! wire is `cloche-protocol`'s. This crate knows nothing of KVM.
//!
//! ```text
//!  boot ─▶ connect ─▶ launch ─▶ serve ─▶ report ─▶ wait for the host to end the VM
//!    └────────┴── a failure here is told on the console, then the exit port ends the VM
//!                       └────── a failure here is a `Failed` message
//! ```

mod boot;
mod changes;
mod contained;
mod disks;
mod network;
mod requests;
mod serve;
mod spec;
mod stdio;
mod syscalls;

use std::{fs::File, io::Write};

use cloche_protocol::machine::GuestMark;
use cloche_runtime::chain;

/// Code written to the exit port when the agent cannot serve; the reason is on the console before it.
const EXIT_CODE_AGENT_FAILED: u32 = 125;

/// The serial port in the initramfs; stdio is /dev/null there.
const CONSOLE: &str = "/console";

fn main() {
    syscalls::mark(GuestMark::Init);
    std::panic::set_hook(Box::new(|panic| say(&panic.to_string())));
    if let Err(error) = serve::run() {
        // The console is the only way out: the host shows its end with the exit code.
        say(&chain(&error));
        syscalls::exit_machine(EXIT_CODE_AGENT_FAILED);
    }
    // All is reported, and the host ends the VM. Were PID 1 to return, the kernel would panic.
    loop {
        syscalls::pause();
    }
}

/// Writes a line to the console. Where that cannot be, there is nobody to tell.
fn say(text: &str) {
    if let Ok(mut console) = File::options().write(true).open(CONSOLE) {
        let _ = writeln!(console, "cloche-agent: {text}");
    }
}
