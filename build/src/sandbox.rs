//! RUN: a command in a sandbox on the layers so far, whose changes are the next layer.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command as Process, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cloche_engine::mounts::{MountRequest, MountSource};
use cloche_engine::request::{Isolation, host_memory_bytes};
use cloche_images::{Changes, Digest, FileKind, StoredLayer};
use rustix::process::PidfdFlags;

use crate::Secret;
use crate::dockerfile::{Command, Flag, Heredoc};
use crate::draft::{changed, describe_tree};
use crate::key::Key;
use crate::mounts::{self, Beginning, Kind, Mount, Sharing};
use crate::stage::{Stage, StepError, is_predefined};
use crate::step::{self, Report, Work};
use crate::tree::{Item, Tree};

/// Bytes of one line of output; a longer one is told in pieces.
const MAX_LINE: u64 = 16 << 10;
/// Memory of a VM unless `--memory` says something else. Half of it can be written to; what is not used is not taken.
const VM_MEMORY_BYTES: u64 = 1 << 30;
/// Where a script of a heredoc appears.
const SCRIPTS: &str = "/dev/pipes";

/// What is to be run.
struct Job {
    words: Vec<String>,
    /// For the history and errors.
    shown: String,
    env: Vec<String>,
    mounts: Vec<(Mount, Option<Bound>)>,
    /// A heredoc that names its own interpreter.
    script: Option<(String, String)>,
}

/// What a bind takes files from, and what was there when the step's key was made.
type Bound = (Arc<Tree>, Digest);

/// Carries out a RUN; tells whether its result was known.
pub(crate) fn run(
    stage: &mut Stage<'_, '_>,
    flags: &[Flag],
    command: &Command,
    heredocs: &[Heredoc],
) -> Result<bool, StepError> {
    check(flags).map_err(StepError::Text)?;
    let expand = |text: &str| stage.expand(text).map_err(|error| error.to_string());
    let mounts = mounts::parse(flags, &expand).map_err(StepError::Text)?;
    let (words, script) = words(stage, command, heredocs);
    let config = &stage.done_config();
    let mut env = config.env();
    let mut arguments = BTreeMap::new();
    for (name, value) in stage.arguments() {
        if config.variable(name).is_none() {
            arguments.insert(name.clone(), value.clone());
        }
    }
    env.extend(arguments.iter().map(|(name, value)| format!("{name}={value}")));
    let mut key = stage.key("run");
    words.iter().chain(&env).for_each(|part| key.text(part));
    key.text(&format!("{:?} {} {:?}", config.user(), config.workdir(), script));
    let mut found = Vec::new();
    for mut mount in mounts {
        let bound = describe(stage, &mut key, &mut mount)?;
        found.push((mount, bound));
    }
    // How to reach a proxy is nothing that the result depends on.
    let proxies = stage.build.request.arguments.iter().filter(|(name, _)| is_predefined(name));
    env.extend(proxies.map(|(name, value)| format!("{name}={value}")));
    let shown = words.join(" ");
    let list: Vec<String> = arguments.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let written = match list.len() {
        0 => format!("RUN {shown}"),
        count => format!("RUN |{count} {} {shown}", list.join(" ")),
    };
    let job = Job { words, shown, env, mounts: found, script };
    stage.finish_step(&key, &written, |stage| execute(stage, &job).map(Some))
}

fn check(flags: &[Flag]) -> Result<(), String> {
    for flag in flags {
        let value = flag.value.as_deref();
        match (flag.name.as_str(), value) {
            ("mount", Some(_)) => {}
            // What every sandbox has is `lo` alone, and so both are the same.
            ("network", Some("none" | "default")) => {}
            ("network", Some("host")) => {
                return Err(
                    "--network=host is not supported: a step has a network of its own under either isolation"
                        .into(),
                );
            }
            ("security", Some("sandbox")) => {}
            ("security", _) => {
                return Err("--security=insecure is not supported; a step stays a sandbox".into());
            }
            (name @ ("mount" | "network"), _) => {
                let value = value.unwrap_or_default();
                return Err(format!("--{name}={value} is not supported; see `cloche build --help`"));
            }
            (name, _) => {
                return Err(format!("RUN has no option --{name} here; it has --mount and --network"));
            }
        }
    }
    Ok(())
}

