//! The machine on this host's KVM, with guests of a few instructions: any `/dev/kvm` can run them, also one that cannot
//! run Linux. Where there is none, the tests count as ignored.

mod control;

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek},
    os::fd::IntoRawFd,
    path::Path,
};

use cloche_vmm::{
    Event, ExitReason, Jail, VmConfig,
    config::{DiskConfig, InitramfsPart},
    event::{Mark, PanicCause},
};
use libtest_mimic::{Arguments, Failed, Trial};

/// Where the guest's code is loaded, and starts in 32-bit protected mode with `ebx` at the PVH start info.
const CODE_ADDRESS: u32 = 0x20_0000;

/// `mov al, <byte>; out <port>`.
fn out_byte(port: u16, byte: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, byte, 0xee]
}

/// `mov edx, 0x5c4; out dx, eax`: ends the machine with `eax`.
const EXIT_WITH_EAX: &[u8] = &[0xba, 0xc4, 0x05, 0x00, 0x00, 0xef];
/// `hlt`, for ever.
const HALT: &[u8] = &[0xf4, 0xeb, 0xfd];
/// `ud2`: a fault that nobody handles.
const FAULT: &[u8] = &[0x0f, 0x0b];

/// `mov eax, <value>`.
fn load_value(value: u32) -> Vec<u8> {
    [&[0xb8], value.to_le_bytes().as_slice()].concat()
}

/// `mov eax, [<address>]`.
fn load_from(address: u32) -> Vec<u8> {
    [&[0xa1], address.to_le_bytes().as_slice()].concat()
}

fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out_byte(0x3f8, byte)).collect()
}

/// An ELF file with a PVH note whose only segment is `code`.
fn kernel(code: &[u8]) -> Vec<u8> {
    // XEN_ELFNOTE_PHYS32_ENTRY
    kernel_with_note(code, 18)
}

/// As [`kernel`], with a note of this type.
fn kernel_with_note(code: &[u8], note_type: u32) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let mut note = Vec::new();
    // Name size, descriptor size, type, name, entry point.
    for word in [4, 4, note_type, u32::from_le_bytes(*b"Xen\0"), CODE_ADDRESS] {
        note.extend(word.to_le_bytes());
    }
    let code_at = note_at + note.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Executable, x86-64, version, entry, program headers, no sections, sizes.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(u64::from(CODE_ADDRESS).to_le_bytes());
    file.extend(HEADER.to_le_bytes());
    file.extend([0; 12]);
    for half in [HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let load = (1u32, code_at, u64::from(CODE_ADDRESS), code.len() as u64);
    let notes = (4u32, note_at, 0, note.len() as u64);
    for (kind, offset, address, size) in [load, notes] {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        // Linked to run high, as kernels are.
        for word in [offset, 0xffff_ffff_8000_0000 + address, address, size, size, 4] {
            file.extend(word.to_le_bytes());
        }
    }
    file.extend(note);
    file.extend(code);
    file
}

/// Runs a guest of this code; returns the reason of its end and all events.
fn run(
    code: &[u8],
    change: impl FnOnce(&mut VmConfig, &Path),
) -> Result<(ExitReason, Vec<Event>), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("kernel");
    fs::write(&path, kernel(code))?;
    let mut events = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(folder.path().join("events"))?;
    let mut config = VmConfig::new(1, 32, path);
    config.start_timeout_ms = Some(5000);
    config.events_fd = Some(events.try_clone()?.into_raw_fd());
    change(&mut config, folder.path());
    let result = cloche_vmm::run(config, b"embedded", Jail::none());
    let mut text = String::new();
    events.rewind()?;
    events.read_to_string(&mut text)?;
    let events: Vec<Event> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    Ok((result?, events))
}

/// What the guest ends with when it leaves by the exit port.
fn exit_code(code: &[u8], change: impl FnOnce(&mut VmConfig, &Path)) -> Result<u32, Failed> {
    match run(&[code, EXIT_WITH_EAX].concat(), change)?.0 {
        ExitReason::GuestExit { code } => Ok(code),
        other => Err(format!("{other}").into()),
    }
}

fn expect<T: PartialEq + std::fmt::Debug>(got: T, wanted: T) -> Result<(), Failed> {
    if got == wanted { Ok(()) } else { Err(format!("got {got:?}, wanted {wanted:?}").into()) }
}

fn exit_port_ends_the_machine_with_its_code() -> Result<(), Failed> {
    expect(exit_code(&load_value(0x1234_5678), |_, _| ())?, 0x1234_5678)
}

