//! The main thread of a running machine: the event loop of all devices, the control plane, and the orderly end.

use std::{
    cell::Cell,
    os::fd::{AsRawFd, RawFd},
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use kvm_ioctls::VmFd;

use super::{
    VmError,
    builder::{LastWords, Machine},
    plane::{Plane, Watched},
    requests::Controls,
    vcpu::{Ending, RunError, Shared},
};
use crate::event::Stats;

/// A machine that has run: no thread and no device of it is left.
pub struct Ended {
    /// Why it ended.
    pub ending: Ending,
    /// What it cost.
    pub stats: Stats,
    /// Closing it waits some 10 ms for the host's RCU, so that the parent is told of the end before.
    pub vm: Arc<VmFd>,
}

/// Runs the machine until something ends it.
pub fn run(machine: Machine, start_timeout_ms: Option<u64>) -> Result<Ended, VmError> {
    let resources = |what| move |source| VmError::Resources { what, source };
    let Machine { vm, vcpus, workers, end, terminate, all_parked, listener, subject, last_words } = machine;
    let shared = subject.shared.clone();
    let watched = Watched {
        end,
        terminate,
        all_parked,
        start_timeout: start_timeout_ms.map(Duration::from_millis),
        listener,
    };
    let mut plane = Plane::new(watched, Controls::new(subject), shared.clone())
        .map_err(resources("the control plane"))?;
    let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().map_err(RunError::EventLoop)?;
    let rung = Rc::new(Cell::new(false));
    events.add_subscriber(Box::new(Doorway {
        fd: plane.as_raw_fd(),
        rung: rung.clone(),
        shared: shared.clone(),
    }));
    for worker in workers {
        events.add_subscriber(Box::new(worker));
    }

    for (vcpu, thread) in vcpus {
        plane.controls().add_thread(thread.start(vcpu));
    }
    let ending = loop {
        if let Err(error) = turn(&mut events, &mut plane, &rung) {
            break Ending::Failed(error);
        }
        shared.reporter.flush();
        if let Some(ending) = shared.endings.take() {
            break ending;
        }
    };
    plane.controls().stop_vcpus();
    if let (Ending::GuestExit(_), Some(last_words)) = (&ending, last_words) {
        deliver(&mut events, &mut plane, &last_words, &shared);
    }
    // First the devices: a vCPU that waits for one of them sees that it is gone.
    drop(events);
    plane.into_controls().join();
    Ok(Ended { ending, stats: shared.stats(), vm })
}

/// Waits for something to do, and does it: for the control plane only while the machine is paused.
fn turn(
    events: &mut EventManager<Box<dyn MutEventSubscriber>>,
    plane: &mut Plane,
    rung: &Cell<bool>,
) -> Result<(), RunError> {
    if plane.is_paused() {
        return plane.serve(true).map_err(RunError::Control);
    }
    events.run().map_err(RunError::EventLoop)?;
    if rung.take() {
        plane.serve(false).map_err(RunError::Control)?;
    }
    Ok(())
}

/// Passes on what the guest had sent before it ended, for as long as the host's reader takes: a container that ends
/// also leaves its last output in a pipe. SIGTERM cuts it short.
fn deliver(
    events: &mut EventManager<Box<dyn MutEventSubscriber>>,
    plane: &mut Plane,
    last_words: &LastWords,
    shared: &Shared,
) {
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
        if plane.serve(false).is_err() {
            return;
        }
        // Any other ending comes too late: this one was first.
        if matches!(shared.endings.take(), Some(Ending::Stopped | Ending::Failed(_))) {
            return;
        }
    }
}

/// The control plane as a subscriber of the event loop: it only notes that something is ready there.
struct Doorway {
    fd: RawFd,
    rung: Rc<Cell<bool>>,
    shared: Arc<Shared>,
}

impl MutEventSubscriber for Doorway {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new_raw(self.fd, EventSet::IN)) {
            self.shared.endings.end(Ending::Failed(RunError::EventLoop(error)));
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.rung.set(true);
    }
}
