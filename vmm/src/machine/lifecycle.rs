//! Whether a machine runs: the gate that holds its vCPUs, and the states that a pause goes through.
//!
//! ```text
//!              pause                the last vCPU parks
//!   running ──────────▶ pausing ─────────────────────────▶ paused
//!      ▲                   │ resume                           │ resume
//!      └───────────────────┴──────────────────────────────────┘
//!   any ── end ──▶ ending
//! ```
//! While a machine is pausing its devices still work: a vCPU can be waiting for one of them. Once it is paused nothing
//! moves: vCPU threads sleep at the gate, and the event loop serves the control socket only. What the host sends
//! meanwhile waits in the host's sockets and files.
//!
//! The guest's clocks go on during a pause, as they do for a frozen container: its wall clock stays right, and timers
//! that fell due ring at once when it resumes.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use vmm_sys_util::eventfd::EventFd;

use crate::control::api::RunState;

/// Where vCPU threads are held.
#[derive(Debug)]
pub struct Gate {
    /// Set when a vCPU should come to the gate: the one load that a running vCPU pays for.
    attention: AtomicBool,
    state: Mutex<GateState>,
    changed: Condvar,
    /// Signalled when the last vCPU parks.
    all_parked: EventFd,
}

#[derive(Debug)]
struct GateState {
    vcpus: usize,
    parked: usize,
    held: bool,
    stopping: bool,
}

impl Gate {
    /// An open gate for so many vCPUs.
    pub fn new(vcpus: usize, all_parked: EventFd) -> Self {
        Self {
            attention: AtomicBool::new(false),
            state: Mutex::new(GateState { vcpus, parked: 0, held: false, stopping: false }),
            changed: Condvar::new(),
            all_parked,
        }
    }

    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds vCPUs as they come; they must be kicked. True if all are parked already.
    pub fn hold(&self) -> bool {
        let mut state = self.state();
        state.held = true;
        self.attention.store(true, Ordering::Release);
        state.parked == state.vcpus
    }

    /// Lets vCPUs go on.
    pub fn release(&self) {
        let mut state = self.state();
        state.held = false;
        self.attention.store(state.stopping, Ordering::Release);
        self.changed.notify_all();
    }

    /// Ends vCPUs as they come; they must be kicked.
    pub fn stop(&self) {
        let mut state = self.state();
        state.stopping = true;
        self.attention.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Whether all vCPUs are parked.
    pub fn all_parked(&self) -> bool {
        let state = self.state();
        state.held && state.parked == state.vcpus
    }

    /// A vCPU's thread passes by, and sleeps here while it should. False if it should end. `before_sleep` runs first if
    /// it has to sleep.
    pub fn pass(&self, before_sleep: impl FnOnce()) -> bool {
        if !self.attention.load(Ordering::Acquire) {
            return true;
        }
        let mut state = self.state();
        if state.stopping || !state.held {
            return !state.stopping;
        }
        before_sleep();
        state.parked += 1;
        if state.parked == state.vcpus {
            let _ = self.all_parked.write(1);
        }
        while state.held && !state.stopping {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        !state.stopping
    }
}

/// What has to happen to the vCPUs after a change of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Close the gate and kick the vCPUs.
    Hold,
    /// Open the gate.
    Release,
}

/// The states, without the vCPUs.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    state: RunState,
    /// Nanoseconds of pauses that are over.
    paused_before_ns: u64,
    /// When the current one began.
    paused_since_ns: Option<u64>,
}

impl Lifecycle {
    /// A machine that runs.
    pub fn new() -> Self {
        Self { state: RunState::Running, paused_before_ns: 0, paused_since_ns: None }
    }

    /// What the machine does.
    pub fn state(&self) -> RunState {
        self.state
    }

    /// Somebody wants a pause.
    pub fn pause(&mut self) -> Effect {
        if self.state != RunState::Running {
            return Effect::None;
        }
        self.state = RunState::Pausing;
        Effect::Hold
    }

    /// All vCPUs are parked. A late report, after a resume, changes nothing.
    pub fn parked(&mut self, now_ns: u64) {
        if self.state == RunState::Pausing {
            self.state = RunState::Paused;
            self.paused_since_ns = Some(now_ns);
        }
    }

    /// Somebody wants it to go on.
    pub fn resume(&mut self, now_ns: u64) -> Effect {
        match self.state {
            RunState::Pausing | RunState::Paused => {
                self.paused_before_ns = self.paused_ns(now_ns);
                self.paused_since_ns = None;
                self.state = RunState::Running;
                Effect::Release
            }
            RunState::Running | RunState::Ending => Effect::None,
        }
    }

