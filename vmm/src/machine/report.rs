//! Where events go: stamped when they happen, written together when the event loop is awake anyway.

use std::{
    fs::File,
    io::Write,
    os::fd::OwnedFd,
    sync::{Mutex, PoisonError},
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
    waiting: Mutex<Vec<Event>>,
}

/// Events that wait at most. A guest can write marks without end; the first ones are those that count.
const MAX_WAITING: usize = 64;

impl Reporter {
    /// Writes to `fd`, or nowhere.
    pub fn new(fd: Option<OwnedFd>) -> Self {
        Self { file: fd.map(File::from), waiting: Mutex::default() }
    }

    /// Notes that a moment has come, now.
    pub fn mark(&self, name: Mark) {
        self.push(Event::Mark { name, ns: monotonic_ns() });
    }

    /// Notes an event.
    pub fn push(&self, event: Event) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < MAX_WAITING || !matches!(event, Event::Mark { .. }) {
            waiting.push(event);
        }
    }

    /// Writes what waits, with one `write`.
    pub fn flush(&self) {
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
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
