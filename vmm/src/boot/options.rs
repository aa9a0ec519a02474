//! What the kernel is told besides its devices; [`super::cmdline`] says why. By itself, so that the benchmark can tell it
//! to the guests of other VMMs.

/// On any machine.
pub const OPTIONS: &str =
    "console=ttyS0 quiet reboot=t panic=-1 rootfstype=ramfs 8250.nr_uarts=1 8250.skip_txen_test=1";
/// With one vCPU.
pub const ONE_VCPU: &str = "noreplace-smp";