    /// It comes to its end.
    pub fn end(&mut self, now_ns: u64) {
        self.paused_before_ns = self.paused_ns(now_ns);
        self.paused_since_ns = None;
        self.state = RunState::Ending;
    }

    /// How long it has been paused in all.
    pub fn paused_ns(&self, now_ns: u64) -> u64 {
        let current = self.paused_since_ns.map_or(0, |since| now_ns.saturating_sub(since));
        self.paused_before_ns.saturating_add(current)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, atomic::AtomicU64},
        thread,
        time::{Duration, Instant},
    };

    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Pause,
        Resume,
        Parked,
        End,
        Wait(u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => Just(Step::Pause),
            3 => Just(Step::Resume),
            3 => Just(Step::Parked),
            1 => Just(Step::End),
            3 => any::<u8>().prop_map(Step::Wait),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        /// The model: what the last of pause, resume and end wanted, and whether all vCPUs reported since a pause.
        #[test]
        fn lifecycle_follows_its_model(steps in steps()) {
            let mut lifecycle = Lifecycle::new();
            let (mut wants_pause, mut is_parked, mut ended) = (false, false, false);
            let (mut now, mut paused) = (0u64, 0u64);
            for step in steps {
                let was_held = wants_pause && !ended;
                let mut effect = None;
                match step {
                    Step::Pause => {
                        effect = Some(lifecycle.pause());
                        wants_pause = true;
                        is_parked &= was_held;
                    }
                    Step::Resume => {
                        effect = Some(lifecycle.resume(now));
                        wants_pause = false;
                        is_parked = false;
                    }
                    Step::Parked => {
                        lifecycle.parked(now);
                        is_parked |= was_held;
                    }
                    Step::End => {
                        lifecycle.end(now);
                        ended = true;
                    }
                    Step::Wait(ns) => {
                        now += u64::from(ns);
                        if lifecycle.state() == RunState::Paused {
                            paused += u64::from(ns);
                        }
                    }
                }
                let is_held = wants_pause && !ended;
                if let Some(effect) = effect {
                    // The gate is closed exactly when a pause begins, and opened exactly when one ends.
                    let expected = match (was_held, is_held) {
                        _ if ended => Effect::None,
                        (false, true) => Effect::Hold,
                        (true, false) => Effect::Release,
                        _ => Effect::None,
                    };
                    prop_assert_eq!(effect, expected);
                }
                let expected = match (ended, is_held, is_parked) {
                    (true, ..) => RunState::Ending,
                    (_, false, _) => RunState::Running,
                    (_, true, false) => RunState::Pausing,
                    (_, true, true) => RunState::Paused,
                };
                prop_assert_eq!(lifecycle.state(), expected);
                prop_assert_eq!(lifecycle.paused_ns(now), paused);
            }
        }
    }

    fn until(mut met: impl FnMut() -> bool) {
        let patience = Instant::now() + Duration::from_secs(20);
        while !met() {
            assert!(Instant::now() < patience, "it never came to pass");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn gate_holds_all_threads_lets_them_go_and_ends_them() {
        const THREADS: usize = 4;
        let all_parked = EventFd::new(EFD_NONBLOCK).unwrap();
        let gate = Arc::new(Gate::new(THREADS, all_parked.try_clone().unwrap()));
        let rounds = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                let (gate, rounds) = (gate.clone(), rounds.clone());
                thread::spawn(move || {
                    while gate.pass(|| {}) {
                        rounds.fetch_add(1, Ordering::Relaxed);
                        thread::yield_now();
                    }
                })
            })
            .collect();
        for _ in 0..20 {
            let parked = gate.hold();
            assert!(!parked || gate.all_parked());
            until(|| gate.all_parked());
            assert!(all_parked.read().is_ok());
            let before = rounds.load(Ordering::Relaxed);
            thread::sleep(Duration::from_millis(2));
            assert_eq!(rounds.load(Ordering::Relaxed), before, "a held thread went on");
            assert!(gate.hold(), "holding again changes nothing");
            gate.release();
            until(|| rounds.load(Ordering::Relaxed) > before);
        }
        gate.hold();
        until(|| gate.all_parked());
        gate.stop();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn hold_right_after_release_of_sleeping_threads_counts_them_as_parked() {
        let gate = Arc::new(Gate::new(1, EventFd::new(EFD_NONBLOCK).unwrap()));
        let its = gate.clone();
        gate.hold();
        let thread = thread::spawn(move || while its.pass(|| {}) {});
        until(|| gate.all_parked());
        gate.release();
        // Whether the thread has noticed or not, it is parked in the end and no report is missed.
        if !gate.hold() {
            until(|| gate.all_parked());
        }
        gate.stop();
        thread.join().unwrap();
    }
}
