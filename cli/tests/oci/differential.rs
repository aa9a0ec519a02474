//! The same bundle under this runtime, runc and crun: each line that its process sees must be one that it sees under one of
//! the others, and what it sees under both of them must be there, but for the differences that are listed here with their
//! reasons.
//!
//! A bundle's process prints sections (`LOOK`); what differs by nature, such as numbers of mounts and names of pipes, is
//! evened out. A peer that refuses a bundle says nothing about it. With `CLOCHE_TEST_RUNTIME=runc` runc is in this
//! runtime's place, and crun alone is its peer: that tests the suite.

mod bundles;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::json;

use crate::{
    Test,
    fixture::{self, Bundle, link_applets},
};
use bundles::{CASES, Case};

/// Lines that one runtime prints and others do not, or the other way round, and why that is as it should be.
struct Difference {
    /// `cloche-container`, or the runtime in its place.
    who: &'static str,
    section: &'static str,
    /// How the lines begin.
    lines: &'static [&'static str],
    reason: &'static str,
}

const DIFFERENCES: &[Difference] = &[
    ours(
        "mountinfo",
        &["/ /sys/fs/cgroup ro,"],
        "read-only was asked for; both leave the hierarchies' directory writable",
    ),
    ours(
        "mountinfo",
        &["/ /sys/fs/cgroup/unified ", "/cloche/ID /sys/fs/cgroup/unified "],
        "it is in the v2 hierarchy beside v1's, too, and sees it",
    ),
    ours("mountinfo", &["/ /sys/fs/cgroup/systemd "], "the source of such a mount is a mere name"),
    ours("mountinfo", &["/ /hidden "], "what hides a directory has no room for anything"),
    ours("hidden", &["/hidden directory drwx"], "nobody is invited to write into what hides a directory"),
    runc("cgroup", &[":/"], "crun does without the v2 hierarchy, which is unmounted for it"),
    runc("descriptors", &["0 "], "runc passes what is read through a pipe of its own"),
    runc("devices", &["'/dev/core' "], "crun links it to what most containers have masked"),
    runc(
        "mountinfo",
        &["/null /proc/keys ", "/null /hidden/file "],
        "what hides a file is the container's null device, or the host's",
    ),
    runc(
        "mountinfo",
        &["/ /sys/fs/cgroup", "/ /sys ro", "/ /hidden ", "/0 /dev/console "],
        "other names and options than crun's",
    ),
    runc(
        "mountinfo",
        &["/full /dev/", "/null /dev/", "/random /dev/", "/tty /dev/", "/urandom /dev/", "/zero /dev/"],
        "crun binds the host's nodes with fewer rights",
    ),
    runc("terminal", &["speed ", "stty: "], "runc run does not read process.consoleSize"),
    runc("personality", &["0000000"], "runc 1.1 does not know linux.personality"),
    runc("names", &["(none)", "example.org"], "runc 1.1 does not know domainname"),
];

const fn ours(section: &'static str, lines: &'static [&'static str], reason: &'static str) -> Difference {
    Difference { who: "cloche-container", section, lines, reason }
}

const fn runc(section: &'static str, lines: &'static [&'static str], reason: &'static str) -> Difference {
    Difference { who: "runc", section, lines, reason }
}

/// What the process looks at. Everything is of the process that looks, not of the shell.
const LOOK: &str = r#"
section() { echo "== $1"; }
section status; cat /proc/self/status
section mountinfo; cat /proc/self/mountinfo
section limits; cat /proc/self/limits
section cgroup; cat /proc/self/cgroup
for file in uid_map gid_map setgroups oom_score_adj personality timens_offsets; do
  section $file; cat /proc/self/$file
done
section namespaces; for kind in /proc/self/ns/*; do echo "${kind##*/} $(readlink $kind)"; done
section devices; for node in /dev/* /dev/pts/*; do stat -c '%N %A %u %g %t:%T' $node; done
section environment; env
section descriptors; ls -l /proc/self/fd
section directory; pwd; stat -c '%A %u %g' .
section names; cat /proc/sys/kernel/hostname /proc/sys/kernel/domainname
section sysctls; for name in kernel/shmmax net/ipv4/ip_forward fs/mqueue/msg_max; do cat /proc/sys/$name; done
section scheduling; cut -d' ' -f18,19,40,41 /proc/self/stat
section terminal; tty; stty -a </dev/tty | head -n 1
section hidden; for path in /proc/kcore /proc/keys /proc/scsi /hidden /hidden/file; do stat -c '%n %F %A' $path; head -c 4 $path | wc -c; done
section closed; for path in /proc/sys/kernel/domainname /closed/file /new; do touch $path && echo "$path writable"; done
section groups; id
section limited; for file in memory.limit_in_bytes memory.max pids.max cpu.shares cpu.weight cpu.cfs_quota_us cpu.max cpuset.cpus; do
  for found in /sys/fs/cgroup/$file /sys/fs/cgroup/*/$file; do test -f $found && echo "$file $(cat $found)"; done
done
section mounted; ls /mounted; mknod /tmp/node c 1 3; umask
section hooks; cat /hooks
section calls; chmod 700 /tmp; ls -d /tmp
"#;

/// The last section of `LOOK`.
const LAST: &str = "== calls";

/// Sections by name, evened out.
type Seen = BTreeMap<String, Vec<String>>;

pub fn all() -> Vec<Test> {
    crate::tests![bundles_look_the_same_as_under_runc_or_crun]
}

fn bundles_look_the_same_as_under_runc_or_crun() {
    let peers: Vec<&str> =
        ["runc", "crun"].into_iter().filter(|peer| *peer != subject() && fixture::has(peer, peer)).collect();
    if peers.is_empty() {
        return;
    }
    // Each waits for its processes most of the time.
    let (next, problems) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let reasons = Mutex::new(BTreeSet::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(case) = CASES.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match compare(case, &peers) {
                        Ok(explained) => reasons.lock().unwrap().extend(explained),
                        Err(problem) => problems.lock().unwrap().push(format!("{}: {problem}", case.name)),
                    }
                }
            });
        }
    });
    for reason in reasons.into_inner().unwrap() {
        eprintln!("{} differs from {}: {reason}", subject(), peers.join(" and "));
    }
    let problems = problems.into_inner().unwrap();
    assert!(
        problems.is_empty(),
        "{} of {} bundles differ (-: only {}; +: all others)\n{}",
        problems.len(),
        CASES.len(),
        subject(),
        problems.join("\n")
    );
}

