//! Guests that do what no driver does, on this host's KVM, each against a VMM in a process of its own. Whatever they
//! do: the VMM does not panic, hang, leak or grow; the device that was abused says so and can be reset; its neighbours
//! work on; the end is clean. Any `/dev/kvm` can run them, also one that cannot run Linux. Where there is none, the
//! tests count as ignored.

mod allocator;
mod assembler;
mod cases;
mod driver;
mod machine;

use std::{env, fs::OpenOptions, path::Path};

use libtest_mimic::{Arguments, Failed, Trial};

use cases::Case;
use machine::End;

fn main() {
    let words: Vec<String> = env::args().collect();
    if let [_, argument, vcpus, folder, socket, listener, files] = words.as_slice()
        && argument == machine::VMM_ARGUMENT
    {
        if let Err(error) = machine::vmm(vcpus, Path::new(folder), socket, listener, files) {
            eprintln!("{error}");
            std::process::exit(1);
        }
        return;
    }
    let no_kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err();
    if no_kvm {
        eprintln!("hostile: every test is ignored, because /dev/kvm cannot be opened");
    }
    let trials = cases::all()
        .into_iter()
        .map(|case| Trial::test(case.name.clone(), move || run(&case)).with_ignored_flag(no_kvm));
    // VMs are processes: two at a time use what machine there is.
    let arguments = Arguments { test_threads: Some(2), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

fn run(case: &Case) -> Result<(), Failed> {
    let guest = case.guest();
    let ended = machine::run(&guest, &case.setting)?;
    if ended.end != case.end {
        let step = match &ended.end {
            End::Exit(code) => guest.step(*code).unwrap_or("no step has that code"),
            _ => "",
        };
        return Err(format!("it ended with {:?}: {step}; the VMM's log: {}", ended.end, ended.log).into());
    }
    let failures = ended.log.matches("the guest's driver broke a virtio device").count();
    if !case.failures.contains(&failures) {
        return Err(format!("{failures} failures were logged, not {:?}: {}", case.failures, ended.log).into());
    }
    let lines = ended.log.lines().count();
    if lines > 40 {
        return Err(format!("{lines} lines were logged: {}", ended.log).into());
    }
    if !case.served_bytes.contains(&ended.served_bytes) {
        return Err(format!("the host got {} bytes, not {:?}", ended.served_bytes, case.served_bytes).into());
    }
    Ok(())
}
