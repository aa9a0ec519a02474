//! The control plane: what can end, pause or ask the machine from the main thread, on an epoll of its own.
//!
//! ```text
//!   event loop ── devices' descriptors
//!        └─────── the plane's epoll ── SIGTERM, the end, the start's deadline, parked vCPUs, listener, clients
//! ```
//! While the machine runs, the plane's epoll is one descriptor of the event loop. While it is paused only the plane is
//! waited for, so that no device of any kind can work, and none has to know of pauses.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
    time::Duration,
};

use tracing::warn;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
    timerfd::TimerFd,
};

use super::{
    requests::{Controls, Handled},
    vcpu::{Ending, Shared},
};
use crate::control::{
    api::{MAX_CLIENTS, Outcome, RunState},
    session::{Interest, Session, Stream},
};

/// Events that are taken at once.
const EVENTS_AT_ONCE: usize = 32;
/// New clients before others have their turn.
const CLIENTS_PER_TURN: usize = 2 * MAX_CLIENTS;
/// A client that cannot be taken in must not make the listener readable for ever: it is told of once.
const NEW_CLIENTS: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);
/// Requests of one client before others have their turn.
const REQUESTS_PER_TURN: usize = 4;

/// What the plane watches besides clients.
pub struct Watched {
    /// Rung when somebody ends the machine.
    pub end: EventFd,
    /// Readable when SIGTERM has come.
    pub terminate: OwnedFd,
    /// Rung when the last vCPU parks.
    pub all_parked: EventFd,
    /// How long the guest's agent may take to report.
    pub start_timeout: Option<Duration>,
    /// Where clients connect.
    pub listener: Option<UnixListener>,
}

/// See the module's documentation.
pub struct Plane {
    epoll: Epoll,
    end: EventFd,
    terminate: OwnedFd,
    all_parked: EventFd,
    start_timeout: Option<Duration>,
    deadline: Option<TimerFd>,
    /// The deadline rang during a pause: it starts again when the pause ends.
    deadline_put_off: bool,
    listener: Option<UnixListener>,
    clients: Vec<Client>,
    /// Counts uses of clients, to find the one that has been idle longest.
    uses: u64,
    controls: Controls,
    shared: Arc<Shared>,
}

struct Client {
    session: Session<UnixStream>,
    interest: Interest,
    last_use: u64,
}

impl Client {
    fn fd(&self) -> RawFd {
        self.session.stream.as_raw_fd()
    }
}

impl Stream for UnixStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&*self, into)?)
    }

    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(&*self, from, rustix::net::SendFlags::NOSIGNAL)?)
    }
}

impl AsRawFd for Plane {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

impl Plane {
    /// Watches all of it. The start's deadline begins now.
    pub fn new(watched: Watched, controls: Controls, shared: Arc<Shared>) -> io::Result<Self> {
        let Watched { end, terminate, all_parked, start_timeout, listener } = watched;
        let mut plane = Self {
            epoll: Epoll::new()?,
            end,
            terminate,
            all_parked,
            start_timeout,
            deadline: None,
            deadline_put_off: false,
            listener,
            clients: Vec::new(),
            uses: 0,
            controls,
            shared,
        };
        for fd in [plane.end.as_raw_fd(), plane.terminate.as_raw_fd(), plane.all_parked.as_raw_fd()] {
            plane.watch(ControlOperation::Add, fd, EventSet::IN)?;
        }
        if let Some(listener) = &plane.listener {
            plane.watch(ControlOperation::Add, listener.as_raw_fd(), NEW_CLIENTS)?;
        }
        if let Some(timeout) = start_timeout {
            let mut timer = TimerFd::new().map_err(from_errno)?;
            timer.reset(timeout, None).map_err(from_errno)?;
            plane.watch(ControlOperation::Add, timer.as_raw_fd(), EventSet::IN)?;
            plane.deadline = Some(timer);
        }
        Ok(plane)
    }

    fn watch(&self, operation: ControlOperation, fd: RawFd, set: EventSet) -> io::Result<()> {
        self.epoll.ctl(operation, fd, EpollEvent::new(set, fd as u64))
    }

    /// The machine's controls.
    pub fn controls(&mut self) -> &mut Controls {
        &mut self.controls
    }

    /// The controls, when nobody is served any more.
    pub fn into_controls(self) -> Controls {
        self.controls
    }

    /// Whether only the plane is to be served.
    pub fn is_paused(&self) -> bool {
        self.controls.state() == RunState::Paused
    }

    /// Handles what is ready; waits for it if `wait`.
    pub fn serve(&mut self, wait: bool) -> io::Result<()> {
        let mut events = [EpollEvent::default(); EVENTS_AT_ONCE];
        let count = match self.epoll.wait(if wait { -1 } else { 0 }, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error),
        };
        for event in events.iter().take(count) {
            self.event(event.fd(), event.event_set());
        }
        Ok(())
    }