fn marks_come_in_order_on_one_clock() -> Result<(), Failed> {
    let code = [out_byte(0x5c0, 1), out_byte(0x5c0, 2), load_value(0), EXIT_WITH_EAX.to_vec()].concat();
    let (_, events) = run(&code, |_, _| ())?;
    let mut marks: Vec<(u64, Mark)> = events
        .iter()
        .filter_map(|event| match event {
            Event::Mark { name, ns } => Some((*ns, *name)),
            _ => None,
        })
        .collect();
    marks.sort_by_key(|(ns, _)| *ns);
    let names: Vec<Mark> = marks.into_iter().map(|(_, name)| name).collect();
    expect(names.len(), 6)?;
    expect(names[0], Mark::VmmEntry)?;
    expect(&names[3..], &[Mark::FirstInstruction, Mark::Init, Mark::AgentReady])?;
    let Some(Event::Exited { stats, .. }) = events.last() else { return Err("no end was reported".into()) };
    expect(stats.io_exits, 3)
}

fn console_text_comes_with_the_end_and_in_the_log() -> Result<(), Failed> {
    let code = [print("hello\n"), load_value(0), EXIT_WITH_EAX.to_vec()].concat();
    let mut log = None;
    let (_, events) = run(&code, |config, folder| {
        let path = folder.join("console");
        log = Some(File::create(&path).and_then(|_| File::open(&path)));
        config.console_log = Some(path);
    })?;
    let Some(Event::Exited { console_tail, .. }) = events.last() else {
        return Err("no end was reported".into());
    };
    expect(console_tail.as_str(), "hello\n")?;
    let mut text = String::new();
    log.ok_or("no log")??.read_to_string(&mut text)?;
    expect(text.as_str(), "hello\n")
}

fn start_info_is_where_ebx_points() -> Result<(), Failed> {
    // mov eax, [ebx]
    expect(exit_code(&[0x8b, 0x03], |_, _| ())?, 0x336e_c578)
}

/// A kernel without a PVH entry starts in 64-bit mode, with `rsi` at the zero page.
fn kernel_without_pvh_entry_is_entered_at_its_64_bit_entry() -> Result<(), Failed> {
    // mov rax, rsi; shl rax, 32; shr rax, 32; mov eax, [rax + 0x202]. With 32-bit registers, nothing would be left of it.
    let code = [
        &[
            0x48, 0x89, 0xf0, 0x48, 0xc1, 0xe0, 0x20, 0x48, 0xc1, 0xe8, 0x20, 0x8b, 0x80, 0x02, 0x02, 0x00,
            0x00,
        ][..],
        EXIT_WITH_EAX,
    ]
    .concat();
    let (reason, _) = run(&[], |config, folder| {
        let path = folder.join("without-pvh");
        let _ = fs::write(&path, kernel_with_note(&code, 99));
        config.kernel = path;
    })?;
    expect(reason, ExitReason::GuestExit { code: u32::from_le_bytes(*b"HdrS") })
}

fn initramfs_is_where_the_start_info_says() -> Result<(), Failed> {
    // mov eax, [ebx + 16] (module list); mov eax, [eax] (address); mov eax, [eax]
    let code = [0x8b, 0x43, 0x10, 0x8b, 0x00, 0x8b, 0x00];
    let got = exit_code(&code, |config, _| config.initramfs = vec![InitramfsPart::Embedded])?;
    expect(got, u32::from_le_bytes(*b"embe"))
}

fn virtio_device_answers_at_its_address() -> Result<(), Failed> {
    let with_devices = |config: &mut VmConfig, folder: &Path| {
        let path = folder.join("disk");
        let _ = fs::write(&path, [0; 1024]);
        config.disks = vec![DiskConfig::new(path, "disk").read_only()];
        config.rng = true;
    };
    expect(exit_code(&load_from(0xd000_0000), with_devices)?, u32::from_le_bytes(*b"virt"))?;
    // Device id of the first, capacity of the first, device id of the second, and nothing after it.
    expect(exit_code(&load_from(0xd000_0008), with_devices)?, 2)?;
    expect(exit_code(&load_from(0xd000_0100), with_devices)?, 2)?;
    expect(exit_code(&load_from(0xd000_1008), with_devices)?, 4)?;
    expect(exit_code(&load_from(0xd000_2000), with_devices)?, u32::MAX)
}

fn keyboard_reset_and_triple_fault_end_the_machine() -> Result<(), Failed> {
    expect(run(&out_byte(0x64, 0xfe), |_, _| ())?.0, ExitReason::GuestReset)?;
    expect(run(FAULT, |_, _| ())?.0, ExitReason::TripleFault)
}

