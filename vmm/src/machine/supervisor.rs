//! The main thread of a running machine: the event loop of all devices, the start's deadline, and the orderly end.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    thread::{self, JoinHandle},
    time::Duration,
};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use kvm_ioctls::VmFd;
use tracing::warn;
use vmm_sys_util::{eventfd::EventFd, signal::Killable, timerfd::TimerFd};

use super::{
    VmError,
    builder::{LastWords, Machine},
    kvm,
    vcpu::{self, Ending, RunError, Shared},
};
use crate::{event::Stats, syscalls};

/// A machine that has run: no thread and no device of it is left.
pub struct Ended {
    /// Why it ended.
    pub ending: Ending,
    /// What it cost.
    pub stats: Stats,
    /// Closing it waits some 10 ms for the host's RCU, so that the parent is told of the end before.
    pub vm: VmFd,
}

/// Runs the machine until something ends it.
pub fn run(machine: Machine, start_timeout_ms: Option<u64>) -> Result<Ended, VmError> {
    let resources = |what| move |source| VmError::Resources { what, source };
    let Machine { vm, vcpus, workers, shared, end, last_words } = machine;
    kvm::install_kick_handler().map_err(resources("the signal of vCPU threads"))?;
    let watch = Watch {
        end,
        terminate: syscalls::sigterm_fd().map_err(resources("SIGTERM"))?,
        deadline: start_timeout_ms.map(deadline).transpose().map_err(resources("the start's deadline"))?,
        shared: shared.clone(),
    };
    let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().map_err(RunError::EventLoop)?;
    events.add_subscriber(Box::new(watch));
    for worker in workers {
        events.add_subscriber(Box::new(worker));
    }

    let mut threads = Vec::with_capacity(vcpus.len());
    for (index, vcpu) in (0..).zip(vcpus) {
        let its = shared.clone();
        let thread =
            thread::Builder::new().name(format!("vcpu{index}")).spawn(move || vcpu::run(index, vcpu, &its));
        match thread {
            Ok(thread) => threads.push(thread),
            Err(source) => {
                kick(&threads, &shared);
                drop(events);
                join(threads);
                return Err(VmError::Resources { what: "a vCPU's thread", source });
            }
        }
    }
    let ending = loop {
        if let Err(error) = events.run() {
            break Ending::Failed(RunError::EventLoop(error));
        }
        shared.reporter.flush();
        if let Some(ending) = shared.endings.take() {
            break ending;
        }
    };
    kick(&threads, &shared);
    if let (Ending::GuestExit(_), Some(last_words)) = (&ending, last_words) {
        deliver(&mut events, &last_words, &shared);
    }
    // First the devices: a vCPU that waits for one of them sees that it is gone.
    drop(events);
    join(threads);
    Ok(Ended { ending, stats: shared.stats(), vm })
}

/// Makes all vCPUs leave the guest and their threads end.
fn kick(threads: &[JoinHandle<()>], shared: &Shared) {
    shared.stopping.store(true, Ordering::Release);
    for thread in threads {
        // It fails only for a thread that is no more.
        let _ = thread.kill(kvm::kick_signal());
    }
}

/// Passes on what the guest had sent before it ended, for as long as the host's reader takes: a container that ends
/// also leaves its last output in a pipe. SIGTERM cuts it short.
fn deliver(events: &mut EventManager<Box<dyn MutEventSubscriber>>, last_words: &LastWords, shared: &Shared) {
    const AT_ONCE: i32 = 0;
    const NO_LIMIT: i32 = -1;
    let _ = last_words.doorbell.write(1);
    loop {
        let all_passed_on = last_words.buffered.load(Ordering::Relaxed) == 0;
        match events.run_with_timeout(if all_passed_on { AT_ONCE } else { NO_LIMIT }) {
            Ok(0) if all_passed_on => return,
            Ok(_) => {}
            Err(_) => return,
        }
        // Any other ending comes too late: this one was first.
        if matches!(shared.endings.take(), Some(Ending::Stopped | Ending::Failed(_))) {
            return;
        }
    }
}

fn join(threads: Vec<JoinHandle<()>>) {
    for (index, thread) in threads.into_iter().enumerate() {
        if thread.join().is_err() {
            warn!(index, "a vCPU's thread panicked");
        }
    }
}

fn deadline(timeout_ms: u64) -> io::Result<TimerFd> {
    let mut timer = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    timer
        .reset(Duration::from_millis(timeout_ms), None)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    Ok(timer)
}

/// What ends the machine from this thread.
struct Watch {
    end: EventFd,
    terminate: OwnedFd,
    deadline: Option<TimerFd>,
    shared: Arc<Shared>,
}

impl MutEventSubscriber for Watch {
    fn init(&mut self, ops: &mut EventOps) {
        let deadline = self.deadline.as_ref().map(AsRawFd::as_raw_fd);
        let fds = [Some(self.end.as_raw_fd()), Some(self.terminate.as_raw_fd()), deadline];
        for fd in fds.into_iter().flatten() {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                self.shared.endings.end(Ending::Failed(RunError::EventLoop(error)));
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.terminate.as_raw_fd() {
            self.shared.endings.end(Ending::Stopped);
        } else if fd == self.end.as_raw_fd() {
            // The loop looks for the ending after every round.
            let _ = self.end.read();
        } else if let Some(timer) = &self.deadline {
            // It rings once. Nobody disarms it, which would cost every start that is in time.
            let _ = ops.remove(Events::new(timer, EventSet::IN));
            if !self.shared.agent_ready.load(Ordering::Acquire) {
                self.shared.endings.end(Ending::StartTimeout);
            }
        }
    }
}
