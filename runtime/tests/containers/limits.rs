//! Limits by cgroup, and what is left when a container is gone.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use cloche_runtime::{
    ExitStatus,
    cgroup::{Breadth, Cgroup, Layout},
};
use serde_json::json;

use crate::{Test, fixture::Sandbox};

pub fn tests() -> impl IntoIterator<Item = Test> {
    crate::tests![limits:
        memory_limit_hit_ends_the_sandbox_and_is_told,
        memory_limit_hit_by_a_child_ends_the_whole_sandbox,
        memory_peak_is_told,
        pids_limit_holds,
        limits_are_written_to_the_cgroup,
        limit_that_cannot_be_had_is_named,
        memory_limit_too_small_to_start_is_explained,
        leftover_of_a_killed_engine_is_found_and_removed,
        cgroup_in_use_is_not_taken_over,
        processes_that_outlive_the_first_are_killed,
        process_that_comes_in_after_the_killing_does_not_keep_the_cgroup,
    ]
}

/// Grows until it is killed.
const HOG: &str = "x=0123456789abcdef; while :; do x=$x$x; done";

fn memory(limit: i64) -> serde_json::Value {
    json!({ "limit": limit, "swap": limit })
}

fn memory_limit_hit_ends_the_sandbox_and_is_told() {
    let sandbox = Sandbox::script(HOG).with("/linux/resources/memory", memory(32 << 20));
    let exit = sandbox.run().exit;
    assert_eq!(exit.status, ExitStatus::Signal(9));
    assert!(exit.oom_killed);
    assert!(exit.memory_peak_bytes > Some(30 << 20), "{exit:?}");
}

fn memory_limit_hit_by_a_child_ends_the_whole_sandbox() {
    let script = format!("({HOG}); echo survived; sleep 100");
    let outcome = Sandbox::script(&script).with("/linux/resources/memory", memory(32 << 20)).run();
    assert_eq!(outcome.exit.status, ExitStatus::Signal(9));
    assert!(outcome.exit.oom_killed);
}

fn memory_peak_is_told() {
    let sandbox = Sandbox::script("dd if=/dev/zero of=/dev/shm/f bs=1M count=20");
    let exit = sandbox.run().exit;
    assert!(exit.memory_peak_bytes > Some(20 << 20) && !exit.oom_killed, "{exit:?}");
}

fn pids_limit_holds() {
    let script = "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done; echo all";
    let outcome = Sandbox::script(script).with("/linux/resources/pids", json!({ "limit": 5 })).run();
    assert!(outcome.stderr.contains("can't fork"), "{outcome:?}");
    let outcome = Sandbox::script(script).with("/linux/resources/pids", json!({ "limit": 50 })).run();
    assert_eq!(outcome.success(), "all");
}

fn limits_are_written_to_the_cgroup() {
    let sandbox = Sandbox::script("echo ready; sleep 100")
        .with(
            "/linux/resources/memory",
            json!({ "limit": 64 << 20, "swap": 64 << 20, "reservation": 32 << 20 }),
        )
        .with(
            "/linux/resources/cpu",
            json!({ "quota": 50_000, "period": 100_000, "shares": 512, "cpus": "0", "mems": "0" }),
        )
        .with("/linux/resources/pids", json!({ "limit": 77 }));
    let running = sandbox.start().unwrap();
    let cgroup = running.container.cgroup();
    let read = |file: &str| {
        let found = cgroup.paths().map(|path| path.join(file)).find(|path| path.exists());
        fs::read_to_string(found.unwrap_or_else(|| panic!("no {file}"))).unwrap().trim().to_owned()
    };
    if cgroup.layout() == Layout::V2 {
        assert_eq!(read("memory.max"), (64 << 20).to_string());
        assert_eq!(read("memory.low"), (32 << 20).to_string());
        assert_eq!(read("memory.oom.group"), "1");
        assert_eq!(read("cpu.max"), "50000 100000");
        assert_eq!(read("cpu.weight"), "20");
    } else {
        assert_eq!(read("memory.limit_in_bytes"), (64 << 20).to_string());
        assert_eq!(read("memory.soft_limit_in_bytes"), (32 << 20).to_string());
        assert_eq!(read("cpu.cfs_quota_us"), "50000");
        assert_eq!(read("cpu.cfs_period_us"), "100000");
        assert_eq!(read("cpu.shares"), "512");
    }
    assert_eq!(read("cpuset.cpus"), "0");
    assert_eq!(read("pids.max"), "77");
    for path in cgroup.paths() {
        let processes = fs::read_to_string(path.join("cgroup.procs")).unwrap();
        assert!(
            processes.lines().any(|pid| pid == running.container.pid().to_string()),
            "{}",
            path.display()
        );
    }
    running.container.kill().unwrap();
    assert_eq!(running.finish().exit.status, ExitStatus::Signal(9));
}