/// The name of the runtime under test.
fn subject() -> String {
    let other = std::env::var_os("CLOCHE_TEST_RUNTIME").map(PathBuf::from);
    let name = other.as_deref().and_then(Path::file_name);
    name.map_or(fixture::name().into(), |name| name.to_string_lossy().into_owned())
}

/// The reasons of differences, if there are no others.
fn compare(case: &Case, peers: &[&str]) -> Result<Vec<&'static str>, String> {
    let own = see(case, None).map_err(|error| format!("{} does not run it: {error}", subject()))?;
    let seen = peers.iter().filter_map(|peer| Some((*peer, see(case, Some(peer)).ok()?)));
    let others: Vec<(&str, Seen)> = seen.collect();
    if others.is_empty() {
        return Err("no other runtime here runs it".into());
    }
    let (mut unexplained, mut reasons) = (String::new(), Vec::new());
    for (section, lines) in &own {
        let nothing = Vec::new();
        let theirs: Vec<&Vec<String>> =
            others.iter().map(|(_, seen)| seen.get(section).unwrap_or(&nothing)).collect();
        let only_own = lines.iter().filter(|line| !theirs.iter().any(|theirs| theirs.contains(line)));
        let in_all = theirs[0].iter().filter(|line| theirs.iter().all(|theirs| theirs.contains(line)));
        let missing = in_all.filter(|line| !lines.contains(line));
        let different = only_own.map(|line| ('-', line)).chain(missing.map(|line| ('+', line)));
        for (sign, line) in different {
            match explanation(section, line) {
                Some(known) => reasons.push(known.reason),
                None => unexplained += &format!("\n    {section}: {sign} {line}"),
            }
        }
    }
    let names: Vec<_> = others.iter().map(|(peer, _)| *peer).collect();
    let compared = names.join(" and ");
    if unexplained.is_empty() { Ok(reasons) } else { Err(format!("compared with {compared}{unexplained}")) }
}

fn explanation(section: &str, line: &str) -> Option<&'static Difference> {
    DIFFERENCES.iter().find(|known| {
        known.who == subject()
            && known.section == section
            && known.lines.iter().any(|start| line.starts_with(start))
    })
}

