//! A bare guest for tests of devices: `cloche vmm` with the guest kernel, Linux's own drivers, busybox and a script.
//! No image, no agent, no engine, so that a test says exactly which devices there are and what is done to them.
//!
//! ```text
//! Guest ── configuration, script ──▶ cloche vmm ──▶ kernel ──▶ /init ──▶ script      (all on one initramfs)
//!                                       │ events on stdout        └─ console: output, "script ended with N"
//!                                       ▼
//!                                      Ran: reason, exit status and output of the script, console, statistics
//! ```
//!
//! A body looks like this; register it with `.only(Isolation::Vm)`, which makes it need usable KVM:
//!
//! ```ignore
//! fn disk_of_the_host_is_read_byte_by_byte(bed: &Bed) -> Story {
//!     let disk = bed.write("disk", &content)?;
//!     let ran = Guest::new(bed)?
//!         .with(json!({ "disks": [{ "path": disk, "id": "data" }] }))   // fields of `VmConfig`
//!         .run("sha256sum < /dev/vda")?
//!         .passes()?;                                                  // the script's status is 0
//!     ran.prints(&sha256_hex(&content))
//! }
//! ```
//!
//! The script is run by `sh -eu` with every applet of busybox on `PATH`, `/proc`, `/sys`, `/dev` and a tmpfs on
//! `/tmp`, and its stderr goes where its stdout goes. After it the guest resets the machine: a triple fault. Use
//! [`Guest::start`] for what has to happen on the host meanwhile.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::cpio::Archive;
use crate::finished::Finished;
use crate::process::{Input, Running};

/// Printed before the script starts.
const BEGIN: &str = "---- the script begins ----";
/// Printed after it has ended, before its exit status.
const END: &str = "---- the script ended with ";

/// `stty` waits until the serial port has sent everything: a reset loses what has not left the kernel.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
$b mount -t tmpfs tmp /tmp
$b --install -s /bin
export PATH=/bin HOME=/
echo 'BEGIN'
sh -eu /script </dev/null 2>&1
echo "
END$?"
stty -F /dev/ttyS0 sane
reboot -nf
"#;

/// A guest about to be booted: one vCPU, 128 MiB, no devices.
#[derive(Debug)]
pub struct Guest<'a> {
    bed: &'a Bed<'a>,
    config: Value,
    prefix: Vec<String>,
    controlled: bool,
    programs: Vec<(&'static str, Vec<u8>)>,
}

impl<'a> Guest<'a> {
    /// A guest with the kernel that `cloche run` takes.
    pub fn new(bed: &'a Bed<'a>) -> Result<Self> {
        let kernel = bed.run(&["kernel", "path"])?.succeeds()?.out();
        let config = json!({ "vcpus": 1, "memory_mib": 128, "kernel": kernel.trim_end() });
        Ok(Self { bed, config, prefix: Vec::new(), controlled: false, programs: Vec::new() })
    }

    /// Sets fields of the VM's configuration (`VmConfig` in `vmm/src/config.rs`); a field replaces what was there.
    pub fn with(mut self, fields: Value) -> Self {
        if let (Value::Object(all), Value::Object(new)) = (&mut self.config, fields) {
            all.extend(new);
        }
        self
    }

    /// Starts the VMM by these words, e.g. those that lead into another network namespace.
    pub fn inside(mut self, prefix: Vec<String>) -> Self {
        self.prefix = prefix;
        self
    }

    /// Gives the VM a control socket, for [`RunningGuest::ask`].
    pub fn controlled(mut self) -> Self {
        self.controlled = true;
        self
    }

    /// Puts this suite's own program on `PATH` as `cloche-tests`, for its probes.
    pub fn with_probes(mut self) -> Result<Self> {
        let program = fs::read(std::env::current_exe()?).context("read this suite's program")?;
        self.programs.push(("bin/cloche-tests", program));
        Ok(self)
    }

    /// Boots, runs the script, and waits for the end.
    pub fn run(self, script: &str) -> Result<Ran> {
        self.start(script)?.wait()
    }

