//! Containers that reach for their runtime.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    Test,
    fixture::{Bundle, program, text},
};

pub fn all() -> Vec<Test> {
    crate::tests![
        own_program_cannot_be_overwritten_through_exec_of_proc_self_exe,
        own_program_is_not_run_by_a_container,
        working_directory_outside_of_the_root_is_refused,
    ]
}

/// CVE-2019-5736: the container's shell is a script whose interpreter is whatever runs it. `exec` then runs this runtime
/// inside of the container, whose first process opens its file, and writes to it as soon as it has ended.
fn own_program_cannot_be_overwritten_through_exec_of_proc_self_exe() {
    let catch = "
        echo ready
        while :; do
          for process in /proc/[0-9]*; do
            case $(readlink $process/exe) in
              */busybox | /bin/*) ;;
              ?*) exec 7<$process/exe && { echo caught; break 2; } ;;
            esac
          done
        done
        for i in 1 2 3 4 5 6 7 8 9 10; do
          echo overwritten > /proc/self/fd/7
          sleep 0.1
        done
        echo tried; sleep 100";
    let bundle = Bundle::script(catch);
    let shell = bundle.path("rootfs/bin/trap");
    fs::write(&shell, "#!/proc/self/exe\n").unwrap();
    fs::set_permissions(&shell, fs::Permissions::from_mode(0o755)).unwrap();
    let before = fs::read(program()).unwrap();
    bundle.start();
    bundle.await_output("ready");
    // The container has to look at the right moment, which is rare on a busy machine.
    let patience = Instant::now() + Duration::from_secs(30);
    while !bundle.output().contains("caught") && Instant::now() < patience {
        let _ = bundle.run(&["exec", &bundle.id, "/bin/trap"]);
    }
    // It gets hold of the file, but could not write to it.
    bundle.await_output("caught");
    bundle.await_output("tried");
    assert!(bundle.errors().contains("Read-only file system"), "{}", bundle.errors());
    assert!(fs::read(program()).unwrap() == before, "the runtime's own program was overwritten");
}

fn own_program_is_not_run_by_a_container() {
    let bundle = Bundle::new(&["/proc/self/exe"]);
    assert!(bundle.refused(&["run", &bundle.id]).contains("permission denied"));
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    assert!(bundle.refused(&["exec", &bundle.id, "/proc/self/exe"]).contains("permission denied"));
}

/// CVE-2024-21626: a descriptor of the host's as working directory.
fn working_directory_outside_of_the_root_is_refused() {
    for fd in 3..40 {
        let bundle = Bundle::new(&["pwd"]).with("/process/cwd", json!(format!("/proc/self/fd/{fd}")));
        let output = bundle.run(&["run", &bundle.id]);
        assert!(!output.status.success(), "descriptor {fd}: {output:?}");
    }
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    for fd in 3..20 {
        let output = bundle.run(&["exec", "--cwd", &format!("/proc/self/fd/{fd}"), &bundle.id, "ls"]);
        // One of them is of the container's own root, which is where it may be.
        assert!(
            !output.status.success() || text(&output.stdout) == "bin\ndev\netc\nproc\ntmp",
            "{fd}: {output:?}"
        );
    }
}