fn panic_text_before_a_reset_is_the_reason() -> Result<(), Failed> {
    let code = [print("[ 1.0] Kernel panic - not syncing: no root\r\nmore\r\n"), FAULT.to_vec()].concat();
    let reason = ExitReason::KernelPanic { message: "no root".into(), cause: PanicCause::Other };
    expect(run(&code, |_, _| ())?.0, reason)
}

fn panic_text_of_a_guest_that_then_stands_still_is_the_reason() -> Result<(), Failed> {
    let code = [print("[ 1.0] Kernel panic - not syncing: no root\r\n"), HALT.to_vec()].concat();
    let reason = ExitReason::KernelPanic { message: "no root".into(), cause: PanicCause::Other };
    expect(run(&code, |config, _| config.start_timeout_ms = Some(1000))?.0, reason)
}

fn guest_that_never_reports_times_out() -> Result<(), Failed> {
    let reason = run(HALT, |config, _| config.start_timeout_ms = Some(50))?.0;
    expect(reason, ExitReason::StartTimeout { timeout_ms: 50 })
}

fn guest_that_spins_is_interrupted() -> Result<(), Failed> {
    // jmp $
    let reason = run(&[0xeb, 0xfe], |config, _| {
        config.vcpus = 2;
        config.start_timeout_ms = Some(50);
    })?;
    expect(reason.0, ExitReason::StartTimeout { timeout_ms: 50 })
}

fn guest_that_reported_is_not_timed_out() -> Result<(), Failed> {
    // The mark, then some 100 ms on the time stamp counter: rdtsc; mov ecx, eax; again: rdtsc; sub eax, ecx;
    // cmp eax, 0x10000000; jb again.
    let wait = vec![0x0f, 0x31, 0x89, 0xc1, 0x0f, 0x31, 0x29, 0xc8, 0x3d, 0, 0, 0, 0x10, 0x72, 0xf5];
    let code = [out_byte(0x5c0, 2), wait, load_value(5)].concat();
    expect(exit_code(&code, |config, _| config.start_timeout_ms = Some(20))?, 5)
}

fn failure_is_reported_with_its_step() -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("events");
    let mut config = VmConfig::new(1, 32, "/no/such/kernel");
    config.events_fd = Some(File::create(&path)?.into_raw_fd());
    let error = cloche_vmm::run(config, b"", Jail::none()).err().ok_or("it ran")?;
    expect(error.step(), "open")?;
    let text = fs::read_to_string(&path)?;
    let last: Event = serde_json::from_str(text.lines().last().ok_or("no event")?)?;
    let Event::Failed { step, message, .. } = last else { return Err("no failure was reported".into()) };
    expect(step.as_str(), "open")?;
    expect(message.contains("/no/such/kernel") && message.contains("No such file"), true)
}

type Test = fn() -> Result<(), Failed>;

fn main() {
    let no_kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err();
    if no_kvm {
        eprintln!("tiny_guest: every test is ignored, because /dev/kvm cannot be opened");
    }
    let tests: [(&str, Test); 14] = [
        ("exit_port_ends_the_machine_with_its_code", exit_port_ends_the_machine_with_its_code),
        ("marks_come_in_order_on_one_clock", marks_come_in_order_on_one_clock),
        ("console_text_comes_with_the_end_and_in_the_log", console_text_comes_with_the_end_and_in_the_log),
        ("start_info_is_where_ebx_points", start_info_is_where_ebx_points),
        (
            "kernel_without_pvh_entry_is_entered_at_its_64_bit_entry",
            kernel_without_pvh_entry_is_entered_at_its_64_bit_entry,
        ),
        ("initramfs_is_where_the_start_info_says", initramfs_is_where_the_start_info_says),
        ("virtio_device_answers_at_its_address", virtio_device_answers_at_its_address),
        ("keyboard_reset_and_triple_fault_end_the_machine", keyboard_reset_and_triple_fault_end_the_machine),
        ("panic_text_before_a_reset_is_the_reason", panic_text_before_a_reset_is_the_reason),
        (
            "panic_text_of_a_guest_that_then_stands_still_is_the_reason",
            panic_text_of_a_guest_that_then_stands_still_is_the_reason,
        ),
        ("guest_that_never_reports_times_out", guest_that_never_reports_times_out),
        ("guest_that_spins_is_interrupted", guest_that_spins_is_interrupted),
        ("guest_that_reported_is_not_timed_out", guest_that_reported_is_not_timed_out),
        ("failure_is_reported_with_its_step", failure_is_reported_with_its_step),
    ];
    let trials = tests.iter().chain(control::TESTS).copied();
    let trials = trials.map(|(name, test)| Trial::test(name, test).with_ignored_flag(no_kvm)).collect();
    // One after the other: a VM takes the whole process.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials).exit();
}
