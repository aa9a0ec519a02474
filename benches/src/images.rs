//! How long an image takes to get ready to start: from an archive, and from a registry on loopback, next to peers.
//!
//! Every contender begins with nothing, in a directory of its own, and ends with an image that the next command can
//! start: unpacked, or converted and merged. Daemons are up before the clock starts. In each round everybody has a turn,
//! so that whatever changes on the machine changes for all.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;

use crate::contender::find_program;
use crate::statistics::Summary;
use crate::surroundings::Surroundings;
use crate::vmms;

/// Between two looks at a command's memory.
const LOOK: Duration = Duration::from_millis(4);
/// A daemon that is not up by then does not come up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Rounds.
    pub runs: u32,
    /// Bytes of the archive.
    pub archive_bytes: u64,
    /// Where this was.
    pub surroundings: Surroundings,
    /// One for each contender of each test.
    pub rows: Vec<Row>,
    /// Peers that could not take part, and why.
    pub missing: Vec<String>,
}

/// One contender's figures.
#[derive(Debug, Serialize)]
pub struct Row {
    /// `load` or `pull`.
    pub test: &'static str,
    /// Who.
    pub contender: &'static str,
    /// In short.
    pub summary: Summary,
    /// In full, in the order of the runs.
    pub series_ns: Vec<u64>,
    /// The commands' own processor time over the time they took, medians; what daemons do is not in it.
    pub processors: f64,
    /// The largest resident set seen, in KiB; not of daemons.
    pub peak_kib: u64,
}

/// One turn.
#[derive(Debug, Clone, Copy, Default)]
struct Turn {
    ns: u64,
    cpu_ns: u64,
    peak_kib: u64,
}

/// What one contender does in its turn. It gets a directory of its own, which is empty.
type Take = Box<dyn FnMut(&Path) -> Result<Turn>>;

struct Contender {
    test: &'static str,
    name: &'static str,
    take: Take,
    turns: Vec<Turn>,
}

/// Measures it: `archive` is a docker-archive of one image.
pub fn measure(archive: &Path, runs: u32) -> Result<Report> {
    let cloche = vmms::cloche()?;
    let archive = archive.canonicalize().with_context(|| format!("find {}", archive.display()))?;
    // Not in memory: all write to a disk, as they do elsewhere.
    let scratch = tempfile::Builder::new().prefix("cloche-bench.").tempdir_in("/var/tmp")?;
    let mut missing = Vec::new();
    let mut daemons = Vec::new();
    let mut contenders = loads(&cloche, &archive, scratch.path(), &mut daemons, &mut missing);
    match Registry::start(scratch.path(), &archive) {
        Ok(registry) => {
            contenders.extend(pulls(&cloche, &registry, &mut missing));
            daemons.push(registry.daemon);
        }
        Err(error) => missing.push(format!("pull: no registry: {error:#}")),
    }
    // The first round shows who works here, and warms the page cache.
    let mut fit = Vec::new();
    for mut contender in contenders {
        match turn(&mut contender, scratch.path()) {
            Ok(_) => fit.push(contender),
            Err(error) if contender.name != "cloche" => {
                missing.push(format!("{} {}: does not run here: {error:#}", contender.test, contender.name));
            }
            Err(error) => return Err(error.context(format!("warm up {}", contender.test))),
        }
    }
    for _ in 0..runs {
        for contender in &mut fit {
            let taken = turn(contender, scratch.path())
                .with_context(|| format!("{} by {}", contender.test, contender.name))?;
            contender.turns.push(taken);
        }
    }
    let rows = fit.into_iter().filter_map(row).collect();
    let archive_bytes = fs::metadata(&archive)?.len();
    let programs =
        ["docker", "podman", "ctr", "skopeo", "umoci"].iter().filter_map(|name| find_program(name));
    let programs: Vec<PathBuf> = std::iter::once(cloche).chain(programs).collect();
    let surroundings = Surroundings::explore(&programs.iter().map(PathBuf::as_path).collect::<Vec<_>>());
    Ok(Report { runs, archive_bytes, surroundings, rows, missing })
}

