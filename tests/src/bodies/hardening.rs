//! What the process may not do: capabilities, seccomp, masked and read-only paths, devices. Docker's defaults are the
//! measure, and both isolations are held to the same.

use anyhow::{Context as _, ensure};

use crate::bed::Bed;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(capabilities_are_dockers_default).rootless(),
    body!(other_user_has_no_effective_capability).rootless(),
    body!(blocked_system_calls_fail_with_eperm).rootless(),
    body!(permitted_things_still_work),
    body!(devices_are_limited_to_dockers_default).rootless(),
    body!(proc_and_sys_are_read_only_where_it_matters).rootless(),
    body!(sensitive_paths_are_masked).rootless(),
    body!(masks_cannot_be_lifted).rootless(),
    body!(status_is_equal_in_both).comparing_both(),
    body!(mounts_are_equal_in_both).comparing_both(),
    body!(surroundings_are_equal_in_both).comparing_both(),
];

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_RAW, SYS_CHROOT, MKNOD,
/// AUDIT_WRITE, SETFCAP.
const DOCKER_DEFAULT: &str = "00000000a80425fb";
const NONE: &str = "0000000000000000";
const STATUS: &str = "grep -E '^(Cap...|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t '";

fn capabilities_are_dockers_default(bed: &Bed) -> Story {
    let expected = format!(
        "CapInh:{NONE}\nCapPrm:{DOCKER_DEFAULT}\nCapEff:{DOCKER_DEFAULT}\nCapBnd:{DOCKER_DEFAULT}\nCapAmb:{NONE}\n\
         NoNewPrivs:1\nSeccomp:2\n"
    );
    bed.busybox().sh(STATUS).run()?.succeeds()?.prints(&expected)?;
    Ok(())
}

fn other_user_has_no_effective_capability(bed: &Bed) -> Story {
    let expected = format!(
        "CapInh:{NONE}\nCapPrm:{NONE}\nCapEff:{NONE}\nCapBnd:{DOCKER_DEFAULT}\nCapAmb:{NONE}\nNoNewPrivs:1\nSeccomp:2\n"
    );
    bed.busybox().with("-u", "1000:1000").sh(STATUS).run()?.succeeds()?.prints(&expected)?;
    Ok(())
}

fn blocked_system_calls_fail_with_eperm(bed: &Bed) -> Story {
    let attempts = bed.busybox().each(&[
        // Without seccomp any user may make a user namespace.
        "unshare -U true",
        "unshare -m true",
        "nsenter -t 1 -u true",
        "mkdir /mnt; mount -t tmpfs none /mnt",
        "umount /proc",
        "pivot_root / /mnt",
        "date -s 2001-01-01",
        "dmesg",
        "swapoff /swap",
        "reboot -f",
        "hostname other",
        "ip link set lo down",
    ])?;
    for attempt in attempts {
        // The message decides: busybox's `date` exits with 0 even so.
        let said = attempt.err().to_lowercase();
        let refused = said.contains("not permitted") || said.contains("permission denied");
        ensure!(refused, "not refused for lack of permission\n{attempt}");
    }
    Ok(())
}

fn permitted_things_still_work(bed: &Bed) -> Story {
    let things = bed.busybox().each(&[
        "touch /f && chown 12:34 /f && chmod 4755 /f",
        "chroot / true",
        "mknod /fifo p && mknod /null c 1 3 && echo x > /null",
        "ping -c 1 -W 20 127.0.0.1",
        "echo x > /dev/null && head -c 8 /dev/urandom /dev/zero | wc -c",
        "echo x > /dev/shm/file && cat /dev/shm/file",
        "(echo x | tee /dev/stdout) < /dev/fd/0",
        "test -c /dev/tty && test -L /dev/ptmx && test -d /dev/pts && test -d /dev/mqueue",
        "kill -0 1",
    ])?;
    things.into_iter().try_for_each(|thing| thing.succeeds().map(drop))
}

fn devices_are_limited_to_dockers_default(bed: &Bed) -> Story {
    let numbers = ["c 1 11", "c 1 1", "c 10 232", "b 254 0"]; // kmsg, mem, kvm, a disk
    let attempts =
        numbers.map(|number| format!("rm -f /device; mknod /device {number} && head -c 1 /device"));
    for attempt in bed.busybox().each(&attempts.each_ref().map(String::as_str))? {
        ensure!(attempt.code() != 0, "the device could be read\n{attempt}");
        attempt.says("not permitted")?;
    }
    // `core`, a link to /proc/kcore, is there where the kernel has that.
    let devices = bed.busybox().sh("cd /dev; ls | grep -vx core | xargs echo").run()?.succeeds()?;
    devices.prints("fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero\n")?;
    Ok(())
}

