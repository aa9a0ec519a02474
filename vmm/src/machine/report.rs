//! Where events go: stamped when they happen, written together when the event loop is awake anyway.

use std::{
    collections::HashSet,
    fs::File,
    io::Write,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::time::{ClockId, clock_gettime};
use tracing::warn;

use crate::event::{Event, Mark};

/// The host's CLOCK_MONOTONIC in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // It counts from boot: neither part is negative.
    (now.tv_sec as u64) * 1_000_000_000 + now.tv_nsec as u64
}

/// Collects events for the parent.
#[derive(Debug)]
pub struct Reporter {
    file: Option<File>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<Event>,
    /// A guest can write its marks as often as it likes; each counts once.
    marked: HashSet<Mark>,
}

impl Reporter {
    /// Writes to `fd`, or nowhere.
    pub fn new(fd: Option<OwnedFd>) -> Self {
        Self { file: fd.map(File::from), state: Mutex::default() }
    }

    /// Notes that a moment has come, now. Only the first time counts.
    pub fn mark(&self, name: Mark) {
        self.push(Event::Mark { name, ns: monotonic_ns() });
    }

    /// Notes an event.
    pub fn push(&self, event: Event) {
        let mut state = self.state();
        if let Event::Mark { name, .. } = event
            && !state.marked.insert(name)
        {
            return;
        }
        state.waiting.push(event);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what waits, with one `write`.
    pub fn flush(&self) {
        let waiting = std::mem::take(&mut self.state().waiting);
        let Some(mut file) = self.file.as_ref().filter(|_| !waiting.is_empty()) else { return };
        let mut lines = Vec::new();
        for event in waiting {
            // Writing to a Vec cannot fail, and every event has a JSON form.
            if serde_json::to_writer(&mut lines, &event).is_ok() {
                lines.push(b'\n');
            }
        }
        if let Err(error) = file.write_all(&lines) {
            // Nobody listens any more. The VM goes on: its end is the parent's decision.
            warn!(%error, "events could not be written");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn flush_after_repeated_marks_writes_each_once() {
        let mut file = tempfile::tempfile().unwrap();
        let reporter = Reporter::new(Some(file.try_clone().unwrap().into()));
        for mark in [Mark::Init, Mark::Init, Mark::AgentReady] {
            reporter.mark(mark);
        }
        reporter.flush();
        reporter.mark(Mark::Init);
        reporter.flush();
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        let events: Vec<Event> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(events.len(), 2);
        assert!(matches!(events[1], Event::Mark { name: Mark::AgentReady, ns } if ns > 0));
    }
}