/// The words to run, and a script if a heredoc is one.
fn words(
    stage: &Stage<'_, '_>,
    command: &Command,
    heredocs: &[Heredoc],
) -> (Vec<String>, Option<(String, String)>) {
    let config = stage.done_config();
    match (command, heredocs) {
        (Command::Shell(text), [heredoc]) if !text.contains(char::is_whitespace) => {
            if heredoc.content.starts_with("#!") {
                let path = format!("{SCRIPTS}/{}", heredoc.name.replace('/', "_"));
                return (vec![path.clone()], Some((path, heredoc.content.clone())));
            }
            (config.words(&Command::Shell(heredoc.content.clone())), None)
        }
        (Command::Shell(text), heredocs) => {
            // The shell reads them itself.
            let mut whole = text.clone();
            for heredoc in heredocs {
                whole.push('\n');
                whole.push_str(&heredoc.content);
                whole.push_str(&heredoc.name);
            }
            (config.words(&Command::Shell(whole)), None)
        }
        (command, _) => (config.words(command), None),
    }
}

/// Adds a mount to the key; gives the files that it takes.
fn describe(stage: &mut Stage<'_, '_>, key: &mut Key, mount: &mut Mount) -> Result<Option<Bound>, StepError> {
    key.text(&mount.target);
    match &mut mount.kind {
        Kind::Bind { from, source, writable } => {
            let tree = match from {
                Some(from) => stage.tree_of(from)?,
                None => Arc::clone(&stage.build.context.tree),
            };
            key.text(&format!("bind {writable}"));
            let (_, described) = describe_source(&tree, source)?;
            key.bytes(described.as_bytes());
            Ok(Some((tree, described)))
        }
        Kind::Cache { from: Some(from), source, id, .. } => {
            let tree = stage.tree_of(from)?;
            let (item, described) = describe_source(&tree, source)?;
            if item.info.kind != FileKind::Directory {
                return Err(StepError::Text(format!("{source} is no directory, and a cache is one")));
            }
            // What begins otherwise is another cache.
            id.push_str(&format!(" {described}"));
            key.text(&format!("{:?}", mount.kind));
            Ok(Some((tree, described)))
        }
        // What is in a cache, and what a secret is, is nothing that a result may depend on.
        kind => {
            key.text(&format!("{kind:?}"));
            Ok(None)
        }
    }
}

/// What is to be mounted, and the digest of all that is below it.
fn describe_source(tree: &Tree, source: &str) -> Result<(Item, Digest), StepError> {
    let item = find_source(tree, source)?;
    let described = describe_tree(tree, &item);
    let described = described.map_err(StepError::io(format!("cannot read {source} to mount it")))?;
    Ok((item, described))
}

fn find_source(tree: &Tree, source: &str) -> Result<Item, StepError> {
    let item = tree.resolve(source.as_bytes());
    let item = item.map_err(StepError::io(format!("cannot look for {source} to mount it")))?;
    item.ok_or_else(|| StepError::Text(format!("there is no {source} to mount")))
}