    fn event(&mut self, fd: RawFd, set: EventSet) {
        if fd == self.terminate.as_raw_fd() {
            self.shared.endings.end(Ending::Stopped);
        } else if fd == self.end.as_raw_fd() {
            // The loop looks for the ending after every round.
            let _ = self.end.read();
        } else if fd == self.all_parked.as_raw_fd() {
            let _ = self.all_parked.read();
            if self.controls.vcpus_parked() {
                self.answer_waiting();
            }
        } else if self.listener.as_ref().is_some_and(|listener| listener.as_raw_fd() == fd) {
            self.accept();
        } else if self.deadline.as_ref().is_some_and(|timer| timer.as_raw_fd() == fd) {
            self.deadline_passed();
        } else if let Some(index) = self.clients.iter().position(|client| client.fd() == fd) {
            self.client_ready(index, set);
        }
    }

    fn deadline_passed(&mut self) {
        // It rings once. Nobody disarms it, which would cost every start that is in time.
        if let Some(timer) = &mut self.deadline {
            let _ = timer.wait();
        }
        if self.shared.agent_ready.load(std::sync::atomic::Ordering::Acquire) {
            return;
        }
        if self.controls.state() == RunState::Running {
            self.shared.endings.end(Ending::StartTimeout);
        } else {
            self.deadline_put_off = true;
        }
    }

    /// A guest that was paused gets its whole time once more.
    fn restart_deadline(&mut self) {
        if let (true, Some(timer), Some(timeout)) =
            (std::mem::take(&mut self.deadline_put_off), &mut self.deadline, self.start_timeout)
            && let Err(error) = timer.reset(timeout, None)
        {
            warn!(%error, "the start's deadline could not be set again");
        }
    }

    /// Takes in all who have connected.
    fn accept(&mut self) {
        for _ in 0..CLIENTS_PER_TURN {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok((stream, _)) => self.add_client(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // No descriptor or no memory left for one more. One who is idle makes room; if there is nobody, this one
                // waits until the next comes.
                Err(error) if lacks_room(&error) && self.clients.is_empty() => return,
                Err(error) if lacks_room(&error) => self.drop_idlest_client(),
                // It is gone again.
                Err(_) => {}
            }
        }
        if let Some(fd) = self.listener.as_ref().map(AsRawFd::as_raw_fd) {
            // To be told once more of those who are left.
            let _ = self.watch(ControlOperation::Modify, fd, NEW_CLIENTS);
        }
    }

    fn add_client(&mut self, stream: UnixStream) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.clients.len() >= MAX_CLIENTS {
            self.drop_idlest_client();
        }
        if self.watch(ControlOperation::Add, stream.as_raw_fd(), EventSet::IN).is_ok() {
            self.uses += 1;
            let session = Session::new(stream);
            self.clients.push(Client { session, interest: Interest::Readable, last_use: self.uses });
        }
    }

    fn drop_idlest_client(&mut self) {
        let idlest = (0..self.clients.len()).min_by_key(|index| self.clients.get(*index).map(|c| c.last_use));
        idlest.into_iter().for_each(|index| self.drop_client(index));
    }

    fn client_ready(&mut self, index: usize, set: EventSet) {
        for turn in 0..REQUESTS_PER_TURN {
            let Some(client) = self.clients.get_mut(index) else { return };
            if turn == 0 {
                self.uses += 1;
                client.last_use = self.uses;
                if set.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                    client.session.hung_up();
                }
            } else if !client.session.has_line() {
                break;
            }
            let Some(request) = client.session.ready() else { break };
            let handled = self.controls.handle(request);
            if self.controls.state() == RunState::Running {
                // Those who waited for a pause hear that it was called off.
                self.answer_waiting_but(index);
                self.restart_deadline();
            }
            if let (Handled::Now(outcome), Some(client)) = (handled, self.clients.get_mut(index)) {
                client.session.reply(&outcome);
            }
        }
        self.settle(index);
    }

    /// Answers those who wait for a pause.
    fn answer_waiting(&mut self) {
        self.answer_waiting_but(usize::MAX);
    }

    fn answer_waiting_but(&mut self, spared: usize) {
        let outcome: Outcome = self.controls.state_answer();
        for index in (0..self.clients.len()).rev().filter(|index| *index != spared) {
            if let Some(client) = self.clients.get_mut(index)
                && client.session.is_waiting()
            {
                client.session.reply(&outcome);
                self.rewatch(index);
            }
        }
    }

    /// Drops a client that is over, or waits for what it needs next.
    fn settle(&mut self, index: usize) {
        let closed = self.clients.get(index).is_some_and(|client| client.session.is_closed());
        if closed { self.drop_client(index) } else { self.rewatch(index) }
    }

    fn rewatch(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else { return };
        let mut interest = client.session.interest();
        if client.session.has_line() {
            // A request that is here already makes no descriptor readable; a socket with room is writable at once.
            interest = Interest::Writable;
        }
        if interest == client.interest {
            return;
        }
        client.interest = interest;
        let set = match interest {
            Interest::Readable => EventSet::IN,
            Interest::Writable => EventSet::OUT,
            Interest::Nothing => EventSet::empty(),
        };
        let fd = client.fd();
        if self.watch(ControlOperation::Modify, fd, set).is_err() {
            self.drop_client(index);
        }
    }

    fn drop_client(&mut self, index: usize) {
        let client = self.clients.swap_remove(index);
        let _ = self.watch(ControlOperation::Delete, client.fd(), EventSet::empty());
    }
}

/// accept(2): too many descriptors of the process or the host, too little memory.
fn lacks_room(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

fn from_errno(error: vmm_sys_util::errno::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