fn turn(contender: &mut Contender, scratch: &Path) -> Result<Turn> {
    let directory = scratch.join("turn");
    fs::create_dir(&directory)?;
    // What the one before has written is no burden on this one.
    rustix::fs::sync();
    let taken = (contender.take)(&directory);
    fs::remove_dir_all(&directory).context("remove what was loaded")?;
    taken
}

fn row(contender: Contender) -> Option<Row> {
    let series_ns: Vec<u64> = contender.turns.iter().map(|turn| turn.ns).collect();
    let summary = Summary::of(&series_ns)?;
    let cpu: Vec<u64> = contender.turns.iter().map(|turn| turn.cpu_ns).collect();
    Some(Row {
        test: contender.test,
        contender: contender.name,
        summary,
        series_ns,
        processors: Summary::of(&cpu)?.median_ns as f64 / summary.median_ns as f64,
        peak_kib: contender.turns.iter().map(|turn| turn.peak_kib).max()?,
    })
}

/// Runs commands one after the other, and times all of them.
fn time(commands: &mut [Command]) -> Result<Turn> {
    let start = Instant::now();
    let mut turn = Turn::default();
    for command in commands {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {name}"))?;
        let process = PathBuf::from(format!("/proc/{}", child.id()));
        let mut cpu_ns = 0;
        let status = loop {
            // Of a process that has ended there is nothing to read any more.
            cpu_ns = cpu_ns.max(cpu_time_ns(&process).unwrap_or(0));
            turn.peak_kib = turn.peak_kib.max(peak_kib(&process).unwrap_or(0));
            if let Some(status) = child.try_wait()? {
                break status;
            }
            thread::sleep(LOOK);
        };
        turn.cpu_ns += cpu_ns;
        let mut said = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            let _ = std::io::Read::read_to_string(&mut stderr, &mut said);
        }
        ensure!(status.success(), "{name} ended with {status}: {}", said.trim());
    }
    turn.ns = u64::try_from(start.elapsed().as_nanos())?;
    Ok(turn)
}

