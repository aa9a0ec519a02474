//! The control socket of a running machine, asked from another thread.

use std::{
    fmt::Debug,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use cloche_vmm::control::{
    api::{Answer, Info, MAX_CLIENTS, MachineStats, RefusalCode, Request, Resize, RunState, Stop},
    client::{ClientError, ask},
};

use rustix::{
    net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket},
    process::{Resource, Rlimit, getrlimit, setrlimit},
    time::{ClockId, clock_gettime},
};

use super::*;

pub const TESTS: &[(&str, Test)] = &[
    ("paused_machine_stands_still_and_goes_on", paused_machine_stands_still_and_goes_on),
    ("machine_is_paused_and_resumed_many_times", machine_is_paused_and_resumed_many_times),
    ("paused_machine_can_be_stopped", paused_machine_can_be_stopped),
    ("start_timeout_does_not_run_during_a_pause", start_timeout_does_not_run_during_a_pause),
    ("info_and_console_tell_of_the_machine", info_and_console_tell_of_the_machine),
    ("what_cannot_be_resized_is_refused_by_name", what_cannot_be_resized_is_refused_by_name),
    ("dirty_pages_are_counted_while_that_is_asked_for", dirty_pages_are_counted_while_that_is_asked_for),
    ("hostile_clients_disturb_nobody", hostile_clients_disturb_nobody),
    ("client_without_a_descriptor_for_it_costs_nothing", client_without_a_descriptor_for_it_costs_nothing),
];

const PATIENCE: Duration = Duration::from_secs(20);

/// `out 0x80, al`, for ever: each is an exit to the VMM.
const BUSY: &[u8] = &[0xe6, 0x80, 0xeb, 0xfc];

/// The machine from its control socket.
struct Remote {
    socket: PathBuf,
}

impl Remote {
    fn ask(&self, request: Request) -> Result<Answer, Failed> {
        Ok(ask(&self.socket, request, PATIENCE)?)
    }

    fn state(&self, request: Request) -> Result<RunState, Failed> {
        match self.ask(request)? {
            Answer::State(state) => Ok(state),
            other => Err(format!("{other:?} is no state").into()),
        }
    }

    fn stats(&self) -> Result<MachineStats, Failed> {
        match self.ask(Request::Stats)? {
            Answer::Stats(stats) => Ok(*stats),
            other => Err(format!("{other:?} is no statistics").into()),
        }
    }

    fn info(&self) -> Result<Info, Failed> {
        match self.ask(Request::Info)? {
            Answer::Info(info) => Ok(info),
            other => Err(format!("{other:?} is no info").into()),
        }
    }

    fn exits(&self) -> Result<u64, Failed> {
        Ok(self.stats()?.vcpus.iter().map(|vcpu| vcpu.io_exits).sum())
    }

    /// Waits until the guest has made exits.
    fn wait_for_progress(&self) -> Result<(), Failed> {
        let (before, started) = (self.exits()?, Instant::now());
        while self.exits()? == before {
            if started.elapsed() > PATIENCE {
                return Err("the guest does not move".into());
            }
        }
        Ok(())
    }

    fn refusal(&self, request: Request) -> Result<(RefusalCode, String), Failed> {
        match ask(&self.socket, request, PATIENCE) {
            Err(ClientError::Refused(refusal)) => Ok((refusal.code, refusal.message)),
            other => Err(format!("not refused: {other:?}").into()),
        }
    }
}

/// Runs `code` while `story` talks to it; the story must end the machine with the reason that is returned.
fn told<T: Send + 'static>(
    code: &[u8],
    change: impl FnOnce(&mut VmConfig, &Path),
    story: impl FnOnce(Remote) -> Result<T, Failed> + Send + 'static,
) -> Result<(ExitReason, T), Failed> {
    let mut teller = None;
    let (reason, _) = run(code, |config, folder| {
        let socket = folder.join("control.sock");
        let listener = UnixListener::bind(&socket);
        config.control_fd = listener.ok().map(IntoRawFd::into_raw_fd);
        change(config, folder);
        teller = Some(thread::spawn(move || {
            let result = story(Remote { socket: socket.clone() });
            if result.is_err() {
                // So that the machine ends whatever happened.
                let _ = ask(&socket, Request::Stop(Stop::Orderly), PATIENCE);
            }
            result
        }));
    })?;
    let told = teller.ok_or("nobody told the story")?.join().map_err(|_| "the story panicked")??;
    Ok((reason, told))
}

fn stopped(remote: &Remote) -> Result<(), Failed> {
    expect(remote.state(Request::Stop(Stop::Orderly))?, RunState::Ending)
}

