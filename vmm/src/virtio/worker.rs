//! A device on the event loop: takes commands from its transport, doorbells from its driver, and readiness of its file
//! descriptors, and hands them to the [`Device`].
//!
//! ```text
//!   idle ──start──▶ running ──stop──▶ idle
//!                      │ QueueError
//!                      ▼
//!                   failed (= idle, DEVICE_NEEDS_RESET set) ──stop──▶ idle
//! ```

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tracing::warn;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    config_space::ConfigSpace,
    counters::DeviceCounters,
    device::{Device, Identity, InterruptStatus, Poller, Progress, Readiness, Running},
    queue::{FEATURE_EVENT_IDX, QueueError, QueueSetup, VirtQueue},
};
use crate::{
    guest_memory::GuestMemory,
    mailbox::{Receiver, Sender, mailbox},
};

/// What a transport tells its worker.
enum Command {
    Start { queues: Vec<QueueSetup>, features: u64 },
    Stop { done: Sender<()> },
}

/// The transport's end: starts and stops the device.
pub struct WorkerHandle {
    commands: Sender<Command>,
    wake: EventFd,
    doorbell: EventFd,
    interrupt: Arc<InterruptStatus>,
    identity: Identity,
    config: Arc<ConfigSpace>,
    counters: Arc<DeviceCounters>,
}

impl WorkerHandle {
    /// What the device counts.
    pub fn counters(&self) -> &Arc<DeviceCounters> {
        &self.counters
    }

    /// What the device is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The device's interrupt status.
    pub fn interrupt(&self) -> &InterruptStatus {
        &self.interrupt
    }

    /// The device configuration space.
    pub fn config(&self) -> &ConfigSpace {
        &self.config
    }

    /// Lets the device run on these queues with the features that the driver accepted. Does not wait: buffers that
    /// come before are found then.
    pub fn start(&self, queues: Vec<QueueSetup>, features: u64) {
        self.send(Command::Start { queues, features });
    }

    /// Stops the device, and waits until it no longer touches its queues.
    pub fn stop(&self) {
        let (done, stopped) = mailbox();
        self.send(Command::Stop { done });
        // If nobody answers, the event loop is gone, and with it the device.
        let _ = stopped.recv();
    }

    /// The driver rang by a register write that did not take the eventfd's short way.
    pub fn ring(&self) {
        // It only fails when 2^64 rings have filled the counter.
        let _ = self.doorbell.write(1);
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            let _ = self.wake.write(1);
        }
    }
}

/// Failures of one device that are logged at most: a guest can reset and fail it for ever.
pub const MAX_LOGGED_FAILURES: u32 = 5;

/// The event loop's end.
pub struct Worker {
    device: Box<dyn Device>,
    commands: Receiver<Command>,
    wake: EventFd,
    doorbell: EventFd,
    interrupt: Arc<InterruptStatus>,
    memory: GuestMemory,
    queues: Option<Vec<VirtQueue>>,
    /// Who waits for the device to be idle.
    stopping: Vec<Sender<()>>,
    features: u64,
    failures: u32,
    counters: Arc<DeviceCounters>,
}

