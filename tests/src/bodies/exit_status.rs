//! How a process's end, or its failure to begin, comes out of `cloche run`.

use anyhow::ensure;

use crate::bed::Bed;
use crate::suite::{Body, Story, body};
use crate::world::Isolation;

pub const BODIES: &[Body] = &[
    body!(exit_code_is_passed_on).rootless(),
    body!(missing_program_is_127).rootless(),
    body!(program_that_is_not_executable_is_126).rootless(),
    body!(script_without_interpreter_is_127),
    body!(death_by_forced_signal_is_128_plus_signal).rootless(),
    body!(death_by_cpu_limit_is_137),
    body!(orphans_die_with_the_first_process).rootless(),
    body!(start_errors_read_the_same_in_both).comparing_both(),
    body!(many_runs_leave_nothing_behind),
];

fn exit_code_is_passed_on(bed: &Bed) -> Story {
    for code in [0, 1, 42, 125, 255] {
        bed.busybox().sh(&format!("exit {code}")).run()?.exits_with(code)?.says_nothing()?;
    }
    bed.busybox().command(&["true"]).run()?.succeeds()?;
    bed.busybox().command(&["false"]).run()?.exits_with(1)?;
    Ok(())
}

fn missing_program_is_127(bed: &Bed) -> Story {
    bed.busybox().command(&["no-such-program"]).run()?.refused_with(127)?.says("no-such-program")?;
    bed.busybox().command(&["/no/such/path"]).run()?.refused_with(127)?.says("/no/such/path")?;
    // The shell finds out by itself.
    bed.busybox().sh("no-such-program").run()?.exits_with(127)?;
    Ok(())
}

fn program_that_is_not_executable_is_126(bed: &Bed) -> Story {
    bed.busybox().command(&["/etc/passwd"]).run()?.refused_with(126)?.says("/etc/passwd")?;
    bed.busybox().command(&["/etc"]).run()?.refused_with(126)?.says("/etc")?;
    bed.busybox().sh("/etc/passwd").run()?.exits_with(126)?;
    Ok(())
}

fn script_without_interpreter_is_127(bed: &Bed) -> Story {
    let mut tree = crate::tree::Tree::default();
    tree.file("script", "#!/no/such/interpreter\n").mode = 0o755;
    let image = bed.generate("scripted", &crate::image::Image::new(vec![tree.to_layer()]))?;
    image.sandbox().command(&["/script"]).run()?.refused_with(127)?.says("/script")?;
    Ok(())
}

fn death_by_forced_signal_is_128_plus_signal(bed: &Bed) -> Story {
    // The first process of a PID namespace ignores what it did not ask for, but not a fault of its own: the endless
    // recursion runs into the end of the stack.
    bed.busybox().sh("f() { f; }; f").run()?.exits_with(128 + 11)?;
    Ok(())
}

fn death_by_cpu_limit_is_137(bed: &Bed) -> Story {
    bed.busybox().sh("ulimit -t 1; while :; do :; done").run()?.exits_with(128 + 9)?;
    Ok(())
}

fn orphans_die_with_the_first_process(bed: &Bed) -> Story {
    // The orphan holds stdout: if it lived on, so would the pipe, and the run would not come to its end.
    bed.busybox().sh("(sleep 100000 &) ; echo leaving").run()?.succeeds()?.prints("leaving\n")?;
    Ok(())
}

fn start_errors_read_the_same_in_both(bed: &Bed) -> Story {
    let vm = bed.under(Isolation::Vm)?;
    for words in [
        &["no-such-program"][..],
        &["/no/such/path", "argument"],
        &["/etc/passwd"],
        &["/etc"],
        &["sh", "-c", "exit 42"],
    ] {
        let in_container = bed.busybox().command(words).run()?;
        let in_vm = vm.busybox().command(words).run()?;
        ensure!(in_container.code() == in_vm.code(), "exit codes differ:\n{in_container}\n{in_vm}");
        ensure!(in_container.err() == in_vm.err(), "messages differ:\n{in_container}\n{in_vm}");
    }
    for user in ["nobody-knows", "root:no-such-group", "4294967296"] {
        let in_container = bed.busybox().with("-u", user).command(&["true"]).run()?.refused_with(125)?;
        let in_vm = vm.busybox().with("-u", user).command(&["true"]).run()?.refused_with(125)?;
        ensure!(in_container.err() == in_vm.err(), "messages differ:\n{in_container}\n{in_vm}");
    }
    vm.check_out()
}

fn many_runs_leave_nothing_behind(bed: &Bed) -> Story {
    for round in 0..bed.many(20, 5) {
        bed.busybox().sh(&format!("echo {round}")).run()?.succeeds()?.prints(&format!("{round}\n"))?;
    }
    let records = bed.records()?;
    ensure!(records.is_empty(), "records of removed sandboxes: {records:?}");
    bed.is_clean()
}