/// Runs the bundle and reads what its process printed.
fn see(case: &Case, peer: Option<&str>) -> Result<Seen, String> {
    let bundle = Bundle::script(LOOK);
    for name in ["sys", "dev", "mounted"] {
        fs::create_dir_all(bundle.path("rootfs").join(name)).unwrap();
    }
    link_applets(&bundle, &["stat", "cut", "mknod", "wc"]);
    let path = format!("/cloche/{}", bundle.id);
    let bundle = (case.change)(bundle.with("/linux/cgroupsPath", json!(path)));
    let program = match (peer, std::env::var_os("CLOCHE_TEST_RUNTIME")) {
        (Some(peer), _) => PathBuf::from(peer),
        (None, Some(other)) => PathBuf::from(other),
        (None, None) => {
            let link = bundle.path(fixture::name());
            symlink(fixture::program(), &link).unwrap();
            link
        }
    };
    let plain = bundle.command_of(alone(&program), &["run", &bundle.id]);
    let has_terminal = bundle.config["process"]["terminal"] == true;
    let mut command = if has_terminal { in_terminal(&plain) } else { plain };
    // A terminal whose other side is closed is none. A file, since crun gives the container's user what is its stdin, also
    // if that is the machine's null device.
    let input = if has_terminal {
        Stdio::piped()
    } else {
        fs::write(bundle.path("input"), "").unwrap();
        fs::File::open(bundle.path("input")).unwrap().into()
    };
    let mut child = command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let input = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    drop(input);
    let text = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    if !output.status.success() && !text.contains(LAST) {
        return Err(format!("{text}{}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(even_out(&bundle, &text))
}

/// crun refuses a machine with cgroup v1 and v2 side by side.
fn alone(program: &Path) -> Command {
    let unified = Path::new("/sys/fs/cgroup/unified");
    if !program.ends_with("crun") || !unified.join("cgroup.procs").exists() {
        return Command::new(program);
    }
    let mut command = Command::new("unshare");
    let script = "umount /sys/fs/cgroup/unified; exec \"$0\" \"$@\"";
    command.args(["--mount", "--propagation", "private", "sh", "-c", script]).arg(program);
    command
}

/// The same command with a terminal as its standard input and output.
fn in_terminal(command: &Command) -> Command {
    let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_string_lossy());
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(quoted);
    let line = words.collect::<Vec<_>>().join(" ");
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    script.current_dir(command.get_current_dir().unwrap());
    script
}

/// Numbers and names that are never twice the same become the same.
fn even_out(bundle: &Bundle, text: &str) -> Seen {
    let mut seen = Seen::new();
    let mut section = String::new();
    let directory = bundle.path("").display().to_string();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("== ") {
            section = name.to_owned();
            seen.entry(section.clone()).or_default();
            continue;
        }
        let line = line.replace(directory.trim_end_matches('/'), "BUNDLE").replace(&bundle.id, "ID");
        let line = match section.as_str() {
            "status" => status(&line),
            "mountinfo" => Some(mount_line(&line)),
            "namespaces" => Some(namespace(&line)),
            "descriptors" => descriptor(&line),
            // Without the hierarchy's number.
            "cgroup" => Some(line.split_once(':').map_or(line.clone(), |(_, rest)| rest.to_owned())),
            _ => Some(line),
        };
        seen.entry(section.clone()).or_default().extend(line);
    }
    for section in ["mountinfo", "environment", "devices", "cgroup"] {
        if let Some(lines) = seen.get_mut(section) {
            lines.sort();
        }
    }
    seen
}

/// Of /proc/PID/status, what a runtime decides.
fn status(line: &str) -> Option<String> {
    const KEPT: [&str; 19] = [
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "NStgid",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
        "Cpus_allowed",
        "Mems_allowed",
        "THP_enabled",
    ];
    let (name, value) = line.split_once(':')?;
    let value = match name {
        "NStgid" => value.split_whitespace().count().to_string(),
        // Without the C library's own two (nptl(7)), which its posix_spawn leaves ignored in what it starts, runtimes
        // among it: ours puts them back, others pass them on.
        "SigIgn" => {
            const OF_THE_LIBRARY: u64 = 0b11 << 31;
            let ignored = u64::from_str_radix(value.trim(), 16).ok()?;
            format!("{:016x}", ignored & !OF_THE_LIBRARY)
        }
        _ => value.trim().to_owned(),
    };
    KEPT.contains(&name).then(|| format!("{name} {value}"))
}

/// proc(5), mountinfo: without ids, device numbers, and the numbers of peer groups.
fn mount_line(line: &str) -> String {
    let even = |field: &str| match field.split_once(':') {
        Some((name, number)) if number.bytes().all(|byte| byte.is_ascii_digit()) => name.to_owned(),
        _ => field.to_owned(),
    };
    line.split(' ').skip(3).map(even).collect::<Vec<_>>().join(" ")
}

/// Whether a namespace is this process's.
fn namespace(line: &str) -> String {
    let Some((kind, link)) = line.split_once(' ') else { return line.to_owned() };
    let own = fs::read_link(format!("/proc/self/ns/{kind}")).map(|own| own.display().to_string());
    format!("{kind} {}", if own.is_ok_and(|own| own == link) { "the host's" } else { "new" })
}

/// `ls -l` of a descriptor: its number and what it leads to.
fn descriptor(line: &str) -> Option<String> {
    let (front, target) = line.split_once(" -> ")?;
    let number = front.rsplit(' ').next()?;
    let target = target.split_once(":[").map_or(target, |(kind, _)| kind);
    // The directory that is being listed has a process's number in it.
    let target = if target.starts_with("/proc/") { "the list itself" } else { target };
    Some(format!("{number} {target}"))
}