fn proc_and_sys_are_read_only_where_it_matters(bed: &Bed) -> Story {
    let paths = [
        "/proc/sys/kernel/hostname",
        "/proc/sys/vm/drop_caches",
        "/proc/sysrq-trigger",
        "/proc/irq/default_smp_affinity",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/sys/new",
    ];
    // What this kernel does not have is out of reach, too.
    let attempts = paths.map(|path| format!("test -e {path} || echo absent; echo 1 > {path}"));
    for attempt in bed.busybox().each(&attempts.each_ref().map(String::as_str))? {
        ensure!(attempt.code() != 0, "it could be written\n{attempt}");
        let said = attempt.err().to_lowercase();
        let absent = attempt.out() == "absent\n";
        ensure!(absent || said.contains("read-only"), "it is not read-only\n{attempt}");
    }
    bed.busybox().sh("mkdir /sys/fs/cgroup/mine").run()?.exits_with(1)?.says("read-only")?;
    Ok(())
}

fn sensitive_paths_are_masked(bed: &Bed) -> Story {
    // OCI runtime-spec: config-linux.md#masked-paths. The list is Docker's.
    let files = [
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/proc/sched_debug",
    ];
    let directories =
        ["/proc/acpi", "/proc/asound", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"];
    let of_file = |file| format!("test ! -e {file} || test $(head -c 100 {file} | wc -c) = 0");
    let of_directory = |directory| format!("test ! -e {directory} || test -z \"$(ls -A {directory})\"");
    let looks: Vec<String> =
        files.into_iter().map(of_file).chain(directories.into_iter().map(of_directory)).collect();
    for look in bed.busybox().each(&looks.iter().map(String::as_str).collect::<Vec<_>>())? {
        look.succeeds().context("there is something to be read")?;
    }
    Ok(())
}

fn masks_cannot_be_lifted(bed: &Bed) -> Story {
    // A second procfs has no masks; its mount must fail even in a namespace of one's own.
    for attempt in bed.busybox().each(&[
        "umount /proc/kcore",
        "mkdir /mnt; mount -t proc proc /mnt",
        "unshare -Um true",
        "mount -o remount,rw /proc/sys",
    ])? {
        ensure!(attempt.code() != 0, "it succeeded\n{attempt}");
    }
    Ok(())
}

/// Runs the same scripts under both and expects the same output.
fn are_equal_in_both(bed: &Bed, scripts: &[&str]) -> Story {
    let vm = bed.under(Isolation::Vm)?;
    let run = |bed: &Bed| bed.busybox().with("--hostname", "same").each(scripts);
    for (in_container, in_vm) in run(bed)?.into_iter().zip(run(&vm)?) {
        let (in_container, in_vm) = (in_container.succeeds()?, in_vm.succeeds()?);
        ensure!(in_container.out() == in_vm.out(), "they print different things:\n{in_container}\n{in_vm}");
    }
    vm.check_out()
}

fn status_is_equal_in_both(bed: &Bed) -> Story {
    let fields = "^(Cap...|NoNewPrivs|Seccomp|Seccomp_filters|Umask|Uid|Gid|Groups|NSpid):";
    are_equal_in_both(bed, &[&format!("grep -E '{fields}' /proc/self/status")])
}

fn mounts_are_equal_in_both(bed: &Bed) -> Story {
    // Mount point, flags, type; the rest (ids, sizes, sources) is each host's own. So are the masks and read-only
    // paths that are there, since each needs a path of that kernel's to lie on.
    let fields = r"sed -E 's/^[0-9]+ [0-9]+ \S+ \S+ (\S+) (\S+) .*- (\S+) .*/\1 \2 \3/' /proc/self/mountinfo";
    let without_masks = "grep -vE '^/proc/|^/sys/(firmware|devices)'";
    are_equal_in_both(bed, &[&format!("{fields} | {without_masks}")])
}

fn surroundings_are_equal_in_both(bed: &Bed) -> Story {
    are_equal_in_both(
        bed,
        &[
            "env | sort",
            "cd /dev; stat -c '%n %f %t:%T %u:%g' *",
            "cat /proc/self/cgroup",
            // Not -u, which the kernel derives from the memory it has.
            "ulimit -n; ulimit -c; ulimit -s; ulimit -l; ulimit -v",
            "pwd; id; umask; tty || true",
            "cat /proc/sys/kernel/pid_max >/dev/null; ls /proc/self/ns",
            "cat /proc/self/oom_score_adj",
            // Not /proc and /sys, whose link counts are the kernel's.
            "ls -lan / | grep -vE ' (proc|sys)$' | sed 's/ [A-Z][a-z][a-z] .*:[0-9][0-9] / /'",
            "cat /etc/hosts /etc/hostname /etc/resolv.conf 2>/dev/null || true",
        ],
    )
}