impl Worker {
    /// A worker for `device` and the handle for its transport.
    pub fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        interrupt: Arc<InterruptStatus>,
    ) -> io::Result<(Self, WorkerHandle)> {
        let (sender, commands) = mailbox();
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let doorbell = EventFd::new(EFD_NONBLOCK)?;
        let identity = device.identity();
        let config = device
            .config_space()
            .unwrap_or_else(|| Arc::new(ConfigSpace::new(identity.config.clone(), 0..0)));
        config.connect(interrupt.clone());
        let counters = Arc::new(DeviceCounters::new(
            identity.device_type,
            identity.queue_sizes.len(),
            interrupt.clone(),
        ));
        let handle = WorkerHandle {
            commands: sender,
            wake: wake.try_clone()?,
            doorbell: doorbell.try_clone()?,
            interrupt: interrupt.clone(),
            identity,
            config,
            counters: counters.clone(),
        };
        let worker = Self {
            device,
            commands,
            wake,
            doorbell,
            interrupt,
            memory,
            queues: None,
            stopping: Vec::new(),
            features: 0,
            failures: 0,
            counters,
        };
        Ok((worker, handle))
    }

    /// The eventfd that a write to the device's `QueueNotify` register signals.
    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    /// Runs every command that has come.
    fn handle_commands(&mut self, poller: &mut dyn Poller) {
        let _ = self.wake.read();
        while let Some(command) = self.commands.try_recv() {
            match command {
                Command::Start { queues, features } => {
                    let event_idx = features & FEATURE_EVENT_IDX != 0;
                    let built: Result<Vec<_>, _> = queues
                        .into_iter()
                        .enumerate()
                        .map(|(index, setup)| {
                            let queue = VirtQueue::new(index, setup, event_idx, &self.memory)?;
                            Ok(queue.counted_by(self.counters.queue(index)))
                        })
                        .collect();
                    match built {
                        Ok(queues) => {
                            self.queues = Some(queues);
                            self.features = features;
                            self.drive(poller, |device, running| device.start(running));
                        }
                        Err(error) => self.fail(error, poller),
                    }
                }
                Command::Stop { done } => {
                    self.stop(poller);
                    self.stopping.push(done);
                    self.report_stopped();
                }
            }
        }
    }

    /// Lets the transport's [`WorkerHandle::stop`] return once the device is idle.
    fn report_stopped(&mut self) {
        if self.device.is_idle() {
            for done in self.stopping.drain(..) {
                // The transport waits, unless the machine is going down.
                let _ = done.send(());
            }
        }
    }

    /// Lets the device work, if it runs, and then tells the driver what came back.
    fn drive(
        &mut self,
        poller: &mut dyn Poller,
        work: impl FnOnce(&mut dyn Device, &mut Running) -> Result<Progress, QueueError>,
    ) {
        let Some(queues) = &mut self.queues else { return };
        let mut running = Running { queues, features: self.features, memory: &self.memory, poller };
        let result = work(self.device.as_mut(), &mut running).and_then(|progress| {
            let mut notify = false;
            for queue in queues.iter_mut() {
                notify |= queue.take_notification(&self.memory)?;
            }
            Ok((progress, notify))
        });
        match result {
            Ok((progress, notify)) => {
                if notify && let Err(error) = self.interrupt.signal_used() {
                    warn!(%error, "a virtio interrupt was lost");
                }
                if progress == Progress::More {
                    let _ = self.doorbell.write(1);
                }
            }
            Err(error) => self.fail(error, poller),
        }
    }

    fn fail(&mut self, error: QueueError, poller: &mut dyn Poller) {
        self.failures = self.failures.saturating_add(1);
        if self.failures <= MAX_LOGGED_FAILURES {
            let device_type = self.device.identity().device_type;
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            warn!(device_type, %error, cause, "the guest's driver broke a virtio device");
        }
        self.stop(poller);
        let _ = self.interrupt.signal_needs_reset();
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        if self.queues.take().is_some() {
            self.device.stop(poller);
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        // The doorbell's count says nothing, so that nobody reads it: edge-triggered, each ring is an event.
        let rings = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (fd, events) in [(&self.wake, EventSet::IN), (&self.doorbell, rings)] {
            if let Err(error) = ops.add(Events::new(fd, events)) {
                warn!(%error, "a virtio device could not join the event loop");
            }
        }
        if let Err(error) = self.device.watch(&mut OpsPoller { ops }) {
            warn!(%error, "a virtio device's files could not join the event loop");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        let mut poller = OpsPoller { ops };
        if fd == self.wake.as_raw_fd() {
            self.handle_commands(&mut poller);
        } else if fd == self.doorbell.as_raw_fd() {
            self.drive(&mut poller, |device, running| device.queues_ready(running));
        } else {
            let set = events.event_set();
            let gone = set.intersects(EventSet::ERROR | EventSet::HANG_UP);
            let ready = Readiness {
                readable: gone || set.intersects(EventSet::IN | EventSet::READ_HANG_UP),
                writable: gone || set.contains(EventSet::OUT),
            };
            if self.queues.is_some() {
                self.drive(&mut poller, |device, running| device.fd_ready(fd, ready, running));
            } else {
                self.device.fd_ready_while_stopped(fd, ready, &mut poller);
                self.report_stopped();
            }
        }
    }
}

struct OpsPoller<'a, 'b> {
    ops: &'a mut EventOps<'b>,
}

impl Poller for OpsPoller<'_, '_> {
    fn add(&mut self, fd: RawFd) -> io::Result<()> {
        let interest = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.ops.add(Events::new_raw(fd, interest)).map_err(io::Error::other)
    }

    fn remove(&mut self, fd: RawFd) {
        let _ = self.ops.remove(Events::empty_raw(fd));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
        time::Duration,
    };

    use event_manager::{EventManager, SubscriberOps};

    use super::*;
    use crate::virtio::driver_model::{CountingLine, Driver, memory};

    /// A device that stays busy after its stop until a file descriptor tells.
    struct Slow {
        wake: EventFd,
        busy: bool,
        told_to_stop: Arc<AtomicBool>,
    }

    impl Device for Slow {
        fn identity(&self) -> Identity {
            let (features, config) = (0, Vec::new());
            Identity { device_type: 2, features, queue_sizes: &[16], optional_queues: 0, config }
        }

        fn watch(&mut self, poller: &mut dyn Poller) -> io::Result<()> {
            poller.add(self.wake.as_raw_fd())
        }

        fn queues_ready(&mut self, _: &mut Running) -> Result<Progress, QueueError> {
            self.busy = true;
            Ok(Progress::Done)
        }

        fn fd_ready_while_stopped(&mut self, _: RawFd, ready: Readiness, _: &mut dyn Poller) {
            self.busy &= !(ready.readable && self.wake.read().is_ok());
        }

        fn is_idle(&self) -> bool {
            !self.busy
        }

        fn stop(&mut self, _: &mut dyn Poller) {
            self.told_to_stop.store(true, Ordering::Release);
        }
    }

    #[test]
    fn stop_of_busy_device_returns_when_it_is_idle() {
        let memory = memory();
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        let told_to_stop = Arc::new(AtomicBool::new(false));
        let device =
            Slow { wake: wake.try_clone().unwrap(), busy: false, told_to_stop: told_to_stop.clone() };
        let interrupt = Arc::new(InterruptStatus::new(Box::new(CountingLine::default())));
        let (worker, handle) = Worker::new(Box::new(device), memory.clone(), interrupt).unwrap();
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        events.add_subscriber(Box::new(worker));
        handle.start(vec![Driver::new(&memory, 0, 16).setup()], 0);
        let stopped = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                handle.stop();
                stopped.store(true, Ordering::Release);
            });
            while !told_to_stop.load(Ordering::Acquire) {
                events.run_with_timeout(1).unwrap();
            }
            thread::sleep(Duration::from_millis(20));
            assert!(!stopped.load(Ordering::Acquire), "the driver was told while its device was busy");
            wake.write(1).unwrap();
            while !stopped.load(Ordering::Acquire) {
                events.run_with_timeout(1).unwrap();
                thread::sleep(Duration::from_millis(1));
            }
        });
    }
}