fn execute(stage: &mut Stage<'_, '_>, job: &Job) -> Result<StoredLayer, StepError> {
    let build = stage.build;
    if stage.done.layers.is_empty() {
        let problem =
            "there is nothing to run in an image of no files; begin with FROM an image that has the program";
        return Err(StepError::Text(problem.into()));
    }
    let directory = build.scratch.of_step().map_err(StepError::io("cannot make a directory for mounts"))?;
    let caches = lock_caches(stage, job)?;
    let mut prepared = Prepared { secrets: Vec::new(), mounts: Vec::new() };
    for (number, (mount, bound)) in job.mounts.iter().enumerate() {
        let path = directory.path().join(number.to_string());
        prepare(stage, mount, bound.as_ref(), path, &caches, &mut prepared)?;
    }
    if let Some((target, content)) = &job.script {
        let path = directory.path().join("script");
        mounts::write_file(&path, content.as_bytes(), (0o755, 0, 0))
            .map_err(StepError::io("cannot write the script"))?;
        prepared.mounts.push(bind(target, path, true));
    }
    let request = build.request;
    let config = stage.done_config();
    let secrets = match prepared.secrets.as_slice() {
        [] => None,
        // Like those that are files: not in the store's file system, and gone with the step.
        secrets => {
            let path = directory.path().join("environment");
            let failed = || StepError::io("cannot write the secrets for the sandbox");
            let text = serde_json::to_vec(secrets).map_err(io::Error::from).map_err(failed())?;
            mounts::write_file(&path, &text, (0o600, 0, 0)).map_err(failed())?;
            Some(path)
        }
    };
    let memory_bytes = request.memory_bytes.or_else(|| {
        let is_vm = request.isolation == Isolation::Vm;
        is_vm.then(|| VM_MEMORY_BYTES.min(host_memory_bytes() / 2))
    });
    let work = Work {
        home: request.home.clone(),
        isolation: request.isolation,
        words: job.words.clone(),
        env: job.env.clone(),
        secrets,
        config: config.for_run(),
        layers: stage.done.layers.clone(),
        mounts: prepared.mounts.clone(),
        memory_bytes,
        kernel: request.kernel.clone(),
    };
    build.may_run()?;
    let ran = spawn(stage, &work);
    let (report, changes) = ran?;
    build.go_on()?;
    match report {
        Report::Failed(problem) => return Err(StepError::Sandbox(problem)),
        Report::Exited { code: 0, .. } => {}
        Report::Exited { code, out_of_memory } => {
            let hint = if out_of_memory { " (it ran out of memory; give it more with --memory)" } else { "" };
            return Err(StepError::Run { command: format!("{}{hint}", job.shown), code });
        }
    }
    let (_, latest) = stage.times();
    let mut stubs: Vec<Vec<u8>> =
        prepared.mounts.iter().map(|mount| mount.target.clone().into_bytes()).collect();
    stubs.extend(COVERED.map(|path| path.as_bytes().to_vec()));
    let view = stage.view()?;
    Ok(build.store.add_changes(changes, &view, &Changes { latest, stubs })?)
}

/// What every sandbox has mounted, and finds or makes a place for.
const COVERED: [&str; 3] = ["/dev", "/proc", "/sys"];

struct Prepared {
    /// Variables that are secrets.
    secrets: Vec<String>,
    mounts: Vec<MountRequest>,
}

/// How often a cache is asked for that another step has.
const CACHE_POLL: Duration = Duration::from_millis(50);

/// Caches that are in use while this is there.
struct Caches {
    _locks: Vec<File>,
    /// The names of the private ones, by their targets.
    private: BTreeMap<String, String>,
}

fn lock_caches(stage: &Stage<'_, '_>, job: &Job) -> Result<Caches, StepError> {
    let mut locks = Vec::new();
    let mut private = BTreeMap::new();
    let home = &stage.build.request.home;
    for (id, locked) in mounts::cache_locks(job.mounts.iter().map(|(mount, _)| mount)) {
        loop {
            let lock = mounts::lock_cache(home, id, locked);
            if let Some(lock) = lock.map_err(StepError::io(format!("cannot lock the cache {id}")))? {
                locks.push(lock);
                break;
            }
            stage.build.go_on()?;
            std::thread::sleep(CACHE_POLL);
        }
    }
    for (mount, _) in &job.mounts {
        if let Kind::Cache { id, sharing: Sharing::Private, .. } = &mount.kind {
            let failed = StepError::io(format!("cannot lock the cache {id}"));
            let (name, lock) = mounts::lock_private(home, id).map_err(failed)?;
            locks.push(lock);
            private.insert(mount.target.clone(), name);
        }
    }
    Ok(Caches { _locks: locks, private })
}

fn bind(target: &str, path: PathBuf, read_only: bool) -> MountRequest {
    MountRequest { target: target.to_owned(), read_only, source: MountSource::Bind { path, create: false } }
}

