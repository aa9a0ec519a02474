//! When a guest writes Cloche's mark port, told by the host's kernel: it sees the same moment for every VMM, whatever that
//! makes of the write.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// `cloche_protocol::machine::io_port::MARK`.
const MARK_PORT: &str = "0x5c0";
const TRACEFS: &str = "/sys/kernel/tracing";

/// A trace of its own, in which such writes are and nothing else. It ends with this.
pub struct PortTrace {
    instance: PathBuf,
    mounted: bool,
}

impl PortTrace {
    /// Begins one.
    pub fn start() -> Result<Self> {
        let instances = Path::new(TRACEFS).join("instances");
        let missing = !instances.exists();
        let mounted = missing && mount("tracefs", TRACEFS, "tracefs", MountFlags::empty(), None).is_ok();
        let instance = instances.join(format!("cloche-bench-{}", std::process::id()));
        let made = fs::create_dir(&instance);
        let trace = Self { instance, mounted };
        made.with_context(|| {
            format!("make {}; only root has the trace that tells when a guest runs", trace.instance.display())
        })?;
        // The clock of all other times, CLOCK_MONOTONIC.
        trace.write("trace_clock", "mono")?;
        trace.write("events/kvm/kvm_pio/filter", &format!("port == {MARK_PORT}"))?;
        trace.write("events/kvm/kvm_pio/enable", "1")?;
        Ok(trace)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.instance.join(name);
        fs::write(&path, text).with_context(|| format!("write {text:?} to {}", path.display()))
    }

    /// Forgets what was written so far.
    pub fn clear(&self) -> Result<()> {
        self.write("trace", "")
    }

    /// When the port was first written since.
    pub fn first_ns(&self) -> Result<Option<u64>> {
        let trace = fs::read_to_string(self.instance.join("trace")).context("read the kernel's trace")?;
        Ok(first_write_ns(&trace))
    }
}

impl Drop for PortTrace {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.instance);
        if self.mounted {
            let _ = unmount(TRACEFS, UnmountFlags::DETACH);
        }
    }
}

/// `TASK-PID [CPU] FLAGS SECONDS.MICROSECONDS: kvm_pio: pio_write at 0x5c0 …`
fn first_write_ns(trace: &str) -> Option<u64> {
    let write = trace.lines().find_map(|line| line.split_once(": kvm_pio: pio_write at 0x5c0 "));
    let (seconds, micros) = write?.0.rsplit(' ').next()?.split_once('.')?;
    let (seconds, micros): (u64, u64) = (seconds.parse().ok()?, micros.parse().ok()?);
    Some((seconds * 1_000_000 + micros) * 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_write_is_found_among_the_trace_s_lines() {
        let line = "      fc_vcpu 0-77  [001] d..1.  1234.000567: kvm_pio: pio_write at 0x5c0 size 1 count 1 val 0x1 \n";
        let trace = format!("# tracer: nop\n#\n{line}{}", line.replace("000567", "999999"));
        assert_eq!(first_write_ns(&trace), Some(1_234_000_567_000));
        assert_eq!(first_write_ns("# tracer: nop\n"), None);
    }
}