fn limit_that_cannot_be_had_is_named() {
    let cases = [
        ("/linux/resources/memory", json!({ "limit": 1 << 20, "swap": 1 }), "linux.resources.memory.swap=1"),
        ("/linux/resources/cpu", json!({ "cpus": "4000" }), "cpuset.cpus"),
        ("/linux/resources/unified", json!({ "nosuch.max": "x" }), "linux.resources.unified"),
        ("/linux/cgroupsPath", json!("/cloche/../.."), "the cgroup path \"/cloche/../..\""),
    ];
    for (field, value, name) in cases {
        let (code, message) = Sandbox::new(&["true"]).with(field, value).refusal();
        assert_eq!(code, 125);
        assert!(message.contains(name), "{message}");
    }
}

fn memory_limit_too_small_to_start_is_explained() {
    let (code, message) = Sandbox::new(&["true"]).with("/linux/resources/memory", memory(4096)).refusal();
    assert_eq!(code, 125);
    // On v1, memory used before the process was moved there does not count.
    let expected = ["its memory limit is too small", "memory.limit_in_bytes", "memory.max"];
    assert!(expected.iter().any(|text| message.contains(text)), "{message}");
}

fn leftover_of_a_killed_engine_is_found_and_removed() {
    let sandbox = Sandbox::script("echo ready; sleep 100 & sleep 100");
    let mut running = sandbox.start().unwrap();
    assert_eq!(running.read_line(), "ready");
    let found = Cgroup::open(&sandbox.cgroup_path()).unwrap();
    assert_eq!(found.paths().count(), running.container.cgroup().paths().count());
    found.kill_all().unwrap();
    assert_eq!(running.container.wait().unwrap().status, ExitStatus::Signal(9));
    found.delete().unwrap();
    assert_eq!(Cgroup::open(&sandbox.cgroup_path()).unwrap().paths().count(), 0);
    // Nothing there is nothing wrong.
    Cgroup::open(&sandbox.cgroup_path()).unwrap().kill_all().unwrap();
    Cgroup::open(Path::new("/cloche/never-was")).unwrap().delete().unwrap();
}

fn cgroup_in_use_is_not_taken_over() {
    let sandbox = Sandbox::script("echo ready; sleep 100");
    let running = sandbox.start().unwrap();
    let (code, message) = sandbox.refusal();
    assert_eq!(code, 125);
    assert!(message.contains("cgroup is not empty"), "{message}");
    // Nor is it harmed.
    assert_eq!(running.read_line(), "ready");
    running.container.signal(0).unwrap();
    assert!(fs::exists(format!("/proc/{}", running.container.pid())).unwrap());
    running.container.signal(9).unwrap();
    assert_eq!(running.finish().exit.status, ExitStatus::Signal(9));
}

fn processes_that_outlive_the_first_are_killed() {
    // Without a PID namespace, nothing but the cgroup holds them together.
    let namespaces =
        json!([{ "type": "mount" }, { "type": "uts" }, { "type": "ipc" }, { "type": "network" }]);
    let sandbox =
        Sandbox::script("sleep 100 > /dev/null 2>&1 & echo $!").with("/linux/namespaces", namespaces);
    let running = sandbox.start().unwrap();
    let pid = running.read_line();
    assert!(fs::exists(format!("/proc/{pid}")).unwrap());
    assert_eq!(running.finish().exit.status, ExitStatus::Code(0));
    let is_gone =
        || fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "));
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_gone() {
        assert!(Instant::now() < deadline, "process {pid} is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn process_that_comes_in_after_the_killing_does_not_keep_the_cgroup() {
    let path = format!("/cloche/late-{}", std::process::id());
    let cgroup = Cgroup::create(Path::new(&path), None, Breadth::Needed).unwrap();
    cgroup.kill_all().unwrap();
    let mut late = Command::new("sleep").arg("100").spawn().unwrap();
    for directory in cgroup.paths() {
        fs::write(directory.join("cgroup.procs"), late.id().to_string()).unwrap();
    }
    let started = Instant::now();
    // It is a zombie then, which keeps no cgroup.
    cgroup.delete().unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(late.wait().unwrap().signal(), Some(9));
}