fn prepare(
    stage: &Stage<'_, '_>,
    mount: &Mount,
    bound: Option<&Bound>,
    path: PathBuf,
    caches: &Caches,
    prepared: &mut Prepared,
) -> Result<(), StepError> {
    let target = crate::transfer::absolute(&stage.done_config().workdir(), &mount.target);
    let target = target.trim_end_matches('/');
    if target.is_empty() {
        return Err(StepError::Text("nothing can be mounted upon /".into()));
    }
    let request = stage.build.request;
    match &mount.kind {
        Kind::Bind { source, writable, .. } => {
            let failed = || StepError::io(format!("cannot copy {source} to mount it at {target}"));
            let (tree, described) =
                bound.ok_or_else(|| StepError::Text(format!("there is no {source} to mount")))?;
            let item = find_source(tree, source)?;
            if mounts::materialise(tree, &item, &path).map_err(failed())? != *described {
                return Err(failed()(changed()));
            }
            prepared.mounts.push(bind(target, path, !writable));
        }
        Kind::Cache { id, read_only, source, mode, uid, gid, .. } => {
            let item = match bound {
                Some((tree, _)) => Some((tree, find_source(tree, source)?)),
                None => None,
            };
            let beginning = match &item {
                Some((tree, item)) => Beginning::Of(tree, item),
                None => Beginning::Empty(*mode, *uid, *gid),
            };
            let name = caches.private.get(&mount.target).unwrap_or(id);
            let opened = mounts::open_cache(&request.home, name, &beginning);
            let data = opened.map_err(StepError::io(format!("cannot open the cache {id}")))?;
            prepared.mounts.push(bind(target, data, *read_only));
        }
        Kind::Tmpfs { size } => {
            let size = size.map(|size| format!(":size={size}")).unwrap_or_default();
            let mut asked = MountRequest::parse_tmpfs(&format!("/x{size}"))
                .map_err(|error| StepError::Text(error.to_string()))?;
            // A step may run what it has put there.
            if let MountSource::Tmpfs { options } = &mut asked.source {
                options.retain(|option| option != "noexec");
            }
            prepared.mounts.push(MountRequest { target: target.to_owned(), ..asked });
        }
        Kind::Secret { id, variable, as_file, required, mode, uid, gid } => {
            let content = match request.secrets.get(id) {
                Some(Secret::Value(bytes)) => bytes.clone(),
                Some(Secret::File(path)) => fs::read(path)
                    .map_err(StepError::io(format!("cannot read the secret {id} from {}", path.display())))?,
                None if *required => {
                    return Err(StepError::Text(format!(
                        "the secret {id} is required; give it with --secret id={id},src=FILE"
                    )));
                }
                None => return Ok(()),
            };
            if let Some(variable) = variable {
                let text = String::from_utf8(content.clone()).map_err(|_| {
                    StepError::Text(format!("the secret {id} is no text, and cannot be a variable"))
                })?;
                prepared.secrets.push(format!("{variable}={text}"));
            }
            if *as_file {
                mounts::write_file(&path, &content, (*mode, *uid, *gid))
                    .map_err(StepError::io(format!("cannot write the secret {id} for the sandbox")))?;
                prepared.mounts.push(bind(target, path, true));
            }
        }
    }
    Ok(())
}

/// Gives the slot of a sandbox back, however it ends.
struct Slot<'a, 'b> {
    stage: &'a Stage<'a, 'b>,
    process: Option<Arc<std::os::fd::OwnedFd>>,
}

impl Drop for Slot<'_, '_> {
    fn drop(&mut self) {
        self.stage.build.has_run(self.process.as_ref());
    }
}

/// Runs the work in a process of its own. Gives what it says of the end, and a file from where its changes start.
fn spawn(stage: &Stage<'_, '_>, work: &Work) -> Result<(Report, File), StepError> {
    let mut slot = Slot { stage, process: None };
    let failed = || StepError::io("cannot start a process for the sandbox");
    let exchange = stage.build.store.spool()?;
    step::write_work(&exchange, work).map_err(failed())?;
    let (output, theirs) = io::pipe().map_err(failed())?;
    let mut child = Process::new(&stage.build.request.program)
        .arg(step::WORD)
        .arg(std::process::id().to_string())
        .stdin(Stdio::from(exchange.try_clone().map_err(failed())?))
        .stdout(theirs.try_clone().map_err(failed())?)
        .stderr(theirs)
        .spawn()
        .map_err(failed())?;
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw)
        && let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty())
    {
        let pidfd = Arc::new(pidfd);
        stage.build.runs(&pidfd);
        slot.process = Some(pidfd);
    }
    let told = tell(stage, BufReader::new(output));
    let ended = child.wait();
    told.map_err(StepError::io("cannot read the sandbox's output"))?;
    let status = ended.map_err(failed())?;
    match step::read_report(&exchange) {
        Ok(report) => Ok((report, exchange)),
        Err(_) => Err(StepError::Sandbox(format!("its process ended ({status}) without saying how"))),
    }
}

fn tell(stage: &Stage<'_, '_>, mut output: impl BufRead) -> io::Result<()> {
    loop {
        let mut line = Vec::new();
        if output.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.ends_with(b"\n") {
            line.pop();
        }
        stage.build.observer.output(stage.step, &line);
    }
}
