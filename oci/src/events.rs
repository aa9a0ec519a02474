//! `events`: what a container uses, and when it runs out of memory. The kernel tells of the latter; nothing is sampled
//! for it.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use cloche_runtime::cgroup::{Cgroup, Layout, OomWatch};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{
    error::{Error, system},
    state::{Home, Known, Status},
};

/// Something to tell of a container.
#[derive(Debug, Serialize)]
pub struct Event<'a> {
    /// `stats` or `oom`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The container's id.
    pub id: &'a str,
    /// The statistics.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
}

/// One report of what a container uses, in the form that other runtimes print, and with its pressure stalls.
pub fn statistics<'a>(home: &Home<'_>, id: &'a str) -> Result<Event<'a>, Error> {
    let known = home.find(id)?;
    if known.status() == Status::Stopped {
        return Err(Error::NotRunning(id.to_owned(), "stopped"));
    }
    Ok(Event { kind: "stats", id, data: Some(report(&known.cgroup()?)) })
}

/// Reports statistics at every interval and out-of-memory events as they come, until the container ends or nobody
/// listens any more.
pub fn watch(
    home: &Home<'_>,
    id: &str,
    interval: Duration,
    tell: &mut dyn FnMut(&Event<'_>) -> bool,
) -> Result<(), Error> {
    let known = home.find(id)?;
    let (pidfd, cgroup) = (open_first(&known)?, known.cgroup()?);
    let mut oom = cgroup.watch_oom().ok();
    let mut next = Instant::now();
    loop {
        if Instant::now() >= next {
            if !tell(&Event { kind: "stats", id, data: Some(report(&cgroup)) }) {
                return Ok(());
            }
            next = Instant::now() + interval;
        }
        let (has_ended, may_be_oom) = wait(pidfd.as_fd(), oom.as_ref(), next)?;
        // Before the end is, since one is often the cause of the other.
        if may_be_oom
            && let Some(oom) = &mut oom
            && oom.take().unwrap_or(false)
            && !tell(&Event { kind: "oom", id, data: None })
        {
            return Ok(());
        }
        if has_ended {
            return Ok(());
        }
    }
}

fn open_first(known: &Known) -> Result<OwnedFd, Error> {
    let process = known.record.process.ok_or_else(|| Error::NotRunning(known.id().to_owned(), "stopped"))?;
    let pidfd = process.open().map_err(system("open the container's process"))?;
    pidfd.ok_or_else(|| Error::NotRunning(known.id().to_owned(), "stopped"))
}

fn wait(pidfd: BorrowedFd<'_>, oom: Option<&OomWatch>, until: Instant) -> Result<(bool, bool), Error> {
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    let mut fds = vec![PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    if let Some(oom) = oom {
        fds.push(PollFd::from_borrowed_fd(oom.as_fd(), oom.events()));
    }
    match poll(&mut fds, Some(&left)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(system("wait for events")(errno)),
    }
    let is_ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
    Ok((is_ready(0), is_ready(1) || is_ready(0)))
}

fn report(cgroup: &Cgroup) -> Value {
    let usage = cgroup.usage();
    let number = |reading: Result<u64, &'static str>| reading.unwrap_or(0);
    let find = |controller: &str| cgroup.directory_of(controller);
    let memory = find("memory");
    let raw = memory.as_deref().map(|directory| numbers(directory, "memory.stat")).unwrap_or_default();
    let limit = usage.memory_limit_bytes.unwrap_or(u64::MAX);
    // How often the limit was hit.
    let hits = memory.as_deref().and_then(|directory| {
        let of_v2 = || numbers(directory, "memory.events").get("max")?.as_u64();
        one(directory, "memory.failcnt").or_else(of_v2)
    });
    // On v2 these files do not exist, and cpu.stat tells below.
    let spent = |file| find("cpuacct").and_then(|directory| one(&directory, file));
    let (kernel, user) = (spent("cpuacct.usage_sys"), spent("cpuacct.usage_user"));
    let each = find("cpuacct").and_then(|directory| text(&directory, "cpuacct.usage_percpu").ok());
    let each: Vec<u64> = each.iter().flat_map(|each| each.split_whitespace()).flat_map(str::parse).collect();
    let cached = ["file", "total_cache", "cache"].iter().find_map(|key| raw.get(*key)?.as_u64());
    let of_v1 = |kind: &str| memory.as_deref().map_or(json!({}), |directory| entry(directory, kind));
    let mut data = json!({
        "cpu": {
            "usage": { "total": number(usage.cpu_ns), "percpu": each, "kernel": kernel, "user": user },
            "throttling": {},
        },
        "memory": {
            "cache": cached,
            "swap": of_v1("memsw"),
            "kernel": of_v1("kmem"),
            "kernelTCP": of_v1("kmem.tcp"),
            "usage": {
                "limit": limit,
                "usage": number(usage.memory_bytes),
                "max": cgroup.memory_peak_bytes().unwrap_or(0),
                "failcnt": hits,
            },
            "raw": raw,
        },
        "pids": { "current": number(usage.pids), "limit": find("pids").and_then(|directory| one(&directory, "pids.max")).unwrap_or(0) },
        "blkio": block_io(cgroup),
        "hugetlb": hugetlb(cgroup),
        "intel_rdt": {},
        "network_interfaces": null,
    });
    if let Some(unified) = cgroup.unified_directory() {
        let cpu = numbers(unified, "cpu.stat");
        let ns = |key: &str| cpu.get(key).and_then(Value::as_u64).unwrap_or(0).saturating_mul(1000);
        data["cpu"]["usage"]["user"] = ns("user_usec").into();
        data["cpu"]["usage"]["kernel"] = ns("system_usec").into();
        if cgroup.layout() == Layout::V2 {
            data["memory"]["swap"] = json!({
                "usage": one(unified, "memory.swap.current"),
                "limit": one(unified, "memory.swap.max").unwrap_or(u64::MAX),
                "max": one(unified, "memory.swap.peak"),
                "failcnt": numbers(unified, "memory.swap.events").get("fail"),
            });
            data["cpu"]["throttling"] = json!({
                "periods": cpu.get("nr_periods"),
                "throttledPeriods": cpu.get("nr_throttled"),
                "throttledTime": ns("throttled_usec"),
            });
        }
        for (resource, file) in
            [("cpu", "cpu.pressure"), ("memory", "memory.pressure"), ("blkio", "io.pressure")]
        {
            if let Some(pressure) = pressure(unified, file) {
                data[resource]["psi"] = pressure;
            }
        }
    }
    data
}

/// One of the things that cgroup v1's memory controller counts apart.
fn entry(directory: &Path, kind: &str) -> Value {
    let of = |file: &str| one(directory, &format!("memory.{kind}.{file}"));
    json!({
        "limit": of("limit_in_bytes"),
        "usage": of("usage_in_bytes"),
        "max": of("max_usage_in_bytes"),
        "failcnt": of("failcnt"),
    })
}

/// Bytes and requests of each device, in both directions.
fn block_io(cgroup: &Cgroup) -> Value {
    let Some(directory) = cgroup.directory_of("blkio") else { return json!({}) };
    let list = |v1: &str, [read, written]: [&str; 2]| match text(&directory, v1) {
        // Lines such as `8:0 Read 4096`.
        Ok(text) => text
            .lines()
            .filter_map(|line| {
                let [device, operation, value] = *line.split(' ').collect::<Vec<_>>().as_slice() else {
                    return None;
                };
                of_device(device, operation, value)
            })
            .collect(),
        // Lines such as `8:0 rbytes=4096 wbytes=0`.
        Err(_) => text(&directory, "io.stat")
            .unwrap_or_default()
            .lines()
            .flat_map(|line| {
                let (device, fields) = line.split_once(' ').unwrap_or_default();
                let field = |key: &str| {
                    fields.split(' ').find_map(|field| field.strip_prefix(key)?.strip_prefix('='))
                };
                [("Read", field(read)), ("Write", field(written))]
                    .map(|(operation, value)| of_device(device, operation, value?))
            })
            .flatten()
            .collect::<Vec<_>>(),
    };
    json!({
        "ioServiceBytesRecursive": list("blkio.throttle.io_service_bytes_recursive", ["rbytes", "wbytes"]),
        "ioServicedRecursive": list("blkio.throttle.io_serviced_recursive", ["rios", "wios"]),
    })
}

fn of_device(device: &str, operation: &str, value: &str) -> Option<Value> {
    let (major, minor) = device.split_once(':')?;
    let number = |text: &str| text.parse::<u64>().ok();
    Some(
        json!({ "major": number(major)?, "minor": number(minor)?, "op": operation, "value": number(value)? }),
    )
}

/// Huge pages of each size that the machine has.
fn hugetlb(cgroup: &Cgroup) -> Value {
    let Some(directory) = cgroup.directory_of("hugetlb") else { return json!({}) };
    let names = std::fs::read_dir(&directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|file| file.file_name().into_string().ok());
    let sizes = names.filter_map(|name| {
        let size = name.strip_prefix("hugetlb.")?;
        let size = size.strip_suffix(".usage_in_bytes").or_else(|| size.strip_suffix(".current"))?;
        // Reservations are counted apart.
        (!size.ends_with("rsvd")).then(|| size.to_owned())
    });
    let entries = sizes.map(|size| {
        let of = |files: [&str; 2]| {
            files.iter().find_map(|file| one(&directory, &format!("hugetlb.{size}.{file}")))
        };
        let events = numbers(&directory, &format!("hugetlb.{size}.events"));
        let hits = of(["failcnt"; 2]).or_else(|| events.get("max")?.as_u64());
        let entry = json!({
            "usage": of(["usage_in_bytes", "current"]), "max": of(["max_usage_in_bytes"; 2]), "failcnt": hits,
        });
        (size, entry)
    });
    Value::Object(entries.collect())
}

fn text(directory: &Path, file: &str) -> io::Result<String> {
    const ENOUGH_BYTES: u64 = 1 << 16;
    let mut text = String::new();
    File::open(directory.join(file))?.take(ENOUGH_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

fn one(directory: &Path, file: &str) -> Option<u64> {
    text(directory, file).ok()?.trim().parse().ok()
}

/// Lines such as `anon 4096`.
fn numbers(directory: &Path, file: &str) -> Map<String, Value> {
    let text = text(directory, file).unwrap_or_default();
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs
        .filter_map(|(key, value)| Some((key.to_owned(), value.trim().parse::<u64>().ok()?.into())))
        .collect()
}

/// Lines such as `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` (kernel: `accounting/psi.rst`).
fn pressure(directory: &Path, file: &str) -> Option<Value> {
    let text = text(directory, file).ok()?;
    let lines = text.lines().filter_map(|line| {
        let (kind, fields) = line.split_once(' ')?;
        let fields = fields.split_whitespace().filter_map(|field| {
            let (key, value) = field.split_once('=')?;
            // Averages are percentages; the total is microseconds, which readers want as a whole number.
            let whole = || value.parse::<u64>().ok().map(Value::from);
            let number = if key == "total" { whole() } else { value.parse::<f64>().ok().map(Value::from) };
            Some((key.to_owned(), number?))
        });
        Some((kind.to_owned(), Value::Object(fields.collect())))
    });
    Some(Value::Object(lines.collect()))
}