    /// Boots and comes back at once.
    pub fn start(mut self, script: &str) -> Result<RunningGuest> {
        let busybox = self.busybox()?;
        let mut own = Archive::default();
        own.program("init", INIT.replace("BEGIN", BEGIN).replace("END", END).as_bytes());
        own.program("script", script.as_bytes());
        for (name, program) in &self.programs {
            own.program(name, program);
        }
        // Several guests of one test may run at the same time.
        let place = tempfile::Builder::new().prefix("g").tempdir_in(self.bed.scratch())?.keep();
        let (initramfs, console) = (place.join("init.cpio"), place.join("console"));
        fs::write(&initramfs, own.finish())?;
        self.config["initramfs"] = json!([{ "file": busybox }, { "file": initramfs }]);
        self.config["console_log"] = json!(console);
        self.config["events_fd"] = json!(1);
        if self.config.get("start_timeout_ms").is_none() {
            // Nobody here says `agent-ready`, so that a guest that hangs is ended in time to show its console.
            let left = self.bed.deadline().saturating_duration_since(Instant::now());
            let left = left.saturating_sub(Duration::from_secs(10)).max(Duration::from_millis(1));
            self.config["start_timeout_ms"] = json!(u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
        }
        let control = place.join("control");
        let listener = self.controlled.then(|| UnixListener::bind(&control)).transpose()?;
        if let Some(listener) = &listener {
            // The VMM inherits it by its number.
            fcntl_setfd(listener, FdFlags::empty())?;
            self.config["control_fd"] = json!(listener.as_raw_fd());
        }
        let cloche = &self.bed.world().cloche;
        let mut words = self.prefix.iter().map(OsStr::new).chain([cloche.as_os_str(), OsStr::new("vmm")]);
        let mut command = std::process::Command::new(words.next().context("a command has a program")?);
        command.args(words);
        let vmm = Running::start_alone(
            command,
            &Input::Bytes(self.config.to_string().into_bytes()),
            self.bed.deadline(),
        )?;
        Ok(RunningGuest { vmm, console, control })
    }

    /// The archive with busybox and the directories, the same for all guests of a run of the suite.
    fn busybox(&self) -> Result<PathBuf> {
        let path = self.bed.world().scratch().join("guest-busybox.cpio");
        if !path.exists() {
            let mut archive = Archive::default();
            for directory in ["bin", "dev", "proc", "sys", "tmp", "mnt"] {
                archive.directory(directory);
            }
            archive.program("bin/busybox", self.bed.busybox_binary()?);
            fs::write(&path, archive.finish())?;
        }
        Ok(path)
    }
}

/// A guest that runs.
#[derive(Debug)]
pub struct RunningGuest {
    /// The VMM. Its standard output has the events.
    pub vmm: Running,
    console: PathBuf,
    control: PathBuf,
}

impl RunningGuest {
    /// Asks the VM by its control socket; a refusal is an error.
    pub fn ask(&self, request: Value) -> Result<Value> {
        let mut socket = UnixStream::connect(&self.control).context("connect to the control socket")?;
        let mut call = json!({ "version": 1, "request": request }).to_string();
        call.push('\n');
        socket.write_all(call.as_bytes())?;
        let mut reply = String::new();
        BufReader::new(socket).read_line(&mut reply)?;
        let reply: Value = serde_json::from_str(&reply).with_context(|| format!("{reply:?} is no answer"))?;
        ensure!(reply.get("answer").is_some(), "{call} was refused: {reply}");
        Ok(reply["answer"].clone())
    }

    /// Waits for the VM to end.
    pub fn wait(self) -> Result<Ran> {
        let vmm = self.vmm.wait()?;
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console).replace('\r', "");
        let events = vmm
            .out()
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<Vec<Value>, _>>()
            .with_context(|| format!("an event is not JSON\n{vmm}"))?;
        let last = events.last().with_context(|| format!("the VMM told nothing\n{vmm}"))?.clone();
        Ok(Ran { last, console, vmm })
    }
}

/// A guest that has ended.
#[derive(Debug)]
pub struct Ran {
    /// The last event: `exited` or `failed`.
    pub last: Value,
    /// The end of what the guest printed, at most 64 KiB.
    pub console: String,
    /// The VMM's process; its standard output has all events, a JSON object a line.
    pub vmm: Finished,
}

impl Ran {
    /// Why the VM ended, e.g. `triple-fault`; empty if it never ran.
    pub fn reason(&self) -> &str {
        self.last["reason"]["kind"].as_str().unwrap_or_default()
    }

    /// The script's exit status, if it came to its end.
    pub fn status(&self) -> Option<i32> {
        let (_, after) = self.console.rsplit_once(END)?;
        after.lines().next()?.trim().parse().ok()
    }

    /// What the script printed. Warnings of the kernel may be in between.
    pub fn output(&self) -> &str {
        let after = self.console.split_once(BEGIN).map_or(self.console.as_str(), |(_, after)| after);
        after.rsplit_once(END).map_or(after, |(output, _)| output).trim()
    }

    /// The rest of the first line of output that starts with `name` and a blank.
    pub fn value(&self, name: &str) -> Result<&str> {
        let found = self.output().lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found.map(str::trim).with_context(|| format!("no line starts with {name:?}\n{}", self.describe()))
    }

    /// Expects that the script succeeded and that the guest ended the machine by its reset.
    pub fn passes(self) -> Result<Self> {
        ensure!(self.status() == Some(0), "the script did not succeed\n{}", self.describe());
        ensure!(self.reason() == "triple-fault", "the guest was to reset the machine\n{}", self.describe());
        Ok(self)
    }

    /// Expects this somewhere in the script's output.
    pub fn prints(&self, text: &str) -> Result<()> {
        ensure!(self.output().contains(text), "expected {text:?} in the output\n{}", self.describe());
        Ok(())
    }

    /// For messages: how the VM ended, its console, and what the VMM complained about.
    pub fn describe(&self) -> String {
        let shown = self.console.len().saturating_sub(8192);
        let console = self.console.get(shown..).unwrap_or(&self.console);
        format!(
            "last event: {}\n--- console\n{console}\n--- stderr of the VMM\n{}",
            json!({ "type": self.last["type"], "reason": self.last["reason"], "message": self.last["message"] }),
            self.vmm.err()
        )
    }
}