fn paused_machine_stands_still_and_goes_on() -> Result<(), Failed> {
    let story = |remote: Remote| {
        remote.wait_for_progress()?;
        expect(remote.state(Request::Pause)?, RunState::Paused)?;
        // A thread that has said that it parks still has to fall asleep.
        thread::sleep(Duration::from_millis(50));
        let before = remote.stats()?;
        thread::sleep(Duration::from_millis(100));
        let after = remote.stats()?;
        expect(&after.vcpus, &before.vcpus)?;
        let paused = after.paused_ns - before.paused_ns;
        expect(paused >= 100_000_000 && paused <= after.uptime_ns, true)?;
        expect(remote.info()?.state, RunState::Paused)?;
        // Again, either way, is the same.
        expect(remote.state(Request::Pause)?, RunState::Paused)?;
        expect(remote.state(Request::Resume)?, RunState::Running)?;
        expect(remote.state(Request::Resume)?, RunState::Running)?;
        remote.wait_for_progress()?;
        stopped(&remote)
    };
    let (reason, ()) = told(BUSY, |_, _| (), story)?;
    expect(reason, ExitReason::Stopped)
}

fn machine_is_paused_and_resumed_many_times() -> Result<(), Failed> {
    // The second vCPU waits in KVM for its start, which must not keep it from parking.
    let two = |config: &mut VmConfig, _: &Path| config.vcpus = 2;
    let story = |remote: Remote| {
        for _ in 0..50 {
            expect(remote.state(Request::Pause)?, RunState::Paused)?;
            expect(remote.state(Request::Resume)?, RunState::Running)?;
        }
        remote.wait_for_progress()?;
        stopped(&remote)
    };
    told(BUSY, two, story).map(drop)
}

fn paused_machine_can_be_stopped() -> Result<(), Failed> {
    let story = |remote: Remote| {
        expect(remote.state(Request::Pause)?, RunState::Paused)?;
        stopped(&remote)
    };
    let (reason, ()) = told(HALT, |_, _| (), story)?;
    expect(reason, ExitReason::Stopped)
}

fn start_timeout_does_not_run_during_a_pause() -> Result<(), Failed> {
    let short = |config: &mut VmConfig, _: &Path| config.start_timeout_ms = Some(300);
    let story = |remote: Remote| {
        expect(remote.state(Request::Pause)?, RunState::Paused)?;
        thread::sleep(Duration::from_millis(600));
        expect(remote.state(Request::Resume)?, RunState::Running)
    };
    let (reason, ()) = told(HALT, short, story)?;
    expect(reason, ExitReason::StartTimeout { timeout_ms: 300 })
}

fn info_and_console_tell_of_the_machine() -> Result<(), Failed> {
    let with_devices = |config: &mut VmConfig, folder: &Path| {
        let path = folder.join("disk");
        let _ = fs::write(&path, [0; 1024]);
        config.disks = vec![DiskConfig::new(path, "disk").read_only()];
        config.rng = true;
    };
    let code = [print("hello \x1b[31m"), out_byte(0x5c0, 2), BUSY.to_vec()].concat();
    let story = |remote: Remote| {
        while !remote.info()?.agent_ready {
            thread::sleep(Duration::from_millis(1));
        }
        let info = remote.info()?;
        expect((info.vcpus, info.memory_mib, info.state), (1, 32, RunState::Running))?;
        expect(info.devices, vec!["block".to_owned(), "rng".to_owned()])?;
        expect(remote.ask(Request::Console { bytes: 100 })?, Answer::Console("hello \\u{1b}[31m".into()))?;
        expect(remote.ask(Request::Console { bytes: 4 })?, Answer::Console("[31m".into()))?;
        let stats = remote.stats()?;
        expect(stats.memory.size_bytes, 32 << 20)?;
        expect(stats.memory.resident_bytes > 0 && stats.memory.resident_bytes <= 32 << 20, true)?;
        expect(stats.cpu_ns > 0 && stats.vcpus[0].cpu_ns > 0, true)?;
        expect(stats.devices.iter().map(|device| device.queues.len()).collect::<Vec<_>>(), vec![1, 1])?;
        stopped(&remote)
    };
    told(&code, with_devices, story).map(drop)
}

fn what_cannot_be_resized_is_refused_by_name() -> Result<(), Failed> {
    let story = |remote: Remote| {
        for (resize, name) in [
            (Resize { vcpus: Some(2), memory_mib: None }, "vcpus"),
            (Resize { vcpus: None, memory_mib: Some(64) }, "memory_mib"),
        ] {
            let (code, message) = remote.refusal(Request::Resize(resize))?;
            expect((code, message.starts_with(name)), (RefusalCode::Unsupported, true))?;
        }
        expect(remote.refusal(Request::Resize(Resize::default()))?.0, RefusalCode::BadRequest)?;
        stopped(&remote)
    };
    told(BUSY, |_, _| (), story).map(drop)
}