fn peak_kib(process: &Path) -> Option<u64> {
    let status = fs::read_to_string(process.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// User and system time, also of the children it has waited for (proc_pid_stat(5)); ticks of 10 ms.
fn cpu_time_ns(process: &Path) -> Option<u64> {
    const TICK_NS: u64 = 10_000_000;
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    let fields = stat.rsplit_once(") ")?.1.split(' ');
    let ticks = fields.skip(11).take(4).map(|field| field.parse::<u64>().ok()).sum::<Option<u64>>()?;
    Some(ticks * TICK_NS)
}

fn command<'a>(program: &Path, arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn loads(
    cloche: &Path,
    archive: &Path,
    scratch: &Path,
    daemons: &mut Vec<Daemon>,
    missing: &mut Vec<String>,
) -> Vec<Contender> {
    let mut contenders = Vec::new();
    let mut add = |name, take: Result<Take>| match take {
        Ok(take) => contenders.push(Contender { test: "load", name, take, turns: Vec::new() }),
        Err(error) => missing.push(format!("load {name}: {error:#}")),
    };
    let (program, from) = (cloche.to_owned(), text(archive));
    add(
        "cloche",
        Ok(Box::new(move |directory| {
            let (root, state) = (text(&directory.join("root")), text(&directory.join("state")));
            let arguments = ["--root", &root, "--state", &state, "load", "--input", &from];
            time(&mut [command(&program, arguments)])
        })),
    );
    add("podman", podman(archive));
    add("docker", docker(archive, scratch, daemons));
    add("ctr", containerd(archive, scratch, daemons));
    contenders
}

fn find(name: &str) -> Result<PathBuf> {
    find_program(name).with_context(|| format!("there is no {name}"))
}

fn podman(archive: &Path) -> Result<Take> {
    let (podman, from) = (find("podman")?, text(archive));
    Ok(Box::new(move |directory| {
        let (root, run) = (text(&directory.join("root")), text(&directory.join("run")));
        let global = ["--root", &root, "--runroot", &run, "--storage-driver", "overlay"];
        let load = command(&podman, global.into_iter().chain(["load", "--quiet", "--input", &from]));
        let turn = time(&mut [load]);
        let _ = command(&podman, global.into_iter().chain(["system", "reset", "--force"])).output();
        // Its storage may be mounted upon itself.
        let _ = rustix::mount::unmount(directory.join("root/overlay"), rustix::mount::UnmountFlags::DETACH);
        turn
    }))
}

/// Removes all images after the clock has stopped.
fn docker(archive: &Path, scratch: &Path, daemons: &mut Vec<Daemon>) -> Result<Take> {
    let (docker, dockerd, from) = (find("docker")?, find("dockerd")?, text(archive));
    let socket = scratch.join("docker.sock");
    let host = format!("unix://{}", socket.display());
    let place = |name: &str| text(&scratch.join(name));
    let (data, run, pid) = (place("docker"), place("docker-run"), place("docker.pid"));
    let mut daemon = Command::new(dockerd);
    daemon.args(["--data-root", &data, "--exec-root", &run, "--pidfile", &pid, "--host", &host]);
    daemon.args(["--storage-driver", "overlay2", "--bridge", "none", "--iptables=false"]);
    let ask = {
        let (docker, host) = (docker.clone(), host.clone());
        move |arguments: &[&str]| {
            let mut asked = command(&docker, ["--host", &host]);
            asked.args(arguments);
            asked
        }
    };
    let up = ask.clone();
    daemons.push(Daemon::start(daemon, &scratch.join("dockerd.log"), move || {
        up(&["info"]).output().is_ok_and(|output| output.status.success())
    })?);
    Ok(Box::new(move |_| {
        let turn = time(&mut [ask(&["load", "--quiet", "--input", &from])]);
        let prune = ask(&["system", "prune", "--all", "--force"]).output()?;
        ensure!(prune.status.success(), "docker did not remove the image");
        turn
    }))
}

fn containerd(archive: &Path, scratch: &Path, daemons: &mut Vec<Daemon>) -> Result<Take> {
    let (ctr, containerd, from) = (find("ctr")?, find("containerd")?, text(archive));
    let place = |name: &str| text(&scratch.join(name));
    let (root, state, socket) = (place("containerd"), place("containerd-run"), place("containerd.sock"));
    let config = scratch.join("containerd.toml");
    // Without what serves Kubernetes.
    fs::write(&config, "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n")?;
    let mut daemon = Command::new(containerd);
    daemon.args(["--config", &text(&config), "--root", &root, "--state", &state, "--address", &socket]);
    let (up, address) = (ctr.clone(), socket.clone());
    daemons.push(Daemon::start(daemon, &scratch.join("containerd.log"), move || {
        let version = command(&up, ["--address", &address, "version"]).output();
        version.is_ok_and(|output| output.status.success())
    })?);
    Ok(Box::new(move |_| {
        let ask = |arguments: &[&str]| {
            let mut asked = command(&ctr, ["--address", &socket]);
            asked.args(arguments);
            asked
        };
        let turn = time(&mut [ask(&["images", "import", &from])]);
        let listed = ask(&["images", "list", "--quiet"]).output()?;
        let names = String::from_utf8_lossy(&listed.stdout).into_owned();
        for name in names.lines() {
            // Until its snapshots and blobs are gone, too.
            let removed = ask(&["images", "remove", "--sync", name]).output()?;
            ensure!(removed.status.success(), "containerd did not remove {name}");
        }
        turn
    }))
}

fn pulls(cloche: &Path, registry: &Registry, missing: &mut Vec<String>) -> Vec<Contender> {
    let (program, reference) = (cloche.to_owned(), registry.reference());
    let mut contenders = vec![Contender {
        test: "pull",
        name: "cloche",
        take: Box::new(move |directory| {
            let (root, state) = (text(&directory.join("root")), text(&directory.join("state")));
            let arguments = ["--root", &root, "--state", &state, "pull", "--tls-verify=false", &reference];
            time(&mut [command(&program, arguments)])
        }),
        turns: Vec::new(),
    }];
    let reference = registry.reference();
    match (find("skopeo"), find("umoci")) {
        (Ok(skopeo), Ok(umoci)) => contenders.push(Contender {
            test: "pull",
            name: "skopeo, umoci",
            take: Box::new(move |directory| {
                let layout = text(&directory.join("layout"));
                let (from, to) = (format!("docker://{reference}"), format!("oci:{layout}:image"));
                let (image, bundle) = (format!("{layout}:image"), text(&directory.join("bundle")));
                time(&mut [
                    command(&skopeo, ["copy", "--quiet", "--src-tls-verify=false", &from, &to]),
                    command(&umoci, ["unpack", "--image", &image, &bundle]),
                ])
            }),
            turns: Vec::new(),
        }),
        (skopeo, umoci) => {
            let lacking = [skopeo, umoci].into_iter().filter_map(Result::err);
            missing.extend(lacking.map(|error| format!("pull: {error:#}")));
        }
    }
    contenders
}

/// A registry with the image.
struct Registry {
    daemon: Daemon,
    port: u16,
}

impl Registry {
    fn start(scratch: &Path, archive: &Path) -> Result<Self> {
        let (program, skopeo) = (find("docker-registry")?, find("skopeo")?);
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = scratch.join("registry.yml");
        let storage = scratch.join("registry");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n",
                storage.display()
            ),
        )?;
        let mut daemon = Command::new(program);
        daemon.args(["serve", &text(&config)]);
        let daemon = Daemon::start(daemon, &scratch.join("registry.log"), move || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        })?;
        let registry = Self { daemon, port };
        let (from, to) =
            (format!("docker-archive:{}", archive.display()), format!("docker://{}", registry.reference()));
        let pushed = command(&skopeo, ["copy", "--quiet", "--dest-tls-verify=false", &from, &to]).output()?;
        ensure!(pushed.status.success(), "skopeo: {}", String::from_utf8_lossy(&pushed.stderr).trim());
        Ok(registry)
    }

    fn reference(&self) -> String {
        format!("127.0.0.1:{}/bench/image:latest", self.port)
    }
}

/// A process that serves until this is dropped.
struct Daemon {
    process: Child,
}

impl Daemon {
    fn start(mut command: Command, log: &Path, is_up: impl Fn() -> bool) -> Result<Self> {
        let output = fs::File::create(log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let name = command.get_program().to_string_lossy().into_owned();
        let process = command.spawn().with_context(|| format!("start {name}"))?;
        let mut daemon = Self { process };
        let deadline = Instant::now() + PATIENCE;
        while !is_up() {
            let ended = daemon.process.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let said = fs::read_to_string(log).unwrap_or_default();
                bail!("{name} does not come up: {}", said.lines().last().unwrap_or_default());
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Asked, so that it takes its own children and mounts along.
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(20);
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Report {
    /// Writes everything as JSON.
    pub fn write_json(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("write JSON")?;
        fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
    }

    /// Our median over the best of the peers'.
    fn ratio(&self, test: &str) -> Option<f64> {
        let median = |row: &Row| row.summary.median_ns;
        let rows = || self.rows.iter().filter(|row| row.test == test);
        let ours = rows().find(|row| row.contender == "cloche").map(median)?;
        let best = rows().filter(|row| row.contender != "cloche").map(median).min()?;
        Some(ours as f64 / best as f64)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "an archive of {} MiB, {} rounds", self.archive_bytes >> 20, self.runs)?;
        writeln!(
            f,
            "{}; {} processors",
            self.surroundings.clock.explanation(),
            self.surroundings.processors
        )?;
        let head = ["median", "min", "max", "CPUs", "MiB"];
        writeln!(
            f,
            "{:<24} {:>8} {:>8} {:>8} {:>6} {:>7}  s",
            "", head[0], head[1], head[2], head[3], head[4]
        )?;
        for row in &self.rows {
            let seconds = |ns: u64| ns as f64 / 1e9;
            let Summary { median_ns, min_ns, max_ns } = row.summary;
            writeln!(
                f,
                "{:<24} {:>8.3} {:>8.3} {:>8.3} {:>6.2} {:>7.1}",
                format!("{}: {}", row.test, row.contender),
                seconds(median_ns),
                seconds(min_ns),
                seconds(max_ns),
                row.processors,
                row.peak_kib as f64 / 1024.0,
            )?;
        }
        for test in ["load", "pull"] {
            if let Some(ratio) = self.ratio(test) {
                writeln!(f, "{test}: {ratio:.2} × the best of the peers (target 0.50)")?;
            }
        }
        self.missing.iter().try_for_each(|name| writeln!(f, "{name}"))
    }
}