fn dirty_pages_are_counted_while_that_is_asked_for() -> Result<(), Failed> {
    // again: mov edi, 0x800000; mov ecx, 16; page: mov [edi], eax; add edi, 4096; loop page; out 0x80, al; jmp again
    let code = [
        0xbf, 0, 0, 0x80, 0, 0xb9, 16, 0, 0, 0, 0x89, 0x07, 0x81, 0xc7, 0, 0x10, 0, 0, 0xe2, 0xf6, 0xe6,
        0x80, 0xeb, 0xe8,
    ];
    let story = |remote: Remote| {
        expect(remote.stats()?.memory.dirty_pages, None)?;
        for _ in 0..2 {
            remote.state(Request::DirtyLog { enabled: true })?;
        }
        remote.wait_for_progress()?;
        // Each look at the statistics begins a new count: time for a whole round.
        thread::sleep(Duration::from_millis(200));
        remote.state(Request::Pause)?;
        // Whatever the host's size of pages is, KVM notes small ones.
        let dirty = remote.stats()?.memory.dirty_pages.ok_or("not counted")?;
        expect(dirty, 16)?;
        expect(remote.stats()?.memory.dirty_pages, Some(0))?;
        remote.state(Request::DirtyLog { enabled: false })?;
        expect(remote.stats()?.memory.dirty_pages, None)?;
        stopped(&remote)
    };
    told(&code, |_, _| (), story).map(drop)
}

fn hostile_clients_disturb_nobody() -> Result<(), Failed> {
    fn done<T, E: Debug>(result: Result<T, E>) -> Result<T, Failed> {
        result.map_err(|error| format!("{error:?}").into())
    }
    let story = |remote: Remote| {
        // More than there is room for, each with half a request, and they stay.
        let mut silent = Vec::new();
        for _ in 0..3 * MAX_CLIENTS {
            let mut client = done(UnixStream::connect(&remote.socket))?;
            let _ = client.write_all(b"{\"version\":1,");
            silent.push(client);
        }
        // Asks for ever, and never reads: it must be stopped by its own full socket.
        let mut greedy = done(UnixStream::connect(&remote.socket))?;
        done(greedy.set_write_timeout(Some(Duration::from_millis(200))))?;
        let ask = b"{\"version\":1,\"request\":\"stats\"}\n".repeat(100);
        let (mut blocked, started) = (false, Instant::now());
        while !blocked && started.elapsed() < PATIENCE {
            blocked = greedy.write_all(&ask).is_err();
        }
        expect(blocked, true)?;
        // Sends no line at all.
        let mut endless = done(UnixStream::connect(&remote.socket))?;
        while endless.write_all(&[b'x'; 4096]).is_ok() {}
        let mut answer = String::new();
        let _ = endless.read_to_string(&mut answer);
        expect(answer.contains("bad-request"), true)?;
        remote.wait_for_progress()?;
        expect(remote.state(Request::Pause)?, RunState::Paused)?;
        expect(remote.state(Request::Resume)?, RunState::Running)?;
        drop((silent, greedy));
        stopped(&remote)
    };
    told(BUSY, |_, _| (), story).map(drop)
}

/// Whoever runs this program must not run tests side by side: the limit is the whole process's.
fn client_without_a_descriptor_for_it_costs_nothing() -> Result<(), Failed> {
    let story = |remote: Remote| {
        stopped_after(&remote, || {
            // It runs.
            remote.info()?;
            let address = SocketAddrUnix::new(&remote.socket)?;
            let limit = getrlimit(Resource::Nofile);
            let client = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
            // Nothing can be opened any more.
            setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..limit })?;
            let used = cpu_time();
            let connected = connect(&client, &address);
            thread::sleep(Duration::from_millis(500));
            let used = cpu_time().saturating_sub(used);
            setrlimit(Resource::Nofile, limit)?;
            connected?;
            if used > Duration::from_millis(200) {
                return Err(format!("it took {used:?} of CPU time in 500 ms").into());
            }
            // Both the next one and the one that waited are served.
            remote.info()?;
            let mut waiting = UnixStream::from(client);
            waiting.write_all(b"{\"version\":1,\"request\":\"resume\"}\n")?;
            waiting.set_read_timeout(Some(PATIENCE))?;
            expect(waiting.read(&mut [0; 100])? > 0, true)
        })
    };
    told(HALT, |config, _| config.start_timeout_ms = Some(60_000), story).map(drop)
}

fn stopped_after(remote: &Remote, work: impl FnOnce() -> Result<(), Failed>) -> Result<(), Failed> {
    let worked = work();
    stopped(remote)?;
    worked
}

fn cpu_time() -> Duration {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(used.tv_sec as u64, used.tv_nsec as u32)
}
